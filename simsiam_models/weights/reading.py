"""A checkpoint file -> plain containers of tensors, without running anything that the file says.

torch.load(weights_only=True) reads torch's present format, unless a file carries objects of its training code beside
the tensors (`meta` of OpenMMLab, numpy scalars). For those, for torch's older format and for bare pickles there is an
own reader. Its unpickler knows tensors, numpy arrays and plain containers; every other name in the file becomes an
inert `Opaque`, and no import happens. What a hostile file can still do is exhaust memory or stack, which ends the
process.
"""
import functools
import json
import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file in torch's format from before 1.6
STORAGES = {
    'FloatStorage': torch.float32, 'DoubleStorage': torch.float64, 'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16, 'LongStorage': torch.int64, 'IntStorage': torch.int32,
    'ShortStorage': torch.int16, 'CharStorage': torch.int8, 'ByteStorage': torch.uint8, 'BoolStorage': torch.bool,
    'UntypedStorage': torch.uint8,
}
COUNTER = 'num_batches_tracked'
PLAIN = (Tensor, str, bytes, bytearray, int, float, complex, torch.dtype, torch.device)


def read(path: str | Path) -> Any:
    """The contents of a .safetensors, torch or pickle file: dict, list, tuple, numbers, strings and CPU tensors.

    numpy arrays come back as tensors; objects of unknown classes as `Opaque`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint, or is damaged; one sentence says which.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f'{path} does not exist')
    if path.is_dir():
        raise ValueError(f'{path} is a folder, not a checkpoint file')
    with open(path, 'rb') as f:
        head = f.read(64)
    if not head:
        raise ValueError(f'{path} is empty')
    try:
        if head[8:9] == b'{' and 8 + int.from_bytes(head[:8], 'little') <= path.stat().st_size:
            return load_file(path)
        if head.lstrip()[:1] == b'<':
            raise ValueError(f'a web page: it begins with {head.lstrip()[:30]!r}')
        if not zipfile.is_zipfile(path):
            return _read_pickle(path)
        with zipfile.ZipFile(path) as archive:
            prefix = _check_zip(archive, path.stat().st_size)
            try:
                return _plain(torch.load(path, map_location='cpu', weights_only=True), {})
            except Exception:  # refused: the restricted reader leaves out what torch refuses
                return _read_zip(archive, prefix)
    except Exception as e:  # a damaged file raises whatever its bytes lead to
        reason = f'{type(e).__name__}: {e}'.split('\n')[0][:200]
        raise ValueError(f'{path} cannot be read as a checkpoint ({reason}); is it complete?') from None


class Opaque:
    """What is left of an object of an unknown class: nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> 'Opaque':
        return object.__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> 'Opaque':
        return Opaque()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    extend = add = append


class _Admitted:
    """A function that a file may call, and do nothing else with."""

    __slots__ = ('_call',)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise ValueError('a function that is given a state')


class _Dict(dict):
    """An OrderedDict or defaultdict while it is unpickled; torch gives those of modules a state, `_metadata`."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Dtype:
    def __init__(self, code: str) -> None:
        self.code, self.order = code, '<'

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1] if state[1] in ('<', '>') else '<'


class _Array:
    """A numpy array while it is unpickled; numpy itself takes no part."""

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, self.fortran, self.raw = state

    @functools.cached_property
    def tensor(self) -> Tensor | Opaque:
        if not isinstance(self.dtype, _Dtype) or self.dtype.code not in {
                'f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'b1'}:
            return Opaque()  # objects, strings, records
        raw = self.raw.encode('latin1') if isinstance(self.raw, str) else self.raw
        if not isinstance(raw, bytes | bytearray):
            return Opaque()
        flat = np.frombuffer(raw, np.dtype(self.dtype.code).newbyteorder(self.dtype.order))
        array = flat.reshape(self.shape, order='F' if self.fortran else 'C')
        return torch.from_numpy(array.astype(array.dtype.newbyteorder('='), order='C'))


class _Storage:
    """`numel` elements in a buffer that may be filled after the tensors on it were made."""

    def __init__(self, buffer: bytearray, dtype: torch.dtype) -> None:
        self.flat = torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype)


class _Unpickler(pickle.Unpickler):
    """Admits what is listed in `find_class`. All of it is ours or a builtin container; nothing is looked up by name."""

    def __init__(self, file: BinaryIO, storage: Any = None) -> None:
        super().__init__(file, encoding='latin1')
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == 'torch' and name in STORAGES or (module, name) == ('torch.storage', 'UntypedStorage'):
            return name
        numpy = module.removeprefix('numpy._core.').removeprefix('numpy.core.')
        admitted = {
            ('torch._utils', '_rebuild_tensor'): self.tensor,
            ('torch._utils', '_rebuild_tensor_v2'): self.tensor,
            ('torch._utils', '_rebuild_parameter'): self.parameter,
            ('torch._utils', '_rebuild_parameter_with_state'): self.parameter,
            ('torch._tensor', '_rebuild_from_type_v2'): self.subclass,
            ('torch', 'Size'): tuple,
            ('collections', 'OrderedDict'): lambda *_: _Dict(),
            ('collections', 'defaultdict'): lambda *_: _Dict(),
            ('builtins', 'set'): set, ('__builtin__', 'set'): set,
            ('builtins', 'bytes'): self.no_bytes, ('__builtin__', 'bytes'): self.no_bytes,
            ('_codecs', 'encode'): lambda text, *_: text.encode('latin1'),
            ('numpy', 'dtype'): lambda code, *_: _Dtype(code),
            ('multiarray', '_reconstruct'): lambda *_: _Array(),
            ('numeric', '_frombuffer'): self.frombuffer,
        }
        found = admitted.get((module, name)) or admitted.get((numpy, name))
        return _Admitted(found) if found else type('Opaque', (Opaque,), {})

    def persistent_load(self, pid: Any) -> Any:
        if self.storage is None or not isinstance(pid, tuple) or pid[0] != 'storage':
            return Opaque()
        _, kind, key, _, numel, *view = pid
        if not isinstance(kind, str) or not isinstance(numel, int) or numel < 0:
            raise ValueError('a storage without type or size')
        return self.storage(STORAGES[kind], str(key), numel, view[0] if view else None)

    def tensor(self, storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
        if not isinstance(storage, _Storage):
            raise ValueError('a tensor without storage')
        if offset < 0 or min(size, default=0) < 0 or min(stride, default=0) < 0:
            raise ValueError('a tensor of negative extent')
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        # An expanded tensor (stride 0) may have more elements than its storage; few files have a reason for it.
        if math.prod(size) and (last >= len(storage.flat) or math.prod(size) > max(len(storage.flat), 2**24)):
            raise ValueError('a tensor larger than its storage')
        return storage.flat.as_strided(size, stride, offset) if math.prod(size) else storage.flat.new_empty(size)

    def parameter(self, data: Any, *_: Any) -> Any:
        return data

    def subclass(self, build: Any, kind: Any, args: tuple, state: Any) -> Any:
        return build(*args)

    def no_bytes(self, *args: Any) -> Any:
        return Opaque() if args else b''

    def frombuffer(self, raw: bytes, dtype: Any, shape: tuple, order: str = 'C') -> _Array:
        array = _Array()
        array.__setstate__((1, shape, dtype, order == 'F', raw))
        return array


def _read_pickle(path: Path) -> Any:
    with open(path, 'rb') as f:
        first = _Unpickler(f).load()
        if first == LEGACY_MAGIC:
            return _read_legacy(f, path.stat().st_size)
        if isinstance(first, Opaque) or f.read(1):
            raise ValueError('not a checkpoint of a known format')
        return _plain(first, {})


def _check_zip(archive: zipfile.ZipFile, size: int) -> str:
    """Is this what torch.save writes, and undamaged? torch itself checks no checksum. Returns the folder inside."""
    infos = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in infos if name.count('/') == 1 and name.endswith('/data.pkl')]
    if len(pickles) != 1:
        raise ValueError('a zip archive, but not of torch.save')
    prefix = pickles[0].removesuffix('data.pkl')
    if f'{prefix}constants.pkl' in infos:
        raise ValueError('a TorchScript program, not a checkpoint')
    if any(info.compress_type != zipfile.ZIP_STORED or info.file_size > size for info in infos.values()):
        raise ValueError('compressed or larger inside than outside, which torch.save never writes')
    if damaged := archive.testzip():
        raise ValueError(f'damaged: {damaged} has another checksum than it should')
    return prefix


def _read_zip(archive: zipfile.ZipFile, prefix: str) -> Any:
    """torch's format since 1.6: `NAME/data.pkl`, and the bytes of storage K in `NAME/data/K`."""
    buffers: dict[str, bytearray] = {}
    if f'{prefix}byteorder' in archive.namelist() and archive.read(f'{prefix}byteorder') != b'little':
        raise ValueError('written on a big-endian machine')

    def storage(dtype: torch.dtype, key: str, numel: int, view: Any) -> _Storage:
        if key not in buffers:
            buffers[key] = bytearray(archive.read(f'{prefix}data/{key}'))
        return _Storage(buffers[key], dtype)

    with archive.open(f'{prefix}data.pkl') as f:
        return _plain(_Unpickler(f, storage).load(), {})


def _read_legacy(f: BinaryIO, size: int) -> Any:
    """torch's older format: pickles of protocol, system, contents, storage keys; then each storage as count + bytes."""
    buffers: dict[str, tuple[bytearray, torch.dtype]] = {}
    left = size

    def storage(dtype: torch.dtype, key: str, numel: int, view: Any) -> _Storage:
        nonlocal left
        if numel * dtype.itemsize > size:
            raise ValueError('a storage larger than the file')
        if view is not None:
            raise ValueError('views of storages, which torch wrote before 0.4')
        if key not in buffers:
            left -= numel * dtype.itemsize
            if left < 0:
                raise ValueError('storages larger than the file')
            buffers[key] = bytearray(numel * dtype.itemsize), dtype
        return _Storage(buffers[key][0], dtype)

    _Unpickler(f).load()  # protocol
    system = _Unpickler(f).load()
    if not isinstance(system, dict) or not system.get('little_endian', True):
        raise ValueError('written on a big-endian machine')
    contents = _Unpickler(f, storage).load()
    for key in _Unpickler(f).load():
        if str(key) not in buffers:
            raise ValueError('a storage that no tensor uses')
        buffer, dtype = buffers.pop(str(key))
        if int.from_bytes(f.read(8), 'little') * dtype.itemsize != len(buffer) or f.readinto(buffer) != len(buffer):
            raise ValueError('the file ends early')
    if buffers:
        raise ValueError('the file ends early')
    return _plain(contents, {})


def _plain(x: Any, seen: dict[int, Any]) -> Any:
    """Plain data as it is, arrays as tensors, containers as dict, list, tuple and set of such; all else as `Opaque`.

    torch's own reader needs it too: it admits what any library has registered as safe, SystemExit among others.
    """
    if isinstance(x, _Array):
        return x.tensor
    if x is None or isinstance(x, PLAIN):
        return x
    if not isinstance(x, dict | list | tuple | set):
        return Opaque()
    if id(x) in seen:
        return seen[id(x)][1]
    if isinstance(x, tuple | set):
        y = (tuple if isinstance(x, tuple) else set)(_plain(v, seen) for v in x)
        seen[id(x)] = x, y  # x stays alive, so that its id stays its own
        return y
    y = [] if isinstance(x, list) else {}
    seen[id(x)] = x, y
    if isinstance(x, list):
        y += [_plain(v, seen) for v in x]
    else:
        y.update((_plain(k, seen), _plain(v, seen)) for k, v in x.items())
    return y


def import_onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise RuntimeError("ONNX files need the onnx package: pip install 'simsiam-models[onnx]'") from error
    return onnx


def read_onnx(path: str | Path) -> dict[str, Tensor]:
    """The state dict of an ONNX file: its initializers and, from its metadata, the counters of the batch norms."""
    onnx = import_onnx()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path} is not a file')
    try:
        model = onnx.load(path)
        counters = json.loads({p.key: p.value for p in model.metadata_props}.get(COUNTER, '{}'))
        state = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    except Exception as error:  # protobuf, onnx and numpy each raise their own kinds for a damaged file
        raise ValueError(f'{path} is not a readable ONNX file ({type(error).__name__})') from error
    if not state:
        raise ValueError(f'{path} is not an ONNX file with weights in it')
    return state | {name: torch.tensor(n) for name, n in counters.items()}

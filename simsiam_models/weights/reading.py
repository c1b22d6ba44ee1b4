"""Reads checkpoint files into plain containers of tensors, without running any code from them.

The restricted reader of this module reads torch's two formats and bare pickles. Its unpickler knows tensors, numpy
arrays and plain containers, and imports nothing: every other name becomes an inert `Opaque`. If a file in torch's
current format has such a name, and torch.load(weights_only=True) knows it (sparse tensors, torch.float32), torch's
result is used. A hostile file can still exhaust memory or the stack, which ends the process.
"""
import errno
import functools
import io
import json
import math
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..runtime.messages import one_line, require, short
from .tensorfile import HEADS, MODEL

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file in torch's format before 1.6
STORAGES = {
    'FloatStorage': torch.float32, 'DoubleStorage': torch.float64, 'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16, 'LongStorage': torch.int64, 'IntStorage': torch.int32,
    'ShortStorage': torch.int16, 'CharStorage': torch.int8, 'ByteStorage': torch.uint8, 'BoolStorage': torch.bool,
    'UntypedStorage': torch.uint8,
}
LOCAL_HEADER = struct.Struct('<4s2xH18x2H')  # of a member of a zip archive: signature, flags, lengths of name and extra
PIECE = 1 << 20  # bytes that are read before their checksum, and still in the cache then
COUNTER = 'num_batches_tracked'
REAL = ('weight', 'bias', 'running_mean', 'running_var')  # entries with these names hold floating-point numbers
T = TypeVar('T')
PLAIN = (Tensor, str, bytes, bytearray, int, float, complex, torch.dtype, torch.device)
SHARD = re.compile(r'-\d+-of-0*([2-9]|[1-9]\d+)\.\w+$')  # model-00001-of-00003.safetensors
MERGE = 'read all shards where they were made, and save their entries as one file'
# How files begin that are no checkpoints -> what they are, and the way on.
OTHER_FILES = {
    b'version https://git-lfs': 'a Git LFS pointer, not the weights; run `git lfs pull` in its repository',
    b'\x1f\x8b': 'a gzip archive; unpack it, and name the checkpoint in it',
    b'BZh': 'a bzip2 archive; unpack it, and name the checkpoint in it',
    b'\x89HDF': 'an HDF5 file, as Keras writes it; save the weights with torch',
    b'\x93NUMPY': 'a numpy array; save the weights with torch',
}


def read(path: str | Path) -> Any:
    """Reads a .safetensors, torch or pickle file into plain containers, numbers, strings, CPU tensors and `Opaque`.

    Raises:
        FileNotFoundError, OSError: the file does not exist, or the disk failed or refused to read it.
        ValueError: the file is not a checkpoint or is damaged, or memory ran out; the message says which.
    """
    path = Path(path)
    require_file(path)
    if SHARD.search(path.name):
        raise ValueError(f'{path} is one of several shards of a checkpoint; {MERGE}')
    disk = DiskFile(path)
    with io.BufferedReader(disk) as file:
        try:
            return _read_contents(file, path)
        except MemoryError:
            raise ValueError(f'{path} cannot be read as a checkpoint: it needs more memory than is free; free some '
                             'memory, or name a smaller file') from None
        except Exception as e:  # pickle, zipfile, torch and safetensors raise whatever damaged bytes lead to
            failure = disk.error or e
            if isinstance(failure, OSError) and failure.errno != errno.EINVAL:  # EINVAL: a wrong offset in the file
                raise failure from None
            if kind := _name_kind(path):
                raise ValueError(f'{path} cannot be read as a checkpoint: it is {kind}') from None
            reason = one_line(f'{type(e).__name__}: {e}')
            raise ValueError(f'{path} cannot be read as a checkpoint ({reason}); is it complete?') from None


def require_file(path: Path) -> None:
    """Raises FileNotFoundError, or ValueError if it is no regular file: opening a FIFO would wait for ever."""
    if path.is_dir():
        raise ValueError(f'{path} is a folder, not a checkpoint file')
    if not path.exists():
        raise FileNotFoundError(f'{path} does not exist')
    if not path.is_file():
        raise ValueError(f'{path} is a FIFO, a socket or a device, not a file; name a weights file')


def read_head(path: Path) -> bytes:
    """Returns the first bytes of a file, enough to identify its format."""
    require_file(path)
    with open(path, 'rb') as f:
        return f.read(4096)


def is_safetensors(head: bytes) -> bool:
    """Returns whether a file begins as safetensors do: the length of a header of at most 100 MB, and the header."""
    return head[8:9] == b'{' and int.from_bytes(head[:8], 'little') <= 10 ** 8


def _name_kind(path: Path) -> str:
    """Names the kind of file, and the way on, if its first bytes tell; '' if they do not."""
    head = read_head(path)
    if is_safetensors(head):
        return '' if 8 + int.from_bytes(head[:8], 'little') <= path.stat().st_size else (
            'a safetensors file that was cut off; copy or download it again')
    if found := next((kind for start, kind in OTHER_FILES.items() if head.startswith(start)), ''):
        return found
    if head.lstrip()[:1] == b'<':
        return f'a web page (it begins with {head.lstrip()[:30]!r}); download the file itself'
    text = bool(head) and min(head.translate(None, b'\t\n\f\r'), default=0) >= 32
    return 'a text file; name a weights file, or the folder of a run' if text else ''


def require_safetensors(path: Path) -> None:
    """Raises ValueError if a file that must be safetensors is something else; the text says what."""
    head = read_head(path)
    if not is_safetensors(head):
        kind = 'a torch file' if head.startswith((b'PK\x03\x04', b'\x80')) else _name_kind(path) or 'another file'
        raise ValueError(f'{path} is not a safetensors file but {kind}; export its folder again')


def require_numbers(state: dict[str, Tensor], where: str = '') -> None:
    """Raises ValueError for an entry that torch would copy into a network as other numbers, or not at all.

    `where` is what the message begins with.
    """
    for key, value in state.items():
        kind = ''
        if value.is_meta or value.is_quantized or value.layout != torch.strided:
            kind = 'on the device meta' if value.is_meta else 'quantized' if value.is_quantized else str(value.layout)
        elif key.rpartition('.')[2] in REAL and not value.is_floating_point():
            kind = str(value.dtype)
        if kind:
            raise ValueError(f'{where}{short(key)} is {kind}: save the weights as dense floating-point tensors')


def find_export(folder: Path) -> Path:
    """Returns the model.safetensors of an exported folder: no other kind of file is read from a folder.

    Raises FileNotFoundError if it has none, ValueError if it is another kind of file; the text says what is there.
    """
    file = folder / MODEL
    if file.exists():
        require_safetensors(file)
        return file
    names = sorted(p.name for p in folder.iterdir())[:1000] if folder.is_dir() else []
    if any(name.endswith('.index.json') or SHARD.search(name) for name in names):
        raise ValueError(f'{folder} holds a checkpoint in several shards; {MERGE}')
    if any(name.endswith('.distcp') for name in names):
        raise ValueError(
            f'{folder} holds shards of torch.distributed.checkpoint; merge them with python -m '
            f'torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE')
    endings = ('.bin', '.pth', '.pt', '.tar', '.ckpt', '.safetensors')
    others = [name for name in names if name.endswith(endings) and name != HEADS]
    raise FileNotFoundError(f'{folder}: no {MODEL} there; ' + (
        f'name the file itself, {folder / others[0]}' if others else 'name a folder that was exported for timm'))


class DiskFile(io.FileIO):
    """Remembers a failed read: zipfile and torch raise errors of their own instead, as if the contents were damaged."""

    error: OSError | None = None

    def readinto(self, buffer: Any) -> int | None:
        return self.watch(functools.partial(super().readinto, buffer))

    def readall(self) -> bytes:
        return self.watch(super().readall)

    def watch(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except OSError as e:
            self.error = e
            raise


def _read_contents(file: 'io.BufferedReader[DiskFile]', path: Path) -> Any:
    size = path.stat().st_size
    head = file.read(64)
    file.seek(0)
    if not head:
        raise ValueError('the file is empty')
    if head[8:9] == b'{' and 8 + int.from_bytes(head[:8], 'little') <= size:
        return load_file(path)
    if not head.startswith(b'PK\x03\x04'):
        first = RestrictedUnpickler(file).load()
        if first == LEGACY_MAGIC:
            return _read_legacy(file, size)
        if isinstance(first, Opaque) or file.read(1):
            raise ValueError('not a checkpoint of a known format')
        return _to_plain(first, {})
    with zipfile.ZipFile(file) as archive:
        return _read_zip(file, archive.infolist(), _check_zip(archive, size))


class Opaque:
    """Stands for an object of an unknown class, and keeps nothing of it but the name of the class."""

    origin = 'an object'

    def __new__(cls, *args: Any, **kwargs: Any) -> 'Opaque':
        return object.__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> 'Opaque':
        return Opaque()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = __init__


class AllowedCall:
    """A function that a file may call but not change."""

    __slots__ = ('_call',)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise ValueError('the file sets the state of a function')


class PickledDict(dict[Any, Any]):
    """An OrderedDict or defaultdict during unpickling. torch gives the state dicts of modules a state, `_metadata`."""

    def __setstate__(self, state: Any) -> None:
        pass


class PickledDtype:
    """A numpy dtype during unpickling: its code and its byte order."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.order: Literal['<', '>'] = '<'

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ('<', '>') else '<'


class PickledArray:
    """A numpy array during unpickling, which runs no code of numpy."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, self.fortran, self.raw = state

    @functools.cached_property
    def tensor(self) -> Tensor | Opaque:
        if not isinstance(self.dtype, PickledDtype) or self.dtype.code not in {
                'f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'b1'}:
            return Opaque()  # objects, strings, records
        raw = self.raw.encode('latin1') if isinstance(self.raw, str) else self.raw
        if not isinstance(raw, bytes | bytearray):
            return Opaque()
        array = np.frombuffer(raw, np.dtype(self.dtype.code).newbyteorder(self.dtype.order))
        array = array.reshape(self.shape, order='F' if self.fortran else 'C')
        return torch.from_numpy(array.astype(array.dtype.newbyteorder('='), order='C'))


def make_array(raw: bytes, dtype: Any, shape: tuple[int, ...], order: str = 'C') -> PickledArray:
    array = PickledArray()
    array.__setstate__((1, shape, dtype, order == 'F', raw))
    return array


class Storage:
    """Elements in a buffer. The buffer may be filled after tensors were built on it."""

    def __init__(self, buffer: Tensor, dtype: torch.dtype) -> None:
        self.flat = buffer.view(dtype)


class RestrictedUnpickler(pickle.Unpickler):
    """Allows the names listed in `find_class`: functions of this module and builtin containers. It imports nothing."""

    def __init__(self, file: BinaryIO, storage: Any = None) -> None:
        super().__init__(file, encoding='latin1')
        self.storage, self.is_complete = storage, True  # False after a name that is unknown here

    def find_class(self, module: str, name: str) -> Any:
        if module == 'torch' and name in STORAGES or (module, name) == ('torch.storage', 'UntypedStorage'):
            return name
        house = module.removeprefix('numpy._core.').removeprefix('numpy.core.').replace('__builtin__', 'builtins')
        functions: dict[str, Callable[..., Any]] = {
            'torch._utils _rebuild_tensor': self.rebuild_tensor,
            'torch._utils _rebuild_tensor_v2': self.rebuild_tensor,
            'torch._utils _rebuild_parameter': lambda data, *_: data,
            'torch._utils _rebuild_parameter_with_state': lambda data, *_: data,
            'torch._tensor _rebuild_from_type_v2': lambda build, kind, args, state: build(*args),
            'torch Size': tuple, 'builtins set': set,
            'builtins bytes': lambda *args: Opaque() if args else b'',
            'collections OrderedDict': lambda *_: PickledDict(), 'collections defaultdict': lambda *_: PickledDict(),
            '_codecs encode': lambda text, *_: text.encode('latin1'),
            'numpy dtype': lambda code, *_: PickledDtype(code),
            'multiarray _reconstruct': lambda *_: PickledArray(), 'numeric _frombuffer': make_array,
        }
        if found := functions.get(f'{house} {name}'):
            return AllowedCall(found)
        self.is_complete = False
        return type('Opaque', (Opaque,), {'origin': short(f'{module}.{name}')})

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and pid[:1] == ('module',) and len(pid) > 1:  # the class of one, with its source
            return pid[1] if isinstance(pid[1], type) and issubclass(pid[1], Opaque) else Opaque()
        if self.storage is None or not isinstance(pid, tuple) or pid[:1] != ('storage',):
            return Opaque()
        _, kind, key, _, numel, *view = pid
        if not isinstance(kind, str) or not isinstance(numel, int) or numel < 0:
            raise ValueError('a storage has no type or size')
        return self.storage(STORAGES[kind], str(key), numel, view[0] if view else None)

    def rebuild_tensor(
        self, storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *more: Any,
    ) -> Tensor:
        self.is_complete &= not any(more[2:])  # whether it is to be negated or conjugated
        if not isinstance(storage, Storage):
            raise ValueError('its tensors were pickled without torch.save, which has to write them')
        if min(0, offset, *size, *stride) < 0:
            raise ValueError('a tensor has a negative extent')
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        numel, available = math.prod(size), len(storage.flat)
        # An expanded tensor (stride 0) may have more elements than its storage; few files have a reason for that.
        if numel and (last >= available or numel > max(available, 2**24)):
            raise ValueError('a tensor is larger than its storage')
        return storage.flat.as_strided(size, stride, offset) if numel else storage.flat.new_empty(size)


def _check_zip(archive: zipfile.ZipFile, size: int) -> str:
    """Checks that torch.save wrote the archive. Returns the folder inside."""
    infos = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in infos if name.count('/') == 1 and name.endswith('/data.pkl')]
    if len(pickles) != 1:
        raise ValueError('a zip archive that torch.save did not write')
    prefix = pickles[0].removesuffix('data.pkl')
    if f'{prefix}constants.pkl' in infos:
        raise ValueError('a TorchScript program, not a checkpoint: save the state_dict() of the module')
    members = archive.infolist()
    if any(x.compress_type != zipfile.ZIP_STORED for x in members) or sum(x.file_size for x in members) > size:
        raise ValueError(
            'the archive is compressed, or its members add up to more than the file, which torch.save never writes')
    return prefix


def _make_buffer(size: int) -> Tensor:
    if not size:
        return torch.empty(0, dtype=torch.uint8)  # NumPy's would have stride 0, which has no view of another type
    return torch.from_numpy(np.empty(size, np.uint8))  # raises MemoryError; torch.empty would raise RuntimeError


def _read_member(file: 'io.BufferedReader[DiskFile]', info: zipfile.ZipInfo) -> Tensor:
    """Reads a member of an archive once, to uint8, and checks its checksum, which torch ignores."""
    file.seek(info.header_offset)
    head = file.read(LOCAL_HEADER.size)
    signature, flags, name, extra = LOCAL_HEADER.unpack(head) if len(head) == LOCAL_HEADER.size else (b'', 0, 0, 0)
    named = info.orig_filename.encode('utf-8' if info.flag_bits & 0x800 else 'cp437')
    if signature != b'PK\x03\x04' or (flags | info.flag_bits) & 1 or file.read(name) != named:  # 1: encrypted
        raise ValueError(f'damaged: {short(info.filename)} is not where the index of the archive says')
    file.seek(extra, io.SEEK_CUR)
    buffer, crc = _make_buffer(info.file_size), 0
    view = buffer.numpy().data
    for start in range(0, len(view), PIECE):
        part = view[start:start + PIECE]
        if file.readinto(part) != len(part):
            raise ValueError('the file ends early')
        crc = zlib.crc32(part, crc)
    if crc != info.CRC:
        raise ValueError(f'damaged: the checksum of {short(info.filename)} is wrong')
    return buffer


def _read_zip(file: 'io.BufferedReader[DiskFile]', infos: list[zipfile.ZipInfo], prefix: str) -> Any:
    """Reads torch's format since 1.6: `NAME/data.pkl`, and the bytes of storage K in `NAME/data/K`."""
    members = {info.filename: _read_member(file, info) for info in infos}
    pickled = io.BytesIO(members[f'{prefix}data.pkl'].numpy().data)
    unpickler = RestrictedUnpickler(
        pickled, lambda dtype, key, *_: Storage(members[f'{prefix}data/{key}'], dtype))
    contents = failure = None
    try:
        if bytes(members.get(f'{prefix}byteorder', b'little')) != b'little':
            raise ValueError('the file comes from a big-endian machine')
        contents = _to_plain(unpickler.load(), {})
    except MemoryError:
        raise
    except Exception as e:  # pickle raises whatever damaged bytes lead to
        failure = e
    if failure is None and unpickler.is_complete:
        return contents
    file.seek(0)
    try:
        return _to_plain(torch.load(file, map_location='cpu', weights_only=True), {})
    except Exception as e:  # torch raises many types for what it refuses
        if failure is None and file.raw.error is None:
            return contents
        raise failure or e from None


def _read_legacy(f: 'io.BufferedReader[DiskFile]', left: int) -> Any:
    """Reads torch's older format: pickles of protocol, system, contents, storage keys; then each storage."""
    buffers: dict[str, tuple[Tensor, torch.dtype]] = {}

    def storage(dtype: torch.dtype, key: str, numel: int, view: Any) -> Storage:
        nonlocal left
        if view is not None:
            raise ValueError('it holds views of storages, which torch wrote before 0.4')
        if key not in buffers:
            left -= numel * dtype.itemsize
            if left < 0:
                raise ValueError('the storages are larger than the file')
            buffers[key] = _make_buffer(numel * dtype.itemsize), dtype
        return Storage(buffers[key][0], dtype)

    RestrictedUnpickler(f).load()  # protocol
    system = RestrictedUnpickler(f).load()
    if not isinstance(system, dict) or not system.get('little_endian', True):
        raise ValueError('the file comes from a big-endian machine')
    contents = RestrictedUnpickler(f, storage).load()
    for key in RestrictedUnpickler(f).load():  # each storage: number of elements (8 bytes), then the elements
        if str(key) not in buffers:
            raise ValueError('no tensor uses one of its storages')
        buffer, dtype = buffers.pop(str(key))
        numel = int.from_bytes(f.read(8), 'little')
        if numel * dtype.itemsize != len(buffer) or f.readinto(buffer.numpy().data) != len(buffer):
            raise ValueError('the file ends early')
    if buffers:
        raise ValueError('the file ends early')
    return _to_plain(contents, {})


def _to_plain(x: Any, seen: dict[int, Any]) -> Any:
    """Converts arrays to tensors, containers to dict, list, tuple and set, and everything but plain data to `Opaque`.

    The result of torch's own reader needs this too: it allows what any library has registered, even SystemExit.
    """
    if isinstance(x, PickledArray):
        return x.tensor
    if x is None or isinstance(x, (*PLAIN, Opaque)):
        return x
    if not isinstance(x, dict | list | tuple | set):
        return Opaque()
    if id(x) in seen:
        return seen[id(x)][1]
    if isinstance(x, tuple | set):
        frozen = (tuple if isinstance(x, tuple) else set)(_to_plain(v, seen) for v in x)
        seen[id(x)] = x, frozen  # x stays alive, so that its id stays its own
        return frozen
    y: Any = [] if isinstance(x, list) else {}
    seen[id(x)] = x, y
    if isinstance(x, list):
        y += [_to_plain(v, seen) for v in x]
    else:
        y.update((_to_plain(k, seen), _to_plain(v, seen)) for k, v in x.items())
    return y


def read_onnx(path: str | Path) -> dict[str, Tensor]:
    """Returns the state dict of an ONNX file: its initializers, and the batch norms' counters from its metadata.

    Raises FileNotFoundError, ValueError if it is damaged or holds no weights, RuntimeError if onnx is not installed.
    """
    require('an ONNX file', onnx='onnx')
    import onnx

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path} is not a file')
    try:
        model = onnx.load(path)
        counters = json.loads({p.key: p.value for p in model.metadata_props}.get(COUNTER, '{}'))
        counters = {name: torch.tensor(int(n)) for name, n in counters.items() if name.endswith(COUNTER)}
        state = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    except (OSError, MemoryError):  # not the contents
        raise
    except Exception as error:  # protobuf, onnx and numpy each raise their own types for a damaged file
        raise ValueError(f'{path} is not a readable ONNX file ({type(error).__name__})') from error
    if not state:
        raise ValueError(f'{path} is not an ONNX file with weights in it')
    return state | counters

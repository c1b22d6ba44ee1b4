"""kernel.c, compiled at first use with the machine's C compiler and kept; without one, NumPy, PIL and torch stand in.

No compiler is needed to install the package, and the code is made for the processor that runs it. SIMSIAM_KERNEL=0
leaves it out.
"""
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np

from ..runtime.files import cache_folder

SOURCE = Path(__file__).with_name('kernel.c')
# No contraction of a * b + c: the same numbers from every processor. The other two only drop errno and signals.
FLAGS = ['-O3', '-std=gnu11', '-fPIC', '-shared', '-ffp-contract=off', '-fno-math-errno', '-fno-trapping-math']
# The first that the compiler knows; wide vectors pay here.
NATIVE = (['-march=native', '-mprefer-vector-width=512'], ['-march=native'], ['-mcpu=native'], [])
COMPILE_SECONDS = 120

_logger = logging.getLogger('simsiam_models')
_lock, _thread = threading.Lock(), threading.local()


def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None (said once, with the reason)."""
    with _lock:
        return _library()


@functools.cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get('SIMSIAM_KERNEL') == '0':
        return None
    try:
        lib = _load()
    except (OSError, RuntimeError, subprocess.SubprocessError) as e:
        reason = ' '.join(str(e).split())[:200]
        _logger.warning(f'the augmentation kernel cannot be compiled ({reason}): going on without, slower')
        return None
    i64, pointer = ctypes.c_int64, ctypes.c_void_p
    lib.philox_words.argtypes = [i64, pointer, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint32, i64, pointer]
    lib.philox_words.restype = None
    lib.crop_boxes.argtypes = [i64, pointer, pointer, pointer, pointer]
    lib.crop_boxes.restype = None
    lib.views.argtypes = [i64, *[pointer] * 6, ctypes.c_int, pointer]
    lib.scratch_bytes.argtypes, lib.scratch_bytes.restype = [i64, pointer, ctypes.c_int], i64
    lib.pillow_resize.argtypes = [pointer, *[ctypes.c_int] * 8, pointer]
    lib.dots.argtypes, lib.dots.restype = [i64, pointer, pointer, i64, pointer, pointer], None
    return lib


def _load() -> ctypes.CDLL:
    compiler = os.environ.get('CC') or next(filter(None, map(shutil.which, ('cc', 'gcc', 'clang'))), None)
    if compiler is None:
        raise RuntimeError('no C compiler: neither cc nor gcc nor clang')
    folder = cache_folder()
    if folder is None or not _is_ours(folder):
        with tempfile.TemporaryDirectory(prefix='simsiam_models-') as once:  # the mapping outlives the file
            return _compile(compiler, Path(once) / 'kernel.so')
    # A home folder may be shared by machines whose processors differ.
    made_for = repr((SOURCE.read_bytes(), FLAGS, NATIVE, compiler, platform.machine(), _processor()))
    path = folder / f'kernel-{hashlib.sha256(made_for.encode()).hexdigest()[:16]}.so'
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # not there, or damaged
        return _compile(compiler, path)


def _compile(compiler: str, path: Path) -> ctypes.CDLL:
    """Under a name of this process's own, then renamed: other processes see a whole file or none."""
    handle, name = tempfile.mkstemp('.part', path.stem, path.parent)  # process ids repeat between containers
    os.close(handle)
    part = Path(name)
    try:
        for native in NATIVE:
            command = [*compiler.split(), *FLAGS, *native, str(SOURCE), '-o', str(part), '-lm']
            done = subprocess.run(
                command, capture_output=True, text=True, errors='replace', timeout=COMPILE_SECONDS,
                stdin=subprocess.DEVNULL)
            if done.returncode == 0:
                os.replace(part, path)
                return ctypes.CDLL(str(path))
        raise RuntimeError(f'{compiler}: {done.stderr or done.stdout or f"exit status {done.returncode}"}')
    finally:
        part.unlink(missing_ok=True)


def _is_ours(folder: Path) -> bool:
    """What others can write is not loaded as code."""
    status = folder.stat()
    return not hasattr(os, 'getuid') or (status.st_uid == os.getuid() and not status.st_mode & 0o022)


def _processor() -> str:
    try:
        with open('/proc/cpuinfo') as f:
            return next((line for line in f if line.startswith(('flags', 'Features'))), '')
    except OSError:
        return platform.processor()


def philox_words(seed: int, epoch: int, indices: np.ndarray, first_block: int, blocks: int) -> np.ndarray:
    """counted._words: (n,) indices -> (n, 4 blocks) random 32-bit words."""
    indices = np.ascontiguousarray(indices, np.int64)
    out = np.empty((len(indices), 4 * blocks), np.uint32)
    library().philox_words(
        len(indices), indices.ctypes.data, epoch, seed & (2**64 - 1), first_block, blocks, out.ctypes.data)
    return out


def crop_boxes(u: np.ndarray, sizes: np.ndarray, rule: np.ndarray) -> np.ndarray:
    """(n, 22) numbers in [0, 1) and (n, 2) widths and heights -> (n, 4) left, top, width, height.

    rule: least and largest share of the area, least and largest width / height.
    """
    u, rule = np.ascontiguousarray(u, np.float64), np.ascontiguousarray(rule, np.float64)
    sizes, out = np.ascontiguousarray(sizes, np.int64), np.empty((len(u), 4), np.int64)
    library().crop_boxes(len(u), u.ctypes.data, sizes.ctypes.data, rule.ctypes.data, out.ctypes.data)
    return out


def views(
    images: list[np.ndarray], u: np.ndarray, rule: np.ndarray, table: np.ndarray | None, out: np.ndarray,
    rows: np.ndarray,
) -> None:
    """Cut image i by u[i] and write it to out[rows[i]]: finished by table[i], or the bytes of the crop without a table.

    Args:
        images: n of (H, W, 3) uint8.
        u: (n, 22) float64, for the crop's box.
        rule: as for `crop_boxes`.
        table: (n, 12) float32, `augment.Finish.table`, or None.
        out: (N, S, S, 3), C order; float32 with a table, else uint8.
        rows: (n,) which of them.
    """
    n, size = len(images), out.shape[1]
    images = [np.ascontiguousarray(x) for x in images]
    u, rows = np.ascontiguousarray(u), np.asarray(rows, np.int64)
    if table is not None:
        table = np.ascontiguousarray(table, np.float32)
    # A kernel that is handed a wrong shape would read and write anywhere.
    fits = (
        all(x.dtype == np.uint8 and x.ndim == 3 and x.shape[2] == 3 and x.size for x in images)
        and u.shape == (n, 22) and u.dtype == np.float64 and rule.shape == (4,) and rule.dtype == np.float64
        and out.shape[1:] == (size, size, 3) and out.flags.c_contiguous
        and out.dtype == (np.uint8 if table is None else np.float32) and (table is None or table.shape == (n, 12))
        and rows.shape == (n,) and (n == 0 or (rows.min() >= 0 and rows.max() < len(out))))
    if not fits:
        raise ValueError(
            f'the kernel needs images (H, W, 3) uint8 and arrays that fit; it got {[x.shape for x in images[:3]]}, '
            f'u {u.shape}, rows {rows.shape}, out {out.shape} {out.dtype}')
    pointers = np.array([x.ctypes.data for x in images], np.uintp)
    sizes = np.array([x.shape[1::-1] for x in images], np.int64)
    targets = (out.ctypes.data + rows * out.strides[0]).astype(np.uintp)
    parameters = None if table is None else table.ctypes.data
    need = library().scratch_bytes(n, parameters, size)
    if len(getattr(_thread, 'scratch', b'')) < need:
        _thread.scratch = np.empty(need, np.uint8)
    if library().views(
            n, pointers.ctypes.data, sizes.ctypes.data, u.ctypes.data, rule.ctypes.data, parameters,
            targets.ctypes.data, size, _thread.scratch.ctypes.data):
        raise MemoryError(f'no memory for views of {size} pixels')


def resize(image: np.ndarray, width: int, height: int, left: int, top: int, out: np.ndarray) -> None:
    """PIL's bilinear resize of `image` to width x height, bit for bit; the window of it at (left, top) goes to `out`.

    Args:
        image: (H, W, 3) uint8.
        out: (h, w, 3) uint8, C order, of a size that fits into the window.
    """
    image = np.ascontiguousarray(image)
    h, w = out.shape[:2]
    fits = (
        image.dtype == out.dtype == np.uint8 and image.ndim == out.ndim == 3 and image.shape[2] == out.shape[2] == 3
        and image.size and out.size and out.flags.c_contiguous
        and 0 <= left <= width - w and 0 <= top <= height - h)
    if not fits:
        raise ValueError(
            f'no window {out.shape} {out.dtype} at ({left}, {top}) of an image {image.shape} {image.dtype} that is '
            f'resized to {width} x {height}')
    if library().pillow_resize(
            image.ctypes.data, image.shape[1], image.shape[0], width, height, left, top, w, h, out.ctypes.data):
        raise MemoryError(f'no memory to resize an image to {width} x {height}')


def dots(table: np.ndarray, rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Products in float64 of rows of a (N, d) float32 table, in C order, with a query (d,) float64 -> (n,)."""
    rows, query = np.ascontiguousarray(rows, np.int64), np.ascontiguousarray(query, np.float64)
    fits = (
        table.dtype == np.float32 and table.ndim == 2 and table.flags.c_contiguous and query.shape == table.shape[1:]
        and rows.ndim == 1 and (len(rows) == 0 or (rows.min() >= 0 and rows.max() < len(table))))
    if not fits:
        raise ValueError(f'no products of {rows.shape} rows of {table.shape} {table.dtype} with {query.shape}')
    out = np.empty(len(rows))
    library().dots(
        len(rows), rows.ctypes.data, table.ctypes.data, table.shape[1], query.ctypes.data, out.ctypes.data)
    return out

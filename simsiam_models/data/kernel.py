"""Compiles kernel.c with the machine's C compiler at first use and keeps it; NumPy, PIL and torch are the fallback.

The package therefore installs without a compiler, and the code is built for the processor that runs it.
SIMSIAM_KERNEL=0 turns the kernel off.
"""
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from ..runtime.files import ABANDONED, cache_folder, replacing, write_synced
from ..runtime.messages import one_line, silent
from ..runtime.runlock import RunLock
from .kernel_check import find_fault

SOURCE = Path(__file__).with_name('kernel.c')
# No contraction of a * b + c, so that every processor gives the same numbers. The last two only drop errno and signals.
FLAGS = ['-O3', '-std=gnu11', '-fPIC', '-shared', '-ffp-contract=off', '-fno-math-errno', '-fno-trapping-math']
# The first set that the compiler accepts; wide vectors are worth it here.
NATIVE = (['-march=native', '-mprefer-vector-width=512'], ['-march=native'], ['-mcpu=native'], [])
COMPILE_SECONDS = 120
TEMPORARY = 'simsiam_models-kernel-'

_logger = logging.getLogger('simsiam_models')
_lock, _thread = threading.Lock(), threading.local()


def load_library() -> ctypes.CDLL | None:
    """Returns the compiled kernel; None, with one warning, if it cannot be compiled."""
    with _lock:
        return _load_once()


@functools.cache
def _load_once() -> ctypes.CDLL | None:
    if os.environ.get('SIMSIAM_KERNEL') == '0':
        return None
    try:
        lib = _load_or_compile()
    except (OSError, RuntimeError, subprocess.SubprocessError) as e:
        _logger.warning(f'the augmentation kernel cannot be compiled ({one_line(e)}); continuing without it, slower')
        return None
    i64, pointer = ctypes.c_int64, ctypes.c_void_p
    lib.philox_words.argtypes = [i64, pointer, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint32, i64, pointer]
    lib.crop_boxes.argtypes = [i64, pointer, pointer, pointer, pointer]
    lib.views.argtypes = [i64, *[pointer] * 6, ctypes.c_int, pointer]
    lib.scratch_bytes.argtypes, lib.scratch_bytes.restype = [i64, pointer, ctypes.c_int], i64
    lib.pillow_resize.argtypes = [pointer, *[ctypes.c_int] * 8, pointer]
    return lib


def _load_or_compile() -> ctypes.CDLL:
    compiler = os.environ.get('CC') or next(filter(None, map(shutil.which, ('cc', 'gcc', 'clang'))), None)
    if compiler is None:
        raise RuntimeError('no C compiler found: neither cc, gcc nor clang')
    folder = cache_folder()
    # No code is loaded from a folder that other users can write to.
    if folder is None or hasattr(os, 'getuid') and (
            folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022):
        with tempfile.TemporaryDirectory(prefix=TEMPORARY) as once:  # the mapping outlives the file
            return _build(compiler, Path(once), '')
    # Machines with different processors may share a home folder.
    built_for = repr((SOURCE.read_bytes(), FLAGS, NATIVE, compiler, platform.machine(), _processor_flags()))
    key = _hash(built_for.encode())
    if (library := _load_cached(folder, key)) is not None:
        return library
    with _hold_build_lock(folder / f'kernel-{key}.lock'):
        for left in folder.glob(f'kernel-{key}*.part'):  # by a process that was killed
            left.unlink(missing_ok=True)
        return _load_cached(folder, key) or _build(compiler, folder, key)


def _load_cached(folder: Path, key: str) -> ctypes.CDLL | None:
    """Returns the kernel from the cache, or None; deletes what is damaged."""
    for path in sorted(folder.glob(f'kernel-{key}-*.so')):
        with suppress(OSError):
            # Its hash first: loading a file that was cut off may end the process.
            if _hash(path.read_bytes()) == path.stem.rpartition('-')[2]:
                library = ctypes.CDLL(str(path))
                if not find_fault(library):
                    return library
        with suppress(OSError):
            path.unlink()
    return None


@contextmanager
def _hold_build_lock(path: Path) -> Iterator[None]:
    """Lets one process build for all that share the cache; after COMPILE_SECONDS, each for itself."""
    lock, end = RunLock(path, silent), time.monotonic() + COMPILE_SECONDS
    while time.monotonic() < end:
        try:
            lock.acquire()
            break
        except ValueError:  # another process is building
            time.sleep(0.1)
    try:
        yield
    finally:
        lock.release()


def _build(compiler: str, folder: Path, key: str) -> ctypes.CDLL:
    """Compiles the kernel, and keeps it in `folder` if it computes what it should.

    Raises:
        RuntimeError: no set of flags leads to a kernel that does.
    """
    fault = ''
    _remove_abandoned()
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as once:
        made = Path(once) / 'kernel.so'
        for native in NATIVE:
            done = subprocess.run(
                [*compiler.split(), *FLAGS, *native, str(SOURCE), '-o', str(made), '-lm'], stdin=subprocess.DEVNULL,
                capture_output=True, text=True, errors='replace', timeout=COMPILE_SECONDS,
                env={**os.environ, 'TMPDIR': once})
            if done.returncode:
                fault = done.stderr or done.stdout or f'exit status {done.returncode}'
                continue
            try:
                return _keep(made.read_bytes(), folder, key)
            except RuntimeError as e:
                fault = f'its result with {" ".join(native) or "plain flags"} is wrong: {e}'
    raise RuntimeError(f'{compiler}: {fault}')


def _remove_abandoned() -> None:
    """Removes the temporary folders of processes that were killed."""
    for left in Path(tempfile.gettempdir()).glob(f'{TEMPORARY}*'):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left)


def _keep(data: bytes, folder: Path, key: str) -> ctypes.CDLL:
    """Puts a new kernel into `folder`; raises RuntimeError if it does not compute what it should."""
    path = folder / f'kernel-{key}-{_hash(data)}.so'
    with replacing(path, shared=True) as part:
        write_synced(part, lambda f: f.write(data))
        if fault := _check_apart(part):
            raise RuntimeError(fault)
    return ctypes.CDLL(str(path))


def _check_apart(path: Path) -> str:
    """Returns what is wrong with a new kernel; loads it in a separate process, which bad code may crash."""
    done = subprocess.run(
        [sys.executable, '-I', find_fault.__code__.co_filename, str(path)], stdin=subprocess.DEVNULL,
        capture_output=True, text=True, errors='replace', timeout=COMPILE_SECONDS)
    return '' if done.returncode == 0 else done.stderr.strip() or f'exit status {done.returncode}'


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _processor_flags() -> str:
    with suppress(OSError), open('/proc/cpuinfo') as f:
        return next((line for line in f if line.startswith(('flags', 'Features'))), '')
    return platform.processor()


def philox_words(seed: int, epoch: int, indices: np.ndarray, first_block: int, blocks: int) -> np.ndarray:
    """Maps (n,) indices to (n, 4 blocks) random 32-bit words, see philox.py."""
    indices = np.ascontiguousarray(indices, np.int64)
    out = np.empty((len(indices), 4 * blocks), np.uint32)
    load_library().philox_words(
        len(indices), indices.ctypes.data, epoch, seed & (2**64 - 1), first_block, blocks, out.ctypes.data)
    return out


def cut_views(
    images: list[np.ndarray], u: np.ndarray, rule: np.ndarray, table: np.ndarray | None, out: np.ndarray,
    rows: np.ndarray,
) -> None:
    """See `augment.cut_crops`; `rule`: (4,) float64, `augment.Augmentation.rule`."""
    n, size = len(images), out.shape[1]
    images, u, rows = [np.ascontiguousarray(x) for x in images], np.ascontiguousarray(u), np.asarray(rows, np.int64)
    table = None if table is None else np.ascontiguousarray(table, np.float32)
    # With a wrong shape the kernel would read and write anywhere.
    if not (all(x.dtype == np.uint8 and x.ndim == 3 and x.shape[2] == 3 and x.size for x in images)
            and (u.shape, u.dtype, rule.shape, rule.dtype) == ((n, 22), np.float64, (4,), np.float64)
            and out.shape[1:] == (size, size, 3) and out.flags.c_contiguous
            and out.dtype == (np.uint8 if table is None else np.float32) and (table is None or table.shape == (n, 12))
            and rows.shape == (n,) and ((rows >= 0) & (rows < len(out))).all()):
        raise ValueError(
            f'the kernel needs images (H, W, 3) uint8 and arrays that fit; it got {[x.shape for x in images[:3]]}, '
            f'u {u.shape}, rows {rows.shape}, out {out.shape} {out.dtype}')
    pointers = np.array([x.ctypes.data for x in images], np.uintp)
    sizes = np.array([x.shape[1::-1] for x in images], np.int64)
    targets = (out.ctypes.data + rows * out.strides[0]).astype(np.uintp)
    parameters = None if table is None else table.ctypes.data
    need = load_library().scratch_bytes(n, parameters, size)
    if len(getattr(_thread, 'scratch', b'')) < need:
        _thread.scratch = np.empty(need, np.uint8)
    if load_library().views(
            n, pointers.ctypes.data, sizes.ctypes.data, u.ctypes.data, rule.ctypes.data, parameters,
            targets.ctypes.data, size, _thread.scratch.ctypes.data):
        raise MemoryError(f'out of memory for views of {size} pixels')


def resize(image: np.ndarray, width: int, height: int, left: int, top: int, out: np.ndarray) -> None:
    """See `augment.resize`; both arrays are (H, W, 3) uint8, and `out` is in C order."""
    image = np.ascontiguousarray(image)
    h, w = out.shape[:2]
    if not (image.dtype == out.dtype == np.uint8 and image.ndim == out.ndim == 3 and image.shape[2] == out.shape[2] == 3
            and image.size and out.size and out.flags.c_contiguous
            and 0 <= left <= width - w and 0 <= top <= height - h):
        raise ValueError(
            f'no window {out.shape} {out.dtype} at ({left}, {top}) in an image {image.shape} {image.dtype} resized to '
            f'{width} x {height}')
    if load_library().pillow_resize(
            image.ctypes.data, image.shape[1], image.shape[0], width, height, left, top, w, h, out.ctypes.data):
        raise MemoryError(f'out of memory to resize an image to {width} x {height}')

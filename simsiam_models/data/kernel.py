"""Loads the compiled kernel.c that the wheel contains; without it, NumPy, PIL and torch do the work.

setup.py compiles it once for each kind of processor. SIMSIAM_KERNEL=0 turns it off.
"""
import ctypes
import functools
import hashlib
import logging
import os
import threading
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import torch

from ..runtime.messages import one_line

SOURCE = Path(__file__).with_name('kernel.c')  # in a clone and in an sdist, but not in a wheel
# By the instructions that torch uses here, the builds that can run, best first; 'plain' runs anywhere.
BUILDS = {'AVX512': ('avx512', 'avx2', 'plain'), 'AVX2': ('avx2', 'plain')}

MAX_SIGMA = 100.0  # pixels, of a blur; beyond it, memory and time grow without use

_logger = logging.getLogger('simsiam_models')
_lock, _thread = threading.Lock(), threading.local()


def load_library() -> ctypes.CDLL | None:
    """Returns the compiled kernel; None, with one warning, if there is none that can be used."""
    with _lock:
        return _load_once()


def _loaded() -> ctypes.CDLL:
    """Returns the kernel for callers that have checked `load_library`; raises RuntimeError if there is none."""
    if (library := load_library()) is None:
        raise RuntimeError('there is no kernel; ask load_library() before calling its functions')
    return library


@functools.cache
def _load_once() -> ctypes.CDLL | None:
    if os.environ.get('SIMSIAM_KERNEL') == '0':
        return None
    try:
        return _load_best()
    except (OSError, RuntimeError) as e:
        _logger.warning(f'the augmentation kernel cannot be used ({one_line(e)}); continuing without it, slower')
        return None


def _load_best() -> ctypes.CDLL:
    names = BUILDS.get(torch.backends.cpu.get_cpu_capability(), ('plain',))
    fault = 'it is not built: ' + (
        'with a C compiler installed, run python3 -m pip install -e . in the clone' if SOURCE.is_file()
        else 'install a C compiler, then reinstall simsiam-models')
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest() if SOURCE.is_file() else None
    for path in (SOURCE.with_name(f'_kernel_{name}{suffix}') for name in names for suffix in EXTENSION_SUFFIXES):
        if path.is_file():
            lib = load_build(path)
            if digest in (None, lib.source_digest().decode()):
                return lib
            fault = f'{path.name} was built from a different kernel.c: run python3 -m pip install -e . again'
    raise RuntimeError(fault)


def load_build(path: Path) -> ctypes.CDLL:
    """Loads one build and declares its functions; raises OSError if it cannot be loaded."""
    lib = ctypes.CDLL(str(path))
    i64, pointer = ctypes.c_int64, ctypes.c_void_p
    lib.source_digest.restype = ctypes.c_char_p
    lib.philox_words.argtypes = [i64, pointer, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint32, i64, pointer]
    lib.crop_boxes.argtypes = [i64, pointer, pointer, pointer, pointer]
    lib.views.argtypes = [i64, *[pointer] * 6, ctypes.c_int, pointer]
    lib.scratch_bytes.argtypes, lib.scratch_bytes.restype = [i64, pointer, ctypes.c_int], i64
    lib.pillow_resize.argtypes = [pointer, *[ctypes.c_int] * 8, pointer]
    return lib


def philox_words(seed: int, epoch: int, indices: np.ndarray, first_block: int, blocks: int) -> np.ndarray:
    """Maps (n,) indices to (n, 4 blocks) random 32-bit words, see philox.py."""
    indices = np.ascontiguousarray(indices, np.int64)
    out = np.empty((len(indices), 4 * blocks), np.uint32)
    _loaded().philox_words(
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
            and u.shape == (n, 22) and rule.shape == (4,) and u.dtype == rule.dtype == np.float64
            and out.shape[1:] == (size, size, 3) and size and out.flags.c_contiguous
            and out.dtype == (np.uint8 if table is None else np.float32)
            and (table is None or table.shape == (n, 12) and _is_possible(table))
            and rows.shape == (n,) and ((rows >= 0) & (rows < len(out))).all()):
        raise ValueError(
            f'the kernel needs images (H, W, 3) uint8 and arrays that fit; it got {[x.shape for x in images[:3]]}, '
            f'u {u.shape}, rows {rows.shape}, out {out.shape} {out.dtype}')
    pointers = np.array([x.ctypes.data for x in images], np.uintp)
    sizes = np.array([x.shape[1::-1] for x in images], np.int64)
    targets = (out.ctypes.data + rows * out.strides[0]).astype(np.uintp)
    parameters = None if table is None else table.ctypes.data
    library = _loaded()
    need = library.scratch_bytes(n, parameters, size)
    if len(getattr(_thread, 'scratch', b'')) < need:
        _thread.scratch = np.empty(need, np.uint8)
    if library.views(
            n, pointers.ctypes.data, sizes.ctypes.data, u.ctypes.data, rule.ctypes.data, parameters,
            targets.ctypes.data, size, _thread.scratch.ctypes.data):
        raise MemoryError(f'out of memory for views of {size} pixels')


def _is_possible(table: np.ndarray) -> bool:
    """Returns whether the numbers of `augment.Finish.table` are finite, and blur over at most MAX_SIGMA pixels."""
    sigma = table[:, 10]
    return bool(np.isfinite(table).all() and (sigma >= 0).all() and (sigma <= MAX_SIGMA).all())


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
    if _loaded().pillow_resize(
            image.ctypes.data, image.shape[1], image.shape[0], width, height, left, top, w, h, out.ctypes.data):
        raise MemoryError(f'out of memory to resize an image to {width} x {height}')

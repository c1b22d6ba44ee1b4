"""Counter-based random numbers: each is a pure function of (seed, epoch, sample index, view).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), over whole arrays of counters.
"""
import numpy as np

from . import kernel

_ROUND = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEP = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_ORDER_BLOCK = 1 << 16  # a block number that no view uses


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Maps (..., 4) 32-bit counters (uint64 array) and a key of two 32-bit words to (..., 4) random 32-bit words."""
    c, k = [counter[..., i].astype(np.uint64) for i in range(4)], key
    for _ in range(10):
        a, b = c[0] * _ROUND[0], c[2] * _ROUND[1]
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]), b & _LOW,
            (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]), a & _LOW]
        k = ((k[0] + _KEY_STEP[0]) & 0xFFFFFFFF, (k[1] + _KEY_STEP[1]) & 0xFFFFFFFF)
    return np.stack(c, -1)


def _words(seed: int, epoch: int, indices: np.ndarray, first_block: int, blocks: int) -> np.ndarray:
    """Returns (len(indices), 4 blocks) random 32-bit words. The kernel computes the same words faster."""
    if kernel.load_library() is not None:
        return kernel.philox_words(seed, epoch, indices, first_block, blocks)
    index = np.asarray(indices, np.uint64)[:, None]
    counter = np.empty((len(index), blocks, 4), np.uint64)
    counter[..., 0] = np.arange(first_block, first_block + blocks, dtype=np.uint64)
    counter[..., 1], counter[..., 2], counter[..., 3] = index & _LOW, index >> np.uint64(32), epoch
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)).reshape(len(index), -1)


def uniforms(seed: int, epoch: int, indices: np.ndarray, view: int, n: int) -> np.ndarray:
    """Returns (len(indices), n) float64 numbers in [0, 1)."""
    return _words(seed, epoch, indices, view * 256, -(-n // 4))[:, :n] * 2.0**-32


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Returns the order in which `epoch` visits n samples: indices sorted by a random 64-bit number each."""
    keys = np.empty(n, np.uint64)
    for first in range(0, n, 1 << 20):  # in pieces: the words of millions of samples at once would take gigabytes
        rows = np.arange(first, min(first + (1 << 20), n))
        w = _words(seed, epoch, rows, _ORDER_BLOCK, 1).astype(np.uint64)
        keys[rows] = w[:, 0] << np.uint64(32) | w[:, 1]
    return np.argsort(keys, kind='stable')

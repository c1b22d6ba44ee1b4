"""Checks a compiled kernel by computations with known results.

`python kernel_check.py FILE` checks it in a separate process, which wrong code may crash.
"""
import ctypes
import sys

# Philox4x32-10 of a counter and a key of zeros, from the known answers of Random123 (Salmon et al., 2011).
WORDS = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
# 4 x 4 pixels of 3 equal channels, and what PIL's bilinear resize to 2 x 2 makes of them.
PIXELS = [0, 40, 80, 120, 10, 90, 130, 170, 60, 100, 200, 220, 30, 150, 210, 255]
RESIZED = [52, 127, 96, 198]


def find_fault(library: ctypes.CDLL) -> str:
    """Returns what is wrong with a compiled kernel; '' if nothing is."""
    zero, i64 = ctypes.c_int64(0), ctypes.c_int64
    image = (ctypes.c_uint8 * 48)(*[p for p in PIXELS for _ in range(3)])
    words, resized, crop = (ctypes.c_uint32 * 4)(), (ctypes.c_uint8 * 13)(), (ctypes.c_uint8 * 13)()
    try:
        library.philox_words(
            i64(1), ctypes.byref(zero), ctypes.c_uint32(0), ctypes.c_uint64(0), ctypes.c_uint32(0), i64(1), words)
        failed = library.pillow_resize(image, 4, 4, 2, 2, 0, 0, 2, 2, resized)
        library.scratch_bytes.restype = i64
        scratch = (ctypes.c_uint8 * library.scratch_bytes(i64(1), None, 2))()
        one = (ctypes.c_void_p * 1)
        failed |= library.views(  # the whole image: its area times 1, its ratio 1
            i64(1), one(ctypes.addressof(image)), (i64 * 2)(4, 4), (ctypes.c_double * 22)(),
            (ctypes.c_double * 4)(1, 1, 1, 1), None, one(ctypes.addressof(crop)), 2, scratch)
    except AttributeError as e:
        return f'a function is missing: {e}'
    want = [p for p in RESIZED for _ in range(3)]
    if failed or list(words) != WORDS or list(resized)[:12] != want or max(
            abs(a - b) for a, b in zip(list(crop)[:12], want, strict=True)) > 1:
        return 'it computes wrong numbers'
    return ''


if __name__ == '__main__':
    try:
        sys.exit(find_fault(ctypes.CDLL(sys.argv[1])) or None)
    except OSError as e:
        sys.exit(str(e))

"""The orientation in EXIF data, which is not applied: annotations must be those of the stored pixels."""
import io

from PIL import Image

ORIENTATION = 0x0112  # 1 is upright; from 5 on, width and height change places
WITHIN = 1 << 16  # bytes: cameras write EXIF data at the start of a file


def find_orientation(data: bytes) -> int:
    """Returns the orientation in the EXIF data of an image, 1 if there is none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            found = image.getexif().get(ORIENTATION, 1)
    # PIL raises almost anything for broken EXIF data, which do not matter for the pixels.
    except Exception:
        return 1
    return found if found in range(1, 9) else 1


def is_turned(data: bytes) -> int:
    """Returns the orientation if it is not upright, else 0; fast for files without EXIF data."""
    turn = find_orientation(data) if b'Exif' in data[:WITHIN] else 1
    return turn if turn != 1 else 0

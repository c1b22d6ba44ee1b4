"""What a detector or a segmenter found: the sheet of pictures that its run drew, and a table of classes."""
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ..pages.gallery import embed_image
from ..pages.tables import draw_table
from ..runtime.messages import is_count, short

SHEET = 'sheet.jpg'
WIDEST = 900, 16_000  # pixels of the sheet on the page
CLASSES = 100  # in the table


def draw_objects(folder: Path, record: dict[str, Any] | None) -> Iterator[str]:
    """Yields the sheet, which has the truth on the left and predictions on the right, and the classes."""
    file = folder / SHEET
    if file.is_file():
        try:
            with Image.open(file, formats=['JPEG']) as image:
                image.draft('RGB', WIDEST)
                picture = image.convert('RGB')
            picture.thumbnail(WIDEST)
            yield f'<p>{embed_image(picture, "Test images: the truth on the left, predictions on the right")}</p>\n'
        except MemoryError:
            raise
        except Exception:  # PIL raises almost anything for a broken file
            yield f'<p>{SHEET} cannot be read as an image.</p>\n'
    else:
        yield f'<p>{SHEET} is missing: the run drew no test image.</p>\n'
    rows = (record or {}).get('extra', {}).get('per_class')
    if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = [names, *([_format(row.get(name)) for name in names] for row in rows[:CLASSES])]
        yield draw_table(table, 'Classes', [f'{len(rows):,} classes; shown: {CLASSES}. per_class.csv lists them all.']
                         if len(rows) > CLASSES else [])


def _format(value: Any) -> str:
    return '-' if value is None else f'{value:.2f}' if isinstance(value, float) else f'{value:,}' if is_count(
        value) else short(value)

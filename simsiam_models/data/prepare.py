"""Writes a smaller copy of an image folder that is faster to read.

    simsiam prepare my_photos my_photos_256                    short sides of at most 256 pixels
    simsiam prepare my_photos my_photos_320 --short-side 320   more detail, more time to read
    simsiam pretrain my_photos_256

Every image keeps its name and its format, and with them its place in the order: under the same seed it gets the crops,
flips and colours that it gets in DATA. Lists and metadata are copied; other files are left out. Until the copy is
complete, it is called OUT.part, and the same command continues it.

At 256 pixels, an average crop (0.6 of the area) need not be enlarged to 224 pixels; smaller crops are enlarged by up to
1.7 times.
"""
import argparse
import contextlib
import dataclasses
import functools
import io
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..runtime.distributed import cores
from ..runtime.files import explain_write_errors, replacing, write_json
from ..runtime.lifecycle import ARGS, amend_claim, read_claim
from ..runtime.messages import check_flags, clock_time, counted, size_text
from ..runtime.runlock import RunLock
from ..runtime.versions import command, versions
from .augment import Augmentation, cut_crops, draw, resize, short_side
from .opening import open_parts
from .readers.decode import DataError, UnreadableError, decode
from .readers.images import FileImages, FolderImages, contents_digest, spread
from .readers.index import Index, open_index
from .readers.lists import CSV_SUFFIXES, TEXT_SUFFIXES
from .readers.names import EXTENSIONS
from .threads import Job, make_threads, run_in_order

# Pillow's name of a format as it reads it, and as it writes it. GIF has too few colours for a resized photograph.
FORMATS = {
    'JPEG': 'JPEG', 'MPO': 'JPEG', 'WEBP': 'WEBP', 'PNG': 'PNG', 'TIFF': 'TIFF', 'BMP': 'BMP', 'PPM': 'PPM'}
LOSSY = ('JPEG', 'WEBP')  # they have a quality, and may have an EXIF orientation in front of the pixels
ORIENTATION = 0x0112  # the EXIF tag
SAMPLE = 64  # images that are measured
FREE = {'data', 'command', 'versions', 'measured'}  # may differ between a run and its continuation
LOCK, START_OVER = '.lock', 'name another OUT'
ADVICE = 'prepare reads a folder of image files; unpack other data into a folder first, or train on it directly'
# What becomes of an image.
RESIZED, THERE = 'resized', 'already there'
SMALL, OTHER, LONGER, UNREADABLE = (f'copied ({why})' for why in (
    'not larger', 'format is never resized', 'resizing would enlarge the file', 'unreadable'))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('data', metavar='DATA', help='a folder of images, in any layout that `pretrain` reads')
    add('out', type=Path, metavar='OUT', help='a new folder; to continue an incomplete copy, run the same command')
    add('--short-side', type=int, default=256, metavar='N',
        help='resize images with a longer short side to N pixels; copy the others (default: 256)')
    add('--quality', type=int, default=90, metavar='Q',
        help='quality of resized JPEG and WebP files, 1 to 100 (default: 90)')
    add('--workers', type=int, metavar='N', help='threads (default: one per core)')


def run(args: argparse.Namespace) -> None:
    """Writes the copy, and measures what it saves and what it loses."""
    check_flags([
        ('--short-side', args.short_side, args.short_side >= 1, 'at least 1'),
        ('--quality', args.quality, 1 <= args.quality <= 100, 'from 1 to 100'),
        ('--workers', args.workers, args.workers is None or args.workers >= 1, 'at least 1')])
    began, data, out = time.monotonic(), Path(args.data), Path(os.path.abspath(args.out))
    parts = open_folder(args.data)
    check_apart(data, out)
    target, index = find_target(out), list_below(data, EXTENSIONS)
    check_apart(data, target)
    images, prepared = (FileImages(root, index, str(root)) for root in (data, target))
    record = {
        'benchmark': 'prepare', 'data': str(data.resolve()), 'images': len(images), 'digest': contents_digest(images),
        'short_side': args.short_side, 'quality': args.quality, 'command': command(), 'versions': versions()}
    with claim(target, record):
        args.kept = 'the same command continues'
        copy_lists(data, target)
        workers = cores() if args.workers is None else args.workers
        counts = write_images(images, prepared, args.short_side, args.quality, workers)
        seconds, measured = time.monotonic() - began, measure(images, prepared)
        with explain_write_errors(target / ARGS, 'OUT'):
            amend_claim(target, {'measured': measured})
    if target != out:
        with suppress(FileNotFoundError):
            out.rmdir()  # it is empty
        target.rename(out)
    print(f'{counted(len(images), "image")}: {", ".join(f"{n:,} {what}" for what, n in counts.most_common())}')
    print(f'{args.out}: {describe(measured, seconds)}')
    if open_folder(str(args.out)) != parts:
        raise DataError(
            f'{args.out} does not have the images and labels of {args.data}: if the labels are in a file above '
            f'{args.data}, prepare the folder that holds both; if OUT is on a case-insensitive disk, choose another')


def open_folder(data: str) -> list[str]:
    """Returns the digests of the parts of a folder of images; raises ValueError, DataError or OSError for other data.

    Logs what the readers leave out.
    """
    if not os.path.isdir(data):
        raise ValueError(f'{data}: no such folder; {ADVICE}')
    train, val, unusable = open_parts(data)
    parts = [train, *filter(None, [val, unusable and unusable.images])]
    if not all(isinstance(part, FolderImages) for part in parts):
        raise ValueError(f'{data}: not a folder of image files; {ADVICE}')
    return [part.digest for part in parts]


def check_apart(data: Path, out: Path) -> None:
    """Raises ValueError if one of the folders is in the other."""
    inside, outside = data.resolve(), out.resolve()
    if inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise ValueError(
            f'OUT {out} and DATA {data.resolve()} must be separate folders, neither inside the other; {START_OVER}')


def find_target(out: Path) -> Path:
    """Returns OUT if it is complete, else OUT.part; raises ValueError if OUT holds anything else."""
    if (out / ARGS).is_file():
        return out
    if os.path.ismount(out) or out.is_symlink():
        raise ValueError(f'OUT {out} is a {"link" if out.is_symlink() else "mount point"}; name a new folder')
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f'OUT {out} {"holds other files" if out.is_dir() else "is a file"}; name a new folder')
    return out.with_name(f'{out.name}.part')


@contextlib.contextmanager
def claim(target: Path, record: dict[str, Any]) -> Iterator[None]:
    """Keeps the folder for this run; raises ValueError if it is that of another command, or another process has it."""
    read_claim(target, record, FREE, start_over=START_OVER)  # before anything is written, the lock included
    lock = RunLock(target / LOCK, print, START_OVER)
    lock.acquire()
    try:
        if read_claim(target, record, FREE, start_over=START_OVER) is None:
            with explain_write_errors(target / ARGS, 'OUT'):
                write_json(target / ARGS, record)
        yield
    finally:
        lock.release()


def list_below(folder: Path, extensions: tuple[str, ...]) -> Index:
    """Lists all files below `folder` that have these extensions; `open_folder` has logged the notes."""
    return dataclasses.replace(open_index(folder, extensions), notes=[])


def copy_lists(data: Path, target: Path) -> None:
    """Copies the files that may name images and their labels."""
    files = FileImages(data, list_below(data, TEXT_SUFFIXES + CSV_SUFFIXES), str(data))
    for row in range(len(files)):
        write_file(target / files.path(row).relative_to(data), read_file(files, row))


def write_images(images: FileImages, prepared: FileImages, side: int, quality: int, workers: int) -> Counter[str]:
    """Writes all images in threads, and shows a bar; returns how many became what. Prints which are unreadable."""
    counts: Counter[str] = Counter()

    def fill(found: list[str], at: int, row: int) -> None:
        found[at] = prepare_image(images, row, prepared.path(row), side, quality)

    def jobs() -> Iterator[Job]:
        for first in range(0, len(images), 4 * workers):
            rows = range(first, min(first + 4 * workers, len(images)))
            found = [''] * len(rows)
            yield found, [functools.partial(fill, found, at, row) for at, row in enumerate(rows)]

    bar = tqdm(total=len(images), desc='preparing', unit=' images', leave=False, disable=not sys.stderr.isatty())
    pool = make_threads(workers) or contextlib.nullcontext()
    with bar, pool as threads, contextlib.closing(run_in_order(threads, jobs())) as results:
        for found in results:
            for what in found:
                if what.startswith(UNREADABLE):
                    bar.write(what)
                    what = UNREADABLE
                counts[what] += 1
            bar.update(len(found))
    return counts


def prepare_image(images: FileImages, row: int, path: Path, side: int, quality: int) -> str:
    """Writes one image, if it is not there yet; returns what became of it, and for an unreadable one also why."""
    with suppress(OSError):
        if path.stat().st_size:  # a file without bytes remains from a power failure
            return THERE
    data = read_file(images, row)
    try:
        data, what = shrink(data, images.name_of(row), side, quality)
    except UnreadableError as e:  # without it, all images after it would get other views
        what = f'{UNREADABLE}: {e}'
    write_file(path, data)
    return what


def shrink(data: bytes, name: str, side: int, quality: int) -> tuple[bytes, str]:
    """Returns an image file resized to a short side of `side` pixels, or as it is, and which of the two and why.

    Raises UnreadableError, which contains `name`, if the data cannot be decoded.
    """
    pixels = decode(data, name)
    if min(pixels.shape[:2]) <= side:
        return data, SMALL
    options: dict[str, Any] = {}
    with Image.open(io.BytesIO(data)) as header:
        kind = FORMATS.get(header.format)
        if kind is None:
            return data, OTHER
        if kind in LOSSY:
            options['quality'] = quality
            if orientation := _find_orientation(header):
                options['exif'] = Image.Exif()
                options['exif'][ORIENTATION] = orientation
    width, height = short_side(pixels, side)
    small = np.empty((height, width, 3), np.uint8)
    resize(pixels, width, height, 0, 0, small)
    if (small == small[..., :1]).all():
        small = small[..., 0]
    file = io.BytesIO()
    Image.fromarray(small).save(file, kind, **options)
    return (file.getvalue(), RESIZED) if file.tell() < len(data) else (data, LONGER)


def _find_orientation(header: Image.Image) -> int:
    """Returns the EXIF orientation, which some readers apply, or 0."""
    with suppress(Exception):  # PIL raises anything on a broken EXIF block; the image itself was decoded
        value: Any = header.getexif().get(ORIENTATION)
        return int(value) if value in range(2, 9) else 0
    return 0


def read_file(files: FileImages, row: int) -> bytes:
    try:
        return files.stored_bytes(row)
    except UnreadableError as e:
        raise DataError(f'{e}; make it readable, then run the same command to continue') from None


def write_file(path: Path, data: bytes) -> None:
    with explain_write_errors(path, 'OUT'):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=False) as part:
            part.write_bytes(data)


def measure(images: FileImages, prepared: FileImages) -> dict[str, Any]:
    """Measures both on SAMPLE evenly spaced images: CPU seconds of reading and cropping, and how views differ."""
    rows = spread(len(images), SAMPLE).tolist()
    aug, seconds, levels = Augmentation(), np.zeros(2), []
    for i, row in enumerate([rows[0], *rows]):  # the first one warms up
        u = np.concatenate([draw(aug, 0, 0, np.array([row]), view)[0] for view in (0, 1)])
        views = np.empty((2, 2, aug.size, aug.size, 3), np.uint8)
        taken = np.zeros(2)
        with suppress(UnreadableError):
            for k, source in enumerate((images, prepared)):
                began = time.thread_time()
                cut_crops([source.read(row)] * 2, u, aug, views[k], np.arange(2))
                taken[k] = time.thread_time() - began
            if i:
                seconds += taken
                levels.append(float(np.abs(views[0].astype(np.int16) - views[1]).mean()))
    n = len(levels)
    sizes = [int(files.stored_sizes(np.arange(len(files))).sum()) for files in (images, prepared)]
    return {
        'sample': n, 'view_size': aug.size, 'bytes': sizes,
        'milliseconds': (1000 * seconds / n).tolist() if n else None, 'levels': float(np.mean(levels)) if n else None}


def describe(measured: dict[str, Any], seconds: float) -> str:
    before, after = map(size_text, measured['bytes'])
    text = f'{before} -> {after} in {clock_time(seconds)}'
    if not measured['sample']:
        return text
    slow, fast = measured['milliseconds']
    return (
        f'{text}. Reading an image and cutting two {measured["view_size"]} px crops takes {fast:.2f} ms of CPU time '
        f'instead of {slow:.2f} ({slow / fast:.1f} times as fast). The crops differ by {measured["levels"]:.1f} of 255 '
        f'levels on average (n = {measured["sample"]})')

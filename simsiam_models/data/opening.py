"""`open_data`: the form of the data decides which source reads it."""
import logging
import os
import re
from pathlib import Path

from .demo import demo_images
from .readers import arrow
from .readers.cifar import open_cifar
from .readers.images import EXTENSIONS, FolderImages, Images, Stream
from .readers.lists import CSV, TEXT, ListImages
from .readers.shards import expand, shard_files, split_files
from .readers.streams import HubStream, WebStream
from .readers.tars import COMPRESSED, TarImages
from .readers.vision import open_torchvision

FORMS = (
    "a folder (of images, tar shards, Parquet or Arrow files, CIFAR's binary files, or what save_to_disk wrote), a "
    'list (.txt or .csv), .tar or .parquet files (also as shards-{000..009}.tar or *.tar), hf:REPO[:SPLIT], '
    'hf-stream:REPO[:SPLIT], torchvision:NAME[:ROOT], pipe:COMMAND, http(s)://...tar, or demo')
TABLES = ('.parquet', '.arrow')

_logger = logging.getLogger('simsiam_models')


def open_data(spec: str | Path | None, images_per_epoch: int | None = None) -> tuple[Images | Stream, Images | None]:
    """Training data, and labelled validation images of the same classes, if there are any.

    Args:
        spec: see FORMS; None: the built-in demonstration.
        images_per_epoch: the length of a stream; without it, the one that it tells.

    Raises:
        FileNotFoundError, ValueError, DataError, OSError: in one sentence, what is not as it should be.
    """
    text = 'demo' if spec is None else str(spec)
    if images_per_epoch is not None and images_per_epoch < 1:
        raise ValueError(f'--images-per-epoch {images_per_epoch}: at least 1')
    if spec is None or text == 'demo' and not os.path.exists(text):
        return demo_images()
    prefix, _, rest = text.partition(':')
    if prefix in ('hf', 'hf-stream', 'torchvision'):
        if not rest:
            raise ValueError(f'{text}: what is to follow? The forms are {FORMS}')
        first, second = _last_part(rest)
        if prefix == 'hf-stream':
            return HubStream(first, second, images_per_epoch), None
        if prefix == 'torchvision':
            return _fitting(*open_torchvision(*(rest.split(':', 1) if ':' in rest else (rest, 'data'))))
        if Path(first).is_dir() and second is None:
            return _fitting(*_tables_in(Path(first), text))
        return _fitting(*arrow.pick(arrow.open_repo(first, second), text))
    if prefix in ('pipe', 'http', 'https'):
        return WebStream(text, images_per_epoch), None
    path = Path(text)
    if path.is_dir():
        return _fitting(*_open_folder(path))
    if path.is_file():
        return _fitting(*_open_file(path))
    if re.search(r'[*?\[{]', text) and path.suffix.lower() in ('.tar', *TABLES):
        files = expand(text)
        if not files:
            raise FileNotFoundError(f'{text}: no file fits this pattern')
        return (TarImages(files, text) if path.suffix.lower() == '.tar' else _tables(files, text)), None
    raise FileNotFoundError(f'{text}: no such file or folder; DATA is {FORMS}')


def _open_folder(root: Path) -> tuple[Images, Images | None]:
    if (root / 'dataset_dict.json').is_file() or (root / 'state.json').is_file():
        return arrow.pick(arrow.open_saved(root), str(root))
    if (pair := open_cifar(root)) is not None:
        return pair
    if (root / 'train').is_dir():
        train, _ = _open_part(root / 'train')
        return train, _open_part(root / 'val')[0] if (root / 'val').is_dir() else None
    return _open_part(root)


def _open_part(root: Path) -> tuple[Images, Images | None]:
    """A folder without subfolders train and val."""
    if (root / 'state.json').is_file():
        return arrow.pick(arrow.open_saved(root), str(root))
    try:
        images = FolderImages(root)
    except FileNotFoundError as e:
        nothing = e
    else:
        # Images come first: archives are often left beside what was unpacked. A long flat folder is not listed again.
        if (images.labels is not None or len(images) < 10000) and (left := _others(root)):
            _logger.warning(f'{root} holds images and {left.name}: reading the images; name {left} to read that')
        return images, None
    if tars := shard_files(root, '.tar'):
        train, val = split_files(tars)
        return TarImages(train, str(root)), TarImages(val, f'{root} (validation)') if val else None
    if any(shard_files(root, suffix) for suffix in TABLES):
        return _tables_in(root, str(root))
    for suffix in COMPRESSED:
        if packed := shard_files(root, suffix):
            TarImages(packed, str(root))  # which says why not
    raise nothing


def _others(root: Path) -> Path | None:
    return next((files[0] for suffix in ('.tar', *TABLES) if (files := shard_files(root, suffix))), None)


def _open_file(path: Path) -> tuple[Images, Images | None]:
    suffix = path.suffix.lower()
    if suffix in TEXT + CSV:
        val = path.with_name('val' + path.name[5:])
        paired = path.name.startswith('train') and val.is_file()
        return ListImages(path), ListImages(val) if paired else None
    if suffix == '.tar' or path.name.lower().endswith(COMPRESSED):
        return TarImages([path], str(path)), None
    if suffix in TABLES:
        return _tables([path], str(path)), None
    what = 'a single image' if suffix in EXTENSIONS else 'a file of a kind that is not read here'
    raise ValueError(f'{path}: {what}; DATA is {FORMS}')


def _tables_in(root: Path, name: str) -> tuple[Images, Images | None]:
    if (root / 'dataset_dict.json').is_file() or (root / 'state.json').is_file():
        return arrow.pick(arrow.open_saved(root), name)
    for suffix in TABLES:
        if files := shard_files(root, suffix):
            train, val = split_files(files)
            return _tables(train, name), _tables(val, f'{name} (validation)') if val else None
    raise FileNotFoundError(f'{name}: no Parquet or Arrow file in that folder')


def _tables(files: list[Path], name: str) -> arrow.ArrowImages:
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f'{file}: no such file, of {len(files)} in {name}')
    return arrow.open_files(files, name)


def _last_part(rest: str) -> tuple[str, str | None]:
    """REPO[:SPLIT]; a drive letter is no repository."""
    first, colon, second = rest.rpartition(':')
    return (first, second) if colon and second and '/' not in second and '\\' not in second else (rest, None)


def _fitting(train: Images, val: Images | None) -> tuple[Images, Images | None]:
    """Validation images without labels, or of other classes, are of no use to the monitor."""
    if val is None or val.labels is None or train.labels is None:
        return train, None
    n = len(val.classes)
    numbers = [str(i) for i in range(n)]  # then a class may be missing in the end, and labels mean the same
    return train, val if val.classes == train.classes or val.classes == numbers == train.classes[:n] else None

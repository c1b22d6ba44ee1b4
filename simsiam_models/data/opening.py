"""`open_data`: chooses the reader by the form of the data."""
import os
import re
from pathlib import Path
from typing import NamedTuple

from ..runtime.messages import announce, guess_path
from .demo import demo_images
from .parts import find_parts
from .readers import arrow, metadata
from .readers.cifar import open_cifar
from .readers.images import FolderImages, Images, Stream
from .readers.labels import Choice, split_choice
from .readers.lists import CSV_SUFFIXES, TEXT_SUFFIXES, ListImages
from .readers.names import EXTENSIONS, TEST, VALIDATION, find_part, part_of
from .readers.shards import TABLES, expand_pattern, list_shards, list_tables, split_by_name
from .readers.streams import HubStream, WebStream
from .readers.tars import COMPRESSED, TarImages
from .readers.vision import open_torchvision

FORMS = (
    "a folder (of images, tar shards, Parquet or Arrow files, CIFAR's binary files, or a folder of save_to_disk), a "
    'list (.txt or .csv), .tar or .parquet files (also as shards-{000..009}.tar or *.tar), hf:REPO[:SPLIT], '
    'hf-stream:REPO[:SPLIT], torchvision:NAME[:ROOT], pipe:COMMAND, http(s)://...tar, or demo; after any of them, '
    '#image=NAME,label=NAME (either or both) chooses columns of a table or CSV, or file extensions in tars')


class Unusable(NamedTuple):
    """Validation images that are there, and why a monitor or a classifier cannot use them."""

    images: Images
    reason: str

    def __str__(self) -> str:
        return f'{self.images.name}: {self.reason}'

    @property
    def is_test(self) -> bool:
        """Returns whether these are test images without labels, as competitions have them."""
        in_brackets = re.search(r'\((\w+)\)$', self.images.name)  # the part of what is no folder
        found = find_part(in_brackets[1] if in_brackets else Path(self.images.name).name)
        return self.images.labels is None and found is not None and found[1] in TEST


def open_data(spec: str | Path | None, images_per_epoch: int | None = None) -> tuple[Images | Stream, Images | None]:
    """Opens the training data, and labelled validation images of the same classes, if there are any.

    Logs what is left out, and why.

    Args:
        spec: see FORMS; None: the built-in demonstration.
        images_per_epoch: the length of a stream; by default the one that the stream reports.

    Raises:
        FileNotFoundError, ValueError, DataError, OSError: the data cannot be opened; the message says why.
    """
    train, val, unusable = open_parts(spec, images_per_epoch)
    if unusable:
        announce_unusable(unusable)
    return train, val


def announce_unusable(unusable: Unusable) -> None:
    announce(f'not used for validation: {unusable}')


def is_demo(spec: str | Path | None) -> bool:
    """Returns whether DATA names the demonstration data, not a file or folder called demo."""
    return spec is None or str(spec) == 'demo' and not os.path.exists(spec)


def open_parts(
    spec: str | Path | None, images_per_epoch: int | None = None,
) -> tuple[Images | Stream, Images | None, Unusable | None]:
    """Opens the same as `open_data`; also returns why validation images that are there cannot be used."""
    text, choice = split_choice('demo' if spec is None else str(spec))
    if images_per_epoch is not None and images_per_epoch < 1:
        raise ValueError(f'--images-per-epoch {images_per_epoch}: must be at least 1')
    if spec is None or is_demo(text):
        _refuse_choice(text, choice)
        train, val = demo_images()
        return train, val, None
    prefix, _, rest = text.partition(':')
    if prefix in ('hf', 'hf-stream', 'torchvision') and not rest:
        raise ValueError(f'{text} is not complete; DATA must be {FORMS}')
    if prefix == 'hf-stream':
        return HubStream(*_split_repo(rest), images_per_epoch, choice), None, None
    if prefix in ('pipe', 'http', 'https'):
        return WebStream(text, images_per_epoch, choice), None, None
    return _judge_validation(*_open_images(text, prefix, rest, choice))


def _refuse_choice(name: str | Path, choice: Choice | None) -> None:
    if choice is not None:
        raise ValueError(f'{name} has no columns or file extensions that #image= or #label= could choose')


def _open_images(text: str, prefix: str, rest: str, choice: Choice | None) -> tuple[Images, Images | None]:
    if prefix == 'torchvision':
        _refuse_choice(text, choice)
        name, colon, root = rest.partition(':')
        return open_torchvision(name, root if colon else 'data')
    if prefix == 'hf':
        repo, split = _split_repo(rest)
        if split is not None or not Path(repo).is_dir():
            return arrow.open_repo(repo, split, text, choice)
        return arrow.open_saved(Path(repo), text, choice) or _open_table_folder(Path(repo), text, choice)
    path = Path(text)
    if path.is_dir():
        return _open_folder(path, choice)
    if path.is_file():
        return _open_file(path, choice)
    if re.search(r'[*?\[{]', text) and path.suffix.lower() in ('.tar', *TABLES):
        files = expand_pattern(text)
        if not files:
            raise FileNotFoundError(f'{text}: no file matches this pattern')
        if path.suffix.lower() == '.tar':
            return TarImages(files, text, choice), None
        if missing := next((file for file in files if not file.is_file()), None):
            raise FileNotFoundError(f'{missing}: no such file, of {len(files)} in {text}')
        return arrow.open_files(files, text, choice), None
    raise FileNotFoundError(f'{text}: no such file or folder; {guess_path(text) or "DATA must be " + FORMS}')


def _open_folder(root: Path, choice: Choice | None) -> tuple[Images, Images | None]:
    if pair := arrow.open_saved(root, str(root), choice):
        return pair
    if cifar := open_cifar(root):
        _refuse_choice(root, choice)
        return cifar
    root, train, val = find_parts(root)
    if train is None:
        return _open_part(root, choice)
    return _open_part(train, choice)[0], None if val is None else _open_part(val, choice)[0]


def _open_part(root: Path, choice: Choice | None) -> tuple[Images, Images | None]:
    """Opens a folder without parts."""
    if pair := arrow.open_saved(root, str(root), choice):
        return pair
    try:
        images = FolderImages(root, choice)
    except FileNotFoundError:
        if tars := list_shards(root, '.tar'):
            if left := [shard for suffix in COMPRESSED for shard in list_shards(root, suffix)]:
                announce(f'{root}: {len(left)} compressed tars are left out, as they cannot be read at random; the '
                         f'first is {left[0].name}')
            train, val = split_by_name(tars)
            return TarImages(train, str(root), choice), TarImages(val, _name_part(root, val), choice) if val else None
        if list_tables(root):
            return _open_table_folder(root, str(root), choice)
        if shards := next(filter(None, (list_shards(root, suffix) for suffix in COMPRESSED)), None):
            TarImages(shards, str(root))  # raises ValueError, which says why they cannot be read
        raise
    # Images win: archives often remain beside their unpacked contents. A long flat folder is not listed again.
    if (images.labels is not None or len(images) < 10000) and (found := list_shards(root, '.tar') or list_tables(root)):
        announce(
            f'{root} contains images and {found[0].name}: reading the images; use {found[0]} to read that instead')
    if images.labels is None and len(images) < 10000 and (found := _list_sheets(root)):
        announce(f'{root} has no labels, but {found[0].name}: use {found[0]} to read the images that it lists')
    return images, None


def _list_sheets(root: Path) -> list[Path]:
    """Returns the CSV files and the like in `root` that are not `metadata`."""
    files = (file for suffix in CSV_SUFFIXES for file in list_shards(root, suffix))
    return [file for file in files if file.parent == root and file.name not in metadata.NAMES]


def _open_file(path: Path, choice: Choice | None) -> tuple[Images, Images | None]:
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES + CSV_SUFFIXES:
        val = find_validation_list(path)
        return ListImages(path, choice), None if val is None else ListImages(val, choice)
    if suffix == '.tar' or path.name.lower().endswith(COMPRESSED):
        return TarImages([path], str(path), choice), None
    if suffix in TABLES:
        return arrow.open_files([path], str(path), choice), None
    what = 'is a single image' if suffix in EXTENSIONS else 'is not a file that can be read here'
    raise ValueError(f'{path} {what}; DATA must be {FORMS}')


def find_validation_list(file: Path) -> Path | None:
    """Finds the list with the same name as `file`, but for the word that tells its part: train_a.txt and val_a.txt."""
    if part_of(file.name) != 'train':
        return None
    if (found := find_part(file.name)) is None:
        return None
    word = file.name[slice(*found.span())]
    spell = str.upper if word.isupper() else str.title if word[0].isupper() else str
    names = (f'{file.name[:found.start()]}{spell(name)}{file.name[found.end():]}' for name in VALIDATION)
    return next((path for path in map(file.with_name, names) if path.is_file()), None)


def _open_table_folder(root: Path, name: str, choice: Choice | None) -> tuple[Images, Images | None]:
    train, val = split_by_name(list_tables(root))
    if not train:
        raise FileNotFoundError(f'{name}: no Parquet or Arrow file in that folder')
    validation = arrow.open_files(val, _name_part(name, val), choice) if val else None
    return arrow.open_files(train, name, choice), validation


def _name_part(name: str | Path, files: list[Path]) -> str:
    """Returns the name of images that are in files for validation, which tells whether these are test files."""
    found = find_part(files[0].name)
    return f'{name} ({"test" if found and found[1] in TEST else "validation"})'


def _split_repo(rest: str) -> tuple[str, str | None]:
    """Splits REPO[:SPLIT]; a drive letter is not a repository."""
    repo, colon, split = rest.rpartition(':')
    return (repo, split) if colon and split and '/' not in split and '\\' not in split else (rest, None)


def _judge_validation(train: Images, val: Images | None) -> tuple[Images, Images | None, Unusable | None]:
    """Drops validation images without labels or of other classes."""
    if val is None:
        return train, None, None
    numbers = [str(i) for i in range(len(val.classes))]  # if classes are numbers, val may lack the last ones
    if val.labels is None or train.labels is None:
        reason = f'{"its" if val.labels is None else "the training"} images have no labels'
    elif val.classes == train.classes or val.classes == numbers == train.classes[:len(numbers)]:
        return train, val, None
    else:
        odd = {*val.classes} ^ {*train.classes}
        how = f'{min(odd)!r} is in one of them only' if odd else 'they are numbered in another order'
        reason = f'not the {len(train.classes)} classes of {train.name}: {how}'
    return train, None, Unusable(val, reason)

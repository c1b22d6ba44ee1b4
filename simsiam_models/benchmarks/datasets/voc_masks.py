"""VOC2012 with the masks of SBD, as MMSelfSup's benchmark takes it."""
from pathlib import Path

from .lists import find_present, find_repeated, read_lines
from .sizes import SIZES, refusal
from .voc import NAMES, find_folder

BACKGROUND = 'background'
LISTS, DEVKIT, AUGMENTED = 'ImageSets/Segmentation', 'SegmentationClass', 'SegmentationClassAug'

Pairs = list[tuple[str, str]]  # paths of images and their masks


def list_voc12aug(root: Path, partial: bool) -> tuple[Path, Pairs, Pairs, list[str]]:
    """Returns the folder of VOC2012, its training and test images with their masks, and the classes.

    Images of train.txt have the devkit's masks, with ignored borders of objects; those of aug.txt, or of trainaug.txt
    and not of train.txt, have SBD's, without. An image of val.txt never trains.

    Raises FileNotFoundError if a folder, a list or, unless `partial`, a file is missing, and ValueError if an image is
    both in a list to train on and in val.txt.
    """
    above = root.parent if root.name == 'VOC2012' and not (root / 'VOC2012').is_dir() else root
    folder = find_folder(above, ('VOC2012', 'VOCdevkit/VOC2012'), ('JPEGImages', DEVKIT, LISTS), 'voc12aug')
    train, val = (read_ids(folder / LISTS / f'{name}.txt') for name in ('train', 'val'))
    file = next((p for p in (folder / LISTS / f'{name}.txt' for name in ('aug', 'trainaug')) if p.is_file()), None)
    if file is None or not (folder / AUGMENTED).is_dir():
        missing = AUGMENTED if file is not None else f'{LISTS}/aug.txt or trainaug.txt'
        message = f'no {missing}, which come from SBD'
        if not partial:
            raise FileNotFoundError(refusal('voc12aug', str(folder), message))
        aug: list[str] = []
    else:
        known = {*train}
        aug = [i for i in read_ids(file) if i not in known]
    if both := {*train, *aug} & {*val}:
        raise ValueError(
            f'{folder / LISTS}: {len(both):,} images are to train on and in val.txt, such as {min(both)}; unpack the '
            'lists again')
    parts = [list_pairs(folder, ids, masks, part, partial, 'voc12aug') for ids, masks, part in (
        (train, DEVKIT, 'train'), (aug, AUGMENTED, 'aug'), (val, DEVKIT, 'val'))]
    return folder, parts[0] + parts[1], parts[2], [BACKGROUND, *NAMES]


def list_pairs(folder: Path, ids: list[str], masks: str, part: str, partial: bool, kind: str) -> Pairs:
    """Returns the images of a list and their masks, in a folder in VOC's form."""
    for below, end, what in (('JPEGImages', 'jpg', 'images'), (masks, 'png', 'masks')):
        if ids:
            there = find_present(kind, folder / below, [f'{i}.{end}' for i in ids], part, partial, what)
            ids = [i for i, found in zip(ids, there, strict=True) if found]
    return [(f'JPEGImages/{i}.jpg', f'{masks}/{i}.png') for i in ids]


def read_ids(file: Path) -> list[str]:
    """Returns the first word of each line; raises FileNotFoundError or ValueError if there is none, or one is twice."""
    if not file.is_file():
        raise FileNotFoundError(f'{file}: no such list; unpack {SIZES["voc12aug"].source} there')
    ids = [text.split()[0] for _, text in read_lines(file)]
    if not ids:
        raise ValueError(f'{file} names no image; list one in each line')
    if len({*ids}) < len(ids):
        raise ValueError(f'{file} names {find_repeated(ids)} twice; name each image once')
    return ids

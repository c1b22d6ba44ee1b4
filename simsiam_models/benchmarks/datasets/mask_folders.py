"""A user's own images and masks: which belong together, which parts there are, and what the classes are called."""
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ...data.readers.names import choose_parts, is_image, is_passed_over
from ...runtime.messages import announce, short
from .lists import read_lines
from .mask_files import IGNORED, Classes
from .voc_masks import DEVKIT, LISTS, Pairs, list_pairs, read_ids

# Names of folders, in lower case.
IMAGES = ('images', 'image', 'imgs', 'img', 'img_dir', 'jpegimages', 'leftimg8bit', 'rgb', 'photos', 'input')
MASKS = ('masks', 'mask', 'labels', 'label', 'annotations', 'annotation', 'ann_dir', 'segmentationclass', 'gt',
         'gtfine', 'ground_truth', 'target', 'targets')
FORMS = ('DATA must have a folder of images and one of masks, such as images/ and masks/, with the same names; parts '
         'are folders called train and val in both, or above both')
_NUMBERED = re.compile(r'(\d{1,9})[\s,:;]+(\S.*)')


def find_pairs(root: Path, partial: bool) -> list[tuple[str, Pairs]]:
    """Returns the images and masks of a folder by part, paths below `root`: 'train' and 'val', or '' for all.

    Raises FileNotFoundError if there are no folders of images and masks or, unless `partial`, an image or a mask is
    without the other, and ValueError if several belong to one.
    """
    if not root.is_dir():
        raise FileNotFoundError(f'{root}: no such folder; {FORMS}')
    if (root / LISTS / 'train.txt').is_file() and (root / 'JPEGImages').is_dir() and (root / DEVKIT).is_dir():
        parts = [part for part in ('train', 'val') if (root / LISTS / f'{part}.txt').is_file()]
        return [(part, list_pairs(root, read_ids(root / LISTS / f'{part}.txt'), DEVKIT, part, partial, 'folder'))
                for part in parts]
    if found := _find_folders(root):
        images, masks = found
        inside = [choose_parts(_list_folders(root / side)) for side in found]
        if all('train' in parts for parts in inside):
            return _pair_parts(root, inside, lambda i, name: f'{found[i]}/{name}', partial)
        return [('', pair_files(root, images, masks, partial))]
    roles = choose_parts(_list_folders(root))
    below = {name: _find_folders(root / name) for names in roles.values() for name in names}
    if 'train' not in roles or not below[roles['train'][0]]:
        raise FileNotFoundError(f'{root}: no images and masks; {FORMS}')
    sides = {name: sides for name, sides in below.items() if sides is not None}
    kept = {role: [name for name in names if name in sides] for role, names in roles.items()}
    kept = {role: names for role, names in kept.items() if names}
    return _pair_parts(root, [kept, kept], lambda i, name: f'{name}/{sides[name][i]}', partial)


def _pair_parts(
    root: Path, parts: list[dict[str, list[str]]], path: Callable[[int, str], str], partial: bool,
) -> list[tuple[str, Pairs]]:
    roles = [role for role in ('train', 'val') if all(role in side for side in parts)]
    named = [[side[role] for side in parts] for role in roles]
    if 'val' not in roles and any('val' in side for side in parts):
        raise FileNotFoundError(
            f'{root}: only images or only masks have a part to test on; give it to both, or to none')
    found = []
    for role, (images, masks) in zip(roles, named, strict=True):
        same = next((name for name in images if name in masks), None)  # val before test, if both have it
        pair = (same, same) if same is not None else (images[0], masks[0])
        found.append((role, pair_files(root, path(0, pair[0]), path(1, pair[1]), partial)))
    return found


def _list_folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not is_passed_over(p.name))


def _find_folders(root: Path) -> tuple[str, str] | None:
    """Returns the names of the folders of images and masks in `root`; raises ValueError if several may be one."""
    names = _list_folders(root)
    found = [[name for name in names if name.lower() in known] for known in (IMAGES, MASKS)]
    for several, what in zip(found, ('images', 'masks'), strict=True):
        if len(several) > 1 and all(found):
            raise ValueError(
                f'{root}: {" and ".join(several)} may both be the folder of {what}; keep only one of them there')
    return (found[0][0], found[1][0]) if all(found) else None


def pair_files(root: Path, images: str, masks: str, partial: bool) -> Pairs:
    """Returns the images below a folder with the masks below another, by their paths without extensions.

    Masks may have an end more than their images: a_mask.png for a.jpg, if all do.
    """
    files: list[dict[str, str]] = [{}, {}]
    for by_stem, folder in zip(files, (images, masks), strict=True):
        for path in _list_files(root, folder):
            stem = os.path.splitext(path.removeprefix(f'{folder}/'))[0]
            if stem in by_stem:
                raise ValueError(f'{root}: {by_stem[stem]} and {path} have the same name; keep only one of them there')
            by_stem[stem] = path
    of_image, of_mask = files
    if of_image and of_mask and not of_image.keys() & of_mask.keys():
        end = _find_end(of_image, of_mask)
        of_mask = {stem.removesuffix(end): path for stem, path in of_mask.items() if stem.endswith(end)}
    both = sorted(of_image.keys() & of_mask.keys())
    for one, other, what in ((of_image, of_mask, 'images have no mask'), (of_mask, of_image, 'masks have no image')):
        if lone := sorted(one.keys() - other.keys()):
            message = f'{root}: {len(lone):,} of {len(one):,} {what}, such as {short(one[lone[0]], 200)}'
            if not partial or not both:
                raise FileNotFoundError(
                    f'{message}; a mask must have the name of its image: complete them, or pass --allow-partial to '
                    'leave these out')
            announce(f'{message}: they are left out')
    if not both:
        raise FileNotFoundError(f'{root}: no images in {images} or no masks in {masks}; {FORMS}')
    return [(of_image[stem], of_mask[stem]) for stem in both]


def _list_files(root: Path, folder: str) -> Iterator[str]:
    """Yields the paths of images below a folder, relative to `root`, sorted in each folder."""
    for above, folders, names in os.walk(root / folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_passed_over(name))
        for name in sorted(names):
            if is_image(name) and not is_passed_over(name):
                yield (Path(above) / name).relative_to(root).as_posix()


def _find_end(images: dict[str, str], masks: dict[str, str]) -> str:
    """Returns what the names of all masks have more than those of their images; '' if nothing."""
    first = min(images)
    for stem in sorted(masks, key=len):
        end = stem.removeprefix(first)
        if stem.startswith(first) and end and all(f'{image}{end}' in masks for image in images):
            return end
    return ''


def read_classes(file: Path) -> Classes:
    """Reads the names of classes, one per line, whose ids count from 0; or `id name` lines.

    Raises FileNotFoundError if there is no such file, and ValueError if a line has no meaning.
    """
    if not file.is_file():
        raise FileNotFoundError(f'{file}: no such list of classes; it has a name in each line')
    read = [*read_lines(file)]
    numbers, lines = [n for n, _ in read], [text for _, text in read]
    numbered = [_NUMBERED.fullmatch(text) for text in lines]
    with_ids = any(numbered)
    for n, text, found in zip(numbers, lines, numbered, strict=True):
        if with_ids and not found:
            raise ValueError(
                f'{file}, line {n}: {short(text)}: not in the form `id name`, unlike other lines; use it on '
                'every line, or on none')
        if '\0' in text or any('\ud800' <= c <= '\udfff' for c in text):
            raise ValueError(f'{file}, line {n}: not valid UTF-8 text; save the file as UTF-8')
    if lines and not with_ids and numbers[-1] - numbers[0] >= len(lines):
        raise ValueError(f'{file}: blank lines between names, whose ids are their line numbers, counted from 0: remove '
                         'the blank lines, or write `id name` on each line')
    if with_ids:  # then all lines have one
        matches = [found for found in numbered if found]
        ids, names = [int(found[1]) for found in matches], [found[2] for found in matches]
    else:
        ids, names = list(range(len(lines))), lines
    rows = sorted((i, name) for i, name in zip(ids, names, strict=True) if i != IGNORED or len(lines) > IGNORED)
    ids, names = [i for i, _ in rows], [name for _, name in rows]
    if len(names) < 2 or len({*names}) < len(names) or len({*ids}) < len(ids) or max(ids) >= IGNORED:
        raise ValueError(
            f'{file}: {len(names)} classes, {len({*names})} different names, ids up to {max(ids, default=0)}: 2 to '
            f'{IGNORED} classes are possible, each with a name and an id of its own below {IGNORED}')
    return Classes(names, ids)

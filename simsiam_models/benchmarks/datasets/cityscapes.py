"""Cityscapes with its fine masks."""
from pathlib import Path

from .mask_files import IGNORED, Classes
from .sizes import SIZES, refusal
from .voc_masks import Pairs

# The classes of the benchmark, by their trainIds from 0 on: name, id in the masks called labelIds.
CLASSES = (
    ('road', 7), ('sidewalk', 8), ('building', 11), ('wall', 12), ('fence', 13), ('pole', 17), ('traffic light', 19),
    ('traffic sign', 20), ('vegetation', 21), ('terrain', 22), ('sky', 23), ('person', 24), ('rider', 25), ('car', 26),
    ('truck', 27), ('bus', 28), ('train', 31), ('motorcycle', 32), ('bicycle', 33))
IMAGES, MASKS = 'leftImg8bit', 'gtFine'
ENDS = ('gtFine_labelTrainIds.png', 'gtFine_labelIds.png')  # the best first


def list_cityscapes(root: Path, partial: bool) -> tuple[Path, dict[str, Pairs], Classes]:
    """Returns the folder, the images of train and val with their masks, and the classes.

    The masks are those of trainIds. If there are none, those of ids are taken; of their ids, 19 are classes, and the
    others are ignored, which gives the same labels.

    Raises FileNotFoundError if a folder or, unless `partial`, the mask of an image is missing.
    """
    folder = next(
        (p for p in (root, root / 'cityscapes') if (p / IMAGES).is_dir() and (p / MASKS).is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f'{root} is not Cityscapes: it has no {IMAGES} and {MASKS}; unpack {SIZES["cityscapes"].source} there')
    images = {part: sorted(p.relative_to(folder).as_posix() for p in (folder / IMAGES / part).glob(
        f'*/*_{IMAGES}.png')) for part in ('train', 'val')}
    end = next((end for end in ENDS if next((folder / MASKS).glob(f'*/*/*_{end}'), None)), ENDS[0])
    parts = {part: [(path, _name_mask(path, end)) for path in paths] for part, paths in images.items()}
    for part, pairs in parts.items():
        kept = [pair for pair in pairs if (folder / pair[1]).is_file()]
        if len(kept) < len(pairs) or not pairs:
            missing = next((mask for _, mask in pairs if not (folder / mask).is_file()), f'{IMAGES}/{part}')
            message = f'{len(kept):,} of {len(pairs):,} images of {part} have a mask (missing: {missing})'
            if not partial or not kept:
                raise FileNotFoundError(refusal('cityscapes', str(folder), message))
            parts[part] = kept
    names, ids = [name for name, _ in CLASSES], [i for _, i in CLASSES]
    if end == ENDS[0]:
        return folder, parts, Classes(names, list(range(len(names))))
    return folder, parts, Classes(names, ids, (*({*range(34)} - {*ids}), IGNORED))


def _name_mask(image: str, end: str) -> str:
    return f'{MASKS}{image.removeprefix(IMAGES).removesuffix(f"{IMAGES}.png")}{end}'

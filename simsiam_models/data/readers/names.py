"""What names mean: which files are images, which are skipped, and which names are the parts of a data set.

These rules hold in folders, tars, tables and lists, and so for every command.
"""
import re
from collections.abc import Iterable

# AVIF needs Pillow 11.3; an older one counts such files as unreadable.
EXTENSIONS = (
    '.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.bmp', '.gif', '.tif', '.tiff', '.webp', '.avif', '.ppm', '.pgm')

# What systems write beside pictures, in lower case. Names that begin with a dot need no entry (.ipynb_checkpoints,
# ._1.jpg, .DS_Store, .AppleDouble, .thumbnails, .Trash-1000, .@__thumb). None of these names ends like an image's.
PASSED_OVER = frozenset((
    '__macosx', 'icon\r', 'network trash folder', 'temporary items', 'thevolumesettingsfolder',  # macOS
    'thumbs.db', 'ehthumbs.db', 'ehthumbs_vista.db', 'desktop.ini', 'zbthumbnail.info', 'pspbrwse.jbf', 'picasa.ini',
    '$recycle.bin', 'recycler', 'system volume information', '_vti_cnf',  # Windows
    '@eadir', '#recycle', '#snapshot', '@tmp', '@recycle', '@recently-snapshot',  # network disks
    'lost+found', 'found.000', '__pycache__'))
STREAMS = (':zone.identifier', '@synoeastream', '@synoresource')  # ends of names: copies of a file's attributes

# The spellings of the datasets library, and VOC's trainval; in order of preference.
PARTS = {
    'train': ('train', 'training', 'trainval'),
    'val': ('val', 'valid', 'validation', 'dev', 'test', 'testing', 'eval', 'evaluation')}
VALIDATION, TEST = PARTS['val'], PARTS['val'][4:]  # test images are for validation where there are no others
_ROLES = {word: role for role, words in PARTS.items() for word in words}
_FILLERS = r'data|sets?|images?|imgs?|splits?'
_PART = re.compile(rf'(?<![^\W\d_])({"|".join(sorted(_ROLES, key=len, reverse=True))})(?=(?:{_FILLERS})*(?:[\W\d_]|$))')
_FILLER = re.compile(rf'{_FILLERS}|[\W\d_]+')


def is_passed_over(name: str) -> bool:
    """Returns whether a name (not a path) is hidden, or is that of a system file."""
    lower = name.lower()
    return lower[:1] == '.' and lower not in ('.', '..') or lower in PASSED_OVER or lower.endswith(STREAMS)


def find_passed_over(path: str) -> str:
    """Returns the first name in a path with slashes that is passed over, or ''."""
    return next(filter(is_passed_over, path.split('/')), '')


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def find_part(name: str) -> re.Match[str] | None:
    """Finds the word in the lower-case name that tells its part, such as `train` in seg_train and in Train2017."""
    found = list(_PART.finditer(name.lower()))
    return next((m for m in found if _ROLES[m[1]] == 'train'), found[0] if found else None)


def part_of(name: str) -> str:
    """Returns 'train', 'val' (also for test images), or '' for a name that tells no part."""
    found = find_part(name)
    return _ROLES[found[1]] if found else ''


def choose_parts(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns which of the names of folders or splits are parts of a data set, by 'train' and 'val', best first.

    A name is a part if it says nothing else (Train, training_set, val2017), or if there are both parts with the same
    other words (seg_train and seg_test): `toy train` alone is not a part.
    """
    groups: dict[str, dict[str, list[tuple[int, str]]]] = {}
    for name in names:
        if found := find_part(name):
            lower, role = name.lower(), _ROLES[found[1]]
            others = _FILLER.sub('', f'{lower[:found.start()]} {lower[found.end():]}')
            rank = PARTS[role].index(found[1])
            groups.setdefault(others, {}).setdefault(role, []).append((rank, name))
    for others, group in sorted(groups.items()):  # '' is the first
        if not others or len(group) == len(PARTS):
            return {role: [name for _, name in sorted(ranked)] for role, ranked in group.items()}
    return {}

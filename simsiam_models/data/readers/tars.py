"""Tar shards, as WebDataset writes them: indexed once, then read at random without being unpacked.

A sample is the files of a shard whose names agree up to the first dot of the last path component; what follows that dot
is the ending of a file. The image of a sample is the one with an image extension, or the one with the ending that the
user chooses. Its label (see `labels`) is in the file whose ending is cls or cls.txt, or ends in that; of several, in
the one that has the name of the image up to the last dot. A shard must be complete: it ends with the blocks of zeros
that end every tar, and nothing follows them.
"""
import json
import logging
import os
import re
import tarfile
import threading
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from ...runtime.messages import announce
from .decode import decode, explain_read_errors
from .index import Listing, load_or_build
from .labels import COLUMNS, Choice, LabelError, Labels, is_missing
from .names import EXTENSIONS, find_passed_over

MAX_OPEN = 64  # shards
LABEL_BYTES = 1 << 16  # a longer file holds no label
COMPRESSED = ('.tar.gz', '.tgz', '.tar.bz2', '.tar.xz', '.tar.zst', '.tar.lz4')
_NAME = re.compile(r'((?:.*/)?[^./]+)\.([^/]*)', re.DOTALL)  # up to the first dot, and the rest

_logger = logging.getLogger('simsiam_models')


class _OpenFile:
    """A file that closes with the last reference to it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class TarImages:
    """The images in `shards`, in the order of the shards and of the files in them. `choice`: endings of files.

    Raises FileNotFoundError if a shard does not exist or none holds an image, ValueError if one is not a complete tar
    or has several images in a sample.
    """

    def __init__(self, shards: list[Path], name: str, choice: Choice | None = None) -> None:
        for shard in shards:
            if shard.name.lower().endswith(COMPRESSED):
                raise ValueError(
                    f'{shard}: a compressed tar cannot be read at random; decompress it to a .tar first (for example '
                    'with gunzip)')
            if not shard.is_file():
                raise FileNotFoundError(f'{shard}: no such shard, of {len(shards)} in {name}')
        self._shards = [os.path.join(os.path.realpath(shard.parent), shard.name) for shard in shards]
        root = os.path.commonpath([os.path.dirname(shard) for shard in self._shards])
        names = [os.path.relpath(shard, root) for shard in self._shards]
        key: dict[str, Any] = {'root': root, 'shards': names}
        if choice is not None:
            key['choice'] = [choice.image, choice.label]
        self.name, self._index = name, load_or_build(key, lambda: _scan(root, names, choice))
        if not len(self._index):
            looked = ' '.join(EXTENSIONS) if choice is None or choice.image is None else choice.image
            found = ''.join(f'; {note}' for note in self._index.notes)
            raise FileNotFoundError(f'{name}: no image in {len(shards)} tar shards; looked for {looked}{found}')
        for note in self._index.notes:
            announce(f'{name}: {note}')
        self.classes, self.labels, self.digest = self._index.classes, self._index.labels, self._index.digest
        self.notes = self._index.notes
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._index)

    def stored_sizes(self, rows: np.ndarray) -> np.ndarray:
        """See `images.stored_sizes`."""
        sizes: np.ndarray = self._index.columns['sizes'][rows]
        return sizes

    def read(self, index: int) -> np.ndarray:
        """Returns (H, W, 3) uint8; raises UnreadableError, which names shard and file, if that fails."""
        return decode(self.stored_bytes(index), self.name_of(index))

    def name_of(self, index: int) -> str:
        return f'{self._shards[self._index.columns["shards"][index]]}: {os.fsdecode(self._index.path(index))}'

    def stored_bytes(self, index: int, start: int = 0, length: int | None = None) -> bytearray:
        """See `images.stored_bytes`."""
        shard, first, size = (int(self._index.columns[name][index]) for name in ('shards', 'starts', 'sizes'))
        with explain_read_errors(self.name_of(index), OSError):
            file = self._open_shard(shard)  # this reference keeps it open while it is read
            return _read(file.descriptor, first + start, size - start if length is None else min(length, size - start))

    def _open_shard(self, shard: int) -> _OpenFile:
        with self._lock:
            file = self._open.pop(shard, None) or _OpenFile(os.open(self._shards[shard], os.O_RDONLY))
            self._open[shard] = file
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
            return file


def _read(descriptor: int, start: int, size: int) -> bytearray:
    data = bytearray()
    while len(data) < size:
        if not (piece := os.pread(descriptor, size - len(data), start + len(data))):
            raise OSError(0, 'the shard ends before it')
        data += piece
    return data


def _scan(root: str, names: list[str], choice: Choice | None = None) -> Listing:
    listing, labels, endings = Listing(), Labels(), _Endings(choice or Choice())
    others: Counter[str] = Counter()
    listing.columns = {'shards': array('i'), 'starts': array('q'), 'sizes': array('q')}
    listing.about, labelled = '\n'.join(names), False
    if endings.image:
        listing.left_out.what = f'files that do not end in {endings.image}, skipped'
    _logger.info(f'listing {len(names)} tar shards in {root}')
    for number, name in enumerate(names):
        path = os.path.join(root, name)
        listing.watch_file(name, path)
        images: dict[str, str] = {}  # sample -> its image
        found: dict[str, list[tuple[str, Any]]] = {}  # sample -> names and contents of its labels
        rest: list[tuple[str, str]] = []  # samples and endings of all other files
        for member, sample, ending, label in _read_members(path, endings, listing):
            if label is not None:
                found.setdefault(sample, []).append((member.name, label))
            elif not endings.is_image(ending):
                rest.append((sample, ending))
                listing.leave_out(member.name, f'.{ending}' if endings.image else '')
            elif sample in images:
                raise ValueError(
                    f'{path}: the sample {sample} has more than one image ({images[sample]} and {member.name}); '
                    f'{_tell_apart(images[sample], member.name, ending)}')
            else:
                images[sample] = member.name
                listing.add(member.name)
                values = number, member.offset_data, member.size
                for column, value in zip(listing.columns.values(), values, strict=True):
                    column.append(value)
        labelled = labelled or bool(found)
        others.update(f'.{ending}' for sample, ending in rest if sample in images or not images)
        for sample, image in images.items():  # in the order of the rows
            place, label = _choose_label(image, found.get(sample, []))
            labels.add(None if is_missing(label) else label, f'{path}: {place}')
    _number(listing, labels, labelled, ' '.join(ending for ending, _ in others.most_common(10)))
    return listing


def _tell_apart(first: str, second: str, ending: str) -> str:
    """Returns what to do about two images of a sample; `ending`: of the second."""
    if first.removeprefix('./').lower() == second.removeprefix('./').lower():
        return 'write the tar again, with each image once and names that differ in more than their case'
    return (f'choose one by its ending, with #image={ending} after the name of the tar; or let names differ before '
            'their first dot')


class _Endings:
    """Tells images and labels by what follows the first dot of their names."""

    def __init__(self, choice: Choice) -> None:
        self.image, self.label = (end and end.lower().lstrip('.') for end in (choice.image, choice.label))

    def is_image(self, ending: str) -> bool:
        return f'.{ending}'.endswith(EXTENSIONS) if self.image is None else ending == self.image

    def is_label(self, ending: str) -> bool:
        return f'.{ending}'.endswith(('.cls', '.cls.txt')) if self.label is None else ending == self.label


def _choose_label(image: str, found: list[tuple[str, Any]]) -> tuple[str, Any]:
    """Returns name and content of a sample's label: the only one, or the one with the name of the image."""
    def stem(name: str, ending: str) -> str:
        return re.sub(ending, '', name.removeprefix('./').lower())

    own = [item for item in found if stem(item[0], r'\.cls(\.txt)?$') == stem(image, r'\.[^.]*$')]
    return (own or found)[0] if len(own or found) == 1 else (image, None)


def _number(listing: Listing, labels: Labels, labelled: bool, others: str) -> None:
    """Labels the listing, or notes why it has no labels; raises ValueError if a label breaks the rule.

    Args:
        labelled: whether there are labels at all.
        others: endings of the files that are neither images nor labels, but belong to samples.
    """
    missing, n = labels.codes.count(-1), len(listing)
    if labelled and n and not missing:
        try:
            listing.labels, listing.classes = labels.number()
        except LabelError as e:
            raise ValueError(f'{e.at}: {e}') from None
        return
    reason = ''
    if labelled and n:
        first = listing.path(labels.codes.index(-1))
        reason = f'{missing} of {n} images have none, or several; the first is {first}'
    elif n and others:
        reason = f'no .cls beside the images, only {others}; #label=ENDING chooses other files'
    elif len({os.path.dirname(listing.path(i)) for i in range(n)}) > 1:
        reason = 'no .cls beside the images, and folders in a tar are not classes; unpack it for that'
    if reason:
        listing.remarks.append(f'no labels: {reason}')


def _read_members(
    path: str, endings: _Endings, listing: Listing,
) -> Iterator[tuple[tarfile.TarInfo, str, str, Any]]:
    """Yields the files of a tar that belong to a sample: member, sample, ending, and the content of a label or None.

    Counts system files, and files that belong to no sample, in the listing.
    """
    try:
        with open(path, 'rb') as f, tarfile.open(fileobj=f, mode='r:') as tar:
            while (member := tar.next()) is not None:
                cast(Any, tar).members = []  # otherwise tarfile keeps all of them
                matched = _NAME.fullmatch(member.name)
                if member.isdir():
                    continue
                if passed_over := find_passed_over(member.name):
                    listing.pass_over(passed_over, member.name)
                    continue
                if matched is None:
                    listing.leave_out(member.name)
                    continue
                sample, ending = matched[1].removeprefix('./'), matched[2].lower()
                wanted, is_label = endings.is_image(ending), endings.is_label(ending)
                if (wanted or is_label) and (not member.isreg() or member.issparse()):
                    raise ValueError(
                        f'{path}: {member.name} is a link or a sparse file; write the tar with --dereference '
                        '--hard-dereference')
                yield member, sample, ending, _read_label(path, f, member) if is_label and not wanted else None
            _check_end(path, f, tar.offset)
    except tarfile.TarError as e:
        raise ValueError(f'{path}: cut off, damaged or not a tar ({e}); download or create it again') from None
    except OSError as e:
        raise OSError(f'{path}: cannot be read ({e.strerror or e})') from None


def _read_label(path: str, f: BinaryIO, member: tarfile.TarInfo) -> str | int | float | bool:
    """Returns the content of a label's file; of JSON, the value of the first of COLUMNS; '' if there is none."""
    if member.size > LABEL_BYTES:
        raise ValueError(f'{path}: {member.name} holds {member.size} bytes, too many for a label')
    data = _read(f.fileno(), member.offset_data, member.size)
    text = data.decode(errors='surrogateescape').strip()
    if not member.name.lower().endswith('.json'):
        return text
    try:
        record = json.loads(text)
        values = [record[name] for name in COLUMNS if name in record] if isinstance(record, dict) else [record]
    except (ValueError, RecursionError):
        raise ValueError(f'{path}: {member.name} is not valid JSON') from None
    return values[0] if values and isinstance(values[0], (str, int, float)) else ''


def _check_end(path: str, f: BinaryIO, end: int) -> None:
    """Raises ValueError unless the tar ends at `end`.

    tarfile stops silently at a header that is cut off or damaged, and at the first of several ends.
    """
    f.seek(end)
    if f.read(512) != bytes(512):
        raise ValueError(f'{path}: cut off or damaged after {end} bytes; download or create it again')
    while piece := f.read(1 << 20):
        if piece.count(0) != len(piece):
            raise ValueError(
                f'{path}: continues after its end at {end} bytes; join tars with tar --concatenate, not cat')

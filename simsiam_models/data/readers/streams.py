"""Data in its own order, without random access: `hf-stream:REPO`, and tar shards from a URL or a command.

Every process reads the whole stream and decodes only its part of each batch, so N processes together see what one sees.
"""
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.messages import announce, one_line, short
from ..philox import permutation
from .arrow import explain_open_errors, find_image_column, import_datasets, read_encoded, select_undecoded
from .decode import DataError, import_library
from .index import digest
from .labels import Choice
from .names import EXTENSIONS, find_passed_over, part_of
from .shards import TABLES, expand_braces, list_shards, split_by_name

BUFFER = 1000  # images from which the next one is drawn


class _ShuffledStream:
    """What the streams have in common; `_read_epoch` reads a whole epoch."""

    _read_epoch: Callable[[int, int], Iterator[bytes | np.ndarray]]

    def __init__(self, name: str, length: int, digest: str) -> None:
        if length < 1:
            raise ValueError(f'{name}: the number of images is unknown; give --images-per-epoch N')
        self.name, self.labels, self.digest, self._length = name, None, digest, length
        self.classes: list[str] = []

    def __len__(self) -> int:
        return self._length

    def samples(self, seed: int, epoch: int, start: int) -> Iterator[bytes | np.ndarray]:
        """Yields the undecoded images of an epoch from position `start` on; empty bytes if a sample has no image."""
        try:  # skips one by one: once images are shuffled, neither library can start exactly in the middle
            yield from itertools.islice(self._read_epoch(seed, epoch), start, self._length)
        except MemoryError:
            raise
        # datasets and webdataset pass on the errors of fsspec, requests, pyarrow, tarfile, subprocess, ...
        except Exception as e:
            raise DataError(
                f'{self.name}: the stream broke off ({type(e).__name__}: {one_line(e, 300)}); run the same command '
                'again to continue') from None


class HubStream(_ShuffledStream):
    """A split of a data set of the Hub, or a folder of Parquet or Arrow files, streamed by the datasets library.

    Raises DataError if it cannot be opened, ValueError if no column has images or the length is unknown.
    """

    promise = (
        f'the order is that of the datasets library (shards, and a buffer of {BUFFER} images, shuffled by the seed and '
        'the epoch): the same for any number of processes and after a restart, as long as the shards of the data set '
        "and the library's version stay the same")

    def __init__(
        self, repo: str, split: str | None, images_per_epoch: int | None, choice: Choice | None = None,
    ) -> None:
        datasets, split = import_datasets(), split or 'train'
        name = f'hf-stream:{repo}:{split}'
        source, what = repo, [repo, split]
        options: dict[str, Any] = {'split': split}
        if Path(repo).is_dir():
            files = _list_split(Path(repo), split, name)
            source, what = files[0].suffix.lower()[1:], [str(f.relative_to(repo)) for f in files]
            options = {'split': 'train', 'data_files': [str(f.resolve()) for f in files]}
        rows = explain_open_errors(name, datasets.load_dataset, source, **options, streaming=True)
        if rows.features is None:
            rows = explain_open_errors(name, rows._resolve_features)
        most = getattr((rows.info.splits or {}).get(split), 'num_examples', None)
        if most and images_per_epoch and images_per_epoch > most:
            raise ValueError(f'--images-per-epoch {images_per_epoch}: must be at most {most}, the images of {name}')
        super().__init__(name, images_per_epoch or most or 0, digest(*what, str(rows.features)))
        self._column = find_image_column(rows.features, name, choice or Choice())
        self._rows = select_undecoded(rows, self._column)

    def _read_epoch(self, seed: int, epoch: int) -> Iterator[bytes]:
        rows = self._rows.shuffle(seed=seed, buffer_size=BUFFER)
        rows.set_epoch(epoch)
        for row in rows:
            yield read_encoded(row[self._column]) or b''


class WebStream(_ShuffledStream):
    """Tar shards that the webdataset library fetches: `http(s)://...{000..099}.tar`, or `pipe:COMMAND`."""

    promise = (
        f'the order is that of the shards and of a buffer of {BUFFER} images, both shuffled by the seed and the epoch: '
        'the same for any number of processes and after a restart, as long as every shard delivers the same images')

    def __init__(self, spec: str, images_per_epoch: int | None, choice: Choice | None = None) -> None:
        import_library('webdataset', f'{spec}: streams of tars')
        self._urls = expand_braces(spec)
        names = [re.split(r'[/\s]', url.rstrip('/'))[-1] for url in self._urls]
        self._image = None if choice is None or choice.image is None else choice.image.lower().lstrip('.')
        super().__init__(spec, images_per_epoch or 0, digest(*names, *filter(None, [self._image])))

    def _read_epoch(self, seed: int, epoch: int) -> Iterator[bytes]:
        import webdataset
        urls = [self._urls[i] for i in permutation(seed, epoch, len(self._urls))]
        # Every process reads all shards: if webdataset split them here, each process would see other batches.
        samples = webdataset.WebDataset(
            urls, shardshuffle=False, nodesplitter=lambda source: source, workersplitter=lambda source: source)
        return _shuffle(self._select_images(samples), seed, epoch)

    def _select_images(self, samples: Iterator[dict[str, Any]]) -> Iterator[bytes]:
        """Yields the image of each sample that has one; raises ValueError if a sample has several.

        Logs once if it skips hidden or system files.
        """
        said = False
        for sample in samples:
            names = {key: f'{sample["__key__"]}.{key}' for key in sample if (
                f'.{key}'.lower().endswith(EXTENSIONS) if self._image is None else key.lower() == self._image)}
            kept = [key for key in names if not find_passed_over(names[key])]
            if len(kept) < len(names) and not said:
                said, passed = True, next(path for key, path in names.items() if key not in kept)
                announce(f'{self.name}: hidden and system files are skipped: '
                         f'{short(passed)}')
            if len(kept) > 1:
                raise ValueError(
                    f'the sample {sample["__key__"]} has several images ({", ".join(kept)}); choose one with '
                    f'#image={kept[0]} after the name of the tars')
            yield from (sample[key] for key in kept)


def _shuffle(items: Iterator[bytes], seed: int, epoch: int) -> Iterator[bytes]:
    rng, buffer = np.random.Generator(np.random.PCG64([seed, epoch])), list(itertools.islice(items, BUFFER))
    for item in items:
        at = rng.integers(BUFFER)
        yield buffer[at]
        buffer[at] = item
    for at in rng.permutation(len(buffer)):
        yield buffer[at]


def _list_split(folder: Path, split: str, name: str) -> list[Path]:
    for suffix in TABLES:
        if files := list_shards(folder / split, suffix):
            return files
        train, val = split_by_name(list_shards(folder, suffix))
        if chosen := {'train': train, 'val': val}.get(part_of(split)):
            return chosen
    raise FileNotFoundError(f'{name}: no Parquet or Arrow file of a split {split} in that folder')

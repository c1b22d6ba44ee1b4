"""Data that comes in its own order, without random access: `hf-stream:REPO`, and tar shards behind a URL or a command.

Every process reads the whole stream, and decodes only its own part of each batch: N processes see what one does.
"""
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..philox import permutation
from .arrow import encoded, image_column, library, load, undecoded
from .decode import DataError
from .images import EXTENSIONS
from .index import digest
from .shards import expand_braces, shard_files, split_files

BUFFER = 1000  # images among which the next one is drawn


class _Stream:
    labels = None

    def __init__(self, name: str, length: int, marked: str) -> None:
        self.name, self.classes, self.digest, self._length = name, [], marked, length

    def __len__(self) -> int:
        return self._length

    def samples(self, seed: int, epoch: int, start: int) -> Iterator[bytes | np.ndarray]:
        """The undecoded images of an epoch, from position `start` on; empty bytes where the source holds none.

        Raises:
            DataError: the stream broke off.
        """
        # Skipped one by one: a start into the middle is not exact in either library once images are shuffled.
        yield from itertools.islice(self._safely(seed, epoch), start, self._length)

    def _safely(self, seed: int, epoch: int) -> Iterator[bytes]:
        try:
            yield from self._whole(seed, epoch)
        except Exception as e:  # networks, archives and both libraries fail in many ways
            text = ' '.join(str(e).split())[:300]
            raise DataError(
                f'{self.name}: the stream broke off ({type(e).__name__}: {text}); run the same command again to go on'
                ) from None

    def _whole(self, seed: int, epoch: int) -> Iterator[bytes]:
        raise NotImplementedError


class HubStream(_Stream):
    """A split of a data set of the Hub, or a folder of Parquet or Arrow files, as the datasets library streams it.

    Raises:
        DataError: it cannot be opened.
        ValueError: no column of images, or its length is not known.
    """

    promise = (
        f'the order is that of the datasets library (shards, and a buffer of {BUFFER} images, shuffled by the seed and '
        'the epoch): the same for any number of processes and after a restart, as long as the shards of the data set '
        "and the library's version stay the same")

    def __init__(self, repo: str, split: str | None, images_per_epoch: int | None) -> None:
        datasets, split = library(), split or 'train'
        name = f'hf-stream:{repo}:{split}'
        if Path(repo).is_dir():
            files = _files(Path(repo), split, name)
            kind = 'parquet' if files[0].suffix == '.parquet' else 'arrow'
            what = [str(f.relative_to(repo)) for f in files]
            paths = [str(f.resolve()) for f in files]
            rows = load(name, lambda: datasets.load_dataset(kind, data_files=paths, split='train', streaming=True))
        else:
            what = [repo, split]
            rows = load(name, lambda: datasets.load_dataset(repo, split=split, streaming=True))
        if rows.features is None:
            rows = load(name, rows._resolve_features)
        known = (rows.info.splits or {}).get(split)
        most = known.num_examples if known is not None else None
        if most and images_per_epoch and images_per_epoch > most:
            raise ValueError(f'--images-per-epoch {images_per_epoch}: {name} has {most} images')
        length = images_per_epoch or most or 0
        super().__init__(name, _length(name, length), digest(*what, str(rows.features)))
        self._column = image_column(rows.features, name)
        self._rows = undecoded(rows, self._column)

    def _whole(self, seed: int, epoch: int) -> Iterator[bytes]:
        rows = self._rows.shuffle(seed=seed, buffer_size=BUFFER)
        rows.set_epoch(epoch)
        for row in rows:
            yield encoded(row[self._column]) or b''


class WebStream(_Stream):
    """Tar shards that the webdataset library fetches: `http(s)://...{000..099}.tar`, or `pipe:COMMAND`.

    Raises:
        ValueError: no --images-per-epoch.
    """

    promise = (
        f'the order is that of the shards, permuted by the seed and the epoch, and of a buffer of {BUFFER} images '
        'shuffled likewise: the same for any number of processes and after a restart, as long as every shard delivers '
        'the same')

    def __init__(self, spec: str, images_per_epoch: int | None) -> None:
        try:
            import webdataset  # noqa: F401
        except ImportError:
            raise DataError(
                f"{spec}: streams of tars need the webdataset library: pip install 'simsiam-models[data]'") from None
        self._urls = expand_braces(spec)
        names = [re.split(r'[/\s]', url.rstrip('/'))[-1] for url in self._urls]
        super().__init__(spec, _length(spec, images_per_epoch or 0), digest(*names))

    def _whole(self, seed: int, epoch: int) -> Iterator[bytes]:
        import webdataset
        urls = [self._urls[i] for i in permutation(seed, epoch, len(self._urls))]
        # All shards in every process: what is left out of a process here would be another batch.
        samples = webdataset.WebDataset(
            urls, shardshuffle=False, nodesplitter=lambda source: source, workersplitter=lambda source: source)
        return _shuffled((data for sample in samples for data in _image(sample)), seed, epoch)


def _image(sample: dict[str, Any]) -> list[bytes]:
    """The first image of a sample, if there is any."""
    return [value for key, value in sample.items() if f'.{key}'.lower().endswith(EXTENSIONS)][:1]


def _shuffled(items: Iterator[bytes], seed: int, epoch: int) -> Iterator[bytes]:
    rng, kept = np.random.Generator(np.random.PCG64([seed, epoch])), []
    for item in items:
        if len(kept) < BUFFER:
            kept.append(item)
            continue
        at = rng.integers(BUFFER)
        yield kept[at]
        kept[at] = item
    for at in rng.permutation(len(kept)):
        yield kept[at]


def _files(folder: Path, split: str, name: str) -> list[Path]:
    for suffix in ('.parquet', '.arrow'):
        if files := shard_files(folder / split, suffix):
            return files
        train, val = split_files(shard_files(folder, suffix))
        if files := {'train': train, 'validation': val, 'val': val, 'test': val}.get(split):
            return files
    raise FileNotFoundError(f'{name}: no Parquet or Arrow file of a split {split} in that folder')


def _length(name: str, length: int) -> int:
    if length < 1:
        raise ValueError(f'{name}: nothing says how many images it has; give --images-per-epoch N')
    return length



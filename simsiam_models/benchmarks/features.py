"""Features of a frozen backbone, computed once and kept in files that later benchmarks map.

One pass over the images writes every requested feature: the average pool and the five pooled feature maps of
`backbone.pool_stages`, always in float32 (half precision would swap neighbours and shift SVM costs). A file NAME.npy
holds all rows. They are written in shards, and a shard counts only once its checksum is written. An extraction that was
killed therefore continues with the first unfinished shard and ends in the same bytes, and truncated or damaged shards
are found and computed again. Batches never cross a shard, so their sizes, and with them the bits of the features, do
not depend on the number of processes.

The name of the folder is a digest of weights, architecture, data, transform and precision. Images that were replaced
under the same names are noticed by the sizes of their files, and their shard is computed again. File times do not
count, so a copy of the data has the same features. Other pixels in a file of the same size (always so in formats
without compression) go unnoticed unless the image is among the 16 of `pixels_digest`; for torchvision's data sets of
files, only these 16 are compared.
"""
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data.evaluation import EvalImages, Transform
from ..data.readers.decode import DataError
from ..data.readers.images import Images, pixels_digest, stored_sizes
from ..data.readers.index import digest
from ..runtime.distributed import World, cores
from ..runtime.files import cache_folder, explain_write_errors, hold_lock, write_atomically
from ..runtime.messages import counted, one_line
from ..runtime.precision import AMP, autocast, full_precision
from ..runtime.versions import versions
from .backbone import Backbone, forward_stages, has_protocol_sizes, pool_stages
from .feature_file import FeatureFile, shard_rows

NAMES = ('avgpool', 'feat1', 'feat2', 'feat3', 'feat4', 'feat5')
FORMAT = 2
CENTRE = Transform()
CPU_BATCH = 8  # ResNet-50 on one core: 16.2 images per second with 8, 12.7 with 32; 256 need gigabytes


@dataclass(frozen=True)
class Extraction:
    """How features are computed and where they are kept.

    Args:
        cache: folder; None: `features` in the package's own cache.
        batch_size: images in one forward pass, at most a shard's (128 or 1024) and on a CPU CPU_BATCH.
        workers: threads that read images; None: one per core of the process, at most 16; 0: the caller's own.
        amp: 'auto' is 'off', since the published benchmarks ran in float32; or 'bfloat16', 'float16' (CUDA).
        partial: continue if images cannot be read; `Features.readable` lists the images that can be read.
    """

    cache: Path | str | None = None
    batch_size: int = 256
    workers: int | None = None
    amp: str = 'auto'
    partial: bool = False

    @property
    def precision(self) -> str:
        return 'off' if self.amp == 'auto' else self.amp

    @property
    def folder(self) -> Path:
        if self.cache is not None:
            return Path(self.cache)
        folder = cache_folder()
        if folder is None:
            raise RuntimeError('there is no folder to keep features in; name one with --cache')
        return folder / 'features'


class Features:
    """Features, a row per image in their order. `unreadable` (index -> reason) names the rows without meaning."""

    def __init__(
        self, folder: Path, images: Images, names: Sequence[str], key: str, unreadable: dict[int, str], made: int,
    ) -> None:
        self.folder, self.names, self.digest, self._length = folder, tuple(names), key, len(images)
        self.labels, self.classes = images.labels, images.classes
        self.unreadable, self.made = unreadable, made  # made: rows that this call computed, in all processes

    def __len__(self) -> int:
        return self._length

    @property
    def readable(self) -> np.ndarray:
        """Returns the indices of the images that could be read: all, unless a partial set was allowed."""
        keep = np.ones(len(self), bool)
        keep[list(self.unreadable)] = False
        return np.flatnonzero(keep)

    def array(self, name: str) -> np.ndarray:
        """Returns (N, D) float32, mapped from its file, read-only."""
        if name not in self.names:
            raise ValueError(f'{name}: not among the extracted features, {", ".join(self.names)}')
        array: np.ndarray = np.load(self.folder / f'{name}.npy', mmap_mode='r')
        return array

    def rows(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Returns (len(indices), D) float32 in memory."""
        return np.array(self.array(name)[indices])


class FeatureModel:
    """Maps uint8 pixels (B, S, S, 3) to the named features, float32 (B, D) each, computed in a precision of AMP."""

    def __init__(self, backbone: Backbone, precision: str, size: int) -> None:
        self.backbone, self.precision, self.size = backbone, precision, size
        self.device = next(backbone.model.parameters()).device
        self.mean, self.std = (
            torch.tensor(x, device=self.device).view(1, 3, 1, 1) for x in (backbone.mean, backbone.std))

    @torch.no_grad()
    def __call__(self, pixels: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        x = pixels.to(self.device, non_blocking=pixels.is_pinned()).permute(0, 3, 1, 2)
        x = x.float().div_(255).sub_(self.mean).div_(self.std).contiguous(memory_format=torch.channels_last)
        model = self.backbone.model
        with autocast(self.device, self.precision), full_precision():
            if set(names) == {'avgpool'}:
                return {'avgpool': model(x).float()}
            maps, last = forward_stages(model, x)
            head = cast(Callable[[Tensor], Tensor], model.forward_head)
            average = {'avgpool': head(last).float()} if 'avgpool' in names else {}
        flat = dict(zip(NAMES[1:], pool_stages(maps, not has_protocol_sizes(maps)), strict=False)) | average
        for name in names:
            if name not in flat:
                raise ValueError(f'{name}: {self.backbone.name} has maps of {len(maps)} stages only')
        return {name: flat[name] for name in names}

    def measure_widths(self, names: Sequence[str]) -> dict[str, int]:
        """Returns D of each feature.

        Raises:
            ValueError: the network does not run on images of this size, or returns no such features.
        """
        blank = torch.zeros(1, self.size, self.size, 3, dtype=torch.uint8)
        try:
            outputs = self(blank, names)
        except (RuntimeError, AssertionError) as e:  # too small an image, or not the only size that a network takes
            raise ValueError(
                f'{self.backbone.name} does not run on images of {self.size} px ({one_line(e)}); give another '
                '--image-size') from None
        for name, y in outputs.items():
            if y.ndim != 2:
                raise ValueError(f'{name} of {self.backbone.name} is {tuple(y.shape)}, not one row for each image')
        return {name: y.shape[1] for name, y in outputs.items()}


def extract(
    backbone: Backbone, images: Images, what: Sequence[str] = ('avgpool',), transform: Transform = CENTRE,
    extraction: Extraction = Extraction(), world: World | None = None,
) -> Features:
    """Returns the features of all images, as many as possible from the cache.

    Under torchrun, the processes share the shards in turn; all of them must see the same cache folder.

    Args:
        what: of NAMES. At sizes other than 224 px, and for other networks than ResNets, maps are pooled adaptively.

    Raises:
        DataError: an image cannot be read and `partial` is not set; the cache then holds all others.
        ValueError, RuntimeError, OSError: the request cannot be fulfilled; the message says why.
    """
    device = next(backbone.model.parameters()).device
    world = world or World(0, 1, device)
    names = _check_request(images, what, extraction, device)
    model = FeatureModel(backbone, extraction.precision, transform.crop)
    widths = model.measure_widths(names)
    about = {
        'format': FORMAT, 'rows': shard_rows(len(images)), 'backbone': backbone.identity, 'images': images.digest,
        'pixels': world.broadcast_from_main(lambda: pixels_digest(images)), 'n': len(images),
        'transform': asdict(transform), 'precision': extraction.precision,
        'versions': {name: versions()[name] for name in ('torch', 'torchvision', 'timm')}}
    key = digest(json.dumps(about))
    folder = extraction.folder / key
    about |= {'model': backbone.name, 'data': images.name}
    files = {name: FeatureFile(folder, name, len(images), widths[name]) for name in names}
    workers = min(16, cores()) if extraction.workers is None else extraction.workers
    with explain_write_errors(folder):
        world.broadcast_from_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    with hold_lock(folder / 'lock', world):
        todo, digests, unreadable = world.broadcast_from_main(lambda: _prepare(folder, about, images, files, workers))
        batch_size = min(extraction.batch_size, CPU_BATCH) if device.type == 'cpu' else extraction.batch_size
        batches = _split(todo[world.rank::world.size], batch_size)
        loader = EvalImages(images, [rows for _, rows in batches], transform, workers, device)
        world.all_or_none(lambda: _compute(model, loader, batches, _ShardWriter(files, digests, loader), world.main))
        for found in world.gather(loader.unreadable):  # also the barrier
            unreadable |= found
    if unreadable and not extraction.partial:
        raise DataError(
            f'{images.name}: {len(unreadable)} of {len(images)} images cannot be read '
            f'({"; ".join(list(unreadable.values())[:3])}{"; ..." if len(unreadable) > 3 else ""}); '
            'repair them, or leave them out with --allow-partial, which is then a result on other images')
    contents = digest(key, *(x or '' for x in digests))  # replacing an image does not change the folder
    made = sum(shard.stop - shard.start for shard in todo)
    return Features(folder, images, names, contents, dict(sorted(unreadable.items())), made)


def _check_request(images: Images, what: Sequence[str], extraction: Extraction, device: torch.device) -> list[str]:
    """Returns the features in the order of NAMES; raises ValueError if the request is impossible."""
    names = [name for name in NAMES if name in what]
    if not names or set(what) - set(NAMES):
        raise ValueError(f'features {", ".join(what) or "(none)"}: choose from {", ".join(NAMES)}')
    if hasattr(images, 'samples'):
        raise ValueError(f'{images.name} is a stream, which has no random access: name files for a benchmark')
    if extraction.precision not in AMP or (extraction.precision == 'float16' and device.type == 'cpu'):
        raise ValueError(f'--amp {extraction.amp}: on {device.type} it is auto, off or bfloat16')
    if extraction.batch_size < 1:
        raise ValueError(f'--batch-size {extraction.batch_size}: must be at least 1')
    return names


class _Shard(NamedTuple):
    """A shard that lacks some features."""

    number: int
    names: list[str]
    start: int
    stop: int


_Batch = tuple[_Shard, np.ndarray]  # with the rows of the batch


def _prepare(
    folder: Path, about: dict[str, Any], images: Images, files: dict[str, FeatureFile], workers: int,
) -> tuple[list[_Shard], list[str | None], dict[int, str]]:
    """Writes about.json and checks the files.

    Returns:
        The shards to compute, the digest of each shard's image files, and the images known to be unreadable.
    """
    text = json.dumps(about, indent=2) + '\n'
    with explain_write_errors(folder):
        write_atomically(folder / 'about.json', lambda f: f.write(text.encode()))
    spans = next(iter(files.values())).spans
    with ThreadPoolExecutor(max(1, workers)) as threads:
        digests = list(threads.map(lambda span: _hash_sizes(images, *span), spans))
        found = {name: file.prepare(images, digests, threads) for name, file in files.items()}
    shards = [_Shard(i, [name for name in files if found[name][i] is None], *span) for i, span in enumerate(spans)]
    unreadable = {i: why for shards in found.values() for bad in shards for i, why in (bad or {}).items()}
    return [shard for shard in shards if shard.names], digests, unreadable


def _hash_sizes(images: Images, start: int, stop: int) -> str | None:
    """Hashes the sizes of these images' files, which shows most replacements; None if they are not files."""
    sizes = stored_sizes(images, np.arange(start, stop))
    return None if sizes is None else digest(sizes.astype('<i8'))


def _split(shards: Sequence[_Shard], batch_size: int) -> list[_Batch]:
    return [
        (shard, np.arange(i, min(i + batch_size, shard.stop)))
        for shard in shards for i in range(shard.start, shard.stop, batch_size)]


class _ShardWriter:
    """Writes the features of batches, in order, and completes each shard after its last batch."""

    def __init__(self, files: dict[str, FeatureFile], digests: list[str | None], loader: EvalImages) -> None:
        self.files, self.digests, self.loader = files, digests, loader
        self.crc = dict.fromkeys(files, 0)
        self.handles = {name: os.open(file.path, os.O_RDWR) for name, file in files.items()}

    def write(self, batch: _Batch, outputs: dict[str, Tensor]) -> None:
        """Raises DataError if most images of a shard are unreadable."""
        shard, rows = batch
        for name, y in outputs.items():
            data = y.cpu().contiguous().numpy().data.cast('B')
            self.files[name].write(self.handles[name], data, int(rows[0]))
            self.crc[name] = zlib.crc32(data, self.crc[name])
        if rows[-1] + 1 < shard.stop:
            return
        bad = {i: why for i, why in sorted(self.loader.unreadable.items()) if shard.start <= i < shard.stop}
        if len(bad) > 32 and 2 * len(bad) > shard.stop - shard.start:
            raise DataError(
                f'{next(iter(bad.values()))}; {len(bad)} of {shard.stop - shard.start} images in a row cannot be read: '
                'is the data still there?')
        for name in shard.names:
            self.files[name].finish(
                self.handles[name], shard.number, self.crc[name], self.digests[shard.number], bad)
            self.crc[name] = 0

    def close(self) -> None:
        for handle in self.handles.values():
            os.close(handle)


def _compute(
    model: FeatureModel, loader: EvalImages, batches: Sequence[_Batch], writer: _ShardWriter, main: bool,
) -> None:
    """Computes and writes the features of these batches; the main process shows the progress.

    Raises:
        ValueError: a feature is not finite.
    """
    total, began = sum(len(rows) for rows in loader.batches), time.perf_counter()
    bar = tqdm(total=total, desc='features', unit=' images', disable=not (main and total and sys.stderr.isatty()))

    def store(batch: _Batch, outputs: dict[str, Tensor]) -> None:
        rows = batch[1]
        for name, y in outputs.items():
            if not bool(y.isfinite().all()):
                raise ValueError(
                    f'{model.backbone.name}: {name} of images {rows[0]} to {rows[-1]} is not finite; check the weights '
                    '(simsiam weights verify), or use --amp off')
        writer.write(batch, outputs)
        bar.update(len(rows))

    try:
        before = None  # the device computes a batch while the previous one is written
        for batch, (_, x) in zip(batches, loader, strict=True):
            outputs = model(x, batch[0].names)
            if before is not None:
                store(*before)
            before = batch, outputs
        if before is not None:
            store(*before)
    finally:
        bar.close()
        writer.close()
    if main and total and bar.disable:
        seconds = time.perf_counter() - began
        text = f'{counted(total, "image")} in {seconds:.1f} s ({total / seconds:.1f} images/s)'
        print(f'features: {text}', file=sys.stderr)

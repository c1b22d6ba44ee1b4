"""Features of a frozen backbone, made once and kept in files that later benchmarks map.

One pass over the images writes every feature that is asked for: the average pool and the five pooled taps of
`backbone.pooled`, float32 always (half precision would exchange neighbours and move SVM costs). A file NAME.npy holds
all rows; they are written in shards, each of which counts once its checksum is written too. So a killed extraction goes
on with the first unfinished shard and ends in the same bytes, and what was cut off or damaged later is found and made
again. Batches never cross a shard: their sizes, and with them the bits, do not depend on the number of processes.

The folder is named after weights, architecture, data, transform and precision. Images that were exchanged under their
names are noticed by the sizes of their files, and their shard is made again; the times of files do not count, so
that a copy of the data has the same features. Not noticed are other pixels in a file of the same size (always so in
formats without compression), unless it is among the 16 images of `pixels_digest`; in torchvision's data sets of files
these 16 are all that is looked at.
"""
import json
import os
import sys
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

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
from ..runtime.precision import AMP, full_precision
from .backbone import Backbone, fits_protocol, pooled, stage_maps
from .feature_file import FeatureFile, shard_rows
from .results.record import versions

NAMES = ('avgpool', 'feat1', 'feat2', 'feat3', 'feat4', 'feat5')
FORMAT = 2
CENTRE = Transform()
SHARE = 8  # images that a thread takes at a time
CPU_BATCH = 8  # ResNet-50 makes 16.2 images per second of a core with 8, 12.7 with 32, and needs gigabytes with 256


class Features:
    """Rows of features in the order of the images; `unreadable` names images whose rows are those of a black one."""

    def __init__(
        self, folder: Path, images: Images, names: Sequence[str], key: str, unreadable: dict[int, str], made: int,
    ) -> None:
        self.folder, self.names, self.digest, self._length = folder, tuple(names), key, len(images)
        self.labels, self.classes = images.labels, images.classes
        self.unreadable, self.made = unreadable, made  # made: rows computed by this call, by all processes

    def __len__(self) -> int:
        return self._length

    @property
    def readable(self) -> np.ndarray:
        """Indices of the images that could be read: all, unless a partial set was allowed."""
        keep = np.ones(len(self), bool)
        keep[list(self.unreadable)] = False
        return np.flatnonzero(keep)

    def array(self, name: str) -> np.ndarray:
        """(N, D) float32, mapped from its file and read only."""
        if name not in self.names:
            raise ValueError(f'{name}: not among the extracted features, {", ".join(self.names)}')
        return np.load(self.folder / f'{name}.npy', mmap_mode='r')

    def rows(self, name: str, indices: np.ndarray) -> np.ndarray:
        """(len(indices), D) float32 in memory."""
        return np.array(self.array(name)[indices])


class _Model:
    """uint8 pixels (B, S, S, 3) -> the named features, float32 (B, D) each, in full or half precision."""

    def __init__(self, backbone: Backbone, amp: str, size: int) -> None:
        self.backbone, self.dtype = backbone, AMP[amp]
        self.device = next(backbone.model.parameters()).device
        self.mean, self.std = (
            torch.tensor(x, device=self.device).view(1, 3, 1, 1) for x in (backbone.mean, backbone.std))
        self.size, self._adaptive = size, None

    @torch.no_grad()
    def __call__(self, pixels: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        x = pixels.to(self.device, non_blocking=pixels.is_pinned()).permute(0, 3, 1, 2)
        if self.backbone.bgr:
            x = x.flip(1)
        x = x.float().div_(255).sub_(self.mean).div_(self.std).contiguous(memory_format=torch.channels_last)
        model = self.backbone.model
        half = torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()
        with half, full_precision():
            if set(names) == {'avgpool'}:
                return {'avgpool': model(x).float()}
            maps, last = stage_maps(model, x)
            average = model.forward_head(last).float() if 'avgpool' in names else None
        flat = dict(zip(NAMES[1:], pooled(maps, not fits_protocol(maps)), strict=False))
        flat['avgpool'] = average
        missing = [name for name in names if name not in flat]
        if missing:
            raise ValueError(f'{missing[0]}: {self.backbone.name} has maps of {len(maps)} stages only')
        return {name: flat[name] for name in names}

    def widths(self, names: Sequence[str]) -> dict[str, int]:
        blank = torch.zeros(1, self.size, self.size, 3, dtype=torch.uint8)
        try:
            outputs = self(blank, names)
        except (RuntimeError, AssertionError) as e:  # an image too small, or not of the one size that a network takes
            raise ValueError(
                f'{self.backbone.name} does not run on images of {self.size} px ({" ".join(str(e).split())[:200]}); '
                'give another --image-size') from None
        for name, y in outputs.items():
            if y.ndim != 2:
                raise ValueError(f'{name} of {self.backbone.name} is {tuple(y.shape)}, not one row for each image')
        return {name: y.shape[1] for name, y in outputs.items()}


def extract(
    backbone: Backbone, images: Images, what: Sequence[str] = ('avgpool',), transform: Transform = CENTRE,
    cache: Path | str | None = None, batch: int = 256, workers: int | None = None, amp: str = 'auto',
    world: World | None = None, partial: bool = False,
) -> Features:
    """The features of all images, from the cache where it has them.

    Under torchrun each process makes every so-manieth shard, in a cache folder that all of them see.

    Args:
        what: of NAMES. Away from 224 px, or of networks with other maps, taps are pooled adaptively (`pooled`).
        cache: folder; None: `features` in this package's own.
        batch: images in one forward pass, at most a shard's, 128 or 1024 (and CPU_BATCH on a CPU).
        workers: threads that read; None: one for each core of the process, at most 16; 0: the caller's own.
        amp: 'auto' is 'off': published benchmarks ran in float32. Or 'bfloat16', 'float16' (CUDA).
        partial: go on where images cannot be read; `Features.readable` has the others.

    Raises:
        DataError: an image cannot be read and `partial` is not set; all others are in the cache then.
        ValueError, RuntimeError, OSError: what is asked for cannot be done; one sentence says why.
    """
    device = next(backbone.model.parameters()).device
    world = world or World(0, 1, device)
    names = [name for name in NAMES if name in what]
    if not names or set(what) - set(NAMES):
        raise ValueError(f'features {", ".join(what) or "(none)"}: choose of {", ".join(NAMES)}')
    if hasattr(images, 'samples'):
        raise ValueError(f'{images.name} is a stream, which cannot be read at random: name files for a benchmark')
    amp = 'off' if amp == 'auto' else amp
    if amp not in AMP or (amp == 'float16' and device.type == 'cpu'):
        raise ValueError(f'--amp {amp}: on {device.type} it is auto, off or bfloat16')
    if batch < 1:
        raise ValueError(f'--batch-size {batch}: at least 1')
    model = _Model(backbone, amp, transform.crop)
    widths = model.widths(names)
    about = {
        'format': FORMAT, 'rows': shard_rows(len(images)), 'backbone': backbone.identity, 'images': images.digest,
        'pixels': world.broadcast_from_main(lambda: pixels_digest(images)), 'n': len(images),
        'transform': asdict(transform), 'precision': amp,
        'versions': {name: versions()[name] for name in ('torch', 'torchvision', 'timm')}}
    key = digest(json.dumps(about))
    folder = _cache(cache) / key
    tables = {name: FeatureFile(folder, name, len(images), widths[name]) for name in names}
    spans = tables[names[0]].spans
    workers = min(16, cores()) if workers is None else workers
    with explain_write_errors(folder):
        world.broadcast_from_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    with hold_lock(folder / 'lock', world, 'features'):
        def prepare() -> tuple[list[tuple[int, list[str]]], list[str | None], dict[int, str]]:
            about_file = json.dumps({**about, 'model': backbone.name, 'data': images.name}, indent=2) + '\n'
            with explain_write_errors(folder):
                write_atomically(folder / 'about.json', lambda f: f.write(about_file.encode()))
            with ThreadPoolExecutor(max(1, workers)) as threads:
                files = list(threads.map(lambda span: _files(images, *span), spans))
                found = {name: table.prepare(images, files, threads) for name, table in tables.items()}
            todo = [(s, [n for n in names if found[n][s] is None]) for s in range(len(spans))]
            done = {i: why for shards in found.values() for bad in shards for i, why in (bad or {}).items()}
            return [(s, missing) for s, missing in todo if missing], files, done

        todo, files, unreadable = world.broadcast_from_main(prepare)
        mine = todo[world.rank::world.size]
        bad = world.all_or_none(lambda: _fill(model, images, tables, mine, files, transform, batch, workers, world))
        for found in world.gather(bad):  # also the barrier
            unreadable |= found
    made = sum(stop - start for start, stop in (spans[s] for s, _ in todo))
    if unreadable and not partial:
        raise DataError(
            f'{images.name}: {len(unreadable)} of {len(images)} images cannot be read '
            f'({"; ".join(list(unreadable.values())[:3])}{"; ..." if len(unreadable) > 3 else ""}), and a benchmark on '
            'other images is another benchmark: repair them, or leave them out with --allow-partial')
    contents = digest(key, *(x or '' for x in files))  # the folder stays the same where an image is exchanged
    return Features(folder, images, names, contents, dict(sorted(unreadable.items())), made)


def _files(images: Images, start: int, stop: int) -> str | None:
    """Tells the files of these images from others, as far as their sizes do; None where there are none."""
    sizes = stored_sizes(images, np.arange(start, stop))
    return None if sizes is None else digest(sizes.astype('<i8'))


def _fill(
    model: _Model, images: Images, tables: dict[str, FeatureFile], shards: list[tuple[int, list[str]]],
    files: list[str | None], transform: Transform, batch: int, workers: int, world: World,
) -> dict[int, str]:
    """Make these shards; returns what could not be read in them. `files`: see FeatureFile.prepare."""
    batch = min(batch, CPU_BATCH) if model.device.type == 'cpu' else batch
    plan = []  # shard, names, rows of one batch, whether it is the shard's last
    for shard, names in shards:
        start, stop = tables[names[0]].spans[shard]
        cuts = list(range(start, stop, batch))
        plan += [(shard, names, np.arange(i, min(i + batch, stop)), i == cuts[-1]) for i in cuts]
    if not plan:
        return {}
    pixels = EvalImages(images, [rows for _, _, rows, _ in plan], transform, workers, model.device)
    handles = {name: os.open(table.path, os.O_RDWR) for name, table in tables.items()}
    crc = dict.fromkeys(tables, 0)
    total = sum(len(rows) for _, _, rows, _ in plan)
    began = time.perf_counter()
    bar = tqdm(total=total, desc='features', unit=' images', disable=not (world.main and sys.stderr.isatty()))

    def store(job: tuple, outputs: dict[str, Tensor]) -> None:
        shard, names, rows, last = job
        for name in names:
            table, values = tables[name], outputs[name].cpu().contiguous().numpy()
            if not np.isfinite(values).all():
                raise ValueError(
                    f'{model.backbone.name}: {name} of images {rows[0]} to {rows[-1]} is not finite; check the weights '
                    '(simsiam weights verify), or use --amp off')
            data = memoryview(values).cast('B')
            table.write(handles[name], data, int(rows[0]))
            crc[name] = zlib.crc32(data, crc[name])
        bar.update(len(rows))
        if last:
            start, stop = tables[names[0]].spans[shard]
            bad = {i: why for i, why in sorted(pixels.unreadable.items()) if start <= i < stop}
            if len(bad) > 32 and 2 * len(bad) > stop - start:
                raise DataError(
                    f'{next(iter(bad.values()))}; {len(bad)} of {stop - start} images in a row cannot be read: is the '
                    'data still there?')
            for name in names:
                tables[name].finish(handles[name], shard, crc[name], files[shard], bad)
                crc[name] = 0

    try:
        before = None  # the device computes a batch while the one before is written
        for job, (_, x) in zip(plan, pixels, strict=True):
            outputs = model(x, job[1])
            if before is not None:
                store(*before)
            before = job, outputs
        store(*before)
    finally:
        bar.close()
        for handle in handles.values():
            os.close(handle)
    if world.main and bar.disable:
        seconds = time.perf_counter() - began
        print(f'features: {total} images in {seconds:.1f} s ({total / seconds:.1f} images/s)', file=sys.stderr)
    return pixels.unreadable


def _cache(cache: Path | str | None) -> Path:
    if cache is not None:
        return Path(cache)
    folder = cache_folder()
    if folder is None:
        raise RuntimeError('there is no folder to keep features in; name one with --cache')
    return folder / 'features'

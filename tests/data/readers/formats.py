"""Writes the same samples in every format that open_data reads; helpers and fixtures of the tests of readers."""
import csv
import importlib.util
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from simsiam_models.data import Augmentation, FolderImages, TwoViews

AUG = Augmentation(size=16)
BATCH = 16
HAS = {name: importlib.util.find_spec(name) is not None for name in ('datasets', 'webdataset')}
if HAS['datasets']:
    import datasets
needs_datasets = pytest.mark.skipif(not HAS['datasets'], reason="needs the datasets library: pip install '.[data]'")
needs_webdataset = pytest.mark.skipif(
    not HAS['webdataset'], reason="needs the webdataset library: pip install '.[data]'")
ONE_SENTENCE = (ValueError, FileNotFoundError, RuntimeError, OSError)


@pytest.fixture(autouse=True, scope='module')
def caches(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as m:
        m.setenv('SIMSIAM_CACHE', str(tmp_path_factory.mktemp('cache')))
        if HAS['datasets']:
            m.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path_factory.mktemp('hf'))
            m.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
            m.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
            # It waits 5 seconds after each Parquet stream.
            m.setattr(datasets.config, 'SLEEP_TIME_ON_THREADS_SHUTDOWN', 0.05, raising=False)
            datasets.disable_progress_bars()
        yield


Sample = tuple[str, bytes, int]  # name relative to the folder, bytes of the file, label


def samples_of(folder: Path) -> list[Sample]:
    images = FolderImages(folder)
    return [(images.path(i).relative_to(folder).as_posix(), images.path(i).read_bytes(), int(images.labels[i]))
            for i in range(len(images))]


def write_text(root: Path, samples: list[Sample], sep: str = ' ', labels: bool = True) -> str:
    write_files(root, samples)
    lines = [f'{name}{sep}{label}' if labels else name for name, _, label in samples]
    (root / 'list.txt').write_text('\n'.join(lines) + '\n')
    return str(root / 'list.txt')


def write_files(root: Path, samples: list[Sample]) -> Path:
    for name, data, _ in samples:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_csv(root: Path, samples: list[Sample]) -> str:
    write_files(root / 'im, ages', samples)
    with open(root / 'list.csv', 'w', newline='') as f:
        table = csv.writer(f)
        table.writerow(['id', 'class', 'filename'])
        table.writerows([i, f'class {label}', f'im, ages/{name}'] for i, (name, _, label) in enumerate(samples))
    return str(root / 'list.csv')


def write_places(root: Path, samples: list[Sample]) -> str:
    write_files(root, samples)
    (root / 'list.csv').write_text(''.join(f'{name},{label}\n' for name, _, label in samples))
    return str(root / 'list.csv')


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path: Path, samples: list[Sample], labels: bool = True, form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w', format=form) as tar:
        for name, data, label in samples:
            if labels:
                add(tar, name.rpartition('.')[0] + '.cls', str(label).encode())
            add(tar, name, data)
    return path


def write_tars(root: Path, samples: list[Sample], labels: bool = True, name: str = 'shard-') -> str:
    for k, part in enumerate(np.array_split(np.arange(len(samples)), 3)):
        write_tar(root / f'{name}{k:03}.tar', [samples[i] for i in part], labels)
    return str(root)


def table(samples: list[Sample], names: bool = True) -> 'datasets.Dataset':
    classes = [str(i) for i in range(10)]
    label = datasets.ClassLabel(names=classes) if names else datasets.Value('int64')
    rows = {'image': [{'bytes': data, 'path': name} for name, data, _ in samples], 'label': [y for *_, y in samples]}
    return datasets.Dataset.from_dict(rows, features=datasets.Features({'image': datasets.Image(), 'label': label}))


def write_saved(root: Path, samples: list[Sample]) -> str:
    table(samples).save_to_disk(root, num_shards=2)
    return str(root)


def write_parquet(root: Path, samples: list[Sample], prefix: str = 'part') -> str:
    root.mkdir(parents=True, exist_ok=True)
    rows = table(samples)
    for k in range(3):
        rows.shard(3, k, contiguous=True).to_parquet(root / f'{prefix}-{k:05}.parquet')
    return str(root)


def write_plain_parquet(root: Path, samples: list[Sample]) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq
    root.mkdir(parents=True)
    pq.write_table(pa.table({'jpg': [d for _, d, _ in samples], 'label': [y for *_, y in samples]}), root / 'a.parquet')
    return str(root / 'a.parquet')


def write_country(root: Path, samples: list[Sample]) -> str:
    write_files(root / 'country211/train', samples)
    return f'torchvision:Country211:{root}'


def write_food(root: Path, samples: list[Sample]) -> str:
    """Its names all end in .jpg, whatever is in the files."""
    write_files(root / 'food-101/images', [(name.rpartition('.')[0] + '.jpg', data, y) for name, data, y in samples])
    split: dict[str, list[str]] = {}
    for name, *_ in samples:
        split.setdefault(name.split('/')[0], []).append(name.rpartition('.')[0])
    (root / 'food-101/meta').mkdir()
    (root / 'food-101/meta/train.json').write_text(json.dumps(split))
    return f'torchvision:Food101:{root}'


FORMATS: dict[str, Callable[[Path, list[Sample]], str]] = {
    'list.txt': write_text,
    'list.csv': write_csv,
    'list.csv without a header': write_places,
    'tar shards': write_tars,
    'tar pattern': lambda root, samples: write_tars(root, samples) + '/shard-{000..002}.tar',
    'tar glob': lambda root, samples: write_tars(root, samples) + '/*.tar',
    'one tar': lambda root, samples: str(write_tar(root / 'a.tar', samples)),
    'save_to_disk': write_saved,
    'parquet': write_parquet,
    'parquet pattern': lambda root, samples: write_parquet(root, samples) + '/part-*.parquet',
    'parquet of plain bytes': write_plain_parquet,
    'hf: parquet': lambda root, samples: f'hf:{write_parquet(root, samples)}',
    'arrow file': lambda root, samples: write_saved(root, samples) + '/data-{00000..00001}-of-00002.arrow',
    'torchvision ImageFolder': write_country,
    'torchvision Food101': write_food,
}


HUGGING = {
    'save_to_disk', 'parquet', 'parquet pattern', 'parquet of plain bytes', 'hf: parquet', 'arrow file', 'arrow',
    'garbage parquet', 'garbage arrow', 'empty parquet', 'a truncated arrow file', 'a table without images',
    'a table without rows', 'a saved set without its files', 'no Hub', 'no Hub for a stream',
    'a stream of an empty folder', 'a split that is not there', 'datasets'}


def cases(names) -> list:
    return [pytest.param(name, marks=needs_datasets) if name in HUGGING else
            pytest.param(name, marks=needs_webdataset) if name == 'pipe' else name for name in names]


def views(source, rank: int = 0, world: int = 1, start: int = 0, epoch: int = 1, **how) -> list[torch.Tensor]:
    """(2, B / world, 3, S, S) of each step."""
    loader = TwoViews(source, AUG, BATCH, seed=5, rank=rank, world=world, **how)
    return [torch.stack(pair) for pair in loader.epoch(epoch, start)]


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def together(source, world: int, **how) -> list[torch.Tensor]:
    parts = [views(source, rank, world, **how) for rank in range(world)]
    return [torch.cat(step, 1) for step in zip(*parts, strict=True)]

"""Writes miniatures of the benchmarks' data sets in their real layouts, without the code under test.

Each function returns what it wrote: for each part [(path relative to the root, label)], in the order in which it must
be read.
"""
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

WNIDS = ('n01440764', 'n01443537', 'n02119789')
PLACES_IMAGES = 'data/vision/torralba/deeplearning/images256'
VOC_NAMES = (
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable', 'dog',
    'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor')
Written = dict[str, list[tuple[str, int]]]

_digits = load_digits()


def digit(i: int, size: tuple[int, int] = (40, 32)) -> np.ndarray:
    """Returns a handwritten digit, (H, W) uint8."""
    image = Image.fromarray((_digits.images[i % len(_digits.images)] * 255 / 16).astype(np.uint8))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def jpeg(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(digit(i)).convert('RGB').save(file, 'JPEG', quality=90)
    return file.getvalue()


def pixels(file: Path) -> np.ndarray:
    return np.array(Image.open(file).convert('RGB'))


def write_image(file: Path, i: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(jpeg(i))


def write_imagenet(root: Path, train: int = 4, val: int = 2, wnids: tuple[str, ...] = WNIDS) -> Written:
    """Writes train/WNID/WNID_N.JPEG and val/WNID/ILSVRC2012_val_N.JPEG; `train` and `val` are images per class."""
    written: Written = {'train': [], 'val': []}
    for label, wnid in enumerate(wnids):
        for i in range(train):
            written['train'].append((f'train/{wnid}/{wnid}_{10 * i + label}.JPEG', label))
        for i in range(val):
            written['val'].append((f'val/{wnid}/ILSVRC2012_val_{i * len(wnids) + label + 1:08}.JPEG', label))
    for part in written.values():
        part.sort()
        for i, (path, _) in enumerate(part):
            write_image(root / path, i)
    return written


def write_imagenet_lists(root: Path, train: int = 4, val: int = 2) -> Written:
    """Writes a flat val/ and meta/*.txt with `path label` lines, as in Caffe's ImageNet."""
    written = write_imagenet(root, train, val)
    flat = [(f'val/{Path(path).name}', label) for path, label in written['val']]
    for (old, _), (new, _) in zip(written['val'], flat, strict=True):
        (root / old).rename(root / new)
    for wnid in WNIDS:
        (root / 'val' / wnid).rmdir()
    written['val'] = sorted(flat)
    written['train'] = written['train'][::-1]  # the order is the list's
    (root / 'meta').mkdir()
    for part, rows in written.items():
        text = ''.join(f'{path.removeprefix(f"{part}/")} {label}\n' for path, label in rows)
        (root / 'meta' / f'{part}.txt').write_text(text)
    return written


def write_places205(
    root: Path, train: int = 6, val: int = 3, between: str = ' ', images: str = PLACES_IMAGES) -> Written:
    """Writes images and trainvalsplit_places205/{train,val}_places205.csv; the real files separate by a blank."""
    scenes, written = ('a/abbey', 'a/airport_terminal', 'b/bakery/shop'), {}
    (root / 'trainvalsplit_places205').mkdir(parents=True)
    for part, n in (('train', train), ('val', val)):
        rows = [(f'{scenes[i % 3]}/gsun_{part}{i:04x}.jpg', i % 3) for i in range(n)]
        for i, (path, _) in enumerate(rows):
            write_image(root / images / path, i)
        (root / 'trainvalsplit_places205' / f'{part}_places205.csv').write_text(
            ''.join(f'{path}{between}{label}\n' for path, label in rows))
        written[part] = [(f'{images}/{path}', label) for path, label in rows]
    return written


def write_inat18(root: Path, train: int = 6, val: int = 3, prefix: str = 'train_val2018/') -> Written:
    """Writes train2018.json and val2018.json; the ids of images and categories have gaps and are unordered."""
    ids, written = (7, 3, 5000), {}
    categories = [{'id': i, 'name': f'species {i}', 'supercategory': 'Plantae'} for i in ids]
    rank = {i: n for n, i in enumerate(sorted(ids))}
    for part, n in (('train', train), ('val', val)):
        images = [{'id': 1000 - 3 * i, 'file_name': f'{prefix}Plantae/{ids[i % 3]}/{part}{i:04x}.jpg', 'width': 40,
                   'height': 32, 'license': 3} for i in range(n)]
        annotations = [{'id': 9 * i, 'image_id': 1000 - 3 * i, 'category_id': ids[i % 3]} for i in reversed(range(n))]
        written[part] = []
        for i, image in enumerate(images):
            path = f'train_val2018/{image["file_name"].removeprefix("train_val2018/")}'
            write_image(root / path, i)
            written[part].append((path, rank[ids[i % 3]]))
        (root / f'{part}2018.json').write_text(json.dumps({
            'info': {'year': 2018}, 'images': images, 'annotations': annotations, 'categories': categories}))
    return written


def write_cifar(root: Path, hundred: bool = False, train: int = 20, test: int = 10) -> dict[str, list[int]]:
    """Writes the binary version of CIFAR-10 (five training files) or CIFAR-100; returns the labels."""
    folder = root / ('cifar-100-binary' if hundred else 'cifar-10-batches-bin')
    folder.mkdir(parents=True)
    classes, labels = 100 if hundred else 10, {}
    for part, n in (('train', train), ('test', test)):
        labels[part] = [(7 * i) % classes for i in range(n)]
        records = []
        for i, label in enumerate(labels[part]):
            head = bytes([label // 5, label]) if hundred else bytes([label])
            records.append(head + np.repeat(digit(i, (32, 32))[None], 3, 0).tobytes())
        if hundred or part == 'test':
            (folder / ('train.bin' if part == 'train' else 'test.bin' if hundred else 'test_batch.bin')).write_bytes(
                b''.join(records))
        else:
            share = n // 5
            for i in range(5):
                (folder / f'data_batch_{i + 1}.bin').write_bytes(b''.join(records[i * share:(i + 1) * share]))
    return labels


def write_voc07(
    root: Path, trainval: int = 30, test: int = 20, names: tuple[str, ...] = VOC_NAMES,
) -> tuple[dict[str, list[str]], dict[str, np.ndarray]]:
    """Writes VOCdevkit/VOC2007 with its lists; returns ids and labels (N, classes): 1 present, 0 absent, -1 difficult.

    Image i has class i % classes, and every fifth image shows its next class as a difficult object only. The ids of
    the two parts alternate, and the lists are unordered.
    """
    folder = root / 'VOCdevkit' / 'VOC2007'
    main = folder / 'ImageSets' / 'Main'
    main.mkdir(parents=True)
    ids, labels = {}, {}
    for part, n, odd in (('trainval', trainval, 1), ('test', test, 0)):
        ids[part] = [f'{2 * i + odd + 4:06}' for i in range(n)]
        labels[part] = np.zeros((n, len(names)), np.int8)
        for i, at in enumerate(ids[part]):
            labels[part][i, i % len(names)] = 1
            if not i % 5:
                labels[part][i, (i + 1) % len(names)] = -1
            write_image(folder / 'JPEGImages' / f'{at}.jpg', i)
        backwards = list(reversed(range(n)))
        (main / f'{part}.txt').write_text(''.join(f'{ids[part][i]}\n' for i in backwards))
        written = {1: ' 1', 0: '-1', -1: ' 0'}  # as in the real files
        for column, name in enumerate(names):
            (main / f'{name}_{part}.txt').write_text(
                ''.join(f'{ids[part][i]} {written[int(labels[part][i, column])]}\n' for i in backwards))
    return ids, labels

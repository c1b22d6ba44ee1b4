"""Writes miniatures of data sets with annotated objects in COCO's and in VOC's form, without the code under test."""
import copy
import json
from pathlib import Path
from typing import Any

from layouts_benchmarks import write_image

HEIGHT, WIDTH = 32, 40  # of the images
SQUARE = [4.0, 4.0, 14.0, 4.0, 14.0, 14.0, 4.0, 14.0]
CATEGORIES = [{'id': 7, 'name': 'dog'}, {'id': 3, 'name': 'cat'}, {'id': 90, 'name': 'toothbrush'}]


def annotation(id_: int, image: int, category: int = 7, box: tuple[float, ...] = (4, 4, 10, 10), **more: Any) -> dict:
    """A box is x, y, width and height."""
    return {'id': id_, 'image_id': image, 'category_id': category, 'bbox': [*box], 'area': box[2] * box[3],
            'iscrowd': 0, 'segmentation': [SQUARE], **more}


def coco(images: int = 4, annotations: list[dict] | None = None) -> dict:
    """Returns the content of a file; image i has the id 100 - 3 i, and by default an object of category i % 3."""
    ids = [100 - 3 * i for i in range(images)]
    if annotations is None:
        annotations = [annotation(9 * i + 1, ids[i], CATEGORIES[i % 3]['id']) for i in range(images)]
    return copy.deepcopy({
        'info': {}, 'licenses': [], 'categories': CATEGORIES, 'annotations': annotations,
        'images': [{'id': id_, 'file_name': f'{id_:012}.jpg', 'width': WIDTH, 'height': HEIGHT} for id_ in ids]})


def write_coco(file: Path, content: dict, images: Path) -> Path:
    """Writes the file and its images."""
    for i, image in enumerate(content['images']):
        write_image(images / image['file_name'], i)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def write_coco2017(root: Path, train: dict | None = None, val: dict | None = None) -> Path:
    """Writes COCO's own layout."""
    for part, content in (('train2017', train or coco()), ('val2017', val or coco(3))):
        write_coco(root / 'annotations' / f'instances_{part}.json', content, root / part)
    return root


def xml_object(name: str, box: tuple[Any, ...] = (5, 6, 15, 26), difficult: int | None = 0, more: str = '') -> str:
    """A box is xmin, ymin, xmax and ymax."""
    named = zip(('xmin', 'ymin', 'xmax', 'ymax'), box, strict=True)
    corners = ''.join(f'<{key}>{value}</{key}>' for key, value in named)
    flag = '' if difficult is None else f'<difficult>{difficult}</difficult>'
    return f'<object><name>{name}</name>{flag}<bndbox>{corners}</bndbox>{more}</object>'


def xml(*objects: str, size: str = f'<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>') -> str:
    return f'<annotation><filename>x.jpg</filename>{size}{"".join(objects)}</annotation>'


def write_voc(folder: Path, images: dict[str, str], lists: dict[str, list[str]], end: str = '.jpg') -> Path:
    """Writes JPEGImages, Annotations (id -> XML) and ImageSets/Main."""
    for name in ('JPEGImages', 'Annotations', *(['ImageSets/Main'] if lists else [])):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, (id_, text) in enumerate(images.items()):
        write_image(folder / 'JPEGImages' / f'{id_}{end}', i)
        (folder / 'Annotations' / f'{id_}.xml').write_text(text)
    for name, ids in lists.items():
        (folder / 'ImageSets' / 'Main' / f'{name}.txt').write_text(''.join(f'{i}\n' for i in ids))
    return folder


def write_voc0712(root: Path, per_part: int = 2) -> Path:
    """Writes VOCdevkit with trainval of both years and test of VOC2007; each image shows a dog, and a difficult cat."""
    text = xml(xml_object('dog'), xml_object('cat', (20, 2, 30, 12), 1))
    for year, parts in (('VOC2007', ('trainval', 'test')), ('VOC2012', ('trainval',))):
        lists = {part: [f'{year[3:]}_{part}_{i}' for i in reversed(range(per_part))] for part in parts}
        write_voc(root / 'VOCdevkit' / year, {i: text for ids in lists.values() for i in ids}, lists)
    return root

"""What commands of README and docs name, small: data sets in their layouts, a user's own files, published weights."""
from pathlib import Path

import layouts_on_disk
import numpy as np
import torch
from conftest import write_digits
from layouts_benchmarks import (
    VOC_NAMES,
    write_cifar,
    write_image,
    write_imagenet,
    write_inat18,
    write_places205,
    write_voc07,
)
from layouts_objects import write_coco2017, write_voc0712
from scenes import draw_scene, write_scenes
from shapes import write_shapes

from simsiam_models import create_simsiam
from simsiam_models.weights import sources, tensorfile
from simsiam_models.weights.identity import make_origin
from simsiam_models.weights.published import WEIGHTS
from simsiam_models.weights.tensorfile import HEADS, MODEL


def write_voc12(root: Path, per_part: int = 4) -> Path:
    """Writes VOCdevkit/VOC2012 with the masks of SBD; returns VOCdevkit."""
    rng, folder = np.random.default_rng(0), root / 'VOCdevkit' / 'VOC2012'
    lists = folder / 'ImageSets' / 'Segmentation'
    for made in (lists, *(folder / name for name in ('JPEGImages', 'SegmentationClass', 'SegmentationClassAug'))):
        made.mkdir(parents=True)
    for part, masks in (('train', 'SegmentationClass'), ('val', 'SegmentationClass'), ('aug', 'SegmentationClassAug')):
        ids = [f'2008_{part}_{i}' for i in range(per_part)]
        for id_ in ids:
            image, mask = draw_scene(rng, 64, 48)
            image.save(folder / 'JPEGImages' / f'{id_}.jpg')
            mask.save(folder / masks / f'{id_}.png')
        (lists / f'{part}.txt').write_text('\n'.join(ids))
    return root / 'VOCdevkit'


def write_cityscapes(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, city in (('train', 'aachen'), ('train', 'bochum'), ('val', 'munster')):
        image, mask = draw_scene(rng, 64, 32)
        for side, picture, end in (('leftImg8bit', image, 'leftImg8bit'), ('gtFine', mask, 'gtFine_labelTrainIds')):
            (root / side / part / city).mkdir(parents=True)
            picture.save(root / side / part / city / f'{city}_000000_000019_{end}.png')
    return root


def write_photos(root: Path) -> Path:
    for i, name in enumerate(('a.jpg', 'b.jpg', 'more/c.jpg')):
        write_image(root / name, i)
    return root


def write_data(root: Path) -> dict[str, Path]:
    """Returns the name in a command, or SUBCOMMAND NAME, -> the folder or file."""
    digits, photos = write_digits(root / 'digits', 64), write_photos(root / 'photos')
    for name, write in (
            ('places205', write_places205), ('inat18', write_inat18), ('cifar', write_cifar),
            ('voc0712', write_voc0712), ('coco', write_coco2017), ('voc12', write_voc12),
            ('cityscapes', write_cityscapes)):
        write(root / name)
    write_imagenet(root / 'imagenet', 8, 4)
    write_voc07(root / 'voc07', 40, 6, VOC_NAMES[:3])
    write_shapes(root / 'shapes', 8, 3, side=64)
    write_scenes(root / 'scenes', 8, 3)
    (root / 'list.txt').write_text(f'{photos}/a.jpg\n{photos}/b.jpg\n')
    return {
        **dict.fromkeys(('FOLDER', 'DATA', 'PHOTOS', 'my_photos'), digits), **dict.fromkeys(('IMAGES', 'new'), photos),
        'photo.jpg': digits / '0' / '0000.jpg', 'list.txt': root / 'list.txt', 'IMAGENET': root / 'imagenet',
        'PLACES205': root / 'places205', 'INAT18': root / 'inat18', 'CIFAR10_FOLDER': root / 'cifar',
        'COCO': root / 'coco', 'CITYSCAPES': root / 'cityscapes', 'MY_OBJECTS': root / 'shapes',
        'MY_MASKS': root / 'scenes', 'svm VOCdevkit': root / 'voc07/VOCdevkit',
        'detect VOCdevkit': root / 'voc0712/VOCdevkit', 'segment VOCdevkit': root / 'voc12/VOCdevkit'}


def write_weights(root: Path, cache: Path) -> dict[str, Path]:
    """Writes an untrained SimSiam model as the files that commands name; returns name -> file.

    It also stands in for three tags, whose files a cache holds as if they had been downloaded and converted.
    """
    root.mkdir()
    cache.mkdir(parents=True)
    torch.manual_seed(0)
    model = create_simsiam('simsiam_resnet50')
    backbone = model.backbone.state_dict()
    heads = {k: v for k, v in model.state_dict().items() if not k.startswith('backbone.')}
    classifier = {'fc.weight': torch.randn(1000, 2048) / 50, 'fc.bias': torch.zeros(1000)}
    for tag, name, tensors in (
            ('mm_ep200_in1k', MODEL, backbone), ('mm_ep200_in1k', HEADS, heads),
            ('fb_bs256_ep100_in1k', MODEL, backbone), ('mm1x_ep200_lin_in1k', MODEL, {**backbone, **classifier})):
        row = WEIGHTS[tag]
        origin = make_origin(row, (row.sha256_prefix or '').ljust(64, '0'), row.layout)
        tensorfile.write(sources._name_converted(row.url, name, cache), tensors, **origin)
    torch.save(layouts_on_disk.fair(model).contents, root / 'checkpoint_0099.pth.tar')
    tensorfile.write(root / MODEL, backbone)
    return {'checkpoint_0099.pth.tar': root / 'checkpoint_0099.pth.tar', 'backbone/model.safetensors': root / MODEL}

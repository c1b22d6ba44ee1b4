"""The numbers of images and classes of each data set, and the messages for data with other numbers.

The sizes of Places205, iNaturalist 2018 and the lists of labelled ImageNet images are common knowledge; no paper or
code on SimSiam states them.
"""
from collections.abc import Mapping
from typing import Any, NamedTuple


class Size(NamedTuple):
    title: str
    train: int  # images; VOC: of trainval
    test: int  # images; ImageNet, Places205, iNaturalist and COCO: of val
    classes: int  # in each part
    source: str  # where to get it


SIZES = {
    'imagenet': Size('ImageNet-1k', 1281167, 50000, 1000, 'ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar of '
                     'https://image-net.org, with a folder per class'),
    'places205': Size('Places205', 2448873, 20500, 205,
                      'the 256 px images and the lists of http://places.csail.mit.edu'),
    'inat18': Size('iNaturalist 2018', 437513, 24426, 8142,
                   'train_val2018.tar.gz and both lists of https://github.com/visipedia/inat_comp'),
    'cifar10': Size('CIFAR-10', 50000, 10000, 10, 'https://www.cs.toronto.edu/~kriz/cifar.html'),
    'cifar100': Size('CIFAR-100', 50000, 10000, 100, 'https://www.cs.toronto.edu/~kriz/cifar.html'),
    'voc07': Size('VOC07', 5011, 4952, 20, 'VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar of '
                  'http://host.robots.ox.ac.uk/pascal/VOC/voc2007'),
    'voc0712': Size('VOC07+12', 16551, 4952, 20, 'VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar of '
                    'http://host.robots.ox.ac.uk/pascal/VOC/voc2007, and VOCtrainval_11-May-2012.tar of '
                    'http://host.robots.ox.ac.uk/pascal/VOC/voc2012'),
    'coco': Size('COCO 2017', 118287, 5000, 80, 'train2017.zip, val2017.zip and annotations_trainval2017.zip of '
                 'https://cocodataset.org'),
    'voc12aug': Size('VOC2012 with SBD', 10582, 1449, 21, 'VOCtrainval_11-May-2012.tar of '
                     'http://host.robots.ox.ac.uk/pascal/VOC/voc2012, and of SBD (http://home.bharathh.info/pubs/codes/'
                     'SBD) the masks as PNG files in SegmentationClassAug and their list in '
                     'ImageSets/Segmentation/aug.txt'),
    'cityscapes': Size('Cityscapes', 2975, 500, 19, 'leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of '
                       'https://www.cityscapes-dataset.com')}
# Lines of imagenet_subsets/{1percent,10percent}.txt of google-research/simclr, which MMSelfSup's lists are made of.
LABELLED = {'1pct': 12811, '10pct': 128116}


def deviation(kind: str, counts: Mapping[str, Any], labelled: int | None = None) -> str | None:
    """Describes how a data set's size differs from that of the complete set; None if it does not, or is unknown.

    `counts`: train, test (images), classes (in the training part) and perhaps test_classes. `labelled`: the number of
    training images if a list of them is the complete training part.
    """
    if kind not in SIZES:
        return None
    size, found = SIZES[kind], []
    for key, expected, what in (
            ('train', labelled or size.train, 'training images'), ('test', size.test, 'test images'),
            ('classes', size.classes, 'classes'), ('test_classes', size.classes, 'test classes')):
        n = counts.get(key)
        if n == expected or key == 'test_classes' and n in (None, counts.get('classes')):
            continue
        number = f'{n:,}' if isinstance(n, int) else 'no number of' if n is None else str(n)[:40]
        found.append(f'{number} {what} found (expected {expected:,})')
    return ', '.join(found) or None


def refusal(kind: str, root: str, found: str) -> str:
    """Returns the error message for a data set that is not the complete one; `found` says how it differs."""
    if kind not in SIZES:
        return f'{root}: {found}; add what is missing, or pass --allow-partial to leave it out'
    size = SIZES[kind]
    return (f'{root} is not the complete {size.title}: {found}; complete it ({size.source}), or pass --allow-partial '
            'to measure the part that is there; its numbers cannot be compared with published ones')

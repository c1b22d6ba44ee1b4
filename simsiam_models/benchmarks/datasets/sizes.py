"""How many images and classes a whole data set has, and what is said where one has others.

The numbers of Places205 and iNaturalist 2018, and those of the two lists of labelled ImageNet images, are commonly
known and come from no paper of SimSiam.
"""
from collections.abc import Mapping
from typing import Any, NamedTuple


class Size(NamedTuple):
    title: str
    train: int  # images; of VOC07 those of trainval
    test: int  # images; of ImageNet, Places205 and iNaturalist those of val
    classes: int  # in either part
    source: str  # where the rest of it is


SIZES = {
    'imagenet': Size(
        'ImageNet-1k', 1281167, 50000, 1000,
        'ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar of https://image-net.org, with a folder per class'),
    'places205': Size(
        'Places205', 2448873, 20500, 205, 'the 256 px images and the lists of http://places.csail.mit.edu'),
    'inat18': Size(
        'iNaturalist 2018', 437513, 24426, 8142,
        'train_val2018.tar.gz and both lists of https://github.com/visipedia/inat_comp'),
    'cifar10': Size('CIFAR-10', 50000, 10000, 10, 'https://www.cs.toronto.edu/~kriz/cifar.html'),
    'cifar100': Size('CIFAR-100', 50000, 10000, 100, 'https://www.cs.toronto.edu/~kriz/cifar.html'),
    'voc07': Size(
        'VOC07', 5011, 4952, 20,
        'VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar of http://host.robots.ox.ac.uk/pascal/VOC/voc2007'),
}
LABELLED = {'1pct': 12811, '10pct': 128116}  # lines of the lists of labelled ImageNet images (protocol 2.5)


def deviation(kind: str, counts: Mapping[str, Any], labelled: int | None = None) -> str | None:
    """What differs from the whole set, in words; None where nothing does, or where nobody knows how large it is.

    `counts` has train, test (images), classes (in the training part) and test_classes; the last may be missing.
    `labelled` is the number of training images where a list of them is the whole.
    """
    if kind not in SIZES:
        return None
    size = SIZES[kind]
    wanted = {'train': labelled or size.train, 'test': size.test, 'classes': size.classes, 'test_classes': size.classes}
    words = {'train': 'training images', 'test': 'test images', 'classes': 'classes', 'test_classes': 'test classes'}
    if counts.get('test_classes') in (None, counts.get('classes')):
        del wanted['test_classes']
    found = [(counts.get(key), n, words[key]) for key, n in wanted.items()]
    return ', '.join(
        f'{_number(is_)} {word} found where {n:,} are expected' for is_, n, word in found if is_ != n) or None


def _number(n: Any) -> str:
    return f'{n:,}' if isinstance(n, int) else 'no number of' if n is None else str(n)[:40]


def refusal(kind: str, root: str, found: str) -> str:
    """The sentence that ends a benchmark on part of a set, or on another one."""
    size = SIZES[kind]
    return (f'{root}: this is not the whole {size.title}: {found}; complete it ({size.source}), or give '
            '--allow-partial to measure what is there, which no published number can be compared with')

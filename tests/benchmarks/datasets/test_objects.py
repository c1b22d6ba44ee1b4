"""Images with annotated objects open in their layouts; what trains is what each framework trains on."""
import json
import logging
import shutil
from pathlib import Path

import layouts_benchmarks
import layouts_objects as layouts
import numpy as np
import pytest
from layouts_objects import annotation, xml, xml_object
from PIL import Image
from pycocotools import mask
from pycocotools.coco import COCO
from real_data import unpack_real

from simsiam_models.benchmarks.datasets import sizes
from simsiam_models.benchmarks.datasets.objects import ObjectImages, open_objects
from simsiam_models.benchmarks.shared_images import find_shared
from simsiam_models.data import UnreadableError
from simsiam_models.data.readers.decode import DataError

# pycocotools 2.0.11 with numpy 2
pytestmark = pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning')


def open_folder(root: Path, variant: str = 'mmdet', **options) -> tuple[ObjectImages, ObjectImages]:
    pair = open_objects('folder', root, variant, **options)
    return pair.train, pair.test


def names(images: ObjectImages) -> list[str]:
    return [Path(images.images.name_of(i)).stem for i in images.indices.tolist()]


# COCO

def test_coco_opens_with_its_own_ids_and_an_incomplete_one_is_refused(tmp_path: Path, monkeypatch):
    layouts.write_coco2017(tmp_path)
    with pytest.raises(
            ValueError, match=r'4 training images found \(expected 118,287\), 3 test images found \(expected 5,000\), '
            r'3 classes found \(expected 80\); .*--allow-partial'):
        open_objects('coco', tmp_path, 'mmdet')
    monkeypatch.setitem(sizes.SIZES, 'coco', sizes.SIZES['coco']._replace(train=4, test=3, classes=3))
    pair = open_objects('coco', tmp_path, 'mmdet')
    assert pair.name == 'coco' and pair.counts == {'train': 4, 'test': 3, 'classes': 3} and not pair.held_out
    assert pair.train.image_ids == [100, 97, 94, 91] and pair.test.image_ids == [100, 97, 94]
    assert pair.train.classes == pair.test.classes == ['dog', 'cat', 'toothbrush']
    assert pair.train.category_ids == pair.test.category_ids == [7, 3, 90]
    assert pair.train.sizes.tolist() == [[32, 40]] * 4 and pair.train.has_masks
    objects = pair.train.objects(1)
    assert objects.boxes.dtype == np.float32 and objects.boxes.tolist() == [[4, 4, 14, 14]]
    assert objects.labels.tolist() == [1] and objects.ignored.tolist() == [False]
    assert objects.segmentations == [[layouts.SQUARE]]
    np.testing.assert_array_equal(
        pair.train.read(2), layouts_benchmarks.pixels(tmp_path / 'train2017' / f'{94:012}.jpg'))


def test_coco_without_a_file_or_an_image_is_refused(tmp_path: Path, caplog):
    layouts.write_coco2017(tmp_path)
    (tmp_path / 'val2017' / f'{97:012}.jpg').unlink()
    with pytest.raises(FileNotFoundError, match=r'not the complete COCO 2017: 2 images found in .*val2017, 3 named for '
                                                r'instances_val2017.json \(missing: 000000000097.jpg\)'):
        open_objects('coco', tmp_path, 'mmdet')
    with caplog.at_level(logging.WARNING):
        test = open_objects('coco', tmp_path, 'mmdet', partial=True).test
    assert 'are left out' in caplog.text and test.image_ids == [100, 94] and test.objects(1).labels.tolist() == [2]
    assert test.read(1).shape == (32, 40, 3) and test.sizes.shape == (2, 2)
    shutil.rmtree(tmp_path / 'val2017')
    with pytest.raises(FileNotFoundError, match='is not COCO: it has no val2017; unpack'):
        open_objects('coco', tmp_path, 'mmdet', partial=True)
    (tmp_path / 'annotations/instances_train2017.json').unlink()
    with pytest.raises(FileNotFoundError, match='has no annotations/instances_train2017.json'):
        open_objects('coco', tmp_path, 'mmdet', partial=True)


def test_objects_keep_the_order_of_the_file_whatever_the_order_of_images(tmp_path: Path):
    content = layouts.coco(3, [annotation(i, (94, 100, 97)[i % 3], (7, 3, 90)[i % 2], (i, 1, 9, 9),
                                          segmentation=[[i, 1, i + 9, 1, i + 9, 10]]) for i in range(12)])
    images, _ = open_folder(layouts.write_coco(tmp_path / 'a.json', content, tmp_path), val_share=0.1)
    whole = images.annotated.objects
    for i, id_ in enumerate((100, 97, 94)):
        expected = [a for a in content['annotations'] if a['image_id'] == id_]
        objects = whole.objects(i)
        assert objects.boxes[:, 0].tolist() == [a['bbox'][0] for a in expected]
        assert objects.segmentations == [a['segmentation'] for a in expected]
        assert objects.labels.tolist() == [{7: 0, 3: 1}[a['category_id']] for a in expected]


RULES = {  # what an annotation has -> trains in mmdet, in detectron2
    'a plain box': ({}, True, True),
    'a crowd': ({'iscrowd': 1}, False, False),
    'an area of 0': ({'area': 0}, False, True),
    'a negative area': ({'area': -3.5}, False, True),
    'a width below 1': ({'box': (4, 4, 0.5, 9), 'area': 4}, False, True),
    'a height below 1': ({'box': (4, 4, 9, 0.99), 'area': 4}, False, True),
    'a side of 1': ({'box': (4, 4, 1, 9)}, True, True),
    'no width': ({'box': (4, 4, 0, 9), 'area': 4}, False, False),
    'a negative height': ({'box': (4, 14, 9, -5), 'area': 4}, False, False),
    'a box beside the image': ({'box': (40, 4, 9, 9)}, False, False),
    'a box above the image': ({'box': (4, -9, 9, 9)}, False, False),
    'a box partly outside': ({'box': (-5, 30, 9, 9)}, True, True),
    'ignore': ({'ignore': 1}, False, False)}


@pytest.mark.parametrize('what', RULES)
def test_an_object_of_coco_trains_by_the_rule_and_what_does_not_is_counted(what: str, tmp_path: Path):
    more, *trains = RULES[what]
    content = layouts.coco(3, [annotation(5, 100), annotation(6, 97, **more), annotation(7, 94)])
    for variant, expected in zip(('mmdet', 'detectron2'), trains, strict=True):
        root = layouts.write_coco2017(tmp_path / variant, content)
        images, test = open_folder(root, variant)
        assert len(images.objects(1).labels) == 1 and len(images.training_objects(1, variant).labels) == expected
        # mmdet counts any annotation of an image; detectron2 not those of crowds.
        without = variant == 'detectron2' and 'iscrowd' in more
        assert images.training_indices(variant).tolist() == ([0, 2] if without else [0, 1, 2])
        assert [*images.broken.values()][:1] == ([] if expected else [1])
        assert any('annotation 6 of 000000000097.jpg' in note for note in images.notes) is not expected
        assert not test.broken


def test_images_without_objects_and_small_ones_do_not_train_but_are_measured(tmp_path: Path):
    content = layouts.coco(3, [annotation(5, 100), annotation(6, 94)])
    content['images'][2] |= {'width': 31, 'file_name': 'small.jpg'}
    layouts.write_coco2017(tmp_path, content, content)
    Image.new('RGB', (31, 32)).save(tmp_path / 'train2017/small.jpg')
    for variant, expected in (('mmdet', [0]), ('detectron2', [0, 2])):
        train, test = open_folder(tmp_path, variant)
        assert train.training_indices(variant).tolist() == expected and len(test) == 3
        assert len(train.objects(1).labels) == 0 and train.objects(1).boxes.shape == (0, 4)
        small = {'images with a shorter side below 32 px': 1} if variant == 'mmdet' else {}
        assert train.broken == {'images without an object': 1, **small}
        assert 'images without an object do not train: 1, the first is 000000000097.jpg' in train.notes
    assert 'classes without an object to train on: 2 of 3, cat, toothbrush' in train.notes


def test_data_without_any_object_to_train_on_or_to_measure_are_refused(tmp_path: Path):
    for annotations, said in (([], 'has an object'), ([annotation(1, 100, iscrowd=1)], 'has an object that is not'),
                              ([annotation(1, 100, area=0)], 'has an object to train on; boxes with an area of 0')):
        with pytest.raises(ValueError, match=f'instances_train2017.json: none of its 4 images {said}'):
            open_folder(layouts.write_coco2017(tmp_path, layouts.coco(4, annotations)))
    with pytest.raises(ValueError, match='instances_val2017.json: none of its 4 images has an object'):
        open_folder(layouts.write_coco2017(tmp_path, val=layouts.coco(4, [])))


def test_segmentations_are_those_of_pycocotools_on_the_same_file(tmp_path: Path):
    root = unpack_real('coco_mini.zip', tmp_path)
    images = open_objects('coco', root, 'mmdet', partial=True).train
    truth = COCO(str(root / 'annotations/instances_train2017.json'))
    assert len(images) == 70 and images.has_masks and images.broken == {'crowds': 6, 'images without an object': 2}
    n = 0
    for i, id_ in enumerate(images.image_ids):
        expected, objects = truth.loadAnns(truth.getAnnIds([id_])), images.objects(i)
        height, width = images.sizes[i].tolist()
        assert images.read(i).shape == (height, width, 3)
        boxes = np.array([a['bbox'] for a in expected], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_array_equal(objects.boxes, boxes.astype(np.float32))
        assert [images.category_ids[k] for k in objects.labels] == [a['category_id'] for a in expected]
        assert objects.ignored.tolist() == [bool(a['iscrowd']) for a in expected]
        assert objects.segmentations == [a['segmentation'] for a in expected]
        for a, outline in zip(expected, objects.segmentations, strict=True):
            encoded = mask.frPyObjects(outline, height, width)
            pixels = mask.decode(mask.merge(encoded) if isinstance(encoded, list) else encoded)
            np.testing.assert_array_equal(pixels, truth.annToMask(a))
            n += 1
    assert n == 586
    kept = images.training_indices('mmdet')
    assert len(kept) == 68 and sum(len(images.training_objects(i, 'mmdet').labels) for i in kept.tolist()) == 580


# VOC

def test_voc0712_trains_on_both_years_and_an_incomplete_one_is_refused(tmp_path: Path, monkeypatch):
    layouts.write_voc0712(tmp_path)
    with pytest.raises(ValueError, match=r'VOC07\+12: 4 training images found \(expected 16,551\), 2 test images found '
                                         r'\(expected 4,952\); complete it'):
        open_objects('voc0712', tmp_path, 'mmdet')
    monkeypatch.setitem(sizes.SIZES, 'voc0712', sizes.SIZES['voc0712']._replace(train=4, test=2))
    for below in ('.', 'VOCdevkit', 'VOCdevkit/VOC2007'):
        pair = open_objects('voc0712', tmp_path / below, 'mmdet')
        assert pair.counts == {'train': 4, 'test': 2, 'classes': 20}
        assert names(pair.train) == [f'{year}_trainval_{i}' for year in (2007, 2012) for i in (1, 0)]
        assert names(pair.test) == ['2007_test_1', '2007_test_0'] and pair.test.image_ids == [1, 2]
        assert pair.train.classes == list(layouts_benchmarks.VOC_NAMES) and pair.train.category_ids == [*range(1, 21)]
        assert not pair.train.has_masks and pair.train.objects(0).segmentations is None


@pytest.mark.parametrize('missing, said', [
    ('VOC2007', r'neither VOC2007 nor VOCdevkit/VOC2007 below it has JPEGImages, Annotations and ImageSets/Main'),
    ('VOC2012', r'neither VOC2012 nor VOCdevkit/VOC2012 below it'),
    ('VOC2007/ImageSets/Main/test.txt', 'test.txt: no such list'),
    ('VOC2012/JPEGImages/2012_trainval_1.jpg', r'1 images found in .*, 2 named for trainval of VOC2012'),
    ('VOC2007/Annotations/2007_test_0.xml', r'1 annotations found in .*Annotations, 2 named for test of VOC2007')])
def test_parts_of_voc0712_that_are_missing_are_named(missing: str, said: str, tmp_path: Path):
    layouts.write_voc0712(tmp_path)
    gone = tmp_path / 'VOCdevkit' / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(FileNotFoundError, match=said):
        open_objects('voc0712', tmp_path, 'mmdet')
    if gone.suffix in ('.jpg', '.xml'):
        counts = open_objects('voc0712', tmp_path, 'mmdet', partial=True).counts
        assert counts['train'] + counts['test'] == 5


@pytest.mark.parametrize('variant, box, expected', [
    ('mmdet', (5, 6, 15, 26), [4, 5, 14, 25]), ('detectron2', (5, 6, 15, 26), [4, 5, 15, 26]),
    ('mmdet', (5.9, '6.5', 15.99, 26), [4, 5, 14, 25]), ('detectron2', (5.75, '6.5', 15.5, 26), [4.75, 5.5, 15.5, 26]),
    ('mmdet', (0.5, 1, 15, 26), [-1, 0, 14, 25])])
def test_corners_of_voc_are_read_as_the_framework_does(variant: str, box: tuple, expected: list, tmp_path: Path):
    layouts.write_voc(tmp_path, {i: xml(xml_object('dog', box)) for i in 'ab'}, {})
    train, _ = open_folder(tmp_path, variant)
    assert train.objects(0).boxes.tolist() == [expected]


def test_difficult_objects_train_in_detectron2_only_but_count_as_objects_of_an_image(tmp_path: Path):
    dog, cat = xml_object('dog'), xml_object('cat', difficult=1)
    texts = {'a': xml(dog, cat), 'b': xml(cat), 'c': xml(), 'd': xml(xml_object('dog', difficult=None))}
    layouts.write_voc(tmp_path, texts, {'train': [*'abc'], 'val': ['d']})
    train, test = open_folder(tmp_path)
    assert train.training_indices('mmdet').tolist() == [0, 1]
    assert [train.training_objects(i, 'mmdet').labels.tolist() for i in range(3)] == [[1], [], []]
    assert train.objects(0).labels.tolist() == [1, 0] and train.objects(0).ignored.tolist() == [False, True]
    assert train.broken == {'difficult objects': 2, 'images without an object': 1}
    assert test.objects(0).ignored.tolist() == [False]
    other, _ = open_folder(tmp_path, 'detectron2')
    assert [other.training_objects(i, 'detectron2').labels.tolist() for i in range(3)] == [[1, 0], [0], []]
    assert other.training_indices('detectron2').tolist() == [0, 1]


def test_parts_of_an_object_are_no_objects(tmp_path: Path):
    head = '<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>'
    layouts.write_voc(tmp_path, {i: xml(xml_object('person', more=head)) for i in 'ab'}, {})
    train, _ = open_folder(tmp_path)
    assert train.classes == ['person'] and train.objects(0).boxes.tolist() == [[4, 5, 14, 25]]


# A user's own

@pytest.mark.parametrize('lists, train, test', [
    ({'train': 'ab', 'val': 'cd', 'trainval': 'abcd', 'test': 'e'}, 'ab', 'cd'),
    ({'trainval': 'abc', 'test': 'e'}, 'abc', 'e'), ({'train': 'ba', 'test': 'e'}, 'ba', 'e'),
    ({'trainval': 'abcd', 'val': 'cd'}, None, None), ({}, None, None)])
def test_lists_of_a_voc_folder_tell_the_parts(lists: dict, train: str | None, test: str | None, tmp_path: Path):
    texts = {i: xml(xml_object('zebra' if i == 'a' else 'ant')) for i in 'abcde'}
    layouts.write_voc(tmp_path, texts, {name: [*ids] for name, ids in lists.items()}, end='.png')
    pair = open_objects('folder', tmp_path, 'mmdet')
    assert pair.train.classes == pair.test.classes == ['ant', 'zebra'] and pair.train.category_ids == [1, 2]
    found = names(pair.train), names(pair.test)
    if train is None:
        n = 4 if lists else 5
        assert len(found[1]) == 1 and sorted(found[0] + found[1]) == [*'abcde'[:n]]
        assert pair.held_out == f'1 of {n} images, 0.2 of all, held out by seed 0'
    else:
        assert found == ([*train], [*test]) and not pair.held_out


def test_lists_of_a_voc_folder_that_overlap_or_repeat_are_refused(tmp_path: Path):
    texts = {i: xml(xml_object('ant')) for i in 'abc'}
    layouts.write_voc(tmp_path, texts, {'train': ['a', 'b'], 'val': ['b', 'c']})
    with pytest.raises(ValueError, match=r'train.txt and val.txt have images in common \(1\), such as b; list'):
        open_folder(tmp_path)
    for ids, said in ((['a', 'a'], 'train.txt names a twice'), ([], 'train.txt names no image')):
        layouts.write_voc(tmp_path, texts, {'train': ids, 'val': ['c']})
        with pytest.raises(ValueError, match=said):
            open_folder(tmp_path)
    layouts.write_voc(tmp_path, texts, {'train': ['a', 'x'], 'val': ['c']})
    with pytest.raises(
            FileNotFoundError, match=r'1 images found in .*, 2 named for train.txt \(missing: x.jpg\); add what'):
        open_folder(tmp_path)
    assert names(open_folder(tmp_path, partial=True)[0]) == ['a']


def test_lists_of_a_voc_folder_under_other_names_are_not_ignored(tmp_path: Path):
    layouts.write_voc(tmp_path, {i: xml(xml_object('ant')) for i in 'abc'}, {'val': ['b']})
    with pytest.raises(ValueError, match=r'Main has val.txt, but neither train.txt nor trainval.txt; add one of them'):
        open_folder(tmp_path)


def test_images_without_an_xml_file_are_left_out_and_counted(tmp_path: Path):
    layouts.write_voc(tmp_path, {i: xml(xml_object('ant')) for i in 'abc'}, {})
    (tmp_path / 'Annotations/b.xml').unlink()
    train, _ = open_folder(tmp_path)
    assert 'images without an XML file, which are left out: 1, the first is b.jpg' in train.notes


@pytest.mark.parametrize('file, images', [
    ('annotations/instances_train2017.json', 'train2017'), ('annotations/train.json', 'train'),
    ('annotations/train.json', 'images'), ('train.json', 'images/train'), ('train.json', '.'),
    ('train/_annotations.coco.json', 'train'), ('my_train.json', 'train/images'), ('labels/train_v2.json', 'data')])
def test_images_of_a_json_file_are_found_in_the_obvious_places(file: str, images: str, tmp_path: Path):
    layouts.write_coco(tmp_path / file, layouts.coco(5), tmp_path / images)
    for given in (tmp_path / file, tmp_path)[:1 if file.startswith('labels') else 2]:
        pair = open_objects('folder', given, 'mmdet')
        assert pair.counts == {'train': 4, 'test': 1, 'classes': 3}
        assert pair.held_out == '1 of 5 images, 0.2 of all, held out by seed 0'
        assert pair.train.read(0).shape == (32, 40, 3)


@pytest.mark.parametrize('train, val', [
    ('annotations/instances_train2017.json', 'annotations/instances_val2017.json'), ('train.json', 'test.json'),
    ('a_train.json', 'a_valid.json'), ('train/_annotations.coco.json', 'valid/_annotations.coco.json')])
def test_the_file_to_test_on_is_found_by_its_name(train: str, val: str, tmp_path: Path):
    for file, n in ((train, 4), (val, 3)):
        images = (tmp_path / file).parent if '_annotations' in file else tmp_path / 'images'
        layouts.write_coco(tmp_path / file, layouts.coco(n), images)
    if train.startswith('annotations'):
        (tmp_path / 'annotations/captions_train2017.json').write_text('{}')
    pair = open_objects('folder', tmp_path, 'mmdet')
    assert pair.counts == {'train': 4, 'test': 3, 'classes': 3} and not pair.held_out


def test_a_folder_that_may_be_several_things_or_none_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match='no such file or folder; DATA must be a JSON file'):
        open_folder(tmp_path / 'none')
    with pytest.raises(ValueError, match="no annotations; DATA must be a JSON file in COCO's form"):
        open_folder(tmp_path)
    layouts.write_coco(tmp_path / 'dogs.json', layouts.coco(), tmp_path)
    layouts.write_coco(tmp_path / 'cats.json', layouts.coco(), tmp_path)
    with pytest.raises(ValueError, match=r'2 JSON files that may be the one to train on \(cats.json, dogs.json\)'):
        open_folder(tmp_path)
    layouts.write_voc(tmp_path, {'a': xml()}, {})
    with pytest.raises(ValueError, match="has annotations in COCO's form, .*cats.json, and in VOC's, .*Annotations"):
        open_folder(tmp_path)
    with pytest.raises(ValueError, match='--dataset lvis: no such data set; choose one of voc0712, coco, folder'):
        open_objects('lvis', tmp_path, 'mmdet')
    with pytest.raises(ValueError, match='--variant mmseg: must be one of mmdet, detectron2'):
        open_objects('folder', tmp_path, 'mmseg')


def test_images_of_a_json_file_that_are_nowhere_or_missing_are_named(tmp_path: Path, caplog):
    layouts.write_coco(tmp_path / 'train.json', layouts.coco(5), tmp_path / 'elsewhere')
    with pytest.raises(FileNotFoundError, match='its images were not found, such as 000000000100.jpg; put them beside'):
        open_folder(tmp_path)
    (tmp_path / 'elsewhere').rename(tmp_path / 'images')
    (tmp_path / 'images' / f'{94:012}.jpg').unlink()
    with pytest.raises(FileNotFoundError, match=r'4 images found in .*images, 5 named for train.json \(missing: '
                                                r'000000000094.jpg\); add what is missing, or pass --allow-partial'):
        open_folder(tmp_path)
    pair = open_objects('folder', tmp_path, 'mmdet', partial=True)
    assert sorted(pair.train.image_ids + pair.test.image_ids) == [88, 91, 97, 100]


def test_the_share_that_is_held_out_depends_on_the_seed_alone(tmp_path: Path):
    layouts.write_coco(tmp_path / 'a.json', layouts.coco(20), tmp_path)
    first, again, other = (open_objects('folder', tmp_path, 'mmdet', val_share=0.25, seed=seed) for seed in (1, 1, 2))
    assert first.test.image_ids == again.test.image_ids != other.test.image_ids and len(first.test) == 5
    assert not {*first.test.image_ids} & {*first.train.image_ids} and len(first.train) == 15
    assert first.data() == again.data() and first.data()['digest'] != other.data()['digest']
    for images in (first.train, first.test):  # objects go with their images
        for i, id_ in enumerate(images.image_ids):
            assert images.objects(i).labels.tolist() == [(100 - id_) // 3 % 3]
            assert Path(images.images.name_of(int(images.indices[i]))).name == f'{id_:012}.jpg'


def test_the_digest_changes_with_objects_and_pixels_only(tmp_path: Path):
    layouts.write_coco2017(tmp_path / 'a')
    before = open_folder(tmp_path / 'a')[0].digest
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    assert open_folder(tmp_path / 'b')[0].digest == before
    file = tmp_path / 'b/annotations/instances_train2017.json'
    for key, value in (('bbox', [4, 4, 10, 11]), ('category_id', 3), ('iscrowd', 1), ('area', 3), ('segmentation', [
            [4.0, 4.0, 14.0, 4.0, 14.0, 14.5]])):
        content = layouts.coco()
        content['annotations'][0][key] = value
        file.write_text(json.dumps(content))
        assert open_folder(tmp_path / 'b')[0].digest != before
    before = open_objects('folder', tmp_path / 'a', 'mmdet').digest
    layouts_benchmarks.write_image(tmp_path / 'a/train2017' / f'{100:012}.jpg', 50)
    assert open_objects('folder', tmp_path / 'a', 'mmdet').digest != before


def test_images_in_both_parts_are_found(tmp_path: Path):
    train, test = open_folder(layouts.write_coco2017(tmp_path))
    assert find_shared(train, test)['shared'] == 3  # both parts are written with the same pictures


# Pixels

def write_turned(file: Path, orientation: int, size: tuple[int, int] = (32, 40)) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new('RGB', size).save(file, exif=exif)


def test_an_image_of_another_size_than_its_annotation_says_is_an_error(tmp_path: Path, caplog):
    train, _ = open_folder(layouts.write_coco2017(tmp_path))
    file = tmp_path / 'train2017' / f'{100:012}.jpg'
    Image.new('RGB', (20, 16)).save(file)
    with pytest.raises(DataError, match=r'100.jpg has 20 x 16 pixels, but its annotation says 40 x 32; give') as e:
        train.read(0)
    assert not isinstance(e.value, UnreadableError) and 'EXIF' not in str(e.value)
    for orientation in (5, 6, 7, 8):
        write_turned(file, orientation)
        with pytest.raises(DataError, match=rf'has 32 x 40 pixels.* EXIF data turn it \(orientation {orientation}\)'):
            train.read(0)
    write_turned(file, 3)  # does not explain it
    with pytest.raises(DataError) as e:
        train.read(0)
    assert 'EXIF' not in str(e.value)
    file.write_bytes(b'no image')
    with pytest.raises(UnreadableError):
        train.read(0)


def test_an_image_that_exif_data_turn_but_whose_size_fits_is_announced_once(tmp_path: Path, caplog):
    train, _ = open_folder(layouts.write_coco2017(tmp_path))
    for i, orientation in ((97, 1), (100, 3), (94, 2)):
        write_turned(tmp_path / 'train2017' / f'{i:012}.jpg', orientation, (40, 32))
    with caplog.at_level(logging.WARNING):
        for i in (1, 0, 2, 0):
            assert train.read(i).shape == (32, 40, 3)
    said = [r.getMessage() for r in caplog.records if 'EXIF' in r.getMessage()]
    assert len(said) == 1 and '000000000100.jpg' in said[0] and 'orientation 3' in said[0]


def test_real_voc_pictures_open_and_have_the_size_of_their_annotation(tmp_path: Path):
    root = unpack_real('voc_mini.zip', tmp_path)
    pair = open_objects('voc0712', root, 'mmdet', partial=True)
    assert pair.counts == {'train': 55, 'test': 28, 'classes': 20}
    for images in (pair.train, pair.test):
        for i in range(len(images)):
            height, width = images.sizes[i].tolist()
            assert images.read(i).shape == (height, width, 3)
            boxes = images.objects(i).boxes
            assert (boxes[:, :2] >= -1).all() and (boxes[:, 2:] <= [width, height]).all() and len(boxes)

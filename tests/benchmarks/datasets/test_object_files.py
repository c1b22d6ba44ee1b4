"""Files of annotations that have no meaning are refused in one sentence that names the file and the object."""
import json
from collections.abc import Callable
from pathlib import Path

import layouts_objects as layouts
import numpy as np
import pytest
from layouts_objects import HEIGHT, SQUARE, WIDTH, annotation, xml, xml_object
from pycocotools import mask

from simsiam_models.benchmarks.datasets.coco import decode_counts, parse_coco
from simsiam_models.benchmarks.datasets.objects import open_objects
from simsiam_models.data.readers.decode import DataError


def edit(kind: str, at: int, **values) -> Callable[[dict], None]:
    """Returns a function that sets values of a row; `...` removes one."""
    def change(content: dict) -> None:
        row = content[kind][at]
        row.update(values)
        for key in [key for key, value in row.items() if value is ...]:
            del row[key]
    return change


def drop(*keys: str) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        for key in keys:
            del content[key]
    return change


def rle(counts: object, size: object = (HEIGHT, WIDTH)) -> dict:
    return {'counts': counts, 'size': list(size) if isinstance(size, tuple) else size}


ONES = HEIGHT * WIDTH
MALFORMED = {  # change of a file whose second annotation has the id 10 -> what is said
    'no images': (drop('images'), 'categories, annotations, but these are missing or not lists: images'),
    'no annotations or categories': (drop('annotations', 'categories'), 'not lists: annotations, categories'),
    'annotations as an object': (lambda c: c.update(annotations={}), 'missing or not lists: annotations'),
    'no image': (lambda c: c.update(images=[], annotations=[]), 'it has no image'),
    'no category': (lambda c: c.update(categories=[]), 'it has no category'),
    'an image that is a name': (lambda c: c['images'].append('a.jpg'), 'image 5 of the list is a.jpg, not an object'),
    'an annotation that is null': (lambda c: c['annotations'].append(None), 'annotation 5 of the list is null'),
    'an image twice': (lambda c: c['images'].append(c['images'][1]), 'image 97 occurs 2 times; number each image once'),
    'an annotation twice': (edit('annotations', 2, id=10), 'annotation 10 occurs 2 times'),
    'a category twice': (edit('categories', 1, id=7), 'category 7 occurs 2 times'),
    'an id of text': (edit('images', 1, id='97'), 'image 2 of the list: id is "97", not a whole number'),
    'no id': (edit('annotations', 1, id=...), 'annotation 2 of the list has no id, only image_id, category_id, bbox'),
    'an id that is true': (edit('categories', 0, id=True), 'category 1 of the list: id is true, not a whole number'),
    'no file name': (edit('images', 1, file_name=...), 'image 97 has no file_name'),
    'no width': (edit('images', 1, width=...), 'image 97 has no width'),
    'a width of text': (edit('images', 1, width='40'), 'image 97: width is "40", not the number of its pixels'),
    'a height of 0': (edit('images', 1, height=0), 'image 97 is 40 x 0 pixels; correct its width and height'),
    'half a pixel': (edit('images', 1, width=40.5), 'image 97 is 40.5 x 32 pixels'),
    'an unknown category': (edit('annotations', 1, category_id=8), 'annotation 10 has the category 8, which the file'),
    'no bbox': (edit('annotations', 1, bbox=..., caption='A dog'), 'annotation 10 has no bbox, only id, image_id'),
    'three numbers': (edit('annotations', 1, bbox=[1, 2, 3]), r'annotation 10: bbox is \[1, 2, 3\], not four numbers'),
    'a name twice': (edit('categories', 0, name='cat'),
                     'categories 7 and 3 are both called cat; give each a name of its own'),
    'no numbers': (edit('annotations', 1, bbox=[1, 2, '3', 4]), r'annotation 10: bbox is \[1, 2, "3", 4\], not four'),
    'nested numbers': (edit('annotations', 1, bbox=[[1, 2], [3, 4]]), r'annotation 10: bbox is .*, not four numbers'),
    'a box that is null': (edit('annotations', 1, bbox=None), 'annotation 10: bbox is null, not a list of x, y'),
    'a box of NaN': (edit('annotations', 1, bbox=[1, 2, float('nan'), 4]), 'annotation 10: bbox .* is not finite'),
    'an infinite box': (edit('annotations', 1, bbox=[1, 2, 1e999, 4]), 'annotation 10: bbox .* is not finite'),
    'a huge number': (edit('annotations', 1, bbox=[1, 2, 10**400, 4]), 'annotation 10: bbox .*, not four numbers'),
    'a huge id': (edit('annotations', 1, id=10**30), 'annotation 2 of the list: id is 1000.*, outside ±922'),
    'a huge area': (edit('annotations', 1, area=10**400), 'annotation 2 of the list: area is 1000.*, outside ±922'),
    'an area of text': (edit('annotations', 1, area='5'), 'annotation 10: area is "5", not a number'),
    'iscrowd of text': (edit('annotations', 1, iscrowd='no'), 'annotation 10: iscrowd is "no", not 0 or 1'),
    'a segmentation of text': (edit('annotations', 1, segmentation='x'), 'annotation 10: segmentation is "x", not'),
    'an odd polygon': (edit('annotations', 1, segmentation=[SQUARE, SQUARE[:7]]),
                       'annotation 10: segmentation has a polygon of 7 coordinates, an odd number; correct or remove'),
    'two points': (edit('annotations', 1, segmentation=[SQUARE[:4]]),
                   'annotation 10: segmentation has no polygon of three points or more'),
    'a flat polygon': (edit('annotations', 1, segmentation=SQUARE), 'annotation 10: segmentation has 4.0 where'),
    'a polygon of text': (edit('annotations', 1, segmentation=[['1'] * 6]),
                          'annotation 10: segmentation has a coordinate that is not a number'),
    'a polygon of NaN': (edit('annotations', 1, segmentation=[SQUARE[:7] + [float('nan')]]),
                         'annotation 10: segmentation has the coordinate nan, which lies nowhere near'),
    'a polygon far away': (edit('annotations', 1, segmentation=[SQUARE, SQUARE[:7] + [-1e7]]),
                           'annotation 10: segmentation has the coordinate -1e'),
    'an encoding of another size': (edit('annotations', 1, segmentation=rle([ONES], (WIDTH, HEIGHT))),
                                    r'annotation 10: segmentation is encoded at the size \[40, 32\], not that of the'),
    'an encoding without a size': (edit('annotations', 1, segmentation={'counts': [ONES]}), 'at the size null, not'),
    'too few counts': (edit('annotations', 1, segmentation=rle([ONES - 1])), 'do not sum up to the 1,280 pixels'),
    'no counts': (edit('annotations', 1, segmentation=rle([])), 'do not sum up to the 1,280 pixels'),
    'a negative count': (edit('annotations', 1, segmentation=rle([ONES + 1, -1])), 'do not sum up to the 1,280'),
    'counts of text': (edit('annotations', 1, segmentation=rle(['1'])), 'which are neither text nor whole numbers'),
    'counts that are no code': (edit('annotations', 1, segmentation=rle('\u00e9~')), 'do not sum up to the 1,280'),
    'counts cut off': (edit('annotations', 1, segmentation=rle('P')), 'do not sum up to the 1,280 pixels')}


@pytest.mark.parametrize('what', MALFORMED)
def test_a_malformed_file_is_refused_with_what_is_wrong(what: str, tmp_path: Path):
    change, said = MALFORMED[what]
    content = layouts.coco()
    change(content)
    file = tmp_path / 'a.json'
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said) as e:
        parse_coco(file)
    assert str(e.value).startswith(f'{file}') and '\n' not in str(e.value) and len(str(e.value)) < 500


@pytest.mark.parametrize('text, said', [
    ('', 'cannot be read as JSON'), ('{"images": [', 'cannot be read as JSON'), ('\ufffe', 'cannot be read as JSON'),
    ('[' * 100000, 'cannot be read as JSON'), ('\x89PNG\r\n', 'cannot be read as JSON'),
    ('[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}]', 'but a list, like a results file'),
    ('null', 'is not an annotation file, but null; give'), ('5', 'but 5; give'), ('"x"', 'but x; give'),
    ('{}', 'has nothing, but these are missing or not lists: images'),
    ('{"shapes": [], "imagePath": "a.jpg", "imageData": null}', 'has shapes, imagePath, imageData, but')])
def test_json_of_another_kind_is_refused(text: str, said: str, tmp_path: Path):
    file = tmp_path / 'a.json'
    file.write_bytes(text.encode('latin-1', 'replace'))
    with pytest.raises(ValueError, match=said) as e:
        open_objects('folder', file, 'mmdet')
    assert str(e.value).startswith(f'{file}') and 'instances_train2017.json' in str(e.value)


def test_what_can_be_read_another_way_is_read_and_counted(tmp_path: Path):
    square = SQUARE[:4]
    content = layouts.coco(4, [
        annotation(1, 100), annotation(2, 97, area=..., segmentation=[square, SQUARE]), annotation(3, 55),
        annotation(4, 94, segmentation=[])])
    del content['annotations'][1]['area'], content['annotations'][0]['iscrowd']
    content['images'][0] |= {'width': 40.0, 'file_name': 'below\\a.jpg'}
    for category in content['categories']:
        del category['name']
    file = tmp_path / 'a.json'
    file.write_text(json.dumps(content))
    found = parse_coco(file)
    assert found.classes == ['7', '3', '90'] and found.paths[0] == 'below/a.jpg' and found.sizes[0].tolist() == [32, 40]
    assert found.objects.areas.tolist() == [100, 100, 100] and not found.objects.has_masks
    assert found.objects.ids.tolist() == [1, 2, 4] and not found.objects.ignored.any()
    assert found.notes == [
        'annotations of images that the file does not list, which are left out: 1 of 4, the first is annotation 3 of '
        'image 55',
        'annotations without an area, for which that of the box is used: 1, the first is annotation 2',
        'polygons of fewer than three points, which are left out: 1, the first is of annotation 2',
        'annotations without a segmentation, so that no masks are used: 1 of 3, the first is annotation 4']


def test_annotations_of_other_images_only_are_refused(tmp_path: Path):
    file = tmp_path / 'a.json'
    file.write_text(json.dumps(layouts.coco(4, [annotation(1, 1), annotation(2, 2)])))
    with pytest.raises(ValueError, match='all annotations are of images that it does not list: 2 of 2, the first is '
                                         'annotation 1 of image 1; give the file that belongs'):
        parse_coco(file)


@pytest.mark.parametrize('category, said', [
    ({'id': 8, 'name': 'fox'}, 'category 8 is fox, but in .*instances_train2017.json no category has this id'),
    ({'id': 3, 'name': 'fox'}, 'category 3 is fox, but in .*instances_train2017.json cat has this id')])
def test_both_parts_have_the_same_categories(category: dict, said: str, tmp_path: Path):
    content = layouts.coco(2, [annotation(1, 100)])
    content['categories'] = [*reversed(layouts.CATEGORIES[:1]), category]
    with pytest.raises(ValueError, match=f'instances_val2017.json: {said}; both parts need the same'):
        open_objects('folder', layouts.write_coco2017(tmp_path, val=content), 'mmdet')
    content['categories'] = layouts.CATEGORIES[2::-2]  # some of them, in another order
    pair = open_objects('folder', layouts.write_coco2017(tmp_path, val=content), 'mmdet')
    assert pair.test.classes == pair.train.classes and pair.test.objects(0).labels.tolist() == [0]


def test_counts_are_decoded_as_pycocotools_encodes_them():
    rng = np.random.default_rng(0)
    for share in (0, 0.02, 0.5, 1):
        for height, width in ((1, 1), (7, 5), (300, 400)):
            pixels = np.asfortranarray((rng.random((height, width)) < share).astype(np.uint8))
            if share == 0.02:  # long runs
                pixels[:] = np.repeat(pixels[:, :1], width, 1)
            text = mask.encode(pixels)['counts'].decode()
            flat = pixels.ravel(order='F')
            ends = np.flatnonzero(np.diff(flat)) + 1
            runs = np.diff([0, *ends, flat.size]).tolist()
            assert decode_counts(text) == ([0, *runs] if flat[0] else runs)


def test_an_encoding_opens_as_text_and_as_numbers(tmp_path: Path):
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8, order='F')
    pixels[5:9, 3:20] = 1
    text = rle(mask.encode(pixels)['counts'].decode())
    numbers = rle(decode_counts(text['counts']))
    content = layouts.coco(2, [annotation(1, 100, segmentation=text), annotation(2, 97, segmentation=numbers)])
    train = open_objects('folder', layouts.write_coco2017(tmp_path, content), 'mmdet').train
    assert train.has_masks
    assert train.objects(0).segmentations == [text] and train.objects(1).segmentations == [numbers]


# VOC

DOG = xml_object('dog')
XML = {  # content of b.xml -> what is said
    'cut off': (xml(DOG)[:-9], 'b.xml cannot be read as XML'), 'empty': ('', 'b.xml cannot be read as XML'),
    'of another kind': ('<svg></svg>', "b.xml is not in VOC's form: its root is svg, not annotation"),
    'an unknown encoding': ('<?xml version="1.0" encoding="x-none"?>' + xml(DOG), 'b.xml cannot be read as XML'),
    'a size of text': (xml(DOG, size='<size><width>x</width><height>32</height></size>'), 'its size is x x 32, not'),
    'a negative size': (xml(DOG, size='<size><width>-4</width><height>32</height></size>'), 'its size is -4 x 32'),
    'no name': (xml(DOG, xml_object('')), 'object 2 has no name; correct or remove it'),
    'no box': (xml('<object><name>dog</name></object>'), r'object 1 \(dog\) has no xmin in its bndbox'),
    'half a box': (xml(DOG.replace('<ymax>26</ymax>', '')), r'object 1 \(dog\) has no ymax in its bndbox'),
    'no number': (xml(xml_object('dog', (5, 'six', 15, 26))), r'object 1 \(dog\): ymin is "six", not a number'),
    'NaN': (xml(xml_object('dog', (5, 6, 'nan', 26))), r'object 1 \(dog\): xmax is "nan", not a number'),
    'infinity': (xml(xml_object('dog', (5, 6, 'inf', 26))), r'object 1 \(dog\): xmax is "inf", not a number'),
    'difficult in words': (xml(xml_object('dog', difficult='yes')), r'object 1 \(dog\): difficult is yes, not'),
    'no width': (xml(DOG, xml_object('dog', (5, 6, 4, 26))), r'object 2 \(dog\) has a box without area: 5, 6, 4'),
    'an inverted box': (xml(xml_object('dog', (5, 26, 15, 6))), r'object 1 \(dog\) has a box without area: 5, 26'),
    'outside': (xml(xml_object('dog', (42, 6, 60, 26))), r'object 1 \(dog\) has a box outside the image: 42, 6, 60'),
    'above': (xml(xml_object('dog', (4, -9, 9, 0))), r'object 1 \(dog\) has a box outside the image')}


@pytest.mark.parametrize('variant', ['mmdet', 'detectron2'])
@pytest.mark.parametrize('what', XML)
def test_a_malformed_xml_file_is_refused_with_what_is_wrong(what: str, variant: str, tmp_path: Path):
    text, said = XML[what]
    layouts.write_voc(tmp_path, {'a': xml(DOG), 'b': text, 'c': xml(DOG)}, {})
    with pytest.raises(ValueError, match=said) as e:
        open_objects('folder', tmp_path, variant)
    assert str(e.value).startswith(str(tmp_path / 'Annotations' / 'b.xml')) and '\n' not in str(e.value)


def test_a_box_of_one_pixel_has_no_width_in_mmdet(tmp_path: Path):
    layouts.write_voc(tmp_path, {i: xml(xml_object('dog', (5, 6, 5, 26))) for i in 'ab'}, {})
    with pytest.raises(ValueError, match=r'a.xml: object 1 \(dog\) has a box without area: 5, 6, 5, 26 \(xmin, ymin'):
        open_objects('folder', tmp_path, 'mmdet')
    train = open_objects('folder', tmp_path, 'detectron2').train
    assert train.objects(0).boxes.tolist() == [[4, 5, 5, 26]]


def test_an_unknown_class_is_refused_in_voc0712(tmp_path: Path):
    layouts.write_voc0712(tmp_path)
    file = tmp_path / 'VOCdevkit/VOC2007/Annotations/2007_test_0.xml'
    file.write_text(xml(DOG, xml_object('lion')))
    with pytest.raises(ValueError, match=r'2007_test_0.xml: object 2 \(lion\) is of no class of this data set; its 20'):
        open_objects('voc0712', tmp_path, 'mmdet', partial=True)


@pytest.mark.parametrize('size', ['', '<size></size>', '<size><width>0</width><height>0</height></size>'])
def test_a_size_that_an_xml_file_does_not_state_is_that_of_the_image(size: str, tmp_path: Path):
    layouts.write_voc(tmp_path, {'a': xml(DOG), 'b': xml(DOG, size=size)}, {'train': ['a', 'b'], 'val': ['a']})
    (tmp_path / 'ImageSets/Main/val.txt').write_text('a\n')
    (tmp_path / 'ImageSets/Main/train.txt').write_text('b\n')
    train = open_objects('folder', tmp_path, 'mmdet').train
    assert train.sizes.tolist() == [[HEIGHT, WIDTH]] and train.read(0).shape == (HEIGHT, WIDTH, 3)
    assert train.notes == ["XML files without a size, for which the image's is used: 1, the first is Annotations/b.xml"]
    (tmp_path / 'JPEGImages/b.jpg').write_bytes(b'broken')
    with pytest.raises((ValueError, DataError), match='b.jpg: its XML file states no size, and the image has none'):
        open_objects('folder', tmp_path, 'mmdet')

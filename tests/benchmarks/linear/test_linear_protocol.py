"""Linear protocols: which numbers a flag may change, and what a record says about it."""
import dataclasses
import json

import pytest

from simsiam_models.benchmarks.datasets.sizes import SIZES
from simsiam_models.benchmarks.linear.protocol import OVERRIDES, benchmark_name, choose_protocol
from simsiam_models.benchmarks.protocols import LinearProtocol
from simsiam_models.benchmarks.results.compare import why_not_comparable


@pytest.mark.parametrize(('protocol', 'dataset'), [
    ('fair', 'imagenet'), ('mmselfsup', 'imagenet'), ('mhead', 'imagenet'), ('mhead', 'places205'),
    ('mhead', 'inat18')])
def test_a_record_is_comparable_as_long_as_no_number_is_changed(protocol, dataset):
    size = SIZES[dataset]
    data = {'name': dataset, 'counts': {
        'train': size.train, 'test': size.test, 'classes': size.classes, 'test_classes': size.classes}}

    def reason(**changes):
        chosen = choose_protocol(protocol, dataset, changes)
        numbers = json.loads(json.dumps(chosen.record()))
        return why_not_comparable({'benchmark': benchmark_name(chosen, dataset), 'protocol': numbers, 'data': data})
    assert reason() is None
    for key, value in dict(epochs=2, batch_size=64, lr=0.3, resize=300, init_std=0.1, flip_p=0.1, momentum=0.8).items():
        assert reason(**{key: value}), key


def test_every_number_of_a_protocol_has_a_flag():
    numbers = {f.name for f in dataclasses.fields(LinearProtocol)}
    fixed = {'name', 'inputs', 'optimizer', 'lr_per_256', 'schedule', 'augmentation', 'reported', 'nesterov'}
    assert numbers - fixed == set(OVERRIDES)


def test_the_batch_scales_the_rate_if_the_protocol_says_so():
    assert choose_protocol('fair', 'imagenet', {'batch_size': 1024}).protocol.scaled_lr == pytest.approx(0.4)
    assert choose_protocol('mmselfsup', 'imagenet', {'batch_size': 1024}).protocol.scaled_lr == 1.6


@pytest.mark.parametrize(('protocol', 'overrides', 'words'), [
    ('fair', {'jitter': 0.1}, '--jitter: not used by protocol fair'),
    ('fair', {'lr_steps': [3]}, '--lr-steps: not used by protocol fair'),
    ('moco', {'trust': 0.1}, '--trust: not used by protocol moco'),
    ('fair', {'epochs': 0}, '--epochs 0: must be above 0'),
    ('fair', {'resize': 100}, '--resize 100: must be at least the image size, 224'),
    ('fair', {'image_size': 5}, '--image-size 5: must be at least 8 pixels'),
    ('fair', {'crop_scale': [0.5, 0.1]}, '--crop-scale 0.5 0.1'),
    ('mhead', {'epochs': 3, 'report_epochs': [2, 4]}, '--report-epochs 2 4: must be epochs from 1 to 3'),
    ('mhead', {'report_epochs': [0]}, '--report-epochs 0: must be epochs from 1 to 90'),
    ('mhead', {'momentum': 0.0}, '--momentum 0'),
    ('best', {}, '--protocol best is not known')])
def test_numbers_that_are_not_possible_are_refused(protocol, overrides, words):
    with pytest.raises(ValueError, match='^' + words.replace('.', r'\.')):
        choose_protocol(protocol, 'imagenet', overrides)


def test_cifar_keeps_its_pixels_and_reports_this_as_a_change():
    chosen = choose_protocol('fair', 'cifar10', {})
    assert chosen.protocol.image_size == 32 and chosen.changed == {'image_size': (224, 32), 'resize': (256, 32)}
    assert 'image_size 224 -> 32' in chosen.describe() and 'changed' in chosen.label


@pytest.mark.parametrize(('overrides', 'own', 'sizes'), [
    ({}, 224, (224, 256)), ({'image_size': 32}, 224, (32, 37)), ({}, 32, (32, 37)), ({'resize': 32}, 32, (32, 32)),
    ({'image_size': 448, 'resize': None}, 32, (448, 512))])
def test_the_short_side_follows_the_image_size(overrides, own, sizes):
    chosen = choose_protocol('fair', 'folder', overrides, own_size=own)
    assert (chosen.protocol.image_size, chosen.protocol.resize) == sizes
    assert bool(chosen.changed) == (sizes != (224, 256))

"""The numbers of the published protocols, copied from their sources a second time."""
import dataclasses

import pytest

from simsiam_models.benchmarks import protocols

# main_lincls.py and README of facebookresearch/simsiam (a7bc177) and of facebookresearch/moco (7397dfe); of MMSelfSup
# v0.9.1, the files in configs/benchmarks/classification, with their _base_ files.
COMMON = {
    'momentum': 0.9, 'init_std': 0.01, 'flip_p': 0.5, 'image_size': 224, 'resize': 256, 'report_epochs': ()}
AVGPOOL_90 = {
    **COMMON, 'inputs': 'avgpool', 'batch_size': 4096, 'scaled_lr': 1.6, 'epochs': 90, 'schedule': 'cosine',
    'augmentation': 'resized_crop', 'crop_scale': (0.08, 1.0), 'nesterov': False, 'weight_decay': 0, 'trust': 0.001}
MHEAD = {
    **COMMON, 'inputs': 'five', 'optimizer': 'sgd', 'batch_size': 256, 'lr': 0.01, 'lr_per_256': False,
    'scaled_lr': 0.01, 'schedule': 'steps', 'lr_gamma': 0.1, 'nesterov': True, 'weight_decay': 1e-4, 'eval_every': 10,
    'reported': 'last'}
LINEAR = {
    'fair': {
        **AVGPOOL_90, 'optimizer': 'larc', 'lr': 0.1, 'lr_per_256': True, 'eval_every': 1, 'reported': 'best'},
    'mmselfsup': {
        **AVGPOOL_90, 'optimizer': 'lars_mmselfsup', 'lr': 1.6, 'lr_per_256': False, 'eval_every': 10,
        'reported': 'last'},
    'moco': {
        **COMMON, 'inputs': 'avgpool', 'optimizer': 'sgd', 'batch_size': 256, 'lr': 30, 'lr_per_256': False,
        'scaled_lr': 30, 'epochs': 100, 'schedule': 'steps', 'lr_steps': (60, 80), 'lr_gamma': 0.1,
        'augmentation': 'resized_crop', 'crop_scale': (0.08, 1.0), 'nesterov': False, 'weight_decay': 0,
        'eval_every': 1, 'reported': 'best'},
    'mhead': {
        **MHEAD, 'epochs': 90, 'lr_steps': (30, 60), 'augmentation': 'resized_crop_colour',
        'crop_scale': (0.08, 1.0), 'jitter': 0.4, 'lighting': 0.1},
    'mhead_places205': {
        **MHEAD, 'epochs': 28, 'lr_steps': (7, 14, 21), 'augmentation': 'random_crop', 'report_epochs': (20,)},
    'mhead_inat18': {
        **MHEAD, 'epochs': 84, 'lr_steps': (24, 48, 72), 'augmentation': 'resized_crop', 'crop_scale': (0.08, 1.0)}}


def test_the_linear_protocols_are_those_of_simsiam_moco_and_mmselfsup():
    assert list(LINEAR) == list(protocols.LINEAR)


@pytest.mark.parametrize('name', LINEAR)
def test_a_linear_protocol_has_the_numbers_of_its_source(name: str):
    protocol, expected = protocols.LINEAR[name], LINEAR[name]
    assert protocol.name == name
    for key, value in expected.items():
        assert getattr(protocol, key) == value, key
    fields = {field.name for field in dataclasses.fields(protocol)}
    assert fields - set(expected) - {'name'} == protocol.idle  # every number that plays a part is checked


def test_knn_has_the_neighbours_and_temperature_of_mmselfsup():
    assert (protocols.KNN_KS, protocols.KNN_T) == ((10, 20, 100, 200), 0.07)


def test_images_are_resized_to_256_and_cropped_to_224():
    assert (protocols.RESIZE, protocols.SIZE) == (256, 224)


def test_the_svm_has_the_costs_folds_and_arguments_of_mmselfsup():
    assert protocols.SVM_COSTS == (
        1, 10, 100, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625, 0.001953125, 0.0009765625, 0.00048828125,
        0.000244140625, 0.0001220703125, 6.103515625e-05, 3.0517578125e-05, 1.52587890625e-05, 7.62939453125e-06,
        3.814697265625e-06, 1.9073486328125e-06)
    assert protocols.SVM_FOLDS == 3
    assert protocols.LINEAR_SVC == {
        'class_weight': {1: 2, -1: 1}, 'intercept_scaling': 1.0, 'penalty': 'l2', 'loss': 'squared_hinge',
        'tol': 0.0001, 'dual': True, 'max_iter': 2000}
    assert protocols.SVM_TAPS == ('feat1', 'feat2', 'feat3', 'feat4', 'feat5')


def test_the_low_shot_svm_has_the_samples_of_mmselfsup():
    assert protocols.LOW_SHOT_KS == (1, 2, 4, 8, 16, 32, 64, 96)
    assert (protocols.LOW_SHOT_DRAWS, protocols.LOW_SHOT_NEGATIVES) == (5, 19)


def test_semi_supervised_fine_tuning_has_the_numbers_of_mmselfsup():
    assert protocols.SEMI == {'epochs': 20, 'batch_size': 256}
    assert protocols.SEMI_FIXED == {
        'optimizer': 'sgd', 'momentum': 0.9, 'steps': (12, 16), 'crop_scale': (0.08, 1.0), 'flip': 0.5,
        'eval_every': 10}
    assert protocols.SEMI_LR_GAMMA == 0.2
    assert protocols.SEMI_WEIGHT_DECAY == {'semi_1pct': 0.0005, 'semi_10pct': 0.0001}
    assert set(protocols.SEMI_LRS) == {0.1, 0.01, 0.001} and set(protocols.SEMI_HEAD_MULTIPLIERS) == {1, 10, 100}


# configs/benchmarks/mmsegmentation/{voc12aug,cityscapes} of MMSelfSup v0.9.1, with their _base_ files and the defaults
# of mmsegmentation 0.24.1.
FCN = {
    'channels': 512, 'aux_channels': 256, 'dropout': 0.1, 'aux_weight': 0.4, 'loss_mean': 'all', 'ratios': (0.5, 2.0),
    'cat_max_ratio': 0.75, 'redraws': 10, 'flip_p': 0.5, 'brightness': 32, 'contrast': (0.5, 1.5),
    'saturation': (0.5, 1.5), 'hue': 18, 'lr': 0.01, 'floor': 0.0001, 'power': 0.9, 'momentum': 0.9,
    'weight_decay': 0.0005}
SEGMENTATION = {
    'voc12aug_20k': {
        **FCN, 'benchmark': 'voc12aug_fcn_r50_d8_512_20k', 'dataset': 'voc12aug', 'align_corners': False,
        'box': (2048, 512), 'crop': 512, 'test': 'whole', 'batch_size': 16, 'iterations': 20000, 'eval_every': 2000},
    'cityscapes_40k': {
        **FCN, 'benchmark': 'cityscapes_fcn_r50_d8_769_40k', 'dataset': 'cityscapes', 'align_corners': True,
        'box': (2049, 1025), 'crop': 769, 'test': 'slide', 'stride': 513, 'batch_size': 8, 'iterations': 40000,
        'eval_every': 4000}}


@pytest.mark.parametrize('name', SEGMENTATION)
def test_a_segmentation_protocol_has_the_numbers_of_its_source(name: str):
    assert list(SEGMENTATION) == list(protocols.SEGMENTATION)
    protocol, expected = dataclasses.asdict(protocols.SEGMENTATION[name]), SEGMENTATION[name]
    assert {k: protocol[k] for k in expected} == expected
    assert protocol.keys() - expected.keys() <= {'stride'}  # of windows, which voc12aug_20k does not use

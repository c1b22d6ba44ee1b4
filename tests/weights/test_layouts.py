"""Every published layout restores the model that was written, bit for bit, or raises an error that says why not."""
import argparse
import functools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import layouts_on_disk as disk
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from simsiam_models import Checkpoint, SimSiam, load_checkpoint
from simsiam_models.resnet import checkpoint_filter_fn
from simsiam_models.weights.layouts import recognize

pytestmark = pytest.mark.usefixtures('one_thread')
PARTS = ('backbone', 'projector', 'predictor', 'classifier')


@pytest.fixture(scope='module')
def model() -> SimSiam:
    return disk.tiny_simsiam()


def assert_parts(checkpoint: Checkpoint, expected: dict[str, dict[str, Tensor]]) -> None:
    """Compares names, types and bits; a missing part is None."""
    for name in PARTS:
        got, want = getattr(checkpoint, name), expected.get(name)
        if want is None:
            assert got is None, name
            continue
        assert got is not None and got.keys() == want.keys(), name
        for k in want:
            assert got[k].dtype == want[k].dtype and torch.equal(got[k], want[k]), f'{name}.{k}'


@pytest.mark.parametrize('name', disk.LAYOUTS)
@pytest.mark.parametrize('container', ['zip', 'legacy'])
def test_every_layout_gives_the_parts_that_were_written(
        model: SimSiam, tmp_path: Path, name: str, container: str) -> None:
    on_disk = disk.LAYOUTS[name](model)
    if name == 'detectron2':
        container = 'pickle'
    checkpoint = load_checkpoint(disk.write(on_disk.contents, tmp_path / 'file', container))
    assert checkpoint.layout == on_disk.layout
    assert_parts(checkpoint, on_disk.parts)
    assert checkpoint.info['dropped'].items() >= on_disk.dropped.items()
    assert on_disk.layout in checkpoint.describe()
    fresh = disk.tiny_simsiam(seed=1)
    for part in set(PARTS[:3]) & set(on_disk.parts):
        getattr(fresh, part).load_state_dict(getattr(checkpoint, part), strict=True)


@pytest.mark.parametrize('name', [n for n in disk.LAYOUTS if n != 'detectron2'])
def test_objects_of_foreign_code_beside_the_tensors_change_nothing(
        model: SimSiam, tmp_path: Path, name: str) -> None:
    on_disk = disk.LAYOUTS[name](model)
    with disk.foreign() as code:
        beside = {
            'config': code.ConfigDict(lr=0.05, nested=code.ConfigDict(a=[1, np.float32(2)])), 'slots': code.Slots(),
            'hub': {'log_scalars': OrderedDict(loss=code.HistoryBuffer())}, 'loop': code.Loop([1, 2]),
            'schedule': functools.partial(code.schedule, 3), 'args': argparse.Namespace(lr=0.05, arch='resnet50'),
            'scalars': [np.float64(68.1), np.int64(3), np.bool_(True)], 'array': np.arange(6).reshape(2, 3),
            'types': (code.ConfigDict, torch.float16, Path('a'), {1, 2}, frozenset({3}), slice(3), complex(1, 2)),
            'seed': np.random.RandomState(0), 'strings': np.array(['a', None], dtype=object)}
        if 'state_dict' in on_disk.contents or 'model' in on_disk.contents:
            contents = {**on_disk.contents, 'meta': beside}
        elif 'classy_state_dict' in on_disk.contents:
            contents = {**on_disk.contents, 'config': beside}
        else:
            contents = {'state_dict': on_disk.contents, 'meta': beside}
        for container in ('zip', 'legacy'):
            disk.write(contents, tmp_path / container, container)
    for container in ('zip', 'legacy'):
        checkpoint = load_checkpoint(tmp_path / container)
        assert checkpoint.layout == on_disk.layout
        assert_parts(checkpoint, on_disk.parts)


def test_a_module_s_own_state_dict_reads_beside_foreign_objects(model: SimSiam, tmp_path: Path) -> None:
    """state_dict() carries an attribute `_metadata`, which mmcv keeps in what it saves."""
    with disk.foreign() as code:
        for container in ('zip', 'legacy'):
            disk.write(
                {'meta': code.HistoryBuffer(), 'state_dict': model.state_dict()}, tmp_path / container, container)
    for container in ('zip', 'legacy'):
        assert_parts(load_checkpoint(tmp_path / container), disk.parts(model))


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.'])
@pytest.mark.parametrize('name', ['torchvision_fc', 'mmselfsup_0x', 'solo_learn', 'simsiam_models', 'mmdet_c4'])
def test_the_prefixes_of_wrappers_are_taken_away(model: SimSiam, name: str, prefix: str) -> None:
    on_disk = disk.LAYOUTS[name](model)
    inner = next((k for k in ('state_dict', 'model') if k in on_disk.contents), None)
    state = disk.prefixed(prefix, on_disk.contents[inner] if inner else on_disk.contents)
    checkpoint = recognize({**on_disk.contents, inner: state} if inner else state)
    assert checkpoint.layout == on_disk.layout
    assert_parts(checkpoint, on_disk.parts)


@pytest.mark.parametrize('name', ['torchvision', 'torchvision_fc', 'mmselfsup_0x', 'simsiam_models', 'fair'])
def test_safetensors_hold_the_same_as_torch_files(model: SimSiam, tmp_path: Path, name: str) -> None:
    on_disk = disk.LAYOUTS[name](model)
    state = on_disk.contents.get('state_dict', on_disk.contents.get('model', on_disk.contents))
    checkpoint = load_checkpoint(disk.write(state, tmp_path / 'x.safetensors', 'safetensors'))
    assert checkpoint.layout == on_disk.layout
    assert_parts(checkpoint, on_disk.parts)


def test_fair_s_frozen_bias_moves_into_the_running_mean(model: SimSiam) -> None:
    """Compares with the network that FAIR's file describes, and with a sum in float64."""
    p = disk.parts(model)
    bias = torch.randn(24)
    original = nn.Sequential(*[
        nn.Linear(24, 24) if i == 6 else layer for i, layer in enumerate(disk.tiny_simsiam().projector)]).eval()
    original.load_state_dict({**p['projector'], '6.bias': bias})
    contents = disk.fair(model).contents
    contents['state_dict'] |= disk.prefixed('module.encoder.fc.', original.state_dict())
    checkpoint = recognize(contents)
    expected = p['projector']['7.running_mean'].double() - bias.double()
    torch.testing.assert_close(checkpoint.projector['7.running_mean'].double(), expected, rtol=0, atol=2e-7)
    assert any('6.bias' in note and 'running_mean' in note for note in checkpoint.info['notes'])
    fresh = disk.tiny_simsiam(seed=1).eval()
    fresh.backbone.load_state_dict(checkpoint.backbone)
    fresh.projector.load_state_dict(checkpoint.projector)
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(fresh.encode(x), original(model.backbone(x)), rtol=0, atol=1e-6)


def test_reading_does_not_change_what_was_handed_over(model: SimSiam) -> None:
    contents = disk.fair(model).contents
    before = {k: v.clone() for k, v in contents['state_dict'].items()}
    recognize(contents)
    assert contents['state_dict'].keys() == before.keys()
    assert all(torch.equal(before[k], v) for k, v in contents['state_dict'].items())


def test_the_file_s_own_words_are_kept(model: SimSiam) -> None:
    info = recognize(disk.fair(model).contents).info
    assert info['epoch'] == 100 and info['arch'] == 'resnet50'


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('container', ['zip', 'legacy'])
def test_all_floating_tensors_become_float32(
        model: SimSiam, tmp_path: Path, dtype: torch.dtype, container: str) -> None:
    on_disk = disk.mmselfsup_1x(model)
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in on_disk.contents['state_dict'].items()}
    expected = {
        name: {k: v.to(dtype).float() if v.is_floating_point() else v for k, v in part.items()}
        for name, part in on_disk.parts.items()}
    with disk.foreign() as code:  # once for torch's reader, once for the restricted one
        for name, meta in (('plain', {}), ('restricted', {'x': code.Slots()})):
            disk.write({'meta': meta, 'state_dict': state}, tmp_path / name, container)
    for name in ('plain', 'restricted'):
        checkpoint = load_checkpoint(tmp_path / name)
        assert_parts(checkpoint, expected)
        assert any('float32' in note for note in checkpoint.info['notes'])


def test_missing_counters_become_zero(model: SimSiam) -> None:
    on_disk = disk.fair(model)
    state = {k: v for k, v in on_disk.contents['state_dict'].items() if not k.endswith('num_batches_tracked')}
    checkpoint = recognize({**on_disk.contents, 'state_dict': state})
    assert_parts(checkpoint, {name: {
        k: torch.tensor(0) if k.endswith('num_batches_tracked') else v for k, v in part.items()}
        for name, part in on_disk.parts.items()})
    assert any('num_batches_tracked' in note for note in checkpoint.info['notes'])


def test_a_last_norm_with_scale_and_shift_is_kept_and_named(model: SimSiam) -> None:
    on_disk = disk.lightly(model, 1.5)
    checkpoint = recognize(on_disk.contents)
    assert_parts(checkpoint, on_disk.parts)
    assert any('7.weight' in note for note in checkpoint.info['notes'])


@pytest.mark.parametrize('raw, shown', [
    ({'generator.conv.weight': torch.ones(2), 'discriminator.conv.weight': torch.ones(2)}, 'generator.conv.weight'),
    ({'conv1_weight': np.ones(3), 'StructuredToParameterName@@': {}}, 'conv1_weight'),  # Paddle
    ({'state_dict': {'a.b': torch.ones(2)}}, 'a.b'), ({'model': {}}, ''), ({}, ''), ([torch.ones(2)], 'list'),
    (torch.ones(2), 'Tensor'), (None, ''), ('conv1.weight', ''), ({1: torch.ones(2)}, '1'),
    ({'state_dict': None}, 'state_dict'), ({(1, 2): torch.ones(2), 'bn1.weight': torch.ones(2)}, 'bn1.weight')])
def test_an_unknown_file_is_refused_with_its_first_keys(raw: Any, shown: str) -> None:
    with pytest.raises(ValueError) as e:
        recognize(raw)
    assert shown in str(e.value)


@pytest.mark.parametrize('raw', [
    {'classy_state_dict': {}}, {'classy_state_dict': {'base_model': 3}},
    {'classy_state_dict': {'base_model': {'model': [1]}}},
    {'classy_state_dict': {'base_model': {'model': {'trunk': torch.ones(2)}}}}])
def test_a_nesting_that_only_looks_like_vissl_is_refused(raw: Any) -> None:
    with pytest.raises(ValueError):
        recognize(raw)


def test_shapes_that_do_not_fit_are_a_valueerror(model: SimSiam) -> None:
    contents = disk.fair(model).contents
    contents['state_dict']['module.encoder.fc.6.bias'] = torch.ones(5)
    with pytest.raises(ValueError):
        recognize(contents)


def test_a_tensor_too_large_for_the_memory_is_a_valueerror(model: SimSiam) -> None:
    """One half-precision number, repeated by a stride of 0: a small file whose float32 copy is 40 TB."""
    contents = disk.fair(model).contents
    contents['state_dict']['module.encoder.bn1.weight'] = torch.ones(1, dtype=torch.float16).expand(10 ** 13)
    with pytest.raises(ValueError):
        recognize(contents)


def test_a_number_may_stand_where_a_tensor_should(model: SimSiam) -> None:
    """numpy scalars and the like are no tensors: they are counted as left out."""
    contents = disk.mmselfsup_1x(model).contents
    contents['state_dict']['backbone.bn1.num_batches_tracked'] = 5
    checkpoint = recognize(contents)
    assert checkpoint.info['dropped']['backbone.bn1.num_batches_tracked'] == 1


def test_the_error_names_the_file(tmp_path: Path) -> None:
    path = disk.write({'a': torch.ones(2)}, tmp_path / 'gan.pth')
    with pytest.raises(ValueError, match='gan.pth'):
        load_checkpoint(path)


@pytest.mark.parametrize('name', [n for n in disk.LAYOUTS if n != 'torchvision_fc'])
@pytest.mark.parametrize('lacking', ['conv1.weight', 'layer3.0.bn2.running_var', 'layer4.0.conv3.weight'])
def test_an_incomplete_backbone_never_fills_a_model(model: SimSiam, name: str, lacking: str) -> None:
    """Refused as unknown, or refused by the model's filter; also with a classifier of another size."""
    on_disk = disk.LAYOUTS[name](model)
    if isinstance(on_disk.contents.get('model'), dict) and name == 'detectron2':
        on_disk.contents['model'] = {k: torch.from_numpy(np.array(v)) for k, v in on_disk.contents['model'].items()}
    gone = on_disk.parts['backbone'][lacking]

    def without(x: Any) -> Any:
        """Every tensor that equals the one that is to be lacking."""
        if not isinstance(x, dict):
            return x
        return {k: without(v) for k, v in x.items() if not (
            isinstance(v, Tensor) and v.dtype == gone.dtype and v.shape == gone.shape and torch.equal(v, gone))}

    for num_classes in (0, 10):
        with pytest.raises((RuntimeError, ValueError)) as e:
            checkpoint_filter_fn(without(on_disk.contents), disk.tiny_resnet(num_classes))
        if isinstance(e.value, RuntimeError):
            assert lacking in str(e.value)


@pytest.mark.parametrize('num_classes', [0, 10])
def test_the_model_s_filter_gives_what_the_model_loads(model: SimSiam, num_classes: int) -> None:
    target = disk.tiny_resnet(num_classes)
    on_disk = disk.torchvision(model, classifier=True)
    target.load_state_dict(checkpoint_filter_fn(on_disk.contents, target), strict=True)
    assert torch.equal(target.layer4[0].conv3.weight, model.backbone.layer4[0].conv3.weight)
    if num_classes:
        assert torch.equal(target.fc.weight, on_disk.parts['classifier']['weight'])

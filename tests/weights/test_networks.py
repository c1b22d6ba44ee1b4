"""A network is found in whatever a trainer wrote around it; two networks in one file are never mixed or guessed."""
import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import layouts_on_disk as disk
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from simsiam_models import Checkpoint, SimSiam, load_checkpoint
from simsiam_models.weights.layouts import recognize

pytestmark = pytest.mark.usefixtures('one_thread')
WRAPPERS = ['module', '_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module', '_forward_module', '_module']


@pytest.fixture(scope='module')
def model() -> SimSiam:
    return disk.tiny_simsiam()


@pytest.fixture(scope='module')
def other() -> SimSiam:
    return disk.tiny_simsiam(seed=1)


def equal(a: dict[str, Tensor] | None, b: dict[str, Tensor]) -> bool:
    return a is not None and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)


def assert_parts(checkpoint: Checkpoint, model: SimSiam) -> None:
    for name, part in disk.parts(model).items():
        assert equal(getattr(checkpoint, name), part), name


def insert(name: str, at: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Puts a wrapper's name in front of the component `at` of every key that has so many."""
    wrapped = {}
    for key, value in state.items():
        names = key.split('.')
        wrapped['.'.join([*names[:at], name, *names[at:]] if at < len(names) else names)] = value
    return wrapped


# ---- wrappers ----

@pytest.mark.parametrize('wrapper', WRAPPERS)
@pytest.mark.parametrize('at', [0, 1, 2, 3])
@pytest.mark.parametrize('name', ['simsiam_models', 'fair', 'torchvision', 'lightly', 'mmselfsup_0x', 'vissl'])
def test_the_name_of_a_wrapper_is_left_out_at_any_position(model: SimSiam, name: str, at: int, wrapper: str) -> None:
    on_disk = disk.LAYOUTS[name](model)

    def wrap(x: Any) -> Any:
        if isinstance(x, dict) and any(isinstance(v, Tensor) for v in x.values()):
            return insert(wrapper, at, x)
        return {k: wrap(v) if k != 'optimizer' else v for k, v in x.items()} if isinstance(x, dict) else x

    checkpoint = recognize(wrap(on_disk.contents))
    assert checkpoint.layout == on_disk.layout
    assert all(equal(getattr(checkpoint, part), entries) for part, entries in on_disk.parts.items())


def test_a_compiled_part_and_an_averaged_copy_load_as_torch_writes_them(model: SimSiam) -> None:
    """torch.compile of one part, and torch's own AveragedModel, which adds a counter."""
    compiled = copy.deepcopy(model)
    compiled.backbone = torch.compile(compiled.backbone)
    assert any('backbone._orig_mod.' in k for k in compiled.state_dict())
    assert_parts(recognize(compiled.state_dict()), model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert 'n_averaged' in averaged.state_dict()
    checkpoint = recognize({'ema': {'module': averaged.state_dict()}})
    assert_parts(checkpoint, model)
    assert checkpoint.info['dropped'] == {'n_averaged': 1}


@pytest.mark.parametrize('outer', [
    'module', 'model_state_dict', 'net', 'state', 'network', 'weights', 'params', 'student', 'ema', 'anything'])
@pytest.mark.parametrize('name', ['simsiam_models', 'torchvision', 'lightly', 'fair'])
def test_any_outer_key_is_looked_into(model: SimSiam, name: str, outer: str) -> None:
    on_disk = disk.LAYOUTS[name](model)
    state = on_disk.contents.get('state_dict', on_disk.contents.get('model', on_disk.contents))
    optimizer = disk.sgd_state(model)
    for contents in ({outer: state, 'optimizer': optimizer, 'epoch': 3}, {'checkpoint': {outer: state}, 'epoch': 3}):
        checkpoint = recognize(contents)
        assert checkpoint.layout == on_disk.layout and checkpoint.info['epoch'] == 3
        assert all(equal(getattr(checkpoint, part), entries) for part, entries in on_disk.parts.items())
    assert recognize({outer: state, 'optimizer': optimizer}).info['dropped']['optimizer'] == 2


@pytest.mark.parametrize('prefix', ['model.', 'resnet_simsiam.', 'model.net.', 'learner.module.student.'])
@pytest.mark.parametrize('name', ['simsiam_models', 'lightly_old', 'fair', 'torchvision'])
def test_the_attribute_that_held_the_network_is_taken_away(model: SimSiam, name: str, prefix: str) -> None:
    on_disk = disk.LAYOUTS[name](model)
    state = on_disk.contents.get('state_dict', on_disk.contents.get('model', on_disk.contents))
    state = {**disk.prefixed(prefix, state), 'criterion.center': torch.ones(3)}
    checkpoint = recognize({'state_dict': state, 'pytorch-lightning_version': '2.1.0'})
    assert all(equal(getattr(checkpoint, part), entries) for part, entries in on_disk.parts.items())
    assert checkpoint.info['dropped']['criterion'] == 1


def test_parts_in_dictionaries_of_their_own_are_one_network(model: SimSiam) -> None:
    assert_parts(recognize(disk.parts(model)), model)


@pytest.mark.parametrize('extra', [
    {'module.layer1.0.conv1.weight': torch.ones(2)}, {'module': {'fc.bias': torch.ones(2)}}])
def test_two_entries_under_one_name_are_refused(model: SimSiam, extra: dict) -> None:
    plain = {**disk.part(model, 'backbone'), 'fc.weight': torch.ones(2, 64), 'fc.bias': torch.zeros(2)}
    with pytest.raises(ValueError, match='two entries'):
        recognize({**plain, **extra})


def test_dictionaries_that_hold_each_other_end(model: SimSiam) -> None:
    raw: dict[str, Any] = {'model': dict(model.state_dict())}
    raw['again'] = raw['module'] = raw
    assert_parts(recognize(raw), model)
    many: dict[str, Any] = {}
    for _ in range(200):
        many = {str(i): many for i in range(200)}
    assert_parts(recognize({'model': dict(model.state_dict()), 'many': many}), model)


# ---- two networks ----

def timm_file(model: SimSiam, other: SimSiam, key: str, ema: str, prefix: str) -> dict[str, Any]:
    return {key: disk.prefixed(prefix, disk.part(other, 'backbone')), ema: disk.prefixed(
        prefix, disk.part(model, 'backbone')), 'epoch': 9, 'optimizer': disk.sgd_state(model)}


@pytest.mark.parametrize('key, ema', [('state_dict', 'state_dict_ema'), ('model', 'model_ema')])
@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.'])
def test_of_averaged_weights_timm_s_choice_is_taken(
        model: SimSiam, other: SimSiam, tmp_path: Path, key: str, ema: str, prefix: str) -> None:
    path = disk.write(timm_file(model, other, key, ema, prefix), tmp_path / 'last.pth.tar')
    checkpoint = load_checkpoint(path)
    assert equal(checkpoint.backbone, timm.models.load_state_dict(str(path)))
    assert equal(checkpoint.backbone, disk.part(model, 'backbone'))
    assert f'loaded {ema} and left out {key}' in checkpoint.describe()
    assert equal(load_checkpoint(path, key).backbone, disk.part(other, 'backbone'))


def dino(model: SimSiam, other: SimSiam) -> dict[str, Any]:
    """DINO's file for a ResNet: the student under DDP, the teacher without."""
    head = {'head.mlp.0.weight': torch.randn(8, 64), 'head.last_layer.weight_g': torch.randn(8, 1)}
    return {
        'student': disk.prefixed('module.', {**disk.prefixed('backbone.', disk.part(model, 'backbone')), **head}),
        'teacher': {**disk.prefixed('backbone.', disk.part(other, 'backbone')), **head},
        'optimizer': disk.sgd_state(model), 'epoch': 100, 'dino_loss': {'center': torch.zeros(1, 8)}}


PAIRS = {
    'dino': dino,
    'lightly': lambda m, o: {'state_dict': {
        f'{name}_backbone.{k}': v for name, x in (('student', m), ('teacher', o))
        for k, v in disk.numbered(disk.part(x, 'backbone')).items()}},
    'lightning': lambda m, o: {'state_dict': {
        f'model.{name}.backbone.{k}': v for name, x in (('student', m), ('teacher', o))
        for k, v in disk.part(x, 'backbone').items()}},
    'DDP of both': lambda m, o: {'state_dict': {
        f'module.{name}.{k}': v for name, x in (('student', m), ('teacher', o))
        for k, v in disk.part(x, 'backbone').items()}}}


@pytest.mark.parametrize('kind', PAIRS)
def test_student_and_teacher_are_an_error_that_names_both_and_a_choice(
        model: SimSiam, other: SimSiam, tmp_path: Path, kind: str) -> None:
    path = disk.write(PAIRS[kind](model, other), tmp_path / 'x.pth')
    with pytest.raises(ValueError) as e:
        load_checkpoint(path)
    text = str(e.value)
    assert 'x.pth' in text and 'student' in text and 'teacher' in text and '--branch' in text and '\n' not in text
    assert equal(load_checkpoint(path, 'student').backbone, disk.part(model, 'backbone'))
    assert equal(load_checkpoint(path, branch='teacher').backbone, disk.part(other, 'backbone'))
    with pytest.raises(ValueError, match="no network called 'ema'.*student.*teacher"):
        load_checkpoint(path, 'ema')


@pytest.mark.parametrize('a, b', [
    ('model', 'ema'), ('model', 'ema_state_dict'), ('online_network', 'target_network'), ('backbone1', 'backbone2')])
def test_other_pairs_are_named_too_and_a_copy_of_the_same_numbers_is_none(
        model: SimSiam, other: SimSiam, a: str, b: str) -> None:
    first, second = disk.part(model, 'backbone'), disk.part(other, 'backbone')
    with pytest.raises(ValueError, match=f'2 networks, {a} and {b}'):
        recognize({a: first, b: second})
    assert equal(recognize({a: first, b: second}, b).backbone, second)
    assert equal(recognize({a: first, b: {k: v.clone() for k, v in first.items()}}).backbone, first)
    nan = {**first, 'bn1.weight': torch.full((len(first['bn1.weight']),), float('nan'))}
    assert 'bn1.weight' in recognize({a: nan, b: {k: v.clone() for k, v in nan.items()}}).backbone


def test_a_network_beside_a_plain_one_is_not_passed_over(model: SimSiam, other: SimSiam) -> None:
    state = {**model.state_dict(), **disk.prefixed('teacher.', disk.part(other, 'backbone'))}
    with pytest.raises(ValueError, match='top and teacher'):
        recognize({'state_dict': state})
    assert_parts(recognize({'state_dict': state}, 'top'), model)
    assert equal(recognize(state, 'teacher').backbone, disk.part(other, 'backbone'))


def moco(model: SimSiam, other: SimSiam, names: tuple[str, str], fc: dict[str, Tensor]) -> dict[str, Any]:
    state = {'module.queue': torch.zeros(4, 8), 'module.queue_ptr': torch.zeros(1, dtype=torch.long)}
    for name, x in zip(names, (model, other), strict=True):
        state |= disk.prefixed(f'module.{name}.', {**disk.part(x, 'backbone'), **fc})
    return {'epoch': 200, 'arch': 'resnet50', 'state_dict': state, 'optimizer': disk.sgd_state(model)}


@pytest.mark.parametrize('names', [('encoder_q', 'encoder_k'), ('base_encoder', 'momentum_encoder')])
@pytest.mark.parametrize('fc', [
    {'fc.weight': torch.ones(8, 64), 'fc.bias': torch.ones(8)},
    {'fc.0.weight': torch.ones(64, 64), 'fc.0.bias': torch.ones(64), 'fc.2.weight': torch.ones(8, 64)}])
def test_of_moco_the_trained_encoder_is_taken_and_its_projection_is_no_classifier(
        model: SimSiam, other: SimSiam, names: tuple[str, str], fc: dict[str, Tensor]) -> None:
    contents = moco(model, other, names, fc)
    checkpoint = recognize(contents)
    assert equal(checkpoint.backbone, disk.part(model, 'backbone')) and checkpoint.classifier is None
    text = checkpoint.describe()
    assert f'loaded {names[0]} and left out {names[1]}' in text and 'not a linear classifier' in text
    assert checkpoint.info['dropped'].items() >= {'fc': len(fc), 'queue': 1, 'optimizer': 2}.items()
    assert equal(recognize(contents, names[1]).backbone, disk.part(other, 'backbone'))


def test_a_momentum_copy_beside_the_backbone_is_left_out_and_named(model: SimSiam, other: SimSiam) -> None:
    on_disk = disk.solo_learn(model)
    copies = disk.prefixed('momentum_backbone.', disk.part(other, 'backbone'))
    on_disk.contents['state_dict'] |= copies
    checkpoint = recognize(on_disk.contents)
    assert_parts(checkpoint, model)
    assert 'momentum_backbone' in checkpoint.describe()
    assert checkpoint.info['dropped']['momentum_backbone'] == len(copies)
    assert equal(recognize(on_disk.contents, 'momentum_backbone').backbone, disk.part(other, 'backbone'))


# ---- layouts of others ----

def hua(model: SimSiam) -> dict[str, Any]:
    """PatrickHua/SimSiam: layers with biases, a last batch norm with scale and shift, and everything twice."""
    p = disk.parts(model)
    projector, predictor = p['projector'], disk.with_bias(p['predictor'], 0)
    for layer in (0, 3, 6):
        projector = disk.with_bias(projector, layer)
    names = {'0': 'layer1.0', '1': 'layer1.1', '3': 'layer2.0', '4': 'layer2.1', '6': 'layer3.0', '7': 'layer3.1'}
    projector = {f'{names[k[0]]}{k[1:]}': v for k, v in projector.items()}
    projector |= {'layer3.1.weight': torch.ones(24), 'layer3.1.bias': torch.zeros(24)}
    predictor = {f'{({**names, "3": "layer2"})[k[0]]}{k[1:]}': v for k, v in predictor.items()}
    state = {
        **disk.prefixed('backbone.', p['backbone']), **disk.prefixed('projector.', projector),
        **disk.prefixed('encoder.0.', p['backbone']), **disk.prefixed('encoder.1.', projector),
        **disk.prefixed('predictor.', predictor)}
    return {'epoch': 800, 'state_dict': OrderedDict(state)}


def test_patrickhua_s_layout_loads_with_heads(model: SimSiam) -> None:
    for contents in (hua(model), {'state_dict': disk.prefixed('module.', hua(model)['state_dict'])}):
        checkpoint = recognize(contents)
        assert checkpoint.layout == 'patrickhua'
        assert_parts(checkpoint, model)


def test_of_patrickhua_s_two_layers_the_unused_third_is_left_out(model: SimSiam) -> None:
    """With proj_layers=2 its forward pass skips layer2, whose batch norm then has seen no batch."""
    contents = hua(model)
    for key in ('projector.', 'encoder.1.'):
        contents['state_dict'][f'{key}layer2.1.num_batches_tracked'] = torch.tensor(0)
    projector = disk.part(model, 'projector')
    expected = {k: v for k, v in projector.items() if k[0] in '01'}
    expected |= {f'{int(k[0]) - 3}{k[1:]}': v for k, v in projector.items() if k[0] in '67'}
    checkpoint = recognize(contents)
    assert equal(checkpoint.projector, expected)
    assert 'saw no batch' in checkpoint.describe()


def generator_names(backbone: dict[str, Tensor]) -> dict[str, Tensor]:
    """lightly's own ResNet, cut into nn.Sequential: no ReLU and no pooling among its children, and shortcuts."""
    names = {'conv1': 0, 'bn1': 1, 'layer1': 2, 'layer2': 3, 'layer3': 4, 'layer4': 5}
    return {f'{names[k.split(".")[0]]}.{k.split(".", 1)[1].replace("downsample", "shortcut")}': v
            for k, v in backbone.items()}


@pytest.mark.parametrize('heads', [True, False])
def test_lightly_s_own_resnet_is_known_by_its_numbers(model: SimSiam, heads: bool) -> None:
    backbone = generator_names(disk.part(model, 'backbone'))
    old = disk.lightly_old(model).contents['state_dict']
    contents = {**disk.prefixed('backbone.', backbone), **{k: v for k, v in old.items() if 'backbone' not in k}}
    for state in (disk.prefixed('resnet_simsiam.', contents), contents) if heads else (
            backbone, disk.prefixed('backbone.', backbone)):
        checkpoint = recognize({'state_dict': state})
        assert equal(checkpoint.backbone, disk.part(model, 'backbone'))
        assert checkpoint.info['stem'] == {'stem_relu': False} and 'no ReLU' in checkpoint.describe()
        assert not heads or equal(checkpoint.projector, disk.part(model, 'projector'))
        assert not heads or equal(checkpoint.predictor, disk.part(model, 'predictor'))


def test_the_children_of_torchvision_s_resnet_keep_its_names_and_classifier() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=7)
    state = nn.Sequential(*model.children()).state_dict()
    checkpoint = recognize({'state_dict': state})
    assert equal(checkpoint.model_state(), dict(model.state_dict())) and 'stem' not in checkpoint.info


def test_a_stem_of_3_pixels_pads_by_2_in_solo_learn_s_files_alone(model: SimSiam) -> None:
    for build, layout, expected in (
            (disk.solo_learn, 'solo_learn', {'stem_padding': 2}), (disk.ours, 'simsiam_models', None)):
        contents = build(model).contents
        assert 'stem' not in recognize(contents).info  # a stem of 7 px is torchvision's
        state = contents.get('state_dict', contents.get('model'))
        state['backbone.conv1.weight'] = torch.ones(64, 3, 3, 3)
        checkpoint = recognize(contents)
        assert checkpoint.layout == layout and checkpoint.info.get('stem') == expected


@pytest.mark.parametrize('form', ['fc.', 'module.fc.1.', 'backbone fc.', 'backbone classifier.', 'backbone head.fc.'])
@pytest.mark.parametrize('bias', [True, False])
def test_a_linear_classifier_is_kept_whatever_it_is_called(model: SimSiam, form: str, bias: bool) -> None:
    fc = disk.linear(10) if bias else {'weight': disk.linear(10)['weight']}
    where, _, name = form.rpartition(' ')
    state = disk.prefixed(f'{where}.' if where else 'module.', disk.part(model, 'backbone')) | disk.prefixed(name, fc)
    checkpoint = recognize({'state_dict': state})
    assert equal(checkpoint.classifier, {'bias': torch.zeros(10), **fc})
    assert equal(checkpoint.backbone, disk.part(model, 'backbone'))


def test_layers_that_are_no_linear_classifier_are_left_out_and_said(model: SimSiam) -> None:
    mlp = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)).state_dict()
    checkpoint = recognize({**disk.part(model, 'backbone'), **disk.prefixed('fc.', mlp)})
    assert checkpoint.classifier is None and checkpoint.info['dropped']['fc'] == len(mlp)
    assert 'are not a linear classifier and were left out' in checkpoint.describe()


# ---- numbers ----

def spoil(x: Tensor, kind: str) -> Tensor:
    return x.to('meta') if kind == 'meta' else x.to_sparse() if kind == 'sparse' else x.to(getattr(torch, kind))


@pytest.mark.parametrize('kind', ['int8', 'int64', 'bool', 'complex64', 'meta', 'sparse'])
@pytest.mark.parametrize('key', ['backbone.layer2.0.bn1.running_var', 'projector.0.weight'])
def test_an_entry_that_torch_would_copy_as_other_numbers_is_refused_by_name(
        model: SimSiam, kind: str, key: str, tmp_path: Path) -> None:
    state = model.state_dict()
    torch.save({'model': {**state, key: spoil(state[key], kind)}}, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match=f'x.pth: model.{key} is .*{kind}.*: save the weights as'):
        load_checkpoint(tmp_path / 'x.pth')


def test_counters_of_any_type_and_other_integers_are_no_fault(model: SimSiam) -> None:
    state = {k: v.to(torch.int32) if k.endswith('tracked') else v for k, v in model.state_dict().items()}
    found = recognize({**state, 'backbone.layer1.0.attn.index': torch.arange(3)}).backbone
    assert found['bn1.num_batches_tracked'] == 1000 and len(found['layer1.0.attn.index']) == 3


def test_names_from_a_file_cannot_add_lines_to_a_report(model: SimSiam) -> None:
    checkpoint = recognize({**disk.part(model, 'backbone'), 'x\nok   hash: \x1b[32mproven': torch.ones(1)})
    assert checkpoint.info['dropped'] and checkpoint.describe().isprintable()

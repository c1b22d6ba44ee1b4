"""Everything that timm offers for its own ResNets must work on ours: each test checks one rule of timm or torchvision.

Inputs are 64 px if the size does not matter: the tests are about wiring, not accuracy.
"""
import socket
import warnings
from pathlib import Path

import pytest
import timm
import timm.optim
import torch
import torchvision
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.models import ResNet
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

import simsiam_models  # noqa: F401  registers the models
from simsiam_models.weights.published import WEIGHTS

R50 = 'simsiam_resnet50'
R18 = 'simsiam_resnet18_cifar'
TAGS = list(WEIGHTS)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def r50() -> ResNet:
    """A model that the tests only read."""
    torch.manual_seed(0)
    return timm.create_model(R50).eval()


@pytest.fixture
def no_socket(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records every attempt to reach the network, and lets it fail."""
    attempts: list[str] = []

    def refuse(*args, **kwargs):
        attempts.append(repr(args))
        raise OSError('the test allows no network')

    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'create_connection', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    return attempts


def pixels(batch: int = 2, size: int = 64, chans: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(batch, chans, size, size, generator=torch.Generator().manual_seed(seed))


def randomize(model: nn.Module) -> nn.Module:
    """Randomizes norms and running statistics: the initial zero gammas would hide half of a network."""
    g = torch.Generator().manual_seed(2)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.copy_(0.5 + torch.rand(m.weight.shape, generator=g))
            m.bias.data.copy_(0.1 * torch.randn(m.bias.shape, generator=g))
            m.running_mean.copy_(0.1 * torch.randn(m.running_mean.shape, generator=g))
            m.running_var.copy_(0.5 + torch.rand(m.running_var.shape, generator=g))
    return model


# The network


def test_resnet50_has_the_parameters_and_entries_of_a_resnet50_without_classifier(r50):
    assert sum(p.numel() for p in r50.parameters()) == 23_508_032
    assert len(r50.state_dict()) == 318


def test_without_arguments_there_is_no_classifier_and_features_are_2048_wide(r50):
    assert r50.num_classes == 0
    assert r50.num_features == 2048
    with torch.no_grad():
        assert r50(pixels()).shape == (2, 2048)


def test_torchvision_weights_load_strictly_and_give_the_same_bits():
    torch.manual_seed(0)
    theirs = randomize(torchvision.models.resnet50())
    theirs.fc = nn.Identity()
    ours = timm.create_model(R50)
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith('fc.')}
    ours.load_state_dict(state, strict=True)
    x = pixels()
    with torch.no_grad():
        ours_y, theirs_y = ours.eval()(x), theirs.eval()(x)
    assert theirs_y.std() > 0
    assert torch.equal(ours_y, theirs_y)


@pytest.mark.parametrize('name, block', [(R50, Bottleneck), (R18, BasicBlock)])
def test_the_last_norm_of_each_block_starts_at_zero(name, block):
    model = timm.create_model(name)
    blocks = [m for m in model.modules() if isinstance(m, block)]
    assert len(blocks) == (16 if block is Bottleneck else 8)
    for b in blocks:
        last = b.bn3 if block is Bottleneck else b.bn2
        assert not last.weight.any()
        assert (b.bn1.weight == 1).all()


def test_num_classes_adds_a_linear_classifier():
    model = timm.create_model(R50, num_classes=10).eval()
    assert model.get_classifier().weight.shape == (10, 2048)
    with torch.no_grad():
        assert model(pixels()).shape == (2, 10)
    model.reset_classifier(0)
    with torch.no_grad():
        assert model(pixels()).shape == (2, 2048)


def test_in_chans_changes_the_stem_only():
    model = timm.create_model(R50, in_chans=1).eval()
    assert model.conv1.weight.shape == (64, 1, 7, 7)
    with torch.no_grad():
        assert model(pixels(chans=1)).shape == (2, 2048)


def test_output_stride_8_keeps_the_resolution():
    model = timm.create_model(R50, output_stride=8).eval()
    with torch.no_grad():
        assert model.forward_features(pixels()).shape == (2, 2048, 8, 8)


def test_without_pooling_the_feature_map_comes_out():
    model = timm.create_model(R50, global_pool='').eval()
    with torch.no_grad():
        assert model(pixels()).shape == (2, 2048, 2, 2)


@pytest.mark.parametrize('name', [R50, R18])
def test_an_unknown_argument_is_a_type_error(name):
    with pytest.raises(TypeError, match='no_such_argument'):
        timm.create_model(name, no_such_argument=1)


def test_features_only_gives_five_maps():
    model = timm.create_model(R50, features_only=True).eval()
    assert model.feature_info.channels() == [64, 256, 512, 1024, 2048]
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    with torch.no_grad():
        maps = model(pixels())
    assert [tuple(m.shape) for m in maps] == [
        (2, c, 64 // r, 64 // r) for c, r in zip([64, 256, 512, 1024, 2048], [2, 4, 8, 16, 32], strict=True)]


def test_forward_intermediates_ends_in_the_features(r50):
    x = pixels()
    with torch.no_grad():
        final, maps = r50.forward_intermediates(x)
        assert torch.equal(final, r50.forward_features(x))
    assert [m.shape[1] for m in maps] == [64, 256, 512, 1024, 2048]
    assert torch.equal(maps[-1], final)


@pytest.mark.parametrize('name', [R50, R18])
def test_layer_decay_finds_groups(name):
    groups = timm.optim.param_groups_layer_decay(timm.create_model(name), layer_decay=0.5)
    scales = {g['lr_scale'] for g in groups}
    assert len(groups) > 1
    assert len(scales) > 1  # not one group of everything, split only by weight decay
    assert max(scales) == 1.0


@pytest.mark.parametrize('name', [R50, R18])
def test_grad_checkpointing_changes_no_output(name):
    model = randomize(timm.create_model(name)).eval()
    x = pixels(size=32)
    plain = model(x)
    model.set_grad_checkpointing(True)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize('name', [R50, R18])
def test_script_and_fx_give_the_same_output(name):
    model = randomize(timm.create_model(name)).eval()
    x = pixels(size=32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch.jit is deprecated, but timm still supports it
        plain = model(x)
        assert torch.equal(torch.fx.symbolic_trace(model)(x), plain)
        torch.testing.assert_close(torch.jit.script(model)(x), plain, rtol=1e-5, atol=1e-5)


# The CIFAR network


def test_cifar_stem_keeps_the_resolution():
    model = timm.create_model(R18).eval()
    assert (model.conv1.kernel_size, model.conv1.stride, model.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    assert model.conv1.bias is None
    assert isinstance(model.maxpool, nn.Identity)
    with torch.no_grad():
        assert model(pixels(size=32)).shape == (2, 512)


def test_cifar_reductions_are_those_of_the_maps():
    model = timm.create_model(R18, features_only=True).eval()
    assert model.feature_info.channels() == [64, 64, 128, 256, 512]
    assert model.feature_info.reduction() == [1, 1, 2, 4, 8]
    with torch.no_grad():
        assert [m.shape[-1] for m in model(pixels(size=32))] == [32, 32, 16, 8, 4]


def test_cifar_in_chans_changes_the_stem_only():
    model = timm.create_model(R18, in_chans=1).eval()
    assert model.conv1.weight.shape == (64, 1, 3, 3)
    with torch.no_grad():
        assert model(pixels(size=32, chans=1)).shape == (2, 512)


def test_cifar_data_config_is_32_px_uncropped():
    config = resolve_model_data_config(timm.create_model(R18))
    assert config['input_size'] == (3, 32, 32)
    assert config['crop_pct'] == 1.0


# The data config


def test_images_are_evaluated_as_published(r50):
    config = resolve_model_data_config(r50)
    assert config['input_size'] == (3, 224, 224)
    assert config['interpolation'] == 'bilinear'
    assert config['crop_pct'] == 0.875
    assert config['mean'] == (0.485, 0.456, 0.406)
    assert config['std'] == (0.229, 0.224, 0.225)
    steps = {type(t).__name__: t for t in create_transform(**config, is_training=False).transforms}
    assert steps['Resize'].size == 256
    assert steps['Resize'].interpolation == torchvision.transforms.InterpolationMode.BILINEAR
    assert tuple(steps['CenterCrop'].size) == (224, 224)


# The tags


def test_timm_lists_the_13_published_tags():
    listed = timm.list_pretrained('simsiam*')
    assert len(listed) == len(TAGS) == 13
    assert set(listed) == {f'{R50}.{tag}' for tag in TAGS}
    assert set(timm.list_models('simsiam*')) == {R50, R18}


def test_models_are_filed_under_resnet():
    assert R50 in timm.list_models(module='resnet')


def test_the_first_tag_is_the_default(r50):
    assert TAGS[0] == 'mm_ep200_in1k'
    assert r50.pretrained_cfg['tag'] == 'mm_ep200_in1k'
    assert r50.default_cfg['architecture'] == R50


@pytest.mark.parametrize('tag', TAGS)
def test_each_tag_states_licence_classes_and_source(tag):
    cfg = timm.get_pretrained_cfg(f'{R50}.{tag}')
    assert cfg.license == ('cc-by-nc-4.0' if tag.startswith('fb_') else 'apache-2.0')
    assert cfg.num_classes == (1000 if '_lin_' in tag else 0)
    assert cfg.url == WEIGHTS[tag].url and cfg.url.startswith('https://')
    assert cfg.input_size == (3, 224, 224) and cfg.crop_pct == 0.875
    assert (cfg.first_conv, cfg.classifier) == ('conv1', 'fc')
    if WEIGHTS[tag].sha256_prefix:
        assert f'-{WEIGHTS[tag].sha256_prefix}.pth' in cfg.url
    else:
        assert tag.startswith('fb_')


def test_a_linear_tag_has_1000_classes_without_asking():
    model = timm.create_model(f'{R50}.mm1x_ep200_lin_in1k').eval()
    assert model.num_classes == 1000
    with torch.no_grad():
        assert model(pixels()).shape == (2, 1000)


def test_a_wrong_tag_is_refused():
    with pytest.raises(RuntimeError, match=r'no_such_tag'):
        timm.create_model(f'{R50}.no_such_tag')


# Pretrained


@pytest.mark.parametrize('name', [R50, *(f'{R50}.{tag}' for tag in TAGS)])
def test_offline_without_a_cache_the_error_says_so_and_nothing_is_asked(name, no_socket, tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(RuntimeError) as e:
        timm.create_model(name, pretrained=True, cache_dir=tmp_path)
    text = str(e.value)
    assert text.startswith(f'{R50}.{name.partition(".")[2] or TAGS[0]}: ')
    assert 'HF_HUB_OFFLINE is set and no cache has it' in text
    assert 'pretrained=False' in text and 'dict(file=PATH)' in text  # what to do instead
    assert no_socket == []


def test_pretrained_cifar_is_refused_because_none_exists(no_socket):
    with pytest.raises(RuntimeError, match='No pretrained weights exist'):
        timm.create_model(R18, pretrained=True)
    assert no_socket == []


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_file_that_the_caller_brings_is_loaded(tmp_path: Path, r50, no_socket, suffix):
    path = tmp_path / f'mine{suffix}'
    state = {k: v + 1 if v.is_floating_point() else v for k, v in r50.state_dict().items()}
    if suffix == '.pth':
        torch.save(state, path)
    else:
        save_file(state, path)
    model = timm.create_model(R50, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    for k, v in model.state_dict().items():
        assert torch.equal(v, state[k]), k
    assert no_socket == []


def test_a_file_that_the_caller_brings_is_adapted_to_one_channel(tmp_path: Path, r50):
    torch.save(r50.state_dict(), tmp_path / 'mine.pth')
    model = timm.create_model(
        R50, pretrained=True, in_chans=1, pretrained_cfg_overlay=dict(file=str(tmp_path / 'mine.pth')))
    torch.testing.assert_close(model.conv1.weight, r50.conv1.weight.sum(1, keepdim=True))


# The classifier of a file that the caller brings


SMALL = {'layers': (1, 1, 1, 1), 'channels': (8, 8, 8, 8)}


def write_linear(path: Path, classes: int, kind: str) -> dict[str, Tensor]:
    """Writes a classifier as FAIR, MMSelfSup 1.x, torchvision and timm (averaged weights) do; returns its entries."""
    torch.manual_seed(7)
    state = randomize(timm.create_model(R50, num_classes=classes, **SMALL)).state_dict()
    torch.nn.init.normal_(state['fc.bias'])
    other = {k: v + 1 for k, v in state.items()}
    torch.save({
        'fair': {'state_dict': {f'module.{k}': v for k, v in state.items()}, 'best_acc1': 68.1, 'epoch': 90},
        'mm': {'meta': {}, 'state_dict': {
            f'head.{k}' if k.startswith('fc') else f'backbone.{k}': v for k, v in state.items()}},
        'plain': state, 'averaged': {'state_dict': other, 'state_dict_ema': state}}[kind], path)
    return state


@pytest.mark.parametrize('kind', ['fair', 'mm', 'plain', 'averaged'])
@pytest.mark.parametrize('how', ['overlay', 'cfg', 'state_dict'])
def test_a_classifier_of_the_asked_size_is_loaded_with_the_file(
        tmp_path: Path, kind: str, how: str, no_socket, caplog: pytest.LogCaptureFixture) -> None:
    state = write_linear(tmp_path / 'x.pth', 10, kind)
    source = {
        'overlay': dict(pretrained_cfg_overlay=dict(file=str(tmp_path / 'x.pth'))),
        'cfg': dict(pretrained_cfg=dict(file=str(tmp_path / 'x.pth'), num_classes=0)),
        'state_dict': dict(pretrained_cfg_overlay=dict(state_dict=torch.load(tmp_path / 'x.pth')))}[how]
    model = timm.create_model(R50, pretrained=True, num_classes=10, **source, **SMALL)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not caplog.records and no_socket == []
    features = timm.create_model(R50, pretrained=True, **source, **SMALL)  # the classifier is not asked for
    assert features.num_classes == 0 and torch.equal(features.conv1.weight, state['conv1.weight'])


@pytest.mark.parametrize('held, asked, words', [(10, 7, 'a classifier of 10 classes'), (0, 7, 'no classifier')])
def test_a_classifier_of_another_size_is_random_and_a_line_says_so(
        tmp_path: Path, held: int, asked: int, words: str, caplog: pytest.LogCaptureFixture) -> None:
    state = write_linear(tmp_path / 'x.pth', held, 'plain') if held else randomize(
        timm.create_model(R50, **SMALL)).state_dict()
    torch.save(state, tmp_path / 'x.pth')
    model = timm.create_model(
        R50, pretrained=True, num_classes=asked, pretrained_cfg_overlay=dict(file=str(tmp_path / 'x.pth')), **SMALL)
    assert model.fc.out_features == asked and torch.equal(model.conv1.weight, state['conv1.weight'])
    assert words in caplog.text and f'with {asked} classes, starts at random' in caplog.text


@pytest.mark.parametrize('num_classes', [0, 7, 10])
@pytest.mark.parametrize('extra', ['layer1.5.conv1.weight', 'norm.weight'])
def test_a_backbone_of_another_shape_never_loads_in_part(tmp_path: Path, num_classes: int, extra: str) -> None:
    write_linear(tmp_path / 'x.pth', 10, 'plain')
    state = torch.load(tmp_path / 'x.pth')
    overlay = dict(pretrained_cfg_overlay=dict(file=str(tmp_path / 'x.pth')))
    torch.save({f'backbone.{k}': v for k, v in {**state, extra: torch.ones(2)}.items()}, tmp_path / 'x.pth')
    with pytest.raises(RuntimeError, match=extra.replace('.', r'\.')):
        timm.create_model(R50, pretrained=True, num_classes=num_classes, **overlay, **SMALL)
    del state['layer2.0.bn1.running_var']
    torch.save(state, tmp_path / 'x.pth')
    with pytest.raises(RuntimeError, match=r'layer2\.0\.bn1\.running_var'):
        timm.create_model(R50, pretrained=True, num_classes=num_classes, **overlay, **SMALL)

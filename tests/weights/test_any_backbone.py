"""Any network of timm's goes out: to timm and ONNX as it is, to ResNet-only targets if it is a ResNet."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import TINY, run_train
from PIL import Image
from torch import nn

from simsiam_models import load_checkpoint
from simsiam_models.cli import main
from simsiam_models.weights import onnxfile
from simsiam_models.weights.convert import convert
from simsiam_models.weights.export import export_backbone
from simsiam_models.weights.folders import create_from_folder
from simsiam_models.weights.layouts import recognize
from simsiam_models.weights.networks import load_trained

NARROW = {'layers': [1, 1, 1, 1], 'channels': [8, 8, 8, 8]}
VIT = {'img_size': 32, 'patch_size': 8, 'depth': 1, 'embed_dim': 24, 'num_heads': 3}
NETWORKS = {
    'resnet18': NARROW, 'vit_tiny_patch16_224': VIT, 'vit_small_patch16_dinov3': {**VIT, 'num_heads': 2},
    'convnext_atto': {'depths': [1, 1, 1, 1], 'dims': [8, 8, 8, 8]}, 'test_efficientnet': {},
    'test_vit4': VIT,
    'simsiam_resnet18_cifar': NARROW | {'channels': [8, 16, 16, 16]}}


def export(folder: Path, name: str, args: dict, size: int = 32, resize: int = 36) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **args).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 1.5)
    export_backbone(model, folder, name, args, size, resize)
    return model


@pytest.mark.parametrize('name', NETWORKS)
def test_onnx_gives_the_features_of_torch_for_any_batch(name: str, tmp_path: Path) -> None:
    onnx, runtime = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    export(tmp_path / 'in', name, NETWORKS[name])
    text = convert(tmp_path / 'in', tmp_path / 'out.onnx', 'onnx')
    assert 'The outputs differ from those of torch by' in text and '(B, 3, 32, 32)' in text
    onnx.checker.check_model(tmp_path / 'out.onnx', full_check=True)
    model = create_from_folder(tmp_path / 'in').eval()
    session = runtime.InferenceSession(tmp_path / 'out.onnx')
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 32, 32)
        with torch.inference_mode():
            expected = model(x).numpy()
        found, = session.run(['features'], {'images': x.numpy()})
        assert found.shape == expected.shape and expected.std() > 0
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_the_metadata_alone_prepare_an_image_as_timm_does(tmp_path: Path) -> None:
    onnx = pytest.importorskip('onnx')
    export(tmp_path / 'in', 'resnet18', NARROW, 48, 56)
    convert(tmp_path / 'in', tmp_path / 'out.onnx', 'onnx')
    facts = {p.key: p.value for p in onnx.load(tmp_path / 'out.onnx').metadata_props}
    assert facts['architecture'] == 'resnet18' and facts['crop_mode'] == 'center'
    facts = {k: json.loads(v) for k, v in facts.items() if v[0] in '[0123456789'} | {
        'interpolation': facts['interpolation']}
    noise = torch.randint(0, 256, (70, 90, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.numpy())
    side = facts['input_size'][-1]
    scale = round(side / facts['crop_pct']) / min(image.size)
    small = image.resize(
        [round(x * scale) for x in image.size], Image.Resampling[facts['interpolation'].upper()])
    left, top = (round((x - side) / 2) for x in small.size)
    pixels = np.asarray(small.crop((left, top, left + side, top + side)), np.float32) / 255
    found = ((pixels - facts['mean']) / facts['std']).transpose(2, 0, 1)
    model = timm.create_model(f'local-dir:{tmp_path / "in"}', pretrained=True)
    expected = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(image)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_an_onnx_file_that_differs_from_torch_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('onnxruntime')
    trace = onnxfile._trace
    model = export(tmp_path / 'in', 'resnet18', NARROW)

    def trace_others(right: nn.Module, *args: str) -> object:
        model.pretrained_cfg = right.pretrained_cfg
        model.bn1.bias.data += 0.01
        return trace(model, *args)

    monkeypatch.setattr(onnxfile, '_trace', trace_others)
    with pytest.raises(ValueError, match='resnet18 gives different results in ONNX and in torch') as error:
        convert(tmp_path / 'in', tmp_path / 'out.onnx', 'onnx')
    assert '\n' not in str(error.value) and [p.name for p in tmp_path.iterdir()] == ['in']


def test_what_onnx_has_no_operator_for_is_one_sentence(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    pytest.importorskip('onnxruntime')
    export(tmp_path / 'in', 'resnet18', NARROW)
    monkeypatch.setattr(timm.layers.SelectAdaptivePool2d, 'forward', lambda self, x: torch.linalg.svdvals(x)[..., 0])
    assert main(['convert', str(tmp_path / 'in'), str(tmp_path / 'out.onnx'), '--to', 'onnx']) == 1
    out, said = capfd.readouterr()
    assert 'resnet18 cannot be written in the operators of ONNX' in said and 'svd' in said
    assert said.count('\n') == 1 and not out and not (tmp_path / 'out.onnx').exists()


@pytest.mark.parametrize('to, file', [('torchvision', 'x.pth'), ('mmdet', 'x.pth'), ('detectron2', 'x.pkl')])
@pytest.mark.parametrize('name, args, words', [
    ('vit_tiny_patch16_224', VIT, 'its architecture is vit_tiny_patch16_224, not one of resnet18, resnet34'),
    ('resnet18', NARROW, 'resnet18 is not the usual one: '),
    ('resnet18', {'act_layer': 'silu'}, "something different from the usual one because of {'act_layer': 'silu'}")])
def test_what_a_target_cannot_hold_is_refused_by_name(
        to: str, file: str, name: str, args: dict, words: str, tmp_path: Path) -> None:
    export(tmp_path / 'in', name, args)
    with pytest.raises(ValueError, match=f'^{to} cannot hold .*in: it') as error:
        convert(tmp_path / 'in', tmp_path / file, to)
    assert words in str(error.value) and str(error.value).endswith('; convert it to timm or onnx')
    assert not (tmp_path / file).exists() and '\n' not in str(error.value)


def test_a_resnet18_goes_to_torchvision_and_to_both_detectors(tmp_path: Path, one_thread: None) -> None:
    model = export(tmp_path / 'in', 'resnet18', {}, 64, 64)
    convert(tmp_path / 'in', tmp_path / 'tv.pth', 'torchvision')
    theirs = torchvision.models.resnet18()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(torch.load(tmp_path / 'tv.pth', weights_only=True))
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(theirs.eval()(x), model(x))
    text = convert(tmp_path / 'in', tmp_path / 'd2.pkl', 'detectron2')
    assert 'MODEL.RESNETS.DEPTH: 18\n' in text and 'RES2_OUT_CHANNELS: 64\n' in text
    assert "type='ResNet', depth=18" in convert(tmp_path / 'in', tmp_path / 'mm.pth', 'mmdet')
    for file in ('d2.pkl', 'mm.pth'):
        back = load_checkpoint(tmp_path / file).backbone
        assert back.keys() == model.state_dict().keys()
        assert all(torch.equal(v, back[k]) for k, v in model.state_dict().items())


def test_a_bare_resnet18_checkpoint_is_known_by_its_entries(tmp_path: Path) -> None:
    model = timm.create_model('resnet18', num_classes=3)
    torch.save({f'module.{k}': v for k, v in model.state_dict().items()}, tmp_path / 'x.pth')
    convert(tmp_path / 'x.pth', tmp_path / 'out', 'timm')
    again = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert again.num_classes == 3 and all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.fixture(scope='module')
def run(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUTPUT of `pretrain` with a ViT, which stopped in its first epoch."""
    folder = tmp_path_factory.mktemp('vit') / 'run'
    model = [*TINY[:2], '--model', 'vit_tiny_patch16_224', '--model-args', json.dumps(VIT), *TINY[6:]]
    done = run_train(few_digits, *model, '--batch-size', '32', '--max-steps', '1', '--output', folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_that_has_not_finished_goes_out_from_its_checkpoint_with_heads(run: Path, tmp_path: Path) -> None:
    assert not (run / 'backbone').exists()
    convert(run, tmp_path / 'out', 'timm')
    parts = load_checkpoint(run / 'checkpoint.pth')
    again = create_from_folder(tmp_path / 'out')
    assert all(torch.equal(v, parts.backbone[k]) for k, v in again.state_dict().items())
    assert again.pretrained_cfg['input_size'] == [3, 32, 32] and again.pretrained_cfg['crop_pct'] == 1
    assert load_trained(tmp_path / 'out').heads.keys() == parts.heads_state().keys()
    text = convert(run, tmp_path / 'out.onnx', 'onnx')
    assert 'Left out: projector, predictor.' in text


def test_a_checkpoint_without_its_arguments_is_refused_with_the_way_on(run: Path, tmp_path: Path) -> None:
    os.link(run / 'checkpoint.pth', tmp_path / 'x.pth')
    with pytest.raises(ValueError, match=r"fill none of .*put the run's args.json beside it") as error:
        convert(tmp_path / 'x.pth', tmp_path / 'out', 'timm')
    assert '\n' not in str(error.value)


def test_a_folder_holds_one_network_so_that_it_has_no_branches(tmp_path: Path) -> None:
    export(tmp_path / 'in', 'resnet18', NARROW)
    with pytest.raises(ValueError, match='--branch teacher: .* is a folder'):
        convert(tmp_path / 'in', tmp_path / 'out', 'timm', branch='teacher')


def test_a_shortcut_is_renamed_only_where_a_resnet_has_it() -> None:
    model = timm.create_model('ghostnet_050', num_classes=0)
    state = {f'backbone.{k}': v for k, v in model.state_dict().items()}
    state |= {'projector.0.weight': torch.ones(1), 'predictor.0.weight': torch.ones(1)}
    assert recognize(state).backbone.keys() == model.state_dict().keys()

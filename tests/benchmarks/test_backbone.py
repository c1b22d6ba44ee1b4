"""A foreign checkpoint computes in our networks what it computed in the code that wrote it."""
import json
from pathlib import Path

import pytest
import timm
import torch
from cifar_of_others import WRITERS, cifar_resnet, pixels, prefixed, write_lightly, write_solo
from safetensors.torch import save_file
from torch import nn

from simsiam_models import create_simsiam
from simsiam_models.benchmarks.backbone import load_backbone
from simsiam_models.cli import main

pytestmark = pytest.mark.usefixtures('one_thread')
CIFAR = 'simsiam_resnet18_cifar'


@pytest.mark.parametrize('who', WRITERS)
@torch.no_grad()
def test_a_cifar_file_of_others_has_their_features_and_heads(who: str, tmp_path: Path) -> None:
    write, widths = WRITERS[who]
    backbone, projector, predictor = write(tmp_path / 'x.ckpt')
    overlay = dict(pretrained_cfg_overlay=dict(file=str(tmp_path / 'x.ckpt')))
    f = backbone(pixels())
    z = projector(f)
    p = predictor(z)
    assert f.std() > 0.05 and z.std() > 0.05
    torch.testing.assert_close(load_backbone(str(tmp_path / 'x.ckpt')).model(pixels()), f, atol=1e-5, rtol=1e-4)
    timm_model = timm.create_model(CIFAR, pretrained=True, **overlay).eval()
    torch.testing.assert_close(timm_model(pixels()), f, atol=1e-5, rtol=1e-4)
    model = create_simsiam(CIFAR, pretrained=True, **overlay, **widths).eval()
    p1, _, z1, _ = model(pixels(), pixels())
    torch.testing.assert_close(z1, z, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(p1, p, atol=1e-4, rtol=1e-4)


def test_a_stem_of_others_changes_the_features_that_our_own_would_give(tmp_path: Path) -> None:
    """Otherwise the test above could not fail."""
    for write in (write_solo, write_lightly):
        backbone, *_ = write(tmp_path / 'x.ckpt')
        ours = timm.create_model(CIFAR).eval()
        ours.load_state_dict(load_backbone(str(tmp_path / 'x.ckpt')).model.state_dict())
        with torch.no_grad():
            f = backbone(pixels())
            assert ((ours(pixels()) - f).abs().max() / f.std()).item() > 0.2


@pytest.mark.parametrize('layers', [(1, 1, 1, 1), (3, 4, 6, 3)])
def test_lightly_s_shallower_and_deeper_resnets_load(layers: tuple[int, ...], tmp_path: Path) -> None:
    backbone, *_ = write_lightly(tmp_path / 'x.ckpt', layers)
    found = load_backbone(str(tmp_path / 'x.ckpt'))
    with torch.no_grad():
        torch.testing.assert_close(found.model(pixels()), backbone(pixels()), atol=1e-4, rtol=1e-4)
    assert found.architecture == CIFAR and found.args == {'layers': list(layers), 'stem_relu': False}


def test_a_stem_for_small_images_fits_no_resnet50(tmp_path: Path) -> None:
    write_solo(tmp_path / 'x.ckpt')
    with pytest.raises(RuntimeError, match=CIFAR):
        timm.create_model(
            'simsiam_resnet50', pretrained=True, block=timm.models.resnet.BasicBlock, layers=(2, 2, 2, 2),
            pretrained_cfg_overlay=dict(file=str(tmp_path / 'x.ckpt')))


def test_the_choice_of_a_network_is_a_flag(few_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    student, teacher = cifar_resnet(), cifar_resnet()
    nn.init.ones_(teacher.bn1.weight)
    file = tmp_path / 'dino.pth'
    torch.save({'student': prefixed('module.backbone.', student), 'teacher': prefixed('backbone.', teacher)}, file)
    with pytest.raises(ValueError, match='student and teacher: choose one'):
        load_backbone(str(file))
    for name, m in (('student', student), ('teacher', teacher)):
        assert torch.equal(load_backbone(str(file), branch=name).model.bn1.weight, m.bn1.weight)
        model = timm.create_model(CIFAR, pretrained=True, branch=name, pretrained_cfg_overlay=dict(file=str(file)))
        assert torch.equal(model.bn1.weight, m.bn1.weight)
    with pytest.raises(ValueError, match='--branch teacher'):
        load_backbone('resnet10t:random', branch='teacher')
    args = ['embed', str(few_digits), '--model', str(file), '--image-size', '32', '--out', str(tmp_path / 'x.npz')]
    args += ['--cache', str(tmp_path / 'cache'), '--device', 'cpu']
    assert main(args) == 1 and 'choose one' in capsys.readouterr().err
    assert main([*args, '--branch', 'teacher']) == 0 and (tmp_path / 'x.npz').exists()
    assert main(['convert', str(file), str(tmp_path / 'out'), '--to', 'timm', '--branch', 'teacher']) == 0
    converted = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in converted.state_dict().items())


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
def test_a_file_is_what_its_contents_are(suffix: str, tmp_path: Path) -> None:
    model = timm.create_model('resnet18', num_classes=0)
    torch.save(model.state_dict(), tmp_path / f'torch{suffix}')
    save_file(model.state_dict(), tmp_path / f'safe{suffix}')
    digests = {load_backbone(str(tmp_path / f'{name}{suffix}')).digest for name in ('torch', 'safe')}
    assert len(digests) == 1


def test_the_arguments_of_a_run_beside_its_checkpoint_are_used(tmp_path: Path) -> None:
    args = {'layers': [1, 1, 1, 1], 'channels': [8, 8, 8, 8], 'output_stride': 16}
    model = timm.create_model('resnet18', num_classes=0, **args)
    torch.save({'model': prefixed('backbone.', model)}, tmp_path / 'checkpoint.pth')
    (tmp_path / 'args.json').write_text(json.dumps({'model': 'resnet18.a1_in1k', 'model_args': args}))
    backbone = load_backbone(str(tmp_path))
    assert (backbone.architecture, backbone.args) == ('resnet18', args)
    with torch.no_grad():
        assert backbone.model.forward_features(pixels()).shape[-1] == 2

"""SimSiam compared with a second derivation from the paper's formulas, in float64."""
import copy
import math
from pathlib import Path

import pytest
import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn

from simsiam_models import SimSiam, create_simsiam, simsiam_loss
from simsiam_models.simsiam import build_predictor, build_projector
from simsiam_models.training.recipes import Recipe
from simsiam_models.training.schedule import lr_at, make_optimizer, set_lr
from simsiam_models.weights.export import export_backbone


def test_parameter_counts_are_those_of_the_paper():
    model = create_simsiam()
    assert sum(p.numel() for p in model.backbone.parameters()) == 23_508_032
    assert sum(p.numel() for p in model.parameters()) == 38_199_360


def test_heads_have_the_released_layout():
    p, h = build_projector(2048), build_predictor()
    assert [type(m) for m in p] == [
        nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d]
    assert not p[7].affine and all(p[i].bias is None for i in (0, 3, 6))
    assert [type(m) for m in h] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert h[0].bias is None and h[3].bias is not None
    assert (h[0].out_features, h[3].out_features) == (512, 2048)
    assert [m.out_features for m in build_projector(512, 2048, 2) if isinstance(m, nn.Linear)] == [2048, 2048]


def test_residual_blocks_start_at_zero():
    backbone = create_simsiam(dim=16, pred_dim=4).backbone
    stages = [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]
    assert all(block.bn3.weight.abs().max() == 0 for stage in stages for block in stage)


@pytest.mark.parametrize('name', ['mobilenetv3_small_050', 'vit_tiny_patch16_224', 'convnext_atto', 'vgg11'])
def test_any_timm_backbone_works(name: str):
    kwargs = {'img_size': 64} if name.startswith('vit') else {}
    model = create_simsiam(name, dim=16, pred_dim=4, **kwargs)
    x = torch.randn(2, 3, 64, 64)
    p1, p2, z1, z2 = model(x, x.flip(-1))
    assert p1.shape == p2.shape == z1.shape == z2.shape == (2, 16)
    assert p1.requires_grad and not z1.requires_grad and not z2.requires_grad


@pytest.mark.parametrize('kwargs, words', [
    (dict(num_classes=10), 'num_classes=10'), (dict(proj_layers=0), 'proj_layers=0')])
def test_wrong_arguments_are_named(kwargs: dict, words: str):
    with pytest.raises(ValueError, match=words):
        create_simsiam('resnet18', **kwargs)


def test_unpooled_features_are_refused():
    model = create_simsiam('resnet18', dim=8, pred_dim=2, global_pool='')
    with pytest.raises(ValueError, match='global_pool'):
        model(torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32))


def test_a_backbone_with_a_classifier_is_refused():
    with pytest.raises(ValueError, match='num_classes=0'):
        SimSiam(timm.create_model('resnet18'))


def test_loss_of_known_vectors():
    e1, e2 = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    assert simsiam_loss(e1, e1, e1, e1) == -1
    assert simsiam_loss(e1, e2, e2, e1) == 0.5 * (0 + 0) - 0.5 * (1 + 1) * 1  # p1 with z2, p2 with z1: both parallel
    assert simsiam_loss(e1, e2, e1, e2) == 0
    assert simsiam_loss(e1, -e1, e1, e1) == 0


# ---- one training step, derived independently: every layer as a formula on a dict of tensors

def batchnorm(x: Tensor, t: dict, name: str, momentum: float = 0.1, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * gamma + beta over all axes but the channels; running statistics in place."""
    dims = [d for d in range(x.ndim) if d != 1]
    shape = [1, -1] + [1] * (x.ndim - 2)
    n = x.numel() / x.shape[1]
    mean = x.sum(dims) / n
    var = ((x - mean.view(shape)) ** 2).sum(dims) / n
    t[f'{name}.running_mean'] = (1 - momentum) * t[f'{name}.running_mean'] + momentum * mean.detach()
    t[f'{name}.running_var'] = (1 - momentum) * t[f'{name}.running_var'] + momentum * var.detach() * n / (n - 1)
    t[f'{name}.num_batches_tracked'] = t[f'{name}.num_batches_tracked'] + 1
    y = (x - mean.view(shape)) / (var.view(shape) + eps).sqrt()
    if f'{name}.weight' in t:
        y = y * t[f'{name}.weight'].view(shape) + t[f'{name}.bias'].view(shape)
    return y


def conv(x: Tensor, w: Tensor, stride: int = 1) -> Tensor:
    """Cross-correlation as a sum of products over unfolded patches."""
    k = w.shape[-1]
    columns = torch.nn.functional.unfold(x, k, padding=k // 2, stride=stride)  # (B, C k k, L)
    side = math.isqrt(columns.shape[-1])
    return (w.flatten(1) @ columns).view(len(x), len(w), side, side)


def relu(x: Tensor) -> Tensor:
    return x * (x > 0)


def encode(x: Tensor, t: dict) -> Tensor:
    """timm's resnet18 with one block a stage, average pool, then the projector."""
    x = relu(batchnorm(conv(x, t['backbone.conv1.weight'], 2), t, 'backbone.bn1'))
    x = torch.nn.functional.max_pool2d(x, 3, 2, 1)
    for stage in range(1, 5):
        b, stride = f'backbone.layer{stage}.0', 1 if stage == 1 else 2
        y = relu(batchnorm(conv(x, t[f'{b}.conv1.weight'], stride), t, f'{b}.bn1'))
        y = batchnorm(conv(y, t[f'{b}.conv2.weight']), t, f'{b}.bn2')
        if f'{b}.downsample.0.weight' in t:
            x = batchnorm(conv(x, t[f'{b}.downsample.0.weight'], stride), t, f'{b}.downsample.1')
        x = relu(y + x)
    f = x.mean((2, 3))
    f = relu(batchnorm(f @ t['projector.0.weight'].T, t, 'projector.1'))
    f = relu(batchnorm(f @ t['projector.3.weight'].T, t, 'projector.4'))
    return batchnorm(f @ t['projector.6.weight'].T, t, 'projector.7')


def predict(z: Tensor, t: dict) -> Tensor:
    h = relu(batchnorm(z @ t['predictor.0.weight'].T, t, 'predictor.1'))
    return h @ t['predictor.3.weight'].T + t['predictor.3.bias']


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    z = z.detach()
    return -((p * z).sum(1) / ((p * p).sum(1).sqrt() * (z * z).sum(1).sqrt())).mean()


def make_case() -> tuple[SimSiam, Tensor, Tensor]:
    torch.manual_seed(0)
    model = create_simsiam(
        'resnet18', dim=24, pred_dim=6, layers=(1, 1, 1, 1), channels=(64, 8, 8, 8)).double()
    for p in model.parameters():  # zero gammas would hide half of the gradients
        if p.ndim == 1:
            p.data += 0.1 * torch.randn_like(p)
    return model, torch.randn(8, 3, 32, 32).double(), torch.randn(8, 3, 32, 32).double()


def test_two_steps_equal_the_formulas_to_1e_8():
    torch.set_num_threads(1)
    model, x1, x2 = make_case()
    recipe = Recipe('', batch_size=512, lr=0.5, epochs=10)  # 1.0 for all; then the backbone's decays
    optimizer = make_optimizer(model, recipe)
    t = {k: v.detach().clone() for k, v in model.state_dict().items()}
    trained = [n for n, _ in model.named_parameters()]
    velocity: dict[str, Tensor] = {}
    for epoch in range(2):
        set_lr(optimizer, epoch, recipe)
        loss = simsiam_loss(*model(x1, x2))
        optimizer.zero_grad()
        loss.backward()

        for n in trained:
            t[n] = t[n].detach().requires_grad_()
        z1, z2 = encode(x1, t), encode(x2, t)
        p1, p2 = predict(z1, t), predict(z2, t)
        expected = negative_cosine(p1, z2) / 2 + negative_cosine(p2, z1) / 2
        gradients = dict(zip(trained, torch.autograd.grad(expected, [t[n] for n in trained]), strict=True))

        assert abs(loss.item() - expected.item()) < 1e-8
        for n, p in model.named_parameters():
            assert (p.grad - gradients[n]).abs().max() < 1e-8, n

        optimizer.step()
        for n in trained:
            g = gradients[n] + 1e-4 * t[n].detach()  # weight decay on everything
            velocity[n] = 0.9 * velocity[n] + g if n in velocity else g
            lr = 1.0 if n.startswith('predictor') else 0.5 * (1 + math.cos(math.pi * epoch / 10))
            t[n] = t[n].detach() - lr * velocity[n]
        for n, value in model.state_dict().items():
            assert (value - t[n]).abs().max() < 1e-8, n
    assert t['backbone.bn1.num_batches_tracked'] == 4  # two views a step


def test_gradients_equal_finite_differences():
    """The stop-gradient included: z is held fixed while p is moved."""
    torch.set_num_threads(1)
    model, x1, x2 = make_case()
    weights = copy.deepcopy(model.state_dict())
    p1, p2, z1, z2 = model(x1, x2)
    simsiam_loss(p1, p2, z1, z2).backward()
    for name in ('backbone.layer2.0.conv1.weight', 'projector.3.weight', 'predictor.0.weight'):
        parameter = model.get_parameter(name)
        analytic, values = parameter.grad.flatten()[5].item(), []
        for step in (1e-5, -1e-5):
            model.load_state_dict(weights)
            parameter.data.view(-1)[5] += step
            with torch.no_grad():
                q1, q2, _, _ = model(x1, x2)
                values.append(simsiam_loss(q1, q2, z1, z2).item())
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(analytic, rel=1e-4, abs=1e-9)


def test_cosine_schedule_is_the_published_one():
    recipe = Recipe('', batch_size=512)
    assert lr_at(0, recipe) == pytest.approx(0.1)
    assert lr_at(50, recipe) == pytest.approx(0.05)
    assert lr_at(99, recipe) == pytest.approx(0.1 * 2.467e-4, rel=1e-3)


def test_warmup_rises_to_the_full_rate():
    recipe = Recipe('', batch_size=1024, warmup_epochs=10)
    assert [lr_at(e, recipe) for e in (0, 4, 9, 10)] == pytest.approx([0.02, 0.1, 0.2, 0.2])


TINY = {'layers': (1, 1, 1, 1), 'channels': (8, 8, 8, 8)}


@pytest.mark.parametrize('name', ['simsiam_resnet50', 'simsiam_resnet18_cifar', 'resnet18', 'resnet26'])
@pytest.mark.parametrize('how', ['file', 'state_dict'])
def test_backbone_and_heads_of_a_file_fill_any_timm_model(name: str, how: str, tmp_path: Path):
    torch.manual_seed(3)
    widths = dict(dim=16, pred_dim=4, proj_layers=2, **TINY)
    model = create_simsiam(name, **widths)
    contents = {'model': {f'module.{k}': v for k, v in model.state_dict().items()}, 'epoch': 3}
    torch.save(contents, tmp_path / 'x.pth')
    overlay = dict(file=str(tmp_path / 'x.pth')) if how == 'file' else dict(state_dict=contents)
    again = create_simsiam(name, pretrained=True, pretrained_cfg_overlay=overlay, **widths)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('name', ['simsiam_resnet50', 'simsiam_resnet18_cifar', 'resnet18'])
@pytest.mark.parametrize('lacking', [('projector.', 'predictor.'), ('predictor.',)])
def test_a_file_without_both_heads_is_refused(name: str, lacking: tuple, tmp_path: Path):
    model = create_simsiam(name, dim=16, pred_dim=4, **TINY)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(lacking)}
    torch.save({'model': state}, tmp_path / 'x.pth')
    for overlay in (dict(file=str(tmp_path / 'x.pth')), dict(state_dict=state)):
        with pytest.raises(ValueError, match='holds no projector and predictor'):
            create_simsiam(name, pretrained=True, dim=16, pred_dim=4, pretrained_cfg_overlay=overlay, **TINY)


def test_an_exported_folder_without_heads_is_refused(tmp_path: Path):
    export_backbone(create_simsiam('resnet18', dim=16, pred_dim=4, **TINY).backbone, tmp_path, 'resnet18', TINY)
    with pytest.raises(ValueError, match=r'holds no heads\.safetensors'):
        create_simsiam(f'local-dir:{tmp_path}', pretrained=True, dim=16, pred_dim=4)
    assert create_simsiam(f'local-dir:{tmp_path}', dim=16, pred_dim=4).backbone.num_features == 8


def test_a_last_norm_with_scale_and_shift_is_kept(tmp_path: Path):
    model = create_simsiam('resnet18', dim=16, pred_dim=4, **TINY)
    model.projector[7] = torch.nn.BatchNorm1d(16)
    torch.nn.init.normal_(model.projector[7].weight)
    torch.save({'model': model.state_dict()}, tmp_path / 'x.pth')
    again = create_simsiam(
        'resnet18', pretrained=True, dim=16, pred_dim=4, pretrained_cfg_overlay=dict(file=str(tmp_path / 'x.pth')),
        **TINY)
    x = torch.randn(2, 3, 64, 64)
    for a, b in zip(model.eval()(x, x), again.eval()(x, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('heads', [True, False])
def test_a_file_in_timm_s_configuration_object_counts_as_well(heads: bool, tmp_path: Path):
    model = create_simsiam('resnet18', dim=16, pred_dim=4, **TINY)
    torch.save({'model': (model if heads else model.backbone).state_dict()}, tmp_path / 'x.pth')
    cfg = PretrainedCfg(file=str(tmp_path / 'x.pth'), num_classes=0)
    if not heads:
        with pytest.raises(ValueError, match='holds no projector and predictor'):
            create_simsiam('resnet18', pretrained=True, dim=16, pred_dim=4, pretrained_cfg=cfg, **TINY)
        return
    again = create_simsiam('resnet18', pretrained=True, dim=16, pred_dim=4, pretrained_cfg=cfg, **TINY)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_heads_are_never_those_of_other_weights_than_the_backbone(tmp_path: Path):
    torch.save(create_simsiam('simsiam_resnet50', dim=16, pred_dim=4, **TINY).backbone.state_dict(), tmp_path / 'x.pth')
    with pytest.raises(ValueError, match=r'checkpoint_path=.*x\.pth.* pass pretrained_cfg_overlay'):
        create_simsiam(pretrained=True, dim=16, pred_dim=4, checkpoint_path=str(tmp_path / 'x.pth'), **TINY)

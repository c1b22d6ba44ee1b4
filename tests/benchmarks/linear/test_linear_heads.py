"""The classifiers of the linear protocols, their optimizers and learning rates."""
import math

import numpy as np
import pytest
import torch
from torch import nn

from simsiam_models.benchmarks.backbone import compute_maps, load_backbone, pool_stages
from simsiam_models.benchmarks.linear.heads import Heads, MmselfsupLars, compute_lr, make_optimizer
from simsiam_models.benchmarks.metrics import right_within
from simsiam_models.benchmarks.protocols import LINEAR

pytestmark = pytest.mark.usefixtures('one_thread')


def test_the_cosine_goes_by_epoch_and_steps_fall_after_theirs():
    fair, mhead = LINEAR['fair'], LINEAR['mhead_places205']
    for epoch in range(90):
        assert compute_lr(epoch, fair) == pytest.approx(1.6 * 0.5 * (1 + math.cos(math.pi * epoch / 90)), rel=1e-12)
    rates = [compute_lr(epoch, mhead) for epoch in range(28)]
    assert rates == pytest.approx([1e-2] * 7 + [1e-3] * 7 + [1e-4] * 7 + [1e-5] * 7)


def _walk(make, steps=6, rate=lambda t: 1.6):
    """A weight and a zero bias along fixed gradients: ours, and what `formula(w, g, buffer, lr)` makes of them."""
    rng = np.random.default_rng(0)
    head = nn.Linear(7, 3).double()
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(rng.normal(0, 0.01, (3, 7))))
        head.bias.zero_()
    gradients = [[rng.normal(0, 0.1, (3, 7)), rng.normal(0, 0.1, 3)] for _ in range(steps)]
    optimizer = make(head)
    path = [[p.detach().numpy().copy() for p in head.parameters()]]
    for t, gs in enumerate(gradients):
        for group in optimizer.param_groups:
            group['lr'] = rate(t)
        for p, g in zip(head.parameters(), gs, strict=True):
            p.grad = torch.from_numpy(g)
        optimizer.step()
        path.append([p.detach().numpy().copy() for p in head.parameters()])
    return gradients, path


def _follow_formula(gradients, start, inside: bool, rate, trust=0.001, momentum=0.9):
    w, buffers = [x.copy() for x in start], [0.0, 0.0]
    for t, gs in enumerate(gradients):
        for i, g in enumerate(gs):
            wn, gn = np.sqrt((w[i] ** 2).sum()), np.sqrt((g ** 2).sum())
            r = trust * wn / (gn + 1e-8) if wn > 0 and gn > 0 else 1.0
            buffers[i] = momentum * buffers[i] + r * g * (rate(t) if inside else 1)
            w[i] = w[i] - buffers[i] * (1 if inside else rate(t))
    return w


def falling(t):
    return 1.6 * 0.5 * (1 + math.cos(math.pi * t / 6))


@pytest.mark.parametrize(('protocol', 'inside'), [('fair', False), ('mmselfsup', True)])
def test_a_step_follows_the_formula(protocol, inside):
    gradients, path = _walk(lambda head: make_optimizer(head, LINEAR[protocol]), rate=falling)
    for ours, hand in zip(path[-1], _follow_formula(gradients, path[0], inside, falling), strict=True):
        np.testing.assert_allclose(ours, hand, rtol=1e-9)


@pytest.mark.parametrize('protocol', ['fair', 'mmselfsup'])
def test_a_zero_bias_takes_its_first_step_at_the_full_rate(protocol):
    gradients, path = _walk(lambda head: make_optimizer(head, LINEAR[protocol]))
    np.testing.assert_allclose(path[1][1], -1.6 * gradients[0][1], rtol=1e-12)
    change = np.linalg.norm(path[1][0] - path[0][0])  # the weights' is 0.001 of their norm, times the rate
    assert change == pytest.approx(1.6 * 0.001 * np.linalg.norm(path[0][0]), rel=1e-6)


def test_both_kinds_of_lars_agree_at_a_constant_rate_only():
    def ends(rate):
        return [
            _walk(lambda head, p=p: make_optimizer(head, LINEAR[p]), rate=rate)[1][-1]
            for p in ('fair', 'mmselfsup')]
    a, b = ends(lambda t: 1.6)
    np.testing.assert_allclose(a[0], b[0], rtol=1e-9)
    a, b = ends(falling)
    assert np.abs(a[0] - b[0]).max() / np.abs(a[0]).max() > 1e-4


def test_lars_with_weight_decay_follows_the_formula():
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = MmselfsupLars([w], lr=2.0, momentum=0.5, weight_decay=0.1, trust=0.01)
    w.grad = torch.tensor([0.6, 0.8], dtype=torch.float64)
    optimizer.step()  # ratio 0.01 * 5 / (1 + 0.1 * 5); g + wd w = (0.9, 1.2)
    np.testing.assert_allclose(w.detach(), [3 - 2 * 0.05 / 1.5 * 0.9, 4 - 2 * 0.05 / 1.5 * 1.2], rtol=1e-7)


def test_the_five_feature_maps_of_resnet50_have_the_published_shapes():
    backbone = load_backbone('simsiam_resnet50:random')
    with torch.no_grad():
        maps = compute_maps(backbone, torch.zeros(1, 3, 224, 224))
        flat = pool_stages(maps)
    assert [x.shape[1] for x in flat] == [9216, 9216, 8192, 9216, 8192]
    assert [m.shape[1] for m in maps] == [64, 256, 512, 1024, 2048]


def test_heads_normalise_channels_of_the_pooled_map_then_flatten():
    torch.manual_seed(0)
    maps = [torch.randn(6, 3, 4, 4) * 5 + 2, torch.randn(6, 8, 2, 2)]
    heads = Heads([(3, 16), (8, 4)], 10, True, 0.01, seed=0)
    scores = heads([m.flatten(1) for m in maps])
    for m, y, head, linear_ in zip(maps, scores, heads.norms, heads.linears, strict=True):
        oracle = nn.BatchNorm2d(m.shape[1], affine=False, momentum=0.1)
        torch.testing.assert_close(y, linear_(oracle(m).flatten(1)))
        torch.testing.assert_close(head.running_mean, oracle.running_mean)
        torch.testing.assert_close(head.running_var, oracle.running_var)
    assert not [n for n, _ in heads.named_parameters() if n.startswith('norms')]


def test_classifiers_start_at_0_01_and_biases_at_zero():
    (only,) = Heads([(2048, 1)], 1000, False, 0.01, seed=0).linears
    assert float(only.weight.detach().std()) == pytest.approx(0.01, rel=5e-3)
    assert abs(float(only.weight.detach().mean())) < 1e-4 and not only.bias.any()
    assert torch.equal(only.weight, Heads([(2048, 1)], 1000, False, 0.01, seed=0).linears[0].weight)


def test_a_tie_counts_as_wrong_and_so_does_nan():
    scores = torch.tensor([[2.0, 1, 0], [1, 1, 0], [0, 0, 0], [float('nan'), 1, 0], [1, float('nan'), 0]])
    right = [[int(right_within(s[None], torch.tensor([0]), k)) for k in (1, 2, 3)] for s in scores]
    assert right == [[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0], [0, 1, 1]]


def test_top_k_equals_topk_without_ties():
    scores, labels = torch.randn(500, 12, generator=torch.Generator().manual_seed(0)), torch.arange(500) % 12
    for k in (1, 5):
        oracle = (scores.topk(k).indices == labels[:, None]).any(1).sum()
        assert right_within(scores, labels, k) == oracle

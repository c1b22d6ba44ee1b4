"""The numbers of a fine-tuning run: defaults by the number of images, and the literal ones of the protocol."""
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from tiny_finetune import parse, semi, settings

from simsiam_models.benchmarks.finetune.settings import fit_batch, resolve_plain, resolve_semi
from simsiam_models.benchmarks.finetune.training import compute_lr_factor, make_optimizer


def test_defaults_follow_the_number_of_images():
    tiny, few, many = (settings(images=n) for n in (100, 400, 100_000))
    assert (tiny.batch_size, tiny.epochs, tiny.patience, tiny.warmup_epochs) == (16, 100, 33, 10)
    assert (few.batch_size, few.epochs, few.lr, few.mixup, few.cutmix) == (32, 84, 2e-3 * (1000 / 1008) ** 0.5, 0, 0)
    assert (many.batch_size, many.epochs, many.patience, many.mixup, many.cutmix) == (64, 30, 10, 0.2, 1.0)
    assert many.lr == pytest.approx(2e-3 * (1000 / (30 * 1562)) ** 0.5)
    flags = ('--epochs', '5', '--batch-size', '8', '--lr', '0.32', '--mixup', '0.1', '--patience', '2')
    given = settings(*flags, images=99)
    assert (given.epochs, given.batch_size, given.mixup, given.patience, given.warmup_epochs) == (5, 8, 0.1, 2, 0)
    assert given.lr == 0.01
    for n, processes, batch in ((8, 1, 8), (100, 6, 12), (100, 32, 32), (1, 1, 2), (100_000, 3, 60)):
        ((_, s),) = resolve_plain(parse('x', '--out', 'y'), n, processes=processes)
        assert s.batch_size == batch
        if n > 1:
            assert fit_batch(s, n, processes, print) == s
    assert fit_batch(settings('--batch-size', '256', images=100), 100, 1, print).lr == pytest.approx(2e-3)


def test_more_than_the_images_in_a_batch_is_said_and_made_smaller():
    said = []
    s = fit_batch(settings('--batch-size', '64', '--lr', '1'), 31, 1, said.append)
    assert s.batch_size == 30 and s.lr == pytest.approx(30 / 256) and '30 is used' in said[0]
    with pytest.raises(ValueError, match='1 training images are too few'):
        fit_batch(settings('--batch-size', '64'), 1, 1, said.append)


def test_each_layers_rate_is_decay_to_the_power_of_its_distance_from_the_last():
    model = timm.create_model('resnet18', num_classes=3)
    s = settings('--layer-decay', '0.5', '--batch-size', '256', '--lr', '0.1')
    optimizer = make_optimizer(model, s)
    scale = {id(p): g['lr_scale'] for g in optimizer.param_groups for p in g['params']}
    decay = {id(p): g['weight_decay'] for g in optimizer.param_groups for p in g['params']}
    order = ['conv1', 'bn1', *(f'layer{i}.{j}' for i in range(1, 5) for j in range(2)), 'fc']
    depth = {name: max(0, i - 1) for i, name in enumerate(order)}  # conv1 and bn1 are the stem
    for name, p in model.named_parameters():
        at = depth['.'.join(name.split('.')[:2 if name.startswith('layer') else 1])]
        assert scale[id(p)] == 0.5 ** (9 - at), name
        assert decay[id(p)] == (0 if p.ndim == 1 else s.weight_decay)
    assert s.lr == 0.1


def test_without_layer_decay_all_rates_are_alike():
    model = timm.create_model('resnet10t', num_classes=3)
    optimizer = make_optimizer(model, settings('--layer-decay', '1'))
    assert {g.get('lr_scale', 1.0) for g in optimizer.param_groups} == {1.0}


def test_the_rate_warms_up_and_falls_as_a_cosine_to_zero():
    s = settings('--epochs', '10', '--warmup-epochs', '2')
    rates = [compute_lr_factor(s, step, 5) for step in range(50)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:], [0.5 * (1 + math.cos(math.pi * i / 40)) for i in range(40)])


# --- the semi-supervised protocol

@pytest.mark.parametrize('share, decay', [('1pct', 5e-4), ('10pct', 1e-4)])
def test_the_numbers_of_the_protocol_are_literal(share: str, decay: float):
    (folder, s), = semi('--lr', '0.1', '--head-multiplier', '100', share=share)
    assert (s.epochs, s.batch_size, s.momentum, s.weight_decay) == (20, 256, 0.9, decay)
    assert (s.lr, s.head_multiplier) == (0.1, 100)
    assert (s.image_size, s.resize, s.crop_scale, s.flip) == (224, 256, (0.08, 1.0), 0.5)
    assert (s.mixup, s.cutmix, s.smoothing, s.ema_decay, s.randaugment, s.erase) == (0, 0, 0, 0, None, 0)
    assert (s.eval_every, s.keep, folder) == (10, 'last', Path('o'))
    rates = [compute_lr_factor(s, 51 * epoch, 51) for epoch in range(20)]
    np.testing.assert_allclose(rates, [1] * 12 + [0.2] * 4 + [0.04] * 4)


def test_the_head_alone_has_the_multiplied_rate_and_everything_decays():
    (_, s), = semi('--lr', '0.01', '--head-multiplier', '10')
    model = timm.create_model('resnet18', num_classes=5)
    optimizer = make_optimizer(model, s)
    assert type(optimizer) is torch.optim.SGD
    body, head = optimizer.param_groups
    assert [id(p) for p in head['params']] == [id(p) for p in model.fc.parameters()]
    assert len(body['params']) + 2 == len(list(model.parameters()))
    assert (body['lr_scale'], head['lr_scale']) == (1, 10)
    assert {(g['momentum'], g['weight_decay'], g['nesterov']) for g in (body, head)} == {(0.9, 5e-4, False)}


def test_the_grid_is_the_nine_pairs_in_folders_of_their_own():
    runs = semi('--grid')
    assert {(s.lr, s.head_multiplier) for _, s in runs} == {
        (lr, m) for lr in (0.1, 0.01, 0.001) for m in (1, 10, 100)}
    assert len({folder for folder, _ in runs}) == 9 and runs[0][0] == Path('o/lr0.1_head1')


@pytest.mark.parametrize('args, said', [
    ([], '--protocol semi_1pct needs --list FILE'), (['--list', 'f', '--grid', '--lr', '1'], '--grid runs all nine'),
    (['--list', 'f', '--lr', '0'], '--lr 0.0: must be above 0'),
    (['--list', 'f', '--head-multiplier', '-1'], '--head-multiplier -1.0'),
    (['--list', 'f', '--head-multiplier', '0'], '--head-multiplier 0.0: must be above 0')])
def test_a_wrong_flag_of_the_protocol_is_one_sentence(args: list[str], said: str):
    with pytest.raises(ValueError, match=said):
        resolve_semi(parse('x', '--out', 'o', '--protocol', 'semi_1pct', *args))

"""The classifier that is trained and exported, and the tables of what it predicts."""
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from cifar_of_others import WRITERS, pixels
from sklearn.metrics import confusion_matrix
from tiny_finetune import ALONE, semi, settings
from torch import nn

from simsiam_models.benchmarks.backbone import load_backbone
from simsiam_models.benchmarks.finetune.model import (
    Classifier,
    find_architecture,
    find_last_layers,
    replace_last_layer,
)
from simsiam_models.benchmarks.finetune.result import (
    count_pairs,
    format_confusion,
    make_confusion_rows,
    measure_classes,
)
from simsiam_models.benchmarks.finetune.training import make_optimizer


@pytest.mark.parametrize('name, kwargs, size', [
    ('test_vit', {}, 160), ('test_vit', {}, 96), ('test_vit', {'img_size': 64}, 64), ('test_vit4', {}, 160),
    ('swinv2_tiny_window8_256', {'embed_dim': 12, 'depths': [1, 1, 1, 1], 'num_heads': [1, 1, 1, 1]}, 256),
    ('deit_tiny_distilled_patch16_224', {'embed_dim': 12, 'depth': 1}, 224), ('test_resnet', {}, 96)])
def test_plain_timm_builds_the_same_network_for_the_same_images(name: str, kwargs: dict, size: int, tmp_path: Path):
    s = settings('--image-size', str(size))
    classifier = Classifier(f'{name}:random', kwargs, ALONE.device, ['a', 'b', 'c'], s, tmp_path)
    model = classifier.model
    classifier.check()
    classifier.export(model.state_dict())
    plain = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert {k: v.shape for k, v in plain.named_buffers()} == {k: v.shape for k, v in model.named_buffers()}
    data = timm.data.resolve_data_config(plain.pretrained_cfg)
    assert data['input_size'] == (3, size, size)
    x = torch.randn(2, *data['input_size'], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), atol=1e-6, rtol=1e-5)
    again = load_backbone(str(tmp_path))
    assert find_architecture(again, {}) == (name, classifier.make_config().get('model_args', {}))


@pytest.mark.parametrize('who', ['solo-learn', 'lightly'])
def test_a_fine_tuned_network_keeps_the_stem_in_its_export(who: str, tmp_path: Path) -> None:
    WRITERS[who][0](tmp_path / 'x.ckpt')
    s = settings('--image-size', '32')
    classifier = Classifier(str(tmp_path / 'x.ckpt'), {}, ALONE.device, ['a', 'b', 'c'], s, tmp_path / 'out')
    (tmp_path / 'out').mkdir()
    classifier.check()
    classifier.export(classifier.model.state_dict())
    again = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(pixels()), classifier.model.eval()(pixels()), atol=1e-5, rtol=1e-4)


def test_what_config_json_builds_is_held_against_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    s = settings('--image-size', '160')
    classifier = Classifier('test_vit:random', {}, ALONE.device, ['a', 'b', 'c'], s, tmp_path)
    config = classifier.make_config()
    monkeypatch.setattr(classifier, 'make_config', lambda: {k: v for k, v in config.items() if k != 'model_args'})
    with pytest.raises(ValueError, match='timm builds another network by this name'):
        classifier.check()


def test_a_new_classifier_is_normal_0_01_with_bias_0_and_everything_trains():
    backbone = load_backbone('resnet18:random')
    replace_last_layer(backbone.model, 500, 3)
    fc = backbone.model.fc
    assert isinstance(fc, nn.Linear) and fc.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert fc.bias.abs().max() == 0 and all(p.requires_grad for p in backbone.model.parameters())
    other = load_backbone('resnet18:random')
    replace_last_layer(other.model, 500, 3)
    assert torch.equal(other.model.fc.weight, fc.weight)


@pytest.mark.parametrize('name, kwargs', [
    ('deit_tiny_distilled_patch16_224', {'embed_dim': 12, 'depth': 1}), ('levit_128s', {}), ('resnet10t', {})])
def test_a_network_may_have_two_classifiers_or_one_without_bias(
    name: str, kwargs: dict, monkeypatch: pytest.MonkeyPatch,
):
    model = timm.create_model(name, num_classes=0, **kwargs)
    if name == 'resnet10t':
        monkeypatch.setattr(model, 'reset_classifier', lambda n: setattr(model, 'fc', nn.Linear(512, n, bias=False)))
    replace_last_layer(model, 400, 0)
    last = [m for m in find_last_layers(model).modules() if isinstance(m, nn.Linear)]
    assert len(last) == (1 if name == 'resnet10t' else 2)
    for layer in last:
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert layer.bias is None or layer.bias.abs().max() == 0
    (_, s), = semi('--lr', '0.01')
    _, head = make_optimizer(model, s).param_groups
    assert {id(m.weight) for m in last} <= {id(p) for p in head['params']}


def test_a_small_matrix_is_printed_and_a_class_without_images_has_no_accuracy():
    pairs = {(0, 0): 3, (0, 1): 1}
    rows = measure_classes(pairs, ['cat', 'dog'])
    assert [r['accuracy'] for r in rows] == [75.0, None]
    assert format_confusion(pairs, rows).splitlines()[1:] == [
        '0 cat                 3   1  75.0 %', '1 dog                 0   0    none']


def test_confusion_counts_labels_in_rows():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 7, 200), rng.integers(0, 7, 200)
    pairs = count_pairs(labels, torch.as_tensor(predicted))
    expected = confusion_matrix(labels, predicted)
    np.testing.assert_array_equal([[pairs.get((i, j), 0) for j in range(7)] for i in range(7)], expected)
    assert sum(pairs.values()) == 200 and all(pairs.values())
    rows = make_confusion_rows(pairs, [f'c{i}' for i in range(7)])
    assert rows[0][1:] == [r[0] for r in rows[1:]] == [f'c{i}' for i in range(7)]
    np.testing.assert_array_equal([r[1:] for r in rows[1:]], expected)


def test_of_more_than_a_thousand_classes_the_pairs_that_occur_are_counted_and_written():
    classes = [f'c{i}' for i in range(100_000)]
    pairs = count_pairs(np.array([0, 99_999, 0], np.int32), torch.tensor([0, 5, 0]))
    assert make_confusion_rows(pairs, classes) == [
        ['label', 'predicted', 'images'], ['c0', 'c0', 2], ['c99999', 'c5', 1]]
    rows = measure_classes(pairs, classes)
    assert rows[0] == {'class': 'c0', 'images': 2, 'right': 2, 'accuracy': 100.0}
    assert rows[99_999] == {'class': 'c99999', 'images': 1, 'right': 0, 'accuracy': 0.0}

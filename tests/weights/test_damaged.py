"""`weights verify` on damaged files: a line that says FAIL or one sentence, never a traceback, and never a pass."""
import json
import os
import random
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from simsiam_models import create_simsiam
from simsiam_models.cli import main
from simsiam_models.weights import tensorfile
from simsiam_models.weights.export import export_backbone
from simsiam_models.weights.verify import compare_fingerprints

ARGS = {'layers': [1, 1, 1, 1], 'channels': [4, 4, 4, 4]}


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('export')
    model = create_simsiam('resnet18', dim=8, pred_dim=4, **ARGS)
    export_backbone(model.backbone, path, 'resnet18', ARGS)
    tensorfile.write(path / 'heads.safetensors', {
        k: v for k, v in model.state_dict().items() if not k.startswith('backbone.')})
    return path


def damage(data: bytes, rng: random.Random, i: int) -> bytes:
    """Cuts, lengthens, or changes bytes of the length, the header or the numbers."""
    changed, end = bytearray(data), 8 + int.from_bytes(data[:8], 'little')
    if i % 5 == 0:
        return data[:rng.randrange(len(data))]
    if i % 5 == 1:
        return data + bytes(rng.randrange(1, 9))
    at = rng.randrange(*((0, 8), (8, end), (end, len(data)))[i % 3])
    changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize('part', ['model.safetensors', 'heads.safetensors'])
def test_damage_of_any_kind_is_a_failure_in_one_sentence(
        part: str, folder: Path, capsys: pytest.CaptureFixture) -> None:
    good, rng = (folder / part).read_bytes(), random.Random(0)
    for i in range(120):
        (folder / part).write_bytes(damage(good, rng, i))
        for target in (folder, folder / part)[:1 + (part == 'model.safetensors')]:
            assert main(['weights', 'verify', str(target)]) == 1, i
            out, err = capsys.readouterr()
            assert ('FAIL' in out) != (err.count('\n') == 1), (i, out, err)
            assert part in out + err, (i, out, err)
            assert err or 'it is damaged' in out or i % 3 < 2, (i, out)  # the hash shows a changed number
    (folder / part).write_bytes(good)


@pytest.mark.parametrize('name', ['model.safetensors', 'heads.safetensors', 'config.json', 'fingerprint.json'])
def test_a_fifo_or_nonsense_in_the_place_of_a_file_ends_verify(
        name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = timm.create_model('simsiam_resnet50', layers=(1, 1, 1, 1)) if name == 'config.json' else timm.create_model(
        'simsiam_resnet50')
    tensorfile.write(tmp_path / 'model.safetensors', model.state_dict())
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert main(['weights', 'verify', str(tmp_path)]) == 1
    assert 'a FIFO' in capsys.readouterr().err
    (tmp_path / name).unlink()
    (tmp_path / name).write_text('{')
    assert main(['weights', 'verify', str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert name in err and err.count('\n') == 1


def test_a_file_of_numbers_that_pass_for_weights_of_odd_types_is_one_sentence(
        tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = timm.create_model('resnet18', num_classes=0, **ARGS).state_dict()
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.bool, torch.int8):
        save_file({k: v.to(dtype) for k, v in state.items()}, tmp_path / 'x.safetensors')
        assert main(['weights', 'verify', str(tmp_path / 'x.safetensors')]) == 1
        out, err = capsys.readouterr()
        assert 'FAIL' in out or err.count('\n') == 1


@pytest.mark.parametrize('text', [
    '{}', '{"mean": "a", "std": 1, "outputs": []}', '{"mean": 1, "std": null, "outputs": 5}',
    '{"mean": 1, "std": 1, "outputs": {"a": 1}}', '{"mean": [1], "std": 1, "outputs": [[1]]}'])
def test_a_fingerprint_of_another_form_fails_and_raises_nothing(text: str) -> None:
    good = {'mean': 0.0, 'std': 1.0, 'outputs': [0.0] * 16}
    assert compare_fingerprints(good, good) == 0
    assert compare_fingerprints(json.loads(text), good) == compare_fingerprints(good, json.loads(text)) == float('inf')

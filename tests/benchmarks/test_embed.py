"""`simsiam embed`: what it refuses, and how its flags are written; test_features has what it writes."""
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest

from simsiam_models import cli
from simsiam_models.benchmarks import embed


def _command(data: Path, out: Path, *more: str) -> list[str]:
    return [
        'embed', str(data), '--model', 'resnet10t:random', '--image-size', '32', '--device', 'cpu', '--cache',
        str(out.parent / 'cache'), *more]


@pytest.mark.parametrize('flag', ['--out', '--output'])
def test_both_spellings_of_the_output_are_one(flag, few_digits, tmp_path, capsys):
    out = tmp_path / 'x.npz'
    assert cli.main(_command(few_digits, out, flag, str(out))) == 0
    assert len(np.load(out)['avgpool']) == 64
    assert cli.main(_command(few_digits, out, flag, str(tmp_path / 'x.txt'))) == 1
    assert capsys.readouterr().err.endswith(
        f'simsiam: --output {tmp_path / "x.txt"}: must be a folder, or a file that ends in .npz, .npy, .csv, .parquet, '
        '.safetensors\n')


def test_a_part_is_found_under_any_usual_name_and_in_a_folder_around_it(few_digits, tmp_path, capsys):
    for part in ('Train', 'Valid'):
        shutil.copytree(few_digits, tmp_path / 'set' / 'photos' / part)
    shutil.rmtree(tmp_path / 'set' / 'photos' / 'Train' / '3')
    out = tmp_path / 'x.npz'
    assert cli.main(_command(tmp_path / 'set', out, '--out', str(out))) == 0
    assert len(np.load(out)['avgpool']) == 64 - len(list((few_digits / '3').iterdir()))
    assert cli.main(_command(tmp_path / 'set', out, '--out', str(out), '--part', 'val')) == 1
    valid = tmp_path / 'set' / 'photos' / 'Valid'
    said = f"{valid} cannot be the validation part of {tmp_path / 'set'}: not the 9 classes of"
    assert said in capsys.readouterr().err
    shutil.rmtree(valid / '3')
    assert cli.main(_command(tmp_path / 'set', out, '--out', str(out), '--part', 'val')) == 0


def test_too_few_images_for_a_picture_are_found_before_the_features_are_made(few_digits, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    out = tmp_path / 'x.npz'
    n = len(list((few_digits / '3').iterdir()))
    assert n < 31
    assert cli.main(_command(few_digits / '3', out, '--out', str(out), '--tsne')) == 1
    assert f'simsiam: {n} images are too few: a t-SNE of perplexity 30 needs more than that' in capsys.readouterr().err
    assert not out.exists() and not (tmp_path / 'cache').exists()


@pytest.mark.parametrize('missing', [['scikit-learn'], ['matplotlib'], ['scikit-learn', 'matplotlib']])
def test_what_a_picture_needs_is_named_as_the_index_has_it(missing, monkeypatch):
    modules = {'scikit-learn': 'sklearn', 'matplotlib': 'matplotlib'}
    gone = [modules[name] for name in missing]
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name in gone else object())
    args = cli.build_parser().parse_args(['embed', 'x', '--out', 'x.npz', '--tsne'])
    with pytest.raises(RuntimeError, match=f'^--tsne needs {" and ".join(missing)}: pip install {" ".join(missing)}$'):
        embed.check(args)

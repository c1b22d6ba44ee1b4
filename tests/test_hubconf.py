"""torch.hub entry points: torch.hub executes hubconf.py from a clone, next to whatever else is on the path."""
import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
ENTRY_POINTS = ['simsiam_r50', 'simsiam_r50_full', 'simsiam_r50_lin']


def load(name: str, **kwargs):
    return torch.hub.load(str(ROOT), name, source='local', **kwargs)


def in_fresh_python(code: str, *argv: str, cwd: Path) -> str:
    # -I: the repository is on the path only if torch.hub puts it there.
    done = subprocess.run(
        [sys.executable, '-I', '-c', code, *argv], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def entry_points() -> dict[str, object]:
    # torch.hub.list knows no local source; the rule is its own: callables without a leading underscore.
    names = runpy.run_path(str(ROOT / 'hubconf.py'))
    return {k: v for k, v in names.items() if callable(v) and not k.startswith('_')}


def test_there_are_exactly_three_entry_points():
    assert sorted(entry_points()) == ENTRY_POINTS


@pytest.mark.parametrize('name', ENTRY_POINTS)
def test_each_entry_point_has_help(name):
    assert 'SimSiam ResNet-50' in entry_points()[name].__doc__


def test_r50_gives_features():
    model = load('simsiam_r50', pretrained=False).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 2048)


def test_r50_passes_arguments_on_to_timm():
    assert load('simsiam_r50', pretrained=False, in_chans=1, num_classes=7).fc.out_features == 7


def test_r50_lin_has_1000_classes():
    model = load('simsiam_r50_lin', pretrained=False).eval()
    assert model.num_classes == 1000
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_r50_full_is_the_papers_model():
    model = load('simsiam_r50_full', pretrained=False)
    assert type(model).__name__ == 'SimSiam'
    assert sum(p.numel() for p in model.parameters()) == 38_199_360
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert [tuple(t.shape) for t in model(x, x)] == [(2, 2048)] * 4


@pytest.mark.parametrize('name', ENTRY_POINTS)
def test_weights_are_asked_for_by_default(name, tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(RuntimeError, match='HF_HUB_OFFLINE is set and no cache has it') as e:
        load(name, cache_dir=tmp_path)
    assert 'pretrained=False' in str(e.value)


def test_dependencies_are_import_names_that_exist():
    # torch.hub looks each of them up before it calls an entry point.
    tree = ast.parse((ROOT / 'hubconf.py').read_text())
    names = next(
        ast.literal_eval(node.value) for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == 'dependencies')
    for name in names:
        __import__(name)


def test_reading_hubconf_imports_nothing_heavy(tmp_path):
    code = (
        'import sys; before = set(sys.modules); '
        "exec(compile(open(sys.argv[1]).read(), 'hubconf.py', 'exec'), {'__name__': 'hubconf'}); "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))")
    assert in_fresh_python(code, str(ROOT / 'hubconf.py'), cwd=tmp_path).strip() == '[]'


def test_a_users_own_utils_and_models_are_not_in_the_way(tmp_path):
    # torch.hub puts a clone on sys.path, where common names of other projects win or lose by accident.
    for name in ('utils', 'models', 'data', 'training'):
        (tmp_path / f'{name}.py').write_text(f"MINE = '{name}'\n")
    code = (
        'import sys; sys.path.insert(0, sys.argv[2]); import utils, models, torch; '
        "m = torch.hub.load(sys.argv[1], 'simsiam_r50', source='local', pretrained=False); "
        'import data, training; '
        "assert (utils.MINE, models.MINE, data.MINE, training.MINE) == ('utils', 'models', 'data', 'training'); "
        'import simsiam_models; print(simsiam_models.__file__); print(m.num_features)')
    path, width = in_fresh_python(code, str(ROOT), str(tmp_path), cwd=tmp_path).split('\n')[-3:-1]
    assert Path(path).resolve() == ROOT / 'simsiam_models' / '__init__.py'
    assert width == '2048'

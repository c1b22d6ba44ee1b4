"""torch.hub entry points: torch.hub executes hubconf.py from a clone, next to whatever else is on the path."""
import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simsiam_models.weights.published import WEIGHTS

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
def test_torch_hubs_help_says_what_comes_back_how_to_get_it_and_under_which_licence(name, monkeypatch):
    monkeypatch.setattr(torch.hub, '_get_cache_or_reload', lambda *args, **kwargs: str(ROOT))
    text = torch.hub.help('OWNER/simsiam_models', name, trust_repo=True)
    for part in ('SimSiam ResNet-50', '-> ', 'Args:', 'tag:', 'icence', f"load('OWNER/simsiam_models', '{name}'"):
        assert part in text
    assert torch.hub.list('OWNER/simsiam_models', trust_repo=True) == ENTRY_POINTS


def test_the_examples_of_the_help_run_and_the_listed_tags_exist():
    for point in entry_points().values():
        lines = [line.strip() for line in point.__doc__.splitlines() if 'torch.hub.load' in line]
        for line in lines:
            line = line.replace("'OWNER/simsiam_models'", repr(str(ROOT))).replace(
                'trust_repo=True', "source='local', pretrained=False")
            exec(line, {'torch': torch})
    named = re.findall(r'\w+_in1k', ' '.join(point.__doc__ for point in entry_points().values()))
    assert {*named} <= {*WEIGHTS}
    assert {tag for tag in named if '_lin_' in tag} == {tag for tag, weights in WEIGHTS.items() if weights.linear}
    for tag, weights in WEIGHTS.items():  # what the help says about licences
        assert weights.license == ('apache-2.0' if tag.startswith('mm') else 'cc-by-nc-4.0')


def test_the_line_of_the_docs_runs_in_a_clone(monkeypatch):
    (line,) = re.findall(r"^torch.hub.load\('\.'.*", (ROOT / 'docs/libraries.md').read_text(), re.M)
    monkeypatch.chdir(ROOT)
    assert eval(line, {'torch': torch}).num_features == 2048


@pytest.mark.parametrize('name', ENTRY_POINTS)
def test_a_tag_chooses_the_weights_and_a_wrong_one_is_a_sentence(name, tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    tag = 'fb_bs256_ep100_lin_in1k' if name == 'simsiam_r50_lin' else 'fb_bs256_ep100_in1k'
    with pytest.raises(RuntimeError, match=tag):
        load(name, tag=tag, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="tag='nope' is not known; use one of .*in1k"):
        load(name, tag='nope')


def test_the_classifier_is_not_asked_of_weights_that_have_none():
    with pytest.raises(ValueError, match="tag='mm_ep200_in1k' has no classifier; use one of mm1x_ep200_lin_in1k, "):
        load('simsiam_r50_lin', tag='mm_ep200_in1k')


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
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - {'__future__'}))")
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

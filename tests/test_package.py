"""The wheel, and what README and docs show of it."""
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, build_wheel

from simsiam_models.data import kernel

README = (ROOT / 'README.md').read_text()


def test_the_wheel_holds_only_the_package_and_its_compiled_kernel_for_any_python(tmp_path: Path):
    wheel = build_wheel(tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split('/')[0] for name in names if '.dist-info/' not in name} == {'simsiam_models'}
    assert {'simsiam_models/py.typed', 'simsiam_models/data/demo.py'} <= set(names)
    assert any(name.endswith('licenses/LICENSE') for name in names)
    assert '-cp310-abi3-' in wheel.name
    built = {name for name in names if name.endswith(('.so', '.pyd'))}
    here = {path.name.split('.')[0] for path in kernel.SOURCE.parent.glob('_kernel_*.*')}
    assert {Path(name).name.split('.')[0] for name in built} == here and '_kernel_plain' in here
    assert not any(name.endswith('.c') for name in names)


@pytest.mark.parametrize('compiler', ['false', '/no/such/compiler'])
def test_without_a_compiler_the_wheel_is_built_without_the_kernel(tmp_path: Path, monkeypatch, compiler: str):
    monkeypatch.setenv('CC', compiler)
    assert not [name for name in zipfile.ZipFile(build_wheel(tmp_path)).namelist() if '_kernel' in name]


def test_the_readme_has_one_command_for_the_demonstration_and_one_for_the_tests():
    blocks = re.findall(r'<!-- (\w+) -->\n```bash\n(.*?)\n```', README, re.S)
    assert [name for name, _ in blocks] == ['demo', 'tests']
    assert all('\n' not in command and command.startswith('python3 -m pip install') for _, command in blocks)


def test_the_first_block_of_the_readme_runs_as_written():
    code = re.search(r'```python\n(.*?)\n```', README, re.S).group(1)
    assert len(code.splitlines()) == 5
    scope: dict = {}
    exec(code, scope)
    assert scope['features'].shape == (1, 2048)
    assert [m.shape[1] for m in scope['maps']] == [64, 256, 512, 1024, 2048]


def test_the_line_for_timms_scripts_makes_our_names_known_to_a_script_and_keeps_its_flags(tmp_path: Path):
    page = (ROOT / 'docs/libraries.md').read_text()
    line = re.search(r'python3 -c "(import runpy, simsiam_models; .*?)"', page).group(1)
    (tmp_path / 'validate.py').write_text(
        'import sys, timm\n'
        'if __name__ == "__main__":\n'
        '    print(sys.argv, timm.create_model("simsiam_resnet50", num_classes=3).num_classes)\n')
    done = subprocess.run(
        [sys.executable, '-c', line, '--data-dir', 'FOLDER'], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.stdout.strip() == "['validate.py', '--data-dir', 'FOLDER'] 3", done.stderr

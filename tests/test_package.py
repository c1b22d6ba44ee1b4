"""The wheel, and the README's commands."""
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from conftest import ROOT, build_wheel

README = (ROOT / 'README.md').read_text()


def test_the_wheel_holds_only_the_package(tmp_path: Path):
    names = zipfile.ZipFile(build_wheel(tmp_path)).namelist()
    assert {name.split('/')[0] for name in names if '.dist-info/' not in name} == {'simsiam_models'}
    assert {'simsiam_models/py.typed', 'simsiam_models/data/demo.py', 'simsiam_models/data/kernel.c'} <= set(names)
    assert any(name.endswith('licenses/LICENSE') for name in names)


def test_the_readme_has_one_command_for_the_demonstration_and_one_for_the_tests():
    blocks = re.findall(r'<!-- (\w+) -->\n```bash\n(.*?)\n```', README, re.S)
    blocks = [block for block in blocks if block[0] != 'slurm']  # test_slurm.py runs it
    assert [name for name, _ in blocks] == ['demo', 'tests']
    assert all('\n' not in command and command.startswith('python3 -m pip install') for _, command in blocks)


def test_the_first_block_of_the_readme_runs_as_written():
    code = re.search(r'```python\n(.*?)\n```', README, re.S).group(1)
    assert len(code.splitlines()) == 5
    scope: dict = {}
    exec(code, scope)
    assert scope['features'].shape == (1, 2048)
    assert [m.shape[1] for m in scope['maps']] == [64, 256, 512, 1024, 2048]


def test_the_readmes_line_for_timms_scripts_makes_our_names_known_to_a_script_and_keeps_its_flags(tmp_path: Path):
    line = re.search(r'python3 -c "(import runpy, simsiam_models; .*?)"', README).group(1)
    (tmp_path / 'validate.py').write_text(
        'import sys, timm\n'
        'if __name__ == "__main__":\n'
        '    print(sys.argv, timm.create_model("simsiam_resnet50", num_classes=3).num_classes)\n')
    done = subprocess.run(
        [sys.executable, '-c', line, '--data-dir', 'FOLDER'], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.stdout.strip() == "['validate.py', '--data-dir', 'FOLDER'] 3", done.stderr

"""Ctrl-C during the imports: our programs say one line, and others keep Python's traceback."""
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from simsiam_models.runtime.start import name_program


@pytest.mark.parametrize('line, name', [
    ('python /usr/bin/simsiam knn x', 'simsiam'), ('python simsiam.exe', 'simsiam'),
    (f'python {ROOT}/train.py x', 'train.py'), ('python -u -m simsiam_models pretrain', 'simsiam'),
    ('python train.py --device-modules simsiam_models', None), ('python -m timm simsiam_models', None),
    ('python x.py simsiam', None), ('python', None), ('python -c pass', None)])
def test_our_programs_are_known_by_their_command_line(line: str, name: str | None, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert name_program(line.split()) == name


@pytest.mark.parametrize('file, said', [('simsiam', 'simsiam: stopped by SIGINT'), ('mine.py', 'KeyboardInterrupt')])
def test_ctrl_c_while_torch_is_imported_is_one_line(file: str, said: str, tmp_path: Path):
    (tmp_path / 'torch.py').write_text('import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhile True: pass\n')
    (tmp_path / 'timm.py').write_text('import torch\n')
    (tmp_path / file).write_text('import simsiam_models\n')
    done = subprocess.run(
        [sys.executable, tmp_path / file], env={'PYTHONPATH': f'{tmp_path}:{ROOT}', 'PATH': ''}, capture_output=True,
        text=True, timeout=60, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert done.returncode in (-signal.SIGINT, 130) and done.stderr.splitlines()[-1] == said
    assert (len(done.stderr.splitlines()) == 1) == (file == 'simsiam')

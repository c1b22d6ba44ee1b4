"""tests/perf/gpu.sh: it runs to its end on a CPU, and one part that fails does not cost the others their figures."""
import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import warm
from conftest import ROOT

PARTS = ['copy', 'data', 'together', 'step', 'cifar', 'knn']


def run(folder: Path, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ['bash', str(ROOT / 'tests' / 'perf' / 'gpu.sh'), '--smoke', '--out', str(folder), *args], capture_output=True,
        text=True, timeout=200, env={**os.environ, 'PYTHON': warm.python(), 'OMP_NUM_THREADS': '1'})


def test_every_part_of_the_gpu_script_runs_on_a_cpu(tmp_path):
    done = run(tmp_path, '--parts', *PARTS)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / 'gpu.json').read_text())
    assert not [part for part in PARTS if 'error' in found[part]]
    assert found['together']['eager']['samples_per_s']['together'] > 0 and found['knn']['seconds'] > 0
    table = (tmp_path / 'table.txt').read_text()
    assert table == found['table'] and table in done.stdout and 'incomplete' not in table
    for figure in ('end to end', 'waiting for data', 'augmentation / step', 'kNN', '800 epochs'):
        assert [line for line in table.splitlines() if figure in line and line.endswith(('reached', 'missed'))], figure
    assert {p.name for p in tmp_path.iterdir()} == {'gpu.json', 'table.txt'}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tests' / 'perf'))
    import gpu
    return gpu


def test_a_part_that_fails_or_takes_too_long_keeps_what_it_had(gpu, tmp_path, monkeypatch, capfd):
    def fail(sizes, images, save):
        save({'figure': 1})
        raise RuntimeError('no such card')

    def hang(sizes, images, save):
        save({'figure': 2})
        time.sleep(60)
    monkeypatch.setattr(gpu, 'PARTS', {'copy': (9, fail), 'data': (9, hang)})
    failed = gpu.run_part('copy', gpu.SMOKE, None, tmp_path, 9)
    hung = gpu.run_part('data', gpu.SMOKE, None, tmp_path, 2)
    assert failed['figure'] == 1 and failed['error'].startswith('exit status 1')
    assert 'no such card' in capfd.readouterr().err
    assert hung['figure'] == 2 and hung['error'] == 'stopped after 2 s' and hung['seconds_of_part'] < 9
    machine = dict(card='a card', cores=2, load=[0.0], torch='2', cuda='13', python='3', date='today')
    table = gpu.make_table({
        'machine': machine, 'sizes': vars(gpu.SMOKE), 'seconds': 3, 'copy': failed, 'data': hung,
        'knn': {'seconds': 11.0}})
    assert 'copy: incomplete' in table and 'data: stopped after 2 s' in table and 'bar 10 s: missed' in table

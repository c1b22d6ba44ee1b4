"""The run's log: JSON lines, TensorBoard, Weights & Biases, and what a log file shows."""
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY

from simsiam_models.runtime import log as runlog
from simsiam_models.runtime.log import RunLog
from simsiam_models.training import pretrain


def run(data: Path, output: Path, *more: str) -> dict:
    return pretrain.main([
        str(data), *TINY, '--epochs', '2', '--batch-size', '16', '--workers', '0', '--log-every', '2', '--output',
        str(output), *more])


def test_every_line_is_json_without_nan(tmp_path):
    log = RunLog(tmp_path, True)
    log.figures('', {'loss': float('nan'), 'rank': float('inf'), 'knn': {'random': 1.5}}, 'text')
    assert (tmp_path / 'log.jsonl').read_text() == '{"loss": null, "rank": null, "knn": {"random": 1.5}}\n'


def test_other_processes_write_nothing(tmp_path, capsys):
    log = RunLog(tmp_path, False)
    log.say('x')
    log.figures('', {'loss': 1.0}, 'x')
    log.attach(True, None, {}, 0)
    log.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ''


def test_a_continued_log_loses_what_lies_past_the_checkpoint(tmp_path):
    log = RunLog(tmp_path, True)
    log.figures('', {'step': 1}, '')
    size = log.size()
    log.figures('', {'step': 2}, '')
    (tmp_path / 'log.jsonl').write_text((tmp_path / 'log.jsonl').read_text() + '{"torn')
    log.resume(size)
    assert (tmp_path / 'log.jsonl').read_text() == '{"step": 1}\n'


def test_tensorboard_has_every_figure_once_also_after_a_continuation(few_digits, tmp_path):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    run(few_digits, tmp_path, '--tensorboard', '--max-steps', '6')
    run(few_digits, tmp_path, '--tensorboard')
    events = accumulator.EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
    lines = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    losses = [line['loss'] for line in lines if 'loss' in line]
    found = events.Scalars('loss')
    assert [e.step for e in found] == [2, 4, 6, 8]
    assert [e.value for e in found] == pytest.approx(losses, rel=1e-5)
    assert {'std', 'rank', 'lr', 'knn'} <= set(events.Tags()['scalars'])


def test_wandb_gets_the_figures_and_a_continued_run_is_the_same_run(few_digits, tmp_path, monkeypatch):
    calls = []

    class Fake:
        @staticmethod
        def init(**kwargs):
            calls.append(kwargs)
            return Fake

        @staticmethod
        def log(numbers, step):
            calls.append((step, numbers))

        @staticmethod
        def finish():
            calls.append('finish')
    monkeypatch.setitem(sys.modules, 'wandb', Fake)
    monkeypatch.setattr(runlog.importlib.util, 'find_spec', lambda name: True)
    run(few_digits, tmp_path, '--wandb', 'mine', '--max-steps', '4')
    run(few_digits, tmp_path, '--wandb', 'mine')
    starts = [c for c in calls if isinstance(c, dict)]
    assert len(starts) == 2 and starts[0]['id'] == starts[1]['id'] and starts[0]['project'] == 'mine'
    assert starts[1]['resume'] == 'allow' and starts[0]['config']['batch_size'] == 16
    steps = [c[0] for c in calls if isinstance(c, tuple) and 'loss' in c[1]]
    assert steps == [2, 4, 6, 8] and calls.count('finish') == 2


@pytest.mark.parametrize('flag, package', [(['--tensorboard'], 'tensorboard'), (['--wandb', 'p'], 'wandb')])
def test_a_missing_extra_is_one_sentence_before_anything_is_written(few_digits, tmp_path, monkeypatch, flag, package):
    monkeypatch.setattr(runlog.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match=f'{flag[0]} needs the package {package}: python3 -m pip install {package}'):
        run(few_digits, tmp_path / 'out', *flag)
    assert not (tmp_path / 'out').exists()


def test_in_a_log_file_each_interval_is_one_line(few_digits, tmp_path, capfd):
    run(few_digits, tmp_path)
    captured = capfd.readouterr()
    lines = [line for line in captured.out.splitlines() if line.startswith('epoch ') and 'loss' in line]
    assert [line.split('  ')[0] for line in lines] == [
        'epoch 1/2 step 2/4', 'epoch 1/2 step 4/4', 'epoch 2/2 step 2/4', 'epoch 2/2 step 4/4']
    assert all('img/s' in line and 'left 0:00:0' in line for line in lines)
    assert '\r' not in captured.out + captured.err


def test_the_bar_shows_one_time_left_and_ends_where_the_run_does(few_digits, tmp_path, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(shown, 'isatty', lambda: True, raising=False)
    monkeypatch.setattr(sys, 'stderr', shown)
    run(few_digits, tmp_path, '--max-steps', '3')
    bars = [text for text in shown.getvalue().split('\r') if 'loss' in text]
    assert bars and all('/3 [' in text and text.count('<') == 1 and 'left' not in text for text in bars)
    assert any('kNN' in text and '/64 [' in text for text in shown.getvalue().split('\r'))


def test_no_extra_is_imported_unasked():
    # timm itself imports wandb where that is installed.
    code = 'import sys, train; assert not {"tensorboard", "datasets", "webdataset"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT, timeout=120)

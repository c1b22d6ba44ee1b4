"""The life of a run: whose folder it is, when it saves, what stops it, and that all processes decide together."""
import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import spawn

from simsiam_models.runtime import checkpoint, lifecycle
from simsiam_models.runtime.checkpoint import LAST
from simsiam_models.runtime.distributed import World
from simsiam_models.runtime.lifecycle import ARGS, Lifecycle, RunError, amend_claim
from simsiam_models.runtime.signals import Signals, Stopped

ALONE = World(0, 1, torch.device('cpu'))
KEYS = {'epoch', 'step', 'run'}
RUN = {'model': 'a', 'lr': 0.1, 'workers': 2}


def life(folder: Path, signals: Signals | None = None, said: list[str] | None = None, **more) -> Lifecycle:
    say = print if said is None else said.append
    return Lifecycle(folder / LAST, KEYS, ALONE, signals or Signals(), say, **more)


def state(epoch: int = 0, step: int = 0) -> dict:
    return {'epoch': epoch, 'step': step, 'run': RUN, 'w': torch.ones(9)}


def run(folder: Path, **more) -> None:
    with life(folder, **more) as one:
        one.claim(RUN)
        one.save(state, 0)


def test_a_claimed_folder_takes_only_the_same_run(tmp_path):
    run(tmp_path / 'run')
    with life(tmp_path / 'run') as one:
        assert one.claim({**RUN, 'workers': 5}, {'workers'}) == RUN  # what was recorded holds
        assert one.resume(RUN)['epoch'] == 0
    for args, words in (({**RUN, 'lr': 0.2}, 'lr: 0.1 there, 0.2 here'), ({**RUN, 'benchmark': 'x'}, 'another kind')):
        with life(tmp_path / 'run') as one, pytest.raises(ValueError, match=words):
            one.claim(args)
    with life(tmp_path / 'run') as one, pytest.raises(ValueError, match='--resume never'):
        one.claim(RUN, fresh=True)


@pytest.mark.parametrize('name', [LAST, 'log.jsonl', 'config.json', 'model.safetensors'])
def test_a_folder_of_something_else_is_not_touched(tmp_path, name):
    (tmp_path / name).write_text('mine')
    with life(tmp_path) as one, pytest.raises(ValueError, match=f'holds {name} of an unknown run'):
        one.claim(RUN)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_new_run_beside_other_files_says_so_once(tmp_path):
    said: list[str] = []
    for _ in range(2):
        with life(tmp_path, said=said) as one:
            one.claim(RUN)
        assert said == []
    (tmp_path / 'other').mkdir()
    for name in ('b.txt', 'a\nb.jpg'):
        (tmp_path / 'other' / name).touch()
    for _ in range(2):
        with life(tmp_path / 'other', said=said) as one:
            one.claim(RUN)
        assert said == [f'{tmp_path / "other"} holds other files, too (a b.jpg, b.txt); the run adds its own']


def test_a_file_is_no_folder_and_a_broken_record_is_named(tmp_path):
    (tmp_path / 'file').write_text('x')
    with life(tmp_path / 'file') as one, pytest.raises(ValueError, match='is a file'):
        one.claim(RUN)
    (tmp_path / 'run').mkdir()
    for text in ('{', '[1]', '3'):
        (tmp_path / 'run' / ARGS).write_text(text)
        with life(tmp_path / 'run') as one, pytest.raises(ValueError, match='cannot be read|another kind'):
            one.claim(RUN)


def test_a_second_run_is_refused_by_a_sentence_that_names_the_first(tmp_path):
    with life(tmp_path) as one:
        one.claim(RUN)
        words = f'in use by .*process {os.getpid()} on .*, since'
        with life(tmp_path) as other, pytest.raises(ValueError, match=words):
            other.claim(RUN)
        one.save(lambda: state(7), 7)
    with life(tmp_path) as other:
        other.claim(RUN)
        assert other.resume(RUN)['epoch'] == 7


def test_a_deleted_folder_is_made_again_at_the_next_save(tmp_path):
    said, restored, folder = [], [], tmp_path / 'runs/run'
    with life(folder, said=said) as one:
        one.claim(RUN)
        amend_claim(folder, {'perf': 'fast'})
        one.on_restored = lambda: restored.append(sorted(p.name for p in folder.iterdir()))
        one.save(state, 0)
        shutil.rmtree(folder.parent)
        assert one.save(lambda: state(1), 1)
        assert len(said) == 1 and 'was deleted; it is recreated' in said[0]
        assert restored == [[ARGS, 'lock']]
        (folder / ARGS).unlink()
        assert one.save(lambda: state(2), 2)
        assert len(said) == 2 and 'was deleted in part' in said[1]
        with life(folder) as other, pytest.raises(ValueError, match='in use'):
            other.claim({**RUN, 'perf': 'fast'})
        assert one.save(lambda: state(3), 3) and len(said) == 2
    assert json.loads((folder / ARGS).read_text()) == {**RUN, 'perf': 'fast'}
    assert checkpoint.load(folder / LAST, KEYS)[1]['epoch'] == 3


def test_nothing_is_written_to_the_place_of_a_lost_mount(tmp_path, monkeypatch):
    said, folder = [], tmp_path / 'mount/run'
    with life(folder, said=said) as one:
        one.claim(RUN)
        shutil.rmtree(folder)
        with monkeypatch.context() as m:
            m.setattr(lifecycle, '_find_device', lambda path: -1)
            assert not one.save(state, 0)
        assert 'its disk is not there' in said[0] and not folder.exists()
        assert one.save(state, 0)


def test_a_run_that_lost_its_folder_to_another_stops_and_keeps_out(tmp_path):
    with life(tmp_path / 'run') as one:
        one.claim(RUN)
        one.save(state, 0)
        shutil.rmtree(tmp_path / 'run')
        with life(tmp_path / 'run') as other:
            other.claim(RUN)
            with pytest.raises(RunError, match=f'process {os.getpid()}.*taken it over'):
                one.save(lambda: state(1), 1)
            assert other.resume(RUN) is None
            assert other.save(lambda: state(2), 2)


def test_what_is_decided_later_is_added_to_the_claim(tmp_path):
    run(tmp_path)
    amend_claim(tmp_path, {'perf': 'fast'})
    assert json.loads((tmp_path / ARGS).read_text()) == {**RUN, 'perf': 'fast'}


def test_a_checkpoint_of_another_run_is_refused_and_says_how_to_start_over(tmp_path):
    checkpoint.save(tmp_path / LAST, state())
    with life(tmp_path, start_over='start again with --fresh') as one:
        with pytest.raises(ValueError, match='lr: 0.1 there, 0.5 here.*; start again with --fresh'):
            one.resume({**RUN, 'lr': 0.5})
        assert one.resume({**RUN, 'workers': 9}, {'workers'})['step'] == 0


def test_checkpoints_are_due_by_steps_and_by_the_clock(tmp_path):
    with life(tmp_path, every_steps=3) as one:
        one.begin()
        assert [i for i in range(1, 10) if one.agree(i).due] == [3, 6, 9]
    with life(tmp_path, minutes=1e-9) as one:
        one.begin()
        time.sleep(0.001)
        assert one.agree(1).due
    with life(tmp_path) as one:
        one.begin()
        assert not any(one.agree(1)) and one.agree(1, failed=True).failed


def test_epochs_that_are_kept(tmp_path):
    with life(tmp_path, keep_every=2, keep_last=1) as one:
        for epoch, step in ((0, 0), (1, 0), (1, 3), (2, 0), (2, 1), (3, 0), (4, 0)):
            one.save(lambda e=epoch, s=step: state(e, s), epoch, step)
    assert sorted(p.name for p in tmp_path.glob('*.pth')) == [
        LAST, 'checkpoint_epoch0002.pth', 'checkpoint_epoch0004.pth']


class Disk:
    """torch.save fails while `full` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full, real = False, checkpoint.write_synced

        def write(path, do):
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(path, do)
        monkeypatch.setattr(checkpoint, 'write_synced', write)


def test_a_save_that_fails_keeps_the_one_before_and_the_run_goes_on(tmp_path, monkeypatch):
    disk, said = Disk(monkeypatch), []
    with life(tmp_path, said=said) as one:
        assert one.save(lambda: state(1), 1)
        one.begin(1)
        disk.full = True
        assert not one.save(lambda: state(2), 2)
        assert 'No space left' in said[0] and 'the one before is kept' in said[0]
        assert checkpoint.load(tmp_path / LAST, KEYS)[1]['epoch'] == 1
        with pytest.raises(RunError, match='the last checkpoint could not be written'):
            one.finish()
        disk.full = False
        assert one.save(lambda: state(3), 3)
        one.finish()
    assert not list(tmp_path.glob('*.part'))


def test_a_run_stops_when_its_newest_checkpoint_gets_too_old(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    with life(tmp_path, minutes=1e-6) as one:
        one.save(state, 0)
        one.begin()
        disk.full = True
        time.sleep(0.01)
        with pytest.raises(RunError, match='no checkpoint could be written for 3e-06 minutes'):
            one.save(lambda: state(1), 1)


def test_a_signal_waits_for_the_checkpoint_and_then_stops_the_run(tmp_path):
    with Signals() as signals, life(tmp_path, signals) as one:
        one.begin()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert one.agree(1).signal == signal.SIGUSR1
        one.save(lambda: state(0, 1), 0, 1)
        with pytest.raises(Stopped) as stopped:
            one.stop_if_signalled()
        assert stopped.value.code == 128 + signal.SIGUSR1
    assert checkpoint.load(tmp_path / LAST, KEYS)[1]['step'] == 1
    assert not signals.deferred


def test_a_signal_ends_the_wait_for_a_batch_but_not_a_step(tmp_path):
    closed = []

    def batches(slow: bool) -> Iterator[int]:
        try:
            yield 1
            if slow:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            yield 2
        finally:
            closed.append(slow)

    for slow in (True, False):
        with Signals() as signals, life(tmp_path, signals) as one:
            one.begin()
            got = []
            for batch in one.interruptible(batches(slow)):
                if not slow:
                    os.kill(os.getpid(), signal.SIGTERM)  # within a step
                got.append(batch)
            assert got == [1] and signals.number == signal.SIGTERM and not signals.waiting
            one.save(lambda: state(0, 1), 0, 1)
            with pytest.raises(Stopped):
                one.stop_if_signalled()
    assert closed == [True, False]


def test_of_several_processes_none_leaves_the_step_that_all_take(tmp_path):
    with Signals() as signals, life(tmp_path, signals) as one:
        one.world = World(0, 2, torch.device('cpu'))
        one.begin()
        assert list(one.interruptible(os.kill(os.getpid(), signal.SIGTERM) or i for i in range(1))) == [0]
        assert signals.number == signal.SIGTERM


def test_a_signal_without_a_new_checkpoint_is_an_error(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    with Signals() as signals, life(tmp_path, signals) as one:
        one.begin()
        os.kill(os.getpid(), signal.SIGTERM)
        disk.full = True
        one.save(lambda: state(0, 1), 0, 1)
        with pytest.raises(RunError, match='without a new checkpoint'):
            one.stop_if_signalled()


def test_before_it_begins_a_signal_stops_at_once(tmp_path):
    with Signals() as signals, life(tmp_path, signals), pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


def _together(rank: int, folder: Path) -> list:
    world, said, signals = World(rank, 2, torch.device('cpu')), [], Signals()
    with Lifecycle(folder / LAST, KEYS, world, signals, said.append) as one:
        claimed = one.claim({**RUN, 'lr': 0.1 + rank})  # rank 0's holds
        first = one.resume(RUN)
        one.begin()
        signals.number = signal.SIGTERM if rank == 1 else 0
        pause = one.agree(1, failed=rank == 1)
        one.save(lambda: state(0, 1), 0, 1)
        try:
            one.stop_if_signalled()
        except Stopped as e:
            stopped = e.code
        again = one.resume(RUN)
        try:
            one.resume({**RUN, 'lr': 9})
        except ValueError as e:
            refused = 'lr' in str(e)
    return [claimed['lr'], first, list(pause), stopped, again['step'], refused]


def test_two_processes_decide_together_and_only_the_first_writes(tmp_path):
    (tmp_path / 'run').mkdir()
    assert spawn(_together, tmp_path, tmp_path / 'run') == [[0.1, None, [15, 0, 1], 143, 1, True]] * 2

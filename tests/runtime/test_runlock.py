"""The lock of a run: who holds it, who does not hold it any more, and that no operating system's lock is needed."""
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from simsiam_models.runtime import runlock
from simsiam_models.runtime.runlock import RunLock, describe_process

SINCE = '2026-01-02 03:04:05 CET'


def write_lock(path: Path, age: float = 0.0, **changes) -> Path:
    """The lock file of a process of this machine that lives; `changes` make it another's."""
    path.write_text(json.dumps({**describe_process(), 'since': SINCE, 'token': 'x', **changes}))
    os.utime(path, (time.time() - age,) * 2)
    return path


def elsewhere(**changes) -> dict:
    return {'host': 'gpu7', 'place': ['gpu7', 'another boot'], 'pid': 4321, **changes}


def acquire(path: Path, said: list[str] | None = None) -> None:
    lock = RunLock(path, (said or []).append)
    lock.acquire()
    lock.release()


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(runlock, 'BEAT', 0.05)
    monkeypatch.setattr(runlock, 'SILENCE', 1.0)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[int]:
    """The number of a process that holds tmp_path/run/lock until it is killed."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        RunLock(tmp_path / 'run/lock', print).acquire()
        os.write(told, b'.')
        while True:
            time.sleep(1)
    os.read(ready, 1)
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_who_comes_second_learns_who_came_first(tmp_path, holder):
    with pytest.raises(ValueError) as refused:
        acquire(tmp_path / 'run/lock')
    text = str(refused.value)
    assert f'process {holder} on {os.uname().nodename}, since 2' in text and 'another --output' in text
    assert '\n' not in text


def test_a_killed_process_holds_nothing_even_if_nobody_has_buried_it(tmp_path, holder):
    os.kill(holder, signal.SIGKILL)  # a zombie until the fixture waits for it
    began = time.monotonic()
    said = []
    while runlock.find_start(holder) is not None:
        assert time.monotonic() < began + 10
    acquire(tmp_path / 'run/lock', said)
    assert not said


def test_a_stopped_process_of_this_machine_goes_on_holding(tmp_path, holder, quick):
    os.kill(holder, signal.SIGSTOP)
    os.utime(tmp_path / 'run/lock', (0, 0))
    with pytest.raises(ValueError, match=f'process {holder} on'):
        acquire(tmp_path / 'run/lock')


def test_a_number_that_now_belongs_to_another_process_holds_nothing(tmp_path):
    acquire(write_lock(tmp_path / 'lock', started='1'))
    acquire(write_lock(tmp_path / 'lock', pid=2**22 - 1, started='1'))


def test_a_process_of_another_machine_holds_it_while_it_gives_signs_of_life(tmp_path, quick):
    path, done, said = write_lock(tmp_path / 'lock', **elsewhere()), threading.Event(), []

    def beat() -> None:
        while not done.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        lock = RunLock(path, said.append)
        with pytest.raises(ValueError, match=f'process 4321 on gpu7, since {SINCE}'):
            lock.acquire()
    finally:
        done.set()
        thread.join()
    assert len(said) == 1 and 'waiting up to' in said[0]


def test_a_silent_process_of_another_machine_loses_it_after_the_stated_time(tmp_path, quick):
    path, began = write_lock(tmp_path / 'lock', **elsewhere()), time.monotonic()
    acquire(path)
    assert time.monotonic() - began >= runlock.SILENCE


@pytest.mark.parametrize('text', [None, '', '{', '[1]', '{"pid": "x"}', '{"pid": -1}'])
def test_a_lock_that_was_silent_for_long_is_broken_at_once_whatever_it_says(tmp_path, text):
    path = write_lock(tmp_path / 'lock', **elsewhere())
    if text is not None:
        path.write_text(text)
    os.utime(path, (time.time() - 1000,) * 2)
    said = []
    acquire(path, said)
    assert not said and not path.exists()


def test_after_a_reboot_the_number_says_nothing_but_the_silence_does(tmp_path):
    mine = describe_process()
    path = write_lock(tmp_path / 'lock', 1000, place=[mine['place'][0], 'an earlier boot', *mine['place'][2:]])
    acquire(path)


def test_a_requeued_job_takes_the_lock_of_its_earlier_start_on_another_machine_at_once(tmp_path, monkeypatch, quick):
    monkeypatch.setenv('SLURM_JOB_ID', '77')
    monkeypatch.setenv('SLURM_RESTART_COUNT', '1')
    said = []
    acquire(write_lock(tmp_path / 'lock', **elsewhere(job='77', restarts=0)), said)
    acquire(write_lock(tmp_path / 'lock', job='77', restarts=0), said)
    assert not said
    for job, restarts in (('77', 1), ('78', 0)):  # another step of this start; another job
        with pytest.raises(ValueError, match='in use'):
            acquire(write_lock(tmp_path / 'lock', job=job, restarts=restarts))


def test_signs_of_life_and_release(tmp_path, quick):
    lock = RunLock(tmp_path / 'run/lock', print)
    lock.acquire()
    os.utime(lock.path, (0, 0))
    end = time.monotonic() + 10
    while lock.path.stat().st_mtime < 1:
        assert time.monotonic() < end
        time.sleep(0.01)
    lock.release()
    assert not list((tmp_path / 'run').iterdir())


def test_a_deleted_lock_is_renewed_and_one_that_was_taken_over_is_left_alone(tmp_path):
    lock = RunLock(tmp_path / 'lock', print)
    lock.acquire()
    assert lock.check()
    lock.path.unlink()
    assert not lock.check()
    lock.renew()
    assert lock.check()
    write_lock(lock.path, **elsewhere())
    for call in (lock.check, lock.renew):
        with pytest.raises(ValueError, match='process 4321 on gpu7.*taken it over'):
            call()
    lock.release()
    assert lock.path.exists()


def test_the_names_in_a_lock_speak_to_no_terminal(tmp_path):
    path = write_lock(tmp_path / 'lock', host='a\x1b[2J\nb\u202e')
    with pytest.raises(ValueError) as refused:
        acquire(path)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize('kind', ['folder', 'link'])
def test_what_is_no_file_is_one_sentence(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(runlock, 'PATIENCE', 0.05)
    path = tmp_path / 'lock'
    path.mkdir() if kind == 'folder' else path.symlink_to('nowhere')
    with pytest.raises(OSError, match='lock'):
        acquire(path)


@pytest.mark.parametrize('links', [True, False])
def test_who_breaks_a_dead_lock_leaves_that_of_a_faster_process(tmp_path, monkeypatch, links):
    path, removed = write_lock(tmp_path / 'lock', started='1'), []

    def be_late(call):
        def late(at, *rest, **options) -> None:
            if at == path and not removed:  # at the last moment, another process breaks the lock and takes it
                removed.append(at)
                unlink(path)
                write_lock(path, token='faster')
            call(at, *rest, **options)
        return late

    def link(*names) -> None:
        raise PermissionError

    unlink = os.unlink
    monkeypatch.setattr(os, 'rename', be_late(os.rename))
    monkeypatch.setattr(Path, 'unlink', be_late(Path.unlink))
    if not links:
        monkeypatch.setattr(os, 'link', link)
    with pytest.raises(ValueError, match='in use'):
        acquire(path)
    assert removed and json.loads(path.read_text())['token'] == 'faster'
    assert [file.name for file in tmp_path.iterdir()] == ['lock']

"""Threads decode and hold a bounded number of bytes of large images, and stop when nobody waits for them."""
import contextlib
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simsiam_models.data import FolderImages, UnreadableError
from simsiam_models.data.readers import budget
from simsiam_models.data.readers.decode import FRAMES_BYTES, PIL_BYTES
from simsiam_models.data.threads import make_threads, run_in_order


@pytest.fixture(autouse=True)
def small_budget(monkeypatch):
    monkeypatch.setattr(budget, 'LARGE', 100)
    monkeypatch.setattr(budget, 'BUDGET', 1000)
    yield
    assert budget._used == 0  # nothing is held when a test ends


class Gauge:
    """Counts the bytes that are held at a time."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.lock = threading.Lock()

    def hold(self, size: int) -> None:
        with self.lock:
            self.now += size
            self.most = max(self.most, self.now)
        time.sleep(0.002)
        with self.lock:
            self.now -= size


@pytest.mark.parametrize('size, most', [(300, 900), (400, 800), (1000, 1000), (5000, 5000)])
def test_images_wait_until_they_fit_into_the_budget_and_a_larger_one_comes_alone(size, most):
    gauge = Gauge()

    def read() -> None:
        for _ in range(5):
            with budget.decode_in_turn(size):
                pass
            gauge.hold(size)  # the image is used after it is decoded

    jobs = [(i, [read] * 4) for i in range(4)]
    assert list(run_in_order(make_threads(8), jobs)) == [0, 1, 2, 3]
    assert 0 < gauge.most <= most


def test_small_images_do_not_wait():
    with budget.decode_in_turn(1000), budget.decode_in_turn(99):
        pass
    threads, entered = make_threads(1), []
    with budget.decode_in_turn(1000):
        def read() -> None:
            with budget.decode_in_turn(99):
                entered.append(True)
        assert list(run_in_order(threads, [(0, [read])])) == [0]
    assert entered == [True]


def test_outside_a_pool_an_image_counts_only_while_it_is_decoded():
    for _ in range(3):
        with budget.decode_in_turn(900):
            assert budget._used == 900
        assert budget._used == 0
    with contextlib.suppress(ValueError), budget.decode_in_turn(900):
        raise ValueError
    assert budget._used == 0


def test_a_call_that_fails_gives_its_bytes_back():
    def fail() -> None:
        with budget.decode_in_turn(900):
            raise ValueError('broken')
    with pytest.raises(ValueError, match='broken'):
        list(run_in_order(make_threads(2), [(0, [fail])]))


def test_calls_that_nobody_waits_for_decode_no_further_large_image():
    done, go, decoding = [], threading.Event(), threading.Event()

    def read() -> None:
        for _ in range(100):
            with budget.decode_in_turn(900):
                decoding.set()
                go.wait(60)
                done.append(True)

    threads = make_threads(4)
    results = run_in_order(threads, [(0, []), (1, [read] * 4), (2, [read] * 4)], ahead=1)
    assert next(results) == 0 and decoding.wait(60)
    results.close()
    go.set()
    threads.shutdown()
    assert done == [True]


def test_real_images_are_read_within_the_budget(tmp_path):
    for i in range(6):
        Image.fromarray(np.full((20, 30, 3), i, np.uint8)).save(tmp_path / f'{i}.png')
    images, seen = FolderImages(tmp_path), []

    def read(i: int) -> None:
        seen.append((int(images.read(i)[0, 0, 0]), budget._used))

    jobs = [(i, [lambda i=i: read(i)]) for i in range(6)]
    assert list(run_in_order(make_threads(3), jobs)) == list(range(6))
    assert sorted(value for value, _ in seen) == list(range(6))
    assert all(used == 600 * PIL_BYTES for _, used in seen)  # more than the budget, so one after the other


def read_status(name: str) -> int:
    """Returns bytes of this process's memory, as Linux counts them: VmRSS, or its peak, VmHWM."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f'{name}:'))


@pytest.mark.parametrize('form', FRAMES_BYTES)
def test_formats_with_frames_count_all_the_memory_that_they_take(tmp_path, form):
    frames = [Image.new('RGB', (2000, 2000), colour) for colour in ('red', 'blue')]
    frames[0].save(tmp_path / f'a.{form.lower()}', form, save_all=True, append_images=frames[1:])
    images = FolderImages(tmp_path)
    images.read(0)  # what is allocated once
    try:
        Path('/proc/self/clear_refs').write_text('5')  # the peak starts again
    except OSError:
        pytest.skip('this system does not measure the peak of memory')
    before = read_status('VmRSS')
    images.read(0)
    assert read_status('VmHWM') - before < 1.1 * 2000**2 * FRAMES_BYTES[form]


def test_a_large_file_is_in_memory_once_while_it_is_read(tmp_path):
    with open(tmp_path / 'a.tif', 'wb') as f:
        f.truncate(64 << 20)
    images = FolderImages(tmp_path)
    tracemalloc.start()
    try:
        assert len(images.stored_bytes(0)) == 64 << 20
        assert images.stored_bytes(0, 60, 9) == bytes(9) and images.stored_bytes(0, 64 << 20, 9) == b''
        with contextlib.suppress(UnreadableError):
            images.read(0)
        assert tracemalloc.get_traced_memory()[1] < 80 << 20
    finally:
        tracemalloc.stop()

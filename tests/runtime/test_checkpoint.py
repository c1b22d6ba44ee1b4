"""Checkpoints on the disk: whatever moment a run dies at, what is left can be continued."""
import errno
import io
import os
import random
import zipfile
from pathlib import Path

import pytest
import torch

from simsiam_models.runtime import checkpoint
from simsiam_models.runtime.checkpoint import LAST, DamagedError

KEYS = {'model', 'epoch', 'run'}


class Killed(BaseException):
    pass


def state(number: int) -> dict:
    return {'model': {'w': torch.full((9,), float(number))}, 'epoch': number, 'step': 0, 'run': {'dim': 8}}


def quiet(text: str) -> None:
    pass


def load(folder: Path) -> dict | None:
    found = checkpoint.load(folder / LAST, KEYS, quiet)
    return found and found[1]


def write(folder: Path, n: int, die_at: int | None = None, **options) -> tuple[int, int]:
    """Checkpoints 1 .. n as a run writes them; how many renames and checkpoints it began before it died."""
    calls, real = [0], os.replace

    def replace(a, b):
        if calls[0] == die_at:
            raise Killed
        calls[0] += 1
        real(a, b)
    os.replace = replace
    try:
        for begun in range(1, n + 1):
            checkpoint.save(folder / LAST, state(begun), **options)
    except Killed:
        pass
    finally:
        os.replace = real
    return calls[0], begun


@pytest.mark.parametrize('options', [dict(keep_last=2), dict(keep_last=3, keep_as_epoch=7), dict(keep_last=1)], ids=str)
def test_a_kill_between_any_two_renames_loses_at_most_one_checkpoint(tmp_path, options):
    (tmp_path / 'whole').mkdir()
    for die_at in range(write(tmp_path / 'whole', 4, **options)[0]):
        folder = tmp_path / str(die_at)
        folder.mkdir()
        _, begun = write(folder, 4, die_at, **options)
        left = load(folder)
        if left is None:
            assert die_at <= 1  # nothing had been written before
            continue
        assert left['epoch'] >= begun - 1


def test_a_torn_newest_one_is_set_aside_so_that_it_pushes_no_good_one_out(tmp_path):
    write(tmp_path, 2)
    (tmp_path / LAST).write_bytes(b'torn')
    assert load(tmp_path)['epoch'] == 1
    assert (tmp_path / 'checkpoint.pth.torn').exists() and not (tmp_path / LAST).exists()
    real = os.replace
    os.replace = lambda a, b: (_ for _ in ()).throw(Killed())
    try:
        with pytest.raises(Killed):
            checkpoint.save(tmp_path / LAST, state(3))
    finally:
        os.replace = real
    assert load(tmp_path)['epoch'] == 1


def test_a_copy_of_an_epoch_is_there_before_the_newest_has_its_name(tmp_path):
    write(tmp_path, 1, keep_as_epoch=1)
    assert checkpoint.read(tmp_path / 'checkpoint_epoch0001.pth', KEYS)['epoch'] == 1
    checkpoint.save(tmp_path / LAST, state(2), keep_as_epoch=1)  # the name is taken
    assert checkpoint.read(tmp_path / 'checkpoint_epoch0001.pth', KEYS)['epoch'] == 2
    assert not list(tmp_path.glob('*.part'))


def test_any_name_of_the_newest_one_names_those_before_it(tmp_path):
    for number in (1, 2, 3):
        checkpoint.save(tmp_path / 'fair [1].pth', state(number), keep_last=3)
    assert {p.name for p in tmp_path.iterdir()} == {
        'fair [1].pth', 'fair [1]_previous.pth', 'fair [1]_previous_2.pth'}
    (tmp_path / 'fair [1].pth').write_bytes(b'')
    (tmp_path / 'fair [1]_previous.pth').write_bytes(b'')
    assert checkpoint.load(tmp_path / 'fair [1].pth', KEYS, quiet)[1]['epoch'] == 1


def test_a_file_of_another_program_is_no_checkpoint_and_stays_where_it_is(tmp_path):
    torch.save({'weights': torch.ones(2)}, tmp_path / LAST)
    with pytest.raises(ValueError, match='not a checkpoint of this program') as e:
        load(tmp_path)
    assert not isinstance(e.value, DamagedError) and (tmp_path / LAST).exists()
    with zipfile.ZipFile(tmp_path / LAST, 'w') as archive:
        archive.writestr('letter.txt', 'whole, but not of torch')
    with pytest.raises(ValueError, match='not a checkpoint of this program'):
        load(tmp_path)
    assert (tmp_path / LAST).exists()


def test_any_change_of_its_bytes_is_damage(tmp_path):
    """Whatever zipfile makes of it; each ends in DamagedError, or in the very state that was written."""
    write(tmp_path, 1)
    whole, rng = (tmp_path / LAST).read_bytes(), random.Random(0)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4, 64))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            data = data[:rng.randrange(len(data))]
        (tmp_path / 'x.pth').write_bytes(data)
        try:
            found = checkpoint.read(tmp_path / 'x.pth', KEYS)
        except DamagedError as e:
            assert 'cannot be read: it is damaged' in str(e)
        except ValueError as e:  # the name of a record was changed, whose checksum covers only its contents
            assert 'not a checkpoint of this program' in str(e)
        else:
            assert torch.equal(found['model']['w'], state(1)['model']['w'])


class Failing(io.BufferedReader):
    """A disk that fails after `good` bytes."""

    good, error = 0, errno.EIO

    def read(self, n=-1):
        if self.tell() > self.good:
            raise OSError(self.error, os.strerror(self.error))
        return super().read(n)


@pytest.mark.parametrize('number', [errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize('good', [0, 700])
def test_an_error_of_the_disk_is_no_damage(tmp_path, monkeypatch, number, good):
    write(tmp_path, 2)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(path, mode):
        assert mode == 'rb'
        file = Failing(io.FileIO(path))
        file.good, file.error = good, number
        return file
    monkeypatch.setattr(checkpoint, 'open', fail, raising=False)
    with pytest.raises(OSError, match='checkpoint.pth cannot be read .*nothing is changed'):
        load(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize('owner, name', [(zipfile.ZipFile, 'testzip'), (torch, 'load')])
@pytest.mark.parametrize('error', [
    MemoryError(), OSError(errno.EIO, 'Input/output error'), RuntimeError('DefaultCPUAllocator: not enough memory')])
def test_a_machine_without_memory_or_disk_sets_nothing_aside(tmp_path, monkeypatch, owner, name, error):
    if owner is zipfile.ZipFile and isinstance(error, RuntimeError):
        pytest.skip('zipfile raises RuntimeError on damage alone')
    write(tmp_path, 2)

    def fail(*args, **kwargs):
        raise error
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises((MemoryError, OSError)):
        load(tmp_path)
    monkeypatch.undo()
    assert load(tmp_path)['epoch'] == 2 and not list(tmp_path.glob('*.torn'))


def test_all_damaged_is_an_error_that_says_how_to_start_over(tmp_path):
    write(tmp_path, 2)
    for path in tmp_path.iterdir():
        path.write_bytes(b'')
    with pytest.raises(ValueError, match='there is no other checkpoint; start again with --fresh'):
        checkpoint.load(tmp_path / LAST, KEYS, quiet, 'start again with --fresh')
    assert len(list(tmp_path.iterdir())) == 2


def test_differences_name_key_old_and_new():
    old, new = {'dim': 8, 'augmentation': {'size': 32}, 'lr': 1}, {'dim': 16, 'augmentation': {'size': 64}, 'lr': 1}
    assert checkpoint.find_differences(old, new) == 'dim: 8 there, 16 here; size: 32 there, 64 here'
    assert checkpoint.find_differences(old, new, {'dim', 'size'}) == ''
    assert checkpoint.checkpoint_names(Path('a/x.pth'), 3) == [
        Path('a/x.pth'), Path('a/x_previous.pth'), Path('a/x_previous_2.pth')]

"""Checkpoints on the disk: whatever moment a run dies at, what is left can be continued."""
import itertools
import os
from pathlib import Path

import pytest
import torch

from simsiam_models.runtime import checkpoint


class Killed(BaseException):
    pass


def state(number: int, healthy: bool = True) -> dict:
    return {
        'model': {'w': torch.full((9,), float(number))}, 'optimizer': {}, 'scaler': {}, 'epoch': number, 'step': 0,
        'knn': {}, 'run': {'dim': 8}, 'processes': 1, 'healthy': healthy}


def quiet(text: str) -> None:
    pass


def write(folder: Path, health: list[bool], die_at: int | None = None, **options) -> tuple[int, int]:
    """Checkpoints 1, 2, ... as a run writes them; how many renames and checkpoints it began before it died."""
    calls, real = [0], os.replace

    def replace(a, b):
        if calls[0] == die_at:
            raise Killed
        calls[0] += 1
        real(a, b)
    os.replace = replace
    try:
        for begun, healthy in enumerate(health, 1):
            pin = begun > 1 and health[begun - 2] and not healthy
            checkpoint.save(folder, state(begun, healthy), pin=pin, **options)
    except Killed:
        pass
    finally:
        os.replace = real
    return calls[0], begun


@pytest.mark.parametrize('health', list(itertools.product([True, False], repeat=4)), ids=str)
@pytest.mark.parametrize('options', [dict(keep_last=2), dict(keep_last=3, keep_as_epoch=7)], ids=str)
def test_a_kill_between_any_two_renames_loses_at_most_one_checkpoint_and_no_healthy_one(tmp_path, health, options):
    (tmp_path / 'whole').mkdir()
    for die_at in range(write(tmp_path / 'whole', list(health), **options)[0]):
        folder = tmp_path / str(die_at)
        folder.mkdir()
        _, begun = write(folder, list(health), die_at, **options)
        left = checkpoint.load(folder, quiet)
        if left is None:
            assert die_at <= 1  # nothing had been written before
            continue
        assert left['epoch'] >= begun - 1
        well = [i + 1 for i, healthy in enumerate(health[:left['epoch']]) if healthy]
        sound = checkpoint.load(folder, quiet, healthy=True)
        assert sound is None or sound['healthy']
        if well:
            assert sound['epoch'] >= max(well)  # a kept epoch may be one further


def test_a_torn_newest_one_is_set_aside_so_that_it_pushes_no_good_one_out(tmp_path):
    write(tmp_path, [True, True])
    (tmp_path / 'checkpoint.pth').write_bytes(b'torn')
    assert checkpoint.load(tmp_path, quiet)['epoch'] == 1
    assert (tmp_path / 'checkpoint.pth.torn').exists() and not (tmp_path / 'checkpoint.pth').exists()
    real = os.replace
    os.replace = lambda a, b: (_ for _ in ()).throw(Killed())
    try:
        with pytest.raises(Killed):
            checkpoint.save(tmp_path, state(3))
    finally:
        os.replace = real
    assert checkpoint.load(tmp_path, quiet)['epoch'] == 1


def test_a_copy_of_an_epoch_is_there_before_the_newest_has_its_name(tmp_path):
    write(tmp_path, [True], keep_as_epoch=1)
    assert checkpoint.read(tmp_path / 'checkpoint_epoch0001.pth')['epoch'] == 1
    checkpoint.save(tmp_path, state(2), keep_as_epoch=1)  # after a rollback: the name is taken
    assert checkpoint.read(tmp_path / 'checkpoint_epoch0001.pth')['epoch'] == 2
    assert not list(tmp_path.glob('*.part'))


def test_other_keys_are_named(tmp_path):
    write(tmp_path, [True])
    with pytest.raises(ValueError, match='dim: 8 there, 16 here'):
        checkpoint.load(tmp_path, quiet, {'dim': 16})
    assert checkpoint.load(tmp_path, quiet, {'dim': 16}, {'dim'})['epoch'] == 1


def test_a_file_of_another_program_is_no_checkpoint(tmp_path):
    torch.save({'weights': torch.ones(2)}, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match='no checkpoint of this program'):
        checkpoint.read(tmp_path / 'x.pth')

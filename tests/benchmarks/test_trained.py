"""What detection and segmentation share around their loop."""
import argparse
from pathlib import Path

import numpy as np
import pytest

from simsiam_models.benchmarks import detection, segmentation
from simsiam_models.benchmarks.detection import command as detect
from simsiam_models.benchmarks.segmentation import command as segment
from simsiam_models.benchmarks.trained import TRAINING, check_run
from simsiam_models.cli import build_parser, main


def check(command: str, data: Path, output: Path, *flags: str) -> None:
    check_run(build_parser().parse_args([command, str(data), '--output', str(output), *flags]))


@pytest.mark.parametrize('command', ['detect', 'segment'])
def test_a_run_is_not_written_into_its_data(command: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    """segment writes OUTPUT/masks, which may be the masks of the data."""
    (data := tmp_path / 'data').mkdir()
    (tmp_path / 'link').symlink_to(data)
    for output in (data, data / 'run', tmp_path / 'link', data / '..' / 'data'):
        with pytest.raises(ValueError, match='is inside the data folder'):
            check(command, data, output)
    check(command, data, tmp_path / 'run')
    check(command, data, tmp_path / 'database')
    assert main([command, str(data), '--output', str(data)]) == 1
    assert 'is inside the data folder' in capsys.readouterr().err and not list(data.iterdir())


@pytest.mark.parametrize('command', ['detect', 'segment'])
def test_eval_only_refuses_flags_that_it_would_ignore_and_folders_that_hold_results(command: str, tmp_path: Path):
    run, data = tmp_path / 'run', tmp_path / 'data'
    with pytest.raises(ValueError, match='settings of the trained run: leave out --lr, --image-size'):
        check(command, data, tmp_path / 'again', '--eval-only', str(run), '--image-size', '64', '--lr', '1')
    check(command, data, tmp_path / 'again', '--eval-only', str(run), '--device', 'cpu', '--workers', '1')
    for name in ('checkpoint.pth', 'record.json'):
        run.mkdir(exist_ok=True)
        (run / name).write_text('')
        with pytest.raises(ValueError, match='already holds a run or a record; name another folder'):
            check(command, data, run, '--eval-only', str(run))
        (run / name).unlink()


def test_the_flags_of_training_are_all_those_of_numbers():
    """A new number of a protocol is one that --eval-only must not ignore."""
    for command in (detect, segment):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        group = next(g for g in parser._action_groups if g.title.startswith('numbers'))
        assert {action.dest for action in group._group_actions} <= {*TRAINING}


@pytest.mark.parametrize('build', [detection.build, segmentation.build])
def test_classes_are_a_number_or_names(build):
    for wrong in ('road', 2.0, None, np.float32(3)):
        with pytest.raises(ValueError, match='classes must be their number or a list of names'):
            build('resnet18:random', classes=wrong)

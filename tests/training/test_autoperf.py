"""--auto-perf and the trial of torch.compile: what is chosen, what is left alone, and that a run keeps it."""
import copy
import json
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY
from processes import spawn
from torch import nn

from simsiam_models.runtime.distributed import World
from simsiam_models.runtime.lifecycle import Lifecycle
from simsiam_models.runtime.signals import Signals
from simsiam_models.training import pretrain, setup
from simsiam_models.training.autoperf import choose_perf
from simsiam_models.training.options import resolve_recipe
from simsiam_models.training.pretrain import build_parser
from simsiam_models.training.recipes import RECIPES
from simsiam_models.training.setup import make_model
from simsiam_models.training.step import Perf, Trainer, train_step

CPU = torch.device('cpu')
EAGER_LAST, EAGER_PLAIN, COMPILED_LAST = Perf(), Perf(channels_last=False), Perf(compile=True)


@pytest.fixture(autouse=True)
def light(monkeypatch, one_thread):
    """One thread, and no compiler, which takes a minute."""
    monkeypatch.setattr(nn.Module, 'compile', lambda self: None)


def sleeping(seconds):
    """make_step whose steps take what `seconds(amp, perf)` says."""
    return lambda model, amp, perf: lambda x1, x2: time.sleep(seconds(amp, perf))


def choose(make_step, amps=('bfloat16', 'off'), model=None, **more):
    said = []
    choice = choose_perf(model or nn.Conv2d(3, 4, 3), (4, 3, 8, 8), CPU, amps, make_step, said.append, **more)
    return choice, said


def test_the_fastest_is_taken_and_each_has_a_line():
    fast = ('off', EAGER_PLAIN)
    choice, said = choose(sleeping(lambda *key: 0.002 if key == fast else 0.01))
    assert choice == fast
    assert len(said) == 9 and all('samples/s (median of 20 timings)' in line for line in said[:8])
    assert said[8] == 'auto-perf: taking contiguous, eager, amp off'


def test_a_compiled_step_is_taken_where_it_is_the_fastest():
    choice, _ = choose(sleeping(lambda amp, perf: 0.002 if perf == COMPILED_LAST else 0.01), amps=('off',))
    assert choice == ('off', COMPILED_LAST)


def test_a_combination_that_fails_is_named_with_its_reason_and_passed_over():
    def make_step(model, amp, perf):
        if amp == 'bfloat16' and perf == EAGER_LAST:
            raise RuntimeError('no such operator\nin C++')
        return lambda x1, x2: time.sleep(0.002 if amp == 'bfloat16' else 0.004)
    (amp, perf), said = choose(make_step)
    assert amp == 'bfloat16' and perf != EAGER_LAST
    assert said[0] == (
        'auto-perf: channels_last, eager, amp bfloat16: does not work here (RuntimeError: no such operator)')


def test_a_line_says_how_long_compiling_took():
    def make_step(model, amp, perf):
        calls = []
        return lambda x1, x2: time.sleep(0.6 if perf.compile and not calls.append(0) and len(calls) == 1 else 0.001)
    _, said = choose(make_step, amps=('off',))
    compiled = [line for line in said if 'compiled, amp off:' in line]
    assert len(compiled) == 2 and all(line.endswith('), compiled in 1 s') for line in compiled)


def test_a_short_run_is_not_compiled():
    choice, said = choose(sleeping(lambda *key: 0.01), amps=('off',), steps_of_run=6000)  # a minute or two
    assert choice[1].compile is False and not any('compiled' in line for line in said)
    assert said[0].startswith('auto-perf: not compiling: it takes about a minute, the whole run only 1.')
    _, said = choose(sleeping(lambda *key: 0.01), amps=('off',), steps_of_run=600_000)
    assert sum('compiled' in line for line in said) >= 2


def test_only_the_given_ways_are_timed():
    choice, said = choose(sleeping(lambda *key: 0.001), amps=('off',), ways=(EAGER_LAST, COMPILED_LAST))
    assert choice[1] in (EAGER_LAST, COMPILED_LAST) and not any('contiguous' in line for line in said)


def test_a_batch_that_does_not_fit_the_card_is_an_error_of_memory():
    def make_step(model, amp, perf):
        raise torch.OutOfMemoryError('CUDA out of memory')
    with pytest.raises(torch.OutOfMemoryError):
        choose(make_step)


def test_without_any_that_works_it_is_one_error():
    def make_step(model, amp, perf):
        raise RuntimeError('broken')
    with pytest.raises(ValueError, match='no way of computing a step works'):
        choose(make_step)


def test_compiling_is_not_tried_on_a_cpu_without_time():
    choice, said = choose(sleeping(lambda *key: 0.001), amps=('off',), budget=0.0)
    assert choice == ('off', EAGER_LAST)
    assert [line for line in said if 'compiled' in line] == [
        'auto-perf: channels_last, compiled, amp off: not tried, as no time is left',
        'auto-perf: contiguous, compiled, amp off: not tried, as no time is left']


def test_model_buffers_and_random_state_stay_the_same_bits():
    args = build_parser().parse_args([*TINY, '--batch-size', '8'])
    _, recipe = resolve_recipe(args)
    model = make_model(recipe, 0)
    before, state, strides = copy.deepcopy(model.state_dict()), torch.get_rng_state(), [
        p.stride() for p in model.parameters()]

    def make_step(trial, amp, perf):
        trainer = Trainer(trial.train(), recipe, World(0, 1, CPU), amp, perf)
        return lambda x1, x2: train_step(trainer, x1, x2)
    choose_perf(model, (8, 3, 32, 32), CPU, ('off', 'bfloat16'), make_step, lambda text: None, budget=0.5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert strides == [p.stride() for p in model.parameters()] and all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_the_choice_is_recorded_and_a_continued_run_keeps_it(few_digits, tmp_path, monkeypatch, capsys):
    asked = []

    def chosen(model, shape, device, amps, make_step, say, ways):
        asked.append((shape, amps))
        return 'bfloat16', EAGER_PLAIN
    monkeypatch.setattr(setup, 'choose_perf', chosen)
    monkeypatch.setattr(setup, 'has_bfloat16', lambda: True)
    args = [
        str(few_digits), *TINY, '--amp', 'auto', '--epochs', '1', '--batch-size', '16', '--workers', '0', '--output',
        str(tmp_path)]
    pretrain.main([*args, '--auto-perf', '--max-steps', '2'])
    record = json.loads((tmp_path / 'args.json').read_text())
    assert record['amp'] == 'bfloat16' and record['perf'] == {'channels_last': False, 'compile': False}
    for more in (['--auto-perf', '--max-steps', '3'], []):
        pretrain.main([*args, *more])
        assert 'amp bfloat16, contiguous, eager' in capsys.readouterr().out
    assert asked == [((16, 3, 32, 32), ('bfloat16', 'off'))]  # asked once


def _decide(rank: int, folder: Path) -> list[str]:
    args = build_parser().parse_args(['--auto-perf', '--device', 'cpu'])
    world, record = World(rank, 2, CPU), {'amp': 'off', 'perf': None}
    if world.main:
        (folder / 'args.json').write_text('{}')
        # The other process keeps the real one, unused.
        setup.choose_perf = lambda *given, **more: ('bfloat16', EAGER_PLAIN)
    life = Lifecycle(folder / 'checkpoint.pth', setup.KEYS, world, Signals(), print)
    amp, perf = setup.decide_perf(args, RECIPES['demo'], nn.Linear(1, 1), record, life, False)
    return [amp, str(perf)]


def test_the_first_process_decides_for_all(tmp_path):
    assert spawn(_decide, tmp_path, tmp_path) == [['bfloat16', 'contiguous, eager']] * 2


def test_a_named_precision_is_not_changed(few_digits, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(setup, 'choose_perf', lambda *a, **more: asked.append(a[3]) or (a[3][0], Perf()))
    pretrain.main([
        str(few_digits), *TINY, '--amp', 'off', '--auto-perf', '--epochs', '1', '--batch-size', '16', '--workers', '0',
        '--max-steps', '1', '--output', str(tmp_path)])
    assert asked == [('off',)]


def test_without_the_flag_a_run_is_channels_last_and_eager(few_digits, tmp_path, capsys):
    pretrain.main([
        str(few_digits), *TINY, '--epochs', '1', '--batch-size', '16', '--workers', '0', '--max-steps', '1', '--output',
        str(tmp_path)])
    assert 'amp off, channels_last, eager' in capsys.readouterr().out
    assert json.loads((tmp_path / 'args.json').read_text())['perf'] is None


# torch.compile by default, on a card


def decide(folder, monkeypatch, *flags, device='cuda', size=1, continued=False, perf=None):
    """Returns what is decided, and what choose_perf was asked; nothing runs on the device."""
    asked = []
    monkeypatch.setattr(setup, 'choose_perf', lambda *a, **more: asked.append(more) or ('bfloat16', COMPILED_LAST))
    args, world = build_parser().parse_args(flags), World(0, size, torch.device(device))
    (folder / 'args.json').write_text('{}')
    life = Lifecycle(folder / 'checkpoint.pth', setup.KEYS, world, Signals(), lambda text: None)
    record = {'amp': 'bfloat16', 'perf': perf, 'images': 1000}
    monkeypatch.setattr(World, 'broadcast_from_main', lambda self, make: make())
    chosen = setup.decide_perf(args, RECIPES['demo'], nn.Linear(1, 1), record, life, continued)
    assert chosen[0] == 'bfloat16'
    return chosen[1], asked, json.loads((folder / 'args.json').read_text())


def test_on_a_card_a_trial_decides_about_compiling_and_is_recorded(tmp_path, monkeypatch):
    perf, asked, recorded = decide(tmp_path, monkeypatch)
    assert perf == COMPILED_LAST and recorded['perf'] == {'channels_last': True, 'compile': True}
    assert asked == [{'ways': [EAGER_LAST, COMPILED_LAST], 'steps_of_run': 20 * (1000 // 64)}]


@pytest.mark.parametrize('flags, more, want', [
    (['--compile'], {}, COMPILED_LAST), (['--no-compile'], {}, EAGER_LAST), ([], {'device': 'cpu'}, EAGER_LAST),
    ([], {'size': 2}, EAGER_LAST), ([], {'continued': True}, EAGER_LAST),
    ([], {'perf': {'channels_last': True, 'compile': True}}, COMPILED_LAST),
    (['--no-compile'], {'perf': {'channels_last': True, 'compile': True}}, EAGER_LAST),
    (['--auto-perf', '--no-compile'], {'perf': {'channels_last': False, 'compile': False}}, EAGER_PLAIN)])
def test_there_is_no_trial_where_a_flag_the_record_or_the_place_decides(tmp_path, monkeypatch, flags, more, want):
    perf, asked, _ = decide(tmp_path, monkeypatch, *flags, **more)
    assert perf == want and not asked


def test_auto_perf_leaves_out_compiling_if_told_so(tmp_path, monkeypatch):
    _, asked, _ = decide(tmp_path, monkeypatch, '--auto-perf', '--no-compile')
    assert asked == [{'ways': [EAGER_LAST, EAGER_PLAIN]}]

"""`simsiam preflight`: the survey against PIL and numpy, the trial, and the command that train.py must accept."""
import hashlib
import io
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_digits
from PIL import Image

from simsiam_models.benchmarks.finetune.data import open_source
from simsiam_models.cli import build_parser as build_command_parser
from simsiam_models.cli import main
from simsiam_models.data import MemoryImages, UnreadableError, open_data
from simsiam_models.data.augment import Augmentation
from simsiam_models.data.philox import permutation
from simsiam_models.preflight import report as module
from simsiam_models.preflight import trial as trial_module
from simsiam_models.preflight.load import Clock, find_disturbance, read_clock
from simsiam_models.preflight.survey import survey
from simsiam_models.preflight.trial import make_noise, make_trainer, run_trial, saved_bytes
from simsiam_models.training.options import resolve_recipe
from simsiam_models.training.pretrain import build_parser
from simsiam_models.training.recipes import RECIPES, Recipe

CPU = torch.device('cpu')


@pytest.fixture(autouse=True)
def _pinned(one_thread):
    """Two threads on a busy machine wait for each other."""


@pytest.fixture
def fast(monkeypatch):
    """A clock by which any machine is fast and quiet: it moves on by 50 ms at each look, and a step takes 1 ms."""
    looks = itertools.count()
    monkeypatch.setattr(trial_module, 'time', SimpleNamespace(perf_counter=lambda: next(looks) / 20))
    monkeypatch.setattr(trial_module, 'time_step', lambda step, views: (step(*views), 0.001)[1])
    monkeypatch.setattr(trial_module, 'find_disturbance', lambda before, after: 0.0)  # whatever else runs


def run(*args: object, seconds: float = 3) -> int:
    return main(['preflight', *map(str, args), '--device', 'cpu', '--seconds', str(seconds)])


def photo(size: tuple[int, int], seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture(scope='module')
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 digits and, of each thing that is counted, a known number."""
    folder = write_digits(tmp_path_factory.mktemp('mixed') / 'data', 64)
    odd = folder / '0'
    for i in range(3):
        shutil.copy(odd / '0000.jpg', odd / f'copy{i}.jpg')
    for i in range(2):
        (odd / f'torn{i}.png').write_bytes(b'no image')
    for i in range(4):
        photo((100 + i, 20 + i), i).save(odd / f'wide{i}.png')  # all longer than 3 : 1
    turned = Image.Exif()
    turned[0x0112] = 6
    photo((40, 50), 9).save(odd / 'turned.jpg', exif=turned)
    Image.new('RGB', (33, 33), (9, 90, 200)).save(odd / 'flat.png')
    return folder


@pytest.fixture(scope='module')
def told(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    file = tmp_path_factory.mktemp('told') / 'record.json'
    assert run(mixed, '--all', '--json', file) == 0
    return json.loads(file.read_text())


def decoded(folder: Path) -> list[np.ndarray]:
    images = []
    for path in sorted(folder.rglob('*.*')):
        if 'torn' not in path.name:
            with Image.open(path) as image:
                images.append(np.asarray(image.convert('RGB')))
    return images


def test_every_count_is_the_known_one(told, mixed):
    s = told['survey']
    assert (s['images'], s['read'], s['decoded'], s['unreadable'], s['complete']) == (75, 75, 73, 2, True)
    assert [Path(text.split(':')[0]).name for text in s['unreadable_first']] == ['torn0.png', 'torn1.png']
    assert (s['duplicates'], s['constant'], s['turned']) == (3, 1, 1)
    assert s['elongated'] == sum(max(x.shape[:2]) > 3 * min(x.shape[:2]) for x in decoded(mixed)) == 4
    sizes = Counter(path.parent.name for path in mixed.rglob('*.*'))
    assert s['classes'] == 10
    assert s['smallest_class'][1] == min(sizes.values()) and s['largest_class'] == ['0', sizes['0']]
    assert s['bytes'] == sum(p.stat().st_size for p in mixed.rglob('*.*') if 'torn' not in p.name)


def test_duplicates_are_those_that_hashing_all_files_finds(told, mixed):
    found = Counter(hashlib.sha256(p.read_bytes()).digest() for p in mixed.rglob('*.*') if 'torn' not in p.name)
    assert told['survey']['duplicates'] == sum(n - 1 for n in found.values())
    assert {tuple(pair) for pair in told['survey']['duplicates_first']} == {
        (f'0/copy{i}.jpg', '0/0000.jpg') for i in range(3)}


def test_sizes_and_shares_are_those_that_pil_reads(told, mixed):
    images = decoded(mixed)
    s = told['survey']
    for side, axis in (('width', 1), ('height', 0)):
        sides = [x.shape[axis] for x in images]
        assert s[side] == [min(sides), int(np.median(sides)), max(sides)]
    assert s['smaller_than_view'] == np.mean([min(x.shape[:2]) < 32 for x in images]) > 0
    assert s['grayscale'] == np.mean([(x == x[..., :1]).all() for x in images]) < 1


def test_mean_and_std_weigh_each_image_the_same(told, mixed):
    images = [x.reshape(-1, 3) / 255.0 for x in decoded(mixed)]
    mean = np.mean([x.mean(0) for x in images], 0)
    std = np.sqrt(np.mean([(x**2).mean(0) for x in images], 0) - mean**2)
    np.testing.assert_allclose(told['survey']['mean'], mean, atol=1e-9)
    np.testing.assert_allclose(told['survey']['std'], std, atol=1e-9)


def test_the_command_is_one_that_pretrain_takes_and_fits_the_data(told, mixed):
    words = shlex.split(told['command'])
    assert words[:3] == ['simsiam', 'pretrain', str(mixed)]
    name, recipe = resolve_recipe(build_parser().parse_args(words[2:]))
    assert (name, recipe.batch_size, recipe.epochs) == (told['recipe'], told['batch_size'], told['epochs'])
    assert name == 'small' and 2 <= recipe.batch_size <= 75
    assert told['cost']['steps'] == 75 // recipe.batch_size * recipe.epochs


def test_each_line_says_where_it_comes_from(told):
    assert {line['kind'] for line in told['lines']} == {'measured', 'published', 'rule of thumb'}


def test_a_checkpoint_takes_the_bytes_that_were_counted(told, tmp_path):
    recipe = RECIPES[told['recipe']]
    trainer = make_trainer(trial_module.make_model(recipe, 0), recipe, CPU, 'off')
    torch.save([trainer.model.state_dict(), trainer.optimizer.state_dict()], tmp_path / 'checkpoint.pth')
    measured = (tmp_path / 'checkpoint.pth').stat().st_size
    assert told['trial']['state_bytes'] == pytest.approx(measured, rel=0.05)


def test_the_report_is_short_and_ends_with_the_command(few_digits, capsys, fast):
    assert run(few_digits) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) <= 35 and out[-1].startswith('simsiam pretrain ')
    assert sum('images/s' in line for line in out) == 3  # data alone, step alone, both


def test_a_short_trial_ends(few_digits, tmp_path):
    began = time.perf_counter()
    run_trial(open_data(few_digits)[0], Recipe(**{**vars(RECIPES['demo']), 'epochs': 10**6}), CPU, 0, 2)
    assert time.perf_counter() - began < 100  # on a very busy machine; it would take days


def test_the_record_says_how_the_trial_trained(few_digits, tmp_path, fast):
    assert run(few_digits, '--json', tmp_path / 'r.json', seconds=4) == 0
    trial = json.loads((tmp_path / 'r.json').read_text())['trial']
    assert trial['steps'] > 1 and trial['rate'] > 0 and 0 <= trial['waiting'] <= 1 and trial['collapsed'] is False


def test_the_trial_trains(few_digits, fast):
    recipe = Recipe(**{**vars(RECIPES['demo']), 'batch_size': 16, 'lr': 2.0})
    t = run_trial(open_data(few_digits)[0], recipe, CPU, 0, 20)
    assert t.steps == recipe.epochs * 64 // 16
    assert t.last['loss'] < t.first['loss'] and not t.collapsed
    assert 'on collapse' not in str(module.trial_lines(t)) and t.run_seconds == t.batch / t.rate


def test_a_step_that_takes_too_long_leaves_collapse_open(few_digits, monkeypatch, capsys):
    slow = trial_module.train_step
    monkeypatch.setattr(
        trial_module, 'train_step', lambda trainer, x1, x2: (time.sleep(0.05 * len(x1)), slow(trainer, x1, x2))[1])
    assert run(few_digits, seconds=3) == 0
    out = capsys.readouterr().out
    assert 'nothing is known about collapse' in out and 'estimated from' in out


def test_a_sample_is_the_same_in_every_run(few_digits):
    images = open_data(few_digits)[0]
    first, second = (survey(images, workers, 60, sample=20).record(32) for workers in (1, 3))
    del first['seconds'], second['seconds']
    assert first == second and first['read'] == 20 and not first['complete']
    chosen = [images.read(int(i)) / 255 for i in permutation(0, 0, 64)[:20]]
    np.testing.assert_allclose(first['mean'], np.mean([x.mean((0, 1)) for x in chosen], 0), atol=1e-9)


def test_reading_stops_when_its_time_is_over():
    class Slow(MemoryImages):
        def read(self, index: int) -> np.ndarray:
            time.sleep(0.05)
            return super().read(index)

    images = Slow(np.zeros((500, 8, 8, 3), np.uint8), None, [], 'slow')
    s = survey(images, 2, 0.5)
    assert 2 <= s.read < 100 and not s.complete and s.seconds < 5
    assert survey(images, 2, 0.0).read >= 1  # never nothing at all


def test_what_the_reader_left_out_is_in_the_record(few_digits, tmp_path):
    shutil.copytree(few_digits, tmp_path / 'data')
    for name in ('3/.ipynb_checkpoints/1.png', '3/photo.heic'):
        (tmp_path / 'data' / name).parent.mkdir(exist_ok=True)
        (tmp_path / 'data' / name).touch()
    notes = survey(open_data(tmp_path / 'data')[0], 1, 60).record(32)['notes']
    assert [note.split(':')[1] for note in notes] == [
        ' 1 (1 .ipynb_checkpoints), the first 3/.ipynb_checkpoints', ' 1 (1 .heic), the first 3/photo.heic']


def test_images_without_files_are_compared_by_their_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    pixels[7] = pixels[2]
    s = survey(MemoryImages(pixels, None, [], 'memory'), 1, 60)
    assert (s.duplicates, s.duplicates_first, s.turned) == (1, [('image 7', 'image 2')], None)


def test_the_first_images_of_a_stream_are_read_and_it_says_so(monkeypatch, capsys):
    class Stream:
        name, labels, classes, digest, promise = 'a stream', None, [], '0' * 16, 'its own order'

        def __len__(self) -> int:
            return 64

        def samples(self, seed: int, epoch: int, start: int):
            for i in range(start, 64):
                file = io.BytesIO()
                photo((40, 36), i % 60).save(file, 'png')
                yield b'torn' if i == 3 else file.getvalue()

    monkeypatch.setattr(module, 'open_data', lambda spec, n: (Stream(), None))
    assert run('hf-stream:x', '--sample', 62, '--images-per-epoch', 64) == 0
    out = capsys.readouterr().out
    assert 'the first 62 of 64' in out and 'unreadable 1, duplicates 2' in out
    assert '--images-per-epoch 64' in out.splitlines()[-1]


def test_few_labelled_images_get_the_command_that_fine_tunes_them(few_digits, tmp_path, capsys, fast):
    assert run(few_digits, '--workers', '1', '--json', tmp_path / 'r.json') == 0
    out, told = capsys.readouterr().out, json.loads((tmp_path / 'r.json').read_text())
    assert f'\nlikely to work better than pretraining:\n{told["finetune_command"]}\n' in out
    assert any('64 images are few' in text and text.endswith('see its command below') for text in told['warnings'])
    args = build_command_parser().parse_args(shlex.split(told['finetune_command'])[1:])
    assert (args.data, args.model, args.device, args.workers) == (str(few_digits), 'simsiam_resnet50', 'cpu', 1)
    assert len(open_source(args).train) < 64  # `finetune` opens it
    assert '1 data thread,' in out


def test_images_without_labels_are_not_said_to_be_ready_for_fine_tuning(monkeypatch, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (80, 16, 16, 3), dtype=np.uint8)
    assert 'it needs labels, such as a subfolder per class' in warnings_of(pixels, monkeypatch, tmp_path)
    assert json.loads((tmp_path / 'r.json').read_text())['finetune_command'] == ''


@pytest.mark.parametrize('own, idle, found', [
    (10, 0, 0.5), (20, 0, 0.0), (19, 0, 0.0), (4, 12, 0.0), (4, 4, 0.6)])  # of 20 s of two cores
def test_a_timing_is_disturbed_by_others_only_where_they_leave_no_room(own, idle, found):
    assert find_disturbance(Clock(100, 50, 7), Clock(120, 50 + idle, 7 + own)) == pytest.approx(found)
    assert find_disturbance(None, Clock(1, 1, 1)) is None and find_disturbance(Clock(1, 1, 1), Clock(1, 1, 1)) is None


def test_busy_processes_are_seen(monkeypatch):
    if (before := read_clock()) is None:
        pytest.skip('the system does not tell whose time it was')
    spin = [sys.executable, '-c', 'import time; end = time.time() + 1.5\nwhile time.time() < end: pass']
    busy = [subprocess.Popen(spin) for _ in os.sched_getaffinity(0)]
    time.sleep(1.3)
    share = find_disturbance(before, read_clock())
    for process in busy:
        process.wait()
    assert share > 0.5


def test_a_disturbed_timing_is_a_warning(few_digits, tmp_path, monkeypatch, fast):
    monkeypatch.setattr(trial_module, 'find_disturbance', lambda before, after: 0.43)
    assert run(few_digits, '--json', tmp_path / 'r.json') == 0
    assert ('the timing was disturbed: 43 % of the processor time went to other processes; run it again on an idle '
            'machine' in json.loads((tmp_path / 'r.json').read_text())['warnings'])


def warnings_of(pixels: np.ndarray, monkeypatch, tmp_path: Path, *args: object) -> str:
    monkeypatch.setattr(module, 'open_data', lambda spec, n: (MemoryImages(pixels, None, [], 'memory'), None))
    assert run('memory', '--json', tmp_path / 'r.json', *args, seconds=1) == 0
    return '\n'.join(json.loads((tmp_path / 'r.json').read_text())['warnings'])


def test_images_of_one_colour_are_named_as_a_risk(monkeypatch, tmp_path):
    flat = np.full((80, 16, 16, 3), 128, np.uint8) + np.arange(80, dtype=np.uint8)[:, None, None, None]
    said = warnings_of(flat, monkeypatch, tmp_path)
    assert '80 of 80 images are of one colour' in said and 'collapse' in said


def test_small_batches_copies_and_small_images_are_named(monkeypatch, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (80, 16, 16, 3), dtype=np.uint8)
    assert 'repeat' not in warnings_of(pixels, monkeypatch, tmp_path)
    pixels[40:] = pixels[:40]
    said = warnings_of(pixels, monkeypatch, tmp_path, '--batch-size', 32)
    assert '50.0 % of the images repeat' in said and 'batch norm sees 32 samples' in said
    assert 'smaller than the 32 px views' in said


def test_more_unreadable_images_than_train_py_allows_are_named_with_the_flag_that_allows_them(
        few_digits, tmp_path, capsys):
    folder = shutil.copytree(few_digits, tmp_path / 'digits')
    for i in range(16):  # 16 of 80
        (folder / '1' / f'torn{i}.png').write_bytes(b'')
    assert run(folder, '--json', tmp_path / 'r.json', seconds=2) == 0
    assert any('--max-unreadable 0.21' in text for text in json.loads((tmp_path / 'r.json').read_text())['warnings'])
    out = capsys.readouterr().out
    assert out.count('torn') == 10 and 'unreadable 16' in out and '0x' not in out  # the first ten


def test_a_batch_that_does_not_fit_the_memory_is_halved_and_the_plan_follows(few_digits, monkeypatch, capsys):
    recipe = RECIPES['small']
    trainer = make_trainer(trial_module.make_model(recipe, 0), recipe, CPU, 'off')
    parameters = sum(p.numel() for p in trainer.model.parameters())
    room = 20 * saved_bytes(trainer, make_noise(4, 32, CPU)) / 4
    monkeypatch.setattr(trial_module, 'free_memory', lambda: room / 0.9 + 9 * parameters)
    assert run(few_digits, seconds=2) == 0
    out = capsys.readouterr().out
    assert 'batch 64 does not fit' in out and 'batch 32 does not fit' in out
    assert '--batch-size 16 ' in out.splitlines()[-1] + ' '


def test_a_card_that_is_too_small_gets_half_the_batch(few_digits, monkeypatch, capsys, fast):
    step, asked = trial_module.train_step, []

    def small(trainer, x1, x2):
        asked.append(len(x1))
        if len(x1) > 32:
            raise torch.cuda.OutOfMemoryError
        return step(trainer, x1, x2)

    monkeypatch.setattr(trial_module, 'train_step', small)
    assert run(few_digits, seconds=2) == 0
    out = capsys.readouterr().out
    assert 'batch 64 does not fit the card: halved' in out and '--batch-size 32 ' in out.splitlines()[-1]
    assert max(asked) == 64 and asked[-1] == 32


def test_twice_the_samples_keep_twice_as_much_for_the_backward_pass():
    recipe = RECIPES['demo']
    trainer = make_trainer(trial_module.make_model(recipe, 0), recipe, CPU, 'off')
    one, two = (saved_bytes(trainer, make_noise(n, 32, CPU)) for n in (4, 8))
    assert two / one == pytest.approx(2, rel=0.1)
    stem = 2 * 4 * 4 * (3 * 32 * 32 + 2 * 8 * 16 * 16)  # two views, four samples, four bytes
    assert one > stem


def test_large_images_on_a_card_get_the_papers_recipe_and_small_ones_the_one_for_cifar():
    def plan(side: int, n: int, device: str, **given):
        pixels = np.zeros((4, side, side, 3), np.uint8)
        s = survey(MemoryImages(pixels, None, [], 'memory'), 1, 60)
        object.__setattr__(s, 'images', n)
        return module.Plan('data', s, torch.device(device), **given)

    cuda = plan(300, 1_281_167, 'cuda')
    assert cuda.flags == ['data', '--recipe', 'in1k_bs512_ep100', '--batch-size', '512'] and cuda.recipe.epochs == 100
    assert plan(32, 50_000, 'cuda').command == 'simsiam pretrain data --recipe cifar10_ep800 --batch-size 512'
    assert plan(64, 100_000, 'cuda').recipe.augmentation == Augmentation(size=64, blur_p=0.0)
    stl = plan(96, 100_000, 'cuda')
    assert (stl.name, stl.recipe.augmentation.size, stl.recipe.epochs) == ('in1k_bs512_ep100', 96, 398)
    assert stl.steps >= 77_600 > stl.steps - stl.steps_per_epoch
    assert plan(300, 10_000, 'cuda').recipe.epochs == 800
    assert plan(300, 200, 'cuda').recipe.batch_size == 64  # at least 3 steps; no smaller than the paper's
    assert plan(300, 40, 'cuda').recipe.batch_size == 32
    small = plan(32, 10_000, 'cpu')
    assert small.command == 'simsiam pretrain data --recipe small --batch-size 64'
    assert plan(32, 1_000, 'cpu').steps >= small.steps  # few images get as many steps
    assert plan(32, 1_000, 'cpu', name='demo').recipe.augmentation == RECIPES['demo'].augmentation
    large = plan(300, 1_281_167, 'cuda', batch=1024)
    assert large.recipe.warmup_epochs == 10 and '--warmup-epochs 10' in large.command


@pytest.mark.parametrize('args, said', [
    (['nowhere'], 'no such'), (['DATA', '--recipe', 'x'], 'one of in1k'), (['DATA', '--batch-size', '65'], '64 or l'),
    (['DATA', '--batch-size', '1'], 'at least 2'), (['DATA', '--seconds', '0'], 'above 0'),
    (['DATA', '--workers', '-1'], 'at least 0'), (['DATA', '--sample', '0'], 'at least 1'),
    (['DATA', '--device', 'nothing'], 'not available here'),
    (['DATA', '--json', 'nowhere/r.json'], 'folder that exists')])
def test_a_mistake_is_one_sentence_and_exit_code_1(args, said, few_digits, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['preflight', *(str(few_digits) if a == 'DATA' else a for a in args)]) == 1
    out, err = capsys.readouterr()
    assert said in err and err.count('\n') == 1 and err.startswith('simsiam: ') and not out


def test_data_that_cannot_be_decoded_is_refused_in_one_sentence(tmp_path, few_digits, capsys):
    for i in range(4):
        (tmp_path / f'{i}.png').write_bytes(b'torn')
    assert run(tmp_path) == 1
    assert 'none of 4 images can be read' in capsys.readouterr().err
    for i, path in enumerate(sorted(few_digits.rglob('*.*'))[:3]):
        shutil.copy(path, tmp_path / f'good{i}{path.suffix}')
    assert run(tmp_path) == 1
    assert '4 of 7 images read cannot be decoded' in capsys.readouterr().err


def test_a_network_that_collapses_is_called_collapsed(few_digits, fast):
    recipe = Recipe(**{**vars(RECIPES['demo']), 'batch_size': 16})
    original = trial_module.make_model

    def constant(recipe: Recipe, seed: int):
        model = original(recipe, seed)
        model.projector = torch.nn.Sequential(torch.nn.Linear(128, recipe.dim))
        torch.nn.init.zeros_(model.projector[0].weight).requires_grad_(False)  # all outputs are alike
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial_module, 'make_model', constant)
        t = run_trial(open_data(few_digits)[0], recipe, CPU, 0, 3)
    assert t.steps > 1 and t.collapsed and t.diagnosis.startswith('COLLAPSED')


def test_unreadable_images_do_not_end_the_trial(fast):
    class Torn(MemoryImages):
        def read(self, index: int) -> np.ndarray:
            if index % 3 == 0:
                raise UnreadableError(f'{index}: torn')
            return super().read(index)

    pixels = np.random.default_rng(0).integers(0, 256, (96, 16, 16, 3), dtype=np.uint8)
    recipe = Recipe(**{**vars(RECIPES['demo']), 'batch_size': 32})
    assert run_trial(Torn(pixels, None, [], 'torn'), recipe, CPU, 1, 3).steps > 1

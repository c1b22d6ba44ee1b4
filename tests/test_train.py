"""train.py from end to end on real image files."""
import copy
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from conftest import TINY, run_train
from PIL import Image
from torch import nn

from simsiam_models import simsiam_loss
from simsiam_models.data import EvalImages, Transform, open_data
from simsiam_models.data.augment import normalize
from simsiam_models.runtime.precision import choose_amp
from simsiam_models.training import pretrain, step
from simsiam_models.training.doctor import Diagnosis, Doctor
from simsiam_models.training.journal import Journal
from simsiam_models.training.monitor import effective_rank, output_std
from simsiam_models.training.options import name_recipe, resolve_recipe
from simsiam_models.training.pretrain import build_parser
from simsiam_models.training.recipes import RECIPES, Recipe
from simsiam_models.training.schedule import load_optimizer, make_optimizer, scaled_lr
from simsiam_models.training.setup import make_model


@pytest.fixture(scope='module')
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory):
    """One finished run on 1000 digits: 2000 PNG and JPEG bytes in, a backbone out."""
    output = tmp_path_factory.mktemp('run') / 'out'
    result = run_train(
        digits, *TINY, '--epochs', '12', '--batch-size', '64', '--lr', '0.2', '--workers', '2', '--output', output,
        '--knn-images', 'all', python=sys.executable)
    assert result.returncode == 0, result.stderr
    return output, result.stdout


def test_digits_are_learned_without_labels(finished):
    output, text = finished
    knn = [line for line in map(json.loads, (output / 'log.jsonl').read_text().splitlines()) if 'knn' in line]
    assert knn[-1]['knn'] > knn[0]['knn']['random'] + 5
    assert 'kNN (k=20, T=0.1; 800 bank images, 200 queries): trained backbone' in text


def test_log_lines_hold_the_figures(finished):
    lines = [json.loads(line) for line in (finished[0] / 'log.jsonl').read_text().splitlines()]
    steps = [line for line in lines if 'loss' in line]
    assert {'epoch', 'step', 'loss', 'std', 'rank', 'lr', 'images_per_second', 'waiting', 'collapsed'} <= set(steps[0])
    assert steps[-1]['loss'] < steps[0]['loss'] and not steps[-1]['collapsed']


def in_process(data: Path, output: Path, *more: str) -> dict:
    return pretrain.main([str(data), *TINY, '--batch-size', '16', '--workers', '0', '--output', str(output), *more])


def figure_lines(output: Path) -> list[dict]:
    return [line for line in map(json.loads, (output / 'log.jsonl').read_text().splitlines()) if 'loss' in line]


def test_figures_are_those_of_their_step_and_are_read_after_the_next_is_launched(
        few_digits, tmp_path, monkeypatch, one_thread):
    seen, order = [], []
    train_step, write = pretrain.train_step, Journal._write

    def watch_step(trainer, x1, x2, step):
        loss, p, z = train_step(trainer, x1, x2, step)
        seen.append((float(loss), float(output_std(z)), effective_rank(z)))
        order.append(f'step {step}')
        return loss, p, z

    def watch_write(self, seconds):
        write(self, seconds)
        order.append(f'read {self.figures["epoch"] * 4 + self.figures["step"]}')
    monkeypatch.setattr(pretrain, 'train_step', watch_step)
    monkeypatch.setattr(Journal, '_write', watch_write)
    last = in_process(few_digits, tmp_path, '--epochs', '2', '--log-every', '2', '--max-steps', '7')
    lines = figure_lines(tmp_path)
    assert [(f['epoch'], f['step']) for f in lines] == [(0, 2), (0, 4), (1, 2), (1, 3)]
    for f, steps in zip(lines, [(0, 1), (2, 3), (4, 5), (6,)], strict=True):
        mean = sum(seen[i][0] for i in steps) / len(steps)
        assert (f['loss'], f['std'], f['rank']) == pytest.approx((mean, *seen[steps[-1]][1:]), rel=1e-6)
        assert f['images_per_second'] > 0 and 0 <= f['waiting'] <= 1
    assert order == [
        'step 1', 'step 2', 'step 3', 'read 2', 'step 4', 'read 4', 'step 5', 'step 6', 'step 7', 'read 6', 'read 7']
    assert last['loss'] == lines[-1]['loss']


@pytest.mark.parametrize('bad_step, where', [(2, 'epoch 0, step 2'), (4, 'epoch 0, step 4'), (7, 'epoch 1, step 4')])
def test_a_loss_that_is_no_number_stops_before_a_checkpoint_is_written(
        few_digits, tmp_path, monkeypatch, one_thread, bad_step, where):
    calls = []

    def loss(*outputs):
        calls.append(1)
        return simsiam_loss(*outputs) * (float('nan') if len(calls) == bad_step else 1)
    monkeypatch.setattr(step, 'simsiam_loss', loss)
    with pytest.raises(FloatingPointError, match=f'the loss is nan at {where}: lower --lr'):
        in_process(few_digits, tmp_path, '--epochs', '2', '--log-every', '2')
    written = torch.load(tmp_path / 'checkpoint.pth', weights_only=True)
    assert (written['epoch'], written['step']) == (int(bad_step > 4), 0)
    assert all(v.isfinite().all() for v in written['model'].values())
    if bad_step > 4:
        assert [(f['epoch'], f['step']) for f in figure_lines(tmp_path)] == [(0, 2), (0, 4), (1, 2)]


def make_steps(optimizer, parameters: list[torch.Tensor], n: int = 3) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    for _ in range(n):
        for p in parameters:
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=g))
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def test_a_checkpoint_of_the_unfused_optimizer_continues_in_the_fused_one():
    recipe = Recipe('', batch_size=64, lr=0.1)
    old = nn.Conv2d(3, 4, 3)
    new = copy.deepcopy(old).to(memory_format=torch.channels_last)
    groups = [dict(params=list(old.parameters()), fix_lr=False), dict(params=[], fix_lr=True)]
    before = torch.optim.SGD(groups, scaled_lr(recipe), 0.9, weight_decay=1e-4)
    make_steps(before, list(old.parameters()))
    new.load_state_dict(old.state_dict())
    optimizer = make_optimizer(new, recipe)
    load_optimizer(optimizer, before.state_dict())
    assert all(group['fused'] for group in optimizer.param_groups)
    for p in new.parameters():
        assert optimizer.state[p]['momentum_buffer'].stride() == p.stride()
    expected = make_steps(before, list(old.parameters()))
    for a, b in zip(make_steps(optimizer, list(new.parameters())), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_an_overflow_in_the_first_step_leaves_weights_and_momentum_clean():
    model = nn.Linear(3, 2)
    before = copy.deepcopy(model.state_dict())
    optimizer, scaler = make_optimizer(model, Recipe('')), torch.amp.GradScaler('cpu')
    scaler.scale(model(torch.full((1, 3), 1e38)).sum() * 1e38).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(not optimizer.state[p]['momentum_buffer'].any() for p in model.parameters())


class Slow(nn.Module):
    """Takes longer in one of the precisions, or refuses bfloat16."""

    def __init__(self, slow_in_bf16: bool, refuses: bool = False) -> None:
        super().__init__()
        self.bn, self.slow_in_bf16, self.refuses = nn.BatchNorm2d(3), slow_in_bf16, refuses

    def forward(self, *views: torch.Tensor) -> tuple[torch.Tensor, ...]:
        bf16 = torch.is_autocast_enabled('cpu')
        if bf16 and self.refuses:
            raise RuntimeError('not implemented for BFloat16')
        time.sleep(0.01 if bf16 == self.slow_in_bf16 else 0.001)
        return tuple(self.bn(x + torch.rand(1)) for x in views)


@pytest.mark.parametrize('model, expected', [
    (Slow(True), 'off'), (Slow(False), 'bfloat16'), (Slow(False, refuses=True), 'off')])
def test_auto_times_the_runs_own_model_and_leaves_it_alone(model, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX512')
    state, buffers = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    assert choose_amp('auto', torch.device('cpu'), model, (4, 3, 8, 8)) == expected
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, buffers[k]) for k, v in model.state_dict().items())


def test_auto_does_not_time_an_emulated_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX2')
    assert choose_amp('auto', torch.device('cpu'), Slow(False), (4, 3, 8, 8)) == 'off'


def test_plain_timm_loads_the_backbone_and_gives_the_runs_features(finished, digits):
    output, _ = finished
    images = open_data(digits)[0]
    _, x = next(iter(EvalImages(images, [torch.arange(8).numpy()], Transform(32, 32))))
    x = normalize(x.permute(0, 3, 1, 2).float() / 255)
    torch.save(x, output / 'x.pt')
    code = (
        'import sys, timm, torch; torch.set_num_threads(1)\n'
        f'm = timm.create_model("local-dir:{output}/backbone", pretrained=True).eval()\n'
        f'torch.set_grad_enabled(False); torch.save(m(torch.load("{output}/x.pt")), "{output}/f.pt")\n'
        'c = timm.data.resolve_model_data_config(m)\n'
        'assert tuple(c["input_size"]) == (3, 32, 32) and c["interpolation"] == "bilinear" and c["crop_pct"] == 1, c\n'
        'assert not any(name.startswith("simsiam") for name in sys.modules)')
    subprocess.run([sys.executable, '-c', code], check=True, cwd=output, timeout=120)
    torch.set_num_threads(1)
    state = torch.load(output / 'checkpoint.pth', weights_only=True)['model']
    _, recipe = resolve_recipe(build_parser().parse_args([str(digits), *TINY]))
    model = make_model(recipe, 0)
    model.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(model.backbone.eval()(x), torch.load(output / 'f.pt'))


def test_a_finished_run_is_not_run_again(finished, digits):
    output, _ = finished
    before = (output / 'checkpoint.pth').read_bytes()
    result = run_train(digits, *TINY, '--epochs', '12', '--batch-size', '64', '--lr', '0.2', '--output', output)
    assert result.returncode == 0 and 'continuing' not in result.stdout
    assert f'{output} holds this run, and it is finished; --extend N continues it to N epochs' in result.stdout
    assert (output / 'checkpoint.pth').read_bytes() == before


def test_another_run_in_the_folder_is_refused(finished, digits):
    output, _ = finished
    before = {p: p.read_bytes() for p in output.rglob('*') if p.is_file()}
    result = run_train(digits, *TINY, '--epochs', '12', '--batch-size', '32', '--lr', '0.2', '--output', output)
    assert_one_line(result, 'holds another run (batch_size: 64 there, 32 here)')
    assert {p: p.read_bytes() for p in output.rglob('*') if p.is_file()} == before


def test_a_run_that_continues_on_a_copy_with_other_pixels_says_so(few_digits, tmp_path):
    args = [*TINY, '--epochs', '1', '--batch-size', '16', '--workers', '0', '--output', tmp_path / 'run']
    assert run_train(few_digits, *args, '--max-steps', '1').returncode == 0
    moved, resized = (shutil.copytree(few_digits, tmp_path / name) for name in ('moved', 'resized'))
    for path in resized.rglob('*.png'):
        Image.open(path).resize((6, 6)).save(path)
    words = 'the image files have other sizes than when this run began'
    for data, said in ((moved, False), (resized, True)):
        result = run_train(data, *args, '--max-steps', '2')
        assert result.returncode == 0 and 'continuing it' in result.stdout, result.stderr
        assert (words in result.stdout) == said
    again = ['--resume', tmp_path / 'run' / 'checkpoint.pth', '--output', tmp_path / 'again']
    result = run_train(resized, *args, *again, '--max-steps', '2')
    assert result.returncode == 0 and words in result.stdout, result.stderr


def test_a_stopped_run_ends_in_the_same_bits_as_an_undisturbed_one(few_digits, tmp_path):
    args = [few_digits, *TINY, '--epochs', '2', '--batch-size', '16', '--workers', '0']
    assert run_train(*args, '--output', tmp_path / 'whole').returncode == 0
    for steps in ('3', '6'):  # inside the first and the second epoch
        result = run_train(*args, '--output', tmp_path / 'parts', '--max-steps', steps)
        assert result.returncode == 0 and f'stopped after {steps} steps' in result.stdout, result.stderr
    assert not (tmp_path / 'parts' / 'backbone').exists()
    assert run_train(*args, '--output', tmp_path / 'parts').returncode == 0
    whole, parts = (torch.load(tmp_path / n / 'checkpoint.pth', weights_only=True) for n in ('whole', 'parts'))
    assert all(torch.equal(v, parts['model'][k]) for k, v in whole['model'].items())


def test_a_torn_checkpoint_falls_back_to_the_one_before(few_digits, tmp_path):
    args = [few_digits, *TINY, '--epochs', '2', '--batch-size', '16', '--workers', '0', '--output', tmp_path]
    assert run_train(*args).returncode == 0
    whole = torch.load(tmp_path / 'checkpoint.pth', weights_only=True)['model']
    path = tmp_path / 'checkpoint.pth'
    path.write_bytes(path.read_bytes()[:1000])
    result = run_train(*args)
    assert result.returncode == 0 and 'cannot be read' in result.stdout
    again = torch.load(path, weights_only=True)['model']
    assert all(torch.equal(v, again[k]) for k, v in whole.items())


def test_a_flat_folder_without_labels_trains(few_digits, tmp_path):
    for i, path in enumerate(sorted(few_digits.rglob('*.png'))):
        (tmp_path / 'flat').mkdir(exist_ok=True)
        (tmp_path / 'flat' / f'{i}.png').write_bytes(path.read_bytes())
    result = run_train(
        tmp_path / 'flat', *TINY, '--epochs', '1', '--batch-size', '16', '--workers', '0', '--output', tmp_path / 'out')
    assert result.returncode == 0 and 'no kNN monitor' in result.stdout
    assert (tmp_path / 'out' / 'backbone' / 'model.safetensors').exists()


def assert_one_line(result: subprocess.CompletedProcess, words: str) -> None:
    assert result.returncode != 0
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and words in lines[0], result.stderr


@pytest.mark.parametrize('extra, words', [
    (['--workers', '-1'], '--workers -1: must be at least 0'),
    (['--batch-size', '65'], 'larger than the data set'),
    (['--model', 'resnet_of_mine'], 'Unknown model (resnet_of_mine)'),
    (['--model-args', '{"wings": 2}'], 'wings'),
    (['--grad-accum-steps', '4'], 'batch norm'),
    (['--crop-scale', '0.5', '0.2'], '--crop-scale'),
    (['--amp', 'float16'], '--amp float16'),
    (['--knn-data', '/no/such/folder'], 'no such file or folder'),
    (['--resume', '/no/such/file.pth'], '--resume /no/such/file.pth: no such file; name a checkpoint'),
])
def test_wrong_arguments_end_in_one_line(few_digits, tmp_path, extra, words):
    result = run_train(few_digits, *TINY, '--workers', '0', '--output', tmp_path / 'out', *extra)
    assert_one_line(result, words)
    assert not (tmp_path / 'out').exists()


def test_missing_and_empty_folders_end_in_one_line(tmp_path):
    (tmp_path / 'empty').mkdir()
    assert_one_line(run_train(tmp_path / 'nothing', '--output', tmp_path / 'out'), 'no such file or folder')
    assert_one_line(run_train(tmp_path / 'empty', '--output', tmp_path / 'out'), 'no image in it')
    assert not (tmp_path / 'out').exists()


def test_an_unknown_recipe_or_option_is_an_error(tmp_path):
    result = run_train('--recipe', 'in1k_bs3', '--output', tmp_path / 'out')
    assert result.returncode == 2 and 'in1k_bs256_ep100' in result.stderr
    result = run_train('--batchsize', '3', '--output', tmp_path / 'out')
    assert result.returncode == 2 and '--batchsize' in result.stderr


def test_files_of_an_unknown_run_are_not_overwritten(few_digits, tmp_path):
    (tmp_path / 'checkpoint.pth').write_text('mine')
    result = run_train(few_digits, *TINY, '--batch-size', '16', '--workers', '0', '--output', tmp_path)
    assert_one_line(result, 'of an unknown run')
    assert (tmp_path / 'checkpoint.pth').read_text() == 'mine'


def test_an_unreadable_image_ends_in_one_line_or_is_replaced_on_request(few_digits, tmp_path):
    data = tmp_path / 'data' / 'a'
    data.mkdir(parents=True)
    for i, path in enumerate(sorted(few_digits.rglob('*.png'))):
        (data / f'{i:02}.png').write_bytes(path.read_bytes())
    (data / '05.png').write_bytes(b'not an image')
    args = [
        data.parent, *TINY, '--epochs', '1', '--batch-size', '16', '--workers', '2', '--output', tmp_path / 'out']
    assert_one_line(run_train(*args, '--max-unreadable', '0'), '05.png')
    result = run_train(*args)
    assert result.returncode == 0 and '1 images could not be read' in result.stdout and '05.png' in result.stdout


def test_recipes_hold_the_published_numbers():
    fair, mm, cifar = (RECIPES[n] for n in ('in1k_bs512_ep100', 'in1k_bs256_ep200', 'cifar10_ep800'))
    assert (fair.epochs, fair.batch_size, fair.lr, fair.weight_decay, fair.momentum) == (100, 512, 0.05, 1e-4, 0.9)
    assert (mm.epochs, mm.batch_size, mm.lr) == (200, 256, 0.05)
    assert (cifar.epochs, cifar.batch_size, cifar.lr, cifar.weight_decay) == (800, 512, 0.03, 5e-4)
    assert cifar.proj_layers == 2
    a = fair.augmentation
    assert (a.size, a.crop_scale, a.jitter_p, a.gray_p, a.blur_p, a.flip_p) == (224, (0.2, 1.0), 0.8, 0.2, 0.5, 0.5)
    assert (a.brightness, a.contrast, a.saturation, a.hue, a.blur_sigma) == (0.4, 0.4, 0.4, 0.1, (0.1, 2.0))
    assert cifar.augmentation.size == 32 and cifar.augmentation.blur_p == 0


def test_every_number_of_a_recipe_has_a_flag():
    args = build_parser().parse_args(
        'x --recipe cifar10_ep800 --epochs 3 --hue 0.2 --image-size 64 --no-fix-pred-lr --blur-sigma 1 3'.split())
    _, recipe = resolve_recipe(args)
    assert (recipe.epochs, recipe.augmentation.hue, recipe.augmentation.size) == (3, 0.2, 64)
    assert not recipe.fix_pred_lr and recipe.augmentation.blur_sigma == (1, 3) and recipe.eval_resize == 64


def test_without_a_recipe_the_demonstration_data_get_theirs_and_others_the_papers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [name_recipe(build_parser().parse_args(words)) for words in ([], ['demo'], ['photos'])]
    assert names == ['demo', 'demo', 'in1k_bs512_ep100']
    (tmp_path / 'demo').mkdir()
    assert name_recipe(build_parser().parse_args(['demo'])) == 'in1k_bs512_ep100'


@pytest.mark.parametrize('recipe', RECIPES)
def test_on_a_cpu_a_recipe_for_gpus_names_the_one_for_cpus(recipe, few_digits, tmp_path):
    result = run_train(
        few_digits, *TINY, '--recipe', recipe, '--batch-size', '16', '--epochs', '1', '--max-steps', '1',
        '--knn-every', '-1', '--output', tmp_path / 'run')
    assert ('use --recipe small' in result.stdout) == (recipe not in ('small', 'demo')), result.stderr
    assert ('in all are few' in result.stdout) == (recipe in ('small', 'demo'))


def test_help_reads_like_a_manual():
    text = run_train('--help').stdout
    for words in ('torchrun --nproc-per-node 8', 'pixels', 'per 256 samples', 'cifar10_ep800', '--weight-decay'):
        assert words in text


def test_the_cifar_backbone_exports_under_its_own_name(few_digits, tmp_path):
    import simsiam_models  # noqa: F401  registers it
    result = run_train(
        few_digits, '--recipe', 'cifar10_ep800', '--epochs', '1', '--batch-size', '16', '--workers', '0', '--device',
        'cpu', '--knn-every', '0', '--amp', 'off', '--output', tmp_path, '--dim', '32', '--pred-dim', '8')
    assert result.returncode == 0, result.stderr
    model = timm.create_model(f'local-dir:{tmp_path}/backbone', pretrained=True)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 512)


def test_an_image_folder_of_large_photographs_trains_at_224(tmp_path):
    from sklearn.datasets import load_sample_images
    data = tmp_path / 'data'
    data.mkdir()
    for i, photo in enumerate(load_sample_images().images * 2):
        Image.fromarray(photo).save(data / f'{i}.jpg')
    result = run_train(
        data, '--model', 'resnet18', '--batch-size', '2', '--dim', '16', '--pred-dim', '4', '--epochs', '1',
        '--workers', '0', '--device', 'cpu', '--amp', 'off', '--output', tmp_path / 'out')
    assert result.returncode == 0, result.stderr


COLLAPSING = [  # the demonstration at 30 times its rate
    '--lr', '12', '--epochs', '6', '--knn-every', '0', '--log-every', '10', '--amp', 'off', '--device', 'cpu']


def test_on_collapse_stop_ends_the_run_and_keeps_the_last_checkpoint(tmp_path, one_thread):
    with pytest.raises(pretrain.RunError, match=r'COLLAPSED \(learning rate too high\): --lr 12 per 256 .* is kept$'):
        pretrain.main([*COLLAPSING, '--on-collapse', 'stop', '--output', str(tmp_path)])
    assert (tmp_path / 'checkpoint.pth').exists() and not (tmp_path / 'backbone').exists()


def test_warn_goes_on_and_says_so_in_the_end(few_digits, tmp_path, monkeypatch, capsys, one_thread):
    sick = Diagnosis('unknown cause', 'x', 'y')
    monkeypatch.setattr(Doctor, 'examine', lambda self, figures: sick)
    monkeypatch.setattr(Doctor, 'confirmed', True)
    in_process(few_digits, tmp_path, '--epochs', '2')
    out = capsys.readouterr().out
    assert out.count('COLLAPSED (unknown cause): x; y') == 2  # when it is seen, and in the verdict
    assert all(f['diagnosis'] == 'unknown cause' for f in figure_lines(tmp_path))


def test_on_collapse_stop_names_the_cause_and_writes_no_further_checkpoint(
        few_digits, tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(Doctor, 'examine', lambda self, figures: Diagnosis('constant images', 'x', 'y'))
    monkeypatch.setattr(Doctor, 'confirmed', True)
    with pytest.raises(pretrain.RunError, match=r'constant images.*the last checkpoint is kept$'):
        in_process(few_digits, tmp_path, '--epochs', '2', '--on-collapse', 'stop')
    state = torch.load(tmp_path / 'checkpoint.pth', weights_only=True)
    assert (state['epoch'], state['step']) == (0, 0)


def test_unreadable_validation_images_are_left_out_of_knn(few_digits, tmp_path):
    """Each is named, and the numbers are those of the folder without them."""
    more = '--epochs', '1', '--knn-images', 'all'
    for part in ('train', 'val'):
        shutil.copytree(few_digits, tmp_path / 'data' / part)
    bad = sorted((tmp_path / 'data' / 'val').rglob('*.png'))[:5]
    for path in bad:
        path.write_bytes(b'no image')
    in_process(tmp_path / 'data', tmp_path / 'a', *more)
    lines = [json.loads(line) for line in (tmp_path / 'a/log.jsonl').read_text().splitlines()]
    result = run_train(
        tmp_path / 'data', *TINY, *more, '--batch-size', '16', '--workers', '0', '--output', tmp_path / 'b')
    assert result.returncode == 0 and '59 queries' in result.stdout and '64 queries' not in result.stdout
    assert '5 unreadable images left out' in result.stdout and str(bad[0].parent.parent) in result.stdout
    for path in bad:
        path.unlink()
    in_process(tmp_path / 'data', tmp_path / 'c', *more)
    others = [json.loads(line) for line in (tmp_path / 'c/log.jsonl').read_text().splitlines()]
    assert [x['knn'] for x in lines if 'knn' in x] == [x['knn'] for x in others if 'knn' in x]

"""train.py from end to end on real image files."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import TINY, run_train
from PIL import Image

import train
from simsiam_models.data import open_folder
from simsiam_models.data.loader import EvalImages
from simsiam_models.training.options import build_parser, resolve_recipe
from simsiam_models.training.recipes import RECIPES


@pytest.fixture(scope='module')
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory):
    """One finished run on 1000 digits: 2000 PNG and JPEG bytes in, a backbone out."""
    output = tmp_path_factory.mktemp('run') / 'out'
    result = run_train(
        digits, *TINY, '--epochs', '12', '--batch-size', '64', '--lr', '0.2', '--workers', '2', '--output', output)
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


def test_plain_timm_loads_the_backbone_and_gives_the_runs_features(finished, digits):
    output, _ = finished
    images = open_folder(digits)[0]
    x = next(iter(EvalImages(images, torch.arange(8).numpy(), 32, 32)))
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
    _, recipe = resolve_recipe(build_parser('').parse_args([str(digits), *TINY]))
    model = train.make_model(recipe, 0)
    model.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(model.backbone.eval()(x), torch.load(output / 'f.pt'))


def test_a_finished_run_is_not_run_again(finished, digits):
    output, _ = finished
    before = (output / 'checkpoint.pth').read_bytes()
    result = run_train(digits, *TINY, '--epochs', '12', '--batch-size', '64', '--lr', '0.2', '--output', output)
    assert result.returncode == 0 and 'continuing it' in result.stdout
    assert (output / 'checkpoint.pth').read_bytes() == before


def test_another_run_in_the_folder_is_refused(finished, digits):
    output, _ = finished
    before = {p: p.read_bytes() for p in output.rglob('*') if p.is_file()}
    result = run_train(digits, *TINY, '--epochs', '12', '--batch-size', '32', '--lr', '0.2', '--output', output)
    assert_one_line(result, 'holds another run (batch_size: 64 there, 32 here)')
    assert {p: p.read_bytes() for p in output.rglob('*') if p.is_file()} == before


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
    (['--batch-size', '65'], 'larger than the data set'),
    (['--model', 'resnet_of_mine'], 'Unknown model (resnet_of_mine)'),
    (['--model-args', '{"wings": 2}'], 'wings'),
    (['--grad-accum-steps', '4'], 'batch norm'),
    (['--crop-scale', '0.5', '0.2'], '--crop-scale'),
    (['--amp', 'float16'], '--amp float16'),
    (['--knn-data', '/no/such/folder'], 'no such folder'),
])
def test_wrong_arguments_end_in_one_line(few_digits, tmp_path, extra, words):
    result = run_train(few_digits, *TINY, '--workers', '0', '--output', tmp_path / 'out', *extra)
    assert_one_line(result, words)
    assert not (tmp_path / 'out').exists()


def test_missing_and_empty_folders_end_in_one_line(tmp_path):
    (tmp_path / 'empty').mkdir()
    assert_one_line(run_train(tmp_path / 'nothing', '--output', tmp_path / 'out'), 'no such folder')
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
    assert_one_line(run_train(*args), '05.png')
    result = run_train(*args, '--max-unreadable', '0.1')
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
    args = build_parser('').parse_args(
        'x --recipe cifar10_ep800 --epochs 3 --hue 0.2 --image-size 64 --no-fix-pred-lr --blur-sigma 1 3'.split())
    _, recipe = resolve_recipe(args)
    assert (recipe.epochs, recipe.augmentation.hue, recipe.augmentation.size) == (3, 0.2, 64)
    assert not recipe.fix_pred_lr and recipe.augmentation.blur_sigma == (1, 3) and recipe.eval_resize == 64


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

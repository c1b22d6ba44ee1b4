"""--init-from: which weights a new run starts from, that a continuation needs no file, and what is refused."""
import json
import shutil
from pathlib import Path

import layouts_on_disk as disk
import pytest
import timm
import torch
from conftest import TINY, run_train
from huggingface_hub import ModelCard

from simsiam_models import SimSiam, create_simsiam
from simsiam_models.training import pretrain
from simsiam_models.training.initial import is_here, load_initial
from simsiam_models.training.recipes import Recipe
from simsiam_models.weights import sources, tensorfile
from simsiam_models.weights.export import export_backbone
from simsiam_models.weights.publish import publish
from simsiam_models.weights.published import WEIGHTS

RECIPE = Recipe('', model='tiny')
NARROW = json.loads(TINY[TINY.index('--model-args') + 1])


def train(data: Path, output: Path, *more: str) -> dict:
    return pretrain.main([
        str(data), *TINY, '--batch-size', '16', '--workers', '0', '--epochs', '1', '--output', str(output), *more])


def state(output: Path) -> dict:
    return torch.load(output / 'checkpoint.pth', weights_only=True)


def knn(output: Path) -> list:
    lines = map(json.loads, (output / 'log.jsonl').read_text().splitlines())
    return [line['knn'] for line in lines if 'knn' in line]


def differing(a: dict, b: dict) -> list[str]:
    assert a.keys() == b.keys()
    return [k for k, v in a.items() if not torch.equal(v, b[k])]


@pytest.fixture(scope='module')
def done(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUTPUT of a finished run."""
    output = tmp_path_factory.mktemp('done') / 'run'
    train(few_digits, output)
    return output


# What is read


@pytest.mark.parametrize('name', disk.LAYOUTS)
def test_every_layout_gives_its_backbone_and_the_heads_that_fit(tmp_path, name):
    """The oracle is the model that was written, and for other heads those that the new model had."""
    on_disk, model = disk.LAYOUTS[name](disk.tiny_simsiam()), disk.tiny_simsiam(seed=1)
    path = disk.write(on_disk.contents, tmp_path / 'file', 'pickle' if name == 'detectron2' else 'zip')
    before = {k: disk.part(model, k) for k in ('projector', 'predictor')}
    fit = all({k: v.shape for k, v in on_disk.parts.get(part, {}).items()} == {k: v.shape for k, v in own.items()}
              for part, own in before.items())
    initial = load_initial(str(path), model, RECIPE)
    model.load_state_dict(initial.state, strict=False)
    expected = {'backbone': on_disk.parts['backbone'], **{k: on_disk.parts[k] if fit else before[k] for k in before}}
    for part, entries in expected.items():
        assert not differing(disk.part(model, part), entries), part
    assert initial.record['heads'] == fit != ('projector and predictor start at random' in initial.text)


@pytest.mark.parametrize('what, heads', [('.', True), ('checkpoint.pth', True), ('backbone', False)])
def test_a_run_starts_from_what_another_has_learned_and_the_optimizer_afresh(few_digits, done, tmp_path, what, heads):
    train(few_digits, tmp_path / 'plain', '--max-steps', '0')
    train(few_digits, tmp_path / 'run', '--max-steps', '0', '--init-from', str(done / what))
    begun, learned, plain = state(tmp_path / 'run'), state(done)['model'], state(tmp_path / 'plain')['model']
    other = {k: v for k, v in plain.items() if not (heads or k.startswith('backbone.'))}
    assert not differing(begun['model'], {**learned, **other})
    assert not any(v['momentum_buffer'].any() for v in begun['optimizer']['state'].values())
    args = json.loads((tmp_path / 'run/args.json').read_text())['init_from']
    assert args['source'] == str((done / what).resolve()) and args['heads'] == heads and args['tag'] is None
    loaded = {k: v for k, v in learned.items() if heads or k.startswith('backbone.')}
    assert args['sha256'] == tensorfile.hash_tensors(loaded)


def test_the_accuracy_before_training_is_that_of_the_weights_and_called_so(few_digits, done, tmp_path, capsys):
    train(few_digits, tmp_path / 'run', '--init-from', str(done))
    said = capsys.readouterr().out
    assert knn(tmp_path / 'run')[0]['initial'] == knn(done)[-1] and 'random' not in knn(tmp_path / 'run')[0]
    assert f'initial {knn(done)[-1]:.1f} %' in said and f'initial backbone {knn(done)[-1]:.1f} %' in said
    assert 'random backbone' not in said


def published(model: SimSiam, tag: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a small model the weights of a tag, as our copies hold them."""
    heads = {k: v for k, v in model.state_dict().items() if not k.startswith('backbone.')}
    mark = {tensorfile.CHANNELS: tensorfile.REVERSED} if WEIGHTS[tag].bgr else {}
    tensorfile.write(folder / 'model.safetensors', model.backbone.state_dict(), url=WEIGHTS[tag].url, **mark)
    tensorfile.write(folder / 'heads.safetensors', heads)

    def fetch(name, weights, filename='model.safetensors'):
        assert (name, weights) == (f'simsiam_resnet50.{tag}', WEIGHTS[tag])
        return folder / filename
    monkeypatch.setattr(sources, 'fetch', fetch)


@pytest.mark.parametrize('source', ['mm_ep100_bgr_in1k', 'simsiam_resnet50.fb_bs256_ep100_in1k'])
def test_a_tag_gives_backbone_and_heads_and_says_which_pixels_they_took(tmp_path, monkeypatch, source):
    written, model, tag = disk.tiny_simsiam(), disk.tiny_simsiam(seed=1), source.rpartition('.')[2]
    published(written, tag, tmp_path, monkeypatch)
    initial = load_initial(source, model, RECIPE)
    assert not differing(initial.state, written.state_dict())
    assert initial.record['source'] == f'simsiam_resnet50.{tag}' and initial.record['tag'] == tag
    assert ('trained on pixels with the mean (0.406, 0.456, 0.485)' in initial.text) == WEIGHTS[tag].bgr
    copy = load_initial(str(tmp_path / 'model.safetensors'), model, RECIPE)  # the header says where it comes from
    assert copy.record['tag'] == tag and ('trained on pixels' in copy.text) == WEIGHTS[tag].bgr


@pytest.mark.parametrize(('tag', 'needed'), [
    ('mm_ep200_in1k', {'model.safetensors', 'heads.safetensors'}), ('mm1x_ep200_lin_in1k', {'model.safetensors'})])
def test_a_tag_is_here_if_a_cache_has_all_that_is_read_from_it(tag, needed, tmp_path, monkeypatch):
    name, cached = f'simsiam_resnet50.{tag}', set()
    monkeypatch.setattr(sources, 'find_cached', lambda *args: (
        tmp_path if args[:2] == (name, WEIGHTS[tag]) and args[2] in cached else None))
    for filename in needed:
        assert not is_here(name) and not is_here(tag)
        cached.add(filename)
    assert is_here(name) and is_here(tag) and is_here(str(tmp_path)) and not is_here(str(tmp_path / 'x'))


def test_a_supervised_model_of_timm_gives_its_backbone(tmp_path):
    args = {'img_size': 32, 'patch_size': 8, 'depth': 1, 'embed_dim': 24, 'num_heads': 3}
    trained = timm.create_model('vit_tiny_patch16_224', num_classes=7, **args)
    timm.models.save_for_hf(trained, tmp_path / 'vit', model_args=args, safe_serialization=True)
    model = create_simsiam('vit_tiny_patch16_224', dim=16, pred_dim=4, **args)
    initial = load_initial(str(tmp_path / 'vit'), model, Recipe('', model='vit_tiny_patch16_224', model_args=args))
    kept = {f'backbone.{k}': v for k, v in trained.state_dict().items() if not k.startswith('head.')}
    assert not differing(initial.state, kept) and '(the source has none)' in initial.text
    assert '(0.5, 0.5, 0.5), and now get the usual one' in initial.text


# Continuations


def test_a_continuation_needs_no_file_and_a_moved_one_is_recognized(few_digits, done, tmp_path):
    source, output = tmp_path / 'first.pth', tmp_path / 'run'
    shutil.copy(done / 'checkpoint.pth', source)
    train(few_digits, tmp_path / 'whole', '--init-from', str(source))
    train(few_digits, output, '--init-from', str(source), '--max-steps', '1')
    moved = source.rename(tmp_path / 'moved.pth')
    train(few_digits, output, '--init-from', str(source), '--max-steps', '2')
    train(few_digits, output, '--init-from', str(moved))
    assert not differing(state(output)['model'], state(tmp_path / 'whole')['model'])
    assert json.loads((output / 'args.json').read_text())['init_from']['source'] == str(source)


def test_other_first_weights_are_another_run(few_digits, done, tmp_path):
    train(few_digits, tmp_path / 'run', '--max-steps', '1', '--init-from', str(done))
    for more, words in (
            ([], f'started from given weights; add --init-from {done.resolve()} to continue it'),
            (['--init-from', str(done / 'backbone')], 'with the SHA-256 [0-9a-f]{16}, but .*backbone has [0-9a-f]{16}'),
            (['--init-from', str(tmp_path / 'nothing')], 'not a file, a folder or a published tag')):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            train(few_digits, tmp_path / 'run', *more)
    with pytest.raises(ValueError, match='holds a run that started without --init-from; give another --output'):
        train(few_digits, done, '--init-from', str(done))


def test_a_run_stopped_before_its_first_checkpoint_reads_the_same_weights_again(few_digits, done, tmp_path):
    source, output = tmp_path / 'first.pth', tmp_path / 'run'
    shutil.copy(done / 'checkpoint.pth', source)
    more = '--max-steps', '0', '--init-from', str(source)
    train(few_digits, output, *more)
    begun = state(output)['model']
    (output / 'checkpoint.pth').unlink()
    train(few_digits, output, *more)
    assert not differing(state(output)['model'], begun)
    (output / 'checkpoint.pth').unlink()
    torch.save({'model': {k: v + 1 if k.endswith('.weight') else v for k, v in begun.items()}}, source)
    with pytest.raises(ValueError, match='started from .* with the SHA-256'):
        train(few_digits, output, *more)


def test_every_process_starts_from_the_weights(few_digits, done, tmp_path):
    """Different weights would leave the first step with different ones, which the last checkpoint would show."""
    result = run_train(
        few_digits, *TINY, '--batch-size', '16', '--workers', '0', '--epochs', '1', '--knn-every', '0', '--output',
        tmp_path / 'two', '--init-from', done, '--max-steps', '1', processes=2)
    assert result.returncode == 0 and result.stdout.count('starting from ') == 1, result.stderr
    train(few_digits, tmp_path / 'one', '--init-from', str(done), '--max-steps', '1')
    one, two = state(tmp_path / 'one')['model'], state(tmp_path / 'two')['model']
    assert all(torch.allclose(v, two[k], atol=1e-4) for k, v in one.items())


# What is refused, and the card


def spoiled(done: Path, tmp_path: Path) -> Path:
    entries = state(done)['model']
    entries['backbone.bn1.weight'][0] = float('nan')
    torch.save({'model': entries}, tmp_path / 'nan.pth')
    return tmp_path / 'nan.pth'


def two_networks(done: Path, tmp_path: Path) -> Path:
    torch.save({'teacher': disk.tiny_resnet().state_dict(), 'student': disk.tiny_resnet().state_dict()},
               tmp_path / 'two.pth')
    return tmp_path / 'two.pth'


def other_network(done: Path, tmp_path: Path) -> Path:
    export_backbone(timm.create_model('resnet10t', num_classes=0), tmp_path / 'other', 'resnet10t')
    return tmp_path / 'other'


@pytest.mark.parametrize('make, words', [
    (spoiled, 'holds NaN or infinity in 1 tensors'),
    (two_networks, '`simsiam convert FILE FOLDER --to timm --branch NAME` extracts one'),
    (other_network, r'its backbone is not the resnet18 of this run: .* of another shape \(.*--model and --model-args'),
    (lambda done, tmp_path: tmp_path, '--init-from .*: no model.safetensors there; name a folder'),
    (lambda done, tmp_path: tmp_path / 'mm_ep300_in1k', r'a published tag \(`simsiam weights list` shows the tags\)')])
def test_weights_that_cannot_be_used_are_refused_before_a_folder_is_made(few_digits, done, tmp_path, make, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        train(few_digits, tmp_path / 'run', '--init-from', str(make(done, tmp_path)))
    assert not (tmp_path / 'run').exists()


def test_a_stem_that_no_entry_shows_must_be_the_runs_own(tmp_path):
    args = {'layers': [1, 1, 1, 1], 'channels': [4, 4, 8, 16]}
    model = create_simsiam('simsiam_resnet18_cifar', dim=24, pred_dim=8, proj_layers=2, **args)
    classifier = {'classifier.weight': torch.zeros(10, 16), 'classifier.bias': torch.zeros(10)}
    # solo-learn's, whose stem pads by 2
    torch.save({'state_dict': {**model.state_dict(), **classifier}}, tmp_path / 'solo.ckpt')
    recipe = Recipe('', model='simsiam_resnet18_cifar', model_args=args)
    with pytest.raises(ValueError, match='a non-standard stem; add it to --model-args: .*"stem_padding": 2'):
        load_initial(str(tmp_path / 'solo.ckpt'), model, recipe)
    recipe = Recipe('', model='simsiam_resnet18_cifar', model_args={**args, 'stem_padding': 2})
    assert not differing(load_initial(str(tmp_path / 'solo.ckpt'), model, recipe).state, model.state_dict())


def test_the_card_says_what_the_training_started_from(few_digits, done, tmp_path):
    train(few_digits, tmp_path / 'run', '--init-from', str(done))
    publish(tmp_path / 'run', repo='me/x', license='mit', dry_run=tmp_path / 'card')
    text = ModelCard.load(tmp_path / 'card/README.md').text
    assert '**Initialised from:** run: backbone, projector and predictor' in text and str(done.parent) not in text
    assert 'backbone before this training' in text and 'untrained' not in text
    args = json.loads((tmp_path / 'run/args.json').read_text())
    args['init_from'].update(source='simsiam_resnet50.fb_bs256_ep100_in1k', tag='fb_bs256_ep100_in1k')
    (tmp_path / 'run/args.json').write_text(json.dumps(args))
    publish(tmp_path / 'run', repo='me/x', license='cc-by-nc-4.0', dry_run=tmp_path / 'nc')
    card = ModelCard.load(tmp_path / 'nc/README.md')
    assert 'simsiam_resnet50.fb_bs256_ep100_in1k (cc-by-nc-4.0)' in card.text.replace('\\', '')
    assert card.data.base_model == 'simsiam-models/simsiam_resnet50.fb_bs256_ep100_in1k'

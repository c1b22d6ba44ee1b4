"""The card of one's own model says how it was trained, from the files of the run, and its code runs as written."""
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import loopback
import pytest
import timm
import torch
from conftest import ROOT, TINY, run_train
from huggingface_hub import ModelCard
from PIL import Image

from simsiam_models.cli import main
from simsiam_models.weights import tensorfile
from simsiam_models.weights.export import export_backbone
from simsiam_models.weights.history import read_history
from simsiam_models.weights.licenses import LICENSES, check_license
from simsiam_models.weights.publish import publish
from simsiam_models.weights.published import WEIGHTS

NARROW = {'layers': [1, 1, 1, 1], 'channels': [8, 8, 8, 8]}


@pytest.fixture(scope='module')
def run(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUTPUT of a finished run."""
    folder = tmp_path_factory.mktemp('secret_folder') / 'run'
    done = run_train(few_digits, *TINY, '--batch-size', '32', '--epochs', '1', '--output', folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope='module')
def repo(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('card') / 'repo'
    publish(run, repo='me/digits', license='MIT', dry_run=folder)
    return folder


@pytest.fixture(scope='module')
def classifier(run: Path, few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `finetune`."""
    folder = tmp_path_factory.mktemp('secret_tuned') / 'out'
    args = ['--epochs', '1', '--batch-size', '16', '--device', 'cpu', '--workers', '0', '--out', str(folder)]
    assert main(['finetune', str(few_digits), '--model', str(run), *args]) == 0
    return folder


def test_a_card_states_what_the_files_of_the_run_say(run: Path, repo: Path) -> None:
    args = json.loads((run / 'args.json').read_text())
    lines = [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]
    last = next(line for line in reversed(lines) if isinstance(line.get('knn'), float))
    card = ModelCard.load(repo / 'README.md')
    assert card.data.license == 'mit' and card.data.model_name == 'digits'
    result, = card.data.eval_results
    assert result.metric_value == round(last['knn'], 2) and result.metric_type == 'accuracy'
    assert f'(k={args["knn_k"]}, T={args["knn_t"]})' in result.metric_name
    bank, queries = last['knn_images']
    assert bank + queries == args['images'] == 64
    for words in (
            'pretrained by SimSiam on few', '**Recipe:** demo', '**Epochs:** 1\n', '**Batch:** 32', '64 images',
            f'{bank} bank images and {queries} queries', 'untrained backbone', f'torch {torch.__version__}'[:12],
            'train.py DATA --recipe demo', '--output OUTPUT', '| weighted kNN top-1'):
        assert words in card.text.replace('\\', ''), words


def test_no_folder_of_the_users_machine_is_published(run: Path, repo: Path, classifier: Path, tmp_path: Path) -> None:
    publish(classifier, repo='me/tuned', license='other', dry_run=tmp_path / 'tuned')
    for folder in (repo, tmp_path / 'tuned'):
        for file in ('README.md', 'training.json', 'config.json'):
            assert not re.search(r'secret|/tmp|pytest', (folder / file).read_text()), file


@pytest.mark.parametrize('data, shown', [
    (None, 'the built-in demonstration data'), ('/home/alice/pets', 'pets'), ('hf:owner/name:train', 'hf:owner/name'),
    ("pipe:curl -H 'Authorization: hunter2' x.tar", 'a stream of images'), ('https://a:hunter2@b/c.tar', 'a stream of'),
    ('torchvision:CIFAR10:/home/alice', 'torchvision:CIFAR10')])
def test_data_are_named_without_folders_commands_and_passwords(data: str | None, shown: str, tmp_path: Path) -> None:
    words = ['train.py', *([] if data is None else [data]), '--model-args', '{"a": [1]}', '--output=/home/alice/x']
    args = {'recipe': 'demo', 'data': data, 'epochs': 1, 'images': 5, 'command': shlex.join(words)}
    (tmp_path / 'args.json').write_text(json.dumps(args))
    history = read_history(tmp_path)
    assert history.data.startswith(shown) and "--model-args '{\"a\": [1]}' --output=OUTPUT" in history.command
    assert not re.search('alice|hunter2', json.dumps(history.to_json()))
    assert history.datasets == (('owner/name',) if data and data.startswith('hf:') else ())


def test_a_dry_run_into_a_folder_with_files_is_refused(run: Path, classifier: Path) -> None:
    before = {path: path.read_bytes() for path in classifier.rglob('*') if path.is_file()}
    for folder in (classifier, run, run / 'args.json'):
        with pytest.raises(ValueError, match='already exists; name a new or empty folder'):
            publish(run, repo='me/x', license='mit', dry_run=folder)
    assert before == {path: path.read_bytes() for path in classifier.rglob('*') if path.is_file()}


def test_a_run_that_has_not_finished_says_so_and_has_no_numbers(few_digits: Path, tmp_path: Path) -> None:
    args = ['--batch-size', '32', '--epochs', '3', '--max-steps', '1', '--output', tmp_path / 'run']
    assert run_train(few_digits, *TINY, *args).returncode == 0
    publish(tmp_path / 'run', repo='me/x', license='mit', dry_run=tmp_path / 'out')
    card = ModelCard.load(tmp_path / 'out' / 'README.md')
    assert card.data.eval_results is None and 'model-index' not in card.content
    assert '0 of 3; training had not finished' in card.text and 'Nothing was measured' in card.text
    assert (tmp_path / 'out' / 'heads.safetensors').exists()


def test_a_fine_tuned_classifier_has_the_numbers_of_its_record(classifier: Path, tmp_path: Path) -> None:
    record = json.loads((classifier / 'record.json').read_text())
    publish(classifier, repo='me/tuned', license='other', dry_run=tmp_path / 'out')
    card = ModelCard.load(tmp_path / 'out' / 'README.md')
    assert {r.metric_name: r.metric_value for r in card.data.eval_results} == {
        f'top-{k}': round(record['metrics'][f'top{k}'], 2) for k in (1, 5)}
    counts = record['data']['counts']
    assert f'{counts["train"]} training and {counts["test"]} validation images of 10 classes' in card.text
    assert 'the best epoch was chosen on them' in card.text and 'pretrained by SimSiam' not in card.text
    assert card.data.pipeline_tag == 'image-classification'


def test_publishing_a_dry_run_again_keeps_what_the_card_says(repo: Path, tmp_path: Path) -> None:
    publish(repo, repo='me/digits', license='mit', dry_run=tmp_path / 'again')
    for name in ('README.md', 'training.json', 'model.safetensors'):
        assert (tmp_path / 'again' / name).read_bytes() == (repo / name).read_bytes(), name


def test_a_history_from_elsewhere_is_text_and_numbers_only(repo: Path, tmp_path: Path) -> None:
    def tell(**changes: object) -> Path:
        values = {**json.loads((repo / 'training.json').read_text()), **changes}
        (tmp_path / 'training.json').write_text(json.dumps(values))
        return tmp_path
    for wrong in ({'scores': [{'name': 'x', 'value': 101, 'remark': ''}]}, {'facts': []}, {'scores': 5}):
        with pytest.raises(ValueError, match='training.json does not describe a training'):
            read_history(tell(**wrong))
    history = read_history(tell(summary='<script>\n[x](http://evil)', command='rm\n```\nx'))
    assert '\n' not in history.summary + history.command
    for name in ('model.safetensors', 'config.json'):
        os.link(repo / name, tmp_path / name)
    publish(tmp_path, repo='me/x', license='mit', dry_run=tmp_path / 'out')
    text = (tmp_path / 'out' / 'README.md').read_text()
    assert '<script>' not in text and '[x](http' not in text and 'rm ```' not in text


def test_the_commands_of_the_docs_run_as_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('onnxruntime')
    (tmp_path / 'runs').mkdir()
    (tmp_path / 'runs' / 'mine').symlink_to(run)
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r'^simsiam ((?:convert|publish) runs/mine .*)$', (ROOT / 'docs/export.md').read_text(), re.M)
    assert [main(shlex.split(command)) for command in commands] == [0, 0]
    assert (tmp_path / 'mine.onnx').exists() and (tmp_path / 'repository' / 'README.md').exists()


@pytest.fixture
def hub(repo: Path, classifier: Path, tmp_path: Path) -> Iterator[loopback.Server]:
    """A Hub that has both repositories."""
    publish(classifier, repo='me/tuned', license='other', dry_run=tmp_path / 'tuned')
    with loopback.Server(hub=True) as server:
        for name, folder in (('me/digits', repo), ('me/tuned', tmp_path / 'tuned')):
            for file in folder.iterdir():
                server.put(name, file.name, file.read_bytes())
        yield server


def test_the_code_of_both_cards_runs_as_written(hub: loopback.Server, repo: Path, tmp_path: Path) -> None:
    pytest.importorskip('transformers', exc_type=ImportError)
    Image.radial_gradient('L').convert('RGB').save(tmp_path / 'photo.jpg')
    code = []
    for folder in (repo, tmp_path / 'tuned'):
        blocks = re.findall(r'```python\n(.*?)```', (folder / 'README.md').read_text(), re.DOTALL)
        assert len(blocks) == 2
        code += blocks
    code = [code[0], 'print(tuple(output.shape))\n', code[1], 'print(tuple(outputs.pooler_output.shape))\n', *code[2:]]
    done = subprocess.run(
        [sys.executable, '-c', ''.join(code)], capture_output=True, text=True, timeout=240, cwd=tmp_path, env={
            **{k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}, 'HF_ENDPOINT': hub.url, 'HF_HUB_OFFLINE': '0',
            'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_DISABLE_XET': '1', 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    first, second, label = done.stdout.split('\n')[:3]
    assert first == second == '(1, 64)' and label in map(str, range(10))


# What is refused, each in a sentence


@pytest.mark.parametrize('license, words', [
    ('foo', 'use mit, apache-2.0 or another'), ('apache2', 'use apache-2.0'), ('cc-by-nc', 'use cc-by-nc-')])
def test_a_license_must_be_one_that_the_hub_knows(license: str, words: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--license {license}: not an identifier .*{words}.* or 'other'"):
        publish(run, repo='me/x', license=license, dry_run=tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    assert check_license('Apache-2.0') == 'apache-2.0' and {w.license for w in WEIGHTS.values()} <= set(LICENSES)


@pytest.mark.parametrize('args, words', [
    (['--repo', 'me'], '--repo: must be OWNER/NAME'), (['--repo', 'a/b/c'], '--repo: must be OWNER/NAME'),
    (['--repo', 'me/x y'], '--repo: must be OWNER/NAME'), (['--repo', 'me/x'], 'give their licence'),
    (['--repo', 'me/x', '--tag', 'mm_ep200_in1k'], 'mm_ep200_in1k goes to simsiam-models/'),
    (['--repo', 'me/x', '--license', 'mit', '--private'], '--private and --dry-run exclude each other')])
def test_what_contradicts_itself_is_refused(
        args: list[str], words: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(['publish', str(run), *args, '--dry-run', str(tmp_path / 'out')]) == 1
    said = capsys.readouterr().err
    assert words in said and said.count('\n') == 1 and not (tmp_path / 'out').exists()


def test_published_weights_are_nobodys_own(tmp_path: Path) -> None:
    model = timm.create_model('resnet18', num_classes=0, **NARROW)
    export_backbone(model, tmp_path / 'x', 'resnet18', NARROW)
    tensorfile.write(tmp_path / 'x' / 'model.safetensors', model.state_dict(), url=WEIGHTS['fb_bs512_ep100_in1k'].url)
    with pytest.raises(ValueError, match='the published weights fb_bs512_ep100_in1k: publish them with --tag'):
        publish(tmp_path / 'x', repo='me/x', license='mit', dry_run=tmp_path / 'out')


@pytest.mark.parametrize('name, args', [
    ('vit_tiny_patch16_224', {'img_size': 32, 'patch_size': 8, 'depth': 1, 'embed_dim': 24, 'num_heads': 3}),
    ('test_convnext', {}), ('test_efficientnet', {}), ('simsiam_resnet18_cifar', NARROW)])
def test_every_architecture_is_published(name: str, args: dict, tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=0, **args).eval()
    export_backbone(model, tmp_path / 'x', name, args, 32, 32)
    publish(tmp_path / 'x', repo='me/x', license='mit', dry_run=tmp_path / 'out')
    again = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(again(x), model(x))
    assert name in (tmp_path / 'out' / 'README.md').read_text()

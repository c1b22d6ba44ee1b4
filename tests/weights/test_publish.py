"""A checkpoint becomes a Hub repository: its contents, who can load it, what is refused, and the upload."""
import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import loopback
import pytest
import timm
import torch
from conftest import ROOT
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from simsiam_models import create_simsiam
from simsiam_models.cli import main
from simsiam_models.weights import load_checkpoint
from simsiam_models.weights.card import BENCHMARKS, CardFacts, format_card
from simsiam_models.weights.export import export_backbone, export_checkpoint
from simsiam_models.weights.publish import publish
from simsiam_models.weights.published import WEIGHTS, describe, find_page_results, find_results
from simsiam_models.weights.tensorfile import hash_file
from simsiam_models.weights.upload import pin_upload
from simsiam_models.weights.verify import TOLERANCE, compare_fingerprints

TAG, LIN, BGR = 'fb_bs512_ep100_in1k', 'fb_bs512_ep100_lin_in1k', 'mm_ep100_bgr_in1k'
FAIR = {'backbone': 'module.encoder.', 'projector': 'module.encoder.fc.', 'predictor': 'module.predictor.'}
MM1 = {'backbone': 'backbone.', 'projector': 'neck.', 'predictor': 'head.predictor.'}


def start(code: str, *args: str | Path, **env: str) -> subprocess.Popen:
    """A fresh Python process that does not start in the repository."""
    return subprocess.Popen(
        [sys.executable, '-c', code, *map(str, args)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, cwd=Path(args[0]).parent,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', **env})


def run(code: str, *args: str | Path, **env: str) -> subprocess.CompletedProcess:
    process = start(code, *args, **env)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope='module')
def state() -> dict[str, torch.Tensor]:
    """A SimSiam model in which every tensor differs from its initialization."""
    torch.manual_seed(0)
    model = create_simsiam()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(7)
            if module.affine:
                torch.nn.init.uniform_(module.weight, 0.5, 1)
                torch.nn.init.normal_(module.bias, 0, 0.1)
    return {k: v.detach() for k, v in model.state_dict().items()}


def fair(state: dict[str, torch.Tensor], path: Path, epoch: int = 100) -> Path:
    renamed = {FAIR[k.split('.')[0]] + k.partition('.')[2]: v for k, v in state.items()}
    renamed['module.encoder.fc.6.bias'] = torch.ones(2048)
    torch.save({'epoch': epoch, 'arch': 'resnet50', 'state_dict': renamed, 'optimizer': {'state': {}}}, path)
    return path


def fair_linear(state: dict[str, torch.Tensor], path: Path) -> Path:
    renamed = {'module.' + k.partition('.')[2]: v for k, v in state.items() if k.startswith('backbone.')}
    renamed |= {'module.fc.weight': torch.randn(1000, 2048) / 50, 'module.fc.bias': torch.randn(1000) / 50}
    torch.save({'epoch': 77, 'arch': 'resnet50', 'state_dict': renamed, 'best_acc1': 68.1, 'optimizer': {}}, path)
    return path


def openmmlab(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names, renamed = {0: 'fc0', 1: 'bn0', 3: 'fc1', 4: 'bn1', 6: 'fc2', 7: 'bn2'}, {}
    for k, v in state.items():
        part, number, *rest = k.split('.')
        name = [number, *rest] if part == 'backbone' else [names[int(number)], *rest]
        renamed[MM1[part] + '.'.join(name)] = v
    return renamed


@pytest.fixture(scope='module')
def pretrained(state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """FAIR's pretraining file, the repository made from it, and the text of publish."""
    folder = tmp_path_factory.mktemp('pretrained')
    source = fair(state, folder / 'checkpoint_0099.pth.tar')
    return source, folder / 'repo', publish(source, TAG, folder / 'repo')


@pytest.fixture(scope='module')
def linear(state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    folder = tmp_path_factory.mktemp('linear')
    source = fair_linear(state, folder / 'model_best.pth.tar')
    return source, folder / 'repo', publish(source, LIN, folder / 'repo')


# What is in the repository


def test_a_dry_run_holds_backbone_heads_card_and_fingerprint(pretrained, state):
    _, repo, text = pretrained
    names = ['README.md', 'config.json', 'fingerprint.json', 'heads.safetensors', 'model.safetensors']
    assert sorted(p.name for p in repo.iterdir()) == names
    assert 'uploaded nothing' in text and 'simsiam-models/simsiam_resnet50.fb_bs512_ep100_in1k' in text
    backbone = load_file(repo / 'model.safetensors')
    assert len(backbone) == 318
    assert all(torch.equal(v, state[f'backbone.{k}']) for k, v in backbone.items())
    heads = load_file(repo / 'heads.safetensors')
    assert {k for k in state if not k.startswith('backbone.')} == set(heads)
    for k, v in heads.items():  # FAIR's frozen bias of ones sits in the running mean
        assert torch.equal(v, state[k] - 1 if k == 'projector.7.running_mean' else state[k]), k
    config = json.loads((repo / 'config.json').read_text())
    assert config['architecture'] == 'resnet50' and config['num_classes'] == 0 and 'model_args' not in config
    assert config['pretrained_cfg']['license'] == 'cc-by-nc-4.0'
    assert config['pretrained_cfg']['origin_url'] == 'https://github.com/facebookresearch/simsiam'
    assert config['pretrained_cfg']['paper_ids'] == 'arXiv:2011.10566'


def test_the_classifier_is_in_the_model_of_a_linear_tag(linear):
    _, repo, _ = linear
    tensors = load_file(repo / 'model.safetensors')
    assert len(tensors) == 320 and tensors['fc.weight'].shape == (1000, 2048)
    assert not (repo / 'heads.safetensors').exists()
    assert json.loads((repo / 'config.json').read_text())['num_classes'] == 1000


# Who can load it


def expected(repo: Path) -> torch.Tensor:
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    tensors = load_file(repo / 'model.safetensors')
    model = timm.create_model('resnet50', num_classes=1000 if 'fc.weight' in tensors else 0)
    model.load_state_dict(tensors)
    with torch.inference_mode():
        return model.eval()(x)


def test_plain_timm_loads_it_bit_equal_without_this_package(pretrained, linear, tmp_path, one_thread):
    repos = [linear[1]]
    if tuple(int(n) for n in timm.__version__.split('.')[:3]) >= (1, 0, 31):
        repos.append(pretrained[1])  # local-dir: of timm 1.0.21 fails where two .safetensors files are in the folder
    done = run('''
import sys, timm, torch
x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
out = []
for repo in sys.argv[2:]:
    model = timm.create_model('local-dir:' + repo, pretrained=True).eval()
    with torch.inference_mode():
        out.append((model.state_dict(), model(x)))
assert 'simsiam_models' not in sys.modules
torch.save(out, sys.argv[1])
''', tmp_path / 'out.pt', *repos)
    assert done.returncode == 0, done.stderr
    for repo, (state, y) in zip(repos, torch.load(tmp_path / 'out.pt'), strict=True):
        saved = load_file(repo / 'model.safetensors')
        assert set(state) == set(saved) and all(torch.equal(v, saved[k]) for k, v in state.items())
        assert torch.equal(y, expected(repo))


def test_transformers_loads_backbone_processor_and_classifier(pretrained, linear, tmp_path):
    pytest.importorskip('transformers', exc_type=ImportError)  # or too new for the installed huggingface_hub
    done = run('''
import sys, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
image = Image.radial_gradient('L').convert('RGB').resize((300, 260))
processor = AutoImageProcessor.from_pretrained(sys.argv[1])
with torch.inference_mode():
    features = AutoModel.from_pretrained(sys.argv[1]).eval()(pixel_values=x).pooler_output
    logits = AutoModelForImageClassification.from_pretrained(sys.argv[2]).eval()(pixel_values=x).logits
pixels = processor(image, return_tensors='pt')['pixel_values']
torch.save({'pixels': pixels, 'features': features, 'logits': logits}, sys.argv[3])
''', pretrained[1], linear[1], tmp_path / 'out.pt')
    assert done.returncode == 0, done.stderr
    out = torch.load(tmp_path / 'out.pt')
    assert out['pixels'].shape == (1, 3, 224, 224)
    torch.testing.assert_close(out['features'], expected(pretrained[1]))
    torch.testing.assert_close(out['logits'], expected(linear[1]))


def test_a_repository_is_a_source_and_gives_the_same_files(pretrained, tmp_path):
    _, repo, _ = pretrained
    text = publish(repo, f'simsiam_resnet50.{TAG}', tmp_path / 'again')
    assert 'converted from an already converted file' in text
    for name in ('model.safetensors', 'heads.safetensors', 'config.json', 'fingerprint.json'):
        assert (tmp_path / 'again' / name).read_bytes() == (repo / name).read_bytes(), name


def test_an_export_without_heads_removes_older_heads(pretrained, tmp_path):
    source, _, _ = pretrained
    checkpoint = load_checkpoint(source)
    export_checkpoint(checkpoint, tmp_path)
    assert (tmp_path / 'heads.safetensors').exists()
    checkpoint.predictor = None
    export_checkpoint(checkpoint, tmp_path)
    assert not (tmp_path / 'heads.safetensors').exists()


def test_an_export_that_does_not_fill_the_architecture_is_refused(pretrained, tmp_path):
    checkpoint = load_checkpoint(pretrained[0])
    del checkpoint.backbone['layer4.2.bn3.weight']
    with pytest.raises(ValueError, match=r'has 318 entries: 1 missing \(layer4.2.bn3.weight\)'):
        export_checkpoint(checkpoint, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


# The card


def test_the_card_of_fair_weights_forbids_commercial_use_and_carries_their_number(pretrained):
    source, repo, _ = pretrained
    card = ModelCard.load(repo / 'README.md')
    assert card.data.license == 'cc-by-nc-4.0' and 'no commercial use' in card.text
    assert card.data.pipeline_tag == 'image-feature-extraction' and card.data.library_name == 'timm'
    assert card.data.datasets == ['imagenet-1k'] and 'base_model' not in card.data.to_dict()
    assert [r.metric_value for r in card.data.eval_results] == [68.1]
    assert hash_file(source) in card.text and 'not verified' in card.text
    assert '23.5M parameters' in card.text and 'arxiv.org/abs/2011.10566' in card.text
    assert 'create_simsiam' in card.text and 'were not measured again' in ' '.join(card.text.split())


def test_the_card_of_a_classifier_names_its_base_model(linear):
    card = ModelCard.load(linear[1] / 'README.md')
    assert card.data.pipeline_tag == 'image-classification'
    assert card.data.base_model == 'simsiam-models/simsiam_resnet50.fb_bs512_ep100_in1k'
    assert 'create_simsiam' not in card.text and 'AutoModelForImageClassification' in card.text


@pytest.mark.parametrize('tag', WEIGHTS)
def test_the_metadata_holds_exactly_the_numbers_of_this_file(tag):
    config = {'architecture': 'resnet50', 'num_classes': WEIGHTS[tag].num_classes, 'num_features': 2048,
              'pretrained_cfg': {'input_size': [3, 224, 224]}}
    facts = CardFacts(tag, f'somebody/simsiam_resnet50.{tag}', config, 1, 'x', False, WEIGHTS[tag].license)
    card = ModelCard(format_card(facts))
    numbers = {
        (e['benchmark'], e['source'], v) for e in find_results(tag) for k, v in e['metrics'].items()
        if k != 'mIoU_first_report'}
    assert {(r.dataset_config, r.source_name, r.metric_value) for r in card.data.eval_results or []} == numbers
    assert card.data.license == WEIGHTS[tag].license
    others = card.text.partition('### Numbers of other')[2].splitlines()
    for entry in find_page_results(tag):  # other files' numbers are shown under their own names
        row = next(row for row in others if BENCHMARKS[entry['benchmark']][0] in row)
        assert f'`{entry["tag"]}`' in row and str(next(iter(entry['metrics'].values()))) in row
    assert ('flip(1)' in card.text) == ('bgr' in tag)


def test_published_numbers_belong_to_the_file_that_was_measured():
    def numbers(tag: str, of: str) -> dict[str, float]:
        (entry,) = [e for e in find_results(tag) if e['benchmark'] == of]
        return entry['metrics']
    assert numbers('mm_ep200_in1k', 'imagenet_linear_avgpool') == {'top1': 69.84}
    assert numbers('mm_ep100_in1k', 'imagenet_knn_T0.07') == {'k=10': 57.4, 'k=20': 57.6, 'k=100': 55.8, 'k=200': 54.2}
    assert numbers('mm_ep200_bgr_in1k', 'voc07_svm_feature5') == {'mAP': 85.2}
    assert numbers('mm_ep100_bgr_in1k', 'coco_mask_rcnn_r50_fpn_ms_1x')['box_AP'] == 38.6
    assert numbers('mm_ep100_bgr_in1k', 'imagenet_linear_avgpool') == {'top1': 68.2}
    assert numbers('mm1x_ep100_lin_in1k', 'imagenet_linear_avgpool') == {'top1': 68.3}
    assert numbers('fb_bs256_ep200_in1k', 'imagenet_linear') == {'top1': 69.8}
    assert 'issue 18' in find_results('fb_bs256_ep200_in1k')[0]['source']  # FAIR's README does not list this file
    for tag, weights in WEIGHTS.items():  # the table of weights agrees
        top1 = [e['metrics']['top1'] for e in find_results(tag) if 'top1' in e['metrics']]
        assert top1 == ([] if weights.top1 is None else [weights.top1]), tag
    assert {e['tag'] for e in find_page_results('mm_ep200_in1k')} == {'mm_ep200_bgr_in1k'}
    assert {e['tag'] for e in find_page_results('mm1x_ep200_in1k')} == {'mm_ep200_bgr_in1k', 'mm_ep200_in1k'}
    assert not find_page_results('fb_bs512_ep100_in1k')


def test_a_description_names_origin_license_and_every_number():
    text = describe('simsiam_resnet50.mm_ep100_in1k')
    assert WEIGHTS['mm_ep100_in1k'].url in text and 'apache-2.0' in text and 'begins with 68a88ad8' in text
    own, others = text.split('measured with another file')
    assert 'top1 68.28' in own and 'k=20 57.6' in own and 'mAP 84.64' not in own
    assert 'mm_ep100_bgr_in1k  voc07_svm_feature5: mAP 84.64' in others
    with pytest.raises(ValueError, match="'mine' is not a published tag: choose one of mm_ep200_in1k"):
        describe('mine')


# What is refused, each in a sentence


def refused(source: Path, tag: str, folder: Path, match: str, license: str | None = None) -> None:
    with pytest.raises(ValueError, match=match) as e:
        publish(source, tag, folder, license)
    assert '\n' not in str(e.value)
    assert not folder.exists()


def test_an_incomplete_backbone_is_refused(state, tmp_path):
    del (broken := dict(state))['backbone.layer3.4.bn2.running_var']
    refused(fair(broken, tmp_path / 'x.pth'), TAG, tmp_path / 'out', '317 entries, a ResNet-50 has 318')


def test_an_incomplete_predictor_is_refused(state, tmp_path):
    broken = {k: v for k, v in state.items() if k != 'predictor.3.bias'}
    refused(fair(broken, tmp_path / 'x.pth'), TAG, tmp_path / 'out', '16 and 7 entries, those of .* have 16 and 8')


def test_nan_is_refused(state, tmp_path):
    weight = state['predictor.0.weight'].clone()
    weight[0, 0] = torch.nan
    source = fair({**state, 'predictor.0.weight': weight}, tmp_path / 'x.pth')
    refused(source, TAG, tmp_path / 'out', r'NaN or infinity in 1 tensors \(predictor.0.weight\)')


def test_a_missing_classifier_is_refused(pretrained, linear, tmp_path):
    source = tmp_path / 'backbone.safetensors'
    source.write_bytes((pretrained[1] / 'model.safetensors').read_bytes())
    refused(source, LIN, tmp_path / 'out', 'no classifier, fb_bs512_ep100_lin_in1k has one of 1000 classes')
    source.write_bytes((linear[1] / 'model.safetensors').read_bytes())
    refused(source, TAG, tmp_path / 'out', 'a classifier of 1000 classes, fb_bs512_ep100_in1k has none')


def test_the_file_of_another_tag_is_refused(pretrained, state, tmp_path):
    refused(pretrained[0], LIN, tmp_path / 'out', f'layout fair, but {LIN} is a file of the layout fair_linear')
    refused(pretrained[0], 'fb_bs256_ep200_in1k', tmp_path / 'out', 'epoch 100, .* trained for 200 epochs')


def test_the_hash_in_the_name_of_the_upstream_file_is_checked(state, tmp_path, monkeypatch):
    source, tag = tmp_path / 'x.pth', 'mm1x_ep200_in1k'
    torch.save({'state_dict': openmmlab(state), 'meta': {}}, source)
    refused(source, tag, tmp_path / 'out', 'that of mm1x_ep200_in1k begins with efe91299: it is another file')
    sha256 = hash_file(source)
    monkeypatch.setitem(WEIGHTS, tag, WEIGHTS[tag]._replace(sha256_prefix=sha256[:8]))
    assert f"authors' own file, whose SHA-256 {sha256} begins with" in publish(source, tag, tmp_path / 'out')
    assert sha256 in (tmp_path / 'out' / 'README.md').read_text()


def test_the_license_of_published_weights_is_not_the_uploaders_to_choose(pretrained, tmp_path):
    refused(pretrained[0], TAG, tmp_path / 'out', 'published by its authors under cc-by-nc-4.0', license='mit')


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.pth does not exist'):
        publish(tmp_path / 'nowhere.pth', TAG, tmp_path / 'out')


# Weights of the user


@pytest.mark.parametrize('args, size', [({}, 160), ({}, 96), ({'img_size': 64}, 64)])
def test_plain_timm_builds_an_exported_vit_for_the_images_that_it_was_built_for(args, size, tmp_path):
    backbone = timm.create_model('test_vit', num_classes=0, **args).eval()
    export_backbone(backbone, tmp_path, 'test_vit', args, size, size)
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(x), backbone(x))


def test_own_weights_of_any_architecture_need_a_license_and_get_a_card_without_numbers(tmp_path):
    args = {'layers': [1, 1, 1, 1], 'channels': [8, 16, 16, 16]}
    backbone = timm.create_model('resnet18', num_classes=0, **args)
    export_backbone(backbone, tmp_path / 'backbone', 'resnet18', args, size=64, resize=64)
    refused(tmp_path / 'backbone', 'mine', tmp_path / 'out', "'mine' is not a published tag .* --license")
    text = publish(tmp_path / 'backbone', 'mine', tmp_path / 'out', license='mit')
    assert 'simsiam-models/simsiam_resnet18.mine' in text
    card = ModelCard.load(tmp_path / 'out' / 'README.md')
    assert card.data.license == 'mit' and card.data.eval_results is None and card.data.datasets is None
    assert 'No results are published' in card.text and '64 px' in card.text
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert all(torch.equal(v, backbone.state_dict()[k]) for k, v in model.state_dict().items())
    (tmp_path / 'foreign').mkdir()
    (tmp_path / 'foreign' / 'config.json').write_text('{"model_type": "bert"}')
    refused(tmp_path / 'foreign', 'mine', tmp_path / 'out3', 'not that of a model exported for timm', license='mit')
    tensors = {**load_file(tmp_path / 'backbone' / 'model.safetensors'), 'bn1.weight': torch.full((64,), torch.inf)}
    save_file(tensors, tmp_path / 'backbone' / 'model.safetensors')
    with pytest.raises(ValueError, match='NaN or infinity'):
        publish(tmp_path / 'backbone', 'mine', tmp_path / 'out2', license='mit')


def test_a_folder_that_the_card_cannot_describe_is_refused_in_one_sentence(tmp_path):
    args = {'layers': [1, 1, 1, 1], 'channels': [8, 16, 16, 16]}
    export_backbone(timm.create_model('resnet18', num_classes=0, **args), tmp_path / 'a', 'resnet18', args)
    config = json.loads((tmp_path / 'a' / 'config.json').read_text())
    for size in (None, [], 'x', [3, 224]):
        cfg = {**config['pretrained_cfg'], 'input_size': size}
        (tmp_path / 'a' / 'config.json').write_text(json.dumps({**config, 'pretrained_cfg': cfg}))
        refused(tmp_path / 'a', 'mine', tmp_path / 'out', 'input_size .* are needed', license='mit')


def test_a_folder_may_say_that_it_has_no_arguments(tmp_path):
    export_backbone(timm.create_model('resnet18', num_classes=0), tmp_path / 'a', 'resnet18')
    config = json.loads((tmp_path / 'a' / 'config.json').read_text())
    (tmp_path / 'a' / 'config.json').write_text(json.dumps({**config, 'model_args': None}))
    assert 'uploaded nothing' in publish(tmp_path / 'a', 'mine', tmp_path / 'out', license='mit')


def test_a_header_without_the_hash_of_the_authors_file_is_refused(pretrained, tmp_path):
    for name in ('model.safetensors', 'heads.safetensors', 'config.json'):
        (tmp_path / name).write_bytes((pretrained[1] / name).read_bytes())
    for name in ('model.safetensors', 'heads.safetensors'):
        save_file(load_file(tmp_path / name), tmp_path / name, {'layout': 'fair'})
    refused(tmp_path, TAG, tmp_path / 'out', 'does not say the SHA-256 .* publish that file')


# The upload


COMMIT = 'ab' * 20


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub that an upload needs; files arrive inside the commit."""

    protocol_version = 'HTTP/1.1'

    def do_GET(self) -> None:
        """Serves what was uploaded, at its commit, and whether the repository is private."""
        if self.path.startswith('/api/models/'):
            return self.answer(200, {'id': 'someone/x', 'private': self.server.private})
        repo, _, name = self.path.partition(f'/resolve/{COMMIT}/')
        body = self.server.files.get(name)
        if body is None or repo != f'/someone/{self.server.created["name"]}':
            return self.answer(404, {})
        self.send_response(200)
        digest = hashlib.sha256(body).hexdigest()
        for key, value in {'ETag': f'"{digest}"', 'X-Repo-Commit': COMMIT, 'Content-Length': str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        while self.headers.get('Transfer-Encoding') == 'chunked':
            size = int(self.rfile.readline(), 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if size == 0:
                break
        owner = self.server
        if owner.status != 200:
            return self.answer(owner.status, {'error': 'refused by loopback'})
        owner.log.append(self.path)
        path = self.path.split('?')[0]
        if path == '/api/repos/create':
            owner.created = json.loads(body)
            return self.answer(200, {'url': f'{owner.url}/someone/{owner.created["name"]}'})
        if path == '/api/validate-yaml':
            return self.answer(200, {'warnings': [], 'errors': []})
        if '/preupload/' in path:
            paths = [f['path'] for f in json.loads(body)['files']]
            return self.answer(200, {'files': [
                {'path': p, 'uploadMode': 'regular', 'shouldIgnore': False} for p in paths]})
        for line in map(json.loads, body.splitlines()):
            if line['key'] == 'file':
                owner.files[line['value']['path']] = base64.b64decode(line['value']['content'])
        self.answer(200, {'commitUrl': f'{owner.url}/someone/x/commit/{COMMIT}', 'commitOid': COMMIT})

    def answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.url, server.status, server.files, server.log = f'http://127.0.0.1:{server.server_port}', 200, {}, []
    server.private = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


UPLOAD = f'''
import os, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from huggingface_hub import constants
from simsiam_models.weights import sources
from simsiam_models.weights.publish import publish
source, sources.PINS, *attempts = sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]
for attempt in attempts:
    constants.ENDPOINT, _, os.environ['HF_TOKEN'] = attempt.partition(' ')
    try:
        print(publish(source, {LIN!r}))
    except RuntimeError as e:
        print('RuntimeError:', e)
'''


def upload(source: Path, pins: Path, *attempts: str) -> list[str]:
    """Publish to each 'endpoint token' in turn; returns the lines that were printed."""
    done = run(
        UPLOAD, source, pins, *attempts, HF_HOME=str(pins.parent / 'hf'), HF_HUB_OFFLINE='0',
        SIMSIAM_HUB_NAMESPACE='someone')
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_an_upload_equals_the_dry_run_and_is_pinned(linear, hub, tmp_path):
    source, repo, _ = linear
    (pins := tmp_path / 'pins.json').write_text('{"other": {}}')
    lines = upload(source, pins, f'{hub.url} hf_x')
    assert COMMIT in lines[-2] and 'commit that file' in lines[-1]
    assert hub.created['name'] == f'simsiam_resnet50.{LIN}' and hub.created['organization'] == 'someone'
    assert set(hub.files) == {p.name for p in repo.iterdir()}
    for name, content in hub.files.items():
        dry = (repo / name).read_bytes()
        if name == 'fingerprint.json':  # from another process, where the last bits may differ
            assert compare_fingerprints(json.loads(dry), json.loads(content)) < TOLERANCE['float32']
        else:
            assert content == (dry.replace(b'simsiam-models/', b'someone/') if name == 'README.md' else dry), name
    recorded = json.loads(pins.read_text())
    assert set(recorded) == {'other', LIN}
    assert recorded[LIN]['repo'] == f'someone/simsiam_resnet50.{LIN}' and recorded[LIN]['revision'] == COMMIT
    assert recorded[LIN]['files']['model.safetensors'] == hash_file(repo / 'model.safetensors')
    assert recorded[LIN]['fingerprint'] == json.loads(hub.files['fingerprint.json'])


@pytest.mark.parametrize('private', [True, False])
def test_a_private_upload_goes_to_a_private_repository_only(private, hub, tmp_path, monkeypatch):
    args = {'layers': [1, 1, 1, 1], 'channels': [8, 8, 8, 8]}
    export_backbone(timm.create_model('resnet18', num_classes=0, **args), tmp_path / 'a', 'resnet18', args)
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', hub.url)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    monkeypatch.setenv('HF_TOKEN', 'hf_x')
    hub.private = private  # what is there already
    if private:
        assert COMMIT in publish(tmp_path / 'a', license='mit', repo='someone/mine', private=True)
        assert {'README.md', 'config.json', 'model.safetensors'} < set(hub.files)
    else:
        with pytest.raises(RuntimeError, match='someone/mine was not uploaded: --private: someone/mine is public'):
            publish(tmp_path / 'a', license='mit', repo='someone/mine', private=True)
        assert not hub.files
    asked = hub.created.get('private'), hub.created.get('visibility')  # the client's older and newer word for it
    assert asked in [(True, None), (None, 'private')] and hub.created['name'] == 'mine'


def test_pins_that_cannot_be_written_are_returned(tmp_path, monkeypatch):
    monkeypatch.setattr('simsiam_models.weights.sources.PINS', tmp_path / 'nowhere' / 'pins.json')
    first, text = pin_upload(TAG, {'revision': COMMIT})
    assert 'cannot be written' in first and json.loads(text) == {TAG: {'revision': COMMIT}}


def test_a_refused_token_a_dead_hub_and_no_token_are_told_in_a_sentence(linear, hub, tmp_path):
    (pins := tmp_path / 'pins.json').write_text('{}')
    hub.status = 403
    refused, dead, tokenless = upload(linear[0], pins, f'{hub.url} hf_x', 'http://127.0.0.1:9 hf_x', hub.url)
    start = f'RuntimeError: someone/simsiam_resnet50.{LIN} was not uploaded: '
    assert refused.startswith(f'{start}the Hub refused the token (403)')
    assert dead.startswith(start) and 'Connect' in dead
    assert tokenless.startswith('RuntimeError: no Hugging Face token: ')
    assert pins.read_text() == '{}'


# Every tag in one command


@pytest.fixture
def authors(pretrained, linear, state, tmp_path, monkeypatch) -> Iterator[loopback.Server]:
    """The servers of the authors, who have published three files only; a cache that is empty."""
    with loopback.Server() as server:
        mm = openmmlab(state)
        mm |= {k.replace('backbone.', 'encoder.0.'): v for k, v in mm.items() if k.startswith('backbone.')}
        torch.save({'state_dict': mm, 'meta': {}}, tmp_path / 'mm.pth')
        raw = {TAG: pretrained[0], LIN: linear[0], BGR: tmp_path / 'mm.pth'}
        for tag in [tag for tag in WEIGHTS if tag not in raw]:
            monkeypatch.delitem(WEIGHTS, tag)
        for tag, path in raw.items():
            server.files[f'/{tag}.pth'] = path.read_bytes()
            prefix = hash_file(path)[:8] if tag == BGR else None
            row = WEIGHTS[tag]._replace(url=f'{server.url}/{tag}.pth', sha256_prefix=prefix)
            monkeypatch.setitem(WEIGHTS, tag, row)
        monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
        monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
        monkeypatch.setenv('SIMSIAM_HUB_NAMESPACE', 'nobody')  # named, and not asked all the same
        monkeypatch.setattr('simsiam_models.weights.sources.hf_hub_download', lambda *a, **k: pytest.fail('the Hub'))
        yield server


def publish_all_to(folder: Path, capsys: pytest.CaptureFixture) -> tuple[int, list[str]]:
    code = main(['publish', '--all', '--dry-run', str(folder)])
    return code, capsys.readouterr().out.splitlines()


def test_every_tag_is_written_from_its_authors_file_and_the_same_command_goes_on(
        authors, pretrained, state, tmp_path, capsys):
    out, good = tmp_path / 'out', authors.files.pop(f'/{LIN}.pth')
    code, lines = publish_all_to(out, capsys)
    assert code == 1 and 'FAILED' not in ''.join(line for line in lines if not line.startswith(LIN))
    assert any(line.startswith(f'{LIN}: FAILED: ') and '404' in line for line in lines)
    assert lines[-1] == f'2 of 3 tags are written to {out}; failed: {LIN}. The same command tries these again'
    folders = {tag: out / f'simsiam_resnet50.{tag}' for tag in (TAG, LIN, BGR)}
    assert sorted(p.name for p in out.iterdir()) == sorted(folders[t].name for t in (TAG, BGR))
    for name in ('model.safetensors', 'heads.safetensors'):  # as from the file itself
        one, other = (load_file(folder / name) for folder in (folders[TAG], pretrained[1]))
        assert one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())
    assert (folders[TAG] / 'config.json').read_bytes() == (pretrained[1] / 'config.json').read_bytes()
    card = ModelCard.load(folders[TAG] / 'README.md')
    assert card.data.license == 'cc-by-nc-4.0' and '**For non-commercial use only** (CC-BY-NC-4.0)' in card.text
    assert 'not verified' in card.text
    card = ModelCard.load(folders[BGR] / 'README.md')
    assert card.data.license == 'apache-2.0' and 'commercial' not in card.text and 'BGR' in card.text
    assert WEIGHTS[BGR].sha256_prefix in card.text and "authors' own file" in card.text
    conv1 = load_file(folders[BGR] / 'model.safetensors')['conv1.weight']
    assert torch.equal(conv1, state['backbone.conv1.weight'].flip(1))
    # killed in the middle of writing TAG, and LIN is there again
    (folders[TAG] / 'README.md').unlink()
    (out / '.unfinished-x').mkdir()
    authors.files[f'/{LIN}.pth'] = good
    authors.log.clear()
    code, lines = publish_all_to(out, capsys)
    assert code == 0 and f'{BGR}: {folders[BGR]} is complete' in lines
    assert authors.log == [f'GET /{LIN}.pth'] and not (out / '.unfinished-x').exists()
    assert len(list((folders[TAG]).iterdir())) == 5 and lines[-1] == f'3 of 3 tags are written to {out}'
    before = {p: p.stat().st_mtime_ns for p in out.rglob('*')}
    assert publish_all_to(out, capsys)[0] == 0 and before == {p: p.stat().st_mtime_ns for p in out.rglob('*')}


@pytest.mark.parametrize('args, words', [
    (['--all', 'x.pth'], 'leave CHECKPOINT out'), (['--all', '--tag', 'a'], 'leave --tag out'),
    (['--all', '--license', 'mit', '--tag', 'a'], 'leave --tag, --license out'),
    (['--all', '--repo', 'me/x', '--private'], 'leave --repo, --private out'),
    ([], 'name a CHECKPOINT and its --tag or --repo, or publish every tag with --all'),
    (['x.pth'], 'name a CHECKPOINT and its --tag'), (['--tag', 'a'], 'name a CHECKPOINT and its --tag')])
def test_all_and_a_single_checkpoint_exclude_each_other(args, words, capsys):
    assert main(['publish', *args]) == 1
    said = capsys.readouterr().err
    assert words in said and said.count('\n') == 1


def test_all_without_a_token_is_one_sentence_before_anything_is_downloaded(authors, monkeypatch, capsys):
    monkeypatch.setattr('simsiam_models.weights.upload.get_token', lambda: None)
    assert main(['publish', '--all']) == 1
    assert capsys.readouterr().err.startswith('simsiam: no Hugging Face token') and not authors.log


UPLOAD_ALL = f'''
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from simsiam_models.weights import sources
from simsiam_models.weights.publish import publish_all
from simsiam_models.weights.published import WEIGHTS
row = WEIGHTS[{LIN!r}]._replace(url=sys.argv[2])
WEIGHTS.clear()
WEIGHTS[{LIN!r}] = row
sources.PINS = Path(sys.argv[1])
for _ in sys.stdin:
    print(publish_all(), flush=True)
'''


def test_what_is_pinned_and_on_the_hub_is_skipped(linear, hub, tmp_path):
    (pins := tmp_path / 'pins.json').write_text('{}')
    with loopback.Server() as server:
        server.files['/x/model_best.pth.tar'] = linear[0].read_bytes()

        process = start(
            UPLOAD_ALL, pins, f'{server.url}/x/model_best.pth.tar', HF_ENDPOINT=hub.url, HF_TOKEN='hf_x',
            HF_HOME=str(tmp_path / 'hf'), TORCH_HOME=str(tmp_path / 'torch'), HF_HUB_OFFLINE='0',
            SIMSIAM_HUB_NAMESPACE='someone', HF_HUB_DISABLE_XET='1')

        def upload_all() -> list[str]:
            hub.log.clear(), server.log.clear()
            process.stdin.write('\n')
            process.stdin.flush()
            lines = []
            while not lines or lines[-1] not in ('True', 'False'):
                lines.append(process.stdout.readline().rstrip('\n'))
                assert lines[-1], process.communicate()[1]
            return lines

        assert upload_all()[-2:] == ['1 of 1 tags are published', 'True'] and len(server.log) == 1
        recorded = json.loads(pins.read_text())[LIN]
        assert recorded['files']['model.safetensors'] == hashlib.sha256(hub.files['model.safetensors']).hexdigest()
        lines = upload_all()
        assert 'is pinned, and the Hub has the pinned files' in lines[0] and not hub.log and not server.log
        hub.files['model.safetensors'] += b'x'  # somebody overwrote it
        lines = upload_all()
        assert hub.log and not server.log and lines[-1] == 'True'  # again, from the cache
        assert hashlib.sha256(hub.files['model.safetensors']).hexdigest() == recorded['files']['model.safetensors']
        _, said = process.communicate()
        assert process.returncode == 0, said

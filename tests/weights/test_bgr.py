"""Weights that were trained on BGR pixels take RGB pixels from every way to load them, and give the same outputs.

The oracle is the authors' network as its file holds it, on BGR pixels normalized by mean and std of R, G, B.
"""
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import layouts_on_disk
import numpy as np
import pytest
import timm
import torch
from conftest import write_digits
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision import transforms

from simsiam_models import create_simsiam, load_checkpoint
from simsiam_models.benchmarks.backbone import load_backbone
from simsiam_models.benchmarks.features import Extraction, Transform, extract
from simsiam_models.data import FolderImages
from simsiam_models.weights import sources, tensorfile
from simsiam_models.weights.convert import convert
from simsiam_models.weights.publish import publish
from simsiam_models.weights.published import WEIGHTS, describe
from simsiam_models.weights.verify import verify

TAG = 'mm_ep100_bgr_in1k'
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Upstream:
    """A file of MMSelfSup 0.x for BGR pixels, and what its network computes."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = create_simsiam(zero_init_last=False).eval()
        for norm in self.model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_(0, 0.1)
        self.path, self.folder = folder / 'mm.pth', folder
        torch.save(layouts_on_disk.mmselfsup_0x(self.model).contents, self.path)
        self.sha256 = tensorfile.hash_file(self.path)
        self.image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))

    @property
    def expected(self) -> Tensor:
        """The features of the image: BGR, by statistics in the order R, G, B."""
        x = transforms.ToTensor()(self.image).flip(0)
        with torch.no_grad():
            return self.model.backbone(transforms.Normalize(MEAN, STD)(x)[None])

    def features(self, model: nn.Module) -> Tensor:
        """As a user of timm computes them, from an RGB image."""
        config = resolve_model_data_config(model)
        x = transforms.Normalize(config['mean'], config['std'])(transforms.ToTensor()(self.image))
        last = create_transform(**config).transforms[-1]
        assert tuple(last.mean.tolist()) == pytest.approx(config['mean'])  # timm's transform has them too
        with torch.no_grad():
            return model.eval()(x[None])


@pytest.fixture(scope='module')
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    folder = tmp_path_factory.mktemp('bgr')
    yield Upstream(folder)
    shutil.rmtree(folder)  # 150 MB


@pytest.fixture(autouse=True)
def known(upstream: Upstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Makes it the published file of TAG, which no cache has."""
    monkeypatch.setitem(WEIGHTS, TAG, WEIGHTS[TAG]._replace(sha256_prefix=upstream.sha256[:8]))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.delenv('SIMSIAM_HUB_NAMESPACE', raising=False)


@pytest.fixture
def server(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' server has the file."""
    def download(url: str, target: Path, prefix: str | None) -> str:
        shutil.copyfile(upstream.path, target)
        return upstream.sha256

    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    monkeypatch.setattr(sources, 'download', download)


def test_the_checkpoint_takes_rgb_and_says_so(upstream):
    checkpoint = load_checkpoint(upstream.path)
    theirs = upstream.model.backbone.state_dict()
    assert torch.equal(checkpoint.backbone['conv1.weight'], theirs['conv1.weight'].flip(1))
    assert all(torch.equal(v, theirs[k]) for k, v in checkpoint.backbone.items() if k != 'conv1.weight')
    assert checkpoint.info['tag'] == TAG and checkpoint.info['bgr']
    assert 'conv1 takes RGB' in checkpoint.describe()


def test_a_file_that_is_not_published_is_left_as_it_is(upstream, monkeypatch):
    monkeypatch.setitem(WEIGHTS, TAG, WEIGHTS[TAG]._replace(sha256_prefix='00000000'))
    checkpoint = load_checkpoint(upstream.path)
    assert torch.equal(checkpoint.backbone['conv1.weight'], upstream.model.backbone.conv1.weight)
    assert not checkpoint.info.get('bgr') and 'tag' not in checkpoint.info


@pytest.mark.parametrize('way', [
    'tag', 'file', 'file under its own tag', 'address', 'create_simsiam, tag', 'create_simsiam, file'])
def test_plain_timm_gives_the_features_of_the_authors_network_for_rgb_images(upstream, server, way):
    file = dict(pretrained_cfg_overlay=dict(file=str(upstream.path)))
    name = f'simsiam_resnet50.{TAG}' if 'tag' in way else 'simsiam_resnet50'
    address = dict(pretrained_cfg_overlay=dict(url=WEIGHTS[TAG].url))
    kwargs = file if 'file' in way else address if way == 'address' else {}
    create = create_simsiam if 'create_simsiam' in way else timm.create_model
    model = create(name, pretrained=True, **kwargs)
    if create is create_simsiam:
        assert torch.equal(model.projector[0].weight, upstream.model.projector[0].weight)
        model = model.backbone
    assert model.pretrained_cfg['mean'] == MEAN[::-1] and model.pretrained_cfg['std'] == STD[::-1]
    torch.testing.assert_close(upstream.features(model), upstream.expected, rtol=1e-4, atol=1e-5)


def test_another_file_under_the_bgr_tag_keeps_the_statistics_of_rgb(upstream, tmp_path):
    torch.save(upstream.model.backbone.state_dict(), tmp_path / 'mine.pth')
    model = timm.create_model(
        f'simsiam_resnet50.{TAG}', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'mine.pth')))
    assert tuple(model.pretrained_cfg['mean']) == MEAN and torch.equal(
        model.conv1.weight, upstream.model.backbone.conv1.weight)


@pytest.mark.parametrize('way', ['file', 'folder', 'local-dir', 'weights in the folder', 'tag'])
def test_benchmarks_compute_the_features_of_the_authors_network(upstream, server, way, tmp_path):
    if way != 'tag' and way != 'file':
        convert(upstream.path, tmp_path / 'out', 'timm')
    name = {'file': upstream.path, 'folder': tmp_path / 'out', 'local-dir': f'local-dir:{tmp_path / "out"}',
            'weights in the folder': tmp_path / 'out' / 'model.safetensors', 'tag': f'simsiam_resnet50.{TAG}'}[way]
    backbone = load_backbone(str(name))
    assert (backbone.tag == TAG) == (way in ('file', 'tag'))  # the folder says so, but nothing proves it
    assert (backbone.mean, backbone.std) == (MEAN[::-1], STD[::-1])
    (folder := tmp_path / 'images').mkdir()
    upstream.image.save(folder / 'a.png')
    found = extract(
        backbone, FolderImages(folder), ['avgpool', 'feat1'], Transform(64, 64), Extraction(tmp_path / 'cache'))
    torch.testing.assert_close(
        torch.tensor(found.array('avgpool')), upstream.expected, rtol=1e-4, atol=1e-5)


def test_a_folder_has_the_tag_once_the_authors_file_is_there_to_compare_with(upstream, server, tmp_path, caplog):
    convert(upstream.path, tmp_path / 'out', 'timm')
    assert load_backbone(f'local-dir:{tmp_path / "out"}').tag is None
    assert 'count as your own' in caplog.text and f'weights verify {TAG}' in caplog.text
    sources.fetch(f'simsiam_resnet50.{TAG}', WEIGHTS[TAG])
    assert load_backbone(f'local-dir:{tmp_path / "out"}').tag == TAG
    changed = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert changed.pretrained_cfg['tag'] == TAG
    with torch.no_grad():
        changed.layer4[2].conv3.weight.mul_(2)
    timm.models.save_for_hf(changed, tmp_path / 'other', safe_serialization=True)  # keeps the tag, says no digest
    assert load_backbone(f'local-dir:{tmp_path / "other"}').tag is None
    shutil.copyfile(tmp_path / 'other' / 'model.safetensors', tmp_path / 'out' / 'model.safetensors')
    assert load_backbone(f'local-dir:{tmp_path / "out"}').tag is None


def test_a_folder_of_an_older_version_is_refused(upstream, tmp_path):
    convert(upstream.path, tmp_path / 'out', 'timm')
    tensorfile.write(tmp_path / 'out' / 'model.safetensors', upstream.model.backbone.state_dict())
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    config['backbone_sha256'] = tensorfile.hash_tensors(upstream.model.backbone.state_dict())
    (tmp_path / 'out' / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='with the channels B, G, R; convert the file again'):
        load_backbone(f'local-dir:{tmp_path / "out"}')
    passed, lines = verify(str(tmp_path / 'out'))
    assert not passed and any('does not say that its channels were reversed' in line for line in lines)


def test_the_timm_folder_needs_nothing_of_ours(upstream, tmp_path):
    text = convert(upstream.path, tmp_path / 'out', 'timm')
    assert 'conv1 takes RGB' in text and str(MEAN[::-1]) in text
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    torch.testing.assert_close(upstream.features(model), upstream.expected, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())['pretrained_cfg']
    assert config['mean'] == list(MEAN[::-1]) and config['std'] == list(STD[::-1])


PIXELS = {'detectron2': ('[103.53, 116.28, 123.675]', '[57.375, 57.12, 58.395]', 'INPUT.FORMAT: "RGB"'),
          'mmdet': ('[103.53, 116.28, 123.675]', '[57.375, 57.12, 58.395]', 'RGB images'),
          'onnx': (str(MEAN[::-1]), str(STD[::-1]), 'RGB in 0..1'),
          'torchvision': (str(MEAN[::-1]), str(STD[::-1]), 'RGB in 0..1')}


@pytest.mark.parametrize('to', PIXELS)
@pytest.mark.parametrize('source', ['file', 'folder'])
def test_every_target_gets_rgb_weights_and_the_statistics_that_belong_to_them(upstream, tmp_path, to, source):
    if to == 'onnx':
        pytest.importorskip('onnx')
    path = upstream.path
    if source == 'folder':
        convert(path, path := tmp_path / 'folder', 'timm')
    out = tmp_path / {'detectron2': 'x.pkl', 'onnx': 'x.onnx'}.get(to, 'x.pth')
    text = convert(path, out, to)
    assert all(words in text for words in PIXELS[to]), text
    theirs = upstream.model.backbone.conv1.weight
    assert torch.equal(load_checkpoint(out).backbone['conv1.weight'], theirs.flip(1))  # once, not twice


def test_a_repository_takes_rgb_and_its_card_says_what_is_inferred(upstream, tmp_path):
    publish(upstream.path, TAG, tmp_path / 'repo')
    theirs = upstream.model.backbone.conv1.weight
    assert torch.equal(load_file(tmp_path / 'repo' / 'model.safetensors')['conv1.weight'], theirs.flip(1))
    card = ' '.join((tmp_path / 'repo' / 'README.md').read_text().split())
    assert 'Trained on BGR pixels, made for RGB pixels' in card and 'inferred, on strong evidence' in card
    assert "convert('RGB')" in card and 'blue channel first' not in card
    for tag, words in ((TAG, 'strong evidence'), ('mm_ep200_bgr_in1k', 'weaker evidence')):
        text = describe(tag)
        assert words in text and '0.406, 0.456, 0.485' in text and 'RGB' in text
    assert 'BGR' not in describe('mm_ep200_in1k').split('Numbers of')[0]
    again = publish(tmp_path / 'repo', TAG, tmp_path / 'again')
    assert 'converted from an already converted file' in again
    assert torch.equal(load_file(tmp_path / 'again' / 'model.safetensors')['conv1.weight'], theirs.flip(1))


def test_verify_knows_the_file_by_its_hash(upstream):
    passed, lines = verify(str(upstream.path))
    assert passed and lines[0].startswith('ok   hash: ') and f'that of {TAG} begins with' in lines[0]


def test_digits_are_fed_as_they_are(tmp_path):
    """No swap is left in the benchmarks: the model sees R, G, B in this order."""
    folder = write_digits(tmp_path / 'digits', 4)
    Image.new('RGB', (8, 8), (255, 0, 0)).save(folder / 'red.png')
    seen = []
    backbone = load_backbone('resnet10t:random')
    backbone.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    extract(backbone, FolderImages(folder), ['avgpool'], Transform(8, 8), Extraction(tmp_path / 'cache'))
    mean, std = torch.tensor(backbone.mean), torch.tensor(backbone.std)
    pixels = [(x[:, 4, 4] * std + mean).round().tolist() for batch in seen for x in batch]
    assert [1.0, 0.0, 0.0] in pixels

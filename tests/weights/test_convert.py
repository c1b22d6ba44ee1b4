"""A checkpoint of any layout -> the files of timm, torchvision, detectron2, mmdet and ONNX runtimes, and back."""
import errno
import pickle
import pickletools
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from simsiam_models.simsiam import build_predictor, build_projector
from simsiam_models.weights import convert as module
from simsiam_models.weights.convert import TARGETS, convert
from simsiam_models.weights.layouts import load_checkpoint
from simsiam_models.weights.reading import read_onnx

NAMES = {
    'timm': 'folder', 'torchvision': 'tv.pth', 'detectron2': 'd2.pkl', 'mmdet': 'mmdet.pth', 'onnx': 'model.onnx'}


def random_resnet50(num_classes: int = 0) -> nn.Module:
    """Every batch norm has statistics, scale, shift and counter of its own."""
    torch.manual_seed(0)
    model = timm.create_model('resnet50', num_classes=num_classes).eval()
    for i, norm in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1)
        nn.init.normal_(norm.bias, std=0.1)
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 1.5)
        norm.num_batches_tracked.fill_(1000 + i)
    return model


def flat_resnet50(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All entries of a ResNet-50 in a file of a few kB: every tensor repeats one number."""
    with torch.device('meta'):
        state = timm.create_model('resnet50', num_classes=0).state_dict()
    return {
        k: torch.ones((), dtype=dtype if v.is_floating_point() else v.dtype).expand(v.shape)
        for k, v in state.items()}


def save(contents: object, path: Path) -> Path:
    torch.save(contents, path)
    return path


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for k in a:
        assert a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]), k


@pytest.fixture(scope='module')
def model() -> nn.Module:
    return random_resnet50()


@pytest.fixture(scope='module')
def fair(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A pretraining checkpoint as FAIR's code writes it, with narrow heads."""
    state = {f'encoder.{k}': v for k, v in model.state_dict().items()}
    state |= {f'encoder.fc.{k}': v for k, v in build_projector(2048, 32).state_dict().items()}
    state |= {'encoder.fc.6.bias': torch.randn(32)}
    state |= {f'predictor.{k}': v for k, v in build_predictor(32, 8).state_dict().items()}
    folder = tmp_path_factory.mktemp('fair')
    yield save(
        {'epoch': 100, 'arch': 'resnet50', 'state_dict': {f'module.{k}': v for k, v in state.items()}, 'optimizer': {}},
        folder / 'checkpoint_0099.pth.tar')
    shutil.rmtree(folder)  # 100 MB


@pytest.fixture(scope='module')
def converted(fair: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, str]]]:
    """The result of each target, and the text of convert."""
    pytest.importorskip('onnx')
    folder = tmp_path_factory.mktemp('converted')
    yield {to: (folder / NAMES[to], convert(fair, folder / NAMES[to], to)) for to in TARGETS}
    shutil.rmtree(folder)


@pytest.mark.parametrize('to', TARGETS)
def test_the_way_there_and_back_to_timm_keeps_every_bit(to, converted, model, tmp_path):
    path, _ = converted[to]
    assert_same_bits(load_checkpoint(path).backbone, model.state_dict())
    convert(path, tmp_path / 'back', 'timm')
    assert_same_bits(load_file(tmp_path / 'back' / 'model.safetensors'), model.state_dict())
    shutil.rmtree(tmp_path / 'back')


@pytest.mark.parametrize('to', TARGETS)
def test_the_text_says_what_was_read_left_out_and_how_the_result_is_used(to, converted, fair):
    path, text = converted[to]
    assert str(fair) in text and 'layout fair' in text and str(path) in text
    assert ('Left out: projector, predictor.' in text) == (to != 'timm')  # timm's folder carries both


def test_the_timm_folder_loads_in_timm(converted, model):
    path, text = converted['timm']
    assert f"timm.create_model('local-dir:{path}', pretrained=True)" in text
    loaded = timm.create_model(f'local-dir:{path}', pretrained=True)
    assert_same_bits(loaded.state_dict(), model.state_dict())
    assert (path / 'heads.safetensors').exists()


def test_torchvision_loads_the_backbone_strictly_and_gives_timms_features(converted, model, one_thread):
    path, text = converted['torchvision']
    assert 'torch.nn.Identity()' in text and 'same features as the timm model' in text
    theirs = torchvision.models.resnet50()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(torch.load(path, weights_only=True), strict=True)
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        assert torch.equal(theirs.eval()(x), model(x))


def test_a_classifier_goes_to_torchvision_and_onnx_and_is_left_out_of_detectors(tmp_path, one_thread):
    model = random_resnet50(num_classes=7)
    state = {f'module.{k}': v for k, v in model.state_dict().items()}
    linear = save({'epoch': 90, 'arch': 'resnet50', 'state_dict': state, 'best_acc1': 68.1}, tmp_path / 'best.pth.tar')
    text = convert(linear, tmp_path / 'tv.pth', 'torchvision')
    assert 'resnet50(num_classes=7)' in text and 'Left out' not in text
    theirs = torchvision.models.resnet50(num_classes=7)
    theirs.load_state_dict(torch.load(tmp_path / 'tv.pth', weights_only=True), strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        assert torch.equal(theirs.eval()(x), expected)
    assert 'Left out: classifier.' in convert(linear, tmp_path / 'mmdet.pth', 'mmdet')
    assert not any('fc' in k for k in torch.load(tmp_path / 'mmdet.pth', weights_only=True)['state_dict'])
    runtime = pytest.importorskip('onnxruntime')
    assert 'logits' in convert(linear, tmp_path / 'm.onnx', 'onnx')
    logits, = runtime.InferenceSession(tmp_path / 'm.onnx').run(['logits'], {'images': x.numpy()})
    assert np.abs(logits - expected.numpy()).max() <= 1e-5 * expected.abs().max()
    assert_same_bits(load_checkpoint(tmp_path / 'm.onnx').model_state(), model.state_dict())
    for path in tmp_path.iterdir():
        path.unlink()


def test_detectron2s_pickle_holds_numpy_and_builtins_under_its_names(converted, model):
    path, text = converted['detectron2']
    with open(path, 'rb') as f:
        names = {arg for code, arg, _ in pickletools.genops(f) if code.name in ('GLOBAL', 'STACK_GLOBAL')}
    # numpy.core, not numpy._core: numpy before 1.26 reads it too
    assert names == {'numpy.core.multiarray _reconstruct', 'numpy ndarray', 'numpy dtype'}
    contents = pickle.loads(path.read_bytes())
    state = contents.pop('model')
    assert contents == {'__author__': 'SimSiam', 'matching_heuristics': True}
    assert len(state) == 318 and all(type(v) is np.ndarray for v in state.values())
    pairs = {
        'stem.conv1.weight': 'conv1.weight', 'stem.conv1.norm.running_mean': 'bn1.running_mean',
        'res2.0.shortcut.weight': 'layer1.0.downsample.0.weight',
        'res4.0.shortcut.norm.bias': 'layer3.0.downsample.1.bias',
        'res5.2.conv3.norm.num_batches_tracked': 'layer4.2.bn3.num_batches_tracked',
    }
    for theirs, ours in pairs.items():
        assert torch.equal(torch.from_numpy(state[theirs]), model.state_dict()[ours])
    assert {k.split('.')[0] for k in state} == {'stem', 'res2', 'res3', 'res4', 'res5'}
    assert 'INPUT.FORMAT: "RGB"' in text  # detectron2's default is BGR


def test_mmdets_file_has_plain_names_in_state_dict(converted, model):
    path, text = converted['mmdet']
    contents = torch.load(path, weights_only=True)
    assert contents.keys() == {'meta', 'state_dict'} and contents['meta'] == {}
    assert_same_bits(contents['state_dict'], model.state_dict())
    assert f"init_cfg=dict(type='Pretrained', checkpoint='{path}')" in text


def test_onnx_agrees_with_torch_at_any_batch_and_image_size(converted, model):
    runtime = pytest.importorskip('onnxruntime')
    session = runtime.InferenceSession(converted['onnx'][0])
    for shape in [(1, 3, 64, 64), (3, 3, 64, 64), (1, 3, 96, 75), (3, 3, 96, 75)]:
        x = torch.randn(shape)
        with torch.inference_mode():
            expected = model(x).numpy()
        features, = session.run(['features'], {'images': x.numpy()})
        assert features.shape == expected.shape and features.std() > 0.1
        assert np.abs(features - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_onnx_model_is_valid_and_one_file(converted):
    onnx = pytest.importorskip('onnx')
    path, _ = converted['onnx']
    onnx.checker.check_model(path, full_check=True)
    assert [p.name for p in path.parent.iterdir() if 'onnx' in p.name] == [path.name]


def test_without_the_onnx_package_the_error_names_it_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnx', None)
    source = save(flat_resnet50(), tmp_path / 'a.pth')
    with pytest.raises(RuntimeError, match='an ONNX file needs onnx: pip install onnx'):
        convert(source, tmp_path / 'a.onnx', 'onnx')
    assert [p.name for p in tmp_path.iterdir()] == ['a.pth']


def test_a_file_that_is_not_onnx_is_refused_in_one_sentence(tmp_path):
    pytest.importorskip('onnx')
    (tmp_path / 'page.onnx').write_text('<html>not found</html>')
    (tmp_path / 'empty.onnx').write_bytes(b'')
    for name in ('page.onnx', 'empty.onnx'):
        with pytest.raises(ValueError, match=f'{name} is not'):
            read_onnx(tmp_path / name)
    with pytest.raises(FileNotFoundError, match='none.onnx'):
        read_onnx(tmp_path / 'none.onnx')


@pytest.mark.parametrize('error', [OSError(errno.EIO, 'Input/output error'), MemoryError()])
def test_an_onnx_file_that_the_machine_cannot_read_is_not_called_damaged(tmp_path, monkeypatch, error):
    onnx = pytest.importorskip('onnx')
    (tmp_path / 'x.onnx').write_bytes(b'')

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(onnx, 'load', fail)
    with pytest.raises(type(error)):
        read_onnx(tmp_path / 'x.onnx')


def test_half_precision_is_widened_and_said(tmp_path):
    text = convert(save(flat_resnet50(torch.float16), tmp_path / 'half.pth'), tmp_path / 'out.pth', 'torchvision')
    assert 'float16' in text and 'float32' in text
    state = torch.load(tmp_path / 'out.pth', weights_only=True)
    assert {v.dtype for v in state.values()} == {torch.float32, torch.int64}
    (tmp_path / 'out.pth').unlink()


@pytest.mark.parametrize('change, words', [
    (lambda s: [s.pop(k) for k in list(s) if k.startswith('layer4.2.')], '18 missing (layer4.2.conv1.weight, '),
    (lambda s: s.update({'layer3.6.conv1.weight': torch.ones(1)}), '1 unknown (layer3.6.conv1.weight)'),
    (lambda s: s.update({'conv1.weight': torch.ones(64, 3, 3, 3)}),
     '1 of another shape (conv1.weight (64, 3, 3, 3) instead of (64, 3, 7, 7))'),
])
def test_a_backbone_that_is_not_a_whole_resnet50_is_refused_by_name(change, words, tmp_path):
    state = flat_resnet50()
    change(state)
    with pytest.raises(ValueError, match='is not a ResNet-50') as error:
        convert(save(state, tmp_path / 'a.pth'), tmp_path / 'b.pth', 'torchvision')
    assert words in str(error.value) and not (tmp_path / 'b.pth').exists()


def test_an_existing_result_is_never_overwritten(tmp_path):
    source = save(flat_resnet50(), tmp_path / 'a.pth')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'notes.txt').write_text('mine')
    (tmp_path / 'bare').mkdir()
    for out, to in [('a.pth', 'torchvision'), ('full', 'timm'), ('a.pth', 'timm'), ('bare', 'mmdet')]:
        with pytest.raises(ValueError, match='already exists'):
            convert(source, tmp_path / out, to)
    assert (tmp_path / 'full' / 'notes.txt').read_text() == 'mine'


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(checkpoint, file):
        file.write(b'half of it')
        raise OSError(errno.ENOSPC, 'disk full')

    monkeypatch.setitem(module.WRITERS, 'mmdet', fail)
    with pytest.raises(OSError, match='disk full'):
        convert(save(flat_resnet50(), tmp_path / 'a.pth'), tmp_path / 'b.pth', 'mmdet')
    assert [p.name for p in tmp_path.iterdir()] == ['a.pth']


def test_wrong_targets_sources_and_suffixes_are_named(tmp_path):
    source = save(flat_resnet50(), tmp_path / 'a.pth')
    with pytest.raises(ValueError, match="'keras' is not a target.*timm, torchvision, detectron2, mmdet, onnx"):
        convert(source, tmp_path / 'b', 'keras')
    with pytest.raises(FileNotFoundError, match='none.pth does not exist'):
        convert(tmp_path / 'none.pth', tmp_path / 'b', 'timm')
    for to, suffix in [('detectron2', '.pkl'), ('onnx', '.onnx')]:
        with pytest.raises(ValueError, match=f'does not end in {suffix}'):
            convert(source, tmp_path / 'b.pth', to)

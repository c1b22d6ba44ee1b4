"""Files beside weights describe a network and nothing else: none of them runs code, names a path or an address."""
import json
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from simsiam_models import create_simsiam, load_checkpoint
from simsiam_models.benchmarks.backbone import load_backbone, weights_digest
from simsiam_models.runtime import checkpoint as checkpoints
from simsiam_models.weights import tensorfile
from simsiam_models.weights.export import export_backbone
from simsiam_models.weights.folders import create_from_folder, read_config
from simsiam_models.weights.publish import publish

ARGS = {'layers': [1, 1, 1, 1], 'channels': [8, 8, 8, 8]}


class Evil:
    """Creates the canary where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that hostile files would create. Any attempt to reach the network creates it too."""
    path = tmp_path / 'canary'

    def refuse(*args: Any, **kwargs: Any) -> None:
        path.mkdir(exist_ok=True)
        raise OSError('the test allows no network')

    for name in ('create_connection', 'getaddrinfo'):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    return path


@pytest.fixture(scope='module')
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return create_simsiam('resnet18', dim=16, pred_dim=4, **ARGS).eval()


@pytest.fixture
def folder(tmp_path: Path, model: torch.nn.Module) -> Path:
    """An exported folder with heads."""
    path = tmp_path / 'export'
    export_backbone(model.backbone, path, 'resnet18', ARGS)
    tensorfile.write(path / 'heads.safetensors', {
        k: v for k, v in model.state_dict().items() if not k.startswith('backbone.')})
    return path


def write_evil(path: Path, canary: Path) -> str:
    torch.save({'state_dict': {'x': torch.ones(1)}, 'run': Evil(canary)}, path)
    return str(path)


def test_the_canary_sings(tmp_path: Path, canary: Path) -> None:
    """Otherwise the tests below would prove nothing."""
    write_evil(tmp_path / 'evil.bin', canary)
    torch.load(tmp_path / 'evil.bin', weights_only=False)
    assert canary.exists()


def test_timm_is_new_enough_to_unpickle_nothing(tmp_path: Path, canary: Path) -> None:
    evil = write_evil(tmp_path / 'evil.bin', canary)
    with pytest.raises(RuntimeError):
        timm.models.load_checkpoint(timm.create_model('resnet18'), evil)
    with pytest.raises(RuntimeError):
        timm.models.load_state_dict(evil)
    assert not canary.exists()


BESIDE: dict[str, Callable[[str], Any]] = {
    'checkpoint_path': lambda evil: {'model': 'resnet18', 'model_args': {**ARGS, 'checkpoint_path': evil}},
    'a relative path': lambda evil: {'model': 'resnet18', 'model_args': {**ARGS, 'checkpoint_path': 'evil.bin'}},
    'a local folder': lambda evil: {'model': f'local-dir:{Path(evil).parent}', 'model_args': ARGS},
    'the Hub': lambda evil: {'model': 'hf-hub:nobody/nothing', 'model_args': ARGS},
    'the Hub, in the old way': lambda evil: {'model': 'hf_hub:nobody/nothing', 'model_args': ARGS},
    'a path': lambda evil: {'model': '../evil/resnet18', 'model_args': ARGS},
    'pretrained': lambda evil: {'model': 'resnet18', 'model_args': {**ARGS, 'pretrained': True}},
    'pretrained_cfg': lambda evil: {'model': 'resnet18', 'model_args': {**ARGS, 'pretrained_cfg': {'file': evil}}},
    'overlay': lambda evil: {'model': 'resnet18', 'model_args': {**ARGS, 'pretrained_cfg_overlay': {'file': evil}}},
    'cache_dir': lambda evil: {'model': 'resnet18', 'model_args': {**ARGS, 'cache_dir': 'elsewhere'}},
    'url': lambda evil: {'model': 'resnet18', 'model_args': {**ARGS, 'url': 'x'}},
    'an address': lambda evil: {'model': 'resnet18', 'model_args': {**ARGS, 'stem_type': 'http://127.0.0.1/x'}},
    'a deep address': lambda evil: {'model': 'resnet18', 'model_args': {**ARGS, 'block_args': {'a': ['/etc/x']}}},
    'a function': lambda evil: {'model': 'resnet18', 'model_args': {**ARGS, 'pretrained_filter_fn': 'os.system'}},
    'other classes': lambda evil: {'model': 'resnet18', 'model_args': {**ARGS, 'features_only': True}},
    'an unknown argument': lambda evil: {'model': 'resnet18', 'model_args': {**ARGS, 'nonsense': 1}},
    'no object': lambda evil: {'model': 'resnet18', 'model_args': [1]},
    'another trainer': lambda evil: {'model': 'my_own_net', 'lr': 0.1}, 'a number': lambda evil: {'model': 5},
    'a list': lambda evil: [1, 2],
    'too many layers': lambda evil: {'model': 'resnet18', 'model_args': {**ARGS, 'layers': [10**7, 1, 1, 1]}},
    'too wide': lambda evil: {'model': 'resnet18', 'model_args': {**ARGS, 'channels': [8, 8, 8, 65000]}},
    'no number': lambda evil: {'model': 'resnet18', 'model_args': {**ARGS, 'drop_rate': float('inf')}},
    'no heads to divide by': lambda evil: {'model': 'vit_tiny_patch16_224', 'model_args': {'num_heads': 0}},
    'a size without sides': lambda evil: {'model': 'vit_tiny_patch16_224', 'model_args': {'img_size': []}},
}


@pytest.mark.parametrize('what', BESIDE)
def test_what_args_json_may_not_say_is_named_and_not_used(
        what: str, tmp_path: Path, canary: Path, caplog: pytest.LogCaptureFixture) -> None:
    evil = write_evil(tmp_path / 'evil.bin', canary)
    model = timm.create_model('resnet18', num_classes=0)
    torch.save(model.state_dict(), tmp_path / 'harmless.pth')
    (tmp_path / 'args.json').write_text(json.dumps(BESIDE[what](evil)))
    backbone = load_backbone(str(tmp_path / 'harmless.pth'))
    assert backbone.digest == weights_digest(model) and not canary.exists()
    assert 'args.json' in caplog.text and 'not used' in caplog.text and '\n' not in caplog.messages[0]


@pytest.mark.parametrize('text', ['{', '[' * 100_000, '\x00', 'null', ' ' * (1 << 24) + '{}'])
def test_a_file_that_is_no_json_beside_a_checkpoint_is_named_and_not_used(
        text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(timm.create_model('resnet18', num_classes=0).state_dict(), tmp_path / 'x.pth')
    for name in ('args.json', 'config.json'):
        (tmp_path / name).write_text(text)
        load_backbone(str(tmp_path / 'x.pth'))
        assert name in caplog.text
        (tmp_path / name).unlink()


@pytest.mark.parametrize('name', ['args.json', 'config.json', 'heads.safetensors', 'fingerprint.json'])
def test_a_fifo_beside_a_checkpoint_does_not_hang(name: str, tmp_path: Path) -> None:
    model = timm.create_model('resnet18', num_classes=0)
    torch.save(model.state_dict(), tmp_path / 'x.pth')
    os.mkfifo(tmp_path / name)
    assert load_backbone(str(tmp_path / 'x.pth')).digest == weights_digest(model)


def test_a_fifo_in_the_place_of_a_file_is_refused_in_one_sentence(folder: Path) -> None:
    for name in ('heads.safetensors', 'config.json', 'model.safetensors'):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        calls = [
            lambda: load_checkpoint(folder), lambda name=name: load_checkpoint(folder / name),
            lambda: create_simsiam(f'local-dir:{folder}', pretrained=True, dim=16, pred_dim=4)]
        if name != 'heads.safetensors':
            calls += [lambda: load_backbone(str(folder)), lambda: load_backbone(f'local-dir:{folder}')]
        for call in calls[name == 'config.json':]:
            with pytest.raises((ValueError, FileNotFoundError), match='FIFO|no config.json|neither'):
                call()


SOURCES = {
    'url': 'http://127.0.0.1:9/x.pth', 'file': 'evil.bin', 'hf_hub_id': 'nobody/nothing', 'hf_hub_filename': 'evil.bin',
    'source': 'hf-hub', 'custom_load': 'hf', 'state_dict': {'x': 1}}


@pytest.mark.parametrize('given', [*SOURCES, 'all'])
def test_sources_of_weights_in_config_json_are_passed_over(
        given: str, folder: Path, model: torch.nn.Module, tmp_path: Path, canary: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_evil(tmp_path / 'evil.bin', canary)
    config = json.loads((folder / 'config.json').read_text())
    config['pretrained_cfg'] |= SOURCES if given == 'all' else {given: SOURCES[given]}
    (folder / 'config.json').write_text(json.dumps(config))
    assert load_backbone(str(folder)).digest == weights_digest(model.backbone)
    again = create_simsiam(f'local-dir:{folder}', pretrained=True, dim=16, pred_dim=4)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    publish(folder, 'mine', tmp_path / 'out', 'mit')
    assert not SOURCES.keys() & json.loads((tmp_path / 'out' / 'config.json').read_text())['pretrained_cfg'].keys()
    assert not canary.exists()


HOSTILE = {
    'architecture of the Hub': {'architecture': 'hf-hub:nobody/nothing'},
    'architecture in a folder': {'architecture': 'local-dir:.'}, 'a path': {'architecture': '../resnet18'},
    'no architecture': {'architecture': None}, 'unknown': {'architecture': 'evil_net'},
    'checkpoint_path': {'model_args': {**ARGS, 'checkpoint_path': 'evil.bin'}},
    'pretrained': {'model_args': {**ARGS, 'pretrained': True}},
    'pretrained_cfg': {'model_args': {**ARGS, 'pretrained_cfg': {'file': 'x'}}},
    'a path within': {'model_args': {**ARGS, 'act_layer': '/evil.bin'}}, 'arguments in a list': {'model_args': [1]},
    'a huge layer': {'model_args': {**ARGS, 'layers': [10**30, 1, 1, 1]}},
    'many layers': {'model_args': {'layers': [60_000, 1, 1, 1], 'channels': [64, 8, 8, 8]}},
    'many classes': {'num_classes': 10**9},
    'wide': {'model_args': {**ARGS, 'channels': [8, 8, 8, 60_000]}},
    'classes': {'num_classes': 'x'}, 'negative classes': {'num_classes': -1}, 'no cfg': {'pretrained_cfg': 'x'},
}


@pytest.mark.parametrize('what', HOSTILE)
def test_a_config_json_that_names_more_than_a_network_is_refused_by_every_reader(
        what: str, folder: Path, tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    write_evil(folder / 'evil.bin', canary)
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, **HOSTILE[what]}))
    for call in (
            lambda: load_backbone(str(folder)), lambda: load_backbone(f'local-dir:{folder}'),
            lambda: create_simsiam(f'local-dir:{folder}', pretrained=True, dim=16, pred_dim=4),
            lambda: create_simsiam(f'local-dir:{folder}'), lambda: publish(folder, 'mine', tmp_path / 'out', 'mit')):
        with pytest.raises(ValueError) as e:
            call()
        assert 'config.json' in str(e.value) and '\n' not in str(e.value)
    assert not canary.exists()


@pytest.mark.parametrize('name', [
    'pytorch_model.bin', 'model.pth', 'pytorch_model.pth', 'x.safetensors', 'checkpoint.ckpt', None])
def test_an_exported_folder_needs_model_safetensors(
        name: str | None, folder: Path, tmp_path: Path, canary: Path) -> None:
    (folder / 'model.safetensors').unlink()
    if name:
        write_evil(folder / name, canary)
    for call in (
            lambda: load_backbone(str(folder)), lambda: load_backbone(f'local-dir:{folder}'),
            lambda: create_simsiam(f'local-dir:{folder}', pretrained=True, dim=16, pred_dim=4),
            lambda: load_checkpoint(folder), lambda: publish(folder, 'mine', tmp_path / 'out', 'mit'),
            lambda: publish(folder, 'mm_ep200_in1k', tmp_path / 'out')):
        with pytest.raises(FileNotFoundError, match='no model.safetensors') as e:
            call()
        assert name is None or name in str(e.value)
    assert not canary.exists()


@pytest.mark.parametrize('name', ['model.safetensors', 'heads.safetensors'])
@pytest.mark.parametrize('kind', ['torch', 'pickle', 'lfs', 'text'])
def test_what_is_called_safetensors_in_a_folder_must_be_it(
        name: str, kind: str, folder: Path, tmp_path: Path, canary: Path) -> None:
    (folder / name).write_bytes({
        'lfs': b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'text': b'hello'}.get(
            kind, pickle.dumps(Evil(canary))))
    if kind == 'torch':
        write_evil(folder / name, canary)
    calls = [
        lambda: create_simsiam(f'local-dir:{folder}', pretrained=True, dim=16, pred_dim=4),
        lambda: load_checkpoint(folder), lambda: publish(folder, 'mine', tmp_path / 'out', 'mit')]
    if name == 'model.safetensors':
        calls += [lambda: load_backbone(str(folder)), lambda: load_backbone(f'local-dir:{folder}')]
    says = {'torch': 'a torch file', 'pickle': 'a torch file', 'lfs': 'a Git LFS pointer', 'text': 'a text file'}[kind]
    for call in calls:
        with pytest.raises(ValueError, match=f'{name} is not a safetensors file but {says}'):
            call()
    assert not canary.exists()


@pytest.mark.parametrize('names, words', [
    (['model.safetensors.index.json', 'model-00001-of-00002.safetensors'], 'several shards'),
    (['pytorch_model.bin.index.json'], 'several shards'), (['pytorch_model-00002-of-00003.bin'], 'several shards'),
    (['.metadata', '__0_0.distcp'], 'torch.distributed.checkpoint'), (['readme.txt'], 'no model.safetensors')])
def test_a_folder_in_shards_is_named_with_the_way_on(names: list[str], words: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b'x')
    with pytest.raises((ValueError, FileNotFoundError), match=words) as e:
        load_checkpoint(tmp_path)
    assert '\n' not in str(e.value)


def test_one_shard_is_no_checkpoint(tmp_path: Path) -> None:
    x = {'conv1.weight': torch.ones(1)}
    for name in ('model-00001-of-00002.safetensors', 'pytorch_model-00001-of-00012.bin'):
        save_file(x, tmp_path / name)
        with pytest.raises(ValueError, match='one of several shards'):
            load_checkpoint(tmp_path / name)
    save_file(x, tmp_path / 'model-00001-of-00001.safetensors')
    with pytest.raises(ValueError, match='no known checkpoint layout'):
        load_checkpoint(tmp_path / 'model-00001-of-00001.safetensors')


def test_other_files_that_hold_pickles_run_nothing(tmp_path: Path, canary: Path) -> None:
    objects = np.array([Evil(canary)], dtype=object)
    np.save(tmp_path / 'x.npy', objects, allow_pickle=True)
    np.savez(tmp_path / 'x.npz', x=objects)
    write_evil(tmp_path / 'x.pth', canary)
    for name in ('x.npy', 'x.npz', 'x.pth'):
        with pytest.raises(ValueError):
            load_checkpoint(tmp_path / name)
        with pytest.raises((ValueError, RuntimeError)):
            timm.create_model('simsiam_resnet50', pretrained=True, pretrained_cfg_overlay=dict(
                file=str(tmp_path / name), custom_load=True))
    with pytest.raises(ValueError, match='not a checkpoint of this program'):
        checkpoints.read(tmp_path / 'x.pth', {'model'})
    assert not canary.exists()


def test_every_plain_argument_of_a_network_passes(tmp_path: Path) -> None:
    for name, args in {
        'vit_tiny_patch16_224': {
            'img_size': 64, 'depth': 1, 'class_token': False, 'global_pool': 'avg', 'init_values': 1e-5},
        'resnet18': {**ARGS, 'stem_type': 'deep_tiered', 'stem_width': 8, 'act_layer': 'silu', 'drop_path_rate': 0.1},
        'swin_tiny_patch4_window7_224': {'depths': [1, 1, 1, 1], 'embed_dim': 12, 'num_heads': [1, 1, 1, 1]},
    }.items():
        torch.manual_seed(1)
        model = timm.create_model(name, num_classes=0, **args)
        export_backbone(model, tmp_path / name, name, args, size=args.get('img_size', 224))
        network = read_config(tmp_path / name)
        assert network.name == name and network.args.items() >= args.items()
        assert weights_digest(create_from_folder(tmp_path / name)) == weights_digest(model)
        backbone = load_backbone(str(tmp_path / name))
        assert backbone.architecture == name and backbone.args == network.args


def test_a_folder_with_another_number_of_classes_loads_whole(tmp_path: Path) -> None:
    model = timm.create_model('resnet18', num_classes=5, **ARGS)
    export_backbone(model, tmp_path, 'resnet18', ARGS)
    config = json.loads((tmp_path / 'config.json').read_text())
    config['num_classes'] = 5
    (tmp_path / 'config.json').write_text(json.dumps(config))
    for classes, width in ((None, 5), (5, 5), (0, 64), (3, 3)):
        again = create_from_folder(tmp_path, **({} if classes is None else {'num_classes': classes}))
        assert torch.equal(again.layer4[0].conv1.weight, model.layer4[0].conv1.weight)
        assert again.num_classes == (5 if classes is None else classes)
        assert width != 5 or torch.equal(again.fc.weight, model.fc.weight)
    state = {k: v for k, v in model.state_dict().items() if k != 'layer3.0.bn1.running_var'}
    save_file(state, tmp_path / 'model.safetensors')
    for classes in (0, 3, 5):
        with pytest.raises(RuntimeError, match=r'layer3\.0\.bn1\.running_var'):
            create_from_folder(tmp_path, num_classes=classes)


def test_a_number_of_classes_is_no_argument_of_a_backbone(tmp_path: Path) -> None:
    model = timm.create_model('resnet18', num_classes=0, **ARGS)
    export_backbone(model, tmp_path / 'backbone', 'resnet18', {**ARGS, 'num_classes': 7})
    torch.save(model.state_dict(), tmp_path / 'x.pth')
    (tmp_path / 'args.json').write_text(json.dumps({'model': 'resnet18', 'model_args': {**ARGS, 'num_classes': 7}}))
    for name in ('backbone', 'x.pth'):
        assert 'num_classes' not in load_backbone(str(tmp_path / name)).args


@pytest.mark.parametrize('name', ['model.safetensors', 'heads.safetensors'])
def test_whole_numbers_in_a_folder_are_no_weights(name: str, folder: Path) -> None:
    state = {k: v.to(torch.int8) for k, v in load_file(folder / name).items()}
    save_file(state, folder / name)
    with pytest.raises(ValueError, match='export.* is torch.int8: save the weights'):
        create_simsiam(f'local-dir:{folder}', pretrained=True, dim=16, pred_dim=4)
    if name == 'model.safetensors':
        with pytest.raises(ValueError, match='export.* is torch.int8: save the weights'):
            load_backbone(str(folder))

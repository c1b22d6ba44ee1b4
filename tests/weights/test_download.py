"""Published weights over the network: a loopback Hub and file server, and the real huggingface_hub client.

Whatever the network does, the result is the right weights bit for bit, or one RuntimeError that names each source and
its reason. Remains of a failure never break the next start. The Hub and the URL serve different weights, so that a test
sees which of the two it got. The models are ResNet-50s reduced to 1 MB.
"""
import contextlib
import errno
import functools
import io
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.file_download
import huggingface_hub.utils
import loopback as fake
import pytest
import safetensors.torch
import timm
import torch
from conftest import ROOT
from huggingface_hub import constants

import simsiam_models
from simsiam_models import SimSiam, resnet
from simsiam_models.benchmarks.backbone import load_backbone
from simsiam_models.weights import identity, sources, tensorfile
from simsiam_models.weights.export import export_backbone
from simsiam_models.weights.published import WEIGHTS, Weights
from simsiam_models.weights.verify import verify

TAG, NAME = 'mm_ep200_in1k', 'simsiam_resnet50.mm_ep200_in1k'
REPO = f'loopback/{NAME}'
TINY = {'layers': (1, 1, 1, 1), 'channels': (16, 32, 64, 64)}
State = dict[str, torch.Tensor]
EXPECT_BACKBONE = identity.expect_backbone  # of full size


# ---- what the servers serve ----

@functools.cache
def simsiam(seed: int) -> SimSiam:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = simsiam_models.create_simsiam(dim=64, pred_dim=16, **TINY)
        for x in model.buffers():
            x.copy_(torch.rand(x.shape) + 0.5) if x.is_floating_point() else x.fill_(7)
    return model


def backbone(seed: int) -> State:
    return simsiam(seed).backbone.state_dict()


def heads(seed: int) -> State:
    return {k: v for k, v in simsiam(seed).state_dict().items() if not k.startswith('backbone.')}


def saved(contents: dict) -> bytes:
    torch.save(contents, file := io.BytesIO())
    return file.getvalue()


@functools.cache
def openmmlab(seed: int) -> bytes:
    """MMSelfSup 0.x, which stores backbone and neck twice."""
    names = {'0': 'fc0', '1': 'bn0', '3': 'fc1', '4': 'bn1', '6': 'fc2', '7': 'bn2'}
    parts = [('backbone.', 'encoder.0.', simsiam(seed).backbone), ('neck.', 'encoder.1.', simsiam(seed).projector),
             ('head.predictor.', None, simsiam(seed).predictor)]
    state = {}
    for prefix, twin, part in parts:
        for k, v in part.state_dict().items():
            k = k if prefix == 'backbone.' else names[k[0]] + k[1:]
            state |= {prefix + k: v, **({twin + k: v} if twin else {})}
    return saved({'meta': {'mmselfsup_version': '0.7.0'}, 'state_dict': state})


@functools.cache
def fair(seed: int) -> bytes:
    """FAIR's pretraining file, with a frozen bias of 0, so that folding it keeps every bit."""
    names = {'backbone.': 'module.encoder.', 'projector.': 'module.encoder.fc.', 'predictor.': 'module.predictor.'}
    state = {re.sub(r'^\w+\.', lambda m: names[m[0]], k): v for k, v in simsiam(seed).state_dict().items()}
    state['module.encoder.fc.6.bias'] = torch.zeros(64)
    return saved({'epoch': 100, 'arch': 'resnet50', 'state_dict': state, 'optimizer': {'state': {}}})


def fair_linear(seed: int) -> bytes:
    state = {f'module.{k}': v for k, v in classifier(seed).items()}
    return saved({'epoch': 90, 'arch': 'resnet50', 'state_dict': state, 'best_acc1': 68.1, 'optimizer': {}})


def classifier(seed: int) -> State:
    """Backbone and 1000-way classifier."""
    g = torch.Generator().manual_seed(seed)
    return {**backbone(seed), 'fc.weight': torch.rand(1000, 256, generator=g), 'fc.bias': torch.rand(1000, generator=g)}


def expect_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the tiny networks the published ones."""
    monkeypatch.setattr(identity, 'expect_backbone', lambda n: classifier(0) if n else backbone(0))
    monkeypatch.setattr(identity, 'expect_heads', lambda: heads(0))


def safetensors_bytes(state: State) -> bytes:
    return safetensors.torch.save(state, metadata={'format': 'pt'})


# ---- the servers, and a machine that has never seen the Hub ----

class Net:
    """Seed 0 on the Hub, seed 1 at the URL."""

    def __init__(self, hub: fake.Server, files: fake.Server, cache: Path) -> None:
        self.hub, self.files, self.cache = hub, files, cache
        hub.put(REPO, 'model.safetensors', safetensors_bytes(backbone(0)))
        hub.put(REPO, 'heads.safetensors', safetensors_bytes(heads(0)))
        self.weights = self.upstream(TAG, '/files/simsiam.pth', openmmlab(1))

    def upstream(self, tag: str, path: str, body: bytes, prefix: bool = True) -> Weights:
        self.files.files[path] = body
        return WEIGHTS[tag]._replace(
            url=self.files.url + path, sha256_prefix=fake.sha256(body)[:8] if prefix else None)

    def fetch(self, filename: str = 'model.safetensors') -> Path:
        return sources.fetch(NAME, self.weights, filename, cache_dir=self.cache)

    def source(self) -> str:
        """Fetches the weights, checks every bit, and returns their source."""
        return source_of(self.fetch())

    def requests(self) -> list[str]:
        return self.hub.log + self.files.log

    def forget(self) -> None:
        self.hub.log.clear()
        self.files.log.clear()

    def only(self, source: str) -> None:
        """Leaves one source: the Hub works, or it lacks the file."""
        self.hub.fault = None if source == 'hub' else fake.status(404, 'EntryNotFound')

    def break_hub(self, fault: fake.Fault | str) -> None:
        self.hub.stop() if fault == 'refused' else setattr(self.hub, 'fault', fault)

    def break_url(self, fault: fake.Fault | str) -> None:
        self.files.stop() if fault == 'refused' else setattr(self.files, 'fault', fault)

    def mend(self) -> None:
        for server in (self.hub, self.files):
            server.fault = None
            if server.closing.is_set():
                server.start()


def source_of(path: Path) -> str:
    got = safetensors.torch.load_file(path)
    for seed, source in enumerate(('hub', 'url')):
        if same(got, backbone(seed)):
            return source
    raise AssertionError(f'{path} holds wrong weights: {list(got)[:5]}')


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Net]:
    with fake.Server(hub=True) as hub, fake.Server() as files:
        # The client reads HF_ENDPOINT and the like when it is imported, so they are set where it keeps them.
        monkeypatch.setattr(constants, 'ENDPOINT', hub.url)
        for module in (constants, huggingface_hub.file_download):
            monkeypatch.setattr(
                module, 'HUGGINGFACE_CO_URL_TEMPLATE', hub.url + '/{repo_id}/resolve/{revision}/{filename}', False)
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hf'))
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_IMPLICIT_TOKEN', True)
        # huggingface_hub 2 asks its Hub once a day for a list of agents; every test is the day's first.
        monkeypatch.setattr(constants, 'AGENT_HARNESSES_PATH', str(tmp_path / 'harnesses.json'), False)
        if agents := getattr(huggingface_hub.utils, '_detect_agent', None):
            monkeypatch.setattr(agents, '_registry', None)
        monkeypatch.setenv('SIMSIAM_HUB_NAMESPACE', 'loopback')
        expect_tiny(monkeypatch)
        monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
        monkeypatch.setenv('NO_PROXY', '127.0.0.1')
        for name in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE'):
            monkeypatch.delenv(name, raising=False)
        yield Net(hub, files, tmp_path / 'cache')


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    try:
        yield
    finally:
        assert time.monotonic() - start < seconds


@contextlib.contextmanager
def refusal(net: Net, *reasons: str) -> Iterator[None]:
    """Expects one RuntimeError of readable length that names both sources and these reasons."""
    with pytest.raises(RuntimeError) as e:
        yield
    text = str(e.value)
    assert type(e.value) is RuntimeError
    assert len(text) < 1200 and 'Traceback' not in text and '<html' not in text
    for part in (*map(re.escape, [NAME, REPO, net.weights.url]), *reasons):
        assert re.search(part, text, re.IGNORECASE), f'no {part!r} in: {text}'


# ---- the Hub ----

def test_the_hub_comes_first(net):
    assert net.source() == 'hub'
    assert not net.files.log and len(net.hub.list_requests('GET')) == 1


def test_lfs_redirects_to_another_server_are_followed(net):
    net.hub.fault = fake.redirect(net.files)
    assert net.source() == 'hub'
    assert len(net.files.list_requests('GET')) == 1


def test_a_short_retry_after_is_waited_for(net):
    net.hub.fault = fake.times(1, fake.status(429, retry_after=1))
    assert net.source() == 'hub'


HUB_FAULTS = {  # fault, a word of its reason, most requests for files, most seconds
    'unknown repo (401)': (fake.status(401, 'RepoNotFound', 'Invalid username or password.'), '401|not found', 2, 4),
    'gated (401)': (fake.status(401, 'GatedRepo', 'This model is restricted.'), 'gated|restricted|granted', 2, 4),
    'gated (403)': (fake.status(403, 'GatedRepo', 'This model is restricted.'), 'gated|restricted|granted', 2, 4),
    '401': (fake.status(401), '401', 2, 4),
    '403': (fake.status(403), '403', 2, 4),
    'unknown repo (404)': (fake.status(404, 'RepoNotFound'), '404|not found', 2, 4),
    'no such file': (fake.status(404, 'EntryNotFound'), '404|not found', 2, 4),
    'disabled (451)': (fake.status(451), '451', 2, 4),
    '429, come back in 5 minutes': (fake.status(429, retry_after=300), '429', 2, 4),
    '500': (fake.status(500), '500', 3, 4),
    '403 on the file': (fake.on('GET', fake.status(403)), '403', 4, 4),
    'refused': ('refused', 'connect|refused', 0, 4),
    'silent': (fake.silent, 'time|answer|second', 1, 4),
    'dripping': (fake.dripping, 'time|answer|second|invalid', 1, 4),
    'cut body': (fake.cut, '.', 8, 9),  # the client itself tries 6 times, with 1 s between
    'short body': (fake.short, 'size', 3, 4),
    'flipped byte': (fake.flipped, 'sha256|hash', 3, 4),
    'captive portal': (fake.html, 'commit|etag|page|firewall and proxy', 2, 4),
    'page for file': (fake.on('GET', fake.html), 'size|page', 3, 4),
    'no ETag': (fake.no_etag, 'etag', 2, 4),
}


@pytest.mark.parametrize('case', HUB_FAULTS)
def test_a_broken_hub_costs_little_and_the_url_serves(net, case):
    fault, _, requests, seconds = HUB_FAULTS[case]
    net.break_hub(fault)
    with at_most(seconds):
        assert net.source() == 'url'
    assert len(net.hub.list_requests('HEAD') + net.hub.list_requests('GET')) <= requests
    net.mend()
    net.forget()
    assert net.source() == 'url' and not net.requests()  # and what is in the cache stays


@pytest.mark.parametrize('case', [case for case in HUB_FAULTS if case != 'cut body'])  # 5 s once is enough
def test_with_the_url_broken_too_the_error_names_both_and_the_next_start_is_well(net, case):
    fault, reason, _, seconds = HUB_FAULTS[case]
    net.break_hub(fault)
    net.files.fault = fake.status(404)
    with at_most(seconds), refusal(net, reason, '404'):
        net.source()
    net.mend()
    assert net.source() == 'hub'


# ---- the URL ----

URL_FAULTS = {
    '403': (fake.status(403), '403'),
    '404': (fake.status(404), '404'),
    '429, come back in 5 minutes': (fake.status(429, retry_after=300), '429'),
    '500': (fake.status(500), '500'),
    'refused': ('refused', 'connect|refused'),
    'silent': (fake.silent, 'time|answer|second'),
    'cut body': (fake.cut, 'cut|broke'),
    'stuck body': (fake.stuck, 'cut|broke|time'),
    'short body': (fake.short, 'sha256|hash|size|byte'),
    'flipped byte': (fake.flipped, 'sha256|hash'),
    'page for file': (fake.html, 'sha256|hash|page|html|checkpoint'),
}


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Records the pauses between tries instead of making them, and sets a short timeout."""
    made = []
    monkeypatch.setattr(sources, 'time', types.SimpleNamespace(sleep=made.append))
    monkeypatch.setattr(sources, 'URL_TIMEOUT', 0.5)
    return made


@pytest.mark.parametrize('case', URL_FAULTS)
def test_a_broken_url_is_named_and_the_next_start_is_well(net, pauses, case):
    fault, reason = URL_FAULTS[case]
    net.only('url')
    net.break_url(fault)
    with at_most(5), refusal(net, '404|not found', reason):
        net.source()
    assert len(net.files.log) <= 4 and sum(pauses) <= 10
    net.mend()
    net.only('url')
    assert net.source() == 'url'


@pytest.mark.parametrize(
    'fault', [fake.html, fake.cut_unsized, fake.short, fake.flipped], ids=lambda fault: fault.__name__)
def test_what_is_no_whole_checkpoint_is_refused_where_no_hash_is_known(net, pauses, fault):
    net.weights = net.upstream('fb_bs512_ep100_in1k', '/a/checkpoint_0099.pth.tar', fair(1), prefix=False)
    net.only('url')
    net.files.fault = fault
    with refusal(net, 'page|checkpoint|cut'):
        net.source()
    net.files.fault = None
    assert net.source() == 'url'


TROUBLES = {
    'cut twice': fake.stutter, '503 once': fake.times(1, fake.status(503)), 'cut once': fake.times(1, fake.cut),
    '429 once': fake.times(1, fake.status(429, retry_after=1))}


@pytest.mark.parametrize('case', TROUBLES)
def test_a_passing_trouble_of_the_url_is_outlasted(net, pauses, case):
    net.only('url')
    net.files.fault = TROUBLES[case]
    assert net.source() == 'url'
    assert sum(pauses) <= 2


def test_a_cut_download_goes_on_where_it_stopped(net, pauses):
    net.only('url')
    net.files.fault = fake.stutter
    assert net.source() == 'url'
    starts = [int(m[1]) for m in (re.search(r'bytes=(\d+)-', line) for line in net.files.log) if m]
    assert len(starts) == 2 and 0 < starts[0] < starts[1]


def test_without_a_name_for_the_contents_a_cut_download_starts_over(net, pauses):
    net.only('url')
    net.files.fault = lambda handler, body: handler.send(body, etag='', upto=1000 if len(net.files.log) == 1 else None)
    assert net.source() == 'url'
    assert not any('bytes=' in line for line in net.files.log)


def test_a_server_without_range_is_asked_again_from_the_start(net, pauses):
    def cut_once_then_whole(handler, body):
        del handler.headers['Range']
        handler.send(body, upto=1000 if len(net.files.log) == 1 else None)

    net.only('url')
    net.files.fault = cut_once_then_whole
    assert net.source() == 'url'


def test_halves_of_two_files_are_never_joined(net, pauses):
    """During the download another file of the same size replaces it, and its hash is unknown."""
    net.weights = net.upstream('fb_bs512_ep100_in1k', '/a/checkpoint_0099.pth.tar', fair(1), prefix=False)
    net.only('url')
    net.files.fault = lambda handler, body: (
        fake.cut(handler, body) if len(net.files.log) == 1 else handler.send(fair(0)))
    with contextlib.suppress(RuntimeError):  # a refusal is fine, and so is the new file
        assert net.source() == 'hub'  # its seed, 0
    net.files.fault = lambda handler, body: handler.send(fair(0))
    assert net.source() == 'hub'


def test_the_raw_download_does_not_stay(net):
    net.only('url')
    net.source()
    left = [p for p in net.cache.rglob('*') if p.is_file() and p.suffix != '.lock' and p.stat().st_size > 1000]
    assert left and all(p.name.endswith('.safetensors') for p in left)


def test_files_of_one_name_never_mix(net):
    """Two of FAIR's files are called checkpoint_0099.pth.tar, two model_best.pth.tar."""
    net.only('url')
    paths = []
    for seed, tag in enumerate(['fb_bs512_ep100_in1k', 'fb_bs256_ep100_in1k']):
        weights = net.upstream(tag, f'/{tag}/pretrain/checkpoint_0099.pth.tar', fair(seed), prefix=False)
        paths.append(sources.fetch(f'simsiam_resnet50.{tag}', weights, cache_dir=net.cache))
    assert [source_of(path) for path in paths] == ['hub', 'url']  # seeds 0 and 1
    for seed, tag in enumerate(['fb_bs512_ep100_lin_in1k', 'fb_bs256_ep100_lin_in1k']):
        weights = net.upstream(tag, f'/{tag}/linear/model_best.pth.tar', fair_linear(seed), prefix=False)
        path = sources.fetch(f'simsiam_resnet50.{tag}', weights, cache_dir=net.cache)
        assert same(safetensors.torch.load_file(path), classifier(seed))


@pytest.mark.parametrize('source', ['hub', 'url'])
def test_heads_come_from_the_same_source(net, source):
    net.only(source)
    assert same(safetensors.torch.load_file(net.fetch('heads.safetensors')), heads(['hub', 'url'].index(source)))
    assert net.source() == source
    assert len(net.files.log) == (source == 'url')  # one download gives both files


# ---- caches ----

@pytest.mark.parametrize('source', ['hub', 'url'])
@pytest.mark.parametrize('network', ['well', 'offline', 'broken', 'gone'])
def test_a_warm_cache_makes_no_request(net, monkeypatch, source, network):
    net.only(source)
    for filename in ('model.safetensors', 'heads.safetensors'):
        net.fetch(filename)
    net.forget()
    if network == 'offline':
        go_offline(monkeypatch)
    elif network == 'gone':
        net.hub.stop(), net.files.stop()
    else:
        net.hub.fault = net.files.fault = None if network == 'well' else fake.status(500)
    with at_most(2):
        assert net.source() == source
        assert same(safetensors.torch.load_file(net.fetch('heads.safetensors')), heads(['hub', 'url'].index(source)))
    assert not net.requests()


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')


def test_offline_without_cache_is_an_error_without_request(net, monkeypatch):
    go_offline(monkeypatch)
    with at_most(2), pytest.raises(RuntimeError, match=f'{re.escape(NAME)}.*HF_HUB_OFFLINE'):
        net.source()
    assert not net.requests()


@pytest.mark.parametrize('source', ['hub', 'url'])
@pytest.mark.parametrize('damage', ['flipped', 'cut', 'empty'])
def test_a_damaged_file_in_the_cache_is_fetched_again(net, source, damage):
    net.only(source)
    path = net.fetch().resolve()
    good = path.read_bytes()
    path.write_bytes({'flipped': fake.flip(good), 'cut': good[:len(good) // 2], 'empty': b''}[damage])
    net.hub.fault = net.files.fault = fake.status(403)
    with refusal(net, '403', 'damaged'):  # never the damaged file
        net.source()
    net.mend()
    net.only(source)
    assert net.source() == source
    net.forget()
    assert net.source() == source and not net.requests()


@pytest.mark.parametrize('source', ['hub', 'url'])
@pytest.mark.parametrize('error', [OSError(errno.EIO, 'Input/output error'), MemoryError()])
def test_a_cache_that_the_machine_cannot_read_is_kept(net, monkeypatch, caplog, source, error):
    def fail(*args):
        raise error

    net.only(source)
    path = net.fetch()
    good = path.read_bytes()
    net.forget()
    with monkeypatch.context() as patch:
        for name in ('hash_file', 'safe_open'):
            patch.setattr(tensorfile, name, fail)
        with pytest.raises(MemoryError if isinstance(error, MemoryError) else RuntimeError) as e:
            net.fetch()
    assert 'damaged' not in f'{e.value} {caplog.text}' and not net.requests()
    if isinstance(error, OSError):
        assert f'{path} is in the cache but cannot be read (Input/output error)' in str(e.value)
    assert path.read_bytes() == good and net.source() == source and not net.requests()


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Drops root's rights, which chmod does not limit."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users may enter, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize('source', ['hub', 'url'])
def test_a_warm_cache_may_be_read_only(net, open_folder, source):
    net.only(source)
    net.cache = open_folder / 'cache'
    net.fetch(), net.fetch('heads.safetensors')
    for path in [net.cache, *net.cache.rglob('*')]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    net.forget()
    with as_nobody():
        assert net.source() == source
        net.fetch('heads.safetensors')
    assert not net.requests()
    for path in net.cache.rglob('*'):
        path.chmod(0o755)


@pytest.mark.parametrize('source', ['hub', 'url'])
def test_a_cached_file_without_permission_is_named_and_kept(net, open_folder, source):
    net.only(source)
    net.cache = open_folder / 'cache'
    path = net.fetch()
    net.forget()
    path.chmod(0)
    with as_nobody(), pytest.raises(RuntimeError, match='in the cache but cannot be read .Permission denied.'):
        net.fetch()
    path.chmod(0o644)
    assert net.source() == source and not net.requests()


def test_a_cache_that_cannot_be_written_is_named(net, open_folder):
    net.source()  # everything is imported before the user changes
    net.cache = open_folder / 'cache'
    net.cache.mkdir(mode=0o555)
    with refusal(net, 'permission|write|read-only'), as_nobody():
        net.source()
    net.cache.chmod(0o755)
    assert net.source() == 'hub'


def test_a_cache_path_that_is_a_file_is_named(net, tmp_path):
    (tmp_path / 'file').write_text('in the way')
    net.cache = tmp_path / 'file' / 'cache'
    with refusal(net, 'not a directory|file'):
        net.source()


@pytest.mark.parametrize('source', ['hub', 'url'])
def test_a_full_disk_is_named_and_the_next_start_is_well(net, source):
    net.only(source)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # Python ignores SIGXFSZ: writing fails instead
    try:
        with refusal(net, 'too large|space|write'):
            net.source()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert net.source() == source


# ---- pinned hashes ----

@pytest.fixture
def pinned(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Net:
    names = ('model.safetensors', 'heads.safetensors')
    files = {name: fake.sha256(net.hub.files[f'/{REPO}/resolve/main/{name}']) for name in names}
    (tmp_path / 'pins.json').write_text(json.dumps({TAG: {'repo': REPO, 'revision': fake.COMMIT, 'files': files}}))
    monkeypatch.setattr(sources, 'PINS', tmp_path / 'pins.json')
    return net


def test_a_pinned_file_is_asked_for_at_its_revision(pinned):
    del pinned.hub.files[f'/{REPO}/resolve/main/model.safetensors']
    assert pinned.source() == 'hub'
    pinned.forget()
    assert pinned.source() == 'hub' and not pinned.requests()


def test_another_file_than_the_pinned_one_is_refused(pinned):
    """The repository was overwritten: its own hash matches its bytes, the pinned one does not."""
    pinned.hub.put(REPO, 'model.safetensors', safetensors_bytes(backbone(2)))
    pinned.files.fault = fake.status(404)
    for _ in range(2):
        with refusal(pinned, 'sha256|hash'):
            pinned.source()
    pinned.mend()
    assert pinned.source() == 'url'


def test_a_flipped_byte_of_a_pinned_file_is_found_without_the_hubs_hash(pinned):
    pinned.hub.fault = lambda handler, body: handler.send(fake.flip(body), etag='a' * 40)
    assert pinned.source() == 'url'
    pinned.mend()
    pinned.cache /= 'other'
    assert pinned.source() == 'hub'


def test_pins_of_another_repository_do_not_count(pinned, monkeypatch):
    monkeypatch.setenv('SIMSIAM_HUB_NAMESPACE', 'fork')
    pinned.hub.put(f'fork/{NAME}', 'model.safetensors', safetensors_bytes(backbone(1)))
    assert pinned.source() == 'url'  # these weights, but the fork's
    assert not pinned.files.log


# ---- processes ----

WORKER = """
import json, sys
import simsiam_models
from simsiam_models.weights import identity, sources
tiny = simsiam_models.create_simsiam(dim=64, pred_dim=16, layers=(1, 1, 1, 1), channels=(16, 32, 64, 64)).state_dict()
tiny = {k.removeprefix('backbone.'): v for k, v in tiny.items()}
heads = {k: v for k, v in tiny.items() if k.startswith('pr')}
identity.expect_backbone = lambda classes: {k: v for k, v in tiny.items() if k not in heads}
identity.expect_heads = lambda: heads
from simsiam_models.weights.published import WEIGHTS
print('ready', flush=True)
for line in sys.stdin:
    name, url, cache = json.loads(line)
    weights = WEIGHTS[name.partition('.')[2]]._replace(url=url, sha256_prefix=None)
    print(sources.fetch(name, weights, cache_dir=cache), flush=True)
"""


@pytest.fixture
def workers(net: Net, tmp_path: Path) -> Iterator[list[subprocess.Popen]]:
    """Two processes that fetch on demand, configured through the environment."""
    env = {
        **os.environ, 'HF_ENDPOINT': net.hub.url, 'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_DISABLE_XET': '1',
        'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]), 'OMP_NUM_THREADS': '1',
        'CUDA_VISIBLE_DEVICES': ''}
    processes = [
        subprocess.Popen([sys.executable, '-c', WORKER], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         stderr=subprocess.DEVNULL, text=True) for _ in range(2)]
    try:
        assert [p.stdout.readline() for p in processes] == ['ready\n'] * 2
        yield processes
    finally:
        for p in processes:
            p.kill()
            p.communicate()


def ask(worker: subprocess.Popen, net: Net, cache: Path) -> None:
    worker.stdin.write(json.dumps([NAME, net.weights.url, str(cache)]) + '\n')
    worker.stdin.flush()


def answer(worker: subprocess.Popen) -> str:
    return source_of(Path(worker.stdout.readline().strip()))


@pytest.mark.timeout(120)
def test_of_two_processes_one_downloads(net, workers):
    # First a silent Hub, in processes that have talked to none: huggingface_hub 2 has requests of its own to make.
    net.hub.fault = fake.silent
    with at_most(4):
        ask(workers[0], net, net.cache / 'silent')
        assert answer(workers[0]) == 'url'
    for source in ('hub', 'url'):
        net.forget()
        net.hub.fault = fake.pause(0.5) if source == 'hub' else fake.status(404, 'EntryNotFound')
        net.files.fault = fake.pause(0.5)
        for worker in workers:
            ask(worker, net, net.cache / source)
        assert [answer(worker) for worker in workers] == [source] * 2
        assert len(net.hub.list_requests('GET') + net.files.list_requests('GET')) == 1


@pytest.mark.timeout(120)
def test_a_killed_download_spoils_nothing(net, workers):
    cache = net.cache
    for source, server, worker in zip(('hub', 'url'), (net.hub, net.files), workers, strict=True):
        net.hub.fault = fake.stuck if source == 'hub' else fake.status(404, 'EntryNotFound')
        net.files.fault = fake.stuck
        ask(worker, net, cache / source)
        end = time.monotonic() + 20
        while not server.list_requests('GET') and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.2)
        worker.kill()
        worker.wait()
        net.only(source)
        net.files.fault, net.cache = None, cache / source
        with at_most(3):
            assert net.source() == source


# ---- through timm ----

def create(net: Net, name: str = NAME, **kwargs) -> torch.nn.Module:
    return timm.create_model(name, pretrained=True, cache_dir=net.cache, **{**TINY, **kwargs})


@pytest.fixture
def listed(net: Net, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bytes], dict[str, str]]:
    """Replaces the upstream file of a tag; returns the overlay that timm needs for it."""
    def put(tag: str, body: bytes) -> dict[str, str]:
        net.only('url')
        weights = net.upstream(tag, f'/{tag}/model_best.pth.tar', body, prefix=False)
        monkeypatch.setitem(WEIGHTS, tag, weights)
        return {'url': weights.url}
    return put


def test_the_bare_name_gives_the_default_weights_at_full_size(net, monkeypatch):
    monkeypatch.setattr(identity, 'expect_backbone', EXPECT_BACKBONE)
    full = timm.create_model('simsiam_resnet50').state_dict()
    net.hub.put(REPO, 'model.safetensors', safetensors_bytes(full))
    assert same(timm.create_model('simsiam_resnet50', pretrained=True).state_dict(), full)
    net.forget()
    assert same(timm.create_model('simsiam_resnet50', pretrained=True).state_dict(), full)
    assert not net.requests()


def test_num_classes_adds_a_new_classifier(net):
    state = create(net, num_classes=10).state_dict()
    assert state.pop('fc.weight').shape == (10, 256) and state.pop('fc.bias').shape == (10,)
    assert same(state, backbone(0))


def test_in_chans_1_sums_the_colours(net):
    state = create(net, in_chans=1).state_dict()
    torch.testing.assert_close(state.pop('conv1.weight'), backbone(0)['conv1.weight'].sum(1, keepdim=True))
    assert same(state, {k: v for k, v in backbone(0).items() if k != 'conv1.weight'})


def test_features_only_has_the_weights(net):
    model = create(net, features_only=True).eval()
    assert same(model.state_dict(), backbone(0))
    with torch.no_grad():
        assert [f.shape[1] for f in model(torch.zeros(1, 3, 64, 64))] == [64, 64, 128, 256, 256]


@pytest.mark.parametrize('num_classes', [0, 10, 1000])
def test_a_linear_classifier_comes_from_the_url(net, listed, num_classes):
    overlay = listed('fb_bs512_ep100_lin_in1k', fair_linear(1))
    name = 'simsiam_resnet50.fb_bs512_ep100_lin_in1k'
    state = create(net, name, num_classes=num_classes, pretrained_cfg_overlay=overlay).state_dict()
    fc = {k: state.pop(k) for k in list(state) if k.startswith('fc.')}
    assert same(state, backbone(1))
    assert len(fc) == (2 if num_classes else 0)
    if num_classes == 1000:
        assert same({**state, **fc}, classifier(1))


@pytest.mark.parametrize('num_classes', [0, 10])
@pytest.mark.parametrize('source', ['hub', 'url'])
def test_a_backbone_with_a_hole_is_refused(net, listed, source, num_classes):
    lost = 'layer4.0.bn3.running_var'
    overlay = {}
    if source == 'hub':
        state = {k: v for k, v in backbone(0).items() if k != lost}
        net.hub.put(REPO, 'model.safetensors', safetensors_bytes(state))
        net.files.fault = fake.status(404)
    else:
        contents = torch.load(io.BytesIO(openmmlab(1)), weights_only=True)
        del contents['state_dict'][f'backbone.{lost}']
        overlay = listed(TAG, saved(contents))
    with pytest.raises(RuntimeError, match=re.escape(lost)):
        create(net, num_classes=num_classes, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize('prefix', ['hf-hub:', 'local-dir:'])
def test_an_exported_backbone_loads_by_address(net, tmp_path, prefix):
    export_backbone(simsiam(2).backbone, tmp_path / 'out', 'simsiam_resnet50', TINY)
    for path in (tmp_path / 'out').iterdir():
        net.hub.put('somebody/else', path.name, path.read_bytes())
    name = prefix + ('somebody/else' if prefix == 'hf-hub:' else str(tmp_path / 'out'))
    assert same(timm.create_model(name, pretrained=True, cache_dir=net.cache).state_dict(), backbone(2))
    assert not any(REPO in line for line in net.requests())


def test_a_non_commercial_licence_is_named_once(net, listed, caplog):
    resnet.warn_of_licence.cache_clear()
    create(net)
    name, overlay = 'simsiam_resnet50.fb_bs512_ep100_in1k', listed('fb_bs512_ep100_in1k', fair(1))
    for num_classes in (0, 10):
        create(net, name, num_classes=num_classes, pretrained_cfg_overlay=overlay)
    said = [r for r in caplog.records if 'licen' in r.getMessage().lower()]
    assert [(r.name, r.levelname) for r in said] == [('simsiam_models', 'WARNING')]
    assert 'CC-BY-NC-4.0' in said[0].getMessage() and name in said[0].getMessage()


# ---- create_simsiam ----

@pytest.mark.parametrize('source', ['hub', 'fair', 'openmmlab'])
def test_create_simsiam_loads_backbone_and_heads(net, listed, source):
    name, overlay = NAME, {}
    if source == 'fair':
        name, overlay = 'simsiam_resnet50.fb_bs512_ep100_in1k', listed('fb_bs512_ep100_in1k', fair(1))
    if source == 'openmmlab':
        overlay = listed(TAG, openmmlab(1))
    model = simsiam_models.create_simsiam(
        name, pretrained=True, dim=64, pred_dim=16, cache_dir=net.cache, pretrained_cfg_overlay=overlay, **TINY)
    assert same(model.state_dict(), simsiam(0 if source == 'hub' else 1).state_dict())
    assert len(net.files.list_requests('GET')) == (source != 'hub')


def test_heads_of_another_width_are_refused(net):
    with pytest.raises(ValueError, match='dim=2048, pred_dim=512'):
        simsiam_models.create_simsiam(NAME, pretrained=True, cache_dir=net.cache, **TINY)


# ---- a name is not a proof ----

OURS = f'simsiam-models/{NAME}'  # anybody may register this namespace


@pytest.fixture
def stranger(net: Net, monkeypatch: pytest.MonkeyPatch) -> Net:
    """Somebody has registered our namespace and serves other weights, with every file of a repository."""
    monkeypatch.delenv('SIMSIAM_HUB_NAMESPACE')
    net.hub.put(OURS, 'model.safetensors', safetensors_bytes(backbone(0)))
    net.hub.put(OURS, 'heads.safetensors', safetensors_bytes(heads(0)))
    config = {'architecture': 'simsiam_resnet50', 'num_classes': 0, 'num_features': 256, 'model_args': TINY,
              'backbone_sha256': tensorfile.hash_tensors(backbone(0)), 'pretrained_cfg': {
                  'tag': TAG, 'num_classes': 0, 'input_size': [3, 224, 224], 'first_conv': 'conv1', 'classifier': 'fc'}}
    net.hub.put(OURS, 'config.json', json.dumps(config).encode())
    return net


@pytest.mark.parametrize('namespace', [None, ''])
@pytest.mark.parametrize('filename', ['model.safetensors', 'heads.safetensors'])
def test_a_repository_that_is_neither_pinned_nor_named_is_not_asked(stranger, monkeypatch, namespace, filename):
    if namespace is not None:
        monkeypatch.setenv('SIMSIAM_HUB_NAMESPACE', namespace)
    expected = backbone(1) if filename == 'model.safetensors' else heads(1)
    assert same(safetensors.torch.load_file(stranger.fetch(filename)), expected)
    assert not stranger.hub.log


def test_the_cache_of_such_a_repository_does_not_count_either(stranger, monkeypatch):
    path = huggingface_hub.hf_hub_download(OURS, 'model.safetensors', cache_dir=stranger.cache)
    assert source_of(Path(path)) == 'hub'
    assert sources.find_cached(NAME, stranger.weights, cache_dir=stranger.cache) is None
    stranger.forget()
    with monkeypatch.context() as patch:
        go_offline(patch)
        with pytest.raises(RuntimeError, match='the Hub was not asked, since no repository there is pinned'):
            stranger.fetch()
    assert stranger.source() == 'url' and not stranger.hub.log
    assert source_of(sources.find_cached(NAME, stranger.weights, cache_dir=stranger.cache)) == 'url'


def test_the_error_names_the_servers_that_were_asked_and_says_why_the_hub_was_not(stranger):
    stranger.files.fault = fake.status(404)
    with pytest.raises(RuntimeError, match='404.*the Hub was not asked.*SIMSIAM_HUB_NAMESPACE names none') as e:
        stranger.fetch()
    assert 'simsiam-models/' not in str(e.value) and not stranger.hub.log


@pytest.mark.parametrize('change', [
    {'revision': None}, {'revision': ''}, {'files': {}}, {'files': {'config.json': 'a' * 64}},
    {'repo': f'other/{NAME}'}])
def test_half_a_pin_is_none(stranger, tmp_path, monkeypatch, change):
    digest = fake.sha256(safetensors_bytes(backbone(0)))
    whole = {'repo': OURS, 'revision': fake.COMMIT, 'files': {'model.safetensors': digest}}
    (tmp_path / 'pins.json').write_text(json.dumps({TAG: {**whole, **change}}))
    monkeypatch.setattr(sources, 'PINS', tmp_path / 'pins.json')
    assert stranger.source() == 'url' and not stranger.hub.log


def test_a_pinned_repository_is_asked_without_being_named_and_only_for_the_pinned_files(
        stranger, tmp_path, monkeypatch):
    digest = fake.sha256(safetensors_bytes(backbone(0)))
    (tmp_path / 'pins.json').write_text(json.dumps({TAG: {
        'repo': OURS, 'revision': fake.COMMIT, 'files': {'model.safetensors': digest}}}))
    monkeypatch.setattr(sources, 'PINS', tmp_path / 'pins.json')
    assert stranger.source() == 'hub'
    assert same(safetensors.torch.load_file(stranger.fetch('heads.safetensors')), heads(1))
    assert not any('heads' in line for line in stranger.hub.log)
    assert source_of(sources.fetch(NAME, stranger.weights, cache_dir=stranger.cache, hub=False)) == 'url'


@pytest.mark.parametrize('way', ['timm', 'timm, bare name', 'torch.hub', 'create_simsiam', 'torch.hub full'])
def test_no_way_to_a_model_reaches_a_stranger(stranger, listed, way):
    overlay = listed(TAG, openmmlab(1))
    stranger.hub.fault = None
    args = dict(pretrained=True, cache_dir=stranger.cache, pretrained_cfg_overlay=overlay, **TINY)
    if way.startswith('torch.hub'):
        name, more = ('simsiam_r50_full', dict(dim=64, pred_dim=16)) if 'full' in way else ('simsiam_r50', {})
        model = torch.hub.load(str(ROOT), name, source='local', **args, **more)
    elif way == 'create_simsiam':
        model = simsiam_models.create_simsiam(dim=64, pred_dim=16, **args)
    else:
        model = timm.create_model('simsiam_resnet50' if 'bare' in way else NAME, **args)
    assert same(model.state_dict(), simsiam(1).state_dict() if hasattr(model, 'projector') else backbone(1))
    assert not stranger.hub.log and not any('loopback' in line for line in stranger.files.log)


def test_no_published_configuration_names_a_hub_repository():
    for cfg in resnet.default_cfgs.values():
        for tagged in cfg.cfgs.values():
            assert tagged.hf_hub_id is None and tagged.source is None and not tagged.file


def test_a_tag_in_the_configuration_of_a_strangers_repository_is_no_tag(stranger, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(WEIGHTS, TAG, stranger.weights)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'torch'))
    found = load_backbone(f'hf-hub:{OURS}')
    assert found.tag is None and 'count as your own' in caplog.text and f'weights verify {TAG}' in caplog.text
    folder = tmp_path / 'copy'
    folder.mkdir()
    for name in ('config.json', 'model.safetensors'):
        (folder / name).write_bytes(stranger.hub.files[f'/{OURS}/resolve/main/{name}'])
    assert load_backbone(f'local-dir:{folder}').tag is None
    sources.fetch(NAME, stranger.weights)  # now there is something to compare with
    assert load_backbone(f'local-dir:{folder}').tag is None and load_backbone(f'hf-hub:{OURS}').tag is None
    config = json.loads((folder / 'config.json').read_text())
    config['backbone_sha256'] = tensorfile.hash_tensors(backbone(1))
    (folder / 'config.json').write_text(json.dumps(config))
    tensorfile.write(folder / 'model.safetensors', backbone(1))
    assert load_backbone(f'local-dir:{folder}').tag == TAG  # the authors' weights, bit for bit


def test_a_record_has_the_tag_of_proven_weights_only(net, listed, monkeypatch):
    overlay = listed(TAG, openmmlab(1))
    args = dict(cache_dir=net.cache, pretrained_cfg_overlay=overlay, **TINY)
    assert load_backbone(NAME, **args).tag == TAG  # from the authors' server
    net.hub.fault, net.cache = None, net.cache / 'other'
    assert load_backbone(NAME, **{**args, 'cache_dir': net.cache}).tag is None  # from a namespace that is only named
    (file := net.cache / 'mine.pth').write_bytes(saved({f'backbone.{k}': v for k, v in backbone(2).items()}))
    overlay = {'file': str(file)}
    assert load_backbone(NAME, **{**args, 'pretrained_cfg_overlay': overlay}).tag is None


def lines_of_verify(net: Net, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(WEIGHTS, TAG, net.weights)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(net.cache / 'hf'))
    return verify(TAG)[1]


@pytest.mark.parametrize('case', ['named', 'pinned', 'hash', 'no hash'])
def test_verify_passes_a_hash_only_against_another_source(net, request, monkeypatch, case):
    if case == 'pinned':
        request.getfixturevalue('pinned')
    if 'hash' in case:
        net.only('url')
        net.weights = net.weights._replace(sha256_prefix=net.weights.sha256_prefix if case == 'hash' else None)
    (line,) = [line for line in lines_of_verify(net, monkeypatch) if 'hash:' in line]
    digest = fake.sha256(openmmlab(1))
    assert line.startswith('ok   hash: ' if case in ('pinned', 'hash') else '     hash: ')
    assert {
        'named': 'proves only the download; no independent reference', 'pinned': 'equals the one pinned',
        'hash': f'had the SHA-256 {digest}; the published one begins with {digest[:8]}',
        'no hash': f'{digest}; its authors publish none, so there is no independent reference'}[case] in line
    assert 'promises' not in line


# ---- a file is what its row says ----

FB, FB_LIN = 'fb_bs512_ep100_in1k', 'fb_bs512_ep100_lin_in1k'


def converted_path(net: Net, weights: Weights) -> Path:
    """The path of the converted file in the cache, from the rule in the module's docstring."""
    stem = weights.url.rsplit('/', 1)[1].removesuffix('.tar').removesuffix('.pth')
    return net.cache / f'simsiam-{fake.sha256(weights.url.encode())[:12]}-{stem}.safetensors'


def supervised(contents: dict) -> bytes:
    """A ResNet-50 with classifier, as torchvision or the ImageNet example of PyTorch saves it."""
    return saved(contents)


WRONG = {  # file at the authors' address, tag, words of the refusal
    "torchvision's supervised network": (
        lambda: supervised(classifier(1)), FB_LIN, 'layout torchvision, as any ResNet-50 may have'),
    "PyTorch's ImageNet example": (
        lambda: supervised({'epoch': 90, 'arch': 'resnet50', 'best_acc1': torch.tensor(76.1), 'optimizer': {},
                            'state_dict': {f'module.{k}': v for k, v in classifier(1).items()}}),
        FB_LIN, r'states 76\.\d+ % top-1, but the authors report 68.1 %'),
    'a classifier of another arch': (
        lambda: supervised({'epoch': 90, 'arch': 'wide_resnet50_2', 'best_acc1': 68.1,
                            'state_dict': {f'module.{k}': v for k, v in classifier(1).items()}}),
        FB_LIN, 'states the network wide_resnet50_2'),
    'a backbone for a classifier': (
        lambda: saved(backbone(1)), FB_LIN, 'no classifier, .* has one of 1000 classes'),
    'a classifier of 10 classes': (
        lambda: saved({'best_acc1': 68.1, 'state_dict': {
            k: v[:10] if k.startswith('fc') else v for k, v in classifier(1).items()}}), FB_LIN, 'of 10 classes'),
    'a classifier for a backbone': (lambda: fair_linear(1), FB, 'layout fair_linear'),
    'a bare backbone': (lambda: saved(backbone(1)), FB, 'layout torchvision|projector and predictor have 0 and 0'),
    'an accuracy that is no number': (
        lambda: saved({'best_acc1': None, 'state_dict': {f'module.{k}': v for k, v in classifier(1).items()}}),
        FB_LIN, 'states null % top-1, but the authors report 68.1 %'),
    'numbers that are none': (
        lambda: saved({'epoch': 100, 'state_dict': {
            k: v * torch.nan if k.endswith('encoder.bn1.running_var') else v
            for k, v in torch.load(io.BytesIO(fair(1)), weights_only=True)['state_dict'].items()}}),
        FB, r'NaN or infinity in 1 tensors \(bn1.running_var\)'),
    'whole numbers': (
        lambda: saved({'epoch': 100, 'state_dict': {
            k: v.to(torch.int8) for k, v in torch.load(io.BytesIO(fair(1)), weights_only=True)['state_dict'].items()}}),
        FB, 'is torch.int8'),
    'another length of training': (lambda: fair(1), 'fb_bs256_ep200_in1k', 'states epoch 100, .* for 200 epochs'),
    "another publisher's layout": (lambda: openmmlab(1), FB, 'layout mmselfsup_0x, .* layout fair'),
    'half a predictor': (
        lambda: saved({'epoch': 100, 'state_dict': {
            k: v for k, v in torch.load(io.BytesIO(fair(1)), weights_only=True)['state_dict'].items()
            if 'predictor.3' not in k}}), FB, '16 and 6 entries, those of .* have 16 and 8'),
}


@pytest.mark.parametrize('case', WRONG)
def test_a_file_that_cannot_be_the_tags_is_refused_from_the_authors_address_too(net, case):
    make, tag, words = WRONG[case]
    weights = net.upstream(tag, f'/{tag}.pth.tar', make(), prefix=False)
    net.only('url')
    for _ in range(2):
        with pytest.raises(RuntimeError, match=words):
            sources.fetch(f'simsiam_resnet50.{tag}', weights, cache_dir=net.cache)
    assert not list(net.cache.glob('*.safetensors')) and not list(net.cache.glob('*.sha256'))


@pytest.mark.parametrize('state, filename, words', [
    (lambda: classifier(0), 'model.safetensors', 'a classifier of 1000 classes, .* has none'),
    (lambda: {**backbone(0), 'bn1.weight': torch.ones(3)}, 'model.safetensors', 'of another shape'),
    (lambda: {k: v for k, v in heads(0).items() if 'predictor' in k}, 'heads.safetensors', '0 and 8 entries'),
    (lambda: {**heads(0), 'projector.0.weight': torch.ones(2, 2)}, 'heads.safetensors', 'of another shape')])
def test_a_named_namespace_must_hold_what_the_row_says(net, state, filename, words):
    net.hub.put(REPO, filename, safetensors_bytes(state()))
    net.files.fault = fake.status(404)
    with refusal(net, words, 'deleted'):
        net.fetch(filename)
    net.files.fault = None
    assert same(safetensors.torch.load_file(net.fetch(filename)), heads(1) if 'heads' in filename else backbone(1))


@pytest.mark.parametrize('namespace', ['', ' ', '\t\n'])
def test_an_empty_namespace_is_none(net, monkeypatch, namespace):
    monkeypatch.setenv('SIMSIAM_HUB_NAMESPACE', namespace)
    assert net.source() == 'url' and not net.hub.log


@pytest.mark.parametrize('namespace', ['a/b', '../x', 'é', '-x', 'a b', 'https://huggingface.co/me'])
def test_a_namespace_that_the_hub_cannot_have_is_named(net, monkeypatch, namespace):
    monkeypatch.setenv('SIMSIAM_HUB_NAMESPACE', namespace)
    with pytest.raises(ValueError, match='^SIMSIAM_HUB_NAMESPACE=.* cannot be a user or an organization .* unset it$'):
        net.fetch()
    assert not net.requests()


@pytest.mark.parametrize('what', ['the converted file', 'the record'])
def test_a_fifo_in_the_cache_does_not_hang(net, what):
    net.only('url')
    path = net.fetch()
    fifo = path if what == 'the converted file' else sources.name_record(net.weights.url, net.cache)
    fifo.unlink()
    os.mkfifo(fifo)
    if fifo == path:
        assert net.source() == 'url' and path.is_file()
    else:
        with pytest.raises(RuntimeError, match='is a FIFO'):
            net.fetch()


def test_a_header_from_the_hub_that_names_another_file_is_refused(net):
    for origin in ({'url': 'https://elsewhere/x.pth'}, {'upstream_sha256': 'f' * 64}, {'layout': 'fair'}):
        data = safetensors.torch.save(backbone(0), metadata={'format': 'pt', **origin})
        net.hub.put(REPO, 'model.safetensors', data)
        net.files.fault = fake.status(404)
        with refusal(net, 'converted from|SHA-256'):
            net.source()


@pytest.mark.parametrize('filename', ['model.safetensors', 'heads.safetensors'])
def test_a_converted_file_under_the_name_of_another_tag_is_downloaded_again(net, caplog, filename):
    other = net.upstream(FB, '/other.pth.tar', fair(2), prefix=False)
    net.only('url')
    theirs = sources.fetch(f'simsiam_resnet50.{FB}', other, filename, cache_dir=net.cache)
    ours = net.fetch(filename)
    ours.write_bytes(theirs.read_bytes())
    net.forget()
    expected = backbone(1) if filename == 'model.safetensors' else heads(1)
    assert same(safetensors.torch.load_file(net.fetch(filename)), expected)
    assert len(net.files.list_requests('GET')) == 1
    assert f'{ours} cannot be {NAME}: the file was converted from {other.url}' in caplog.text


def test_any_other_file_under_the_name_of_a_converted_one_is_downloaded_again(net, caplog):
    net.only('url')
    path = net.fetch()
    assert path == converted_path(net, net.weights)
    for write in (lambda: path.write_bytes(safetensors_bytes(backbone(2))),
                  lambda: tensorfile.write(path, backbone(2)),
                  lambda: tensorfile.write(path, classifier(2), **identity.read_origin(path))):
        write()
        assert net.source() == 'url'
    assert 'does not say what it was converted from' in caplog.text and 'classifier of 1000 classes' in caplog.text


@pytest.mark.parametrize('known', [True, False])
def test_the_first_download_is_remembered_and_another_file_is_refused_with_both_hashes(net, known):
    tag, one, two = (TAG, openmmlab(1), openmmlab(0)) if known else (FB, fair(1), fair(0))
    weights = net.upstream(tag, '/x/checkpoint_0099.pth.tar', one, prefix=False)
    net.only('url')

    def fetch() -> Path:
        return sources.fetch(f'simsiam_resnet50.{tag}', weights, cache_dir=net.cache)

    path = fetch()
    record = path.with_suffix('.sha256')
    assert record.read_text().split() == [fake.sha256(one), weights.url]
    for left in net.cache.glob('*.safetensors'):
        left.unlink()
    net.files.files['/x/checkpoint_0099.pth.tar'] = two
    for _ in range(2):
        said = f'{fake.sha256(two)}, but at the first download it had {fake.sha256(one)}'
        with pytest.raises(RuntimeError, match=said):
            fetch()
        assert not path.exists()
    record.unlink()  # the way on that the message names
    assert source_of(fetch()) == 'hub'  # seed 0
    assert record.read_text().split()[0] == fake.sha256(two)


def test_a_cache_without_record_gets_one_and_a_file_that_departs_from_it_is_not_used(net, caplog):
    net.only('url')
    path = net.fetch()
    record = path.with_suffix('.sha256')
    record.unlink()
    net.forget()
    assert net.source() == 'url' and not net.requests()
    assert record.read_text().startswith(fake.sha256(openmmlab(1)))
    tensorfile.write(path, backbone(2), **{**identity.read_origin(path), 'upstream_sha256':
                                           net.weights.sha256_prefix + 'f' * 56})
    assert net.source() == 'url' and len(net.files.list_requests('GET')) == 1
    assert 'at the first download it had' in caplog.text


# ---- weights for BGR pixels ----

BGR = 'mm_ep200_bgr_in1k'


@pytest.fixture
def bgr(net: Net) -> Weights:
    net.only('url')
    return net.upstream(BGR, '/bgr.pth', openmmlab(1))


def flipped_backbone(seed: int) -> State:
    return {**backbone(seed), 'conv1.weight': backbone(seed)['conv1.weight'].flip(1)}


def fetch_bgr(net: Net, weights: Weights, filename: str = 'model.safetensors') -> Path:
    return sources.fetch(f'simsiam_resnet50.{BGR}', weights, filename, cache_dir=net.cache)


def test_bgr_weights_are_converted_to_rgb_and_the_file_says_so(net, bgr):
    path = fetch_bgr(net, bgr)
    assert same(safetensors.torch.load_file(path), flipped_backbone(1))
    assert tensorfile.read_metadata(path)['channels'].startswith('RGB')
    assert same(safetensors.torch.load_file(fetch_bgr(net, bgr, 'heads.safetensors')), heads(1))
    net.forget()
    assert same(safetensors.torch.load_file(fetch_bgr(net, bgr)), flipped_backbone(1)) and not net.requests()


def test_a_cache_of_an_older_version_is_converted_once_more(net, bgr, monkeypatch, caplog):
    path = fetch_bgr(net, bgr)
    tensorfile.write(path, backbone(1), **identity.read_origin(path))  # as older versions wrote it
    net.forget()
    go_offline(monkeypatch)
    for _ in range(2):
        assert same(safetensors.torch.load_file(fetch_bgr(net, bgr)), flipped_backbone(1))
    assert not net.requests() and caplog.text.count('reversing them') == 1


def test_a_hub_file_that_does_not_say_that_it_takes_rgb_is_refused(net, bgr):
    net.hub.fault = None
    repo = f'loopback/simsiam_resnet50.{BGR}'
    net.hub.put(repo, 'model.safetensors', safetensors_bytes(flipped_backbone(0)))
    assert same(safetensors.torch.load_file(fetch_bgr(net, bgr)), flipped_backbone(1))
    for mark, expected in (({'channels': 'RGB'}, flipped_backbone(0)), ({}, flipped_backbone(1))):
        net.cache /= 'again'
        data = safetensors.torch.save(flipped_backbone(0), metadata={'format': 'pt', **mark})
        net.hub.put(repo, 'model.safetensors', data)
        assert same(safetensors.torch.load_file(fetch_bgr(net, bgr)), expected)
    net.hub.put(REPO, 'model.safetensors', safetensors.torch.save(backbone(0), metadata={'channels': 'RGB'}))
    net.files.fault = fake.status(404)
    with refusal(net, 'was trained on RGB pixels'):
        net.fetch()

"""Finds published weights in the caches, on the Hugging Face Hub, or on their authors' servers, in this order.

A name proves nothing: the Hub, and its cache, count for a tag only if its repository is pinned (revision and hash), or
if the user named the namespace by SIMSIAM_HUB_NAMESPACE, because anybody may register a name there. From wherever a
file comes, it is compared with its row of WEIGHTS (see `identity`).

The caller gets a local safetensors file in our layout whose hash was checked. A file from an author's server is kept
next to torch.hub's other checkpoints, its name with a hash of its address: FAIR has two checkpoint_0099.pth.tar. The
SHA-256 of the first download is kept beside it, and a later download must have the same.
"""
import contextlib
import hashlib
import http.client
import json
import logging
import os
import re
import threading
import time
import urllib.error
import urllib.request
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import build_hf_headers, get_session
from tqdm import tqdm

from ..runtime.files import write_atomically
from ..runtime.messages import one_line
from . import tensorfile
from .identity import ORIGIN, check_heads, check_identity, check_origin, make_origin, read_origin
from .layouts import load_checkpoint, reverse_channels
from .published import NAME, WEIGHTS, Weights, hub_id, hub_namespace
from .reading import read, require_file
from .tensorfile import HEADS, MODEL

# tag -> {repo, revision, files: {name: sha256}, fingerprint}; `simsiam publish` writes it.
PINS = Path(__file__).with_name('pins.json')
PROBE_SECONDS = 1.8  # the longest wait for a dead Hub
PATIENCE = 10  # seconds: the longest Retry-After to wait for
URL_TIMEOUT = 10  # seconds without a byte from an author's server

_logger = logging.getLogger('simsiam_models')


class Unavailable(Exception):
    """A source cannot provide the file; the text says why."""


def fetch(
    name: str, weights: Weights, filename: str = MODEL, cache_dir: str | Path | None = None, *, hub: bool = True,
) -> Path:
    """Returns the local path of a published file; downloads and converts it if necessary.

    `name` is 'simsiam_resnet50.TAG', `weights` its row of `published.WEIGHTS`, and `filename` MODEL (backbone and, if
    present, classifier) or HEADS. `cache_dir` replaces the caches of the Hub client and of torch.hub. `hub=False` takes
    the authors' file even if the Hub may be asked. Raises RuntimeError if a cached file cannot be read, or no source
    has the file; the message says why each source failed.
    """
    converted = _name_converted(weights.url, filename, cache_dir)
    hub = hub and may_use_hub(name, filename)
    reasons: list[str] = []
    if path := _find_in_caches(name, weights, filename, cache_dir, hub=hub, reasons=reasons):
        return path
    if constants.HF_HUB_OFFLINE:
        places = f'neither {hub_id(name)} nor {converted}' if hub else converted
        reasons.append(f'HF_HUB_OFFLINE is set and no cache has it ({places})')
    else:
        with _lock_download(converted):
            # another process may have been faster
            if path := _find_in_caches(name, weights, filename, cache_dir, hub=hub, reasons=[]):
                return path
            for source in ([f'Hugging Face Hub ({hub_id(name)})'] if hub else []) + [weights.url]:
                try:
                    if source == weights.url:
                        return _fetch_from_url(name, weights, filename, cache_dir)
                    return _fetch_from_hub(name, weights, filename, cache_dir)
                except MemoryError:
                    raise
                except Exception as e:  # the network errors of the Hub client's versions have no common base class
                    reasons.append(f'{source}: {_explain(e)}')
                    _logger.info(reasons[-1])
    if not hub:
        reasons.append('the Hub was not asked, since no repository there is pinned for this file and '
                       'SIMSIAM_HUB_NAMESPACE names none')
    raise RuntimeError(
        f'{name}: {filename} could not be loaded. {"; ".join(reasons)}. To use a checkpoint that you have, name its '
        'path; in Python, pass pretrained_cfg_overlay=dict(file=PATH), or pretrained=False for random weights.')


def find_cached(
    name: str, weights: Weights, filename: str = MODEL, cache_dir: str | Path | None = None,
) -> Path | None:
    """Returns the local path of a published file, as `fetch` does, if a cache has it, else None. Makes no request."""
    return _find_in_caches(name, weights, filename, cache_dir, hub=may_use_hub(name, filename), reasons=[])


def is_proven(tag: str, digest: str, cache_dir: str | Path | None = None) -> bool:
    """Returns whether a backbone is that of a tag, bit for bit, by comparison with a cached file that is proven.

    `digest` is the start of its `tensorfile.hash_tensors`. Proven are files from the authors' server and pinned ones.
    """
    name, weights = f'{NAME}.{tag}', WEIGHTS[tag]
    path = _find_in_caches(name, weights, MODEL, cache_dir, hub=is_pinned(name), reasons=[])
    return path is not None and tensorfile.hash_tensors(load_checkpoint(path).backbone).startswith(digest)


def read_pin(name: str) -> dict[str, Any]:
    """Returns the recorded revision and hashes of a repository; an empty dictionary if there are none."""
    try:
        pins = json.loads(PINS.read_text())
    except ValueError as e:
        raise RuntimeError(f'{PINS} is not valid JSON ({one_line(e)}); restore it from the repository') from None
    recorded = pins.get(name.partition('.')[2], {})
    return recorded if recorded.get('repo') == hub_id(name) else {}


def is_pinned(name: str, filename: str = MODEL) -> bool:
    """Returns whether revision and hash of a file on the Hub are recorded."""
    pin = read_pin(name)
    return bool(pin.get('revision') and pin.get('files', {}).get(filename))


def may_use_hub(name: str, filename: str = MODEL) -> bool:
    """Returns whether the Hub counts as a source of a file: it is pinned, or the user named the namespace."""
    return bool(hub_namespace()) or is_pinned(name, filename)


def _explain(e: Exception) -> str:
    if isinstance(e, Unavailable):
        return str(e)
    cause = e.__cause__ or e  # the Hub client wraps the actual error into advice
    if isinstance(cause, OSError) and cause.strerror and not isinstance(cause, urllib.error.URLError):
        return f'{cause.strerror}{f" ({cause.filename})" if cause.filename else ""}'
    return one_line(f'{type(cause).__name__}: {cause}', 300)


def _name_converted(url: str, filename: str, cache_dir: str | Path | None) -> Path:
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / 'checkpoints'
    stem = url.rsplit('/', 1)[1].removesuffix('.tar').removesuffix('.pth')
    suffix = 'safetensors' if filename == MODEL else 'heads.safetensors'
    return folder / f'simsiam-{hashlib.sha256(url.encode()).hexdigest()[:12]}-{stem}.{suffix}'


def name_record(url: str, cache_dir: str | Path | None = None) -> Path:
    """Returns the path of the file that holds the SHA-256 of the first download from an author's server."""
    return _name_converted(url, MODEL, cache_dir).with_suffix('.sha256')


def _find_in_caches(
    name: str, weights: Weights, filename: str, cache_dir: str | Path | None, *, hub: bool, reasons: list[str],
) -> Path | None:
    found = None
    if hub:
        revision = read_pin(name).get('revision')
        found = try_to_load_from_cache(hub_id(name), filename, cache_dir=cache_dir, revision=revision)
    for path in (found, _name_converted(weights.url, filename, cache_dir)):
        if not isinstance(path, str | Path) or not os.path.exists(path):
            continue
        try:
            require_file(Path(path))
            problem = 'is damaged' if not _is_intact(Path(path), name, filename) else ''
            if not problem:
                _check_row(Path(path), name, weights, cache_dir)
                return Path(path)
        except ValueError as e:
            problem = f'cannot be {name}: {str(e).removeprefix(f"{path}: ")}'
        except FileNotFoundError:  # another process has just removed it
            continue
        except OSError as e:  # says nothing about the contents, so the file stays
            raise RuntimeError(
                f'{name}: {path} is in the cache but cannot be read ({e.strerror or e}); check the disk and the '
                'permissions of the file, or name another folder with cache_dir') from e
        reasons.append(f'the copy in the cache {problem} ({path})')
        _logger.warning(f'{path} {problem}; it is not used')
    return None


def _is_intact(path: Path, name: str, filename: str) -> bool:
    """Checks a Hub file by its pinned hash or by the hash that names its blob, and any file by the hash it contains."""
    expected = read_pin(name).get('files', {}).get(filename) if path.name == filename else None
    if not expected and re.fullmatch('[0-9a-f]{64}', path.resolve().name):
        expected = path.resolve().name
    return (not expected or tensorfile.hash_file(path) == expected) and tensorfile.is_whole(path)


def _check_row(path: Path, name: str, weights: Weights, cache_dir: str | Path | None) -> None:
    """Raises ValueError if a file of a cache is not what its row says. Reverses channels that an older version kept."""
    tag, origin = name.partition('.')[2], read_origin(path)
    check_origin(origin, tag, weights)
    if path.name in (MODEL, HEADS):  # from the Hub: its header need not say anything
        origin = {'layout': weights.layout, **origin}
    elif len(origin) < len(ORIGIN):
        raise ValueError('its header does not say what it was converted from')
    else:
        _compare_first(origin['upstream_sha256'], weights, cache_dir)
    if path.name.endswith(HEADS):
        return check_heads(read(path), tag, weights)
    checkpoint = load_checkpoint(path)
    outdated = weights.bgr and path.name != MODEL and not checkpoint.info.get('bgr')
    if outdated:
        reverse_channels(checkpoint)
    check_identity(checkpoint, tag, weights, origin)
    if outdated:
        _logger.warning(f'{path} was converted by an older version, which kept the channels B, G, R: reversing them')
        tensorfile.write(path, checkpoint.model_state(), **origin, **{tensorfile.CHANNELS: tensorfile.REVERSED})


def _compare_first(sha256: str, weights: Weights, cache_dir: str | Path | None) -> None:
    """Raises ValueError if the authors' file has another SHA-256 than at the first download, which it records."""
    record = name_record(weights.url, cache_dir)
    if not record.exists():
        with contextlib.suppress(OSError):  # a cache may be read-only
            write_atomically(record, lambda file: file.write(f'{sha256}  {weights.url}\n'.encode()), shared=True)
        return
    require_file(record)
    first = record.read_text(errors='replace')[:64]
    if first != sha256:
        raise ValueError(
            f"the authors' file has the SHA-256 {sha256}, but at the first download it had {first} ({record}): if they "
            'announced a new file, delete that record and try again, otherwise do not trust it')


def _lock_download(converted: Path) -> AbstractContextManager[Any]:
    """Lets one process of the machine download; the others wait, and then find the file in the cache."""
    folder, stem = converted.parent, converted.name.split('.')[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / f'{stem}.lock').acquire()
        for left in folder.glob(f'{stem}.*.download'):  # left by killed processes
            left.unlink(missing_ok=True)
        return held
    except (OSError, NotImplementedError):  # no write access, which the download will report, or no locks
        return nullcontext()


def _fetch_from_hub(name: str, weights: Weights, filename: str, cache_dir: str | Path | None) -> Path:
    repo, revision = hub_id(name), read_pin(name).get('revision')
    _probe(hf_hub_url(repo, filename, revision=revision))
    # force_download: an intact copy was returned before this, so a cached copy is damaged, or not what it should be.
    path = Path(hf_hub_download(repo, filename, revision=revision, cache_dir=cache_dir, force_download=True))
    try:
        if not _is_intact(path, name, filename):
            raise ValueError('the hash of the downloaded file differs from the promised one')
        _check_row(path, name, weights, cache_dir)
    except ValueError as e:
        for file in (path.resolve(), path):  # the blob, and the link to it
            file.unlink(missing_ok=True)
        raise Unavailable(f'{str(e).removeprefix(f"{path}: ")}; the file was deleted') from None
    if not is_pinned(name, filename):
        _logger.warning(
            f'{name}: downloaded from {repo}, which SIMSIAM_HUB_NAMESPACE names; nothing independent proves that these '
            'are the published weights')
    return path


def _probe(url: str) -> None:
    """Checks by a HEAD request in the Hub client's session (its proxies, certificates, token) that the file exists.

    The client itself would retry a dead Hub for 20 seconds and a silent one for minutes. One Retry-After is honoured.
    """
    status, headers = _head(url)
    wait = headers.get('Retry-After', '')
    if status == 429 and wait.isdigit() and int(wait) <= PATIENCE:
        time.sleep(int(wait))
        status, headers = _head(url)
    if status >= 400:
        known = {
            'RepoNotFound': 'no such repository, or it is private', 'EntryNotFound': 'the repository has no such file',
            'RevisionNotFound': 'the repository has no such revision',
            'GatedRepo': 'access must be granted on its page first; then log in with `hf auth login`',
            401: 'not authorised', 403: 'forbidden', 404: 'not found',
            429: f'too many requests, retry after {headers.get("Retry-After") or "a while"} s'}
        text = known.get(headers.get('X-Error-Code')) or known.get(status) or headers.get('X-Error-Message') or 'failed'
        raise Unavailable(f'{text} (HTTP {status})')


def _head(url: str) -> tuple[int, Any]:
    answer: list[Any] = []

    def ask() -> None:
        try:
            session: Any = get_session()  # httpx in huggingface-hub 1 and 2, requests in 0.x
            follow = 'follow_redirects' if hasattr(session, 'follow_redirects') else 'allow_redirects'
            answer.append(session.head(url, headers=build_hf_headers(), timeout=PROBE_SECONDS, **{follow: False}))
        except Exception as e:  # the sessions' errors have no common base class
            answer.append(e)

    # No client's timeout covers a name server that does not answer, hence the thread.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if not answer:
        raise Unavailable(f'no answer within {PROBE_SECONDS} s')
    if isinstance(answer[0], Exception):
        raise Unavailable(f'cannot be reached ({type(answer[0]).__name__})')
    return answer[0].status_code, answer[0].headers


def _fetch_from_url(name: str, weights: Weights, filename: str, cache_dir: str | Path | None) -> Path:
    """Downloads the author's file, checks it, writes its parts as safetensors, and deletes it."""
    target = _name_converted(weights.url, filename, cache_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    raw = target.with_name(f'{target.stem}.{os.getpid()}.download')
    try:
        sha256 = download(weights.url, raw, weights.sha256_prefix)
        checkpoint = load_checkpoint(raw)
        if weights.bgr and not checkpoint.info.get('bgr'):
            reverse_channels(checkpoint)
        check_identity(checkpoint, name.partition('.')[2], weights, {'upstream_sha256': sha256})
        _compare_first(sha256, weights, cache_dir)
    except ValueError as e:
        raise Unavailable(f'the download cannot be used: {str(e).replace(str(raw), "it")}') from None
    finally:
        raw.unlink(missing_ok=True)
    known = make_origin(weights, sha256, checkpoint.layout)
    mark = {tensorfile.CHANNELS: tensorfile.REVERSED} if weights.bgr else {}
    heads = checkpoint.heads_state()
    if heads:
        tensorfile.write(_name_converted(weights.url, HEADS, cache_dir), heads, **known)
    tensorfile.write(_name_converted(weights.url, MODEL, cache_dir), checkpoint.model_state(), **known, **mark)
    if filename == HEADS and not heads:
        raise Unavailable('the file holds no projector and predictor')
    return target


def download(url: str, target: Path, sha256_prefix: str | None) -> str:
    """Downloads a file and returns its SHA-256. A broken connection is resumed up to three times.

    Raises Unavailable if the server refuses or is silent, the file is incomplete, or its hash is not the promised one.
    """
    name = ''  # the server's name for the contents (ETag); without one, a second try starts over
    with open(target, 'wb') as f, tqdm(
            desc=url.rsplit('/', 1)[1], unit='B', unit_scale=True, disable=None, leave=False) as bar:
        for wait in (1, 1, 1, 0):
            headers = {'User-Agent': 'simsiam_models', 'Accept-Encoding': 'identity'}
            if name and f.tell():
                headers |= {'Range': f'bytes={f.tell()}-', 'If-Range': name}
            try:
                with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=URL_TIMEOUT) as r:
                    name, problem = _receive(r, name, f, bar)
            except urllib.error.HTTPError as e:
                after = e.headers.get('Retry-After', '')
                name, problem = '', f'HTTP {e.code} {e.reason}'
                if e.code not in (416, 429) and e.code < 500 or after.isdigit() and int(after) > PATIENCE:
                    break
                time.sleep(int(after) if wait and after.isdigit() else wait)
            except urllib.error.URLError as e:
                problem = f'cannot be reached ({e.reason})'
                break
            if not problem:
                break
    if problem:
        raise Unavailable(problem)
    sha256 = tensorfile.hash_file(target)
    if sha256_prefix and not sha256.startswith(sha256_prefix):
        raise Unavailable(f'the downloaded file has sha256 {sha256[:8]}..., the published one {sha256_prefix}...')
    return sha256


def _receive(response: Any, name: str, f: Any, bar: tqdm) -> tuple[str, str]:
    """Appends an answer to the file, or starts over; returns the contents' name, and the network's problem or ''."""
    headers = response.headers
    if 'html' in headers.get('Content-Type', ''):
        return '', 'the server answers with a web page'
    now = headers.get('ETag') or headers.get('Last-Modified') or ''
    now = '' if now.startswith('W/') else now
    if response.status != 206:
        f.seek(0)
        f.truncate()
    elif now != name or not headers.get('Content-Range', '').startswith(f'bytes {f.tell()}-'):
        return '', 'the file changed during the download'  # never join parts of two files
    length = headers.get('Content-Length')
    bar.total = f.tell() + int(length) if length else None
    chunk = None
    while chunk != b'':
        bar.update(f.tell() - bar.n)
        try:
            chunk = response.read(1 << 20)
        except (OSError, http.client.HTTPException) as e:
            return now, f'the connection broke ({type(e).__name__})'
        f.write(chunk)
    cut = bar.total is not None and f.tell() != bar.total
    return now, f'the connection was cut after {f.tell()} of {bar.total} bytes' if cut else ''

"""Where published weights come from: the caches, the Hugging Face Hub, their authors' servers, in this order.

Whatever the source, the caller gets a local safetensors file in our layout whose hash was checked. A file from an
author's server is converted once and kept beside torch.hub's other checkpoints, under a name that holds a hash of its
address (both of FAIR's files are called checkpoint_0099.pth.tar).
"""
import hashlib
import json
import logging
import os
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

from . import tensorfile
from .layouts import load_checkpoint

MODEL, HEADS = 'model.safetensors', 'heads.safetensors'
# tag -> {repo, revision, files: {name: sha256}, fingerprint}, written by `simsiam publish`.
PINS = Path(__file__).with_name('pins.json')
PROBE_SECONDS = 1.8  # a dead Hub costs no more than this
PATIENCE = 10  # seconds: the longest Retry-After that is waited for
URL_TIMEOUT = 10  # seconds without a byte from an author's server

_logger = logging.getLogger('simsiam_models')


class Unavailable(Exception):
    """One source cannot give the file; the text says why."""


def hub_id(name: str) -> str:
    """The Hub repository of 'simsiam_resnet50.TAG'."""
    return f'{os.environ.get("SIMSIAM_HUB_NAMESPACE", "simsiam-models")}/{name}'


def fetch(name: str, weights: Any, filename: str = MODEL, cache_dir: str | Path | None = None) -> Path:
    """The local path of a published file, downloaded and converted where necessary.

    Args:
        name: 'simsiam_resnet50.TAG'.
        weights: the row of `published.WEIGHTS`: its url and sha256_prefix are used.
        filename: MODEL (backbone, with its classifier where there is one) or HEADS (projector and predictor).
        cache_dir: takes the place of the Hub client's and torch.hub's caches.

    Raises:
        RuntimeError: no source has the file; the message names each with its reason.
    """
    converted = _converted(weights.url, filename, cache_dir)
    reasons: list[str] = []
    if path := _from_caches(name, filename, converted, cache_dir, reasons):
        return path
    if constants.HF_HUB_OFFLINE:
        reasons.append(f'HF_HUB_OFFLINE is set and no cache has it, neither {hub_id(name)} nor {converted}')
    else:
        with _one_process(converted):
            if path := _from_caches(name, filename, converted, cache_dir, []):  # another process was quicker
                return path
            for where, get in (
                (f'Hugging Face Hub ({hub_id(name)})', lambda: _from_hub(name, filename, cache_dir)),
                (weights.url, lambda: _from_url(weights, filename, cache_dir)),
            ):
                try:
                    return get()
                except Exception as e:  # the Hub client's network errors have no common class over its versions
                    reasons.append(f'{where}: {_sentence(e)}')
                    _logger.info(reasons[-1])
    raise RuntimeError(
        f'{name}: {filename} could not be loaded. {"; ".join(reasons)}. A checkpoint that you have loads with '
        'pretrained_cfg_overlay=dict(file=PATH), and pretrained=False starts from random weights.')


def cached(name: str, weights: Any, filename: str = MODEL, cache_dir: str | Path | None = None) -> Path | None:
    """The local path if a cache has the file, else None; makes no request."""
    return _from_caches(name, filename, _converted(weights.url, filename, cache_dir), cache_dir, [])


def pin(name: str) -> dict[str, Any]:
    """The recorded revision and hashes of a repository, or an empty dictionary."""
    recorded = json.loads(PINS.read_text()).get(name.partition('.')[2], {})
    return recorded if recorded.get('repo') == hub_id(name) else {}


def _sentence(e: Exception) -> str:
    if isinstance(e, Unavailable):
        return str(e)
    e = e.__cause__ or e  # the Hub client wraps what it met into advice
    if isinstance(e, OSError) and e.strerror and not isinstance(e, urllib.error.URLError):
        return f'{e.strerror}{f" ({e.filename})" if e.filename else ""}'
    return ' '.join(f'{type(e).__name__}: {e}'.split())[:300]


def _folder(cache_dir: str | Path | None) -> Path:
    return Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / 'checkpoints'


def _converted(url: str, filename: str, cache_dir: str | Path | None) -> Path:
    stem = url.rsplit('/', 1)[1].removesuffix('.tar').removesuffix('.pth')
    stem = f'simsiam-{hashlib.sha256(url.encode()).hexdigest()[:12]}-{stem}'
    return _folder(cache_dir) / (f'{stem}.safetensors' if filename == MODEL else f'{stem}.heads.safetensors')


def _from_caches(
    name: str, filename: str, converted: Path, cache_dir: str | Path | None, reasons: list[str],
) -> Path | None:
    revision = pin(name).get('revision')
    found = try_to_load_from_cache(hub_id(name), filename, cache_dir=cache_dir, revision=revision)
    for path in (found, converted):
        if not isinstance(path, str | Path) or not os.path.exists(path):
            continue
        if _is_intact(Path(path), name, filename):
            return Path(path)
        reasons.append(f'the copy in the cache is damaged ({path})')
        _logger.warning(f'{path} is damaged and is fetched again')
    return None


def _is_intact(path: Path, name: str, filename: str) -> bool:
    """Hub files: the pinned hash, else the one by which the Hub calls the blob; converted files hold their own."""
    expected = pin(name).get('files', {}).get(filename) if path.name == filename else None
    blob = path.resolve().name
    if not expected and len(blob) == 64 and not set(blob) - set('0123456789abcdef'):
        expected = blob
    if expected:
        return tensorfile.file_sha256(path) == expected
    return tensorfile.is_whole(path)


def _one_process(converted: Path) -> AbstractContextManager:
    """Of the processes of one machine, one downloads; the others wait and then find the file in the cache."""
    stem = converted.name.split('.')[0]
    try:
        converted.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(converted.with_name(f'{stem}.lock')).acquire()
        for left in converted.parent.glob(f'{stem}.*.download'):  # of a process that was killed
            left.unlink(missing_ok=True)
        return held
    # A folder that cannot be written (the attempts to write into it will say so), or cannot be locked.
    except (OSError, NotImplementedError):
        return nullcontext()


def _from_hub(name: str, filename: str, cache_dir: str | Path | None) -> Path:
    repo, revision = hub_id(name), pin(name).get('revision')
    _probe(hf_hub_url(repo, filename, revision=revision))
    # A damaged copy must not be taken for the file: what is intact was returned before this.
    path = Path(hf_hub_download(repo, filename, revision=revision, cache_dir=cache_dir, force_download=True))
    if _is_intact(path, name, filename):
        return path
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)
    raise Unavailable('the file that arrived has another hash than was promised, and was deleted')


def _probe(url: str) -> None:
    """One HEAD through the Hub client's own session (its proxies, certificates and token): is the file there?

    The client would retry a dead Hub for 20 seconds and a silent one for minutes. A Retry-After is honoured up to
    PATIENCE; a longer one leaves the Hub alone.
    """
    for last in (False, True):
        status, headers = _head(url)
        if status < 400:
            return
        wait = headers.get('Retry-After', '')
        if status != 429 or last or not wait.isdigit() or int(wait) > PATIENCE:
            break
        time.sleep(int(wait))
    code, message = headers.get('X-Error-Code', ''), headers.get('X-Error-Message', '')
    known = {
        'RepoNotFound': 'no such repository, or it is private', 'EntryNotFound': 'the repository has no such file',
        'RevisionNotFound': 'the repository has no such revision',
        'GatedRepo': 'access must be granted on its page first; then log in with `hf auth login`'}
    text = known.get(code) or {401: 'not authorised', 403: 'forbidden', 404: 'not found'}.get(status, '')
    text = text or (f'too many requests, retry after {wait or "a while"} s' if status == 429 else message or 'failed')
    raise Unavailable(f'{text} (HTTP {status})')


def _head(url: str) -> tuple[int, Any]:
    answer: list[Any] = []

    def ask() -> None:
        try:
            session = get_session()  # httpx in huggingface-hub 1 and 2, requests in 0.x
            follow = 'follow_redirects' if hasattr(session, 'follow_redirects') else 'allow_redirects'
            answer.append(session.head(url, headers=build_hf_headers(), timeout=PROBE_SECONDS, **{follow: False}))
        except Exception as e:
            answer.append(e)

    # A thread, because no time-out of a client covers a name server that does not answer.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if not answer:
        raise Unavailable(f'no answer within {PROBE_SECONDS} s')
    if isinstance(answer[0], Exception):
        raise Unavailable(f'cannot be reached ({type(answer[0]).__name__})')
    return answer[0].status_code, answer[0].headers


def _from_url(weights: Any, filename: str, cache_dir: str | Path | None) -> Path:
    """Download the author's file, check it, write its parts as safetensors, delete it."""
    target = _converted(weights.url, filename, cache_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    raw = target.with_name(f'{target.stem}.{os.getpid()}.download')
    try:
        sha256 = download(weights.url, raw, weights.sha256_prefix)
        try:
            checkpoint = load_checkpoint(raw)
        except ValueError as e:
            raise Unavailable(f'what arrived is not the checkpoint: {str(e).replace(str(raw), "it")}') from None
    finally:
        raw.unlink(missing_ok=True)
    known = {'url': weights.url, 'upstream_sha256': sha256, 'layout': checkpoint.layout}
    parts = {MODEL: checkpoint.model_state(), HEADS: checkpoint.heads_state()}
    for part, tensors in parts.items():
        if tensors:
            tensorfile.write(_converted(weights.url, part, cache_dir), tensors, **known)
    if not parts[filename]:
        raise Unavailable('the file holds no projector and predictor')
    return target


def download(url: str, target: Path, sha256_prefix: str | None) -> str:
    """Fetch a file and return its SHA-256; a cut connection is taken up again where it broke, three times.

    Raises:
        Unavailable: refused, silent, incomplete, a web page, or another hash than the name promises.
        OSError: the file cannot be written.
    """
    name = None  # the server's name for the contents (ETag): without one, a second try starts over
    with open(target, 'wb') as f, tqdm(
            desc=url.rsplit('/', 1)[1], unit='B', unit_scale=True, disable=None, leave=False) as bar:
        for wait in (1, 1, 1, 0):
            if not name:
                f.seek(0)
                f.truncate()
            headers = {'User-Agent': 'simsiam_models', 'Accept-Encoding': 'identity'}
            if f.tell():
                headers |= {'Range': f'bytes={f.tell()}-', 'If-Range': name}
            try:
                with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=URL_TIMEOUT) as r:
                    name, problem = _receive(r, name, f, bar)
            except urllib.error.HTTPError as e:
                after = e.headers.get('Retry-After', '')
                name, problem = None, f'HTTP {e.code} {e.reason}'
                if e.code not in (416, 429) and e.code < 500 or after.isdigit() and int(after) > PATIENCE:
                    break
                time.sleep(int(after) if wait and after.isdigit() else wait)
            except OSError as e:
                if isinstance(e, urllib.error.URLError):
                    problem = f'cannot be reached ({e.reason})'
                    break
                raise
            if not problem:
                break
        f.flush()
        os.fsync(f.fileno())
    if problem:
        raise Unavailable(problem)
    sha256 = tensorfile.file_sha256(target)
    if sha256_prefix and not sha256.startswith(sha256_prefix):
        raise Unavailable(f'the file that arrived has sha256 {sha256[:8]}..., its name promises {sha256_prefix}')
    return sha256


def _receive(response: Any, name: str | None, f: Any, bar: tqdm) -> tuple[str | None, str]:
    """Append an answer to what is there, or begin again; returns the contents' name and what went wrong, or ''."""
    headers = response.headers
    if 'html' in headers.get('Content-Type', ''):
        return None, 'the server answers with a web page'
    now = headers.get('ETag') or headers.get('Last-Modified')
    if response.status != 206:
        f.seek(0)
        f.truncate()
    elif now != name or not headers.get('Content-Range', '').startswith(f'bytes {f.tell()}-'):
        return None, 'the file changed while it was read'  # halves of two files are never joined
    length = headers.get('Content-Length')
    total = f.tell() + int(length) if length else None
    bar.total = total
    bar.update(f.tell() - bar.n)
    problem = _copy(response, f, bar)
    if not problem and total is not None and f.tell() != total:
        problem = f'the connection was cut after {f.tell()} of {total} bytes'
    return None if now and now.startswith('W/') else now, problem


def _copy(response: Any, f: Any, bar: tqdm) -> str:
    """Until the end of the answer; returns what went wrong on the network. Errors of the disk are raised."""
    while True:
        try:
            chunk = response.read(1 << 20)
        except Exception as e:  # http.client and ssl have errors of their own
            return f'the connection broke ({type(e).__name__})'
        if not chunk:
            return ''
        f.write(chunk)
        bar.update(len(chunk))

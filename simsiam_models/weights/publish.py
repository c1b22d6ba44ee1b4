"""Publishes a checkpoint as a Hub repository that timm, transformers and this package load, with a card and hashes."""
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import HfApi, get_hf_file_metadata, get_token, hf_hub_url
from huggingface_hub.utils import validate_repo_id

from ..runtime.files import write_json
from ..runtime.messages import one_line, short
from . import sources, tensorfile
from .card import CardFacts, format_card
from .export import export_checkpoint
from .folders import DESCRIPTION, read_config, read_json
from .identity import check_identity, make_origin, read_origin
from .layouts import Checkpoint, load_checkpoint
from .published import NAME, WEIGHTS, Weights
from .reading import find_export, read, require_safetensors
from .tensorfile import CONFIG, HEADS, MODEL
from .verify import FINGERPRINT, compute_fingerprint

OWN = "the uploader's own training, not a published file"  # an origin
CARD = 'README.md'
UNFINISHED = '.unfinished-'


def publish(source: str | Path, tag: str, dry_run: str | Path | None = None, license: str | None = None) -> str:
    """Writes config.json, weights, fingerprint.json and README.md, uploads them, and returns a report.

    `source` is a checkpoint in any layout that `load_checkpoint` knows, or a folder exported for timm; `tag` a key of
    WEIGHTS, whose row the source is checked against, or any other tag for weights of your own, which need a `license`
    ('mit', 'apache-2.0', ...). `dry_run` is a folder to write the repository into instead of uploading it.

    Raises:
        FileNotFoundError, ValueError: no source, or it does not match the tag, is incomplete or holds NaN or infinity.
        RuntimeError: the upload failed.
    """
    source, tag = Path(source), tag.removeprefix(f'{NAME}.')
    weights = WEIGHTS.get(tag)
    if weights is None and not license:
        raise ValueError(f'{tag!r} is not a published tag ({", ".join(WEIGHTS)}); to publish weights of your own, name '
                         'their license: --license apache-2.0')
    if weights and license and license != weights.license:
        raise ValueError(f'{tag} is published by its authors under {weights.license}: leave --license out')
    if dry_run is None:
        _check_token()
    if not source.exists():
        raise FileNotFoundError(f'{source} does not exist: name a checkpoint or an exported folder')
    name = NAME
    if weights is None and source.is_dir():  # of any architecture
        name = f'simsiam_{read_config(source).name.removeprefix("simsiam_")}'
    repo = sources.hub_id(f'{name}.{tag}')
    validate_repo_id(repo)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(dry_run or temporary)
        lines = _write_repository(source, tag, repo, folder, license or weights.license)
        if dry_run is None:
            lines += _upload(folder, tag, repo)
        else:
            lines.append(f'Wrote {folder} and uploaded nothing; the repository would be {repo}.')
    return '\n'.join(lines)


def publish_all(dry_run: str | Path | None = None, say: Callable[[str], Any] = print) -> bool:
    """Publishes every tag of WEIGHTS from its authors' server, never from the Hub, and pins it.

    What is done is skipped: tags that are pinned and on the Hub with the pinned hashes or, with `dry_run`, complete
    folders `dry_run`/REPOSITORY. A tag that fails is reported, and the others continue. Returns whether none failed.
    Raises RuntimeError if there is no token.
    """
    if dry_run is None:
        _check_token()
    else:
        for left in Path(dry_run).glob(f'{UNFINISHED}*'):  # by a killed run
            shutil.rmtree(left, ignore_errors=True)
    failed = []
    for tag in WEIGHTS:
        try:
            for line in _publish_upstream(tag, dry_run and Path(dry_run)):
                say(f'{tag}: {line}')
        except (OSError, RuntimeError, ValueError) as e:
            failed.append(tag)
            say(f'{tag}: FAILED: {e}')
    what = 'published' if dry_run is None else f'written to {dry_run}'
    say(f'{len(WEIGHTS) - len(failed)} of {len(WEIGHTS)} tags are {what}' + (
        f'; failed: {", ".join(failed)}. The same command tries these again' if failed else ''))
    return not failed


def _check_token() -> None:
    if get_token() is None:
        raise RuntimeError('no Hugging Face token: run `hf auth login` or set HF_TOKEN (--dry-run FOLDER needs none)')


def _publish_upstream(tag: str, dry_run: Path | None) -> list[str]:
    """Publishes the authors' file of a tag; returns what was done."""
    name, weights = f'{NAME}.{tag}', WEIGHTS[tag]
    repo = sources.hub_id(name)
    validate_repo_id(repo)
    if dry_run is None and _is_published(name):
        return [f'{repo} is pinned, and the Hub has the pinned files']
    if dry_run is not None and _is_written(dry_run / name, repo, weights):
        return [f'{dry_run / name} is complete']
    model = sources.fetch(name, weights, hub=False)
    checkpoint, origin = load_checkpoint(model), read_origin(model)
    if not weights.linear:
        heads = read(sources.fetch(name, weights, HEADS, hub=False))
        checkpoint.projector, checkpoint.predictor = (
            {k.removeprefix(f'{part}.'): v for k, v in heads.items() if k.startswith(f'{part}.')}
            for part in ('projector', 'predictor'))
    with tempfile.TemporaryDirectory(dir=_make_folder(dry_run), prefix=UNFINISHED) as temporary:
        folder = Path(temporary) / name
        text = _describe_origin(weights, origin, f'{weights.url} as downloaded')
        lines = _write_published(checkpoint, tag, repo, folder, (origin, text))
        if dry_run is None:
            return [*lines, *_upload(folder, tag, repo)]
        _make_folder(dry_run / name)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == CARD):  # the card last: it says "complete"
            os.replace(file, dry_run / name / file.name)
    return [*lines, f'Wrote {dry_run / name} and uploaded nothing; the repository would be {repo}.']


def _make_folder(folder: Path | None) -> Path | None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_written(folder: Path, repo: str, weights: Weights) -> bool:
    """Returns whether an earlier dry run completed the folder, and its weights are undamaged."""
    names = [MODEL] if weights.linear else [MODEL, HEADS]
    if not all((folder / name).is_file() for name in (*names, CONFIG, FINGERPRINT, CARD)):
        return False
    return f"'hf-hub:{repo}'" in (folder / CARD).read_text(encoding='utf-8') and all(
        tensorfile.is_whole(folder / name) and read_origin(folder / name).get('url') == weights.url for name in names)


def _is_published(name: str) -> bool:
    """Returns whether the Hub has every pinned file of a tag. It states the SHA-256 of large files only."""
    if not sources.is_pinned(name):
        return False
    pin = sources.read_pin(name)
    for file, sha256 in pin['files'].items():
        try:
            stated = get_hf_file_metadata(hf_hub_url(pin['repo'], file, revision=pin['revision'])).etag or ''
        except Exception:  # requests in huggingface_hub 0.36, httpx in 1.x and 2.x: no common base class
            return False
        if file == MODEL and stated != sha256 or len(stated) == len(sha256) and stated != sha256:
            return False
    return True


def _write_repository(source: Path, tag: str, repo: str, folder: Path, license: str) -> list[str]:
    """Writes the repository's files from a checkpoint or an exported folder; returns the findings about it."""
    if tag not in WEIGHTS and source.is_dir():
        _copy_export(source, folder, {'tag': tag, 'license': license})
        _finish_repository(source, tag, repo, folder, (OWN, license))
        return []
    checkpoint = load_checkpoint(source)
    line = f'{source.name}: {checkpoint.describe()}.'
    if weights := WEIGHTS.get(tag):
        origin = _find_origin(source, checkpoint, weights)
        check_identity(checkpoint, tag, weights, origin)
        if 'upstream_sha256' not in origin:
            raise ValueError(f"the header of {source} does not say the SHA-256 of the authors' file of {tag}, which "
                             f'the card states: publish that file ({weights.url})')
        text = _describe_origin(weights, origin, 'a file' if 'layout' not in origin else None)
        return [line, *_write_published(checkpoint, tag, repo, folder, (origin, text))]
    _check_finite({**checkpoint.model_state(), **checkpoint.heads_state()}, source)
    export_checkpoint(checkpoint, folder, {'tag': tag, 'license': license})
    _finish_repository(source, tag, repo, folder, (OWN, license))
    return [line]


def _write_published(
    checkpoint: Checkpoint, tag: str, repo: str, folder: Path, origin: tuple[dict[str, str], str],
) -> list[str]:
    """Writes the repository of a published file. `origin`: of its header, and in words."""
    weights, (header, text) = WEIGHTS[tag], origin
    cfg = {'tag': tag, 'license': weights.license, 'origin_url': weights.project}
    export_checkpoint(checkpoint, folder, cfg, make_origin(weights, header['upstream_sha256'], weights.layout))
    _finish_repository(tag, tag, repo, folder, (text, weights.license))
    return [f'Origin: {text}.']


def _finish_repository(source: Path | str, tag: str, repo: str, folder: Path, terms: tuple[str, str]) -> None:
    """Checks that timm loads the folder; adds fingerprint and card. `terms`: origin and license."""
    config = _read_config(folder)
    try:  # as timm does: build what config.json names, and fill it strictly
        network = read_config(folder)
        model = timm.create_model(network.name, num_classes=config['num_classes'], **network.args)
        model.load_state_dict(read(folder / MODEL), strict=True)
    except RuntimeError as e:
        raise ValueError(f'timm cannot load {source}: {one_line(e, 300)}') from e
    write_json(folder / FINGERPRINT, compute_fingerprint(model))
    parameters = sum(p.numel() for p in model.parameters())
    origin, license = terms
    facts = CardFacts(tag, repo, config, parameters, origin, (folder / HEADS).exists(), license)
    (folder / CARD).write_text(format_card(facts), encoding='utf-8')


def _find_origin(source: Path, checkpoint: Checkpoint, weights: Weights) -> dict[str, str]:
    """Returns the hash of the authors' own file, or what the header of a converted one says; see `check_identity`."""
    if source.is_file() and checkpoint.layout == weights.layout:
        return {'upstream_sha256': tensorfile.hash_file(source)}
    return read_origin(source / MODEL if source.is_dir() else source)


def _describe_origin(weights: Weights, origin: dict[str, str], measured: str | None) -> str:
    """Says which file these weights come from, and whether that was verified; `measured`: whose hash was measured."""
    sha256, prefix = origin['upstream_sha256'], weights.sha256_prefix
    if measured is None:
        return (f'converted from an already converted file, whose header names a source with the SHA-256 {sha256}; '
                "it could not be compared with the authors' own file")
    if prefix is None:
        return (f'converted from {measured}, with the SHA-256 {sha256}; its authors publish no hash to compare it '
                'with, so that its identity is not verified')
    return f"converted from the authors' own file, whose SHA-256 {sha256} begins with {prefix}, as published"


def _check_finite(tensors: dict[str, Any], source: Path | str) -> None:
    if bad := tensorfile.find_nonfinite(tensors):
        raise ValueError(f'{source} holds NaN or infinity in {len(bad)} tensors ({", ".join(bad[:3])}): not published')


def _copy_export(source: Path, folder: Path, cfg: dict[str, Any]) -> None:
    """Copies an exported folder of any architecture and adds `cfg` to its pretrained_cfg."""
    if source.resolve() == folder.resolve():
        raise ValueError(f'{folder} is the source itself: write the dry run to another folder')
    config = _read_config(source)
    config['pretrained_cfg'] = {k: v for k, v in config['pretrained_cfg'].items() if k in DESCRIPTION} | cfg
    (config.get('model_args') or {}).pop('num_classes', None)  # transformers passes it too, and fails
    folder.mkdir(parents=True, exist_ok=True)
    for name in (MODEL, HEADS):
        (folder / name).unlink(missing_ok=True)
        if name == MODEL or (source / name).exists():
            require_safetensors(find_export(source) if name == MODEL else source / name)
            _check_finite(read(source / name), source / name)
            shutil.copyfile(source / name, folder / name)
    write_json(folder / CONFIG, config)


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG)
    if not {'architecture', 'num_classes', 'num_features', 'pretrained_cfg'} <= set(config):
        raise ValueError(f'{folder / CONFIG} is not that of a model exported for timm: it has only {", ".join(config)}')
    size = config['pretrained_cfg'].get('input_size')
    if not isinstance(size, list) or len(size) != 3:
        raise ValueError(f'{folder / CONFIG}: pretrained_cfg has the input_size {short(size)}, but the card needs '
                         'channels, height and width: export the folder again')
    return config


def _upload(folder: Path, tag: str, repo: str) -> list[str]:
    names = [name for name in (CARD, CONFIG, FINGERPRINT, MODEL, HEADS) if (folder / name).exists()]
    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=names, commit_message='Upload weights and card')
    except Exception as e:  # requests in huggingface_hub 0.36, httpx in 1.x and 2.x: no common base class
        reason = one_line(f'{type(e).__name__}: {e}', 300)
        status = getattr(getattr(e, 'response', None), 'status_code', None)
        if status in (401, 403):
            reason = (f'the Hub refuses the token ({status}): it needs write access to the namespace '
                      f'{repo.split("/")[0]} (SIMSIAM_HUB_NAMESPACE names another)')
        raise RuntimeError(f'{repo} was not uploaded: {reason}') from e
    record = {
        'repo': repo, 'revision': commit.oid, 'files': {n: tensorfile.hash_file(folder / n) for n in names},
        'fingerprint': json.loads((folder / FINGERPRINT).read_text())}
    pinned = pin_upload(tag, record) if tag in WEIGHTS else []
    return [f'Uploaded {", ".join(names)} to {repo} (revision {commit.oid}).', *pinned]


def pin_upload(tag: str, record: dict[str, Any]) -> list[str]:
    """Pins an upload, so that every later download is checked against it."""
    path = sources.PINS
    try:
        write_json(path, {**json.loads(path.read_text()), tag: record})
    except (OSError, ValueError) as e:  # the upload is done, and its hashes must not get lost
        return [f'{path} cannot be written ({e}); add this to it:', json.dumps({tag: record}, indent=2)]
    return [f'Recorded revision and hashes in {path}: commit that file.']

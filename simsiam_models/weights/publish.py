"""Publishes weights as a Hub repository that timm, transformers and this package load, with a card and hashes."""
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from huggingface_hub.utils import validate_repo_id

from ..runtime.files import write_json
from ..runtime.messages import one_line
from . import sources, tensorfile
from .card import CardFacts, format_card
from .export import PLAIN_TIMM, check_finite, copy_export, export_checkpoint, read_whole_config
from .folders import create_from_folder
from .history import TRAINING, History, read_history
from .identity import check_identity, make_origin, read_origin
from .layouts import Checkpoint, load_checkpoint
from .licenses import check_license
from .networks import TIMM_ERRORS, Trained, load_trained
from .published import NAME, WEIGHTS, Weights, hub_id
from .reading import read
from .tensorfile import CONFIG, HEADS, MODEL
from .upload import CARD, check_token, is_published, upload
from .verify import FINGERPRINT, compute_fingerprint

OWN = "the uploader's own training, not a published file"  # an origin
UNFINISHED = '.unfinished-'


def publish(
    source: str | Path, tag: str | None = None, dry_run: str | Path | None = None, license: str | None = None, *,
    repo: str | None = None, private: bool = False,
) -> str:
    """Writes config.json, weights, fingerprint.json and README.md, uploads them, and returns a report.

    Args:
        source: what `load_trained` takes: a run's folder, a folder exported for timm, or a checkpoint. If the files of
            a run are there, the card states how the weights were trained, and training.json keeps that.
        tag: a key of WEIGHTS, whose row the source is checked against, or any other tag for weights of your own.
        dry_run: a folder to write the repository into instead of uploading it.
        license: of weights of your own: an identifier that the Hub knows, or 'other'.
        repo: OWNER/NAME for weights of your own; by default NAMESPACE/simsiam_MODEL.TAG.
        private: create a private repository.

    Raises:
        FileNotFoundError, ValueError: no source, or it does not match the tag, is incomplete or holds NaN or infinity.
        RuntimeError: the upload failed.
    """
    source, tag = Path(source), tag and tag.removeprefix(f'{NAME}.')
    license = _check_request(tag, license, repo)
    if dry_run is None:
        check_token()
    elif private:
        raise ValueError('--private and --dry-run exclude each other: a dry run creates no repository')
    elif Path(dry_run).exists() and (not Path(dry_run).is_dir() or any(Path(dry_run).iterdir())):
        raise ValueError(f'--dry-run {dry_run} already exists; name a new or empty folder')
    if not source.exists():
        raise FileNotFoundError(f'{source} does not exist: name a checkpoint, or the folder of a run or export')
    trained = None if tag in WEIGHTS else load_trained(source)
    if repo is None:
        name = trained.network.name.removeprefix('simsiam_') if trained else PLAIN_TIMM[NAME]
        repo = hub_id(f'simsiam_{name}.{tag}')
        validate_repo_id(repo)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(dry_run or temporary)
        if trained is None:
            lines = _write_tag(source, cast(str, tag), repo, folder)
        else:
            lines = _write_own(trained, source, repo, folder, {'tag': tag or 'simsiam', 'license': license})
        if dry_run is None:
            lines += upload(folder, tag, repo, private)
        else:
            lines.append(f'Wrote {folder} and uploaded nothing; the repository would be {repo}.')
    return '\n'.join(lines)


def _check_request(tag: str | None, license: str | None, repo: str | None) -> str:
    """Returns the license; raises ValueError if tag, license and repository contradict one another."""
    if tag is not None and (weights := WEIGHTS.get(tag)):
        if license and license != weights.license:
            raise ValueError(f'{tag} is published by its authors under {weights.license}: leave --license out')
        if repo:
            raise ValueError(f'--repo {repo}: only for your own weights; {tag} goes to '
                             f'{hub_id(f"{NAME}.{tag}")} (SIMSIAM_HUB_NAMESPACE names another namespace)')
        return weights.license
    if repo is not None:
        try:
            validate_repo_id(repo)
        except ValueError:
            repo = ''
        if repo.count('/') != 1:
            raise ValueError('--repo: must be OWNER/NAME, each made up of letters, digits, "-", "_" and "."')
    elif tag is None:
        raise ValueError('name the repository with --repo OWNER/NAME, or give a --tag')
    if not license:
        what = f'{tag!r} is not a published tag ({", ".join(WEIGHTS)}); to' if tag else 'To'
        raise ValueError(f'{what} publish your own weights, give their licence: --license apache-2.0')
    return check_license(license)


def publish_all(dry_run: str | Path | None = None, say: Callable[[str], Any] = print) -> bool:
    """Publishes every tag of WEIGHTS from its authors' server, never from the Hub, and pins it.

    What is done is skipped: tags that are pinned and on the Hub with the pinned hashes or, with `dry_run`, complete
    folders `dry_run`/REPOSITORY. A tag that fails is reported, and the others continue. Returns whether none failed.
    Raises RuntimeError if there is no token.
    """
    if dry_run is None:
        check_token()
    else:
        for left in Path(dry_run).glob(f'{UNFINISHED}*'):  # by a killed run
            shutil.rmtree(left, ignore_errors=True)
    failed = []
    for tag in WEIGHTS:
        try:
            for line in _publish_upstream(tag, Path(dry_run) if dry_run else None):
                say(f'{tag}: {line}')
        except (OSError, RuntimeError, ValueError) as e:
            failed.append(tag)
            say(f'{tag}: FAILED: {e}')
    what = 'published' if dry_run is None else f'written to {dry_run}'
    say(f'{len(WEIGHTS) - len(failed)} of {len(WEIGHTS)} tags are {what}' + (
        f'; failed: {", ".join(failed)}. The same command tries these again' if failed else ''))
    return not failed


def _publish_upstream(tag: str, dry_run: Path | None) -> list[str]:
    """Publishes the authors' file of a tag; returns what was done."""
    name, weights = f'{NAME}.{tag}', WEIGHTS[tag]
    repo = hub_id(name)
    validate_repo_id(repo)
    if dry_run is None and is_published(name):
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
            return [*lines, *upload(folder, tag, repo)]
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


def _write_tag(source: Path, tag: str, repo: str, folder: Path) -> list[str]:
    """Writes the repository of a published tag from its file, or from a conversion of that; returns the findings."""
    checkpoint, weights = load_checkpoint(source), WEIGHTS[tag]
    origin = _find_origin(source, checkpoint, weights)
    check_identity(checkpoint, tag, weights, origin)
    if 'upstream_sha256' not in origin:
        raise ValueError(f"the header of {source} does not say the SHA-256 of the authors' file of {tag}, which "
                         f'the card states: publish that file ({weights.url})')
    text = _describe_origin(weights, origin, 'a file' if 'layout' not in origin else None)
    return [f'{source.name}: {checkpoint.describe()}.',
            *_write_published(checkpoint, tag, repo, folder, (origin, text))]


def _write_own(trained: Trained, source: Path, repo: str, folder: Path, cfg: dict[str, Any]) -> list[str]:
    """Writes the repository of the user's weights, with what the files of the run say about them."""
    path, checkpoint = trained.path, trained.checkpoint
    origin = read_origin(path / MODEL if path.is_dir() else path)
    tag = next((t for t, w in WEIGHTS.items() if w.url == origin.get('url')), checkpoint and checkpoint.info.get('tag'))
    if tag:
        raise ValueError(f'{source} is marked as the published weights {tag}: publish them with --tag {tag}')
    if checkpoint is None:
        copy_export(path, folder, cfg)
        epochs = int(n) if (n := tensorfile.read_metadata(path / MODEL).get('epochs', '')).isdecimal() else None
    else:
        check_finite({**checkpoint.model_state(), **checkpoint.heads_state()}, path)
        export_checkpoint(checkpoint, folder, cfg, network=trained.network)
        epochs = checkpoint.info.get('epoch')
    (folder / TRAINING).unlink(missing_ok=True)
    history = read_history(source, epochs)
    if history:
        write_json(folder / TRAINING, history.to_json())
    _finish_repository(source, cfg['tag'], repo, folder, (OWN, cfg['license']), history)
    return [f'{trained.describe()}.']


def _write_published(
    checkpoint: Checkpoint, tag: str, repo: str, folder: Path, origin: tuple[dict[str, str], str],
) -> list[str]:
    """Writes the repository of a published file. `origin`: of its header, and in words."""
    weights, (header, text) = WEIGHTS[tag], origin
    cfg = {'tag': tag, 'license': weights.license, 'origin_url': weights.project}
    export_checkpoint(checkpoint, folder, cfg, make_origin(weights, header['upstream_sha256'], weights.layout))
    _finish_repository(tag, tag, repo, folder, (text, weights.license))
    return [f'Origin: {text}.']


def _finish_repository(
    source: Path | str, tag: str, repo: str, folder: Path, terms: tuple[str, str], history: History | None = None,
) -> None:
    """Checks that timm loads the folder; adds fingerprint and card. `terms`: origin and license."""
    config = read_whole_config(folder)
    try:  # as timm does: build what config.json names, and fill it strictly
        model = create_from_folder(folder)
        model.load_state_dict(read(folder / MODEL), strict=True)
        size = 224 if config['architecture'] == PLAIN_TIMM[NAME] else config['pretrained_cfg']['input_size'][-1]
        write_json(folder / FINGERPRINT, compute_fingerprint(model, size))
    except (RuntimeError, *TIMM_ERRORS) as e:
        raise ValueError(f'timm cannot load {source}: {one_line(e, 300)}') from e
    parameters = sum(p.numel() for p in model.parameters())
    origin, license = terms
    facts = CardFacts(tag, repo, config, parameters, origin, (folder / HEADS).exists(), license, history)
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

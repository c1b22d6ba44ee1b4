"""A checkpoint -> a Hub repository that timm, transformers and this package load, with a card and recorded hashes."""
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id

from ..runtime.files import write_json
from ..runtime.messages import one_line
from . import sources, tensorfile
from .card import CardFacts, format_card
from .export import export_checkpoint
from .layouts import Checkpoint, load_checkpoint
from .published import NAME, WEIGHTS, Weights
from .reading import read
from .tensorfile import CONFIG, HEADS, MODEL
from .verify import FINGERPRINT, compute_fingerprint, find_nonfinite

BACKBONE_ENTRIES, HEAD_ENTRIES = 318, (16, 8)  # ResNet-50 without classifier; projector, predictor
UPSTREAM_LAYOUTS = {w.layout for w in WEIGHTS.values()}
OWN = "the uploader's own training, not a published file"


def publish(source: str | Path, tag: str, dry_run: str | Path | None = None, license: str | None = None) -> str:
    """Writes config.json, model.safetensors, heads.safetensors, fingerprint.json and README.md, and uploads them.

    Args:
        source: a checkpoint in any layout that `load_checkpoint` knows, or a folder exported for timm.
        tag: a key of WEIGHTS, whose row the source is checked against, or any other tag for weights of your own.
        dry_run: a folder to write the repository into instead of uploading it.
        license: the Hub's id of the license of your own weights ('mit', 'apache-2.0', ...).

    Returns:
        A report of what was checked, what could not be checked, and where the repository is.

    Raises:
        ValueError: the source does not match the tag, is incomplete, or holds NaN or infinity.
        FileNotFoundError: the source does not exist.
        RuntimeError: the upload failed.
    """
    source, tag = Path(source), tag.removeprefix(f'{NAME}.')
    weights = WEIGHTS.get(tag)
    if weights is None and not license:
        raise ValueError(
            f'{tag!r} is not a published tag ({", ".join(WEIGHTS)}); to publish weights of your own, name their '
            'license: --license apache-2.0')
    if weights and license and license != weights.license:
        raise ValueError(f'{tag} is published by its authors under {weights.license}: leave --license out')
    if dry_run is None and get_token() is None:
        raise RuntimeError('no Hugging Face token: run `hf auth login` or set HF_TOKEN (--dry-run FOLDER needs none)')
    if not source.exists():
        raise FileNotFoundError(f'{source} does not exist: name a checkpoint or an exported folder')
    license = license or weights.license
    repo = sources.hub_id(f'{_choose_name(source, weights)}.{tag}')
    validate_repo_id(repo)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(dry_run or temporary)
        lines = _write_repository(source, tag, repo, folder, license)
        if dry_run is None:
            lines += _upload(folder, tag, repo)
        else:
            lines.append(f'Wrote {folder} and uploaded nothing; the repository would be {repo}.')
    return '\n'.join(lines)


def _choose_name(source: Path, weights: Weights | None) -> str:
    """Returns the first part of the repository's name: NAME for any ResNet-50, else a name with the architecture."""
    if weights or not source.is_dir():
        return NAME
    architecture = _read_config(source)['architecture']
    return architecture if architecture.startswith('simsiam_') else f'simsiam_{architecture}'


def _write_repository(source: Path, tag: str, repo: str, folder: Path, license: str | None) -> list[str]:
    """Writes the repository's files; returns the findings about the source."""
    weights = WEIGHTS.get(tag)
    if weights is None and source.is_dir():
        lines, origin = [], OWN
        _copy_export(source, folder, {'tag': tag, 'license': license})
    else:
        lines, origin = _convert(source, tag, folder, license)
    config = _read_config(folder)
    try:  # as timm does: build what config.json names, and fill it strictly
        model = timm.create_model(
            config['architecture'], num_classes=config['num_classes'], **config.get('model_args', {}))
        model.load_state_dict(read(folder / MODEL), strict=True)
    except RuntimeError as e:
        raise ValueError(f'timm cannot load {source}: {one_line(e, 300)}') from e
    write_json(folder / FINGERPRINT, compute_fingerprint(model))
    facts = CardFacts(
        tag, repo, config, parameters=sum(p.numel() for p in model.parameters()), origin=origin,
        heads=(folder / HEADS).exists(), license=license)
    (folder / 'README.md').write_text(format_card(facts), encoding='utf-8')
    return lines


def _convert(source: Path, tag: str, folder: Path, license: str | None) -> tuple[list[str], str]:
    """Checks and exports a checkpoint; returns the findings and the sentence about its origin."""
    weights, checkpoint, origin = WEIGHTS.get(tag), load_checkpoint(source), OWN
    lines = [f'{source.name}: {checkpoint.describe()}.']
    cfg = {'tag': tag, 'license': license}
    if weights:
        _check_parts(checkpoint, tag, weights)
        origin = _trace_origin(source, checkpoint, tag, weights)
        lines.append(f'Origin: {origin}.')
        cfg['origin_url'] = weights.url
    _check_finite({**checkpoint.model_state(), **checkpoint.heads_state()}, source)
    export_checkpoint(checkpoint, folder, pretrained_cfg=cfg)
    return lines, origin


def _check_parts(checkpoint: Checkpoint, tag: str, weights: Weights) -> None:
    """Checks that the file has the layout, the parts and the epoch of the tag."""
    if checkpoint.layout in UPSTREAM_LAYOUTS and checkpoint.layout != weights.layout:
        raise ValueError(f'the file has the layout {checkpoint.layout}, {tag} is a file of the layout {weights.layout}')
    if len(checkpoint.backbone) != BACKBONE_ENTRIES:
        raise ValueError(
            f'the backbone has {len(checkpoint.backbone)} entries, a ResNet-50 has {BACKBONE_ENTRIES}: the file is '
            'incomplete, or of another architecture')
    classes = len(checkpoint.classifier['weight']) if 'weight' in (checkpoint.classifier or {}) else 0
    if classes != weights.num_classes:
        raise ValueError(
            f'the file has {f"a classifier of {classes} classes" if classes else "no classifier"}, {tag} has '
            f'{f"one of {weights.num_classes} classes" if weights.linear else "none"}')
    heads = (len(checkpoint.projector or ()), len(checkpoint.predictor or ()))
    upstream = checkpoint.layout == weights.layout  # a conversion by others may lack the heads
    if not weights.linear and heads != HEAD_ENTRIES and (upstream or heads != (0, 0)):
        raise ValueError(
            f'projector and predictor have {heads[0]} and {heads[1]} entries, those of {tag} have '
            f'{HEAD_ENTRIES[0]} and {HEAD_ENTRIES[1]}: the file is incomplete')
    epoch = checkpoint.info.get('epoch')  # FAIR's file names hold no hash
    if checkpoint.layout == 'fair' and isinstance(epoch, int) and epoch != weights.epochs:
        raise ValueError(f'the file states epoch {epoch}, but {tag} was trained for {weights.epochs} epochs')


def _check_finite(tensors: dict[str, Any], source: Path) -> None:
    if bad := find_nonfinite(tensors):
        raise ValueError(f'{source} holds NaN or infinity in {len(bad)} tensors ({", ".join(bad[:3])}): not published')


def _trace_origin(source: Path, checkpoint: Checkpoint, tag: str, weights: Weights) -> str:
    """Says which file these weights come from, and whether that was verified."""
    if source.is_dir() or checkpoint.layout != weights.layout:
        return (
            f'converted from a file that had already been converted (layout {checkpoint.layout}), so that it could not '
            "be compared with the hash of the authors' own file")
    sha256 = tensorfile.hash_file(source)
    if weights.sha256_prefix is None:
        return (
            f'converted from a file with the SHA-256 {sha256}; its authors publish no hash to compare it with, so that '
            'its identity is not verified')
    if not sha256.startswith(weights.sha256_prefix):
        raise ValueError(
            f'{source} has the SHA-256 {sha256[:12]}..., that of {tag} begins with {weights.sha256_prefix}: it is '
            'another file, or a damaged one')
    return (
        f"converted from the authors' own file, whose SHA-256 {sha256} begins with {weights.sha256_prefix}, as its "
        'name promises')


def _copy_export(source: Path, folder: Path, cfg: dict[str, Any]) -> None:
    """Copies an exported folder of any architecture and adds `cfg` to its pretrained_cfg."""
    if source.resolve() == folder.resolve():
        raise ValueError(f'{folder} is the source itself: write the dry run to another folder')
    config = _read_config(source)
    config['pretrained_cfg'].update(cfg)
    config.get('model_args', {}).pop('num_classes', None)  # transformers passes it too, and fails
    folder.mkdir(parents=True, exist_ok=True)
    for name in (MODEL, HEADS):
        (folder / name).unlink(missing_ok=True)
        if name == MODEL or (source / name).exists():
            _check_finite(read(source / name), source / name)
            shutil.copyfile(source / name, folder / name)
    write_json(folder / CONFIG, config)


def _read_config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / CONFIG).read_text())
    if not {'architecture', 'num_classes', 'num_features', 'pretrained_cfg'} <= set(config):
        raise ValueError(
            f'{folder / CONFIG} is not that of a model exported for timm: it has only {", ".join(config)}')
    return config


def _upload(folder: Path, tag: str, repo: str) -> list[str]:
    names = ('README.md', CONFIG, FINGERPRINT, MODEL, HEADS)
    names = [name for name in names if (folder / name).exists()]
    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=names, commit_message='Upload weights and card')
    except Exception as e:  # requests in huggingface_hub 0.36, httpx in 1.x and 2.x: no common base class
        raise RuntimeError(f'{repo} was not uploaded: {_explain_failure(e, repo)}') from e
    record = {
        'repo': repo, 'revision': commit.oid, 'files': {n: tensorfile.hash_file(folder / n) for n in names},
        'fingerprint': json.loads((folder / FINGERPRINT).read_text())}
    lines = [f'Uploaded {", ".join(names)} to {repo} (revision {commit.oid}).']
    return lines + pin_upload(tag, record) if tag in WEIGHTS else lines


def _explain_failure(e: Exception, repo: str) -> str:
    status = getattr(getattr(e, 'response', None), 'status_code', None)
    if status in (401, 403):
        return (
            f'the Hub refuses the token ({status}): it needs write access to the namespace {repo.split("/")[0]} '
            '(SIMSIAM_HUB_NAMESPACE names another)')
    return one_line(f'{type(e).__name__}: {e}', 300)


def pin_upload(tag: str, record: dict[str, Any]) -> list[str]:
    """Pins an upload, so that every later download is checked against it."""
    path = sources.PINS
    try:
        write_json(path, {**json.loads(path.read_text()), tag: record})
    except (OSError, ValueError) as e:  # the upload is done, and its hashes must not get lost
        return [f'{path} cannot be written ({e}); add this to it:', json.dumps({tag: record}, indent=2)]
    return [f'Recorded revision and hashes in {path}: commit that file.']

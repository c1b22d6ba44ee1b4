"""A checkpoint -> a Hub repository that timm, transformers and this package load, with a card and recorded hashes."""
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id

from . import sources, tensorfile
from .card import model_card
from .export import export_checkpoint
from .layouts import Checkpoint, load_checkpoint
from .published import WEIGHTS, Weights
from .reading import read
from .verify import FINGERPRINT, fingerprint

NAME = 'simsiam_resnet50'
BACKBONE_ENTRIES, HEAD_ENTRIES = 318, (16, 8)  # of a ResNet-50 without classifier; of projector and predictor
UPSTREAM_LAYOUTS = {w.layout for w in WEIGHTS.values()}


def publish(source: str | Path, tag: str, dry_run: str | Path | None = None, license: str | None = None) -> str:
    """Write config.json, model.safetensors, heads.safetensors, fingerprint.json and README.md, and upload them.

    Args:
        source: a checkpoint in any layout that `load_checkpoint` knows, or a folder that was exported for timm.
        tag: a key of WEIGHTS: the source is held against its row. Any other tag is for weights of your own.
        dry_run: write the repository into this folder and upload nothing.
        license: the Hub's id of the license of your own weights ('mit', 'apache-2.0', ...).

    Returns:
        What was checked, what could not be checked, and where the repository is.

    Raises:
        ValueError: the source is not what the tag says, or is incomplete, or holds NaN or infinity.
        FileNotFoundError: there is no source.
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
    repo = sources.hub_id(f'{_name(source, weights)}.{tag}')
    validate_repo_id(repo)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(dry_run or temporary)
        lines = _write(source, tag, weights, repo, folder, license)
        if dry_run is None:
            lines += _upload(folder, tag, repo)
        else:
            lines.append(f'Wrote {folder} and uploaded nothing: it would become {repo}.')
    return '\n'.join(lines)


def _name(source: Path, weights: Weights | None) -> str:
    """The first part of the repository's name: only a ResNet-50 is called one."""
    if weights or not source.is_dir():
        return NAME
    architecture = _exported_config(source)['architecture']
    return architecture if architecture.startswith('simsiam_') else f'simsiam_{architecture}'


def _write(
    source: Path, tag: str, weights: Weights | None, repo: str, folder: Path, license: str | None,
) -> list[str]:
    """The repository's files; returns what was found out about the source."""
    lines, upstream = [], "the uploader's own training, not a published file"
    cfg = {'tag': tag, 'license': license}
    if weights is None and source.is_dir():
        _copy_export(source, folder, cfg)
    else:
        checkpoint = load_checkpoint(source)
        lines = [f'{source.name}: {checkpoint.describe()}.']
        if weights:
            _check(checkpoint, tag, weights)
            upstream = _upstream(source, checkpoint, tag, weights)
            lines.append(f'Origin: {upstream}.')
            license = weights.license
            cfg = {'tag': tag, 'license': license, 'origin_url': weights.url}
        _check_finite({**checkpoint.model_state(), **checkpoint.heads_state()}, source)
        export_checkpoint(checkpoint, folder, pretrained_cfg=cfg)
    config = json.loads((folder / 'config.json').read_text())
    try:  # as timm will: what config.json names, filled strictly
        model = timm.create_model(
            config['architecture'], num_classes=config['num_classes'], **config.get('model_args', {}))
        model.load_state_dict(read(folder / sources.MODEL), strict=True)
    except RuntimeError as e:
        raise ValueError(f'timm cannot load {source}: {" ".join(str(e).split())[:300]}') from e
    (folder / FINGERPRINT).write_text(json.dumps(fingerprint(model), indent=2) + '\n')
    parameters = sum(p.numel() for p in model.parameters())
    heads = (folder / sources.HEADS).exists()
    (folder / 'README.md').write_text(
        model_card(tag, repo, config, parameters, upstream, heads, license), encoding='utf-8')
    return lines


def _check(checkpoint: Checkpoint, tag: str, weights: Weights) -> None:
    """Is this the kind of file that the tag names?"""
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
            f'{f"one of {weights.num_classes} classes" if weights.num_classes else "none"}')
    heads = (len(checkpoint.projector or ()), len(checkpoint.predictor or ()))
    upstream = checkpoint.layout == weights.layout  # somebody's conversion may have left the heads out
    if not weights.num_classes and heads != HEAD_ENTRIES and (upstream or heads != (0, 0)):
        raise ValueError(
            f'projector and predictor have {heads[0]} and {heads[1]} entries, those of {tag} have '
            f'{HEAD_ENTRIES[0]} and {HEAD_ENTRIES[1]}: the file is incomplete')
    epoch = checkpoint.info.get('epoch')
    if checkpoint.layout == 'fair' and isinstance(epoch, int) and epoch != weights.epochs:  # FAIR's names carry no hash
        raise ValueError(f'the file says that it is from epoch {epoch}, {tag} was trained for {weights.epochs} epochs')


def _check_finite(tensors: dict[str, Any], source: Path) -> None:
    bad = [k for k, v in tensors.items() if not v.isfinite().all()]
    if bad:
        raise ValueError(f'{source} holds NaN or infinity in {len(bad)} tensors ({", ".join(bad[:3])}): not published')


def _upstream(source: Path, checkpoint: Checkpoint, tag: str, weights: Weights) -> str:
    """Which file these weights come from, and whether that was checked."""
    if source.is_dir() or checkpoint.layout != weights.layout:
        return (
            f'converted from a file that had already been converted (layout {checkpoint.layout}), so that it could not '
            "be held against the hash of the authors' own file")
    sha256 = tensorfile.file_sha256(source)
    if weights.sha256_prefix is None:
        return (
            f'converted from a file with the SHA-256 {sha256}; its authors publish no hash to hold it against, so that '
            'its identity is not verified')
    if not sha256.startswith(weights.sha256_prefix):
        raise ValueError(
            f'{source} has the SHA-256 {sha256[:12]}..., that of {tag} begins with {weights.sha256_prefix}: it is '
            'another file, or a damaged one')
    return (
        f"converted from the authors' own file, whose SHA-256 {sha256} begins with the {weights.sha256_prefix} that "
        'its name carries')


def _copy_export(source: Path, folder: Path, cfg: dict[str, Any]) -> None:
    """An exported folder of any architecture, as it is, with `cfg` in its pretrained_cfg."""
    if source.resolve() == folder.resolve():
        raise ValueError(f'{folder} is the source itself: write the dry run to another folder')
    config = _exported_config(source)
    config['pretrained_cfg'].update(cfg)
    config.get('model_args', {}).pop('num_classes', None)  # transformers passes it too, and fails
    folder.mkdir(parents=True, exist_ok=True)
    for name in (sources.MODEL, sources.HEADS):
        (folder / name).unlink(missing_ok=True)
        if name == sources.MODEL or (source / name).exists():
            _check_finite(read(source / name), source / name)
            shutil.copyfile(source / name, folder / name)
    (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')


def _exported_config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / 'config.json').read_text())
    if not {'architecture', 'num_classes', 'num_features', 'pretrained_cfg'} <= set(config):
        raise ValueError(
            f'{folder / "config.json"} is not that of a model exported for timm: it has {", ".join(config)}')
    return config


def _upload(folder: Path, tag: str, repo: str) -> list[str]:
    names = ('README.md', 'config.json', FINGERPRINT, sources.MODEL, sources.HEADS)
    names = [name for name in names if (folder / name).exists()]
    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=names, commit_message='Upload weights and card')
    except Exception as e:  # requests in huggingface_hub 0.36, httpx in 1.x, another httpx in 2.x: no common base
        raise RuntimeError(f'{repo} was not uploaded: {_reason(e, repo)}') from e
    record = {
        'repo': repo, 'revision': commit.oid, 'files': {n: tensorfile.file_sha256(folder / n) for n in names},
        'fingerprint': json.loads((folder / FINGERPRINT).read_text())}
    lines = [f'Uploaded {", ".join(names)} to {repo} (revision {commit.oid}).']
    return lines + _record(tag, record) if tag in WEIGHTS else lines


def _reason(e: Exception, repo: str) -> str:
    status = getattr(getattr(e, 'response', None), 'status_code', None)
    if status in (401, 403):
        return (
            f'the Hub refuses the token ({status}): it needs write access to the namespace {repo.split("/")[0]} '
            '(SIMSIAM_HUB_NAMESPACE names another)')
    return ' '.join(f'{type(e).__name__}: {e}'.split())[:300]


def _record(tag: str, record: dict[str, Any]) -> list[str]:
    """Pin what was uploaded, so that every later download is held against it."""
    path = sources.PINS
    try:
        pins = {**json.loads(path.read_text()), tag: record}
        part = path.with_name(path.name + '.part')
        part.write_text(json.dumps(pins, indent=2) + '\n')
        os.replace(part, path)
    except (OSError, ValueError) as e:  # the upload is done and its hashes must not get lost
        return [f'{path} cannot be written ({e}); put this into it:', json.dumps({tag: record}, indent=2)]
    return [f'Recorded revision and hashes in {path}: commit that file.']

"""Publishes a checkpoint as a Hub repository that timm, transformers and this package load, with a card and hashes."""
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
from .folders import DESCRIPTION, read_config, read_json
from .layouts import Checkpoint, load_checkpoint
from .published import NAME, WEIGHTS, Weights
from .reading import find_export, read, require_safetensors
from .tensorfile import CONFIG, HEADS, MODEL
from .verify import FINGERPRINT, compute_fingerprint, find_nonfinite

BACKBONE_ENTRIES, HEAD_ENTRIES = 318, (16, 8)  # ResNet-50 without classifier; projector, predictor


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
    if dry_run is None and get_token() is None:
        raise RuntimeError('no Hugging Face token: run `hf auth login` or set HF_TOKEN (--dry-run FOLDER needs none)')
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


def _write_repository(source: Path, tag: str, repo: str, folder: Path, license: str) -> list[str]:
    """Writes the repository's files; returns the findings about the source."""
    lines, origin, cfg = [], "the uploader's own training, not a published file", {'tag': tag, 'license': license}
    if tag not in WEIGHTS and source.is_dir():
        _copy_export(source, folder, cfg)
    else:
        checkpoint = load_checkpoint(source)
        lines.append(f'{source.name}: {checkpoint.describe()}.')
        if weights := WEIGHTS.get(tag):
            _check_parts(checkpoint, tag, weights)
            origin = _trace_origin(source, checkpoint, tag, weights)
            lines.append(f'Origin: {origin}.')
            cfg['origin_url'] = weights.url
        _check_finite({**checkpoint.model_state(), **checkpoint.heads_state()}, source)
        export_checkpoint(checkpoint, folder, cfg)
    config = _read_config(folder)
    try:  # as timm does: build what config.json names, and fill it strictly
        network = read_config(folder)
        model = timm.create_model(network.name, num_classes=config['num_classes'], **network.args)
        model.load_state_dict(read(folder / MODEL), strict=True)
    except RuntimeError as e:
        raise ValueError(f'timm cannot load {source}: {one_line(e, 300)}') from e
    write_json(folder / FINGERPRINT, compute_fingerprint(model))
    parameters = sum(p.numel() for p in model.parameters())
    facts = CardFacts(tag, repo, config, parameters, origin, (folder / HEADS).exists(), license)
    (folder / 'README.md').write_text(format_card(facts), encoding='utf-8')
    return lines


def _check_parts(checkpoint: Checkpoint, tag: str, weights: Weights) -> None:
    """Checks that the file has the layout, the parts and the epoch of the tag."""
    upstream = checkpoint.layout == weights.layout  # a conversion by others may lack the heads
    if not upstream and checkpoint.layout in {w.layout for w in WEIGHTS.values()}:
        raise ValueError(f'the file has the layout {checkpoint.layout}, {tag} is a file of the layout {weights.layout}')
    if len(checkpoint.backbone) != BACKBONE_ENTRIES:
        raise ValueError(f'the backbone has {len(checkpoint.backbone)} entries, a ResNet-50 has {BACKBONE_ENTRIES}: '
                         'the file is incomplete, or of another architecture')
    classes = len(checkpoint.model_state().get('fc.weight', ()))
    if classes != weights.num_classes:
        raise ValueError(f'the file has {f"a classifier of {classes} classes" if classes else "no classifier"}, {tag} '
                         f'has {f"one of {weights.num_classes} classes" if weights.linear else "none"}')
    heads = (len(checkpoint.projector or ()), len(checkpoint.predictor or ()))
    if not weights.linear and heads != HEAD_ENTRIES and (upstream or heads != (0, 0)):
        raise ValueError(f'projector and predictor have {heads[0]} and {heads[1]} entries, those of {tag} have '
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
        return (f'converted from a file that had already been converted (layout {checkpoint.layout}), so that it could '
                "not be compared with the hash of the authors' own file")
    sha256, prefix = tensorfile.hash_file(source), weights.sha256_prefix
    if prefix is None:
        return (f'converted from a file with the SHA-256 {sha256}; its authors publish no hash to compare it with, so '
                'that its identity is not verified')
    if not sha256.startswith(prefix):
        raise ValueError(f'{source} has the SHA-256 {sha256[:12]}..., that of {tag} begins with {prefix}: it is '
                         'another file, or a damaged one')
    return f"converted from the authors' own file, whose SHA-256 {sha256} begins with {prefix}, as its name promises"


def _copy_export(source: Path, folder: Path, cfg: dict[str, Any]) -> None:
    """Copies an exported folder of any architecture and adds `cfg` to its pretrained_cfg."""
    if source.resolve() == folder.resolve():
        raise ValueError(f'{folder} is the source itself: write the dry run to another folder')
    config = _read_config(source)
    config['pretrained_cfg'] = {k: v for k, v in config['pretrained_cfg'].items() if k in DESCRIPTION} | cfg
    config.get('model_args', {}).pop('num_classes', None)  # transformers passes it too, and fails
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
    return config


def _upload(folder: Path, tag: str, repo: str) -> list[str]:
    names = [name for name in ('README.md', CONFIG, FINGERPRINT, MODEL, HEADS) if (folder / name).exists()]
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

"""Checks that weights are undamaged, complete and finite, and compute the outputs recorded at their publication."""
import re
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..runtime.messages import one_line
from . import sources, tensorfile
from .folders import read_json
from .identity import check_identity, read_origin
from .layouts import Checkpoint, load_checkpoint
from .published import NAME, WEIGHTS, find_tag, hub_id
from .reading import find_export, is_safetensors, read_head, require_safetensors
from .tensorfile import CONFIG, HEADS, MODEL

FINGERPRINT = 'fingerprint.json'
# The largest deviation of an output, in units of the outputs' standard deviation, that rounding explains.
# Measured on a random ResNet-50: 3e-6 between thread counts and memory formats, 6e-3 in float16, 4e-2 in bfloat16, and
# 0.26 for a stem with red and blue exchanged.
TOLERANCE = {'float32': 1e-4, 'float16': 2e-2, 'bfloat16': 1e-1}
MARKS = {True: 'ok  ', False: 'FAIL', None: '    '}
Finding = tuple[bool | None, str]  # passed, failed or merely noted; what was found


def make_test_image(size: int = 224) -> Tensor:
    """Returns an image (1, 3, size, size) in [-2, 2]: waves of three directions, the same on any machine."""
    t = torch.arange(size, dtype=torch.float64) / size
    y, x = torch.meshgrid(t, t, indexing='ij')
    waves = [torch.sin(23 * x + 7 * y) + torch.sin(5 * x * (c + 1) - 41 * y * y + c) for c in range(3)]
    return torch.stack(waves)[None].float()


def compute_fingerprint(model: nn.Module, size: int = 224) -> dict[str, Any]:
    """Returns mean, std and 16 of the outputs of `model`, in evaluation mode, for the test image of `size` pixels."""
    training = model.training
    with torch.inference_mode():
        y = model.eval()(make_test_image(size).to(next(model.parameters()))).flatten().double().cpu()
    model.train(training)
    picked = y[torch.linspace(0, len(y) - 1, 16).long()]
    return {'mean': y.mean().item(), 'std': y.std().item(), 'outputs': picked.tolist()}


def compare_fingerprints(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Returns the largest difference in units of the first one's std; inf if the two cannot be compared."""
    try:
        x, y = (torch.tensor([f['mean'], f['std'], *f['outputs']], dtype=torch.float64) for f in (a, b))
    except (KeyError, TypeError, ValueError):  # a file with other contents
        return float('inf')
    if x.shape != y.shape or not bool((x.isfinite() & y.isfinite()).all()) or a['std'] <= 0:
        return float('inf')
    return float((x - y).abs().max() / a['std'])


def verify(target: str, dtype: str = 'float32') -> tuple[bool, list[str]]:
    """Checks hash, origin, keys, values and outputs of a tag, which is downloaded if no cache has it, or of a file.

    A hash or a fingerprint passes only if it equals one from another source than the weights; what the same source
    says is noted. `dtype` (float32, float16, bfloat16) is the type in which the outputs are computed. Returns whether
    no check failed, and a line for each. Raises FileNotFoundError, ValueError or RuntimeError if there is nothing to
    check.
    """
    tag = target.removeprefix(f'{NAME}.')
    published = tag in WEIGHTS and not Path(target).exists()
    path, findings = _check_published(tag) if published else _check_file(Path(target))
    if not any(ok is False for ok, _ in findings):  # a damaged file has nothing more to say
        checkpoint = load_checkpoint(path)
        findings.append((None, checkpoint.describe()))
        if not published:
            findings += _check_claims(path, checkpoint)
        findings += _check_model(checkpoint, path, sources.read_pin(f'{NAME}.{tag}') if published else {}, dtype)
    return all(ok is not False for ok, _ in findings), [f'{MARKS[ok]} {text}' for ok, text in findings]


def _check_model(checkpoint: Checkpoint, path: Path, pin: dict[str, Any], dtype: str) -> list[Finding]:
    """Checks entries, values and outputs."""
    state = checkpoint.model_state()
    try:
        if 'layer1.0.conv3.weight' not in state:
            raise RuntimeError('the entries belong to another network than ResNet-50, the only one that is verified')
        model = timm.create_model(NAME, num_classes=len(state.get('fc.weight', ())))
        model.load_state_dict(state, strict=True)
    except RuntimeError as e:
        return [(False, f'keys: {one_line(e)}')]
    bad = tensorfile.find_nonfinite({**state, **checkpoint.heads_state()})
    found = compute_fingerprint(model.to(getattr(torch, dtype)))
    return [
        (True, f'keys: all {len(model.state_dict())} entries are present and fit'),
        (not bad, f'values: {", ".join(bad[:3])} not finite' if bad else 'values: all finite'),
        (found['std'] > 0, f'outputs: mean {found["mean"]:.4g}, std {found["std"]:.4g} for a generated image'),
        _check_fingerprint(found, path, pin, TOLERANCE[dtype])]


def _check_fingerprint(found: dict[str, Any], path: Path, pin: dict[str, Any], tolerance: float) -> Finding:
    file = (path / MODEL if path.is_dir() else path).with_name(FINGERPRINT)
    if expected := pin.get('fingerprint'):
        whose, passed = 'the pinned one', True
    elif (path.is_dir() or path.name == MODEL) and file.exists():
        whose, passed, expected = 'the one beside the weights, which comes from the same source', None, read_json(file)
    else:
        return None, 'fingerprint: none to compare with'
    d = compare_fingerprints(expected, found)
    return passed if d <= tolerance else False, f'fingerprint: {d:.1e} from {whose} (tolerance {tolerance:g})'


def _check_published(tag: str) -> tuple[Path, list[Finding]]:
    name, weights = f'{NAME}.{tag}', WEIGHTS[tag]
    finding: Finding
    path = sources.fetch(name, weights)  # raises if the hash is wrong, or the file cannot be the tag's
    if path.name == MODEL:
        repo = hub_id(name)
        if sources.is_pinned(name):
            revision = sources.read_pin(name)['revision']
            finding = True, f'hash: equals the one pinned for {repo} at revision {revision[:12]}, {path}'
        else:
            finding = None, (f'hash: the one that {repo} itself states, which proves only the download; no independent '
                             f'reference shows that these are the published weights, {path}')
    else:
        sha256, prefix = read_origin(path)['upstream_sha256'], weights.sha256_prefix
        text = f"hash: the authors' file, {weights.url}, had the SHA-256 {sha256}"
        if prefix:
            finding = sha256.startswith(prefix), f'{text}; the published one begins with {prefix}'
        else:
            finding = None, (f'{text}; its authors publish none, so there is no independent reference, but a later '
                             f'download must have the same ({sources.name_record(weights.url)})')
    return path, [finding, (True, f'row: layout, classes and shapes are those of {tag}, {path}')]


def _check_file(path: Path) -> tuple[Path, list[Finding]]:
    if not path.exists():
        raise FileNotFoundError(f'{path} is neither a file nor a tag; the tags are {", ".join(WEIGHTS)}')
    file = find_export(path) if path.is_dir() else path
    heads = [path / HEADS] if (path / HEADS).exists() else []
    if is_safetensors(read_head(file)):
        for part in (file, *heads):
            require_safetensors(part)
            if not tensorfile.is_whole(part):
                return path, [(False, f'hash: the contents of {part} do not match its header: it is damaged')]
        has_hash = tensorfile.CONTENT in tensorfile.read_metadata(file)
        text = 'the contents match the one in the header: undamaged' if has_hash else 'the header has none'
        return path, [(None, f'hash: {text}')]
    text = f'hash: the SHA-256 is {(sha256 := tensorfile.hash_file(file))}'
    promise = re.search(r'-([0-9a-f]{8})\.pth$', file.name)  # as OpenMMLab and torch.hub name their files
    if tag := find_tag(file):
        return path, [(True, f'{text}, and that of {tag} begins with {WEIGHTS[tag].sha256_prefix}, as published')]
    if promise and not sha256.startswith(promise[1]):
        return path, [(False, f'{text}, but its name promises {promise[1]}: the file is damaged, or another one')]
    return path, [(None, f'{text}; there is no independent reference to compare it with')]


def _check_claims(path: Path, checkpoint: Checkpoint) -> list[Finding]:
    """Compares a file with the row of the tag that its header, or config.json beside it, names."""
    origin = read_origin(path / MODEL if path.is_dir() else path)
    tags = [tag for tag, weights in WEIGHTS.items() if weights.url == origin.get('url')]
    config = read_json(path / CONFIG) if (path / CONFIG).exists() else {}
    cfg = config.get('pretrained_cfg')
    named = cfg.get('tag') if isinstance(cfg, dict) else None
    findings: list[Finding] = []
    for tag in dict.fromkeys([*tags, *([named] if isinstance(named, str) and named in WEIGHTS else [])]):
        try:
            check_identity(checkpoint, tag, WEIGHTS[tag], {'layout': WEIGHTS[tag].layout, **origin})
            findings.append((None, f'origin: claims to be {tag}; layout, classes and shapes agree, which is no proof'))
        except ValueError as e:
            findings.append((False, f'origin: claims to be {tag}, but {e}'))
    return findings

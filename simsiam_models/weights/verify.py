"""Checks that weights are undamaged, complete and finite, and compute the outputs recorded at their publication."""
import json
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..runtime.messages import one_line
from . import sources, tensorfile
from .layouts import load_checkpoint
from .published import NAME, WEIGHTS
from .tensorfile import MODEL

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


def compute_fingerprint(model: nn.Module) -> dict[str, Any]:
    """Returns mean, std and 16 of the outputs of `model`, in evaluation mode, for the test image."""
    training = model.training
    with torch.inference_mode():
        y = model.eval()(make_test_image().to(next(model.parameters()))).flatten().double().cpu()
    model.train(training)
    picked = y[torch.linspace(0, len(y) - 1, 16).long()]
    return {'mean': y.mean().item(), 'std': y.std().item(), 'outputs': picked.tolist()}


def compare_fingerprints(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Returns the largest difference in units of the first one's std; inf if the two cannot be compared."""
    x, y = (torch.tensor([f['mean'], f['std'], *f['outputs']], dtype=torch.float64) for f in (a, b))
    if x.shape != y.shape or not bool((x.isfinite() & y.isfinite()).all()) or a['std'] <= 0:
        return float('inf')
    return ((x - y).abs().max() / a['std']).item()


def find_nonfinite(tensors: dict[str, Tensor]) -> list[str]:
    """Returns the names of the tensors that hold NaN or infinity."""
    return [k for k, v in tensors.items() if not v.isfinite().all()]


def verify(target: str, dtype: str = 'float32') -> tuple[bool, list[str]]:
    """Checks hash, keys, values and fingerprint of a tag, which is downloaded if no cache has it, or of a checkpoint.

    `dtype` (float32, float16, bfloat16) is the type in which the outputs are computed. Returns whether all checks
    passed, and a line for each. Raises FileNotFoundError, ValueError or RuntimeError if there is nothing to check.
    """
    tag = target.removeprefix(f'{NAME}.')
    if tag in WEIGHTS and not Path(target).exists():
        path, findings = _check_published(tag)
        expected = sources.read_pin(f'{NAME}.{tag}').get('fingerprint')
    else:
        path, findings, expected = Path(target), _check_file(Path(target)), None
    checkpoint = load_checkpoint(path)
    findings.append((None, checkpoint.describe()))
    state = checkpoint.model_state()
    try:
        if 'layer1.0.conv3.weight' not in state:
            raise RuntimeError('the entries belong to another network than ResNet-50, the only one that is verified')
        model = timm.create_model(NAME, num_classes=len(state.get('fc.weight', ())))
        model.load_state_dict(state, strict=True)
    except RuntimeError as e:
        findings.append((False, f'keys: {one_line(e)}'))
    else:
        findings.append((True, f'keys: all {len(model.state_dict())} entries are present and fit'))
        bad = find_nonfinite({**state, **checkpoint.heads_state()})
        findings.append((not bad, f'values: {", ".join(bad[:3])} not finite' if bad else 'values: all finite'))
        file = (path / MODEL if path.is_dir() else path).with_name(FINGERPRINT)
        if not expected and (path.is_dir() or path.name == MODEL) and file.exists():
            expected = json.loads(file.read_text())
        found = compute_fingerprint(model.to(getattr(torch, dtype)))
        text = f'outputs: mean {found["mean"]:.4g}, std {found["std"]:.4g} for a generated image'
        comparison = None, 'fingerprint: none was published to compare with'
        if expected is not None:
            d, tolerance = compare_fingerprints(expected, found), TOLERANCE[dtype]
            comparison = d <= tolerance, f'fingerprint: {d:.1e} from the published one (tolerance {tolerance:g})'
        findings += [(found['std'] > 0, text), comparison]
    return all(ok is not False for ok, _ in findings), [f'{MARKS[ok]} {text}' for ok, text in findings]


def _check_published(tag: str) -> tuple[Path, list[Finding]]:
    path = sources.fetch(f'{NAME}.{tag}', WEIGHTS[tag])  # checks the hash, and raises if it is wrong
    if path.name == MODEL:
        return path, [(True, f'hash: from the Hub, {path}')]
    known, prefix = tensorfile.read_metadata(path), WEIGHTS[tag].sha256_prefix
    promise = f', its name promises {prefix}' if prefix else ' (its authors publish none to compare with)'
    return path, [
        (True, f'hash: converted from {known.get("url", "?")}, {path}'),
        (None, f'sha256 of the upstream file {known.get("upstream_sha256")}{promise}')]


def _check_file(path: Path) -> list[Finding]:
    if not path.exists():
        raise FileNotFoundError(f'{path} is neither a file nor a tag; the tags are {", ".join(WEIGHTS)}')
    file = path / MODEL if path.is_dir() else path
    if file.suffix != '.safetensors':
        return [(None, f'sha256 {tensorfile.hash_file(file)} (nothing to compare it with)')]
    if not tensorfile.is_whole(file):
        return [(False, 'hash: the contents do not match the header')]
    has_hash = tensorfile.CONTENT in tensorfile.read_metadata(file)
    return [(True, f'hash: the {"contents match the hash in the header" if has_hash else "header holds none"}')]

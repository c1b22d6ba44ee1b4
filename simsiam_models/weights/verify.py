"""Are these weights whole, complete and sane, and do they compute what they computed when they were published?"""
import json
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from . import sources, tensorfile
from .layouts import Checkpoint, load_checkpoint
from .published import WEIGHTS

FINGERPRINT = 'fingerprint.json'
# Largest deviation of an output, in units of the outputs' standard deviation, that rounding explains.
# Measured on a random ResNet-50: 3e-6 between thread counts and memory formats, 6e-3 in float16, 4e-2 in bfloat16, and
# 0.26 for a stem with red and blue exchanged.
TOLERANCE = {'float32': 1e-4, 'float16': 2e-2, 'bfloat16': 1e-1}


def generated_image(size: int = 224) -> Tensor:
    """One generated image (1, 3, size, size) with values in [-2, 2]: waves of three directions, the same everywhere."""
    t = torch.arange(size, dtype=torch.float64) / size
    y, x = torch.meshgrid(t, t, indexing='ij')
    waves = [torch.sin(23 * x + 7 * y) + torch.sin(5 * x * (c + 1) - 41 * y * y + c) for c in range(3)]
    return torch.stack(waves)[None].float()


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What `model` gives in evaluation mode for the generated image: mean, std, 16 of its outputs."""
    training = model.training
    weight = next(model.parameters())
    with torch.inference_mode():
        y = model.eval()(generated_image().to(weight)).flatten().double().cpu()
    model.train(training)
    picked = y[torch.linspace(0, len(y) - 1, 16).long()]
    return {'mean': y.mean().item(), 'std': y.std().item(), 'outputs': picked.tolist()}


def deviation(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference between two fingerprints, in units of the first one's std; inf if they do not compare."""
    x, y = (torch.tensor([f['mean'], f['std'], *f['outputs']], dtype=torch.float64) for f in (a, b))
    if x.shape != y.shape or not bool((x.isfinite() & y.isfinite()).all()) or a['std'] <= 0:
        return float('inf')
    return ((x - y).abs().max() / a['std']).item()


def build(checkpoint: Checkpoint) -> nn.Module:
    """The ResNet-50 of a checkpoint, with its linear classifier where it has one; loads strictly.

    Raises:
        RuntimeError: it is of another network; entries are missing, left over, or of another shape.
    """
    state = checkpoint.model_state()
    if 'layer1.0.conv3.weight' not in state:
        raise RuntimeError('these are of another network than ResNet-50, the only one that is verified')
    classes = len(state['fc.weight']) if 'fc.weight' in state else 0
    model = timm.create_model('simsiam_resnet50', num_classes=classes)
    model.load_state_dict(state, strict=True)
    return model


def verify(target: str, dtype: str = 'float32') -> tuple[bool, list[str]]:
    """Check a tag (fetched where no cache has it) or the path of a checkpoint.

    Args:
        dtype: float32, float16 or bfloat16, in which the outputs are computed.

    Returns:
        Whether all checks passed, and a line for each: hash, keys, values, fingerprint.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: there is nothing to check; one sentence says why.
    """
    tag = target.removeprefix('simsiam_resnet50.')
    lines: list[str] = []
    passed = True

    def check(ok: bool, text: str) -> None:
        nonlocal passed
        passed &= ok
        lines.append(f'{"ok  " if ok else "FAIL"} {text}')

    expected = None
    if tag in WEIGHTS and not Path(target).exists():
        name, weights = f'simsiam_resnet50.{tag}', WEIGHTS[tag]
        path = sources.fetch(name, weights)  # checks the hash, and raises when it is wrong
        known = tensorfile.metadata(path)
        from_hub = path.name == sources.MODEL
        check(True, f'hash: {"from the Hub" if from_hub else "converted from " + known.get("url", "?")}, {path}')
        if not from_hub:
            lines.append(
                f'     sha256 of the upstream file {known.get("upstream_sha256")}' +
                (f', its name promises {weights.sha256_prefix}' if weights.sha256_prefix else
                 ' (its authors publish none to compare with)'))
        expected = sources.pin(name).get('fingerprint')
    else:
        path = Path(target)
        if not path.exists():
            raise FileNotFoundError(
                f'{target} is neither a file nor a tag; the tags are {", ".join(WEIGHTS)}')
        file = path / sources.MODEL if path.is_dir() else path
        if file.suffix == '.safetensors':
            says = tensorfile.CONTENT in tensorfile.metadata(file)
            check(tensorfile.is_whole(file), 'hash: ' + (
                'the contents have the hash that the header holds' if says else 'the file holds none to compare with'))
        else:
            lines.append(f'     sha256 {tensorfile.file_sha256(file)} (nothing to compare it with)')
    checkpoint = load_checkpoint(path)
    lines.append(f'     {checkpoint.describe()}')
    beside = (path if path.is_dir() else path.parent) / FINGERPRINT
    if expected is None and path.name in (sources.MODEL, beside.parent.name) and beside.exists():
        expected = json.loads(beside.read_text())
    try:
        model = build(checkpoint)
    except RuntimeError as e:
        check(False, 'keys: ' + ' '.join(str(e).split())[:200])
        return passed, lines
    check(True, f'keys: all {len(model.state_dict())} entries are there and fit')
    bad = [k for k, v in {**checkpoint.model_state(), **checkpoint.heads_state()}.items() if not v.isfinite().all()]
    check(not bad, f'values: {", ".join(bad[:3])} not finite' if bad else 'values: all finite')
    measured = fingerprint(model.to(getattr(torch, dtype)))
    check(measured['std'] > 0, f'outputs: mean {measured["mean"]:.4g}, std {measured["std"]:.4g} for a generated image')
    if expected:
        d = deviation(expected, measured)
        check(d <= TOLERANCE[dtype], f'fingerprint: {d:.1e} from the published one (tolerance {TOLERANCE[dtype]:g})')
    else:
        lines.append('     fingerprint: none was published to compare with')
    return passed, lines

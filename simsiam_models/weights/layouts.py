"""Splits published SimSiam checkpoints into backbone, projector, predictor and classifier under our names.

Our names are those of timm and torchvision for the backbone, and the entries of `SimSiam.projector` and
`SimSiam.predictor` for the heads.
"""
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime.messages import one_line
from . import tensorfile
from .published import WEIGHTS, find_tag
from .reading import read, read_onnx
from .tensorfile import HEADS, MODEL

State = dict[str, Tensor]
PARTS = ('backbone', 'projector', 'predictor', 'classifier')


@dataclass
class Checkpoint:
    """The parts of a checkpoint under our names; None for a part that the file does not hold."""

    backbone: State  # names as in timm and torchvision, without the classifier
    projector: State | None  # '0.weight', '1.weight', ...: `SimSiam(...).projector.load_state_dict`
    predictor: State | None
    classifier: State | None  # 'weight', 'bias'; multi-head files: 'fcs.0.weight', 'norms.0.running_mean', ...
    layout: str
    info: dict[str, Any] = field(default_factory=dict)  # 'dropped' {group: entries}, 'notes', 'epoch', ...

    def model_state(self) -> State:
        """Returns backbone and linear classifier under the names of timm's and torchvision's ResNets."""
        fc = self.classifier if self.classifier and 'weight' in self.classifier else {}
        return {**self.backbone, **{f'fc.{k}': v for k, v in fc.items()}}

    def heads_state(self) -> State:
        """Returns projector and predictor under the names of `SimSiam`."""
        heads = {'projector': self.projector or {}, 'predictor': self.predictor or {}}
        return {f'{name}.{k}': v for name, head in heads.items() for k, v in head.items()}

    def describe(self) -> str:
        """Returns one line with the layout, the size of each part, and what was dropped or changed."""
        sizes = {name: len(getattr(self, name) or ()) for name in PARTS}
        parts = ', '.join(f'{name} {n} entries' if n else f'no {name}' for name, n in sizes.items())
        dropped = ', '.join(f'{group} ({n})' for group, n in self.info.get('dropped', {}).items())
        dropped = [f'dropped {dropped}'] if dropped else []
        return '; '.join([f'layout {self.layout}: {parts}', *dropped, *self.info.get('notes', [])])


def _rename_mm_head(key: str) -> str:
    """Renames MMSelfSup's fc0 bn0 fc1 bn1 fc2 bn2 to 0 1 3 4 6 7."""
    return re.sub(r'^(fc|bn)(\d+)', lambda m: str(3 * int(m[2]) + (m[1] == 'bn')), key)


def _rename_lightly_backbone(key: str) -> str:
    """Renames the numbered children of torchvision's ResNet."""
    number, _, rest = key.partition('.')
    names = {'0': 'conv1', '1': 'bn1', '4': 'layer1', '5': 'layer2', '6': 'layer3', '7': 'layer4'}
    return f'{names.get(number, number)}.{rest}'


def _rename_old_lightly_head(key: str) -> str:
    """Renames heads of lightly before 1.2, one Sequential per layer: 0.0 0.1 1.0 -> 0 1 3; a bare layer 1 -> 3."""
    if m := re.match(r'(\d+)\.(\d+)\.(.+)', key):
        return f'{3 * int(m[1]) + int(m[2])}.{m[3]}'
    number, _, rest = key.partition('.')
    return rest if number == 'layers' else f'{3 * int(number)}.{rest}'  # 'layers.': an intermediate version


def _rename_detectron2(key: str) -> str:
    """Renames detectron2's res2 to res5, norms inside convolutions, and shortcuts."""
    key = re.sub(r'^res(\d)', lambda m: f'layer{int(m[1]) - 1}', key)
    key = key.replace('shortcut.norm.', 'downsample.1.').replace('shortcut.', 'downsample.0.')
    return re.sub(r'conv(\d)\.norm\.', r'bn\1.', key)


class Layout(NamedTuple):
    name: str
    patterns: tuple[str, ...]  # regular expressions; each must match the start of some key
    prefixes: dict[str, str]  # prefix of a key -> part and prefix under our names
    renames: dict[str, Callable[[str], str]] = {}  # part -> function that renames what follows the part


MM_PRETRAIN = (
    {'backbone.': 'backbone.', 'neck.': 'projector.', 'head.predictor.': 'predictor.'},
    {'projector': _rename_mm_head, 'predictor': _rename_mm_head})
MM_MULTIHEAD = {'backbone.': 'backbone.', 'head.fcs.': 'classifier.fcs.', 'head.norms.': 'classifier.norms.'}
OURS = {'backbone.': 'backbone.', 'projector.': 'projector.', 'predictor.': 'predictor.'}

# The first row that fits wins, and in it the first prefix. Source: the published code of each project.
LAYOUTS = [
    Layout('vissl', (r'trunk\._feature_blocks\.conv1',), {'trunk._feature_blocks.': 'backbone.'}),
    Layout('fair', (r'encoder\.conv1\.weight', r'encoder\.fc\.0\.'), {
        'encoder.fc.': 'projector.', 'encoder.': 'backbone.', 'predictor.': 'predictor.'}),
    Layout('mmselfsup_0x', (r'backbone\.conv1', r'neck\.fc0', r'encoder\.0\.'), *MM_PRETRAIN),
    Layout('mmselfsup_1x', (r'backbone\.conv1', r'neck\.fc0'), *MM_PRETRAIN),
    Layout('mmselfsup_0x_multihead', (r'backbone\.conv1', r'head\.fcs\.4\.'), MM_MULTIHEAD),
    Layout('mmselfsup_1x_multihead', (r'backbone\.conv1', r'head\.fcs\.0\.'), MM_MULTIHEAD),  # 1.x has four heads
    Layout('mmselfsup_0x_linear', (r'backbone\.conv1', r'head\.fc_cls\.'), {
        'backbone.': 'backbone.', 'head.fc_cls.': 'classifier.'}),
    Layout('mmselfsup_1x_linear', (r'backbone\.conv1', r'head\.fc\.'), {
        'backbone.': 'backbone.', 'head.fc.': 'classifier.'}),
    Layout('lightly', (r'backbone\.0\.weight', r'projection_head\.layers\.0\.'), {
        'backbone.': 'backbone.', 'projection_head.layers.': 'projector.', 'prediction_head.layers.': 'predictor.'},
        {'backbone': _rename_lightly_backbone}),
    Layout('lightly_old', (r'backbone\.0\.weight', r'projection_mlp\.'), {
        'backbone.': 'backbone.', 'projection_mlp.': 'projector.', 'prediction_mlp.': 'predictor.'}, {
        'backbone': _rename_lightly_backbone, 'projector': _rename_old_lightly_head,
        'predictor': _rename_old_lightly_head}),
    Layout('detectron2', (r'(backbone\.(bottom_up\.)?)?stem\.conv1\.weight', r'(backbone\.(bottom_up\.)?)?res2\.'), {
        'backbone.bottom_up.stem.': 'backbone.', 'backbone.bottom_up.res': 'backbone.res',
        'backbone.stem.': 'backbone.', 'backbone.res': 'backbone.res', 'roi_heads.res5.': 'backbone.res5.',
        'stem.': 'backbone.', 'res': 'backbone.res'}, {'backbone': _rename_detectron2}),
    Layout('mmdet', (r'backbone\.conv1', r'(rpn_head|roi_head|bbox_head|decode_head|auxiliary_head|neck\.lateral)'), {
        'backbone.': 'backbone.', 'roi_head.shared_head.layer4.': 'backbone.layer4.'}),
    Layout('solo_learn', (r'(backbone|encoder)\.conv1', r'projector\.0\.', r'predictor\.0\.',
                          r'(classifier\.|projector\.6\.bias|encoder\.)'), {'encoder.': 'backbone.', **OURS}),
    Layout('simsiam_models', (r'backbone\.', r'projector\.0\.', r'predictor\.0\.'), OURS),
    Layout('backbone', (r'backbone\.conv1\.weight',), {'backbone.': 'backbone.'}),
    Layout('torchvision', (r'conv1\.weight', r'bn1\.', r'layer1\.0\.'), {
        'conv1.': 'backbone.conv1.', 'bn1.': 'backbone.bn1.', 'layer': 'backbone.layer', 'fc.': 'classifier.'}),
]


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a SimSiam checkpoint of any known layout without running code from the file.

    It knows the rows of LAYOUTS, ONNX files from `simsiam convert`, and folders exported for timm. The parts are
    returned in float32. `info['dropped']` counts the entries left out, and `info['notes']` lists the changes.
    `info['tag']` names a published file, known by its hash. `info['bgr']` is true for weights that were trained on BGR
    pixels: here, they take RGB pixels, normalized by `published.pixel_statistics(True)`.

    Raises:
        FileNotFoundError, OSError: the file does not exist, or the disk failed or refused to read it.
        ValueError: the file is damaged, or its keys fit no known layout; the message shows the first keys.
    """
    path = Path(path)
    file = path / MODEL if path.is_dir() else path
    raw = read_onnx(file) if file.suffix == '.onnx' else read(file)
    if (heads := path / HEADS).exists():
        raw = {**{f'backbone.{k}': v for k, v in raw.items()}, **read(heads)}
    try:
        return _note_origin(recognize(raw), file)
    except ValueError as e:
        raise ValueError(f'{path}: {e}') from None


def _note_origin(checkpoint: Checkpoint, file: Path) -> Checkpoint:
    """Notes whether the file is a published one, and makes weights for BGR pixels take RGB."""
    if tensorfile.CHANNELS in tensorfile.read_metadata(file):  # our copy, already reversed
        checkpoint.info['bgr'] = True
    elif tag := find_tag(file):
        checkpoint.info['tag'] = tag
        if WEIGHTS[tag].bgr:
            reverse_channels(checkpoint)
    return checkpoint


def reverse_channels(checkpoint: Checkpoint) -> None:
    """Makes weights for BGR pixels take RGB pixels, with the same outputs but for rounding."""
    checkpoint.backbone['conv1.weight'] = checkpoint.backbone['conv1.weight'].flip(1)
    checkpoint.info['bgr'] = True
    checkpoint.info['notes'].append('conv1 takes RGB, since its input channels, which were B, G, R, were reversed')


def recognize(raw: Any) -> Checkpoint:
    """Splits the contents of a checkpoint file into its parts under our names. Raises as `load_checkpoint`."""
    if not isinstance(raw, Mapping):
        raise ValueError(f'holds a {type(raw).__name__}, not a dictionary of tensors')
    try:
        return _recognize(raw)
    except (AttributeError, RuntimeError, TypeError) as e:  # not nested or shaped like the layout
        raise ValueError(f'looks like a known layout but is not ({one_line(e)})') from None


def _recognize(raw: Mapping) -> Checkpoint:
    state, outer = _unwrap(raw)
    layout = next((x for x in LAYOUTS if all(any(re.match(r, k) for k in state) for r in x.patterns)), None)
    if layout is None:
        keys = ', '.join([repr(str(k))[1:-1][:80] for k in (state or raw)][:8]) or 'none: it is empty'
        raise ValueError(f'no known checkpoint layout ({len(state)} tensors); the first keys are {keys}')
    parts: dict[str, State] = {part: {} for part in PARTS}
    dropped, converted = Counter(), Counter()
    for key, value in state.items():
        prefix = next((p for p in layout.prefixes if key.startswith(p)), None)
        if prefix is None:
            dropped[key.split('.')[0]] += 1
            continue
        part, _, name = (layout.prefixes[prefix] + key[len(prefix):]).partition('.')
        if value.is_floating_point() and value.dtype != torch.float32:
            converted[str(value.dtype).removeprefix('torch.')] += 1
            value = value.float()
        parts[part][layout.renames.get(part, str)(name)] = value
    stated = {k: v.item() if isinstance(v := raw.get(k), Tensor) and v.numel() == 1 else v
              for k in ('epoch', 'arch', 'best_acc1')}
    info = {k: v for k, v in stated.items() if isinstance(v, int | float | str)}
    for key, value in outer.items():
        if key not in info:
            dropped[str(key)] += len(value) if isinstance(value, Mapping | list | tuple) else 1
    name = layout.name
    if name == 'torchvision' and 'best_acc1' in outer and parts['classifier']:
        name = 'fair_linear'
    if name == 'simsiam_models' and {'pytorch-lightning_version', 'hyper_parameters'} & set(outer):
        name = 'solo_learn'
    notes = [f'{n} tensors converted from {dtype} to float32' for dtype, n in converted.items()]
    _fix_norms(parts, notes)
    return Checkpoint(
        parts.pop('backbone'), **{part: entries or None for part, entries in parts.items()}, layout=name,
        info={**info, 'dropped': dict(dropped), 'notes': notes})


def _unwrap(raw: Mapping) -> tuple[State, dict[str, Any]]:
    """Returns the tensors by name, without the prefixes of wrappers, and everything else in the file."""
    wrapper = next((k for k in ('classy_state_dict', 'state_dict', 'model') if isinstance(raw.get(k), Mapping)), None)
    state = raw[wrapper] if wrapper else raw
    outer = {k: v for k, v in raw.items() if k != wrapper} if wrapper else {}
    if wrapper == 'classy_state_dict':  # VISSL
        model = state.get('base_model', {}).get('model', {})
        state = {f'{part}.{k}': v for part, entries in model.items() for k, v in entries.items()}
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    outer |= {k: v for k, v in state.items() if not isinstance(v, Tensor)}
    for prefix in ('module.', '_orig_mod.', 'module.', '_orig_mod.'):  # DDP and torch.compile, in either order
        if tensors and all(k.startswith(prefix) for k in tensors):
            tensors = {k[len(prefix):]: v for k, v in tensors.items()}
    return tensors, outer


def _fix_norms(parts: dict[str, State], notes: list[str]) -> None:
    """Converts the batch norms to those of `SimSiam` without changing the outputs, and notes the changes."""
    counts = [
        (part, count) for part in parts.values() for key in part if key.endswith('running_mean')
        if (count := key.replace('running_mean', 'num_batches_tracked')) not in part]
    for part, count in counts:
        part[count] = torch.tensor(0)
    if counts:
        notes.append(f'{len(counts)} missing num_batches_tracked set to 0')
    # A batch norm subtracts any constant, so a bias right before it (FAIR's) moves into its running mean.
    for name in ('projector', 'predictor'):
        head = parts[name]
        for key in [k for k in head if re.fullmatch(r'\d+\.bias', k)]:
            n = int(key.split('.')[0])
            mean = f'{n + 1}.running_mean'
            if mean in head and f'{n}.running_mean' not in head:
                head[mean] = head[mean] - head.pop(key)
                notes.append(f'{name}.{key} folded into {mean}')
    # The projector's last batch norm has neither scale nor shift (paper, section 4.4): 1 and 0 are dropped.
    projector = parts['projector']
    last = max((int(k.split('.')[0]) for k in projector if k.endswith('running_mean')), default=-1)
    weight, bias = f'{last}.weight', f'{last}.bias'
    if weight in projector and bias in projector:
        if bool((projector[weight] == 1).all()) and not projector[bias].any():
            del projector[weight], projector[bias]
            notes.append(f'projector.{weight} and {bias} were 1 and 0 and were left out')
        else:
            notes.append(f'projector.{weight} and {bias} are not 1 and 0: SimSiam has no place for them')

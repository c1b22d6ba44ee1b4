"""Key layouts of published SimSiam checkpoints -> backbone, projector, predictor, classifier under our names.

A layout is a row of `LAYOUTS`: which keys betray it, and which prefix belongs to which part. Our names are timm's and
torchvision's for the backbone, and the entries of `simsiam.projector` and `simsiam.predictor` for the heads.
"""
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reading import read, read_onnx

State = dict[str, Tensor]


@dataclass
class Checkpoint:
    """The parts of a checkpoint under our names; a part that the file does not hold is None."""

    backbone: State  # timm's and torchvision's names, without classifier
    projector: State | None  # '0.weight', '1.weight', ...: `SimSiam(...).projector.load_state_dict`
    predictor: State | None
    classifier: State | None  # 'weight', 'bias'; five-tap files: 'fcs.0.weight', 'norms.0.running_mean', ...
    layout: str
    info: dict[str, Any] = field(default_factory=dict)  # 'dropped' {group: entries}, 'notes', and what the file says

    def model_state(self) -> State:
        """Backbone and linear classifier, as timm's and torchvision's ResNets name them."""
        fc = self.classifier if self.classifier and 'weight' in self.classifier else {}
        return {**self.backbone, **{f'fc.{k}': v for k, v in fc.items()}}

    def heads_state(self) -> State:
        """Projector and predictor, as `SimSiam` names them."""
        return {
            f'{name}.{k}': v for name in ('projector', 'predictor') for k, v in (getattr(self, name) or {}).items()}

    def describe(self) -> str:
        parts = [
            f'{name} {len(part)} entries' if part else f'no {name}' for name in
            ('backbone', 'projector', 'predictor', 'classifier') for part in [getattr(self, name)]]
        dropped = ', '.join(f'{group} ({n})' for group, n in self.info.get('dropped', {}).items())
        return '; '.join([
            f'layout {self.layout}: {", ".join(parts)}', *([f'dropped {dropped}'] if dropped else []),
            *self.info.get('notes', [])])


def _mm_head(key: str) -> str:
    """MMSelfSup: fc0 bn0 fc1 bn1 fc2 bn2 -> 0 1 3 4 6 7."""
    return re.sub(r'^(fc|bn)(\d+)', lambda m: str(3 * int(m[2]) + (m[1] == 'bn')), key)


def _lightly_backbone(key: str) -> str:
    """lightly: the children of torchvision's ResNet, numbered."""
    number, _, rest = key.partition('.')
    names = {'0': 'conv1', '1': 'bn1', '4': 'layer1', '5': 'layer2', '6': 'layer3', '7': 'layer4'}
    return f'{names.get(number, number)}.{rest}'


def _lightly_old_head(key: str) -> str:
    """lightly before 1.2: one Sequential per layer, 0.0 0.1 1.0 -> 0 1 3; a bare last layer 1.weight -> 3.weight."""
    if m := re.match(r'(\d+)\.(\d+)\.(.+)', key):
        return f'{3 * int(m[1]) + int(m[2])}.{m[3]}'
    if key.startswith('layers.'):  # the heads of the time between
        return key.removeprefix('layers.')
    number, _, rest = key.partition('.')
    return f'{3 * int(number)}.{rest}'


def _detectron2(key: str) -> str:
    """detectron2: stem, res2..res5, norms inside their convolutions, shortcut."""
    key = key.removeprefix('stem.')
    key = re.sub(r'^res(\d)', lambda m: f'layer{int(m[1]) - 1}', key)
    key = key.replace('shortcut.norm.', 'downsample.1.').replace('shortcut.', 'downsample.0.')
    return re.sub(r'conv(\d)\.norm\.', r'bn\1.', key)


class Layout(NamedTuple):
    name: str
    betrayed_by: tuple[str, ...]  # regular expressions; each must match some key from its start
    parts: dict[str, tuple[str, Callable[[str], str] | None]]  # prefix -> part and how the rest is renamed; first wins


MM_PRETRAIN = {
    'backbone.': ('backbone', None), 'neck.': ('projector', _mm_head), 'head.predictor.': ('predictor', _mm_head)}
MM_MULTIHEAD = {'backbone.': ('backbone', None), 'head.fcs.': ('classifier', 'fcs.{}'.format),
                'head.norms.': ('classifier', 'norms.{}'.format)}
OURS = {'backbone.': ('backbone', None), 'projector.': ('projector', None), 'predictor.': ('predictor', None)}
D2 = _detectron2

# The first row that fits is taken. Sources: the published code of each project (key names are facts).
LAYOUTS = [
    Layout('vissl', (r'trunk\._feature_blocks\.conv1',), {'trunk._feature_blocks.': ('backbone', None)}),
    Layout('fair', (r'encoder\.conv1\.weight', r'encoder\.fc\.0\.'), {
        'encoder.fc.': ('projector', None), 'encoder.': ('backbone', None), 'predictor.': ('predictor', None)}),
    Layout('mmselfsup_0x', (r'backbone\.conv1', r'neck\.fc0', r'encoder\.0\.'), MM_PRETRAIN),
    Layout('mmselfsup_1x', (r'backbone\.conv1', r'neck\.fc0'), MM_PRETRAIN),
    Layout('mmselfsup_0x_multihead', (r'backbone\.conv1', r'head\.fcs\.4\.'), MM_MULTIHEAD),
    Layout('mmselfsup_1x_multihead', (r'backbone\.conv1', r'head\.fcs\.0\.'), MM_MULTIHEAD),  # 1.x has four heads
    Layout('mmselfsup_0x_linear', (r'backbone\.conv1', r'head\.fc_cls\.'), {
        'backbone.': ('backbone', None), 'head.fc_cls.': ('classifier', None)}),
    Layout('mmselfsup_1x_linear', (r'backbone\.conv1', r'head\.fc\.'), {
        'backbone.': ('backbone', None), 'head.fc.': ('classifier', None)}),
    Layout('lightly', (r'backbone\.0\.weight', r'projection_head\.layers\.0\.'), {
        'backbone.': ('backbone', _lightly_backbone), 'projection_head.layers.': ('projector', None),
        'prediction_head.layers.': ('predictor', None)}),
    Layout('lightly_old', (r'backbone\.0\.weight', r'projection_mlp\.'), {
        'backbone.': ('backbone', _lightly_backbone), 'projection_mlp.': ('projector', _lightly_old_head),
        'prediction_mlp.': ('predictor', _lightly_old_head)}),
    Layout('detectron2', (r'(backbone\.(bottom_up\.)?)?stem\.conv1\.weight', r'(backbone\.(bottom_up\.)?)?res2\.'), {
        'backbone.bottom_up.stem.': ('backbone', D2), 'backbone.bottom_up.res': ('backbone', lambda k: D2(f'res{k}')),
        'backbone.stem.': ('backbone', D2), 'backbone.res': ('backbone', lambda k: D2(f'res{k}')),
        'roi_heads.res5.': ('backbone', lambda k: D2(f'res5.{k}')), 'stem.': ('backbone', D2),
        'res': ('backbone', lambda k: D2(f'res{k}'))}),
    Layout('mmdet', (r'backbone\.conv1', r'(rpn_head|roi_head|bbox_head|decode_head|auxiliary_head|neck\.lateral)'), {
        'backbone.': ('backbone', None), 'roi_head.shared_head.layer4.': ('backbone', 'layer4.{}'.format)}),
    Layout('solo_learn', (r'(backbone|encoder)\.conv1', r'projector\.0\.', r'predictor\.0\.',
                          r'(classifier\.|projector\.6\.bias|encoder\.)'), {'encoder.': ('backbone', None), **OURS}),
    Layout('simsiam_models', (r'backbone\.', r'projector\.0\.', r'predictor\.0\.'), OURS),
    Layout('backbone', (r'backbone\.conv1\.weight',), {'backbone.': ('backbone', None)}),
    Layout('torchvision', (r'conv1\.weight', r'bn1\.', r'layer1\.0\.'), {
        'conv1.': ('backbone', 'conv1.{}'.format), 'bn1.': ('backbone', 'bn1.{}'.format),
        'layer': ('backbone', 'layer{}'.format), 'fc.': ('classifier', None)}),
]


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a SimSiam checkpoint of any known layout; nothing in the file is executed.

    Known are FAIR (pretraining, linear), MMSelfSup 0.x and 1.x and MMPretrain (pretraining, linear, multi-head),
    lightly, solo-learn, VISSL, torchvision and timm, mmdet and mmseg, detectron2, ONNX files that `simsiam convert`
    wrote, this package's checkpoints, and the folders that it exports for timm.

    Returns:
        Parts under our names, in float32. `info['dropped']` counts what was left out, `info['notes']` says what was
        changed: FAIR's frozen random bias before the projector's last batch norm goes into that norm's running mean.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or its keys fit no known layout (the first of them are shown).
    """
    path = Path(path)
    if path.is_dir():
        raw = read(path / 'model.safetensors')
        if (heads := path / 'heads.safetensors').exists():
            raw = {**{f'backbone.{k}': v for k, v in raw.items()}, **read(heads)}
    elif path.suffix == '.onnx':
        raw = read_onnx(path)
    else:
        raw = read(path)
    try:
        return recognize(raw)
    except ValueError as e:
        raise ValueError(f'{path}: {e}') from None


def recognize(raw: Any) -> Checkpoint:
    """The contents of a checkpoint file -> its parts under our names.

    Raises:
        ValueError: no known layout; the first keys are shown.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f'holds a {type(raw).__name__}, not a dictionary of tensors')
    try:
        return _recognize(raw)
    except (AttributeError, RuntimeError, TypeError) as e:  # nested or shaped as no writer of these layouts does it
        raise ValueError(f'looks like a known layout but is none ({" ".join(str(e).split())[:200]})') from None


def _recognize(raw: Mapping) -> Checkpoint:
    state, outer = _unwrap(raw)
    layout = next((x for x in LAYOUTS if all(any(re.match(r, k) for k in state) for r in x.betrayed_by)), None)
    if layout is None:
        keys = [repr(str(k))[1:-1][:80] for k in (state or raw)]
        raise ValueError(
            f'no known checkpoint layout ({len(state)} tensors); the first keys are '
            f'{", ".join(keys[:8]) or "none: it is empty"}')
    parts: dict[str, State] = {'backbone': {}, 'projector': {}, 'predictor': {}, 'classifier': {}}
    dropped, notes = Counter(), []
    for key, value in state.items():
        for prefix, (part, rename) in layout.parts.items():
            if key.startswith(prefix):
                rest = key[len(prefix):]
                parts[part][rename(rest) if rename else rest] = value
                break
        else:
            dropped[key.split('.')[0]] += 1
    info = {k: raw[k] for k in ('epoch', 'arch', 'best_acc1') if isinstance(raw.get(k), int | float | str)}
    for key, value in outer.items():
        if key not in info:
            dropped[str(key)] += len(value) if isinstance(value, Mapping | list | tuple) else 1
    name = layout.name
    if name == 'torchvision' and 'best_acc1' in outer and parts['classifier']:
        name = 'fair_linear'
    if name == 'simsiam_models' and {'pytorch-lightning_version', 'hyper_parameters'} & set(outer):
        name = 'solo_learn'
    _to_float32(parts, notes)
    _fill_counts(parts, notes)
    for head in ('projector', 'predictor'):
        _fold_biases(parts[head], head, notes)
    _drop_identity(parts['projector'], notes)
    return Checkpoint(
        parts['backbone'], parts['projector'] or None, parts['predictor'] or None, parts['classifier'] or None, name,
        {**info, 'dropped': dict(dropped), 'notes': notes})


def _unwrap(raw: Mapping) -> tuple[State, dict[str, Any]]:
    """The tensors by name, without the prefixes of wrappers; and what lay beside them."""
    state, outer = raw, {}
    if isinstance(raw.get('classy_state_dict'), Mapping):  # VISSL
        model = raw['classy_state_dict'].get('base_model', {}).get('model', {})
        state = {f'{part}.{k}': v for part, entries in model.items() for k, v in entries.items()}
        outer = {k: v for k, v in raw.items() if k != 'classy_state_dict'}
    else:
        for key in ('state_dict', 'model'):
            if isinstance(raw.get(key), Mapping):
                state, outer = raw[key], {k: v for k, v in raw.items() if k != key}
                break
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    outer |= {k: v for k, v in state.items() if not isinstance(v, Tensor)}
    for prefix in ('module.', '_orig_mod.', 'module.', '_orig_mod.'):  # DDP and torch.compile, in either order
        if tensors and all(k.startswith(prefix) for k in tensors):
            tensors = {k[len(prefix):]: v for k, v in tensors.items()}
    return tensors, outer


def _to_float32(parts: dict[str, State], notes: list[str]) -> None:
    found = Counter()
    for part in parts.values():
        for k, v in part.items():
            if v.is_floating_point() and v.dtype != torch.float32:
                found[str(v.dtype).removeprefix('torch.')] += 1
                part[k] = v.float()
    notes += [f'{n} tensors converted from {dtype} to float32' for dtype, n in found.items()]


def _fill_counts(parts: dict[str, State], notes: list[str]) -> None:
    filled = 0
    for part in parts.values():
        for key in [k for k in part if k.endswith('running_mean')]:
            count = key.replace('running_mean', 'num_batches_tracked')
            if count not in part:
                part[count] = torch.tensor(0)
                filled += 1
    if filled:
        notes.append(f'{filled} missing num_batches_tracked set to 0')


def _fold_biases(head: State, name: str, notes: list[str]) -> None:
    """A bias right before a batch norm is a constant that the norm takes away: it moves into the running mean."""
    for key in [k for k in head if re.fullmatch(r'\d+\.bias', k)]:
        n = int(key.split('.')[0])
        mean = f'{n + 1}.running_mean'
        if mean in head and f'{n}.running_mean' not in head:
            head[mean] = head[mean] - head.pop(key)
            notes.append(f'{name}.{key} folded into {mean}')


def _drop_identity(projector: State, notes: list[str]) -> None:
    """SimSiam's last batch norm has no scale and shift (paper, section 4.4); some code gives it both."""
    norms = [int(k.split('.')[0]) for k in projector if k.endswith('running_mean')]
    weight, bias = f'{max(norms, default=0)}.weight', f'{max(norms, default=0)}.bias'
    if not norms or weight not in projector or bias not in projector:
        return
    if bool((projector[weight] == 1).all()) and not projector[bias].any():
        del projector[weight], projector[bias]
        notes.append(f'projector.{weight} and {bias} were 1 and 0 and are left out')
    else:
        notes.append(f'projector.{weight} and {bias} are not 1 and 0: SimSiam has no place for them')

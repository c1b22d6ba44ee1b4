"""Key layouts of published SimSiam checkpoints -> backbone, projector, predictor and classifier under our names.

A layout is a row of `LAYOUTS`: the keys that identify it, and the part that each prefix belongs to. Our names are those
of timm and torchvision for the backbone, and the entries of `SimSiam.projector` and `SimSiam.predictor` for the heads.
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
from .reading import read, read_onnx
from .tensorfile import HEADS, MODEL

State = dict[str, Tensor]


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
        return {
            f'{name}.{k}': v for name in ('projector', 'predictor') for k, v in (getattr(self, name) or {}).items()}

    def describe(self) -> str:
        """Returns one line with the layout, the size of each part, and what was dropped or changed."""
        parts = [
            f'{name} {len(part)} entries' if part else f'no {name}' for name in
            ('backbone', 'projector', 'predictor', 'classifier') for part in [getattr(self, name)]]
        dropped = ', '.join(f'{group} ({n})' for group, n in self.info.get('dropped', {}).items())
        return '; '.join([
            f'layout {self.layout}: {", ".join(parts)}', *([f'dropped {dropped}'] if dropped else []),
            *self.info.get('notes', [])])


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
    if key.startswith('layers.'):  # an intermediate version
        return key.removeprefix('layers.')
    number, _, rest = key.partition('.')
    return f'{3 * int(number)}.{rest}'


def _rename_detectron2(key: str) -> str:
    """Renames detectron2's stem, res2 to res5, norms inside convolutions, and shortcuts."""
    key = key.removeprefix('stem.')
    key = re.sub(r'^res(\d)', lambda m: f'layer{int(m[1]) - 1}', key)
    key = key.replace('shortcut.norm.', 'downsample.1.').replace('shortcut.', 'downsample.0.')
    return re.sub(r'conv(\d)\.norm\.', r'bn\1.', key)


class Layout(NamedTuple):
    name: str
    patterns: tuple[str, ...]  # regular expressions; each must match the start of some key
    parts: dict[str, tuple[str, Callable[[str], str] | None]]  # prefix -> part, function that renames the rest


MM_PRETRAIN = {
    'backbone.': ('backbone', None), 'neck.': ('projector', _rename_mm_head),
    'head.predictor.': ('predictor', _rename_mm_head)}
MM_MULTIHEAD = {'backbone.': ('backbone', None), 'head.fcs.': ('classifier', 'fcs.{}'.format),
                'head.norms.': ('classifier', 'norms.{}'.format)}
OURS = {'backbone.': ('backbone', None), 'projector.': ('projector', None), 'predictor.': ('predictor', None)}
D2 = _rename_detectron2

# The first row that fits wins, and in it the first prefix. Source: the published code of each project.
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
        'backbone.': ('backbone', _rename_lightly_backbone), 'projection_head.layers.': ('projector', None),
        'prediction_head.layers.': ('predictor', None)}),
    Layout('lightly_old', (r'backbone\.0\.weight', r'projection_mlp\.'), {
        'backbone.': ('backbone', _rename_lightly_backbone), 'projection_mlp.': ('projector', _rename_old_lightly_head),
        'prediction_mlp.': ('predictor', _rename_old_lightly_head)}),
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
    """Reads a SimSiam checkpoint of any known layout without running code from the file.

    Known layouts: FAIR (pretraining, linear), MMSelfSup 0.x and 1.x and MMPretrain (pretraining, linear, multi-head),
    lightly, solo-learn, VISSL, torchvision and timm, mmdet and mmseg, detectron2, ONNX files from `simsiam convert`,
    checkpoints of this package, and the folders that it exports for timm.

    Returns:
        The parts under our names, in float32. `info['dropped']` counts the entries left out, and `info['notes']` lists
        the changes: FAIR's frozen random bias before the projector's last batch norm moves into its running mean.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: the disk failed or refused to read the file.
        ValueError: the file is damaged, or its keys fit no known layout; the message shows the first keys.
    """
    path = Path(path)
    if path.is_dir():
        raw = read(path / MODEL)
        if (heads := path / HEADS).exists():
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
    """Splits the contents of a checkpoint file into its parts under our names.

    Raises:
        ValueError: the layout is unknown; the message shows the first keys.
    """
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
    """Returns the tensors by name, without the prefixes of wrappers, and everything else in the file."""
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
    """Moves a bias directly before a batch norm, which subtracts any constant, into the norm's running mean."""
    for key in [k for k in head if re.fullmatch(r'\d+\.bias', k)]:
        n = int(key.split('.')[0])
        mean = f'{n + 1}.running_mean'
        if mean in head and f'{n}.running_mean' not in head:
            head[mean] = head[mean] - head.pop(key)
            notes.append(f'{name}.{key} folded into {mean}')


def _drop_identity(projector: State, notes: list[str]) -> None:
    """Drops scale 1 and shift 0 of the last batch norm: in SimSiam it has neither (paper, section 4.4)."""
    norms = [int(k.split('.')[0]) for k in projector if k.endswith('running_mean')]
    weight, bias = f'{max(norms, default=0)}.weight', f'{max(norms, default=0)}.bias'
    if not norms or weight not in projector or bias not in projector:
        return
    if bool((projector[weight] == 1).all()) and not projector[bias].any():
        del projector[weight], projector[bias]
        notes.append(f'projector.{weight} and {bias} were 1 and 0 and were left out')
    else:
        notes.append(f'projector.{weight} and {bias} are not 1 and 0: SimSiam has no place for them')

"""Splits published SimSiam checkpoints into backbone, projector, predictor and classifier under our names.

Our names are those of timm and torchvision for the backbone, and the entries of `SimSiam.projector` and
`SimSiam.predictor` for the heads. One rule finds the network in whatever a trainer wrote around it: the keys of nested
dictionaries are joined with dots, the names of wrappers are left out, and a network lies wherever the names below a
prefix are those of a known layout. Two networks in one file are an error unless one follows the other.
"""
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime.messages import one_line, printable, short
from . import tensorfile
from .published import WEIGHTS, find_tag
from .reading import Opaque, find_export, read, read_onnx, require_numbers, require_safetensors
from .tensorfile import HEADS

State = dict[str, Tensor]
DEPTH = 8  # names in the longest prefix of a network
SAVE_STATE = 'save the state_dict() of the module where that code is installed'
PARTS = ('backbone', 'projector', 'predictor', 'classifier')


@dataclass
class Checkpoint:
    """The parts of a checkpoint under our names; None for a part that the file does not hold."""

    backbone: State  # names as in timm and torchvision, without the classifier
    projector: State | None  # '0.weight', '1.weight', ...: `SimSiam(...).projector.load_state_dict`
    predictor: State | None
    classifier: State | None  # 'weight', 'bias'; multi-head files: 'fcs.0.weight', 'norms.0.running_mean', ...
    layout: str
    # 'dropped' {group: entries}, 'notes', 'epoch', ...; 'stem': arguments of the network that no entry shows
    info: dict[str, Any] = field(default_factory=dict)

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
        groups = ', '.join(f'{group} ({n})' for group, n in self.info.get('dropped', {}).items())
        dropped = [f'dropped {groups}'] if groups else []
        # Names from the file must not look like lines of a report.
        return printable('; '.join([f'layout {self.layout}: {parts}', *dropped, *self.info.get('notes', [])]))


def _rename_mm_head(key: str) -> str:
    """Renames MMSelfSup's fc0 bn0 fc1 bn1 fc2 bn2 to 0 1 3 4 6 7."""
    return re.sub(r'^(fc|bn)(\d+)', lambda m: str(3 * int(m[2]) + (m[1] == 'bn')), key)


def _rename_old_lightly_head(key: str) -> str:
    """Renames heads of lightly before 1.2, one Sequential per layer: 0.0 0.1 1.0 -> 0 1 3; a bare layer 1 -> 3."""
    if m := re.match(r'(\d+)\.(\d+)\.(.+)', key):
        return f'{3 * int(m[1]) + int(m[2])}.{m[3]}'
    number, _, rest = key.partition('.')
    return rest if number == 'layers' else f'{3 * int(number)}.{rest}'  # 'layers.': an intermediate version


def _rename_hua_head(key: str) -> str:
    """Renames PatrickHua's layer1.0 layer1.1 layer2.0 ... to 0 1 3 ...; in the predictor, layer2 is a bare layer."""
    m = re.match(r'layer(\d)\.(?:(\d)\.)?(.+)', key)
    return f'{3 * int(m[1]) - 3 + int(m[2] or 0)}.{m[3]}' if m else key


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


MM_PRETRAIN: tuple[dict[str, str], dict[str, Callable[[str], str]]] = (
    {'backbone.': 'backbone.', 'neck.': 'projector.', 'head.predictor.': 'predictor.'},
    {'projector': _rename_mm_head, 'predictor': _rename_mm_head})
MM_MULTIHEAD = {'backbone.': 'backbone.', 'head.fcs.': 'classifier.fcs.', 'head.norms.': 'classifier.norms.'}
CLASSIFIERS = {f'{name}.{x}': f'classifier.{x}' for name in ('classifier', 'head', 'head.fc', 'linear', 'fc') for x in (
    'weight', 'bias')}
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
        'backbone.': 'backbone.', 'projection_head.layers.': 'projector.', 'prediction_head.layers.': 'predictor.'}),
    Layout('lightly_old', (r'backbone\.0\.weight', r'projection_mlp\.'), {
        'backbone.': 'backbone.', 'projection_mlp.': 'projector.', 'prediction_mlp.': 'predictor.'}, {
        'projector': _rename_old_lightly_head, 'predictor': _rename_old_lightly_head}),
    Layout('patrickhua', (r'backbone\.', r'projector\.layer1\.0\.', r'predictor\.layer1\.0\.'), OURS, {
        'projector': _rename_hua_head, 'predictor': _rename_hua_head}),
    Layout('detectron2', (r'(backbone\.(bottom_up\.)?)?stem\.conv1\.weight', r'(backbone\.(bottom_up\.)?)?res2\.'), {
        'backbone.bottom_up.stem.': 'backbone.', 'backbone.bottom_up.res': 'backbone.res',
        'backbone.stem.': 'backbone.', 'backbone.res': 'backbone.res', 'roi_heads.res5.': 'backbone.res5.',
        'stem.': 'backbone.', 'res': 'backbone.res'}, {'backbone': _rename_detectron2}),
    Layout('mmdet', (r'backbone\.conv1', r'(rpn_head|roi_head|bbox_head|decode_head|auxiliary_head|neck\.lateral)'), {
        'backbone.': 'backbone.', 'roi_head.shared_head.layer4.': 'backbone.layer4.'}),
    Layout('solo_learn', (r'(backbone|encoder)\.conv1', r'projector\.0\.', r'predictor\.0\.',
                          r'(classifier\.|projector\.6\.bias|encoder\.)'), {'encoder.': 'backbone.', **OURS}),
    Layout('simsiam_models', (r'backbone\.', r'projector\.0\.', r'predictor\.0\.'), OURS),
    Layout('backbone', (r'backbone\.(conv1|[24]\.0\.conv1)\.weight',), {'backbone.': 'backbone.', **CLASSIFIERS}),
    Layout('torchvision', (r'conv1\.weight', r'bn1\.', r'layer1\.0\.'), {
        'conv1.': 'backbone.conv1.', 'bn1.': 'backbone.bn1.', 'layer': 'backbone.layer', 'fc.': 'classifier.',
        **CLASSIFIERS}),
    # nn.Sequential of a ResNet's children
    Layout('torchvision', (r'0\.weight', r'1\.running_mean', r'[24]\.0\.conv1\.weight'), {
        f'{i}.': f'backbone.{i}.' for i in range(10)}),
]
# Names that wrappers put anywhere into a key: DDP, DeepSpeed and averaged copies; torch.compile; FSDP and activation
# checkpointing; Lightning's strategies; Opacus.
WRAPPERS = {
    'module', '_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module', '_forward_module', '_module'}
AVERAGED = ('state_dict_ema', 'model_ema')  # timm takes these rather than the weights of the last step
FOLLOWERS = re.compile(r'(^|[._])(momentum|encoder_k)([._]|$)')  # copies that follow the network that is trained
MOCO = {'encoder_q', 'encoder_k', 'base_encoder', 'momentum_encoder'}  # their fc is the projection of MoCo
# The children of a ResNet in nn.Sequential: torchvision's, with ReLU and pooling between bn1 and layer1; lightly's own.
NUMBERED = ('conv1', 'bn1', 'relu', 'maxpool', 'layer1', 'layer2', 'layer3', 'layer4', 'avgpool', 'fc')
NUMBERED_BARE = ('conv1', 'bn1', 'layer1', 'layer2', 'layer3', 'layer4', 'fc')


def load_checkpoint(path: str | Path, branch: str | None = None) -> Checkpoint:
    """Reads a SimSiam checkpoint of any known layout without running code from the file.

    It knows the rows of LAYOUTS, ONNX files from `simsiam convert`, and folders exported for timm. The parts are
    returned in float32. `info['dropped']` counts the entries left out, and `info['notes']` lists the changes.
    `info['tag']` names a published file, known by its hash. `info['bgr']` is true for weights that were trained on BGR
    pixels: here, they take RGB pixels, normalized by `published.pixel_statistics(True)`.

    Args:
        branch: which network to take of a file with several, 'teacher' for example; any part of its prefix names it.

    Raises:
        FileNotFoundError, OSError: the file does not exist, or the disk failed or refused to read it.
        ValueError: the file is damaged, its keys fit no known layout, or it holds several networks; the message shows
            the first keys, or the names of the networks.
    """
    path = Path(path)
    file = find_export(path) if path.is_dir() else path
    raw = read_onnx(file) if file.suffix == '.onnx' else read(file)
    if (heads := path / HEADS).exists():
        require_safetensors(heads)
        raw = {**{f'backbone.{k}': v for k, v in raw.items()}, **read(heads)}
    try:
        return _note_origin(recognize(raw, branch), file)
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


def recognize(raw: Any, branch: str | None = None) -> Checkpoint:
    """Splits the contents of a checkpoint file into its parts under our names. Raises as `load_checkpoint`."""
    if isinstance(raw, Opaque):
        raise ValueError(f'holds a whole pickled module ({raw.origin}), which only its own code can load; {SAVE_STATE}')
    if not isinstance(raw, Mapping):
        raise ValueError(f'holds a {type(raw).__name__}, not a dictionary of tensors')
    try:
        return _recognize(raw, branch)
    except (AttributeError, RuntimeError, TypeError) as e:  # not nested or shaped like the layout
        raise ValueError(f'looks like a known layout but is not ({one_line(e)})') from None


def _recognize(raw: Mapping[Any, Any], branch: str | None) -> Checkpoint:
    state = _join_keys(raw)
    networks = _find_networks(state)
    if not networks:
        raise ValueError(_describe_unknown(raw, state))
    root, notes = _choose_network(state, networks, branch)
    layout = networks[root]
    parts: dict[str, State] = {part: {} for part in PARTS}
    dropped = _count_left_out(raw, '', root, [root + p for p in layout.prefixes], set())
    converted: Counter[str] = Counter()
    for key, value in state.items():
        prefix = next((p for p in layout.prefixes if key.startswith(root + p)), None)
        if prefix is None:
            continue
        part, _, name = (layout.prefixes[prefix] + key[len(root + prefix):]).partition('.')
        name = layout.renames.get(part, str)(name)
        if name in parts[part]:
            raise ValueError(f'two entries of the file are {part}.{name}')
        require_numbers({key: value})
        if value.is_floating_point() and value.dtype != torch.float32:
            converted[str(value.dtype).removeprefix('torch.')] += 1
            value = value.float()
        parts[part][name] = value
    stated = {k: v.item() if isinstance(v := raw.get(k), Tensor) and v.numel() == 1 else v
              for k in ('epoch', 'arch', 'best_acc1')}
    info = {k: v for k, v in stated.items() if isinstance(v, int | float | str)}
    for key in info:
        dropped.pop(key, None)
    notes += [f'{n} tensors converted from {dtype} to float32' for dtype, n in converted.items()]
    stem = _fix_backbone(parts, notes)
    _fix_classifier(parts, root, dropped, notes)
    name = layout.name
    if name == 'torchvision' and 'best_acc1' in raw and parts['classifier']:
        name = 'fair_linear'
    if name == 'simsiam_models' and {'pytorch-lightning_version', 'hyper_parameters'} & set(raw):
        name = 'solo_learn'
    if name == 'patrickhua':
        _leave_out_unused(parts, notes)
    _fix_norms(parts, notes)
    conv = parts['backbone'].get('conv1.weight')
    if name == 'solo_learn' and conv is not None and conv.shape[2:] == (3, 3):
        stem['stem_padding'] = 2  # solo-learn's stem for CIFAR (solo/methods/base.py)
    return Checkpoint(
        parts.pop('backbone'), **{part: entries or None for part, entries in parts.items()}, layout=name,
        info={**info, 'dropped': dict(dropped), 'notes': notes, **({'stem': stem} if stem else {})})


def _join_keys(raw: Mapping[Any, Any]) -> State:
    """Returns the tensors of nested dictionaries by their keys joined with dots, without the names of wrappers.

    A dictionary that occurs twice is followed once.
    """
    state: State = {}
    left, seen = [('', raw)], {id(raw)}
    while left:
        path, node = left.pop(0)
        for key, value in node.items():
            name = _join(path, key)
            if isinstance(value, Mapping):
                if id(value) not in seen:
                    seen.add(id(value))
                    left.append((name, value))
            elif isinstance(value, Tensor) and state.setdefault(name, value) is not value:
                raise ValueError(f'two entries are called {name!r} without the names of wrappers')
    return state


def _join(path: str, key: Any) -> str:
    names = [name for name in str(key).split('.') if name not in WRAPPERS]
    return '.'.join([*([path] if path else []), *names])


def _find_networks(state: State) -> dict[str, Layout]:
    """Returns the prefixes below which a known layout begins, outermost first, without the parts of others."""
    below: dict[str, list[str]] = {'': list(state)}
    for key in state:
        names = key.split('.')[:DEPTH]
        for i, name in enumerate(names[:-1]):
            if re.match(r'(layer|res)\d', name):
                break
            below.setdefault(prefix := '.'.join(names[:i + 1]) + '.', []).append(key[len(prefix):])
    found: dict[str, Layout] = {}
    for prefix in sorted(below, key=lambda p: p.count('.')):
        layout = next((x for x in LAYOUTS if all(any(re.match(r, k) for k in below[prefix]) for r in x.patterns)), None)
        parts = [outer + p for outer, x in found.items() for p in x.prefixes]
        if layout and not any(prefix.startswith(p) or p.endswith('.') and p.startswith(prefix) for p in parts):
            found[prefix] = layout
    return found


def _choose_network(state: State, networks: dict[str, Layout], branch: str | None) -> tuple[str, list[str]]:
    """Returns the prefix of the network to take, and notes on those that are not taken."""
    names = _shorten(networks)
    if branch is not None:
        fitting = [root for root, name in names.items() if branch == name or f'.{branch}.' in f'.{root}']
        fitting = fitting or [root for root in networks if branch in re.split('[._]', root)]
        if len(fitting) != 1:
            found = ', '.join(names[root] for root in fitting or networks)
            raise ValueError(
                f'holds {"several networks" if fitting else "no network"} called {branch!r}: choose one of {found}')
        return fitting[0], []
    averaged = next((m for name in AVERAGED if (m := [root for root in networks if name in root.split('.')])), None)
    roots = averaged or list(networks)
    roots = [root for root in roots if not FOLLOWERS.search(root)] or roots
    roots = [root for i, root in enumerate(roots) if not any(_is_copy(state, root, other) for other in roots[:i])]
    if len(roots) > 1:
        raise ValueError(
            f'holds {len(roots)} networks, {" and ".join(names[root] for root in roots)}: choose one with '
            f'branch={names[roots[0]]!r} (on the command line: --branch {names[roots[0]]})')
    left = [names[root] for root in networks if root != roots[0] and not _is_copy(state, root, roots[0])]
    return roots[0], [f'loaded {names[roots[0]]} and left out {", ".join(left)} (choose with branch)'] if left else []


def _shorten(networks: dict[str, Layout]) -> dict[str, str]:
    """Returns names for the prefixes of networks, without what they begin with in common."""
    paths = {root: root.split('.')[:-1] for root in networks}
    common = len(os.path.commonprefix(list(paths.values()))) if len(paths) > 1 else 0
    return {root: '.'.join(path[common:]) or 'top' for root, path in paths.items()}


def _is_copy(state: State, root: str, other: str) -> bool:
    """Returns whether two networks agree in every entry that both have: MMSelfSup 0.x saves everything twice."""
    own = {k[len(root):]: v for k, v in state.items() if k.startswith(root)}
    there = {k[len(p):]: v for p in (other, f'{other}backbone.') for k, v in state.items() if k.startswith(p)}
    both = own.keys() & there.keys()
    return bool(both) and all(own[k].shape == there[k].shape and bool(
        ((own[k] == there[k]) | (own[k] != own[k])).all()) for k in both)


def _count_left_out(
    node: Mapping[Any, Any], path: str, root: str, prefixes: list[str], seen: set[int],
) -> Counter[str]:
    """Counts the entries of a file that are none of its network's, by name or by the first part of it."""
    dropped: Counter[str] = Counter()
    seen.add(id(node))
    for key, value in node.items():
        name = _join(path, key)
        inner, shown = f'{name}.' if name else '', name[len(root if name.startswith(root) else path):].lstrip('.')
        if isinstance(value, Mapping) and any(p.startswith(inner) or inner.startswith(p) for p in prefixes):
            dropped += Counter() if id(value) in seen else _count_left_out(value, name, root, prefixes, seen)
        elif not isinstance(value, Tensor) or not any(name.startswith(p) for p in prefixes):
            size = len(value) if isinstance(value, Mapping | list | tuple) else 1
            whole = name.startswith(root) and not isinstance(value, Tensor)
            dropped[shown if whole else shown.split('.')[0]] += size
    return dropped


def _describe_unknown(raw: Mapping[Any, Any], state: State) -> str:
    whole = [f'{key}: {value.origin}' for key, value in raw.items() if isinstance(value, Opaque)]
    if whole and not any(v.ndim == 4 for v in state.values()):  # no convolution outside the pickled objects
        return (f'holds whole pickled objects ({short(", ".join(whole))}), which only their own code can load; '
                f'{SAVE_STATE}')
    if any(k.endswith('flat_param') for k in state):
        return "holds FSDP's flattened parameters; save it with StateDictType.FULL_STATE_DICT"
    keys = ', '.join([repr(str(k))[1:-1][:80] for k in (state or raw)][:8]) or 'none: it is empty'
    return f'no known checkpoint layout ({len(state)} tensors); the first keys are {keys}'


def _fix_backbone(parts: dict[str, State], notes: list[str]) -> dict[str, Any]:
    """Renames numbered children, shortcuts and classifiers of a backbone; returns the arguments of its stem."""
    state, stem = parts['backbone'], dict[str, Any]()
    names: tuple[str, ...] = ()
    if '0.weight' in state:
        names = NUMBERED_BARE if any(k.startswith('2.0.') for k in state) else NUMBERED
    if names == NUMBERED_BARE:  # nn.Sequential leaves out what lightly's forward() calls as a function
        stem = {'stem_relu': False}
        notes.append('the stem has no ReLU, as in an nn.Sequential of the children of lightly\'s ResNet')
    parts['backbone'] = {}
    for key, value in state.items():
        number, _, rest = key.partition('.')
        if names and number.isdigit() and int(number) < len(names):
            key = f'{names[int(number)]}.{rest}'
        key = re.sub(r'^(layer.*\.)shortcut\.', r'\1downsample.', key)
        part, name = ('classifier', key.partition('.')[2]) if re.match(r'(fc|linear)\.', key) else ('backbone', key)
        if name in parts[part]:
            raise ValueError(f'two entries of the file are {part}.{name}')
        parts[part][name] = value
    return stem


def _fix_classifier(parts: dict[str, State], root: str, dropped: Counter[str], notes: list[str]) -> None:
    """Keeps a linear classifier and multi-head ones; leaves anything else out, with a note."""
    state = parts['classifier']
    if not state or any(k.startswith(('fcs.', 'norms.')) for k in state):
        return
    layer = {k.rpartition('.')[2]: v for k, v in state.items()}
    linear = {'weight'} <= set(layer) <= {'weight', 'bias'} and len(layer) == len(state) and layer['weight'].ndim == 2
    if linear and not MOCO & set(root.split('.')):
        # Sequential(Dropout, Linear) computes what its linear layer does, and no bias is a bias of 0.
        parts['classifier'] = {'weight': layer['weight'], 'bias': layer.get('bias', layer['weight'].new_zeros(
            len(layer['weight'])))}
        return
    parts['classifier'] = {}
    dropped['fc'] += len(state)
    notes.append(f'the {len(state)} entries after the backbone are not a linear classifier and were left out')


def _leave_out_unused(parts: dict[str, State], notes: list[str]) -> None:
    """Leaves out the projector's second layer if it saw no batch: PatrickHua's code skips it but saves it."""
    head = parts['projector']
    used = [head.get(f'{norm}.num_batches_tracked') for norm in (1, 4, 7)]
    if None not in used and used[0] and not used[1]:
        parts['projector'] = {
            f'{int(k[0]) - 3 if k[0] in "67" else k[0]}{k[1:]}': v for k, v in head.items() if k[0] not in '34'}
        notes.append("the projector's second layer saw no batch and was left out")


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
            notes.append(f'projector.{weight} and {bias} are not 1 and 0 as in the paper; create_simsiam keeps them')

"""One SimSiam model in every published layout, written from the documented key names without the code under test.

`LAYOUTS` maps a name to a function of the model that returns `OnDisk`: the contents of the file and the expected parts.
"""
import pickle
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from simsiam_models import SimSiam

State = dict[str, Tensor]


@dataclass
class OnDisk:
    contents: Any
    layout: str
    parts: dict[str, State]  # expected, under our names
    dropped: dict[str, int] = field(default_factory=dict)  # expected at least


def tiny_resnet(num_classes: int = 0) -> ResNet:
    """A ResNet with all names of a bottleneck ResNet and few channels: 64 features."""
    return ResNet(Bottleneck, (1, 2, 1, 1), num_classes=num_classes, channels=(4, 4, 8, 16))


def tiny_simsiam(seed: int = 0) -> SimSiam:
    """Every batch norm has statistics, scale, shift and a counter of its own.

    Statistics and biases are multiples of 1/1024, so that adding a bias to a mean and subtracting it again is exact.
    """
    torch.manual_seed(seed)
    model = SimSiam(tiny_resnet(), dim=24, pred_dim=8).eval()
    for i, norm in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)):
        norm.running_mean.copy_(torch.randint(-300, 300, norm.running_mean.shape) / 1024)
        norm.running_var.uniform_(0.5, 1.5)
        norm.num_batches_tracked.fill_(1000 + i)
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1)
            nn.init.normal_(norm.bias, std=0.1)
    return model


def part(model: nn.Module, name: str) -> State:
    return {k: v.clone() for k, v in getattr(model, name).state_dict().items()}


def parts(model: SimSiam) -> dict[str, State]:
    return {name: part(model, name) for name in ('backbone', 'projector', 'predictor')}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + k: v for k, v in state.items()}


def linear(classes: int = 10) -> State:
    return {'weight': torch.randn(classes, 64), 'bias': torch.randn(classes)}


def with_bias(head: State, layer: int) -> State:
    """Adds a bias before the batch norm, as some code does: the running mean contains it."""
    bias = torch.randint(-300, 300, head[f'{layer}.weight'].shape[:1]) / 1024
    return {**head, f'{layer}.bias': bias, f'{layer + 1}.running_mean': head[f'{layer + 1}.running_mean'] + bias}


def sgd_state(model: nn.Module) -> dict[str, Any]:
    """An optimizer's state dict with momentum buffers."""
    buffers = {i: {'momentum_buffer': torch.randn_like(p)} for i, p in enumerate(model.parameters())}
    return {'state': buffers, 'param_groups': [{'lr': 0.05, 'params': list(buffers)}]}


def fair(model: SimSiam) -> OnDisk:
    p = parts(model)
    state = {
        **prefixed('module.encoder.', p['backbone']),
        **prefixed('module.encoder.fc.', with_bias(p['projector'], 6)),  # frozen and random
        **prefixed('module.predictor.', p['predictor'])}
    contents = {'epoch': 100, 'arch': 'resnet50', 'state_dict': OrderedDict(state), 'optimizer': sgd_state(model)}
    return OnDisk(contents, 'fair', p, {'optimizer': 2})


def fair_linear(model: SimSiam) -> OnDisk:
    fc = linear()
    state = {**prefixed('module.', part(model, 'backbone')), **prefixed('module.fc.', fc)}
    contents = {
        'epoch': 90, 'arch': 'resnet50', 'state_dict': state, 'best_acc1': torch.tensor(68.1),
        'optimizer': {'state': {}}}
    return OnDisk(contents, 'fair_linear', {'backbone': part(model, 'backbone'), 'classifier': fc}, {'optimizer': 1})


def mm_head(head: State) -> State:
    """0 1 3 4 6 7 -> fc0 bn0 fc1 bn1 fc2 bn2."""
    names = {'0': 'fc0', '1': 'bn0', '3': 'fc1', '4': 'bn1', '6': 'fc2', '7': 'bn2'}
    return {f'{names[k.split(".")[0]]}.{k.split(".")[1]}': v for k, v in head.items()}


def mmselfsup_1x(model: SimSiam) -> OnDisk:
    p = parts(model)
    state = {
        **prefixed('backbone.', p['backbone']), **prefixed('neck.', mm_head(p['projector'])),
        **prefixed('head.predictor.', mm_head(p['predictor']))}
    contents = {'meta': {'epoch': 200}, 'state_dict': OrderedDict(state), 'message_hub': {}, 'param_schedulers': []}
    return OnDisk(contents, 'mmselfsup_1x', p)


def mmselfsup_0x(model: SimSiam) -> OnDisk:
    p = parts(model)
    neck = mm_head(p['projector'])
    state = {
        **prefixed('encoder.0.', p['backbone']), **prefixed('encoder.1.', neck),  # everything twice
        **prefixed('backbone.', p['backbone']), **prefixed('neck.', neck),
        **prefixed('head.predictor.', mm_head(p['predictor']))}
    dropped = {'encoder': len(p['backbone']) + len(neck)}
    return OnDisk({'meta': {'epoch': 200}, 'state_dict': OrderedDict(state)}, 'mmselfsup_0x', p, dropped)


def mm_linear(model: SimSiam, name: str, layout: str) -> OnDisk:
    fc, backbone = linear(), part(model, 'backbone')
    state = {**prefixed('backbone.', backbone), **prefixed(name, fc)}
    return OnDisk({'meta': {}, 'state_dict': state}, layout, {'backbone': backbone, 'classifier': fc})


def mm_multihead(model: SimSiam, heads: int, layout: str) -> OnDisk:
    backbone, classifier = part(model, 'backbone'), {}
    for i in range(heads):
        classifier |= prefixed(f'fcs.{i}.', {'weight': torch.randn(10, 16), 'bias': torch.randn(10)})
        classifier |= prefixed(f'norms.{i}.', {
            'running_mean': torch.randn(16), 'running_var': torch.rand(16), 'num_batches_tracked': torch.tensor(7 + i)})
    state = {**prefixed('backbone.', backbone), **prefixed('head.', classifier)}
    return OnDisk({'meta': {}, 'state_dict': state}, layout, {'backbone': backbone, 'classifier': classifier})


def numbered(backbone: State) -> State:
    """lightly: the children of torchvision's ResNet, numbered."""
    numbers = {'conv1': 0, 'bn1': 1, 'layer1': 4, 'layer2': 5, 'layer3': 6, 'layer4': 7}
    return {f'{numbers[k.split(".")[0]]}.{k.split(".", 1)[1]}': v for k, v in backbone.items()}


def lightly(model: SimSiam, scale: float | None = None) -> OnDisk:
    """With `scale`, the last batch norm has this weight and the bias scale - 1."""
    p = parts(model)
    head = dict(p['projector'])
    if scale is not None:
        head |= {'7.weight': torch.full((24,), scale), '7.bias': torch.full((24,), scale - 1)}
        if scale != 1:
            p['projector'] = head
    state = {
        **prefixed('backbone.', numbered(p['backbone'])), **prefixed('projection_head.layers.', head),
        **prefixed('prediction_head.layers.', p['predictor'])}
    contents = {
        'epoch': 99, 'global_step': 1000, 'pytorch-lightning_version': '2.1.0', 'state_dict': OrderedDict(state),
        'loops': {'fit_loop': {'state_dict': {}}}, 'callbacks': {}, 'optimizer_states': [sgd_state(model)],
        'lr_schedulers': [{'last_epoch': 99}]}
    return OnDisk(contents, 'lightly', p, {'optimizer_states': 1})


def lightly_old(model: SimSiam) -> OnDisk:
    """lightly's first versions: one Sequential per layer, each with a bias."""
    p = parts(model)
    projector, predictor = p['projector'], with_bias(p['predictor'], 0)
    for layer in (0, 3, 6):
        projector = with_bias(projector, layer)
    names = {'0': '0.0', '1': '0.1', '3': '1.0', '4': '1.1', '6': '2.0', '7': '2.1'}
    last = {**names, '3': '1'}
    state = {
        **prefixed('backbone.', numbered(p['backbone'])),
        **{f'projection_mlp.{names[k[0]]}{k[1:]}': v for k, v in projector.items()},
        **{f'prediction_mlp.{last[k[0]]}{k[1:]}': v for k, v in predictor.items()}}
    return OnDisk({'state_dict': state}, 'lightly_old', p)


def lightly_class(model: SimSiam) -> OnDisk:
    """lightly's later model class: the current heads under the earlier attributes."""
    p = parts(model)
    state = {
        **prefixed('backbone.', numbered(p['backbone'])), **prefixed('projection_mlp.layers.', p['projector']),
        **prefixed('prediction_mlp.layers.', p['predictor'])}
    return OnDisk({'state_dict': state}, 'lightly_old', p)


def solo_learn(model: SimSiam, backbone: str = 'backbone.') -> OnDisk:
    p = parts(model)
    state = {
        **prefixed(backbone, p['backbone']), **prefixed('classifier.', linear()),
        **prefixed('projector.', with_bias(p['projector'], 6)), **prefixed('predictor.', p['predictor'])}
    contents = {
        'epoch': 99, 'pytorch-lightning_version': '1.2.8', 'state_dict': state, 'optimizer_states': [sgd_state(model)],
        'hyper_parameters': {'method': 'simsiam'}}
    return OnDisk(contents, 'solo_learn', p, {'classifier': 2, 'optimizer_states': 1})


def vissl(model: SimSiam) -> OnDisk:
    backbone = part(model, 'backbone')
    trunk = prefixed('_feature_blocks.', backbone)
    heads = {'0.clf.0.weight': torch.randn(8, 64), '0.clf.0.bias': torch.randn(8)}
    classy = {
        'base_model': {'model': {'trunk': trunk, 'heads': heads}, 'meta': {}}, 'optimizer': sgd_state(model),
        'phase_idx': 3}
    contents = {'phase_idx': 3, 'iteration': 100, 'loss': {}, 'classy_state_dict': classy}
    return OnDisk(contents, 'vissl', {'backbone': backbone}, {'heads': 2})


def torchvision(model: SimSiam, classifier: bool = False) -> OnDisk:
    backbone, fc = part(model, 'backbone'), linear()
    if not classifier:
        return OnDisk(backbone, 'torchvision', {'backbone': backbone})
    return OnDisk({**backbone, **prefixed('fc.', fc)}, 'torchvision', {'backbone': backbone, 'classifier': fc})


def mmdet_fpn(model: SimSiam) -> OnDisk:
    backbone = part(model, 'backbone')
    state = {
        **prefixed('backbone.', backbone), 'neck.lateral_convs.0.conv.weight': torch.randn(4, 16, 1, 1),
        'rpn_head.rpn_conv.weight': torch.randn(4, 4, 3, 3), 'roi_head.bbox_head.fc_cls.weight': torch.randn(81, 8)}
    return OnDisk(
        {'meta': {}, 'state_dict': state}, 'mmdet', {'backbone': backbone}, {'neck': 1, 'rpn_head': 1, 'roi_head': 1})


def mmdet_c4(model: SimSiam) -> OnDisk:
    backbone = part(model, 'backbone')
    state = {
        f'roi_head.shared_head.{k}' if k.startswith('layer4') else f'backbone.{k}': v for k, v in backbone.items()}
    state |= {
        'roi_head.shared_head.norm.weight': torch.ones(64), 'roi_head.shared_head.norm.running_mean': torch.ones(64),
        'rpn_head.rpn_cls.weight': torch.randn(15, 8, 1, 1)}
    return OnDisk(
        {'meta': {}, 'state_dict': state}, 'mmdet', {'backbone': backbone}, {'roi_head': 2, 'rpn_head': 1})


def mmseg(model: SimSiam) -> OnDisk:
    backbone = part(model, 'backbone')
    state = {
        **prefixed('backbone.', backbone), 'decode_head.conv_seg.weight': torch.randn(21, 8, 1, 1),
        'decode_head.conv_seg.bias': torch.randn(21), 'auxiliary_head.conv_seg.weight': torch.randn(21, 8, 1, 1)}
    return OnDisk(
        {'meta': {}, 'state_dict': state}, 'mmdet', {'backbone': backbone}, {'decode_head': 2, 'auxiliary_head': 1})


def detectron2(model: SimSiam) -> OnDisk:
    """Steps of the published converters: stem, layerN -> res(N+1), bnN -> convN.norm, downsample -> shortcut."""
    backbone, converted = part(model, 'backbone'), {}
    for key, value in backbone.items():
        if 'layer' not in key:
            key = f'stem.{key}'
        for t in (1, 2, 3, 4):
            key = key.replace(f'layer{t}', f'res{t + 1}')
        for t in (1, 2, 3):
            key = key.replace(f'bn{t}', f'conv{t}.norm')
        converted[key.replace('downsample.0', 'shortcut').replace('downsample.1', 'shortcut.norm')] = value.numpy()
    contents = {'model': converted, '__author__': 'MOCO', 'matching_heuristics': True}
    return OnDisk(contents, 'detectron2', {'backbone': backbone})


def ours(model: SimSiam) -> OnDisk:
    return OnDisk({'model': dict(model.state_dict()), 'epoch': 3}, 'simsiam_models', parts(model))


LAYOUTS = {
    'fair': fair, 'fair_linear': fair_linear, 'mmselfsup_0x': mmselfsup_0x, 'mmselfsup_1x': mmselfsup_1x,
    'mmselfsup_0x_linear': lambda m: mm_linear(m, 'head.fc_cls.', 'mmselfsup_0x_linear'),
    'mmselfsup_1x_linear': lambda m: mm_linear(m, 'head.fc.', 'mmselfsup_1x_linear'),
    'mmselfsup_0x_multihead': lambda m: mm_multihead(m, 5, 'mmselfsup_0x_multihead'),
    'mmselfsup_1x_multihead': lambda m: mm_multihead(m, 4, 'mmselfsup_1x_multihead'),
    'lightly': lightly, 'lightly_identity_norm': lambda m: lightly(m, 1.0), 'lightly_old': lightly_old,
    'lightly_class': lightly_class, 'solo_learn': solo_learn, 'solo_learn_encoder': lambda m: solo_learn(m, 'encoder.'),
    'vissl': vissl, 'torchvision': torchvision, 'torchvision_fc': lambda m: torchvision(m, True), 'mmdet': mmdet_fpn,
    'mmdet_c4': mmdet_c4, 'mmseg': mmseg, 'detectron2': detectron2, 'simsiam_models': ours,
}


def write(contents: Any, path: Path, container: str = 'zip') -> Path:
    """container: 'zip' and 'legacy' (torch's two formats), 'pickle' (detectron2), 'safetensors'."""
    if container == 'pickle':
        path.write_bytes(pickle.dumps(contents))
    elif container == 'safetensors':
        save_file({k: v.clone() for k, v in contents.items()}, path)
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=container == 'zip')
    return path


@contextmanager
def foreign() -> Iterator[ModuleType]:
    """A module of foreign training code, which no longer exists when the file is read."""
    module = ModuleType('vendored_trainer')

    class ConfigDict(dict):
        pass

    class HistoryBuffer:
        def __init__(self) -> None:
            self._log_history = np.arange(5.0)
            self._statistics_methods = OrderedDict(mean=np.float64(0.5))

    class Slots:
        __slots__ = ('lr',)

        def __init__(self) -> None:
            self.lr = 0.1

    class Loop(list):
        pass

    def schedule(epoch: int) -> float:
        return 0.05

    for x in (ConfigDict, HistoryBuffer, Slots, Loop, schedule):
        x.__module__, x.__qualname__ = module.__name__, x.__name__
        setattr(module, x.__name__, x)
    sys.modules[module.__name__] = module
    try:
        yield module
    finally:
        del sys.modules[module.__name__]

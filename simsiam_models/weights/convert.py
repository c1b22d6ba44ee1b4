"""Converts a checkpoint of any layout to the file that timm, torchvision, detectron2, mmdet or ONNX runtimes load."""
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import timm
import torch
from torch import Tensor

from ..runtime.files import write_atomically
from ..runtime.messages import require
from .export import describe_mismatch, export_checkpoint
from .identity import make_origin, read_origin
from .layouts import Checkpoint, load_checkpoint
from .published import WEIGHTS, pixel_statistics
from .reading import COUNTER
from .tensorfile import MODEL, hash_file

TARGETS = ('timm', 'torchvision', 'detectron2', 'mmdet', 'onnx')
SUFFIX = {'detectron2': '.pkl', 'onnx': '.onnx'}  # readers recognize these files by their suffix


def convert(source: str | Path, out: str | Path, to: str, branch: str | None = None) -> str:
    """Writes the backbone of `source` and, if the target has a place for it, the linear classifier.

    `source` is a checkpoint in any layout that `load_checkpoint` knows; `out` is a new folder for timm, a new file for
    the other TARGETS. `branch` is as for `load_checkpoint`. Returns a report of what was read, written and left out,
    and the code that uses the result.

    Raises:
        FileNotFoundError, ValueError: `source` does not exist or is not a ResNet-50, or `out` exists.
        RuntimeError: the target needs a package that is not installed.
    """
    source, out = Path(source), Path(out)
    if to not in TARGETS:
        raise ValueError(f'{to!r} is not a target: choose one of {", ".join(TARGETS)}')
    if not source.exists():
        raise FileNotFoundError(f'{source} does not exist: name a checkpoint to convert')
    if out.exists() and not (to == 'timm' and out.is_dir() and not any(out.iterdir())):
        raise ValueError(f'{out} already exists: name a new {"folder" if to == "timm" else "file"}, or remove it first')
    if to in SUFFIX and out.suffix != SUFFIX[to]:
        raise ValueError(f'{out} does not end in {SUFFIX[to]}, the suffix of {to} files: rename it')
    checkpoint = load_checkpoint(source, branch)
    expected = timm.create_model('resnet50', num_classes=0, device='meta').state_dict()  # names and shapes, no memory
    if mismatch := describe_mismatch(checkpoint.backbone, expected):
        raise ValueError(f'the backbone in {source} is not a ResNet-50 ({len(expected)} entries), the only network '
                         f'that convert writes: {mismatch}')
    if to == 'timm':
        tag = checkpoint.info.get('tag')
        origin = make_origin(WEIGHTS[tag], hash_file(source), checkpoint.layout) if tag else read_origin(
            source / MODEL if source.is_dir() else source)
        export_checkpoint(checkpoint, out, {'tag': tag} if tag else None, origin)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, lambda file: WRITERS[to](checkpoint, file))
    return '\n'.join([
        f'{source}: {checkpoint.describe()}', *_list_omissions(checkpoint, to), f'Wrote {out} for {to}. Use it with',
        _explain_use(checkpoint, out, to)])


def _list_omissions(checkpoint: Checkpoint, to: str) -> list[str]:
    left = [name for name in ('projector', 'predictor') if getattr(checkpoint, name)]
    left = [] if to == 'timm' and len(left) == 2 else left  # heads.safetensors takes both or none
    if checkpoint.classifier and (to in ('detectron2', 'mmdet') or 'fc.weight' not in checkpoint.model_state()):
        left += ['classifier']
    return [f'Left out: {", ".join(left)}.'] if left else []


def _clone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies the tensors: torch.save writes the whole storage of a view."""
    return {k: v.clone() for k, v in state.items()}


def _rename_for_detectron2(name: str) -> str:
    name = name if 'layer' in name else f'stem.{name}'
    name = re.sub(r'layer(\d)', lambda m: f'res{int(m[1]) + 1}', name)  # detectron2 counts the stem as stage 1
    name = re.sub(r'bn(\d)', r'conv\1.norm', name)
    return name.replace('downsample.0', 'shortcut').replace('downsample.1', 'shortcut.norm')


def _write_detectron2(checkpoint: Checkpoint, file: BinaryIO) -> None:
    model = {_rename_for_detectron2(k): v.numpy() for k, v in checkpoint.backbone.items()}
    # Protocol 3 stores bytes unchanged and module names as lines of text.
    data = pickle.dumps({'model': model, '__author__': 'SimSiam', 'matching_heuristics': True}, protocol=3)
    # numpy 2 writes the new name of this module, which numpy before 1.26 lacks. Every numpy reads the old name.
    file.write(data.replace(b'cnumpy._core.multiarray\n', b'cnumpy.core.multiarray\n', 1))


def _write_onnx(checkpoint: Checkpoint, file: BinaryIO) -> None:
    """Writes a ResNet-50 in ONNX operators, one operator per timm module.

    The graph is built rather than traced: weights keep their names and batch norms stay separate, so that converting
    back loses nothing, and the file does not depend on the version of torch.
    """
    require('an ONNX file', onnx='onnx')
    import onnx

    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    state = checkpoint.model_state()
    nodes, output = _build_onnx_nodes(state, helper.make_node)
    width = len(state.get('fc.weight', state['layer4.2.bn3.weight']))
    graph = helper.make_graph(
        nodes, 'simsiam_resnet50',
        [helper.make_tensor_value_info('images', number, ['batch', 3, 'height', 'width'])],
        [helper.make_tensor_value_info(output, number, ['batch', width])],
        [onnx.numpy_helper.from_array(v.contiguous().numpy(), k) for k, v in state.items()
         if not k.endswith(COUNTER)])
    # Opset 17 and file version 8 date from 2022: current and much older runtimes read them.
    model = helper.make_model(
        graph, producer_name='simsiam_models', opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    counters = {k: int(v) for k, v in state.items() if k.endswith(COUNTER)}  # inference has no operator for them
    helper.set_model_props(model, {COUNTER: json.dumps(counters)})
    file.write(model.SerializeToString())


def _build_onnx_nodes(state: dict[str, Tensor], make_node: Callable[..., Any]) -> tuple[list[Any], str]:
    """Returns the operators, and the name of the output: 'features' (B, 2048) or 'logits' (B, classes)."""
    nodes = []

    def add(op: str, *inputs: str, to: str, **attributes: Any) -> str:
        nodes.append(make_node(op, inputs, [to], name=to, **attributes))
        return to

    def conv_bn(x: str, conv: str, bn: str, stride: int = 1) -> str:
        k = state[f'{conv}.weight'].shape[-1]
        x = add('Conv', x, f'{conv}.weight', to=conv, kernel_shape=[k] * 2, pads=[k // 2] * 4, strides=[stride] * 2)
        parts = [f'{bn}.{part}' for part in ('weight', 'bias', 'running_mean', 'running_var')]
        return add('BatchNormalization', x, *parts, to=bn, epsilon=1e-5)

    x = add('Relu', conv_bn('images', 'conv1', 'bn1', 2), to='act1')
    x = add('MaxPool', x, to='maxpool', kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2])
    for stage, depth in enumerate((3, 4, 6, 3), 1):
        for i in range(depth):
            block, shortcut = f'layer{stage}.{i}', x
            stride = 2 if i == 0 and stage > 1 else 1  # of the 3x3 convolution
            x = add('Relu', conv_bn(x, f'{block}.conv1', f'{block}.bn1'), to=f'{block}.act1')
            x = add('Relu', conv_bn(x, f'{block}.conv2', f'{block}.bn2', stride), to=f'{block}.act2')
            x = conv_bn(x, f'{block}.conv3', f'{block}.bn3')
            if i == 0:
                shortcut = conv_bn(shortcut, f'{block}.downsample.0', f'{block}.downsample.1', stride)
            x = add('Relu', add('Add', x, shortcut, to=f'{block}.add'), to=f'{block}.act3')
    x = add('GlobalAveragePool', x, to='global_pool')
    x = add('Flatten', x, to='features', axis=1)  # (B, 2048)
    if 'fc.weight' in state:
        x = add('Gemm', x, 'fc.weight', 'fc.bias', to='logits', transB=1)
    return nodes, x


WRITERS = {
    'torchvision': lambda checkpoint, file: torch.save(_clone(checkpoint.model_state()), file),
    'detectron2': _write_detectron2,
    'mmdet': lambda checkpoint, file: torch.save({'meta': {}, 'state_dict': _clone(checkpoint.backbone)}, file),
    'onnx': _write_onnx,
}


def _explain_use(checkpoint: Checkpoint, out: Path, to: str) -> str:
    file, fc = repr(str(out)), checkpoint.model_state().get('fc.bias')
    mean, std = pixel_statistics(checkpoint.info.get('bgr', False)).values()
    means, stds = ([round(255 * x, 3) for x in values] for values in (mean, std))
    output, build = 'features', 'torchvision.models.resnet50(); model.fc = torch.nn.Identity()'
    if fc is not None:
        output, build = 'logits', f'torchvision.models.resnet50(num_classes={len(fc)})'
    return {
        'timm': (
            f'  model = timm.create_model({f"local-dir:{out}"!r}, pretrained=True)\n'
            f"with timm's transform for it, which takes RGB images and has mean {mean} and std {std}."),
        'torchvision': (
            f'  model = {build}\n  model.load_state_dict(torch.load({file}, weights_only=True))\n'
            f'In eval mode it gives the same {output} as the timm model, from RGB in 0..1 minus {mean}, over {std}.'),
        # Both detectors default to other pixel values, which raise no error but cost accuracy.
        'detectron2': (
            f'  MODEL.WEIGHTS: {file}\n  MODEL.PIXEL_MEAN: {means}\n  MODEL.PIXEL_STD: {stds}\n'
            '  MODEL.RESNETS.STRIDE_IN_1X1: False\n  INPUT.FORMAT: "RGB"'),
        'mmdet': (
            "  backbone=dict(type='ResNet', depth=50, style='pytorch', "
            f"init_cfg=dict(type='Pretrained', checkpoint={file}))\n"
            f'with RGB images, mean {means} and std {stds}.'),
        'onnx': (
            f'  {output}, = onnxruntime.InferenceSession({file}).run(None, {{"images": images}})\n'
            f'images: float32 (B, 3, H, W), RGB in 0..1 minus {mean}, over {std}.'),
    }[to]

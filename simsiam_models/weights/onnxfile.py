"""ONNX files of any network: written, told how to prepare images, and compared with torch before they are kept."""
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import timm
import torch
from torch import Tensor, nn

from ..runtime.messages import one_line, require
from .networks import TIMM_ERRORS, Trained
from .reading import COUNTER

OPSET = 17  # of 2022, with file version 8: current and much older runtimes read them
LARGEST = 2 * 10 ** 9  # bytes of a protobuf message, which an ONNX file in one piece is
TOLERANCE = 1e-4  # of the largest output; of 106 random networks of timm's, one differed by 4e-5, the others by < 1e-5
BATCHES = 1, 3  # images; the traced graph saw 2


def make_onnx(trained: Trained, plain_resnet50: bool) -> tuple[bytes, float]:
    """Returns an ONNX file, and its largest difference from torch relative to the largest output.

    The input 'images' is float32 (batch, 3, H, W), the output 'features' (batch, features) or 'logits' (batch,
    classes). The batch is free. H and W are those of `input_size`; a plain ResNet-50 takes any. The metadata say how
    images are prepared.

    Raises:
        RuntimeError: onnx or onnxruntime is not installed.
        ValueError: the network cannot be written in ONNX's operators, or computes something else there.
    """
    require('an ONNX file', onnx='onnx', onnxruntime='onnxruntime')
    model, name = trained.model, trained.name
    if (size := sum(v.nbytes for v in model.state_dict().values())) > LARGEST:
        raise ValueError(f'{name} has {size / 1e9:.1f} GB of weights, but an ONNX file in one piece holds at most 2 GB')
    output = 'logits' if model.num_classes else 'features'
    proto = _build_resnet50(model.state_dict(), output) if plain_resnet50 else _trace(model, name, output)
    _describe_images(proto, trained)
    data = proto.SerializeToString()
    return data, _compare(data, model, name)


def _trace(model: nn.Module, name: str, output: str) -> Any:
    """Returns the graph that torch's exporter records; it needs no package besides onnx, unlike torch's newer one."""
    import onnx

    for module in model.modules():
        if getattr(module, 'fused_attn', None):  # the exporter lacks some forms of fused attention
            cast(Any, module).fused_attn = False
    torch.onnx.register_custom_op_symbolic('aten::rms_norm', _rms_norm, OPSET)
    file: Any = io.BytesIO()  # torch annotates only paths
    free = {0: 'batch'}
    try:
        with warnings.catch_warnings(), _silence():
            warnings.simplefilter('ignore')  # it warns of its age, and of each constant of the trace
            torch.onnx.export(
                model, (torch.randn(2, *_input_size(model)),), file, dynamo=False, opset_version=OPSET,
                input_names=['images'], output_names=[output], dynamic_axes={'images': free, output: free})
    except (RuntimeError, ValueError, NotImplementedError, *TIMM_ERRORS) as e:
        raise ValueError(
            f'{name} cannot be written in the operators of ONNX ({one_line(e)}); convert it to timm instead') from None
    finally:
        torch.onnx.unregister_custom_op_symbolic('aten::rms_norm', OPSET)
    return onnx.load_from_string(file.getvalue())


def _rms_norm(g: Any, x: Any, shape: Any, weight: Any, eps: Any) -> Any:
    """Writes x / sqrt(mean(x^2) + eps) * weight over the last dimension, for which ONNX has no operator before 23."""
    least = eps.toIValue() or torch.finfo(torch.float32).eps
    mean = g.op('ReduceMean', g.op('Mul', x, x), axes_i=[-1], keepdims_i=1)
    root = g.op('Sqrt', g.op('Add', mean, g.op('Constant', value_t=torch.tensor(least))))
    return g.op('Mul', g.op('Div', x, root), weight)


@contextmanager
def _silence() -> Iterator[None]:
    """Discards what is printed, also from C++: the exporter's graphs when it fails, and the tracer's warnings."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    try:
        with open(os.devnull, 'w') as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
        yield
    finally:
        for to, file in enumerate(kept, 1):
            os.dup2(file, to)
            os.close(file)


def _input_size(model: nn.Module) -> tuple[int, ...]:
    return cast(tuple[int, ...], timm.data.resolve_model_data_config(model)['input_size'])


def _describe_images(proto: Any, trained: Trained) -> None:
    """Adds to the metadata, as JSON: the network, its classes, and timm's description of how images are prepared."""
    import onnx

    cfg = timm.data.resolve_model_data_config(trained.model)
    facts = {
        'architecture': trained.name, 'pixels': 'RGB from 0 to 1, minus mean, over std', **{k: cfg[k] for k in (
            'input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std')}}
    if names := cast(dict[str, Any], trained.model.pretrained_cfg).get('label_names'):
        facts['label_names'] = names
    kept = {p.key: p.value for p in proto.metadata_props}
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}
    onnx.helper.set_model_props(proto, {**kept, **texts})
    proto.producer_name = 'simsiam_models'


def _compare(data: bytes, model: nn.Module, name: str) -> float:
    """Returns the largest difference between ONNX runtime and torch; ValueError if it is above TOLERANCE."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    rng = torch.Generator().manual_seed(0)
    try:
        session = onnxruntime.InferenceSession(data, options, providers=['CPUExecutionProvider'])
        differences = []
        for batch in BATCHES:
            x = torch.randn(batch, *_input_size(model), generator=rng)
            with torch.inference_mode():
                expected = model(x).numpy()
            found, = session.run(None, {'images': x.numpy()})
            if found.shape != expected.shape:
                raise ValueError(f'shape {found.shape} instead of {expected.shape}')
            differences.append(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12))
    except Exception as e:  # onnxruntime has many types of errors, without a common base class
        raise ValueError(f'{name} does not run in ONNX ({one_line(e)}); convert it to timm instead') from None
    if not (worst := float(max(differences))) <= TOLERANCE:  # NaN too
        raise ValueError(
            f'{name} gives different results in ONNX and in torch: the outputs differ by {worst:.1e} of the largest '
            f'one, more than rounding explains ({TOLERANCE:g}); convert it to timm instead')
    return worst


def _build_resnet50(state: dict[str, Tensor], output: str) -> Any:
    """Returns a ResNet-50 in ONNX operators, one operator per timm module.

    The graph is built rather than traced: weights keep their names and batch norms stay separate, so that converting
    back loses nothing, and the file does not depend on the version of torch.
    """
    import onnx

    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    width = len(state.get('fc.weight', state['layer4.2.bn3.weight']))
    graph = helper.make_graph(
        _build_nodes(state, helper.make_node), 'simsiam_resnet50',
        [helper.make_tensor_value_info('images', number, ['batch', 3, 'height', 'width'])],
        [helper.make_tensor_value_info(output, number, ['batch', width])],
        [onnx.numpy_helper.from_array(v.contiguous().numpy(), k) for k, v in state.items()
         if not k.endswith(COUNTER)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', OPSET)], ir_version=8)
    counters = {k: int(v) for k, v in state.items() if k.endswith(COUNTER)}  # inference has no operator for them
    helper.set_model_props(model, {COUNTER: json.dumps(counters)})
    return model


def _build_nodes(state: dict[str, Tensor], make_node: Callable[..., Any]) -> list[Any]:
    """Returns the operators; the output is 'features' (B, 2048) or, with a classifier, 'logits' (B, classes)."""
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
        add('Gemm', x, 'fc.weight', 'fc.bias', to='logits', transB=1)
    return nodes

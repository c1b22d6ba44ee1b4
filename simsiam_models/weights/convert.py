"""Converts the weights of any source to the file that timm, torchvision, detectron2, mmdet or ONNX runtimes load."""
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import timm
import torch
from torch import Tensor

from ..runtime.files import write_atomically
from .export import copy_export, describe_mismatch, export_checkpoint
from .identity import make_origin, read_origin
from .networks import Trained, load_trained
from .onnxfile import TOLERANCE, make_onnx
from .published import WEIGHTS
from .tensorfile import MODEL, hash_file

TARGETS = ('timm', 'torchvision', 'detectron2', 'mmdet', 'onnx')
SUFFIX = {'detectron2': '.pkl', 'onnx': '.onnx'}  # readers recognize these files by their suffix
DEPTHS = {f'resnet{depth}': depth for depth in (18, 34, 50, 101, 152)}  # what torchvision and both detectors build


def convert(source: str | Path, out: str | Path, to: str, branch: str | None = None) -> str:
    """Writes the backbone of `source` and, if the target has a place for it, the linear classifier.

    `source` is a folder exported for timm or written by `pretrain`, `finetune` or `publish`, of any architecture of
    timm's, or a checkpoint in any layout that `load_checkpoint` knows; `out` is a new folder for timm, a new file for
    the other TARGETS. `branch` is as for `load_checkpoint`. ONNX files are compared with torch first. Returns a report
    of what was read, written and left out, and the code that uses the result.

    Raises:
        FileNotFoundError, ValueError: `source` holds no weights of a known network, the target cannot hold that
            network, or `out` exists.
        RuntimeError: the target needs a package that is not installed.
    """
    source, out = Path(source), Path(out)
    if to not in TARGETS:
        raise ValueError(f'{to!r} is not a target: choose one of {", ".join(TARGETS)}')
    if not source.exists():
        raise FileNotFoundError(f'{source} does not exist: name a checkpoint or a folder to convert')
    if out.exists() and not (to == 'timm' and out.is_dir() and not any(out.iterdir())):
        raise ValueError(f'{out} already exists: name a new {"folder" if to == "timm" else "file"}, or remove it first')
    if to in SUFFIX and out.suffix != SUFFIX[to]:
        raise ValueError(f'{out} does not end in {SUFFIX[to]}, the suffix of {to} files: rename it')
    trained, checked = load_trained(source, branch), []
    if to == 'timm':
        _write_folder(trained, out)
    elif to == 'onnx':
        data, difference = make_onnx(trained, trained.name == 'resnet50' and not _find_deviation(trained))
        checked = [f'The outputs differ from those of torch by {difference:.1e} of the largest one (tolerance '
                   f'{TOLERANCE:g}).']
        _write(out, lambda file: file.write(data))
    else:
        if deviation := _find_deviation(trained):
            raise ValueError(f'{to} cannot hold {trained.path}: {deviation}; convert it to timm or onnx')
        state = {k: v.clone() for k, v in trained.model.state_dict().items()}  # torch.save writes whole storages
        _write(out, lambda file: WRITERS[to](state, file))
    return '\n'.join([
        trained.describe(), *_list_omissions(trained, to), *checked, f'Wrote {out} for {to}. Use it with',
        _explain_use(trained, out, to)])


def _write(out: Path, write: Callable[[BinaryIO], Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, write)


def _write_folder(trained: Trained, out: Path) -> None:
    if (checkpoint := trained.checkpoint) is None:
        copy_export(trained.path, out, {})
        return
    tag, path = checkpoint.info.get('tag'), trained.path
    origin = make_origin(WEIGHTS[tag], hash_file(path), checkpoint.layout) if tag else read_origin(
        path / MODEL if path.is_dir() else path)
    export_checkpoint(checkpoint, out, {'tag': tag} if tag else None, origin, trained.network)


def _find_deviation(trained: Trained) -> str:
    """Says why the network is not one of torchvision's ResNets, in entries and in outputs; '' if it is one."""
    model, name = trained.model, trained.name
    if name not in DEPTHS:
        return f'its architecture is {name}, not one of {", ".join(DEPTHS)}'
    plain = timm.create_model(name, num_classes=model.num_classes).eval()
    if mismatch := describe_mismatch(model.state_dict(), plain.state_dict()):
        return f'its {name} is not the usual one: {mismatch}'
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = model(x), plain(x)
    if not torch.allclose(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()), equal_nan=True):
        return f'its {name} computes something different from the usual one because of {trained.network.args}'
    return ''


def _list_omissions(trained: Trained, to: str) -> list[str]:
    left = [name for name in ('projector', 'predictor') if any(k.startswith(name) for k in trained.heads)]
    left = [] if to == 'timm' and len(left) == 2 else left  # heads.safetensors takes both or none
    several = trained.checkpoint and trained.checkpoint.classifier and not trained.model.num_classes  # multi-head
    if several or trained.model.num_classes and to in ('detectron2', 'mmdet'):
        left += ['classifier']
    return [f'Left out: {", ".join(left)}.'] if left else []


def _drop_classifier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.startswith('fc.')}


def _rename_for_detectron2(name: str) -> str:
    name = name if 'layer' in name else f'stem.{name}'
    name = re.sub(r'layer(\d)', lambda m: f'res{int(m[1]) + 1}', name)  # detectron2 counts the stem as stage 1
    name = re.sub(r'bn(\d)', r'conv\1.norm', name)
    return name.replace('downsample.0', 'shortcut').replace('downsample.1', 'shortcut.norm')


def _write_detectron2(state: dict[str, Tensor], file: BinaryIO) -> None:
    model = {_rename_for_detectron2(k): v.numpy() for k, v in _drop_classifier(state).items()}
    # Protocol 3 stores bytes unchanged and module names as lines of text.
    data = pickle.dumps({'model': model, '__author__': 'SimSiam', 'matching_heuristics': True}, protocol=3)
    # numpy 2 writes the new name of this module, which numpy before 1.26 lacks. Every numpy reads the old name.
    file.write(data.replace(b'cnumpy._core.multiarray\n', b'cnumpy.core.multiarray\n', 1))


WRITERS: dict[str, Callable[[dict[str, Tensor], BinaryIO], None]] = {
    'torchvision': torch.save,
    'detectron2': _write_detectron2,
    'mmdet': lambda state, file: torch.save({'meta': {}, 'state_dict': _drop_classifier(state)}, file),
}


def _explain_use(trained: Trained, out: Path, to: str) -> str:
    file, classes, name = repr(str(out)), trained.model.num_classes, trained.name
    cfg, depth = timm.data.resolve_model_data_config(trained.model), DEPTHS.get(name)
    mean, std, (_, height, width) = tuple(cfg['mean']), tuple(cfg['std']), cfg['input_size']
    means, stds = ([round(255 * x, 3) for x in values] for values in (mean, std))
    output, build = 'features', f'torchvision.models.{name}(); model.fc = torch.nn.Identity()'
    if classes:
        output, build = 'logits', f'torchvision.models.{name}(num_classes={classes})'
    small = '  MODEL.RESNETS.RES2_OUT_CHANNELS: 64\n' if depth in (18, 34) else ''
    sides = 'H, W' if name == 'resnet50' else f'{height}, {width}'
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
            f'  MODEL.RESNETS.DEPTH: {depth}\n{small}'
            '  MODEL.RESNETS.STRIDE_IN_1X1: False\n  INPUT.FORMAT: "RGB"'),
        'mmdet': (
            f"  backbone=dict(type='ResNet', depth={depth}, style='pytorch', "
            f"init_cfg=dict(type='Pretrained', checkpoint={file}))\n"
            f'with RGB images, mean {means} and std {stds}.'),
        'onnx': (
            f'  {output}, = onnxruntime.InferenceSession({file}).run(None, {{"images": images}})\n'
            f'images: float32 (B, 3, {sides}), RGB in 0..1 minus {mean}, over {std}; the metadata of the file say so '
            'too.'),
    }[to]

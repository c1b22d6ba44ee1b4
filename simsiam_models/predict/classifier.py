"""Trained classifiers: loading, with the preprocessing and the names of classes that are stored with them."""
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config
from timm.models import is_model
from torch import Tensor, nn

from ..benchmarks.backbone import read_pixels
from ..benchmarks.trained import BACKBONE
from ..runtime.messages import one_line, short
from ..weights import tensorfile
from ..weights.folders import create_from_folder, read_config
from ..weights.published import NAME, WEIGHTS
from ..weights.reading import find_export
from ..weights.tensorfile import CONFIG

CROPS = 'center', 'squash', 'border'  # timm's
HUB = ('hf-hub:', 'hf_hub:')
# What timm, torch and Pillow raise for a configuration that describes no working network or transform.
WRONG = (
    TypeError, ValueError, AssertionError, LookupError, ArithmeticError, AttributeError, RuntimeError, SafetensorError)
LONE = re.compile('[\ud800-\udc7f\udd00-\udfff]')  # what JSON can name, but no text holds


class ImageClassifier:
    """A classifier with the preprocessing of its evaluation.

    `classes` are the names of its classes; `named` says whether they are names, or only numbers.
    """

    def __init__(self, model: nn.Module, name: str, imagenet: bool, device: torch.device) -> None:
        self.model = model.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        self.name, self.device, config = name, device, cast(dict[str, Any], model.pretrained_cfg)
        classes = cast(int, model.num_classes)
        self.classes, self.named = name_classes(config.get('label_names'), classes, imagenet, name)
        read_pixels(config, name)
        crop, mode = config.get('crop_pct'), config.get('crop_mode')
        if crop is not None and not (type(crop) in (int, float) and 0 < crop < 2) or mode not in (None, *CROPS):
            raise ValueError(f'{name}: crop_pct {short(crop)}, crop_mode {short(mode)} in its configuration: a share '
                             f'of the image and one of {", ".join(CROPS)} are needed')
        try:
            self.transform = create_transform(**resolve_data_config(pretrained_cfg=config))
            item = self.prepare(np.zeros((48, 64, 3), np.uint8))
            out = self.model(item[None].to(device))
        except WRONG as e:
            raise ValueError(f'{name}: the preprocessing in its configuration cannot be used ({one_line(e)})') from None
        if out.shape != (1, len(self.classes)):
            raise ValueError(f'{name} returns {tuple(out.shape)}, not a row of {len(self.classes)} classes')

    def prepare(self, image: np.ndarray) -> Tensor:
        """Turns (H, W, 3) uint8 into (3, S, S), as timm's evaluation and that of `simsiam finetune` do."""
        x: Tensor = self.transform(Image.fromarray(image))
        return x

    @torch.no_grad()
    def predict(self, items: Sequence[Tensor], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the k most likely classes of each image, (B, k) int64, and their probabilities, float32."""
        x = torch.stack(list(items)).to(self.device)
        logits = self.model(x.contiguous(memory_format=torch.channels_last)).float()
        if not bool(logits.isfinite().all()):
            raise ValueError(f'{self.name}: its outputs are not finite; check the weights')
        first = logits.topk(k).indices  # of the logits, since probabilities may round to the same number
        return first.cpu().numpy(), logits.softmax(1).gather(1, first).cpu().numpy()


def name_classes(stored: Any, n: int, imagenet: bool, where: str) -> tuple[list[str], bool]:
    """Returns names of n classes, and False if they are only numbers.

    Args:
        stored: label_names of a configuration.
        imagenet: whether n classes are ImageNet's, in timm's order, if ImageNet has a set of so many.

    Raises:
        ValueError: `stored` is not a list of n names.
    """
    if stored:
        if not isinstance(stored, (list, tuple)) or len(stored) != n:
            found = f'{len(stored)} names' if isinstance(stored, (list, tuple)) else short(stored)
            raise ValueError(f'{where}: label_names in its configuration: {n} names are needed, not {found}')
        if not all(type(name) in (str, int) for name in stored):
            raise ValueError(f'{where}: label_names in its configuration: not all are names: {short(stored)}')
        return [LONE.sub('\ufffd', str(name)) for name in stored], True
    subset = infer_imagenet_subset({'num_classes': n}) if imagenet else None
    if subset is None:
        return [str(i) for i in range(n)], False
    info = ImageNetInfo(subset)
    synsets, names = info.label_names(), info.label_descriptions()
    count = Counter(names)  # ImageNet has two cranes
    return [name if count[name] == 1 else f'{name} ({s})' for s, name in zip(synsets, names, strict=True)], True


def load_classifier(name: str, device: torch.device) -> ImageClassifier:
    """Loads a classifier.

    Args:
        name: a folder that `simsiam finetune` wrote or that was exported for timm, 'local-dir:FOLDER', a timm name, a
            tag of this package, or 'hf-hub:REPO'.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: there is no such model, it has no classifier, or it is damaged.
    """
    path = Path(name.removeprefix('local-dir:')).expanduser()
    timm_name = f'{NAME}.{name}' if name in WEIGHTS and not path.exists() else name
    if path.is_dir() or name.startswith('local-dir:'):
        model = _load_folder(path, name)
        tag = cast(dict[str, Any], model.pretrained_cfg).get('tag')
        return ImageClassifier(model, name, isinstance(tag, str) and tag in WEIGHTS, device)
    if path.is_file():
        raise ValueError(
            f'{name}: a lone file stores neither preprocessing nor class names; `simsiam convert {name} OUT --to timm` '
            'writes a folder, and you can add label_names to its config.json')
    if not name.startswith(HUB):
        if not is_model(timm_name.split('.')[0]):
            raise FileNotFoundError(
                f'{name}: neither a folder nor a timm model; give the --output of `simsiam finetune`, `detect` or '
                '`segment`, a folder exported for timm, a name from timm.list_pretrained(), or a tag in '
                '`simsiam weights list` that has a classifier')
        config = timm.get_pretrained_cfg(timm_name)
        if config is not None and not config.num_classes:
            raise _lacks_classifier(timm_name)
    model = _create(name, lambda: timm.create_model(timm_name, pretrained=True))
    if not model.num_classes:
        raise _lacks_classifier(name)
    return ImageClassifier(model, name, True, device)


def _load_folder(folder: Path, name: str) -> nn.Module:
    if not (folder / CONFIG).is_file():
        if (folder / BACKBONE / CONFIG).is_file():
            raise _lacks_classifier(name)
        inner = sorted(p.parent.name for p in folder.glob(f'*/{CONFIG}'))
        hint = f'; these subfolders have one: {short(", ".join(inner))}' if inner else ''
        raise FileNotFoundError(
            f'{name}: no {CONFIG} there; name the --output of a finished `simsiam finetune`, `detect` or `segment`, or '
            f'a folder exported for timm{hint}')
    if not read_config(folder).description['num_classes']:
        raise _lacks_classifier(name)
    if not tensorfile.is_whole(file := find_export(folder)):
        raise ValueError(f'{file}: it is damaged or was cut off; copy or export it again')
    return _create(name, lambda: create_from_folder(folder))


def _create(name: str, create: Callable[[], nn.Module]) -> nn.Module:
    try:
        return create()
    except (*WRONG, OSError) as e:  # OSError includes the Hub client's errors, which have many lines
        raise RuntimeError(f'{name}: the classifier cannot be loaded ({one_line(e, 1000)})') from None


def _lacks_classifier(name: str) -> ValueError:
    return ValueError(
        f'{name}: has no classifier, only features (num_classes 0); train one with `simsiam finetune DATA --model '
        f'{name} --output OUT`, then predict with OUT')

"""The network that is fine-tuned: a backbone with a new last layer, in a folder that plain timm loads."""
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import load_model_config_from_hf
from torch import Tensor, nn

from ...runtime.files import write_json
from ...runtime.messages import one_line
from ...weights import tensorfile
from ...weights.export import make_timm_config
from ...weights.folders import check_network
from ...weights.tensorfile import CONFIG, MODEL
from ..backbone import Backbone, load_backbone
from .data import find_crop_pct
from .settings import Settings


class Classifier:
    """A backbone with a new last layer, for pixels scaled by `mean` and `std`; `folder` takes it in timm's form."""

    def __init__(
        self, name: str, kwargs: dict[str, Any], device: torch.device, classes: list[str], s: Settings, folder: Path,
    ) -> None:
        self.backbone = load_backbone(name, device, **kwargs)
        self.model, self.identity = self.backbone.model, self.backbone.identity  # before the model changes
        self.name, self.args = find_architecture(self.backbone, kwargs)
        self.mean, self.std = self.backbone.mean, self.backbone.std
        self.classes, self.settings, self.folder = classes, s, folder
        replace_last_layer(self.model, len(classes), s.seed)

    def check(self) -> None:
        """Raises ValueError if the network does not take the images, or timm builds another one from config.json."""
        size, classes = self.settings.image_size, len(self.classes)
        takes = cast(dict[str, Any], self.model.pretrained_cfg).get('fixed_input_size') or 'img_size' in self.args
        hint = f', or --model-args \'{{"img_size": {size}}}\'' if takes else ''
        try:
            with torch.no_grad():
                out = self.model.eval()(torch.zeros(1, 3, size, size, device=next(self.model.parameters()).device))
        except (RuntimeError, AssertionError) as e:  # the image is too small, or not of the size of the network
            raise ValueError(
                f'{self.backbone.name} does not run on images of {size} px ({one_line(e, 150)}); give another '
                f'--image-size{hint}') from None
        if out.shape != (1, classes):
            raise ValueError(
                f'{self.backbone.name} returns {tuple(out.shape)} for an image, not a row of {classes} classes; give '
                'another --model or other --model-args')
        try:
            with tempfile.TemporaryDirectory() as folder, torch.device('meta'):
                write_json(Path(folder) / CONFIG, self.make_config())
                plain = timm.create_model(f'local-dir:{folder}')
        except (RuntimeError, TypeError, ValueError, AssertionError) as e:
            raise ValueError(f'{self.name}: timm cannot build it ({one_line(e, 150)})') from None
        # The shapes of all parameters and buffers, whether checkpoints hold them or not.
        ours, theirs = (
            {k: v.shape for k, v in (*m.named_parameters(), *m.named_buffers())} for m in (self.model, plain))
        if ours != theirs:
            raise ValueError(
                f'{self.name} {self.args or ""}: timm builds another network by this name, whose shapes differ from '
                'those of the weights; give --model-args')

    def make_config(self) -> dict[str, Any]:
        """Returns the contents of config.json."""
        s, license = self.settings, cast(dict[str, Any], self.model.pretrained_cfg).get('license')
        config = make_timm_config(self.model, self.name, len(self.classes), {
            'tag': 'finetuned', 'input_size': [3, s.image_size, s.image_size],
            'crop_pct': find_crop_pct(s.image_size, s.resize), 'mean': list(self.mean), 'std': list(self.std),
            **({'license': license} if license else {})}, self.args)
        return {**config, 'label_names': self.classes}

    def export(self, weights: dict[str, Tensor]) -> None:
        """Writes a state dict of `model` for `timm.create_model('local-dir:FOLDER', pretrained=True)`."""
        tensorfile.write(self.folder / MODEL, weights)
        write_json(self.folder / CONFIG, self.make_config())


def find_architecture(backbone: Backbone, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns timm's name and keyword arguments of the network that `load_backbone(name, **kwargs)` returned."""
    if backbone.name.startswith(('hf-hub:', 'hf_hub:')):
        _, found, args = load_model_config_from_hf(backbone.name.split(':', 1)[1])
        network = check_network(found, args, Path(backbone.name))
        return network.name, {**network.args, **kwargs}
    return backbone.architecture, backbone.args


def replace_last_layer(model: nn.Module, classes: int, seed: int) -> None:
    """Gives the model a new last layer, its weights from N(0, 0.01) and its bias 0; every parameter trains."""
    cast(Callable[[int], None], model.reset_classifier)(classes)
    rng = torch.Generator().manual_seed(seed)
    for layer in find_last_layers(model).modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.weight.data.copy_(torch.empty(layer.weight.shape).normal_(0, 0.01, generator=rng))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    model.requires_grad_(True)


def find_last_layers(model: nn.Module) -> nn.Module:
    """Returns the last layer, or all of them if each token has its own (deit_*_distilled, levit_*)."""
    last: Any = cast(Callable[[], Any], model.get_classifier)()
    return nn.ModuleList(last) if isinstance(last, (tuple, list)) else cast(nn.Module, last)

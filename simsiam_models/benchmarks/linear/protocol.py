"""A published linear protocol, and the numbers that flags change in it."""
import dataclasses
from dataclasses import dataclass
from typing import Any

from ..options import check_sizes, sizes
from ..protocols import LINEAR, SIZE, LinearProtocol

# The numbers that a flag of the same name overrides.
NUMBERS: dict[str, tuple[type, str]] = {
    'batch_size': (int, 'samples per optimizer step, over all processes'),
    'lr': (float, 'learning rate (fair: per 256 samples)'),
    'epochs': (int, 'passes over the training images'),
    'lr_steps': (int, 'epochs after which the rate falls'),
    'lr_gamma': (float, 'by what it falls'),
    'momentum': (float, "the optimizer's"),
    'weight_decay': (float, "the optimizer's"),
    'trust': (float, "LARC's and LARS's coefficient"),
    'init_std': (float, "of the classifier's weights"),
    'crop_scale': (float, 'least and largest share of the area'),
    'jitter': (float, 'brightness, contrast, saturation'),
    'lighting': (float, 'standard deviation of the PCA noise'),
    'flip_p': (float, 'probability of a horizontal flip'),
    'image_size': (int, "pixels (default: the model's own, 224 where it has none; CIFAR: 32)"),
    'resize': (int, "short side of a test image, and of Places205's training images, pixels (default: image size x "
               '8/7; CIFAR: the same)'),
    'eval_every': (int, 'epochs between evaluations'),
    'report_epochs': (int, 'epochs that are reported as well'),
}


@dataclass(frozen=True)
class Chosen:
    """A protocol, and what was changed in it: field -> (published, used)."""

    protocol: LinearProtocol
    changed: dict[str, tuple[Any, Any]]

    @property
    def label(self) -> str:
        return f'{self.protocol.name} (changed)' if self.changed else self.protocol.name

    def describe(self) -> str:
        if not self.changed:
            return f'protocol {self.label}, as published'
        said = ', '.join(f'{k} {old} -> {new}' for k, (old, new) in self.changed.items())
        return f'protocol {self.label}: no longer the published one, since {said}'

    def record(self) -> dict[str, Any]:
        idle = self.protocol.idle
        numbers = {k: v for k, v in dataclasses.asdict(self.protocol).items() if k not in idle}
        return {
            **numbers, 'name': self.label, 'base': self.protocol.name, 'scaled_lr': self.protocol.scaled_lr,
            'changed': {k: {'published': old, 'used': new} for k, (old, new) in self.changed.items()}}


def choose(name: str, dataset: str, overrides: dict[str, Any], amp: str = 'off', own: int = SIZE) -> Chosen:
    """The protocol `name` on a kind of data set, with the numbers that flags override.

    Args:
        own: the image size, pixels, that holds where no flag gives one: the model's.

    Raises:
        ValueError: no such protocol, or a number that cannot be.
    """
    if name == 'mhead' and f'mhead_{dataset}' in LINEAR:
        name = f'mhead_{dataset}'
    if name not in LINEAR:
        raise ValueError(f'--protocol {name} is not known; use one of {", ".join(LINEAR)}, or auto')
    base = LINEAR[name]
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items() if v is not None}
    given['image_size'], given['resize'] = sizes(dataset, given.get('image_size'), given.get('resize'), own)
    if unused := sorted(base.idle & set(given)):
        flags = ', '.join(f'--{k.replace("_", "-")}' for k in unused)
        raise ValueError(f'{flags}: protocol {name} has no such number; leave it out')
    p = dataclasses.replace(base, **given)
    for key in ('batch_size', 'epochs', 'eval_every', 'lr', 'init_std'):
        if not getattr(p, key) > 0:
            raise ValueError(f'--{key.replace("_", "-")} {getattr(p, key)}: it must be above 0')
    for key in ('momentum', 'weight_decay', 'trust', 'jitter', 'lighting', 'lr_gamma'):
        if not getattr(p, key) >= 0:
            raise ValueError(f'--{key.replace("_", "-")} {getattr(p, key)}: it cannot be below 0')
    check_sizes(p.image_size, p.resize)
    if not 0 < p.crop_scale[0] <= p.crop_scale[1] <= 1:
        raise ValueError(f'--crop-scale {p.crop_scale[0]} {p.crop_scale[1]}: two shares of the area, the larger last')
    if not 0 <= p.flip_p <= 1:
        raise ValueError(f'--flip-p {p.flip_p}: a probability is between 0 and 1')
    if p.nesterov and p.momentum == 0:
        raise ValueError('--momentum 0 leaves nothing to Nesterov; use a value above 0')
    if not all(1 <= e <= p.epochs for e in given.get('report_epochs', ())):
        raise ValueError(
            f'--report-epochs {" ".join(map(str, p.report_epochs))}: there are epochs 1 to {p.epochs}; name some of '
            'these, or raise --epochs')
    if p.report_epochs and max(p.report_epochs) > p.epochs:
        p = dataclasses.replace(p, report_epochs=tuple(e for e in p.report_epochs if e <= p.epochs))
    old, new = dataclasses.asdict(base), dataclasses.asdict(p)
    changed = {k: (old[k], new[k]) for k in new if new[k] != old[k]}
    return Chosen(p, changed | ({'amp': ('off', amp)} if amp != 'off' else {}))


def benchmark_name(chosen: Chosen, dataset: str) -> str:
    """As weights/published.json calls it, where somebody published a number by this very protocol."""
    name = chosen.protocol.name
    if name.startswith('mhead'):
        return f'{dataset}_mhead_linear'
    if dataset == 'imagenet' and name in ('fair', 'mmselfsup'):
        return 'imagenet_linear' if name == 'fair' else 'imagenet_linear_avgpool'
    return f'{dataset}_linear_{name}'

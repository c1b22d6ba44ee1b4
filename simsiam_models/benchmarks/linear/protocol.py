"""A published linear protocol, and the numbers that flags change in it."""
import dataclasses
from dataclasses import dataclass
from typing import Any

from ...runtime.messages import check_flags
from ..options import check_sizes, choose_sizes
from ..protocols import LINEAR, SIZE, LinearProtocol

# The numbers that the flag of the same name overrides: type and help text.
OVERRIDES: dict[str, tuple[type, str]] = {
    'batch_size': (int, 'samples per optimizer step, over all processes'),
    'lr': (float, 'learning rate (fair: per 256 samples); given several: a run for each, and a table'),
    'epochs': (int, 'passes over the training images'),
    'lr_steps': (int, 'epochs after which the learning rate falls'),
    'lr_gamma': (float, 'factor by which it falls'),
    'momentum': (float, 'momentum of the optimizer'),
    'weight_decay': (float, 'weight decay of the optimizer'),
    'trust': (float, 'trust coefficient of LARC and LARS'),
    'init_std': (float, "standard deviation of the classifier's initial weights"),
    'crop_scale': (float, 'smallest and largest share of the area that a crop covers'),
    'jitter': (float, 'strength of the brightness, contrast and saturation jitter'),
    'lighting': (float, 'standard deviation of the PCA noise'),
    'flip_p': (float, 'probability of a horizontal flip'),
    'image_size': (int, "pixels (default: the model's own size, or 224 if it has none; CIFAR: 32)"),
    'resize': (int, "short side of test images, and of Places205's training images, in pixels (default: image size x "
               '8/7; CIFAR: the image size)'),
    'eval_every': (int, 'epochs between evaluations'),
    'report_epochs': (int, 'epochs that are reported in addition to the last'),
}
POSITIVE = ('batch_size', 'epochs', 'eval_every', 'lr', 'init_std')
NOT_NEGATIVE = ('momentum', 'weight_decay', 'trust', 'jitter', 'lighting', 'lr_gamma')


def flag_of(name: str) -> str:
    return f'--{name.replace("_", "-")}'


@dataclass(frozen=True)
class ChosenProtocol:
    """A protocol, and its changed fields: field -> (published, used)."""

    protocol: LinearProtocol
    changed: dict[str, tuple[Any, Any]]

    @property
    def label(self) -> str:
        return f'{self.protocol.name} (changed)' if self.changed else self.protocol.name

    def describe(self) -> str:
        changes = ', '.join(f'{k} {old} -> {new}' for k, (old, new) in self.changed.items())
        how = f': differs from the published one in {changes}' if changes else ', as published'
        return f'protocol {self.label}{how}'

    def record(self) -> dict[str, Any]:
        p = self.protocol
        return {k: v for k, v in dataclasses.asdict(p).items() if k not in p.idle} | {
            'name': self.label, 'base': p.name, 'scaled_lr': p.scaled_lr,
            'changed': {k: {'published': old, 'used': new} for k, (old, new) in self.changed.items()}}


def choose_protocol(
    name: str, dataset: str, overrides: dict[str, Any], amp: str = 'off', own_size: int = SIZE,
) -> ChosenProtocol:
    """Returns the protocol `name` for a kind of data set, with the numbers that flags override (None: not given).

    The default image size is the model's `own_size`, in pixels. Raises ValueError if a number is out of range.
    """
    if f'{name}_{dataset}' in LINEAR:
        name = f'{name}_{dataset}'
    if name not in LINEAR:
        raise ValueError(f'--protocol {name} is not known; use one of {", ".join(LINEAR)}, or auto')
    base = LINEAR[name]
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items() if v is not None}
    given['image_size'], given['resize'] = choose_sizes(dataset, given.get('image_size'), given.get('resize'), own_size)
    if unused := sorted(base.idle & set(given)):
        raise ValueError(f'{", ".join(map(flag_of, unused))}: not used by protocol {name}; leave it out')
    if 'report_epochs' not in given:  # a run of fewer epochs than published may not reach all of them
        given['report_epochs'] = tuple(e for e in base.report_epochs if e <= given.get('epochs', base.epochs))
    p = dataclasses.replace(base, **given)
    check_sizes(p.image_size, p.resize)
    check_flags([
        *((flag_of(k), getattr(p, k), getattr(p, k) > 0, 'above 0') for k in POSITIVE),
        *((flag_of(k), getattr(p, k), getattr(p, k) >= 0, 'at least 0') for k in NOT_NEGATIVE),
        ('--crop-scale', ' '.join(map(str, p.crop_scale)), 0 < p.crop_scale[0] <= p.crop_scale[1] <= 1,
         'two shares of the area, above 0 and at most 1, the larger one last'),
        ('--flip-p', p.flip_p, 0 <= p.flip_p <= 1, 'a probability, from 0 to 1'),
        ('--momentum', p.momentum, p.momentum > 0 or not p.nesterov, 'above 0, which Nesterov momentum needs'),
        ('--report-epochs', ' '.join(map(str, p.report_epochs)), all(1 <= e <= p.epochs for e in p.report_epochs),
         f'epochs from 1 to {p.epochs}; name some of these, or raise --epochs')])
    old, new = dataclasses.asdict(base), dataclasses.asdict(p)
    changed = {k: (old[k], new[k]) for k in new if new[k] != old[k]}
    return ChosenProtocol(p, changed | ({'amp': ('off', amp)} if amp != 'off' else {}))


def benchmark_name(chosen: ChosenProtocol, dataset: str) -> str:
    """Returns the benchmark's name in weights/published.json if a number was published by this protocol."""
    name = chosen.protocol.name
    if name.startswith('mhead'):
        return f'{dataset}_mhead_linear'
    published = {'imagenet_linear_fair': 'imagenet_linear', 'imagenet_linear_mmselfsup': 'imagenet_linear_avgpool'}
    return published.get(f'{dataset}_linear_{name}', f'{dataset}_linear_{name}')

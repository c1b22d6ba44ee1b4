"""What a fine-tuning run starts from and what it leaves: a folder for timm, a confusion matrix, a record."""
import csv
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_model_config_from_hf
from torch import Tensor, nn

from ...data.readers.images import Images, contents_digest
from ...data.readers.index import digest
from ...runtime import checkpoint
from ...runtime.files import write_atomically
from ...weights import tensorfile
from ...weights.export import PLAIN_TIMM, timm_config, write_json
from ..backbone import RANDOM, Backbone, load_backbone
from ..datasets.classification import labelled_subset, open_pair
from ..protocols import SEMI_HEAD_MULTIPLIERS, SEMI_LRS
from ..results.record import print_record, write_record
from ..samples import every_class_trains
from .data import crop_pct, open_labelled
from .training import Settings, Training, confusion

CONFIG, MODEL, RECORD = 'config.json', 'model.safetensors', 'record.json'
PER_CLASS, CONFUSION = 'per_class.csv', 'confusion.csv'
PRINTED = 20  # classes of a confusion matrix that is printed
WHOLE = 1000  # classes of one that is written whole

Pairs = dict[tuple[int, int], int]  # (label, what was predicted) -> how often


@dataclass
class Source:
    """Who trains and who validates."""

    train: Images
    val: Images
    classes: list[str]
    validation: str  # where the validation images come from
    digest: str


def open_source(args: Any) -> Source:
    """The user's own images; with --protocol those that a list names, measured on the data set's test images."""
    if args.protocol == 'plain':
        train, val, validation = open_labelled(args.data, args.val_share, args.seed)
    else:
        pair = open_pair(args.dataset, args.data, args.allow_partial)
        train, val = pair.train, pair.test
        if args.list is not None:
            train = labelled_subset(train, args.protocol.removeprefix('semi_'), args.list, args.allow_partial)
        if not args.allow_partial:
            every_class_trains(train)
        validation = f"the data set's {len(val)} test images"
    return Source(train, val, [str(c) for c in train.classes], validation, digest(
        contents_digest(train), contents_digest(val)))


def architecture(name: str, model: nn.Module, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """timm's name of the network that `load_backbone(name, **kwargs)` gave, and its keyword arguments."""
    if name.endswith(RANDOM):
        return name.removesuffix(RANDOM).split('.')[0], kwargs
    if name.startswith(('hf-hub:', 'hf_hub:')):
        _, found, args = load_model_config_from_hf(name.split(':', 1)[1])
        return found, {**(args or {}), **kwargs}
    path = Path(name.removeprefix('local-dir:')).expanduser()
    for folder in (path, path / 'backbone'):
        if (folder / CONFIG).is_file():
            config = json.loads((folder / CONFIG).read_text())
            return config['architecture'], {**(config.get('model_args') or {}), **kwargs}
    found = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or name.split('.')[0]
    args_file = (path if path.is_dir() else path.parent) / checkpoint.ARGS
    if path.exists() and args_file.is_file():
        run = json.loads(args_file.read_text())
        if run.get('model', '').split('.')[0] == found:
            kwargs = {**(run.get('model_args') or {}), **kwargs}
    return found, kwargs


class Target:
    """The backbone that is trained, and the folder that its classifier goes to."""

    def __init__(
        self, name: str, kwargs: dict[str, Any], device: torch.device, classes: list[str], s: Settings, folder: Path,
    ) -> None:
        self.backbone = load_backbone(name, device, **kwargs)
        self.name, self.args = architecture(name, self.backbone.model, kwargs)
        self.classes, self.s, self.folder = classes, s, folder
        self.mean, self.std = take_rgb(self.backbone)

    def check(self) -> None:
        """Does it take images of this size, and what config.json builds these weights? Asked before hours are spent.

        Raises:
            ValueError: no.
        """
        model, size, classes = self.backbone.model.eval(), self.s.image_size, len(self.classes)
        takes = model.pretrained_cfg.get('fixed_input_size') or 'img_size' in self.args
        hint = f', or --model-args \'{{"img_size": {size}}}\'' if takes else ''
        try:
            with torch.no_grad():
                out = model(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
        except (RuntimeError, AssertionError) as e:  # an image too small, or not of the one size that a network takes
            raise ValueError(
                f'{self.backbone.name} does not run on images of {size} px ({_line(e)}); give another --image-size'
                f'{hint}') from None
        if out.shape != (1, classes):
            raise ValueError(
                f'{self.backbone.name} makes {tuple(out.shape)} of an image, not a row of {classes} classes; give '
                'another --model or other --model-args')
        try:
            with tempfile.TemporaryDirectory() as folder, torch.device('meta'):
                write_json(Path(folder) / CONFIG, self.config())
                plain = timm.create_model(f'local-dir:{folder}')
        except (RuntimeError, TypeError, ValueError, AssertionError) as e:
            raise ValueError(f'{self.name}: timm cannot build it ({_line(e)})') from None
        if _shapes(plain) != _shapes(model):
            raise ValueError(
                f'{self.name} {self.args or ""}: timm builds another network by this name than the weights are of; '
                'give --model-args')

    def config(self) -> dict[str, Any]:
        """config.json of the classifier."""
        s, old = self.s, self.backbone.model.pretrained_cfg
        config = timm_config(self.backbone.model, self.name, len(self.classes), {
            'tag': 'finetuned', 'input_size': [3, s.image_size, s.image_size],
            'crop_pct': crop_pct(s.image_size, s.resize), 'mean': list(self.mean), 'std': list(self.std),
            **({'license': old['license']} if old.get('license') else {})}, self.args)
        return {**config, 'label_names': self.classes}

    def export(self, model: nn.Module) -> None:
        """config.json and model.safetensors, for `timm.create_model('local-dir:FOLDER', pretrained=True)`."""
        tensorfile.write(self.folder / MODEL, model.state_dict())
        write_json(self.folder / CONFIG, self.config())


def _line(e: Exception) -> str:
    return ' '.join(str(e).split())[:150] or type(e).__name__


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Of all that it holds, whether saved or not."""
    return {k: v.shape for k, v in (*model.named_parameters(), *model.named_buffers())}


def take_rgb(backbone: Backbone) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the pixels. A network of BGR pixels becomes one of RGB, with the same outputs: its first layer's
    input channels are turned round, and so are mean and std."""
    if not backbone.bgr:
        return backbone.mean, backbone.std
    conv = backbone.model.get_submodule(backbone.model.pretrained_cfg['first_conv'])
    conv.weight.data = conv.weight.data.flip(1)
    return backbone.mean[::-1], backbone.std[::-1]


def claim(folder: Path, run: dict[str, Any], free: set[str]) -> None:
    """Make the folder this run's, or find that it was already.

    Raises:
        ValueError: it holds something else; nothing in it is touched.
    """
    record = folder / checkpoint.ARGS
    if record.is_file():
        try:
            other = json.loads(record.read_text()).get('benchmark') != 'finetune'
        except (ValueError, AttributeError):
            other = True
        if other:
            raise ValueError(f'{folder} holds a run of another kind; give another --output')
    elif taken := [name for name in (CONFIG, MODEL, RECORD) if (folder / name).exists()]:
        raise ValueError(f'{folder} holds {", ".join(taken)} of something else; give another --output')
    if folder.exists() and not folder.is_dir():
        raise ValueError(f'{folder} is a file; --output is a folder')
    checkpoint.claim_folder(folder, run, free)


def finish(
    args: Any, source: Source, target: Target, training: Training, predicted: Tensor, run: dict[str, Any],
    say: Callable[[str], Any],
) -> dict[str, Any]:
    """Export the weights that are kept, write and print confusion matrix and record."""
    target.export(training.measured)
    folder, classes, plain = target.folder, source.classes, run['protocol'] == 'plain'
    pairs = confusion(training.val.samples.labels, predicted[:, 0])
    rows = per_class(pairs, classes)
    _write_csv(folder / PER_CLASS, [['class', 'images', 'right', 'accuracy'], *(r.values() for r in rows)])
    _write_csv(folder / CONFUSION, confusion_rows(pairs, classes))
    metrics = training.accuracy(predicted)
    if len(classes) <= 5:
        del metrics['top5']
    if not plain:
        metrics |= {f'top1_epoch{h["epoch"]}': h['top1'] for h in training.history if 'top1' in h}
    unreadable = sorted({*training.train.unreadable.values(), *training.val.unreadable.values()})
    protocol = {k: v for k, v in run.items() if k not in ('benchmark', 'digest', 'images', 'weights', 'model')}
    if target.backbone.bgr:
        protocol['bgr'] = 'the first layer was turned round to take RGB pixels, with the same outputs'
    if not plain:
        protocol['changed'] = deviations(run)
        protocol['note'] = 'one of nine pairs of lr and head_multiplier; which one is published with is not known'
    counts = {c: {} for c in classes}
    for (i, j), n in pairs.items():
        counts[classes[i]][classes[j]] = n
    record = write_record(
        folder / RECORD, 'finetune' if plain else f'{args.dataset}_{run["protocol"]}', protocol, target.backbone,
        {'name': args.data if plain else args.dataset,
         'counts': {'train': len(source.train), 'test': len(source.val), 'classes': len(classes)},
         'digest': source.digest},
        metrics, sum(h['seconds'] for h in training.history), {
            'best_epoch': training.best['epoch'], 'last_epoch': training.epoch, 'kept': training.s.keep,
            'stopped_early': training.epoch < training.s.epochs, 'epochs': training.history, 'per_class': rows,
            'confusion': counts, 'averaged_weights': training.ema is not None, 'unreadable': unreadable})
    if len(classes) <= PRINTED:
        say(confusion_table(pairs, rows))
    else:
        worst = sorted((r for r in rows if r['images']), key=lambda r: r['accuracy'])[:5]
        say('worst classes: ' + ', '.join(f'{r["class"]} {r["accuracy"]:.1f} %' for r in worst))
    if len(classes) > WHOLE:
        say(f'{CONFUSION} lists the pairs that occur, not the {len(classes)} x {len(classes)} of all')
    if unreadable:
        say(f'{len(unreadable)} images could not be read and were replaced; the first: {unreadable[0]}')
    what = f'best epoch {training.best["epoch"]} of {training.epoch}' if plain else f'epoch {training.best["epoch"]}'
    say(f'{what}, {source.validation}\n{print_record(record)}')
    first = '' if PLAIN_TIMM.get(target.name, target.name) != 'simsiam_resnet18_cifar' else 'import simsiam_models; '
    say(f"the classifier: {first}timm.create_model('local-dir:{folder}', pretrained=True); {folder / PER_CLASS}, "
        f'{folder / CONFUSION}, {folder / RECORD}')
    return record


def per_class(pairs: Pairs, classes: list[str]) -> list[dict[str, Any]]:
    """Of each class the validation images, how many are right, and percent; None where there is no image."""
    rows = [{'class': c, 'images': 0, 'right': 0, 'accuracy': None} for c in classes]
    for (i, j), n in pairs.items():
        rows[i]['images'] += n
        if i == j:
            rows[i]['right'] = n
    for r in rows:
        if r['images']:
            r['accuracy'] = round(100 * r['right'] / r['images'], 2)
    return rows


def confusion_rows(pairs: Pairs, classes: list[str]) -> list[list[Any]]:
    """The whole matrix, a row for each label; of more than WHOLE classes the pairs that occur."""
    if len(classes) > WHOLE:
        return [['label', 'predicted', 'images'], *([classes[i], classes[j], n] for (i, j), n in pairs.items())]
    counts = ([pairs.get((i, j), 0) for j in range(len(classes))] for i in range(len(classes)))
    return [['label \\ predicted', *classes], *([c, *row] for c, row in zip(classes, counts, strict=True))]


def confusion_table(pairs: Pairs, rows: list[dict[str, Any]]) -> str:
    """Rows: labels; columns: predictions, by number; last: percent right."""
    names = [f'{i} {r["class"]}'[:24] for i, r in enumerate(rows)]
    head = 'label, predicted as'
    wide, cell = max(map(len, [head, *names])), max(4, len(str(max(pairs.values()))) + 1)
    lines = [f'{head:{wide}}' + ''.join(f'{i:>{cell}}' for i in range(len(rows))) + '   right']
    for i, (name, r) in enumerate(zip(names, rows, strict=True)):
        counts = [pairs.get((i, j), 0) for j in range(len(rows))]
        right = '    none' if r['accuracy'] is None else f'{r["accuracy"]:6.1f} %'
        lines.append(f'{name:{wide}}' + ''.join(f'{n:>{cell}}' for n in counts) + right)
    return '\n'.join(lines)


def print_grid(settings: list[Settings], records: list[dict[str, Any]]) -> str:
    lines = [f'{"lr of the backbone":20}{"x for the classifier":>22}{"top-1":>8}']
    for s, r in zip(settings, records, strict=True):
        lines.append(f'{s.lr:<20g}{s.head_multiplier:>22g}{r["metrics"]["top1"]:8.2f}')
    best = max(range(len(records)), key=lambda i: records[i]['metrics']['top1'])
    lines.append(
        f'best pair: {settings[best].lr:g} and {settings[best].head_multiplier:g}, chosen on the test images')
    return '\n'.join(lines)


def _write_csv(path: Path, rows: list[Any]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(rows)
    write_atomically(path, lambda f: f.write(text.getvalue().encode(errors='surrogateescape')))


def deviations(run: dict[str, Any]) -> list[str]:
    """In what a semi-supervised run is not the protocol's."""
    rules = {'epochs': [20], 'batch_size': [256], 'lr': SEMI_LRS, 'head_multiplier': SEMI_HEAD_MULTIPLIERS,
             'image_size': [224], 'resize': [256], 'amp': ['off']}
    return [f'{k} {run[k]}' for k, values in rules.items() if run[k] not in values]

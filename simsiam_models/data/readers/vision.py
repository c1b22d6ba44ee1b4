"""The data sets of torchvision by name, `torchvision:NAME[:ROOT]`: those that lie there, none is downloaded."""
import difflib
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.datasets
from PIL import Image

from .decode import DataError, UnreadableError
from .index import digest

VALIDATION = ('val', 'valid', 'validation', 'test')  # of these the first that the set has
GENERIC = ('DatasetFolder', 'FakeData', 'ImageFolder', 'VisionDataset')  # no sets of their own


class TorchvisionImages:
    """The images of one of torchvision's sets.

    Raises:
        ValueError: its items are no images.
    """

    def __init__(self, items: Any, name: str) -> None:
        self.name, self._items = name, items
        try:
            first = items[0][0] if len(items) else None
        except Exception as e:  # one broken file: met, and judged, like all others
            first = Image.new('RGB', (1, 1)) if isinstance(e, (OSError, SyntaxError)) else None
        if not isinstance(first, Image.Image):
            raise ValueError(f'{name}: its items are not single images, as SimSiam needs them, or there is none')
        self.labels, self.classes = _labels(items)
        self.digest = _digest(items, self.labels, self.classes)

    def __len__(self) -> int:
        return len(self._items)

    def read(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8. Raises UnreadableError where torchvision fails."""
        try:
            return np.array(self._items[int(index)][0].convert('RGB'))
        except Exception as e:  # PIL raises nearly anything on a broken file
            raise UnreadableError(f'{self.name}: image {index} cannot be read ({e})') from None


def open_torchvision(name: str, root: str) -> tuple[TorchvisionImages, TorchvisionImages | None]:
    """The training part: train=True, or what the class takes for its split by default; and the validation part.

    Raises:
        ValueError: torchvision has no such set, or not one of single images.
        FileNotFoundError: its files are not below `root`.
    """
    make, spec = getattr(torchvision.datasets, name, None), f'torchvision:{name}:{root}'
    known = [n for n in torchvision.datasets.__all__ if n not in GENERIC and inspect.isclass(
        getattr(torchvision.datasets, n))]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.5)
        raise ValueError(
            f'torchvision:{name}: torchvision has no data set of that name'
            + (f'; {near[0]} is near' if near else '; torchvision.datasets lists them'))
    takes = inspect.signature(make).parameters
    try:
        train = _make(make, root, takes)
    except (RuntimeError, OSError) as e:  # torchvision: not found or corrupted
        how = f"torchvision.datasets.{name}({root!r}, download=True) in Python downloads it"
        how = how if 'download' in takes else f'torchvision.datasets.{name} tells how to lay them out'
        raise FileNotFoundError(f'{spec}: its files are not below {root}, or not whole ({_line(e)}); {how}') from None
    except ImportError as e:
        raise DataError(f'{spec}: torchvision needs another library for it ({_line(e)})') from None
    except (TypeError, ValueError) as e:  # more arguments than a root, or no split that it takes by default
        raise ValueError(f'{spec}: cannot be opened by its name alone ({_line(e)})') from None
    parts = [{'train': False}] if 'train' in takes else [{'split': s} for s in VALIDATION] if 'split' in takes else []
    for part in parts:
        try:
            val = TorchvisionImages(_make(make, root, takes, **part), f'{spec} ({next(iter(part.values())) or "test"})')
        except (RuntimeError, OSError, ValueError, ImportError):  # no such part, or not there
            continue
        if val.labels is not None:
            return TorchvisionImages(train, spec), val
    return TorchvisionImages(train, spec), None


def _make(make: Callable[..., Any], root: str, takes: Any, **part: Any) -> Any:
    if 'train' in takes:
        part = {'train': True, **part}
    if 'download' in takes:  # two sets do so by default
        part['download'] = False
    return make(root, **part)


def _labels(items: Any) -> tuple[np.ndarray | None, list[str]]:
    for attribute in ('targets', 'labels', '_labels', 'y'):
        values = getattr(items, attribute, None)
        if values is None or not len(values) == len(items):
            continue
        values = values.numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
        if values.ndim == 1 and np.issubdtype(values.dtype, np.integer) and values.min() >= 0:
            names = [n if isinstance(n, str) else '/'.join(map(str, n)) for n in getattr(items, 'classes', None) or []]
            fits = len(names) > values.max()
            return values.astype(np.int64), names if fits else [str(i) for i in range(int(values.max()) + 1)]
    return None, []


def _digest(items: Any, labels: np.ndarray | None, classes: list[str]) -> str:
    """Of the pixels where they are in memory, of the files' names where those are known, and of the labels."""
    what = [np.zeros(0) if labels is None else labels.astype('<i8')]
    pixels = getattr(items, 'data', None)
    if isinstance(pixels, torch.Tensor):
        pixels = pixels.numpy()
    if isinstance(pixels, np.ndarray):
        what.append(pixels)
    names = next((v for v in (getattr(items, a, None) for a in ('samples', '_samples', '_image_files', '_images')) if
                  isinstance(v, (list, tuple))), [])
    for name in names:
        path = name[0] if isinstance(name, (list, tuple)) and name else name
        if isinstance(path, (str, Path)):
            what.append(os.path.relpath(path, getattr(items, 'root', '.')))
    return digest(json.dumps([type(items).__name__, len(items), classes]), *what)


def _line(error: Exception) -> str:
    return ' '.join(str(error).split())[:200]

"""The data sets of torchvision by name, `torchvision:NAME[:ROOT]`. Nothing is downloaded: the files must exist."""
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

from ...runtime.messages import guess, one_line
from .decode import DataError, explain_read_errors
from .index import digest
from .names import VALIDATION

GENERIC = ('DatasetFolder', 'FakeData', 'ImageFolder', 'VisionDataset')  # classes without images of their own


class TorchvisionImages:
    """The images of one of torchvision's data sets. Raises ValueError if its items are not images."""

    def __init__(self, items: Any, name: str) -> None:
        self.name, self._items = name, items
        try:
            first = items[0][0] if len(items) else None
        except MemoryError:
            raise
        # PIL raises OSError or SyntaxError for a broken file, which counts as unreadable once it is read. torchvision
        # raises almost anything if the items are not images: video sets, for example, lack PyAV.
        except Exception as e:
            first = Image.new('RGB', (1, 1)) if isinstance(e, (OSError, SyntaxError)) else None
        if not isinstance(first, Image.Image):
            raise ValueError(f'{name}: it has no items, or they are not single images')
        self.labels, self.classes = _read_labels(items)
        self._in_memory = isinstance(getattr(items, 'data', None), (torch.Tensor, np.ndarray))
        self.digest = _hash_items(items, self.labels, self.classes)

    def __len__(self) -> int:
        return len(self._items)

    def read(self, index: int) -> np.ndarray:
        """Returns (H, W, 3) uint8; raises UnreadableError if torchvision cannot read it."""
        # PIL raises almost anything for a broken file: OSError, SyntaxError, ValueError, DecompressionBombError, ...
        with explain_read_errors(f'{self.name}: image {index}', Exception):
            return np.array(self._items[int(index)][0].convert('RGB'))

    def stored_bytes(self, index: int, start: int = 0, length: int | None = None) -> bytes | None:
        """See `images.stored_bytes`: None if torchvision reads the images from files that it alone knows."""
        if not self._in_memory:
            return None
        return self.read(index).tobytes()[start:None if length is None else start + length]


def open_torchvision(name: str, root: str) -> tuple[TorchvisionImages, TorchvisionImages | None]:
    """Opens the training part (train=True, or the default split of the class) and the validation part.

    Raises:
        ValueError: torchvision has no such data set, or not one of single images.
        FileNotFoundError: its files are not below `root`.
        OSError: its files cannot be read.
    """
    spec = f'torchvision:{name}:{root}'
    known = [n for n in torchvision.datasets.__all__ if n not in GENERIC and inspect.isclass(
        getattr(torchvision.datasets, n))]
    if name not in known:
        hint = guess(name, known, 0.5) or 'torchvision.datasets lists them'
        raise ValueError(f'torchvision:{name}: torchvision has no data set of that name; {hint}')
    make: Callable[..., Any] = getattr(torchvision.datasets, name)
    takes = inspect.signature(make).parameters
    options = {'download': False} if 'download' in takes else {}  # True by default in two classes
    try:
        train = make(root, **options, **({'train': True} if 'train' in takes else {}))
    except (RuntimeError, FileNotFoundError, NotADirectoryError) as e:  # RuntimeError: not found or corrupted
        how = (f'torchvision.datasets.{name}({root!r}, download=True) in Python downloads it' if options else
               f'the documentation of torchvision.datasets.{name} shows their layout')
        raise FileNotFoundError(
            f'{spec}: its files are not below {root}, or not complete ({one_line(e)}); {how}') from None
    except OSError as e:
        raise OSError(f'{spec}: cannot be read ({one_line(e)})') from None
    except ImportError as e:
        raise DataError(f'{spec}: torchvision needs another library for it ({one_line(e)})') from None
    except (TypeError, ValueError) as e:  # it needs more arguments than a root, or has no default split
        raise ValueError(f'{spec}: cannot be opened by its name alone ({one_line(e)})') from None
    parts = [{'train': False}] if 'train' in takes else [{'split': s} for s in VALIDATION] if 'split' in takes else []
    for part in parts:
        try:
            val = TorchvisionImages(make(root, **options, **part), f'{spec} ({part.get("split", "test")})')
        except (RuntimeError, OSError, ValueError, ImportError):  # there is no such part, or its files are missing
            continue
        if val.labels is not None:
            return TorchvisionImages(train, spec), val
    return TorchvisionImages(train, spec), None


def _read_labels(items: Any) -> tuple[np.ndarray | None, list[str]]:
    for attribute in ('targets', 'labels', '_labels', 'y'):
        values = getattr(items, attribute, None)
        if values is None or len(values) != len(items):
            continue
        values = np.asarray(values)
        if values.ndim == 1 and np.issubdtype(values.dtype, np.integer) and values.min() >= 0:
            names = [n if isinstance(n, str) else '/'.join(map(str, n)) for n in getattr(items, 'classes', None) or []]
            n = int(values.max()) + 1
            return values.astype(np.int64), names if len(names) >= n else [str(i) for i in range(n)]
    return None, []


def _hash_items(items: Any, labels: np.ndarray | None, classes: list[str]) -> str:
    """Hashes the pixels if they are in memory, the names of the files if they are known, and the labels."""
    parts: list[np.ndarray | str] = [np.zeros(0) if labels is None else labels.astype('<i8')]
    pixels = getattr(items, 'data', None)
    if isinstance(pixels, (torch.Tensor, np.ndarray)):
        parts.append(np.asarray(pixels))
    lists = (getattr(items, attribute, None) for attribute in ('samples', '_samples', '_image_files', '_images'))
    for name in next((names for names in lists if isinstance(names, (list, tuple))), []):
        path = name[0] if isinstance(name, (list, tuple)) and name else name
        if isinstance(path, (str, Path)):
            parts.append(os.path.relpath(path, getattr(items, 'root', '.')))
    return digest(json.dumps([type(items).__name__, len(items), classes]), *parts)

"""Features as the probe takes them: rows of a file, scaled by the images that are learned from."""
import math

import numpy as np
import torch
from torch import Tensor


class Table:
    """Features (N, D) on a disk or in memory, and labels (N,); `take` gives scaled rows on the device.

    Where a table takes less than a third of the device's free memory it is held there. `rows`: those of both that count
    (default: all); every index is one among them.
    """

    def __init__(
        self, array: np.ndarray, labels: np.ndarray, device: torch.device, dtype: torch.dtype = torch.float32,
        resident: bool | None = None, rows: np.ndarray | None = None,
    ) -> None:
        if array.ndim != 2 or len(array) != len(labels):
            raise ValueError(f'features {array.shape} and {len(labels)} labels: rows (N, D) and a label for each')
        self.array, self.device, self.dtype = array, device, dtype
        self.rows = np.arange(len(array)) if rows is None else rows
        self.labels = torch.from_numpy(np.asarray(labels).astype(np.int64)[self.rows]).to(device)
        self.mean = self.scale = None
        if resident is None:
            resident = device.type != 'cuda' or 3 * array.nbytes < torch.cuda.mem_get_info(device)[0]
            resident = resident and device.type != 'cpu'  # a mapped array is as good as a copy there
        self.held = torch.from_numpy(np.array(array)).to(device) if resident else None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def features(self) -> int:
        return self.array.shape[1]

    def scale_by(self, mean: np.ndarray, std: np.ndarray) -> None:
        """A feature without spread is left out: it becomes 0."""
        scale = np.where(std > 0, 1 / np.where(std > 0, std, 1), 0) / math.sqrt(self.features)
        self.mean, self.scale = (torch.from_numpy(x).to(self.device, self.dtype) for x in (mean, scale))

    def take(self, rows: np.ndarray) -> Tensor:
        """(n,) -> (n, D)."""
        rows = self.rows[rows]
        if self.held is not None:
            x = self.held[torch.from_numpy(rows).to(self.device)]
        else:
            x = torch.from_numpy(np.asarray(self.array[rows])).to(self.device)
        return (x.to(self.dtype) - self.mean) * self.scale

    def label(self, rows: np.ndarray) -> Tensor:
        return self.labels[torch.from_numpy(rows).to(self.device)]


def moments(array: np.ndarray, rows: np.ndarray | None = None, chunk: int = 8192) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature over `rows` (all), float64, in one pass (Chan et al., 1979).

    Raises:
        ValueError: a feature is not finite.
    """
    rows = np.arange(len(array)) if rows is None else np.sort(rows)
    n, mean, square = 0, np.zeros(array.shape[1]), np.zeros(array.shape[1])
    for i in range(0, len(rows), chunk):
        x = np.asarray(array[rows[i:i + chunk]], np.float64)
        m, own = len(x), x.mean(0)
        square += ((x - own) ** 2).sum(0) + (own - mean) ** 2 * n * m / (n + m)
        mean += (own - mean) * m / (n + m)
        n += m
    if not np.isfinite(square).all():
        raise ValueError('some features are not finite; the weights are damaged, or --amp off is needed')
    std = np.sqrt(square / n)
    return mean, np.where(std > 1e-6 * np.abs(mean), std, 0.0)  # what rounding leaves of a constant is no spread

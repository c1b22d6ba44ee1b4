"""Cached features as the probe reads them: rows of a file, standardized by the images that are learned from."""
import math

import numpy as np
import torch
from torch import Tensor


class ScaledFeatures:
    """Features (N, D) on disk or in memory, and labels (N,); `take` returns standardized rows on the device.

    `rows` are those in use (default: all); every other index refers to these. `resident` features are copied to the
    device; by default, those that take less than a third of a GPU's free memory.
    """

    def __init__(
        self, array: np.ndarray, labels: np.ndarray, device: torch.device, dtype: torch.dtype = torch.float32, *,
        resident: bool | None = None, rows: np.ndarray | None = None,
    ) -> None:
        self.array, self.dim, self.device, self.dtype = array, array.shape[1], device, dtype
        self.rows = np.arange(len(array)) if rows is None else rows
        self.labels = torch.from_numpy(np.asarray(labels, np.int64)[self.rows]).to(device)
        if resident is None:  # on a CPU, a mapped file is as good as a copy
            resident = device.type != 'cpu' and (
                device.type != 'cuda' or 3 * array.nbytes < torch.cuda.mem_get_info(device)[0])
        self.held = torch.from_numpy(np.array(array)).to(device) if resident else None

    def __len__(self) -> int:
        return len(self.rows)

    def scale_by(self, mean: np.ndarray, std: np.ndarray) -> None:
        """Standardizes: x' = (x - mean) / (std sqrt(D)), so |x'| is about 1. A feature whose std is 0 becomes 0."""
        scale = np.where(std > 0, 1 / np.where(std > 0, std, 1), 0) / math.sqrt(self.dim)
        self.mean, self.scale = (torch.from_numpy(x).to(self.device, self.dtype) for x in (mean, scale))

    def take(self, rows: np.ndarray) -> Tensor:
        """(n,) -> (n, D)."""
        rows = self.rows[rows]
        x = self.array[rows] if self.held is None else self.held[torch.from_numpy(rows).to(self.device)]
        return (torch.as_tensor(x, device=self.device).to(self.dtype) - self.mean) * self.scale

    def take_labels(self, rows: np.ndarray) -> Tensor:
        return self.labels[torch.from_numpy(rows).to(self.device)]


def compute_moments(
    array: np.ndarray, rows: np.ndarray | None = None, chunk: int = 8192) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of each feature over `rows` (default: all), float64, in one pass.

    The update is that of Chan et al. (1979). A constant feature has the standard deviation 0, despite rounding.
    Raises ValueError if a feature is not finite.
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
        raise ValueError('some features are not finite: check the weights, or use --amp off')
    std = np.sqrt(square / n)
    return mean, np.where(std > 1e-6 * np.abs(mean), std, 0.0)

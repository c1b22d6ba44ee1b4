"""Maps of features: two numbers for each image, by t-SNE with MMSelfSup's parameters, by PCA, or by UMAP."""
from collections.abc import Sequence

import numpy as np

from ...runtime.messages import require
from .. import tsne

NAMES = {'tsne': 't-SNE', 'pca': 'PCA', 'umap': 'UMAP'}
# The defaults of umap-learn, except for the metric, which is that of the search, and the seed.
NEIGHBOURS = 15
UMAP = {
    'n_components': 2, 'n_neighbors': NEIGHBOURS, 'min_dist': 0.1, 'metric': 'cosine', 'random_state': 0, 'n_jobs': 1}


def check_packages(kinds: Sequence[str]) -> None:
    """Raises RuntimeError if a projection needs a package that is not installed."""
    require('a map', sklearn='scikit-learn')
    if 'umap' in kinds:
        require('--projection umap', umap='umap-learn')


def choose_projections(kinds: Sequence[str] | None, n: int) -> list[str]:
    """Returns the projections of n images; None is t-SNE, or PCA for fewer images than it needs.

    Raises ValueError if n images are too few for one of `kinds`.
    """
    least = {'tsne': int(tsne.TSNE['perplexity']) + 1, 'umap': NEIGHBOURS + 1}
    if kinds is None:
        if n < least['tsne']:
            print(f'{n} images are too few for t-SNE, which needs {least["tsne"]}; the map is a PCA')
        return ['tsne' if n >= least['tsne'] else 'pca']
    for kind in kinds:
        if n < least.get(kind, 1):
            raise ValueError(
                f'--projection {kind}: needs at least {least[kind]} images, but there are {n}; use --projection pca')
    return list(dict.fromkeys(kinds))


def project(x: np.ndarray, kind: str) -> np.ndarray:
    """Maps (N, D) features to (N, 2) float32. The same features give the same map on the same machine."""
    if kind == 'tsne':
        return tsne.compute_tsne(x)
    if kind == 'umap':
        from umap import UMAP as Embedding

        return np.asarray(Embedding(**UMAP).fit_transform(x))
    xy = tsne.reduce_features(x, 2)
    return np.pad(xy, ((0, 0), (0, 2 - xy.shape[1])))  # one image, or one number for each


def fit_unit(xy: np.ndarray) -> np.ndarray:
    """Moves and scales points (N, 2) into the unit square, both axes by the same factor: float32, y downwards."""
    xy = xy.astype(np.float64) * np.array([1, -1])
    low, high = xy.min(0), xy.max(0)
    unit: np.ndarray = (xy - (low + high) / 2) / max(float((high - low).max()), 1e-12) + 0.5
    return unit.astype(np.float32)

"""Pictures of features: t-SNE with MMSelfSup's parameters, a colour and a mark for each class.

MMSelfSup shows the images of the first 20 classes, features without scaling, one picture per feature. Only the seed is
ours: MMSelfSup gives none, and numpy's global generator, seeded with 0, runs on from feature to feature.
"""
import inspect
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.messages import short

CLASSES = 20  # MMSelfSup: --max-num-class 20
# MMSelfSup v0.9.1, tools/analysis_tools/visualize_tsne.py, except for random_state.
TSNE: dict[str, Any] = {
    'n_components': 2, 'perplexity': 30.0, 'early_exaggeration': 12.0, 'learning_rate': 200.0, 'max_iter': 1000,
    'n_iter_without_progress': 300, 'init': 'random', 'random_state': 0}
# Each has a contrast of at least 3 on white (WCAG 1.4.11). More than ten are hard to tell apart, so marks differ, too.
COLOURS = (
    '#1f4fd0', '#d01c2c', '#1a8a1a', '#8547b8', '#d06000', '#6b3410', '#d1369b', '#757575', '#858600', '#0b97a8')
MARKS = 'o^'


def check_count(n: int, classes: int = CLASSES) -> None:
    """Raises ValueError if n images are too few for the perplexity."""
    if n <= TSNE['perplexity']:
        raise ValueError(
            f'{n} images are too few: a t-SNE of perplexity {TSNE["perplexity"]:g} needs more than that (in the first '
            f'{classes} classes if there are labels); add images, or omit --tsne')


def select_shown(labels: np.ndarray | None, n: int, classes: int = CLASSES) -> np.ndarray:
    """Returns the indices of the images, among n, that a picture of the first `classes` classes shows."""
    return np.arange(n) if labels is None else np.flatnonzero(np.asarray(labels) < classes)


def reduce_features(x: np.ndarray, dim: int) -> np.ndarray:
    """Projects (N, D) features onto their first principal components: (N, min(dim, N, D)) float32."""
    from sklearn.decomposition import PCA

    with np.errstate(invalid='ignore'):  # equal rows have no variance to explain
        reduced: np.ndarray = PCA(min(dim, *x.shape), random_state=0).fit_transform(x)
    return reduced


def compute_tsne(x: np.ndarray) -> np.ndarray:
    """Embeds (N, D) features as (N, 2) points, by scikit-learn with the parameters TSNE."""
    from sklearn.manifold import TSNE as Embedding

    check_count(len(x))  # again: some may be unreadable
    known = inspect.signature(Embedding).parameters  # max_iter was n_iter before scikit-learn 1.5
    xy: np.ndarray = Embedding(**{k if k in known else 'n_iter': v for k, v in TSNE.items()}).fit_transform(x)
    return xy


def draw_scatter(xy: np.ndarray, labels: np.ndarray | None, classes: list[str], title: str, file: Path) -> None:
    """Saves a picture of 10 x 10 inches; each axis is scaled to 0 .. 1.

    Up to 20 classes have a legend; of more, each has its name at the median of its points.
    """
    from matplotlib.figure import Figure

    xy = (xy - xy.min(0)) / (xy.max(0) - xy.min(0)).clip(1e-12)
    figure = Figure(figsize=(10, 10), layout='constrained')
    axes = figure.subplots()
    axes.set_title(title, parse_math=False)
    axes.set_xticks([])
    axes.set_yticks([])
    shown = [] if labels is None else np.unique(labels).tolist()
    many = len(shown) > len(COLOURS) * len(MARKS)
    if labels is None:
        axes.scatter(xy[:, 0], xy[:, 1], s=15, c=COLOURS[0])
    for i, label in enumerate(shown):
        points, turn = xy[labels == label], i // len(COLOURS)
        axes.scatter(points[:, 0], points[:, 1], s=15, c=COLOURS[i % len(COLOURS)], marker=MARKS[turn % len(MARKS)])
        if many:
            _write_name(axes, np.median(points, 0), short(classes[label], 24))
    if shown and not many:
        _add_legend(figure, axes, [short(classes[label], 24) for label in shown])
    figure.savefig(file)


def _write_name(axes: Any, at: np.ndarray, name: str) -> None:
    from matplotlib.patheffects import withStroke

    axes.text(*at, name, ha='center', va='center', fontsize=8, parse_math=False,
              path_effects=[withStroke(linewidth=2.5, foreground='white')])


def _add_legend(figure: Any, axes: Any, names: list[str]) -> None:
    # matplotlib omits names that start with an underscore, and reads dollars as formulas; so texts are set afterwards.
    legend = figure.legend(
        axes.collections, [str(i) for i in range(len(names))], loc='outside lower center', ncols=5, markerscale=2,
        frameon=False, fontsize=9)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)

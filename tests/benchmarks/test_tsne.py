"""The picture of features: what it says, and that its colours can be seen."""
import itertools

import numpy as np
import pytest

from simsiam_models.benchmarks import tsne

pytest.importorskip('matplotlib')


def to_rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)]) / 255


def luminance(colour: str) -> float:
    """WCAG 2.1, relative luminance."""
    c = to_rgb(colour)
    return float(np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])


def test_every_colour_stands_out_from_white_and_from_the_others():
    assert min(1.05 / (luminance(c) + 0.05) for c in tsne.COLOURS) >= 3
    rgb = [255 * to_rgb(c) for c in tsne.COLOURS]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(rgb, 2)) > 60


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws `n` classes and returns the figure."""
    def draw(n: int, names: list[str] | None = None):
        from matplotlib.figure import Figure

        figures, real = [], Figure.savefig
        monkeypatch.setattr(Figure, 'savefig', lambda self, file: (figures.append(self), real(self, file)))
        labels = np.repeat(np.arange(n), 3)
        xy = np.random.default_rng(0).standard_normal((3 * n, 2))
        tsne.draw_scatter(xy, labels, names or [f'class {i}' for i in range(n)], 'model\nof $x_$', tmp_path / 'x.png')
        return figures[0]
    return draw


def test_the_legend_names_up_to_twenty_classes_each_with_its_own_look(drawn):
    figure = drawn(20, ['_private', '$x^{$', *(f'class {i}' for i in range(2, 20))])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[:3] == ['_private', '$x^{$', 'class 2'] and len(texts) == 20
    looks = {(tuple(c.get_facecolor()[0]), len(c.get_paths()[0].vertices)) for c in figure.axes[0].collections}
    assert len(looks) == 20 and figure.axes[0].get_title() == 'model\nof $x_$'


def test_more_classes_have_their_names_at_their_points(drawn):
    figure = drawn(21)
    assert not figure.legends and [t.get_text() for t in figure.axes[0].texts] == [f'class {i}' for i in range(21)]
    points = figure.axes[0].collections[4].get_offsets()
    assert np.allclose(figure.axes[0].texts[4].get_position(), np.median(np.asarray(points), 0))


def test_the_projection_keeps_the_distances_of_features_that_lie_in_a_plane():
    flat = np.random.default_rng(0).standard_normal((40, 2)) @ np.random.default_rng(1).standard_normal((2, 30))
    reduced = tsne.reduce_features(flat.astype(np.float32), 50)
    assert reduced.shape == (40, 30)
    assert np.allclose(np.linalg.norm(flat[0] - flat[1]), np.linalg.norm(reduced[0] - reduced[1]), rtol=1e-4)

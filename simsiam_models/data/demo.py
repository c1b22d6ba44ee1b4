"""The built-in demonstration data: pictures of patterned materials, generated in memory.

A class is one material, defined by the directions and the arrangement of its strokes (hatching, weave, brick,
chevrons). Every picture is a new sample of it, with its own position, scale and small rotation, its own two colours,
either of which may be darker, its own depth of engraving, and its own light with a slope, soft shadows and sensor
noise. Pictures of one class share neither pixels nor colours, so nearest neighbours among pixels say little; crop, flip
and colour jitter keep the class.
"""
import numpy as np

from .readers.images import MemoryImages

SIZE = 32  # pixels
CLASSES = [
    'ruled', 'pinstripe', 'hatched', 'shallow twill', 'steep twill', 'grid', 'lattice', 'flat diamond', 'tall diamond',
    'brick', 'chevron', 'rings']
STROKES = {'ruled': 0, 'pinstripe': 90, 'hatched': 45, 'shallow twill': 22, 'steep twill': 68}  # degrees
CROSSED = {'grid': (0, 90), 'lattice': (45, -45), 'flat diamond': (22, -22), 'tall diamond': (68, -68)}


def demo_images() -> tuple[MemoryImages, MemoryImages]:
    """Generates 3000 training and 768 validation images of 12 classes, 32 px; the same in every run."""
    return _generate_split('train', 250, 1), _generate_split('val', 64, 2)


def _generate_split(split: str, n: int, seed: int) -> MemoryImages:
    images = [_generate(kind, n, np.random.Generator(np.random.PCG64([seed, i]))) for i, kind in enumerate(CLASSES)]
    labels = np.repeat(np.arange(len(CLASSES)), n)
    return MemoryImages(np.concatenate(images), labels, CLASSES, f'demonstration data ({split})')


def _generate(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """Generates n pictures of one material, (n, SIZE, SIZE, 3) uint8."""

    def draw(low: float, high: float, *channels: int) -> np.ndarray:
        return rng.uniform(low, high, (n, 1, 1, *channels)).astype(np.float32)

    line = ((np.arange(SIZE) + 0.5) / SIZE - 0.5).astype(np.float32)
    x, y = line[None, None, :], line[None, :, None]
    turn, mirror = np.deg2rad(draw(-5, 5)), np.sign(draw(-1, 1))
    count = np.exp(draw(np.log(5), np.log(9)))  # strokes across the picture
    u = mirror * (x * np.cos(turn) - y * np.sin(turn)) * count + draw(0, 60)
    v = (x * np.sin(turn) + y * np.cos(turn)) * count + draw(0, 60)
    bend = draw(0, 0.1)
    u, v = u + bend * np.sin(6 * y + draw(0, 2 * np.pi)), v + bend * np.sin(6 * x + draw(0, 2 * np.pi))
    relief = np.tanh((_height(kind, u, v) + draw(-0.3, 0.3)) * draw(1, 4)) * np.sign(draw(-1, 1))
    angle, slope = draw(0, 2 * np.pi), draw(0, 0.4)
    light = 1 + slope * (x * np.cos(angle) + y * np.sin(angle))
    for _ in range(2):  # soft shadows and highlights
        spot = (x - draw(-0.5, 0.5)) ** 2 + (y - draw(-0.5, 0.5)) ** 2
        light = light + draw(-0.3, 0.3) * np.exp(-8 * spot)
    ground, ink = draw(0.35, 0.65, 1) * draw(0.6, 1.4, 3), draw(0.5, 1, 3)
    depth = 0.35 * np.exp(draw(np.log(0.3), 0, 1))
    picture = ground * light[..., None] + depth * ink * relief[..., None]
    picture += rng.standard_normal(picture.shape, dtype=np.float32) * draw(0, 0.03, 1)
    pixels: np.ndarray = (picture.clip(0, 1) * 255).astype(np.uint8)
    return pixels


def _height(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Computes the relief of a material at (u, v), about -1 to 1; one stroke per unit of length."""
    height: np.ndarray
    if kind in STROKES:
        height = _wave(u, v, STROKES[kind])
    elif kind in CROSSED:
        height = 1.3 * np.maximum(*(_wave(u, v, degrees) for degrees in CROSSED[kind])) - 0.5
    elif kind == 'brick':
        height = np.maximum(_wave(u, v, 0), np.cos(np.pi * (u + np.floor(v))))
    elif kind == 'chevron':
        height = np.cos(1.4 * np.pi * (v + 3 * np.abs((u / 3) % 1 - 0.5)))
    else:  # rings
        height = np.cos(6 * np.pi * np.hypot((u / 3) % 1 - 0.5, (v / 3) % 1 - 0.5))
    return height


def _wave(u: np.ndarray, v: np.ndarray, degrees: float) -> np.ndarray:
    a = np.float32(np.deg2rad(degrees))
    wave: np.ndarray = np.cos(2 * np.pi * (v * np.cos(a) - u * np.sin(a)))
    return wave

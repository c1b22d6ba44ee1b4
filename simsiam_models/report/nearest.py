"""What the network finds similar, before training and after it."""
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..benchmarks.backbone import load_backbone
from ..benchmarks.neighbours.nearest import find_others
from ..benchmarks.samples import subset
from ..data import EvalImages, Images, Transform
from ..data.augment import normalize
from ..data.readers.images import load_picture, name_of, spread
from ..pages.document import escape
from ..pages.gallery import Cell, draw_row
from ..runtime.distributed import choose_device, cores
from ..runtime.messages import one_line, printable, short
from ..training.initial import check_same, is_here, load_initial
from ..training.recipes import Recipe
from ..training.setup import make_model
from ..weights.folders import check_network, limit_parameters
from ..weights.networks import TIMM_ERRORS
from .curves import read_recipe
from .run import RunFolder

MOST, SHOWN, NEAREST = 1000, 6, 5  # images compared; images shown, with so many neighbours
PIXELS = 64 * 224**2  # of the images that a network takes at a time
MOST_PARAMETERS = 10**9

Found = dict[str, tuple[np.ndarray, np.ndarray]]  # 'before' or 'after' training -> rows and cosines, (N, NEAREST)


def make_networks(run: RunFolder, recipe: Recipe) -> tuple[dict[str, nn.Module], str]:
    """Returns the backbone before and after training, and a sentence on what is missing."""
    networks, problem, initial = {}, '', run.args.get('init_from')
    try:
        check_network(recipe.model, recipe.model_args, run.folder / 'args.json')
        with limit_parameters(run.folder / 'args.json', MOST_PARAMETERS):
            model = make_model(recipe, run.args['seed'])
    except ValueError as e:
        return {}, f'The network that {run.folder / "args.json"} names cannot be built ({one_line(e, 300)}). '
    try:
        if initial and not is_here(initial['source']):
            problem = f'The weights that the run started from, {initial["source"]}, are not on this machine. '
        else:
            if initial:
                start = load_initial(initial['source'], model, recipe)
                check_same(start, initial, run.folder)
                model.load_state_dict(start.state, strict=False)
            networks['before'] = model.backbone
    except (ValueError, OSError, RuntimeError) as e:
        problem = f'The weights that the run started from cannot be used ({e}). '
    try:
        networks['after'] = load_backbone(str(run.folder)).model
    except (ValueError, OSError, RuntimeError) as e:
        problem += f'There are no trained weights ({e}).'
    return networks, problem


@torch.no_grad()
def find_similar(run: RunFolder, images: Images) -> tuple[Images, Found, str]:
    """Returns at most MOST readable images, the nearest of each by each network, and a sentence on what is missing."""
    recipe, device = read_recipe(run), choose_device()
    networks, problem = make_networks(run, recipe)
    some = subset(images, spread(len(images), MOST))
    for network in networks.values():
        network.eval().to(device).to(memory_format=torch.channels_last)
    batch = max(1, min(64, PIXELS // recipe.augmentation.size**2))
    rows = [np.arange(i, min(i + batch, len(some))) for i in range(0, len(some), batch)]
    loader = EvalImages(some, rows, Transform(recipe.eval_resize, recipe.augmentation.size), min(16, cores()))
    features: dict[str, list[torch.Tensor]] = {name: [] for name in networks}
    with tqdm(loader if networks else (), 'comparing images', len(rows), leave=False, disable=None) as batches:
        for _, x in batches:
            x = normalize(x.to(device).permute(0, 3, 1, 2).float() / 255).contiguous(memory_format=torch.channels_last)
            for name, network in list(networks.items()):
                try:
                    features[name].append(network(x).float().cpu())
                except (RuntimeError, ValueError, *TIMM_ERRORS) as e:  # another network than the run's
                    del networks[name], features[name]
                    problem += f'The network {name} training does not take these images ({one_line(e, 200)}). '
    readable = np.array([i for i in range(len(some)) if i not in loader.unreadable], int)
    if len(readable) < 2:
        return some, {}, f'{problem}Fewer than two images can be read.'
    return subset(some, readable), {
        name: find_others(torch.cat(x).numpy()[readable], min(NEAREST, len(readable) - 1), torch.device('cpu'))
        for name, x in features.items()}, problem


def draw_nearest(images: Images, found: Found, problem: str) -> Iterator[str]:
    """Yields a sentence, and rows of pictures: an image, and its nearest ones by each network."""
    text = f'Compared: {len(images):,} evenly spaced images, by the cosine similarity of their features. '
    if images.labels is not None and found:
        k = next(iter(found.values()))[0].shape[1]
        text += f'Share of the {k} nearest images with the same label: ' + ', '.join(
            f'{100 * (images.labels[rows] == images.labels[:, None]).mean():.1f} % {name} training'
            for name, (rows, _) in found.items()) + '. Training did not use the labels.'
    yield f'<p>{escape(text + problem)}</p>\n'
    for i in spread(len(images), SHOWN).tolist() if found else ():
        for name, (rows, cosines) in found.items():
            cells = [_make_cell(images, i, 'this image')]
            cells += [_make_cell(images, row, f'{cosine:.3f}') for row, cosine in zip(
                rows[i].tolist(), cosines[i].tolist(), strict=True)]
            yield draw_row(f'{name.title()} training: {printable(Path(name_of(images, i)).name)}', cells)


def _make_cell(images: Images, row: int, text: str) -> Cell:
    label = '' if images.labels is None else f', {short(str(images.classes[images.labels[row]]), 40)}'
    return Cell(partial(load_picture, images, row), text + label, Path(name_of(images, row)).name)

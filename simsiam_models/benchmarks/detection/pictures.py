"""A sheet of pictures: the true objects of images beside the predicted ones."""
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ..panels import Panel, choose_colour, fit_text, plain_text, write_panels
from ..pixels import resize_mask

PANEL = 480  # pixels: the longest side of a picture


class Drawn(NamedTuple):
    """Objects of one image, in its pixels."""

    boxes: np.ndarray  # (n, 4) x1 y1 x2 y2
    labels: np.ndarray  # (n,)
    scores: np.ndarray | None = None  # (n,)
    masks: np.ndarray | None = None  # (n, H, W) of 0 and 1


class SheetRow(NamedTuple):
    """A picture of the sheet."""

    title: str  # its file
    image: np.ndarray  # (H, W, 3) uint8
    truth: Drawn
    predicted: Drawn


def write_sheet(path: str | Path, rows: list[SheetRow], classes: list[str]) -> None:
    """Writes a sheet of pictures, each with its objects: on the left the true ones, on the right the predicted ones.

    Args:
        path: a .png, .jpg or .jpeg file.
        rows: 1 to 16 pictures.
        classes: the name of each label.

    Raises:
        ValueError: the name of the file has another ending, or there are no pictures or more than 16.
        OSError: the file cannot be written.
    """
    colours = [choose_colour(k) for k in range(len(classes))]
    names = [plain_text(name) for name in classes]
    write_panels(path, [[
        Panel(_draw(row.image, drawn, names, colours), f'{what}: {len(drawn.boxes)}', row.title)
        for what, drawn in (('truth', row.truth), ('prediction', row.predicted))] for row in rows], PANEL)


def _draw(
    image: np.ndarray, drawn: Drawn, names: list[str], colours: list[tuple[int, int, int]],
) -> Image.Image:
    height, width = image.shape[:2]
    scale = PANEL / max(height, width)
    w, h = max(1, round(width * scale)), max(1, round(height * scale))
    picture = torch.from_numpy(np.array(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR)))
    picture, n = picture.permute(2, 0, 1), len(drawn.boxes)
    boxes = np.asarray(drawn.boxes, np.float64).reshape(n, 4) * np.array([w / width, h / height] * 2)
    boxes = np.clip(boxes, 0, [w - 1, h - 1] * 2)
    each = [colours[k] for k in drawn.labels]
    if drawn.masks is not None and np.any(drawn.masks):
        masks = np.stack([resize_mask(np.asarray(mask, bool), h, w) for mask in drawn.masks])
        if masks.any():
            picture = draw_segmentation_masks(picture, torch.from_numpy(masks), 0.45, each)
    if n:  # a box of negative width or height becomes a point
        ends = np.concatenate([boxes[:, :2], np.maximum(boxes[:, :2], boxes[:, 2:])], 1)
        picture = draw_bounding_boxes(picture, torch.from_numpy(ends), colors=each, width=2)
    out = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    for i in reversed(range(n)):  # the first lies on top
        score = '' if drawn.scores is None else f' {drawn.scores[i]:.2f}'
        _write(out, boxes[i], names[drawn.labels[i]] + score, each[i])
    return out


def _write(picture: Image.Image, box: np.ndarray, text: str, colour: tuple[int, int, int]) -> None:
    """Writes the caption of a box above its corner, on its colour; inside the picture."""
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    text = fit_text(text, draw, font, picture.width - 4)
    width, height = draw.textlength(text, font) + 4, 17
    x, y = max(0, min(box[0], picture.width - width)), max(0, box[1] - height)
    draw.rectangle((x, y, x + width, y + height), colour)
    dark = np.dot(colour, (0.299, 0.587, 0.114)) < 128
    draw.text((x + 2, y + 1), text, 'white' if dark else 'black', font)

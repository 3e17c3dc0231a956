"""`samples.png`: a row per model, a column per seed."""

from __future__ import annotations

import io
import math

import torch
from PIL import Image, ImageDraw, ImageFont

from ofadiff.evaluation.report.results import Results

SMALLEST_TILE, LARGEST_TILE = 64, 256  # pixels; other images are enlarged or shrunk to about that
GAP = 4
MARGIN = 16
LABEL = 132
INK, FAINT, PAPER = "#1c2430", "#6b7685", "#ffffff"


def sample_grid(report: Results) -> bytes | None:
    """A PNG of the report's images, the teacher on top; None if it has none."""
    if not report.pictured:
        return None
    tiles = [(row, [_to_tile(image) for image in images]) for row, images in report.pictured]
    width, height = tiles[0][1][0].size
    columns = max(len(images) for _, images in tiles)
    canvas_size = (
        2 * MARGIN + LABEL + columns * (width + GAP) - GAP,
        2 * MARGIN + len(tiles) * (height + GAP) - GAP,
    )
    canvas = Image.new("RGB", canvas_size, PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, (row, images) in enumerate(tiles):
        top = MARGIN + number * (height + GAP)
        middle = top + height / 2
        draw.text((MARGIN, middle - 1), row.name, INK, ImageFont.load_default(15), anchor="ls")
        draw.text((MARGIN, middle + 5), report.subtitle(row), FAINT, ImageFont.load_default(12), anchor="lt")
        for column, image in enumerate(images):
            canvas.paste(image, (MARGIN + LABEL + column * (width + GAP), top))
    return to_png(canvas)


def to_image(image: torch.Tensor) -> Image.Image:
    """A Pillow image of a uint8 tensor `(3, H, W)`; a large one is shrunk."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture.thumbnail((LARGEST_TILE, LARGEST_TILE))
    return picture


def to_png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _to_tile(image: torch.Tensor) -> Image.Image:
    picture = to_image(image)
    scale = max(1, math.ceil(SMALLEST_TILE / max(picture.size)))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)

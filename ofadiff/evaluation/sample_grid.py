"""`samples.png`: a row per model, a column per seed."""

from __future__ import annotations

import io
import math

import torch
from PIL import Image, ImageDraw, ImageFont

from ofadiff.evaluation.report import TEACHER, Report

TILE = 64  # smaller images are enlarged to about so many pixels
GAP = 4
MARGIN = 16
LABEL = 104
INK, FAINT, PAPER = "#1c2430", "#6b7685", "#ffffff"


def sample_grid(report: Report) -> bytes | None:
    """A PNG of the report's images, the teacher on top; None if it has none."""
    if not report.images:
        return None
    rows = {row.label: row for row in report.rows if row.label in report.images}
    columns, _, height, width = next(iter(report.images.values())).shape
    scale = max(1, math.ceil(TILE / max(height, width)))
    tile_height, tile_width = height * scale, width * scale
    canvas = Image.new(
        "RGB",
        (
            2 * MARGIN + LABEL + columns * (tile_width + GAP) - GAP,
            2 * MARGIN + len(report.images) * (tile_height + GAP) - GAP,
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(canvas)
    top = MARGIN
    for label, images in report.images.items():
        middle = top + tile_height / 2
        name = label if label == TEACHER or rows[label].size is None else f"size {label}"
        draw.text((MARGIN, middle - 1), name, INK, ImageFont.load_default(15), anchor="ls")
        parameters = report.text(rows[label], "params")
        draw.text((MARGIN, middle + 5), parameters, FAINT, ImageFont.load_default(12), anchor="lt")
        for column, image in enumerate(images):
            tile = to_image(image).resize((tile_width, tile_height), Image.Resampling.NEAREST)
            canvas.paste(tile, (MARGIN + LABEL + column * (tile_width + GAP), top))
        top += tile_height + GAP
    return to_png(canvas)


def to_image(image: torch.Tensor) -> Image.Image:
    """A Pillow image of a uint8 tensor `(3, H, W)`."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def to_png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()

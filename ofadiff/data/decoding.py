"""How an image becomes pixels: the one way for training, streams, references and caches."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ofadiff.reading.files import check_file

# What is seen through transparent pixels.
BACKGROUND = "white"

# What `decode_image` makes of images; who keeps its results keeps this beside them.
DECODING = f"upright, 8 bits, on {BACKGROUND}"

# Largest value of a 16-bit image.
SIXTEEN_BITS = 65535
CHANNELS = (1, 3, 4)

# Formats that are programs, which Pillow has Ghostscript run; a file of any name may be one.
PROGRAMS = ("EPS",)


def decode_image(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """An opened image as a viewer shows it, upright and opaque, with 8 bits per channel.

    - It is turned as its EXIF orientation says.
    - 16-bit images are scaled to 8 bits, floats from [0, 1].
    - What is transparent is put on a white background (`BACKGROUND`), unless alpha is asked for.
    - Of an animation it is the frame that the image is at, the first one after opening.

    Args:
        image: Image of any Pillow mode.
        mode: Mode of the result: `"L"`, `"RGB"`, or `"RGBA"`, which keeps transparency.

    Raises:
        ValueError: If the values do not say what is black and white, or Pillow cannot convert the mode.
    """
    image = _eight_bits(ImageOps.exif_transpose(image))
    if mode == "RGBA" or not image.has_transparency_data:
        return image.convert(mode)
    straight = image.convert("LA") if image.mode == "La" else image
    opaque = Image.new("RGBA", image.size, BACKGROUND)
    return Image.alpha_composite(opaque, straight.convert("RGBA")).convert(mode)


def open_image(value: Any) -> Image.Image:
    """An image, however a data set holds it.

    Args:
        value: A Pillow image, encoded bytes, a path, `{"bytes": …, "path": …}`, or an array or nested list of pixels:
            `(H, W)`, `(H, W, C)` or `(C, H, W)`, integers from 0 to 255 or floats in [0, 1].

    Raises:
        OSError: If there is no such file, or Pillow cannot read it.
        ValueError: If the value is none of these, a path that is no file's, or an image of more pixels than Pillow
            takes for an attack.
    """
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        content = value.get("bytes")
        value = value.get("path") if content is None else content
    if isinstance(value, bytes | bytearray | memoryview):
        return _opened(io.BytesIO(value))
    if isinstance(value, str | Path):
        check_file(value)
        return _opened(value)
    if isinstance(value, np.ndarray | torch.Tensor | list):
        return _from_pixels(np.asarray(value))
    raise ValueError(
        f"it is a {type(value).__name__}; an image is a Pillow image, encoded bytes, a path, a struct of bytes and "
        "path, or an array of pixels"
    )


def _opened(file: Any) -> Image.Image:
    try:
        return Image.open(file, formats=_formats())
    except Image.DecompressionBombError as error:
        raise ValueError(f"it claims more pixels than are decoded: {error}") from error


def _formats() -> list[str]:
    """The formats that are opened: all that Pillow reads by itself, with those of plugins that were registered."""
    Image.init()
    return [name for name in Image.ID if name not in PROGRAMS]


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    found = f"an array of shape {pixels.shape} and {pixels.dtype}"
    if pixels.ndim == 3:
        last, first = pixels.shape[2] in CHANNELS, pixels.shape[0] in CHANNELS
        if last == first:
            raise ValueError(f"it is {found}; which axis are the channels? They must be 1, 3 or 4, first or last")
        pixels = pixels if last else pixels.transpose(1, 2, 0)
        pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    if pixels.ndim != 2 and pixels.ndim != 3:
        raise ValueError(f"it is {found}; it must be (H, W), (H, W, C) or (C, H, W)")
    if pixels.dtype == np.uint16 and pixels.ndim == 2:
        return Image.fromarray(pixels)
    if np.issubdtype(pixels.dtype, np.floating):
        _check_range(pixels, 1, f"{found}, floats")
        pixels = np.round(pixels * 255)
    elif pixels.dtype != bool:
        _check_range(pixels, 255, found)
    else:
        pixels = pixels * 255
    return Image.fromarray(np.ascontiguousarray(pixels.astype(np.uint8)))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey images of more than 8 bits, scaled; all others as they are."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode == "F":
        _check_range(values, 1, "an image of floats")
        grey = values * 255
    else:
        _check_range(values, SIXTEEN_BITS, "an image of integers")
        if image.mode == "I" and image.format != "PNG" and 0 < values.max() <= 255:
            raise ValueError(
                f"it is an image of 32-bit integers up to {values.max()}: dark, or of 8 bits? Save it with 8 or 16 bits"
            )
        grey = values.astype(np.float64) * (255 / SIXTEEN_BITS)
    scaled = Image.fromarray(np.round(grey).astype(np.uint8))
    if "transparency" in image.info:  # one value of the 16-bit ones is transparent
        scaled.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return scaled


def _check_range(values: np.ndarray, highest: int, what: str) -> None:
    if values.size and not (values.min() >= 0 and values.max() <= highest):  # NaN is outside too
        raise ValueError(f"it is {what} from {values.min():g} to {values.max():g}; values must lie in [0, {highest}]")

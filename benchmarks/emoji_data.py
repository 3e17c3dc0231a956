"""A real text-to-image data set that needs no download: colour emoji and their Unicode names."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

# Where the Debian package fonts-noto-color-emoji puts it.
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
PIXELS_PER_EM = 109  # the one size in which the font has its bitmaps
WIDTH, HEIGHT = 136, 128


def check_font(font: Path) -> None:
    """Raises ValueError unless the font is one of bitmaps such as Noto Color Emoji."""
    if not font.is_file():
        raise ValueError(
            f"--font {font} is not a file; expected NotoColorEmoji.ttf, which `apt-get install fonts-noto-color-emoji` "
            f"puts at {FONT}"
        )
    if "CBDT" not in TTFont(font):
        raise ValueError(f"--font {font} has no colour bitmaps (a CBDT table), as NotoColorEmoji.ttf has")


def draw_emoji(font: Path) -> Iterator[tuple[str, Image.Image]]:
    """Caption and picture, 136×136 on white, of every emoji that is one character with a Unicode name."""
    # Basic layout: one glyph for one character, with no need for libraqm.
    typeface = ImageFont.truetype(str(font), PIXELS_PER_EM, layout_engine=ImageFont.Layout.BASIC)
    for code in sorted(TTFont(font).getBestCmap()):
        name = unicodedata.name(chr(code), None)
        glyph = Image.new("RGBA", (WIDTH, HEIGHT), (255, 255, 255, 0))
        ImageDraw.Draw(glyph).text((0, 0), chr(code), font=typeface, embedded_color=True)
        if name is None or glyph.getchannel("A").getextrema()[1] == 0:  # joiners and tags draw nothing
            continue
        square = Image.new("RGB", (WIDTH, WIDTH), "white")
        square.paste(glyph, (0, (WIDTH - HEIGHT) // 2), glyph)
        yield name.lower(), square


def write_emoji(folder: Path, font: Path, resolution: int) -> list[str]:
    """An image folder with `metadata.jsonl`, as `datasets` and compress_sd.py read it; returns the captions."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, captions = [], []
    for index, (caption, picture) in enumerate(draw_emoji(font)):
        picture.resize((resolution, resolution), Image.Resampling.LANCZOS).save(folder / f"{index:04}.png")
        lines.append(json.dumps({"file_name": f"{index:04}.png", "text": caption}))
        captions.append(caption)
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return captions

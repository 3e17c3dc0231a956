"""Webdataset shards of captioned noise."""

import io
import json
import tarfile

import numpy as np
from PIL import Image


def save_shards(folder, counts=(5, 3, 4), broken=()):
    """One `.tar` for each count; a sample is a .png, a .txt and a .json. The images of the `broken` ones are none."""
    folder.mkdir()
    names = iter(range(sum(counts)))
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as tar:
            for _ in range(count):
                index = next(names)
                buffer = io.BytesIO()
                pixels = np.random.default_rng(index).integers(0, 255, (20, 16 + index % 5, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(buffer, "png")
                image = b"no image" if index in broken else buffer.getvalue()
                caption = f"noise {index}"
                values = {"png": image, "txt": caption.encode(), "json": json.dumps({"also": [caption]}).encode()}
                for extension, value in values.items():
                    entry = tarfile.TarInfo(f"{index:03}.{extension}")
                    entry.size = len(value)
                    tar.addfile(entry, io.BytesIO(value))

"""Images as people have them come out as a viewer shows them, by whatever way they are read."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from ofadiff.data.captioned_images import TextToImageData
from ofadiff.data.captions import dataset_captions
from ofadiff.data.decoding import decode_image, open_image
from ofadiff.data.hub_datasets import dataset_images, load_dataset_split
from ofadiff.data.image_data import ImageData
from ofadiff.data.images import image_folder
from ofadiff.evaluation.reference import Reference

HALF = np.zeros((16, 16, 3), np.uint8)
HALF[:8] = 255  # white above
RAMP = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
NOISE = np.random.default_rng(0).integers(0, 255, (16, 16, 4), dtype=np.uint8)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def turned(orientation):
    """What a camera saves that held `HALF` so: turned as it says, it is upright."""
    ways = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}  # fmt: skip
    return Image.fromarray(HALF).transpose(ways[orientation])


def palette(transparency):
    image = Image.new("P", (16, 16))
    image.putdata(list((NOISE[..., 0] % 2).reshape(-1)))
    image.putpalette([255, 0, 0, 0, 255, 0] + [0] * 762)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=transparency)
    return buffer.getvalue()


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def upright(pixels):
    assert pixels[:7].min() > 0.9 and pixels[9:].max() < -0.9


def ramp(pixels):
    expected = np.round(RAMP / 257) / 127.5 - 1
    assert np.allclose(pixels, expected[..., None], atol=1e-6)


def white(pixels):
    assert (pixels == 1).all()


def red_is_background(pixels):
    index = NOISE[..., 0] % 2
    assert (pixels[index == 0] == 1).all() and np.allclose(pixels[index == 1], [-1, 1, -1])


hidden = NOISE.copy()
hidden[..., 3] = 0
keyed = Image.fromarray(np.full((16, 16, 3), 7, np.uint8))
CASES = {
    **{
        f"exif_{number}.{kind}": (encoded(turned(number), kind, exif=exif(number), **options), upright)
        for number in range(2, 9)
        for kind, options in (("jpeg", {"quality": 95}), ("png", {}), ("webp", {"lossless": True}))
    },
    "grey_16_bit.png": (encoded(Image.fromarray(RAMP), "png"), ramp),
    "grey_16_bit.tiff": (encoded(Image.fromarray(RAMP), "tiff"), ramp),
    "big_endian.tiff": (encoded(Image.frombytes("I;16B", (16, 16), RAMP.astype(">u2").tobytes()), "tiff"), ramp),
    "integers.tiff": (encoded(Image.fromarray(RAMP.astype(np.int32)), "tiff"), ramp),
    "floats.tiff": (encoded(Image.fromarray((RAMP / 65535).astype(np.float32)), "tiff"), ramp),
    "turned_16_bit.png": (encoded(Image.fromarray(RAMP[::-1, ::-1].copy()), "png", exif=exif(3)), ramp),
    "rgba.png": (encoded(Image.fromarray(hidden), "png"), white),
    "rgba.webp": (encoded(Image.fromarray(hidden), "webp", lossless=True, exact=True), white),
    "la.png": (encoded(Image.fromarray(hidden).convert("LA"), "png"), white),
    "colour_key.png": (encoded(keyed, "png", transparency=(7, 7, 7)), white),
    "grey_key.png": (encoded(keyed.convert("L"), "png", transparency=7), white),
    "grey_key_16_bit.png": (encoded(Image.fromarray(np.full((16, 16), 9, np.uint16)), "png", transparency=9), white),
    "palette_index.png": (palette(0), red_is_background),
    "palette_alphas.png": (palette(b"\x00\xff"), red_is_background),
    "cmyk.jpeg": (encoded(Image.fromarray(HALF).convert("CMYK"), "jpeg", quality=95), upright),
    "animated.gif": (
        encoded(Image.fromarray(HALF), "gif", save_all=True, append_images=[Image.fromarray(HALF[::-1].copy())]),
        upright,
    ),
    "bilevel.png": (encoded(Image.fromarray(HALF).convert("1"), "png"), upright),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name, (content, _) in CASES.items():
        (folder / name).write_bytes(content)
    lines = [json.dumps({"file_name": name, "text": name}) for name in CASES]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def check_all(pixels_of):
    for name, (_, check) in CASES.items():
        try:
            check(pixels_of(name).permute(1, 2, 0).numpy())
        except AssertionError as error:
            raise AssertionError(name) from error


def test_folders(folder):
    images = image_folder(folder)
    number = {name.rpartition("/")[2]: index for index, name in enumerate(images.names)}
    assert number.keys() == CASES.keys()
    data = ImageData(images, 16, 3)
    check_all(lambda name: data[number[name], 0]["pixel_values"])
    text = TextToImageData(images, [("",)] * len(images.names), 16, center_crop=True)
    check_all(lambda name: text[number[name], 0]["pixel_values"])
    reference = Reference(folder).images(16, 16)
    check_all(lambda name: reference[number[name]].float() / 127.5 - 1)


@pytest.mark.parametrize("format", [None, "torch", "numpy"])
@pytest.mark.parametrize("column", ["image", "bytes", "struct", "path"])
def test_data_sets(folder, tmp_path, column, format):
    paths = [str(folder / name) for name in CASES]
    values = {
        "image": paths,
        "path": paths,
        "bytes": [content for content, _ in CASES.values()],
        "struct": [{"bytes": content, "path": None} for content, _ in CASES.values()],
    }
    dataset = datasets.Dataset.from_dict({"image": values[column], "text": list(CASES)})
    if column == "image":
        dataset = dataset.cast_column("image", datasets.Image())
    dataset.with_format(format).save_to_disk(str(tmp_path / "saved"))
    loaded = load_dataset_split(str(tmp_path / "saved")).with_format(format)
    captions = [text for (text,) in dataset_captions(loaded)]
    assert captions == list(CASES)
    data = ImageData(dataset_images(loaded), 16, 3)
    check_all(lambda name: data[captions.index(name), 0]["pixel_values"])


def test_arrays_of_pixels():
    expected = np.asarray(HALF)
    for value in (HALF, HALF.transpose(2, 0, 1), torch.from_numpy(HALF), HALF.tolist(), HALF / 255, HALF > 0):
        assert np.array_equal(np.asarray(decode_image(open_image(value))), expected)
    assert np.array_equal(np.asarray(decode_image(open_image(HALF[..., 0]), "L")), HALF[..., 0])
    for value, reason in (
        (HALF.astype(np.int64) * 2, r"shape \(16, 16, 3\) and int64 from 0 to 510; values must lie in \[0, 255\]"),
        (HALF - 0.5, r"floats from -0.5 to 254.5; values must lie in \[0, 1\]"),
        (np.zeros((3, 5, 3), np.uint8), "which axis are the channels"),
        (np.zeros(4, np.uint8), r"it must be \(H, W\)"),
        (7, "it is a int; an image is a Pillow image"),
    ):
        with pytest.raises(ValueError, match=reason):
            open_image(value)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.fromarray(np.full((4, 4), 3.5, np.float32)), r"floats from 3.5 to 3.5; values must lie in \[0, 1\]"),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), r"values must lie in \[0, 1\]"),
        (Image.fromarray(np.full((4, 4), -1, np.int32)), r"from -1 to -1; values must lie in \[0, 65535\]"),
        (Image.fromarray(np.full((4, 4), 200, np.int32)), "up to 200: dark, or of 8 bits"),
    ],
)
def test_values_that_do_not_say_what_is_white_are_refused_by_name(image, reason, tmp_path):
    image.save(tmp_path / "odd.tiff")
    with pytest.raises(ValueError, match=reason):
        decode_image(image)
    with pytest.raises(ValueError, match=f"{reason}.*odd.tiff.*: 1 of 1 images cannot be read: .*odd.tiff$"):
        Reference(tmp_path)
    with pytest.raises(ValueError, match=f"odd.tiff cannot be read: .*{reason}"):
        ImageData(image_folder(tmp_path), 4, 3)[0, 0]


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "YCbCr", "HSV", "1"])
def test_opaque_8_bit_images_are_what_pillow_makes_of_them(mode):
    image = Image.fromarray(NOISE[..., :3]).convert(mode)
    for wanted in ("L", "RGB", "RGBA"):
        assert np.array_equal(np.asarray(decode_image(image, wanted)), np.asarray(image.convert(wanted)))
    opaque = Image.fromarray(np.dstack([NOISE[..., :3], np.full((16, 16), 255, np.uint8)]))
    assert np.array_equal(np.asarray(decode_image(opaque)), NOISE[..., :3])


def test_a_model_with_an_alpha_channel_sees_it():
    image = Image.fromarray(NOISE)
    assert np.array_equal(np.asarray(decode_image(image, "RGBA")), NOISE)
    half = Image.fromarray(np.dstack([np.zeros((2, 2, 3), np.uint8), np.full((2, 2), 128, np.uint8)]))
    assert pil_to_tensor(decode_image(half)).unique().tolist() == [127]

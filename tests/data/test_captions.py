import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ofadiff.data.captioned_images import TextToImageData
from ofadiff.data.captions import dataset_captions
from ofadiff.data.images import Images

SIDE = 8


def make_data(image=None, captions=(("a house",),), **options):
    image = image or Image.new("RGB", (12, 10))
    return TextToImageData(Images(["image"] * len(captions), lambda index: image), captions, SIDE, **options)


def ramp(width, height):
    """Every column its own grey."""
    return Image.fromarray(np.tile(np.arange(width, dtype=np.uint8) * 4, (height, 1)))


def test_the_shorter_side_is_resized_and_the_middle_cropped():
    wide = np.zeros((16, 48), dtype=np.uint8)
    wide[:, 12:36] = 255  # bilinear: a pixel looks beyond its own
    sample = make_data(Image.fromarray(wide), center_crop=True)[0, 0]
    assert torch.equal(sample["pixel_values"], torch.ones(3, SIDE, SIDE))
    assert sample["time_ids"].tolist() == [16, 48, 0, 8, SIDE, SIDE]


def test_crops_are_the_squares_that_time_ids_say_and_cover_the_image():
    data = make_data(ramp(16, SIDE))
    lefts = set()
    for seed in range(100):
        sample = data[0, seed]
        top, left = sample["time_ids"][2:4].tolist()
        grey = (sample["pixel_values"][0, 0] + 1) * 127.5 / 4
        torch.testing.assert_close(grey, torch.arange(left, left + SIDE).float())
        assert top == 0 and torch.equal(sample["pixel_values"], data[0, seed]["pixel_values"])
        lefts.add(left)
    assert lefts == set(range(9))


def test_half_of_the_samples_are_mirrored():
    data = make_data(ramp(SIDE, SIDE), center_crop=True, random_flip=True)
    straight = data.view(0, flip=False, seed=0)["pixel_values"]
    flipped = sum(torch.equal(data[0, seed]["pixel_values"], straight.flip(2)) for seed in range(200))
    assert 70 < flipped < 130


def test_seeds_leave_out_captions_and_pick_one_of_several():
    data = make_data(captions=[("one", "two")], empty_captions=0.2)
    drawn = [data[0, seed]["captions"] for seed in range(300)]
    assert drawn == [data[0, seed]["captions"] for seed in range(300)]
    assert 30 < drawn.count("") < 90
    assert all(80 < drawn.count(caption) < 160 for caption in ("one", "two"))
    assert all(make_data()[0, seed]["captions"] == "a house" for seed in range(20))


def test_what_is_no_share_of_captions_is_refused():
    with pytest.raises(ValueError, match="share of empty captions is 10"):
        make_data(empty_captions=10)


def test_captions_are_strings_or_lists_of_some():
    table = datasets.Dataset.from_dict({"one": ["a", "b"], "several": [["a", "b"], ["c"]], "gap": ["a", None]})
    assert dataset_captions(table, "one") == [("a",), ("b",)]
    assert dataset_captions(table, "several") == [("a", "b"), ("c",)]
    with pytest.raises(ValueError, match="row 1 of column 'gap' holds None; a caption is a string"):
        dataset_captions(table, "gap")
    with pytest.raises(ValueError, match=r"no column 'text' of captions; its columns: one, .* metadata\.jsonl"):
        dataset_captions(table)

"""Folders of images as people have them: nothing is left out, nothing hidden comes in, names say the labels."""

import json

import numpy as np
import pandas
import pytest
from PIL import Image

from ofadiff.data.hub_datasets import dataset_images, load_dataset_split
from ofadiff.data.images import image_folder


def save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(path)


def labels(images):
    return {name.rpartition("/")[2]: label for name, label in zip(images.names, images.labels, strict=True)}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["10", "2", "3"], {"10": 10, "2": 2, "3": 3}),
        (["3", "5"], {"3": 3, "5": 5}),
        (["007", "010"], {"007": 7, "010": 10}),
        (["dog", "cat", "10"], {"10": 0, "cat": 1, "dog": 2}),
        (["n02", "n01"], {"n01": 0, "n02": 1}),
    ],
)
def test_classes(tmp_path, names, expected):
    for name in names:
        save(tmp_path / name / f"{name}.png")
        save(tmp_path / name / "deeper" / f"{name}-2.png")
    images = image_folder(tmp_path)
    assert labels(images) == {f"{n}{end}.png": label for n, label in expected.items() for end in ("", "-2")}
    assert {name: label for label, name in images.classes.items()} == expected


def test_hidden_things_are_left_out_and_links_followed(tmp_path):
    for name in (".ipynb_checkpoints", "__MACOSX", "a", "b/.cache", "b"):
        save(tmp_path / "data" / name / "1.png")
    save(tmp_path / "data" / "a" / "._2.png")
    save(tmp_path / "elsewhere" / "3.png")
    (tmp_path / "data" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "b" / "again").symlink_to(tmp_path / "data")  # a loop
    (tmp_path / "data" / "a" / "link.png").symlink_to(tmp_path / "elsewhere" / "3.png")
    images = image_folder(tmp_path / "data")
    found = [name.removeprefix(f"{tmp_path}/data/") for name in images.names]
    assert found == ["a/1.png", "a/link.png", "b/1.png", "c/3.png"] and images.labels == [0, 0, 1, 2]
    assert image_folder(tmp_path / "data" / "b").labels is None


def test_one_class_number_twice_is_refused(tmp_path):
    for name in ("1", "01"):
        save(tmp_path / name / "a.png")
    with pytest.raises(ValueError, match="has 01 and 1, which are the same class number"):
        image_folder(tmp_path)


def names_of(folder, cache, split="train"):
    dataset = load_dataset_split(str(folder), split=split, cache_dir=str(cache))
    images = dataset_images(dataset)
    return sorted(int(np.asarray(images.decoded(index, "L"))[0, 0]) for index in range(len(images.names)))


def test_a_data_set_of_a_folder_uses_every_image(tmp_path):
    for value, name in enumerate(["train.png", "cat.png", "my_test_picture.png", "deep/validation/x.png"]):
        save(tmp_path / "loose" / name, value)
    assert names_of(tmp_path / "loose", tmp_path / "cache") == [0, 1, 2, 3]
    for value, name in enumerate(["train/1.png", "car/2.png", "boat/3.png"]):  # a class that is called train
        save(tmp_path / "vehicles" / name, value)
    assert names_of(tmp_path / "vehicles", tmp_path / "cache") == [0, 1, 2]
    for value, name in enumerate(["train/1.png", "train/2.png", "test/3.png"]):
        save(tmp_path / "split" / name, value)
    assert names_of(tmp_path / "split", tmp_path / "cache") == [0, 1]
    assert names_of(tmp_path / "split", tmp_path / "cache", "test") == [2]


def test_captions_of_a_folder_stay_with_their_images(tmp_path):
    lines = []
    for value, name in enumerate(["train.png", "other.png", "test.png"]):
        save(tmp_path / "data" / name, value)
        lines.append(json.dumps({"file_name": name, "text": f"number {value}"}))
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    dataset = load_dataset_split(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    images = dataset_images(dataset)
    assert sorted(dataset["text"]) == ["number 0", "number 1", "number 2"]
    for index, text in enumerate(dataset["text"]):
        assert f"number {np.asarray(images.decoded(index, 'L'))[0, 0]}" == text


def test_files_that_would_be_left_out_are_named(tmp_path):
    save(tmp_path / "1.png", 5)
    frame = pandas.DataFrame({"image": [(tmp_path / "1.png").read_bytes()], "text": ["a"]})
    for folder, names in (
        ("mixed", ["train.parquet", "more.parquet"]),
        ("split", ["train-0.parquet", "test-0.parquet"]),
    ):
        (tmp_path / folder).mkdir()
        for name in names:
            frame.to_parquet(tmp_path / folder / name)
    with pytest.raises(ValueError, match=r"more\.parquet would be left out; say which ones are meant"):
        load_dataset_split(str(tmp_path / "mixed"), cache_dir=str(tmp_path / "cache"))
    assert names_of(tmp_path / "split", tmp_path / "cache") == [5]


@pytest.mark.parametrize("written", ["{}", "./{}", "../here/{}", "{}/"])
def test_folders_beside_the_user_are_read_like_any_other(tmp_path, monkeypatch, written):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for value in range(3):
        save(tmp_path / "here" / "images" / f"{value}.png", value)
    (tmp_path / "here" / "table").mkdir()
    pandas.DataFrame({"text": ["a", "b"]}).to_parquet(tmp_path / "here" / "table" / "0.parquet")
    assert names_of(written.format("images"), tmp_path / "cache") == [0, 1, 2]
    rows = load_dataset_split(written.format("table"), cache_dir=str(tmp_path / "cache"))
    assert rows["text"] == ["a", "b"]
    streamed = load_dataset_split(written.format("table"), cache_dir=str(tmp_path / "cache"), streaming=True)
    assert [row["text"] for row in streamed] == ["a", "b"]

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ofadiff.data.hub_datasets import dataset_images, load_dataset_split
from ofadiff.data.image_data import ImageData
from ofadiff.data.images import Images, check_images, image_folder
from ofadiff.data.order import draw_keys, fixed_batches, hold_out, load_batches, step_batches


def save_image(path, value=100, size=(12, 10), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def test_subfolders_are_classes_in_alphabetical_order(tmp_path):
    for name in ("dog/b.png", "dog/a.png", "cat/c.jpg"):
        save_image(tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    images = image_folder(tmp_path)
    assert [name.split("/")[-1] for name in images.names] == ["c.jpg", "a.png", "b.png"]
    assert images.labels == [0, 1, 1]


def test_a_flat_folder_has_no_labels(tmp_path):
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "sub" / "b.png")
    assert image_folder(tmp_path).labels is None


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no images"):
        image_folder(tmp_path)


def test_broken_images_are_counted_and_named(tmp_path):
    for name in ("good.png", "short.png", "text.jpg", "empty.png"):
        save_image(tmp_path / name, size=(64, 64))
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "short.png")
    whole = (tmp_path / "short.png").read_bytes()
    (tmp_path / "short.png").write_bytes(whole[: len(whole) // 2])  # its header is fine
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"3 of 4 images cannot be read: .*empty.png, .*short.png, .*text.jpg$"):
        check_images(image_folder(tmp_path))


def test_a_long_list_of_broken_images_is_cut(tmp_path):
    for index in range(13):
        (tmp_path / f"{index:02}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"13 of 13 images cannot be read: .*09.png and 3 more"):
        check_images(image_folder(tmp_path))


def test_pixels_span_minus_one_to_one_and_are_cropped_at_the_centre():
    wide = np.zeros((8, 24), dtype=np.uint8)
    wide[:, 8:16] = 255
    data = ImageData(Images(["wide"], lambda index: Image.fromarray(wide)), resolution=8, channels=1)
    assert torch.equal(data[0, 0]["pixel_values"], torch.ones(1, 8, 8))
    black = ImageData(Images(["black"], lambda index: Image.new("L", (8, 8))), resolution=4, channels=3)
    assert torch.equal(black[0, 0]["pixel_values"], -torch.ones(3, 4, 4))


def test_the_seed_decides_the_flip():
    ramp = Image.fromarray(np.tile(np.arange(8, dtype=np.uint8) * 30, (8, 1)))
    data = ImageData(Images(["ramp"], lambda index: ramp), resolution=8, channels=1, random_flip=True)
    straight = ImageData(Images(["ramp"], lambda index: ramp), resolution=8, channels=1)[0, 0]["pixel_values"]
    flips = 0
    for seed in range(200):
        pixels = data[0, seed]["pixel_values"]
        assert torch.equal(pixels, data[0, seed]["pixel_values"])
        flips += torch.equal(pixels, straight.flip(2))
    assert 70 < flips < 130


def test_a_model_with_an_odd_number_of_channels_is_refused(data):
    with pytest.raises(ValueError, match="5 channels; accepted: 1, 3, 4"):
        ImageData(data[0].images, resolution=8, channels=5)


def test_held_out_images_are_the_same_every_time_and_never_trained_on():
    training, validation = hold_out(50, 0.1, seed=3)
    assert (training, validation) == hold_out(50, 0.1, seed=3)
    assert validation != hold_out(50, 0.1, seed=4)[1]
    assert len(validation) == 5 and sorted(training + validation) == list(range(50))
    assert hold_out(50, 0.0, seed=3) == (list(range(50)), [])
    with pytest.raises(ValueError, match=r"fraction is 1\.0"):
        hold_out(50, 1.0, seed=3)
    with pytest.raises(ValueError, match="leaves none to train on"):
        hold_out(1, 0.5, seed=3)


def test_every_epoch_shows_every_image_once_in_a_new_order():
    first = [index for index, _ in draw_keys(10, range(10), seed=0)]
    second = [index for index, _ in draw_keys(10, range(10, 20), seed=0)]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    keys = draw_keys(10, range(100), seed=0)
    assert keys[37:61] == draw_keys(10, range(37, 61), seed=0)
    assert len({seed for _, seed in keys}) == 100
    assert keys != draw_keys(10, range(100), seed=1) and keys != draw_keys(10, range(100), seed=0, purpose="validation")


SPLITS = [(processes, micro, 8 // processes // micro) for processes in (1, 2, 4) for micro in (1, 2, 4, 8)]


@pytest.mark.parametrize(("processes", "micro_steps", "batch_size"), [split for split in SPLITS if split[2]])
def test_a_step_is_the_same_however_it_is_split(processes, micro_steps, batch_size):
    """Over 1, 2 and 4 processes, and however many micro-steps: the same samples in the same order, noise and all."""
    whole = list(step_batches(10, range(3, 6), micro_steps=1, batch_size=8, seed=0))
    options = {"micro_steps": micro_steps, "batch_size": batch_size, "seed": 0, "processes": processes}
    shares = [list(step_batches(10, range(3, 6), process=process, **options)) for process in range(processes)]
    for step in range(3):
        batches = [share[step * micro_steps + micro] for micro in range(micro_steps) for share in shares]
        assert [key for batch in batches for key in batch] == whole[step]
    resumed = list(step_batches(10, range(5, 6), **options))
    assert resumed == shares[0][2 * micro_steps :]


def test_workers_load_the_same_batches(data):
    keys = list(step_batches(14, range(2), 1, 4, seed=0))
    for alone, parallel in zip(load_batches(data[0], keys), load_batches(data[0], keys, num_workers=1), strict=True):
        assert all(torch.equal(alone[name], parallel[name]) for name in ("pixel_values", "seeds", "class_labels"))


def test_fixed_batches_are_shared_out_among_processes(data):
    def seeds(*share):
        return torch.cat([batch["seeds"] for batch in fixed_batches(data[1], 15, 4, 0, "validation", *share)]).tolist()

    assert len(set(seeds())) == 15
    assert sorted(seeds(0, 2) + seeds(1, 2)) == sorted(seeds())


@pytest.fixture
def table():
    pictures = [Image.new("L", (9, 9), 20 * value) for value in range(5)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(2), "caption": datasets.Value("string")}
    )
    columns = {"image": pictures, "label": [0, 1, 0, 1, 1], "caption": list("abcde")}
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize("splits", [False, True])
def test_a_saved_data_set_is_loaded(table, tmp_path, splits):
    (datasets.DatasetDict(train=table) if splits else table).save_to_disk(str(tmp_path / "set"))
    images = dataset_images(load_dataset_split(str(tmp_path / "set")), label_column="label")
    check_images(images)
    assert images.labels == [0, 1, 0, 1, 1]
    assert images.load(3).getpixel((0, 0)) == 60


def test_what_a_data_set_lacks_is_named(table, tmp_path):
    with pytest.raises(ValueError, match="no column 'picture'; its columns: image, label, caption"):
        dataset_images(table, "picture")
    with pytest.raises(ValueError, match="'caption' holds 'a'; class labels must be whole numbers"):
        dataset_images(table, label_column="caption")
    datasets.DatasetDict(test=table).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(ValueError, match="no split 'train'; its splits: test"):
        load_dataset_split(str(tmp_path / "set"))

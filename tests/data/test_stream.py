import itertools
import logging

import pytest
import torch
from training.tiny_shards import save_shards

from ofadiff.data.captioned_stream import TextToImageStream, load_stream
from ofadiff.data.hub_datasets import load_dataset_split, numbered_files
from ofadiff.data.stream import START

COUNT = 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shards"
    save_shards(folder)
    return folder


@pytest.fixture
def open_stream(shards, tmp_path):
    def open_stream(folder=shards, image="png", caption="txt", seed=0, held_out=0, buffer=4, **options):
        dataset = load_dataset_split(str(folder), cache_dir=str(tmp_path), streaming=True)
        return TextToImageStream(dataset, image, caption, seed, held_out, buffer, 16, **options)

    return open_stream


def keys(example):
    return example["__key__"]


def read(stream, count, place=START):
    return [keys(example) for example, _ in itertools.islice(stream.stream.read(place), count)]


def load(data, steps, place=START, micro_steps=1, batch_size=4, process=0, processes=1, num_workers=0):
    batches = data.batches(place, steps, micro_steps, batch_size, process, processes)
    return list(load_stream(data, batches, num_workers))


def test_every_epoch_shows_every_image_once_in_an_order_of_the_seed(open_stream):
    first = read(open_stream(buffer=COUNT), 2 * COUNT)
    assert sorted(first[:COUNT]) == sorted(first[COUNT:]) == [f"{index:03}" for index in range(COUNT)]
    assert first[:COUNT] != first[COUNT:]
    assert first == read(open_stream(buffer=COUNT), 2 * COUNT)
    assert first != read(open_stream(buffer=COUNT, seed=1), 2 * COUNT)
    # Shards come in another order than on disk, and what is near in a shard is not near in the stream.
    unshuffled = read(open_stream(buffer=1), COUNT)
    assert unshuffled != sorted(unshuffled) and unshuffled != read(open_stream(buffer=4), COUNT)


def test_any_block_of_the_stream_can_be_read_on_from(open_stream):
    data = open_stream(buffer=5, held_out=2)
    whole = list(itertools.islice(data.stream.read(), 40))
    for position in (7, 20, 39):
        place = whole[position][1]
        rest = read(data, 40 - place[0] * 5, place)
        assert rest == [keys(example) for example, _ in whole[place[0] * 5 :]] and place[0] == position // 5


def test_the_first_samples_are_held_out_across_shards(open_stream):
    data = open_stream(held_out=6, center_crop=False)  # the first shard, and one of the second
    validation = data.held_out()
    assert list(validation.captions) == [(f"noise {index}",) for index in range(6)]
    assert validation.center_crop
    assert set(read(data, 30)) == {f"{index:03}" for index in range(6, COUNT)}
    assert sorted(data.first(100).captions) == sorted((f"noise {index}",) for index in range(6, COUNT))
    assert open_stream().held_out() is None
    with pytest.raises(ValueError, match="no sample is left to train on: 12 are held out"):
        open_stream(held_out=COUNT)


def test_a_step_is_the_same_however_it_is_split_and_resumed(open_stream):
    def samples(*batches):
        return [pair for batch in batches for pair in zip(batch["captions"], batch["seeds"].tolist(), strict=True)]

    whole = load(open_stream(), range(5), micro_steps=1, batch_size=8)
    for processes, batch_size in ((4, 1), (2, 2)):
        ranks = [load(open_stream(), range(5), START, 2, batch_size, each, processes) for each in range(processes)]
        for step in range(5):
            parts = [rank[2 * step + micro_step] for micro_step in range(2) for rank in ranks]
            assert samples(*parts) == samples(whole[step])
    place = tuple(ranks[0][5]["place"][0].tolist())  # of the last batch of step 2
    resumed = load(open_stream(), range(3, 5), place, batch_size=8)
    for batch, expected in zip(resumed, whole[3:], strict=True):
        assert batch["captions"] == expected["captions"]
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])


def test_workers_load_the_same_batches(open_stream):
    alone, parallel = (load(open_stream(random_flip=True), range(4), num_workers=count) for count in (0, 2))
    for one, two in zip(alone, parallel, strict=True):
        assert one["captions"] == two["captions"] and torch.equal(one["pixel_values"], two["pixel_values"])


def test_what_cannot_be_read_is_named_and_replaced(open_stream, tmp_path, caplog):
    save_shards(tmp_path / "broken", broken=(2, 7))
    data = open_stream(tmp_path / "broken", held_out=4)
    assert data.held_out().captions == [("noise 0",), ("noise 1",), ("noise 3",)]
    with caplog.at_level(logging.WARNING):
        batches = load(data, range(4))
    captions = {caption for batch in batches for caption in batch["captions"]}
    assert captions == {f"noise {index}" for index in (4, 5, 6, 8, 9, 10, 11)}
    assert f"007 in {tmp_path / 'broken' / '001.tar'} cannot be read" in caplog.text
    save_shards(tmp_path / "all", broken=range(COUNT))
    with pytest.raises(ValueError, match="none of the stream's first 12 samples has a readable image 'png' and"):
        open_stream(tmp_path / "all")


@pytest.mark.parametrize("first", [0, 5, 8])  # of each shard: one of them is the stream's first
def test_the_first_sample_may_be_the_broken_one(open_stream, tmp_path, first):
    save_shards(tmp_path / "broken", broken=(first,))
    captions = open_stream(tmp_path / "broken").first(COUNT).captions
    assert len(captions) == COUNT - 1 and (f"noise {first}",) not in captions


def test_columns_are_those_of_the_files(open_stream, shards):
    assert open_stream(caption="json.also").first(1).captions[0][0].startswith("noise")
    with pytest.raises(ValueError, match="no column 'jpg' of images; its columns: png, txt, json, __key__, __url__"):
        open_stream(image="jpg")
    with pytest.raises(ValueError, match="no column 'txt' of images"):
        open_stream(image="txt")
    with pytest.raises(ValueError, match="no column 'text' of captions; its columns: png"):
        open_stream(caption="text")
    with pytest.raises(ValueError, match=r"none .* a caption 'json.text'"):
        open_stream(caption="json.text")
    with pytest.raises(ValueError, match="share of empty captions is 2"):
        open_stream(empty_captions=2)


def test_shards_are_named_by_number(shards, tmp_path):
    assert numbered_files("a{008..010}.tar") == ["a008.tar", "a009.tar", "a010.tar"]
    assert numbered_files("a*.tar") == ["a*.tar"]
    options = {"cache_dir": str(tmp_path), "streaming": True}
    dataset = load_dataset_split("webdataset", data_files=[f"{shards}/{{000..001}}.tar"], **options)
    assert dataset.num_shards == 2
    with pytest.raises(ValueError, match=r"cannot load the data set 'webdataset'.*003\.tar"):
        load_dataset_split("webdataset", data_files=[f"{shards}/{{000..003}}.tar"], **options)
    (tmp_path / "no.tar").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="cannot load the data set 'webdataset'"):
        load_dataset_split("webdataset", data_files=[str(tmp_path / "no.tar")], **options)

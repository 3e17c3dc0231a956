"""Broken samples and shards are named and counted, and the stream goes on, in the same order however it is read."""

import io
import itertools
import json
import logging
import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from ofadiff.data.captioned_stream import TextToImageStream, load_stream
from ofadiff.data.hub_datasets import load_dataset_split
from ofadiff.data.shards import TarShards

PER_SHARD = 10


def write_shard(path, first, change=lambda index, files: files, cut=None, kind=""):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w{kind}") as tar:
        for index in range(first, first + PER_SHARD):
            png = io.BytesIO()
            Image.fromarray(np.full((16, 16, 3), index * 3, np.uint8)).save(png, "PNG")
            files = {"png": png.getvalue(), "txt": f"number {index}".encode(), "json": b"{}"}
            for ending, data in change(index, files).items():
                info = tarfile.TarInfo(f"./some.folder/{index:04}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    path.write_bytes(buffer.getvalue()[:cut])


def no_image(index, files):
    return {name: data for name, data in files.items() if index % PER_SHARD != 7 or name != "png"}


def no_utf_8(index, files):
    return {**files, "txt": b"\xff\xfe caf\xe9"} if index % PER_SHARD == 7 else files


def broken_json(index, files):
    return {**files, "json": b"{"} if index % PER_SHARD == 7 else files


def no_caption(index, files):
    return {name: data for name, data in files.items() if index % PER_SHARD != 7 or name != "txt"}


# What is wrong with the second of three shards, how many of its samples are left, and what the warning says.
FAULTS = {
    "no_image": ({"change": no_image}, 9, "0017 in .*it has no image 'png'"),
    "no_caption": ({"change": no_caption}, 9, "0017 in .*None; a caption is a string"),
    "no_utf_8": ({"change": no_utf_8}, 9, "0017 in .*its 'txt' cannot be decoded"),
    "broken_json": ({"change": broken_json}, 10, None),  # nobody asked for it
    "truncated": ({"cut": 9000}, 2, "001.tar cannot be read to its end: unexpected end of data"),
    "cut_between_samples": ({"cut": 9216}, 3, "001.tar cannot be read to its end: unexpected end of data"),
    "cut_in_a_header": ({"cut": 9300}, 3, "001.tar cannot be read to its end: unexpected end of data"),
    "page": ("<html>404</html>", 0, "001.tar cannot be read to its end"),
    "empty": ("", 0, "001.tar cannot be read to its end"),
    "gone": (None, 0, "001.tar cannot be read to its end: .*No such file"),
}


def make(folder, fault, place=1):
    folder.mkdir()
    for number in range(3):
        write_shard(folder / f"{number:03}.tar", number * PER_SHARD)
    shard = folder / f"{place:03}.tar"
    what = FAULTS[fault][0]
    shards = TarShards([str(path) for path in sorted(folder.glob("*.tar"))])
    if isinstance(what, dict):
        write_shard(shard, place * PER_SHARD, **what)
    elif what is None:
        shard.unlink()
    else:
        shard.write_text(what)
    return shards


def stream(shards, caption="txt", **options):
    return TextToImageStream(shards, "png", caption, 0, 0, 4, 16, **options)


def load(data, steps, place=(0, 0, 0, 0), batch_size=5, **options):
    return list(load_stream(data, data.batches(place, steps, 1, batch_size, 0, 1), **options))


def captions(batches):
    return [caption for batch in batches for caption in batch["captions"]]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", [0, 1])
def test_training_goes_on(tmp_path, caplog, fault, place):
    _, left, warning = FAULTS[fault]
    data = stream(make(tmp_path / "shards", fault, place))
    with caplog.at_level(logging.WARNING):
        batches = load(data, range(12))
    good = {f"number {index}" for index in range(30)}
    lost = {f"number {index}" for index in range(place * PER_SHARD, (place + 1) * PER_SHARD)}
    seen = set(captions(batches))
    assert good - lost <= seen and len(seen & lost) == left
    replaced = sum(int(batch["unreadable"].sum()) for batch in batches)
    if warning is None:
        assert replaced == 0 and not caplog.records
    else:
        assert replaced >= 1
        pattern = warning.replace("0017", f"{place}7".rjust(4, "0")).replace("001.tar", f"00{place}.tar")
        assert any(re.search(pattern, record.getMessage()) for record in caplog.records)


@pytest.mark.parametrize("fault", ["no_utf_8", "truncated", "page"])
def test_a_resumed_stream_is_the_same_stream(tmp_path, fault):
    data = stream(make(tmp_path / "shards", fault), random_flip=True)
    whole = load(data, range(12))
    for step in (3, 7, 10):
        place = tuple(whole[step - 1]["place"][-1].tolist())
        rest = load(data, range(step, 12), place)
        for batch, expected in zip(rest, whole[step:], strict=True):
            assert batch["captions"] == expected["captions"]
            assert torch.equal(batch["pixel_values"], expected["pixel_values"])
            assert torch.equal(batch["unreadable"], expected["unreadable"])
    parallel = load(data, range(12), num_workers=2)
    assert captions(parallel) == captions(whole)


def test_warnings_come_to_an_end(tmp_path, caplog):
    data = stream(make(tmp_path / "shards", "no_utf_8"))
    with caplog.at_level(logging.WARNING):
        load(data, range(200))
    assert len(caplog.records) == 10 and "are counted and no longer named" in caplog.records[-1].getMessage()


def test_too_large_a_share_stops(tmp_path):
    data = stream(make(tmp_path / "shards", "no_utf_8"), max_unreadable=0.05)
    data.check_unreadable(50, 99)
    data.check_unreadable(5, 100)
    with pytest.raises(RuntimeError, match="6 of 100 samples of the stream cannot be read, which is more than 5%"):
        data.check_unreadable(6, 100)
    with pytest.raises(ValueError, match="largest share of unreadable samples is 2"):
        stream(make(tmp_path / "others", "no_utf_8"), max_unreadable=2)


def test_nothing_that_can_be_read_is_an_error_at_once(tmp_path):
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_text("<html>")
    with pytest.raises(
        ValueError, match=r"cannot load the data set .*no shard holds a sample: .*a\.tar cannot be read"
    ):
        load_dataset_split(str(tmp_path), streaming=True)


def test_columns_compressed_shards_and_json(tmp_path):
    write_shard(
        tmp_path / "0.tar.gz", 0, lambda i, f: {**f, "json": json.dumps({"a": [f"n {i}"]}).encode()}, kind=":gz"
    )
    shards = TarShards([str(tmp_path / "0.tar.gz")])
    assert shards.features == {"png": True, "txt": False, "json": False, "__key__": False, "__url__": False}
    data = stream(shards, caption="json.a")
    assert {text for (text,) in data.first(20).captions} == {f"n {index}" for index in range(10)}
    assert next(iter(shards.shard(1, 0)))["__key__"] == "./some.folder/0000".removeprefix("./")


class Breaking:
    """A streaming data set of another format, one of whose shards breaks off."""

    num_shards = 2
    features = {"png": True, "txt": False}  # noqa: RUF012

    def shard(self, num_shards, index):
        for number in range(3):
            if index == 1 and number == 2:
                raise RuntimeError("the page header is broken")
            yield {"png": np.full((16, 16, 3), number, np.uint8), "txt": f"{index}-{number}"}

    def cast_column(self, *column):
        return self


def test_shards_of_other_formats_may_break_off_too(caplog):
    data = stream(Breaking())
    with caplog.at_level(logging.WARNING):
        seen = set(captions(load(data, range(6))))
    assert seen == {"0-0", "0-1", "0-2", "1-0", "1-1"}
    assert "shard 1 cannot be read to its end: the page header is broken" in caplog.text
    assert len(list(itertools.islice(data.stream.read(), 12))) == 12

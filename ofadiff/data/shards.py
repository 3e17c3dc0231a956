"""Webdataset shards: `.tar` files in which the members of one name are one sample.

`datasets` reads them too, but a broken member ends its whole stream. Here a sample or a shard that is broken is one
example more, which says what is wrong: it takes its place in the order, and whoever decodes it finds out.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import fsspec
from PIL import Image

from ofadiff.reading.json_file import parse_json

Example = dict[str, Any]

KEY, URL, ERROR = "__key__", "__url__", "__error__"

# How a member's name falls into the sample's and the column's.
MEMBER = re.compile(r"((?:.*/)?[^/.][^/.]*)\.([^/]+)")

# Bytes of a member that are read; one that claims more is no image or caption, and what is compressed may claim any.
MOST_BYTES = 2**28

# Examples that are looked at to learn what columns there are.
LOOKED_AT = 5


def _text(content: bytes) -> str:
    return content.decode("utf-8-sig")


# What columns hold, by what they are called; all others stay bytes.
DECODERS: dict[str, Callable[[bytes], Any]] = {
    "txt": _text,
    "text": _text,
    "caption": _text,
    "cls": lambda content: int(_text(content)),
    "json": lambda content: parse_json(_text(content), "it"),
}


class TarShards:
    """A streaming data set of shards, with what a `Stream` asks of a `datasets.IterableDataset`.

    Args:
        urls: The shards: paths, or addresses that fsspec opens.

    Attributes:
        features: Columns of the first samples that can be read, each with whether it holds images.

    Raises:
        ValueError: If none of the shards holds a sample; says what is wrong with the first.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = list(urls)
        self.features: dict[str, bool] = {}
        errors = []
        for index in range(len(self.urls)):
            for _, example in zip(range(LOOKED_AT), self.shard(len(self.urls), index), strict=False):
                if ERROR in example:
                    errors.append(f"{example[URL]} cannot be read: {example[ERROR]}")
                self.features |= {name: _is_image(name) for name in example if name not in (KEY, URL, ERROR)}
            if self.features:
                break
        if not self.features:
            raise ValueError(f"no shard holds a sample: {errors[0] if errors else 'all are empty'}")
        self.features |= {KEY: False, URL: False}

    @property
    def num_shards(self) -> int:
        """How many shards there are."""
        return len(self.urls)

    def shard(self, num_shards: int, index: int) -> Iterator[Example]:
        """The examples of one shard, bytes by column; the last one says so if it cannot be read to its end."""
        url = self.urls[index]
        try:
            with fsspec.open(url, "rb", compression="infer") as file:
                read = _Reading(file)
                with tarfile.open(fileobj=read, mode="r|") as tar:  # type: ignore[call-overload]
                    yield from _examples(tar, url)
                if read.tail.strip(b"\0"):
                    raise tarfile.ReadError("unexpected end of data: its end mark is missing")
        except Exception as error:  # file systems raise whatever they like
            yield {URL: url, ERROR: " ".join(str(error).split()) or type(error).__name__}


class _Reading:
    """A file that knows what it was read to. `tarfile` takes one that is cut between two members for a whole one."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.tail = b""

    def read(self, size: int = -1) -> bytes:
        """The next bytes; their last block stays in `tail`."""
        content = self.file.read(size)
        self.tail = (self.tail + content[-tarfile.BLOCKSIZE :])[-tarfile.BLOCKSIZE :]
        return content


def decode_column(example: Example, column: str) -> Any:
    """What an example has in a column; None if it has nothing there.

    Raises:
        ValueError: If the example or the column is broken.
    """
    if ERROR in example:
        raise ValueError(example[ERROR])
    content = example.get(column)
    ending = column.rpartition(".")[2]
    if not isinstance(content, bytes) or ending not in DECODERS:
        return content
    try:
        return DECODERS[ending](content)
    except ValueError as error:
        raise ValueError(f"its {column!r} cannot be decoded: {error}") from error


def _examples(tar: tarfile.TarFile, url: str) -> Iterator[Example]:
    example: Example = {}
    for member in tar:
        found = MEMBER.fullmatch(member.name.removeprefix("./")) if member.isfile() else None
        if found is None:
            continue
        key, column = found.groups()
        if example and example[KEY] != key:
            yield example
            example = {}
        example |= {KEY: key, URL: url}
        if member.size > MOST_BYTES:
            example[ERROR] = f"{member.name} has {member.size:,} bytes; at most {MOST_BYTES:,} are read"
            continue
        content = tar.extractfile(member)
        assert content is not None  # of a file
        read = content.read()
        if len(read) < member.size:
            raise tarfile.ReadError(f"unexpected end of data in {member.name}")
        example[column.lower()] = read
    if example:
        yield example


def _is_image(column: str) -> bool:
    extensions = Image.registered_extensions()
    return extensions.get(f".{column.rpartition('.')[2]}") in Image.OPEN

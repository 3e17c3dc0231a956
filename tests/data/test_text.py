"""Prompt files as people have them."""

import json

import pytest

from ofadiff.data.prompts import read_prompts

CASES = {
    "bom.txt": ("cat\ndog\n".encode("utf-8-sig"), ["cat", "dog"]),
    "utf16.txt": ("cat\ndög\n".encode("utf-16"), ["cat", "dög"]),
    "windows.txt": (b"cat\r\n\r\ndog\r\n", ["cat", "dog"]),
    "separators.txt": (
        "cat\u2028mat\ndog\x0cbog\na\x85b\x1cc\n".encode(),
        ["cat\u2028mat", "dog\x0cbog", "a\x85b\x1cc"],
    ),
    "separators.jsonl": (b'{"text": "cat\xe2\x80\xa8mat"}\n{"text": "dog"}\n', ["cat\u2028mat", "dog"]),
    "bom.jsonl": ('{"prompt": "cat"}\n'.encode("utf-8-sig"), ["cat"]),
    "list.json": (json.dumps(["cat", {"text": "dog"}, {"prompt": ["a", "b"]}]).encode(), ["cat", "dog", "a"]),
    "metadata.csv": (b'file_name,text\n1.png,a cat\n2.png,"a dog, wet\nand cold"\n', ["a cat", "a dog, wet\nand cold"]),
    "excel.csv": ("prompt;x,text\na,b\n".encode("utf-8-sig"), ["b"]),
    "table.tsv": (b"file\tprompt\n1\ta, b\n", ["a, b"]),
    "no_ending": (b"one, two\n", ["one, two"]),
}


@pytest.mark.parametrize("name", CASES)
def test_prompts(tmp_path, name):
    content, expected = CASES[name]
    (tmp_path / name).write_bytes(content)
    assert read_prompts(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("latin1.txt", b"one\ncaf\xe9\n", r"latin1.txt is not UTF-8: byte 7, in line 2, is b'\\xe9'"),
        ("latin1.csv", b"text\ncaf\xe9\n", "latin1.csv is not UTF-8: byte 8, in line 2"),
        ("picture.png", b"\x89PNG\r\n\x1a\n\0\0\0", "picture.png is no text file"),
        ("names.csv", b"file_name,label\n1.png,2\n", "no column text or prompt; its first line names file_name, label"),
        ("plain.csv", b"a cat\na dog\n", "no column text or prompt; its first line names a cat"),
        ("empty.csv", b"", "no column text or prompt; its first line names none"),
        ("dict.json", b'{"a": 1}', "holds a dict; it must be a list of prompts"),
        ("broken.json", b"[", "is not JSON"),
        ("number.json", b"[1]", 'entry 1 has no string under "text"'),
    ],
)
def test_what_is_no_prompt_file_is_said(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_prompts(tmp_path / name)

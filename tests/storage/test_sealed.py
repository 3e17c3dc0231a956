"""Folders that tell whether they are whole, and that a kill leaves whole at every moment."""

import os
import shutil

import pytest

from ofadiff.storage.sealed import find_fault, orphan_of, remove, sealed_aside


def write(folder, text):
    with sealed_aside(folder) as unfinished:
        (unfinished / "deep").mkdir()
        (unfinished / "deep" / "words").write_text(text)
        (unfinished / "empty").write_text("")


def text_of(folder):
    """What a folder holds; it has to be whole."""
    assert find_fault(folder) is None
    return (folder / "deep" / "words").read_text()


class KilledError(BaseException):
    """A kill: nothing is cleaned up, as the test holds what would be."""


@pytest.fixture
def kill_at(monkeypatch):
    """Kills before a name in a folder is touched for the n-th time; says afterwards how often one was."""

    def kill_at(moment):
        calls = []

        def guard(function):
            def call(*arguments, **options):
                calls.append(arguments[0])
                if len(calls) > moment:  # and nothing that would clean up works either
                    raise KilledError
                return function(*arguments, **options)

            return call

        for module, name in ((os, "replace"), (shutil, "rmtree")):
            monkeypatch.setattr(module, name, guard(getattr(module, name)))
        return calls

    return kill_at


# Removing leftovers, two renames, removing the old one and its leftovers.
MOMENTS = range(6)


@pytest.mark.parametrize("moment", MOMENTS)
def test_at_every_moment_the_old_folder_or_the_new_one_is_whole(tmp_path, kill_at, monkeypatch, moment):
    folder = tmp_path / "folder"
    write(folder, "old")
    calls = kill_at(moment)
    try:
        write(folder, "new")
        assert moment == MOMENTS[-1] and len(calls) == len(MOMENTS) - 1
    except KilledError:
        assert len(calls) > moment
    monkeypatch.undo()
    found = folder if folder.exists() else orphan_of(folder)
    assert text_of(found) in ("old", "new")
    write(folder, "third")
    assert text_of(folder) == "third"


def test_an_error_removes_what_was_begun(tmp_path):
    write(tmp_path / "folder", "old")
    with pytest.raises(OSError, match="full"), sealed_aside(tmp_path / "folder") as unfinished:
        (unfinished / "half").write_text("x")
        raise OSError("the disk is full")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] and text_of(tmp_path / "folder") == "old"


def test_a_kill_while_a_folder_is_removed_leaves_nothing_under_its_name(tmp_path, kill_at, monkeypatch):
    folder = tmp_path / "folder"
    write(folder, "old")
    kill_at(2)  # leftovers, rename, and then
    with pytest.raises(KilledError):
        remove(folder)
    monkeypatch.undo()
    assert not folder.exists()
    write(folder, "new")
    remove(folder)
    assert not list(tmp_path.iterdir())

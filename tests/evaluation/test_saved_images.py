import json
import shutil
from pathlib import Path

import pytest
import torch
from evaluation.random_images import random_images
from PIL import Image

from ofadiff.evaluation.saved_images import SavedImages

PROTOCOL = {"denoising steps": 50, "guidance scale": 7.5}


@pytest.fixture
def saved(tmp_path):
    saved = SavedImages(tmp_path / "size" / "0.5")
    saved.check(PROTOCOL)
    saved.begin(PROTOCOL)
    return saved


def test_images_come_back_as_they_were(saved):
    image = random_images(1)[0]
    assert 3 not in saved
    saved[3] = image
    assert 3 in saved and torch.equal(saved[3], image)
    assert {path.name for path in saved.folder.iterdir()} == {"000003.png", "protocol.json"}


def test_an_image_that_was_cut_short_does_not_count(saved, monkeypatch):
    path = saved.folder / "000003.png"
    saved[3] = random_images(1)[0]
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert 3 not in saved

    def die(self, file, *_):
        file.write_bytes(whole[:20])
        raise KeyboardInterrupt

    path.unlink()
    monkeypatch.setattr(Image.Image, "save", die)
    with pytest.raises(KeyboardInterrupt):
        saved[3] = random_images(1)[0]
    assert 3 not in saved and not path.exists()


def test_images_of_another_protocol_are_refused_by_name(saved):
    saved[0] = random_images(1)[0]
    saved.check(PROTOCOL)
    with pytest.raises(ValueError, match=r"0\.5 were made with guidance scale 7\.5, not 3; choose another folder"):
        saved.check(PROTOCOL | {"guidance scale": 3})
    with pytest.raises(ValueError, match="were made with prompt None, not 4"):
        saved.check(PROTOCOL | {"prompt": 4})
    saved.check({}, overwrite=True)
    saved.remove()
    assert not saved.folder.exists()


def killed(monkeypatch, call, owner, name, after=0):
    """Calls something that is killed when a function of a class or module has been called so many times."""
    happen, calls = getattr(owner, name), []

    def die(*args, **kwargs):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(args)
        return happen(*args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(owner, name, die)
        call()


def test_an_evaluation_that_was_killed_while_it_began_can_begin_again(tmp_path, monkeypatch):
    for step in ("write_bytes", "replace"):
        saved = SavedImages(tmp_path / step)
        killed(monkeypatch, lambda saved=saved: saved.begin(PROTOCOL), Path, step)
        assert saved.folder.is_dir() and not (saved.folder / "protocol.json").exists()
        saved.check(PROTOCOL)
        saved.begin(PROTOCOL)
        assert [path.name for path in saved.folder.iterdir()] == ["protocol.json"]


def test_images_that_were_half_removed_are_still_those_of_an_evaluation(saved, monkeypatch):
    for index in range(3):
        saved[index] = random_images(1)[0]
    killed(monkeypatch, saved.remove, Path, "unlink", after=2)
    assert sum(index in saved for index in range(3)) == 1
    saved.check({}, overwrite=True)
    killed(monkeypatch, saved.remove, shutil, "rmtree")
    saved.check(PROTOCOL)
    saved.remove()
    assert not saved.folder.exists()


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "000000.png").write_bytes(b"mine")
    saved = SavedImages(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds no images of an evaluation"):
            saved.check(PROTOCOL, overwrite)
    saved.remove()
    assert (tmp_path / "000000.png").read_bytes() == b"mine"


def test_the_protocol_can_be_read(saved):
    assert json.loads((saved.folder / "protocol.json").read_text()) == PROTOCOL

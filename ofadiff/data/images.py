"""Images to train on, and which of them make up a step.

A sample is asked for by a key `(index, seed)`: the image, and the seed of everything random about this use of it (its
flip, noise and timestep). The keys of a step are a pure function of the run's seed and the step, so a resumed run goes
on exactly where it stopped, and a step is the same however it is split over processes and micro-steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ofadiff.data.decoding import decode_image, open_image
from ofadiff.reading.files import check_file

NAMED = 10


@dataclass(frozen=True)
class Images:
    """Where images come from.

    Attributes:
        names: What to call each image in a message.
        load: Image of an index.
        labels: Class of each image, or None where there are none.
        classes: What each class is called, by its label; None where they have no names.
    """

    names: Sequence[str]
    load: Callable[[int], Image.Image]
    labels: Sequence[int] | None = None
    classes: Mapping[int, str] | None = None

    def decoded(self, index: int, mode: str) -> Image.Image:
        """The image of an index as `decode_image` gives it, in a mode.

        Raises:
            ValueError: If it cannot be read; names it and says why.
        """
        try:
            with self.load(index) as image:
                return decode_image(image, mode)
        except Exception as error:  # decoders raise whatever they like
            raise ValueError(f"{self.names[index]} cannot be read: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def image_folder(folder: str | Path) -> Images:
    """The images below a folder, in alphabetical order; what is hidden is left out, links are followed.

    Where all of them lie in subfolders, each subfolder is a class. If their names are whole numbers, these are the
    labels, as a pretrained model counts its classes; otherwise they are numbered alphabetically from 0.

    Raises:
        ValueError: If there is no such folder, no image in it, or two subfolders of the same number.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    paths = find_images(folder)
    if not paths:
        raise ValueError(f"{folder} holds no images, such as .png or .jpg files")
    names = [path.relative_to(folder).parts[0] for path in paths if path.parent != folder]
    labels = classes = None
    if len(names) == len(paths):
        classes = _number_classes(sorted(set(names)), folder)
        number = {name: label for label, name in classes.items()}
        labels = [number[name] for name in names]
    return Images([str(path) for path in paths], functools.partial(_open, paths), labels, classes)


def find_images(folder: Path) -> list[Path]:
    """The image files below a folder, in alphabetical order: none that is hidden, those behind links too."""
    extensions = {extension for extension, name in Image.registered_extensions().items() if name in Image.OPEN}
    return [path for path in find_files(folder) if path.suffix.lower() in extensions]


def find_files(folder: Path, above: frozenset[Path] = frozenset()) -> list[Path]:
    """The files below a folder, in alphabetical order: none that is hidden, those behind links too.

    Args:
        folder: Where to look.
        above: The real folders that lead there; a link back to one of them is not followed.

    Raises:
        ValueError: If one is no file but a pipe or the like, which whoever reads it would wait for.
    """
    real = folder.resolve()
    if real in above:
        return []
    found: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith((".", "__")):
            continue
        if entry.is_dir():
            found += find_files(entry, above | {real})
        else:
            check_file(entry)
            found.append(entry)
    return found


def _number_classes(names: Sequence[str], folder: Path) -> dict[int, str]:
    """What folders of classes are called, by label."""
    if not all(name.isdecimal() for name in names):
        return dict(enumerate(names))
    classes: dict[int, str] = {}
    for name in names:
        if classes.setdefault(int(name), name) != name:
            raise ValueError(f"{folder} has {classes[int(name)]} and {name}, which are the same class number")
    return dict(sorted(classes.items()))


def _open(paths: Sequence[Path], index: int) -> Image.Image:
    return open_image(paths[index])


class _Unreadable(Dataset[str]):
    """Why each image cannot be decoded to its last byte; nothing where it can."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, index: int) -> str:
        try:
            with self.images.load(index) as image:
                decode_image(image)
        except Exception as error:  # decoders raise whatever they like
            return reason_of(error)
        return ""


def check_images(
    images: Images,
    num_workers: int = 0,
    progress: bool = False,
    process: int = 0,
    processes: int = 1,
    gather: Callable[[list], list] = list,
) -> None:
    """Decodes every image once, so that a broken one is found before training and not hours later.

    Args:
        images: What to check.
        num_workers: Processes that decode them.
        progress: Whether to show a bar.
        process: Number of this process; of several, each takes its share.
        processes: How many there are.
        gather: Joins the lists of all processes, so that all of them raise; accelerate's `gather_object`.

    Raises:
        ValueError: If some cannot be read: says how many, names the first of them, and why.
    """
    share = range(process, len(images.names), processes)
    loader = DataLoader(_Unreadable(images), batch_size=None, sampler=share, num_workers=num_workers)
    reasons = zip(share, tqdm(loader, "Checking images", disable=not progress), strict=True)
    broken = gather([(images.names[index], reason) for index, reason in reasons if reason])
    if broken:
        names = ", ".join(name for name, _ in broken[:NAMED])
        more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        count = f"{len(broken)} of {len(images.names)}"
        raise ValueError(f"{broken[0][1]} ({broken[0][0]}): {count} images cannot be read: {names}{more}")

"""Images as sequences of gray pixels, each with its class as the one token that follows.

A row is the pixels of an image, line by line, and then its class: every model that predicts tokens classifies by predicting the last one.
Ids: 0 to levels - 1 are gray levels from black to white, then one id for each class.

Shape letters: N images, T pixels of an image.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator
from typing import Literal

import numpy as np

from infinicontext.errors import UserError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Classification of images; goes with objective.loss "answers".

    Attributes:
      source: "digits", the 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn, or a folder with a sub-folder of images
        for each class.
      size: images are scaled to size x size pixels.
      levels: gray levels that are told apart.
      validation_fraction: share of images kept for validation, decided by the hash of their pixels.
    """

    source: str = "digits"
    size: int = 8
    levels: int = 17
    validation_fraction: float = 0.2

    def __post_init__(self):
        if self.size < 1:
            raise UserError(f"data.size is {self.size}; it must be 1 or more")
        if not 2 <= self.levels <= 256:
            raise UserError(f"data.levels is {self.levels}; it must be from 2 to 256")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"data.validation_fraction is {self.validation_fraction}; it must be above 0 and below 1")

    @property
    def length(self) -> int:
        """T."""
        return self.size * self.size


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """The images of a split, as a sequence of rows like those of the other kinds of data.

    Attributes:
      pixels: uint8 [N, T], gray levels.
      labels: int32 [N].
      classes: their names.
      levels: gray levels, the id of the first class.
    """

    pixels: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    levels: int

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """tokens and segment_ids int32 [T + 1], loss_mask and answer_mask float32 [T]."""
        tokens = np.append(self.pixels[row].astype(np.int32), np.int32(self.levels + self.labels[row]))
        answer_mask = np.zeros(len(tokens) - 1, np.float32)
        answer_mask[-1] = 1
        return {
            "tokens": tokens,
            "segment_ids": np.ones_like(tokens),
            "loss_mask": np.ones_like(answer_mask),
            "answer_mask": answer_mask,
        }


def load_images(data: ImageData, split: Literal["train", "validation", "all"] = "all") -> Images:
    """Reads and scales the images of a split.

    Raises:
      UserError: scikit-learn is not installed, the folder or a file cannot be read, there are fewer than two classes, or no images.
    """
    pixels, labels = [], []
    for shares, label in _digits(data.size) if data.source == "digits" else _pictures(data):
        row = np.minimum(shares * data.levels, data.levels - 1).astype(np.uint8).reshape(-1)
        held_out = int(hashlib.sha256(row.tobytes()).hexdigest()[:8], 16) / 2**32 < data.validation_fraction
        if split == "all" or held_out == (split == "validation"):
            pixels.append(row)
            labels.append(label)
    if not labels:
        raise UserError(
            f'data.source "{data.source}" has no image in its {split} split; give more images or another data.validation_fraction'
        )
    return Images(np.stack(pixels), np.array(labels, np.int32), class_names(data), data.levels)


def class_names(data: ImageData) -> tuple[str, ...]:
    """The classes in the order of their ids, found without reading an image.

    Raises:
      UserError: the source is not usable, or has fewer than two classes.
    """
    if data.source == "digits":
        return tuple("0123456789")
    folder = pathlib.Path(data.source)
    if not folder.is_dir():
        raise UserError(f'data.source is "{folder}"; it must be "digits" or a folder with a sub-folder of images for each class')
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        raise UserError(f'data.source "{folder}" has {len(classes)} sub-folders; it needs two or more, one for each class')
    return tuple(classes)


def stored_images(data: ImageData) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of what the images are made from, without decoding them.

    Raises:
      UserError: as `load_images`, but for what only decoding finds.
    """
    if data.source == "digits":
        digits = _load_digits()
        yield "digits", digits.images.tobytes() + digits.target.tobytes()
        return
    for file, _ in _files(data):
        try:
            yield file.relative_to(data.source).as_posix(), file.read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from error


def _load_digits():
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError('data.source is "digits", which comes with scikit-learn; install it, or give a folder of images') from error
    return load_digits()


def _digits(size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Gray values from 0 to 1 [size, size], and the label, of each image."""
    digits = _load_digits()
    for image, label in zip(digits.images / 16, digits.target):
        yield image if size == len(image) else _scaled(image, size), label


def _pictures(data: ImageData) -> Iterator[tuple[np.ndarray, int]]:
    """Gray values from 0 to 1 [size, size], and the label, of each file."""
    from PIL import Image

    for file, label in _files(data):
        try:
            with Image.open(file) as image:
                yield _gray(image, data.size), label
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{file} cannot be read as an image: {error}") from error


def _files(data: ImageData) -> list[tuple[pathlib.Path, int]]:
    """The files of a folder with their labels."""
    found = []
    for label, name in enumerate(class_names(data)):
        files = sorted(path for path in (pathlib.Path(data.source) / name).rglob("*") if path.suffix.lower() in _SUFFIXES)
        if not files:
            raise UserError(f'data.source "{data.source}" has no image in its sub-folder {name} ({", ".join(_SUFFIXES)})')
        found += [(file, label) for file in files]
    return found


def _gray(image, size: int) -> np.ndarray:
    """A picture of Pillow -> gray values from 0 to 1, float32 [size, size]."""
    if image.mode == "F" or image.mode.startswith("I"):
        # 16 bits a pixel; converting to "L" would make white of all that is above 255.
        wide = np.asarray(image).astype(np.float32)
        if image.mode == "F" or wide.min() < 0 or wide.max() > 65535:
            raise ValueError("its pixels have neither 8 nor 16 bits, so what is white is not known")
        return _scaled(wide / 65535, size)
    return np.asarray(image.convert("L").resize((size, size)), np.float32) / 255


def _scaled(shares: np.ndarray, size: int) -> np.ndarray:
    """Gray values from 0 to 1, of any size -> float32 [size, size]."""
    from PIL import Image

    return np.asarray(Image.fromarray(shares.astype(np.float32)).resize((size, size))).clip(0, 1)

"""Images as sequences of gray pixels, each with its class as the one token that follows.

A row is the pixels of an image, line by line, and then its class: every model that predicts tokens classifies by predicting the last one.
Ids: 0 to levels - 1 are gray levels from black to white, then one id for each class.

Shape letters: N images, T pixels of an image.
"""

import dataclasses
import hashlib
import pathlib
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
    shares, labels, classes = _digits(data.size) if data.source == "digits" else _folder(pathlib.Path(data.source), data.size)
    pixels = np.minimum(shares * data.levels, data.levels - 1).astype(np.uint8).reshape(len(labels), -1)
    hashes = np.array([int(hashlib.sha256(image.tobytes()).hexdigest()[:8], 16) / 2**32 for image in pixels])
    held_out = hashes < data.validation_fraction
    chosen = {"train": ~held_out, "validation": held_out, "all": np.ones_like(held_out)}[split]
    if not chosen.any():
        raise UserError(
            f'data.source "{data.source}" has no image in its {split} split; give more images or another data.validation_fraction'
        )
    return Images(pixels[chosen], labels[chosen], classes, data.levels)


def _digits(size: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Gray values from 0 to 1 [N, size, size], labels, names."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError('data.source is "digits", which comes with scikit-learn; install it, or give a folder of images') from error
    digits = load_digits()
    images = digits.images / 16
    if size != images.shape[1]:
        from PIL import Image

        images = np.stack([np.asarray(Image.fromarray(image.astype(np.float32)).resize((size, size))) for image in images])
    return images.clip(0, 1), digits.target.astype(np.int32), tuple(map(str, digits.target_names))


def _folder(folder: pathlib.Path, size: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    from PIL import Image, UnidentifiedImageError

    if not folder.is_dir():
        raise UserError(f'data.source is "{folder}"; it must be "digits" or a folder with a sub-folder of images for each class')
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        raise UserError(f'data.source "{folder}" has {len(classes)} sub-folders; it needs two or more, one for each class')
    images, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in _SUFFIXES)
        if not files:
            raise UserError(f'data.source "{folder}" has no image in its sub-folder {name} ({", ".join(_SUFFIXES)})')
        for file in files:
            try:
                with Image.open(file) as image:
                    images.append(np.asarray(image.convert("L").resize((size, size)), np.float32) / 255)
            except (OSError, UnidentifiedImageError) as error:
                raise UserError(f"{file} cannot be read as an image: {error}") from error
            labels.append(label)
    return np.stack(images), np.array(labels, np.int32), tuple(classes)

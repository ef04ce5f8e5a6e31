"""Data sets that need no download."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

__all__ = ["Digits", "LabelledImages", "digits"]

_TEST_SHARE = 0.2
_SPLIT_SEED = 0
_LARGEST_PIXEL = 16.0


class LabelledImages(TensorDataset):
    """Images as rows of pixels, with classes that have names; a torch Dataset of (pixels, label) pairs.

    Attributes
    ----------
    pixels : float32 tensor, (samples, height * width)
        From 0 to 1.
    labels : int64 tensor, (samples,)
    classes : tuple of str
        The name of each label.
    image_shape : tuple of int
        (height, width).
    """

    def __init__(self, pixels: Tensor, labels: Tensor, classes: tuple[str, ...], image_shape: tuple[int, int]) -> None:
        super().__init__(pixels, labels)
        self.pixels = pixels
        self.labels = labels
        self.classes = classes
        self.image_shape = image_shape

    def image(self, row: int) -> Tensor:
        """One image; float32, (height, width)."""
        return self.pixels[row].view(self.image_shape)

    def __repr__(self) -> str:
        height, width = self.image_shape
        return f"<LabelledImages: {len(self)} images of {height}x{width} pixels, {len(self.classes)} classes>"


@dataclass(frozen=True)
class Digits:
    """The handwritten digits, split.

    Attributes
    ----------
    train, test : LabelledImages
        1,437 and 360 images, with equal shares of every digit.
    """

    train: LabelledImages
    test: LabelledImages


def digits() -> Digits:
    """The 1,797 handwritten digits that scikit-learn ships: 8x8 grey pixels, in a fixed stratified split.

    Returns
    -------
    Digits
        The same on every call and machine.

    References
    ----------
    Alpaydin, Kaynak: "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998; the test
    part, as scikit-learn ships it.
    """
    # scikit-learn takes a second to import, which only those pay who ask for its data.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    rows = np.arange(len(bunch.target))
    kept, held_out = train_test_split(rows, test_size=_TEST_SHARE, random_state=_SPLIT_SEED, stratify=bunch.target)
    names = tuple(str(name) for name in bunch.target_names)

    def part(chosen: np.ndarray[tuple[int], np.dtype[np.int64]]) -> LabelledImages:
        pixels = torch.from_numpy((bunch.data[chosen] / _LARGEST_PIXEL).astype(np.float32))
        return LabelledImages(pixels, torch.from_numpy(bunch.target[chosen].astype(np.int64)), names, (8, 8))

    return Digits(part(kept), part(held_out))

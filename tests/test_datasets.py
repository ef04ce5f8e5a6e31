"""The data sets that need no download."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from parakit.data.samples import Samples
from parakit.datasets import Digits, LabelledImages, digits


@pytest.fixture(scope="module")
def both() -> Digits:
    return digits()


def rows(part: LabelledImages) -> set[bytes]:
    return {pixels.numpy().tobytes() for pixels in part.pixels}


def test_the_digits_are_all_there_in_two_parts(both: Digits) -> None:
    assert (len(both.train), len(both.test)) == (1437, 360)
    for part in (both.train, both.test):
        assert part.pixels.shape == (len(part), 64)
        assert (part.pixels.dtype, part.labels.dtype) == (torch.float32, torch.int64)
        assert (part.pixels.min(), part.pixels.max()) == (0, 1)
        assert torch.equal(part.labels.unique(), torch.arange(10))


def test_no_sample_is_in_both_parts(both: Digits) -> None:
    assert len(rows(both.train)) == 1437  # no two images are the same, so a set counts them
    assert len(rows(both.test)) == 360
    assert not rows(both.train) & rows(both.test)


def test_every_digit_has_its_share_in_both_parts(both: Digits) -> None:
    train, test = both.train.labels.bincount(), both.test.labels.bincount()
    assert ((test / (train + test)) - 0.2).abs().max() < 0.005


def test_the_split_is_fixed(both: Digits) -> None:
    content = hashlib.sha256()
    for part in (both.train, both.test):
        content.update((part.pixels * 16).to(torch.uint8).numpy().tobytes())
        content.update(part.labels.to(torch.uint8).numpy().tobytes())
    assert content.hexdigest() == "28d636f2f47ec885bab6c1d883c883cd3f85cb5f6d0f1457558c6b672cc71adf"


def test_a_part_is_a_torch_dataset(both: Digits) -> None:
    assert isinstance(both.train, Dataset)
    pixels, label = both.train[3]
    assert torch.equal(pixels, both.train.pixels[3])
    assert label == both.train.labels[3]
    first, _ = next(iter(DataLoader(both.train, batch_size=32)))
    assert first.shape == (32, 64)
    assert torch.equal(Samples.of(both.test).inputs, both.test.pixels)


def test_a_part_shows_its_images_and_names_its_classes(both: Digits) -> None:
    assert both.train.classes == tuple("0123456789")
    assert torch.equal(both.test.image(7).flatten(), both.test.pixels[7])
    assert both.test.image(7).shape == both.test.image_shape == (8, 8)
    assert repr(both.test) == "<LabelledImages: 360 images of 8x8 pixels, 10 classes>"


def test_a_zero_is_hollow_and_a_one_is_not(both: Digits) -> None:
    images = both.train.pixels.view(-1, 8, 8)
    zero, one = (images[both.train.labels == digit].mean(0)[3:5, 3:5].mean() for digit in (0, 1))
    assert zero < 0.2 < 0.6 < one

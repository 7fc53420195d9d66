"""The decoded cache, splits, and data of one's own."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from labkit.classify import data
from labkit.classify.data import ImageData, Split, as_split, load_data, train_val_split
from labkit.runtime import InputError, SourceError
from tests.classify.small_cifar import HUB_FILES, TEST, TRAIN, assert_is_the_data, parquet

# ---------------------------------------------------------------- the cache


def cached_file(cache: Path, name: str) -> Path:
    (path,) = cache.rglob(name)
    return path


def test_second_call_does_not_decode(parquet_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_data(str(parquet_folder))
    monkeypatch.setattr(data, "_decode", None)
    assert_is_the_data(load_data(str(parquet_folder)))


def test_cache_argument_takes_the_place_of_the_default(
    parquet_folder: Path, tmp_path: Path, labkit_cache: Path
) -> None:
    load_data(str(parquet_folder), cache=tmp_path / "elsewhere")
    assert cached_file(tmp_path / "elsewhere", "train_images.npy")
    assert not labkit_cache.exists()


def test_pixels_are_mapped_and_changes_stay_private(parquet_folder: Path) -> None:
    loaded = load_data(str(parquet_folder))
    assert isinstance(loaded.train.images, np.memmap)
    torch.from_numpy(loaded.train.images).zero_()
    torch.from_numpy(loaded.train.labels).zero_()
    assert_is_the_data(load_data(str(parquet_folder)))


def test_changed_parquet_is_decoded_anew(parquet_folder: Path) -> None:
    before = load_data(str(parquet_folder))
    (parquet_folder / HUB_FILES["test"]).write_bytes(parquet((TEST[0][::-1], TEST[1])))
    after = load_data(str(parquet_folder))
    np.testing.assert_array_equal(after.test.images, TEST[0][::-1])
    assert before.fingerprint != after.fingerprint


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_shape(path: Path) -> None:
    np.save(path, np.zeros((3, 8, 8, 3), np.uint8))


@pytest.mark.parametrize("damage", [cut, flip_a_bit, other_shape, os.remove])
@pytest.mark.parametrize("name", ["train_images.npy", "test_labels.npy"])
def test_damaged_cache_is_rebuilt(
    parquet_folder: Path,
    labkit_cache: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Any,
    name: str,
) -> None:
    load_data(str(parquet_folder))
    damage(cached_file(labkit_cache, name))
    assert_is_the_data(load_data(str(parquet_folder)))
    assert "decoding again" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": {}}', '{"sha256": []}'])
def test_damaged_manifest_is_rebuilt(parquet_folder: Path, labkit_cache: Path, text: str) -> None:
    load_data(str(parquet_folder))
    cached_file(labkit_cache, data.MANIFEST).write_text(text)
    assert_is_the_data(load_data(str(parquet_folder)))


def test_full_disk_is_named_and_nothing_counts_as_cached(
    parquet_folder: Path, labkit_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, iter(range(100))

    def fsync(descriptor: int) -> None:
        if next(calls) >= 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SourceError, match="No space left on device"):
        load_data(str(parquet_folder))
    assert list(labkit_cache.rglob("train_images.npy"))
    assert not list(labkit_cache.rglob(data.MANIFEST))
    monkeypatch.undo()
    assert_is_the_data(load_data(str(parquet_folder), cache=labkit_cache))


def run_together(target: Any, count: int = 3) -> None:
    threads = [threading.Thread(target=target) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_callers_at_the_same_time_decode_once(
    parquet_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, decoded, loaded = data._decode, [], []
    monkeypatch.setattr(data, "_decode", lambda *args: (decoded.append(1), real(*args)))
    run_together(lambda: loaded.append(load_data(str(parquet_folder))))
    assert len(decoded) == 1
    assert len(loaded) == 3
    for each in loaded:
        assert_is_the_data(each)


def test_without_locks_decoders_do_not_harm_each_other(
    parquet_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meet = threading.Barrier(3)

    @contextlib.contextmanager
    def together(_: Path) -> Iterator[None]:
        meet.wait()
        yield

    loaded: list[data.ImageData] = []
    monkeypatch.setattr(data, "lock_file", together)
    run_together(lambda: loaded.append(load_data(str(parquet_folder))))
    assert len(loaded) == 3
    for each in loaded:
        assert_is_the_data(each)


# ---------------------------------------------------------------- the validation split


def numbered(labels: list[int]) -> Split:
    """Images whose first pixel is their own number."""
    images = np.zeros((len(labels), 2, 2, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(len(labels))
    return Split(images, np.array(labels, dtype=np.int64))


def numbers(split: Split) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


def test_train_val_split_parts_everything_in_order() -> None:
    split = numbered([0, 1, 2, 3, 4] * 20)
    train, validation = train_val_split(split, 30)
    assert sorted(numbers(train) + numbers(validation)) == list(range(100))
    assert (len(train), len(validation)) == (70, 30)
    for part in (train, validation):
        assert numbers(part) == sorted(numbers(part))
        assert part.labels.tolist() == [number % 5 for number in numbers(part)]


def test_train_val_split_is_balanced_over_classes() -> None:
    _, validation = train_val_split(numbered([0, 1, 2, 3] * 25), 20, seed=3)
    assert np.bincount(validation.labels).tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize("count", [1, 7, 33, 99])
def test_train_val_split_follows_unequal_classes_within_one(count: int) -> None:
    labels = [0] * 60 + [5] * 30 + [7] * 10
    _, validation = train_val_split(numbered(labels), count)
    got = np.bincount(validation.labels, minlength=8)[[0, 5, 7]]
    assert got.sum() == count
    assert np.abs(got - np.array([60, 30, 10]) * count / 100).max() < 1


def test_train_val_split_depends_on_the_seed_alone() -> None:
    split = numbered([0, 1] * 50)
    first, again, other = (numbers(train_val_split(split, 40, seed=seed)[1]) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("count", [-1, 0, 10, 11])
def test_train_val_split_needs_images_on_both_sides(count: int) -> None:
    with pytest.raises(InputError, match=f"got {count}"):
        train_val_split(numbered([0, 1] * 5), count)


def test_split_refuses_arrays_of_another_form() -> None:
    images, labels = TEST
    assert len(Split(images, labels)) == 20
    for wrong in (
        (images[..., 0], labels),
        (images.astype(np.int16), labels),
        (images, labels[:3]),
        (images, labels.astype(np.int32)),
    ):
        with pytest.raises(InputError, match="must be"):
            Split(*wrong)


def test_split_names_its_classes_or_numbers_them() -> None:
    images, labels = TEST
    assert Split(images, labels).classes == tuple("0123456789")
    assert Split(images, labels, tuple("abcdefghijk")).classes[10] == "k"
    with pytest.raises(InputError, match="labels must be from 0 to 1"):
        Split(images, labels, ("cat", "dog"))
    with pytest.raises(InputError, match="got -1 to 8"):
        Split(images, labels - 1)


def test_classes_in_another_order_keep_their_images() -> None:
    split = Split(*TEST, classes=tuple("klmnopqrst"))
    turned = split.reorder_classes(tuple("tsrqponmlk"))
    assert turned.classes == tuple("tsrqponmlk")
    assert turned.labels.dtype == np.int64
    before, after = ([s.classes[label] for label in s.labels] for s in (split, turned))
    assert before == after
    assert split.reorder_classes(split.classes) is split


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("klmnopqrs", "the 9 names .*, got 10: missing none, not among them 't'"),
        ("klmnopqrsu", "missing 'u', not among them 't'"),
        ("klmnopqrss", "missing none, not among them 't'"),
        ("0123456789x", "missing '0', '1', .* and 1 more, not among them 'k'"),
    ],
)
def test_other_classes_are_refused(classes: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Split(*TEST, classes=tuple("klmnopqrst")).reorder_classes(tuple(classes))


def test_both_parts_of_a_split_keep_its_classes() -> None:
    split = Split(*TEST, classes=tuple("klmnopqrst"))
    assert {part.classes for part in train_val_split(split, 10)} == {split.classes}


# ---------------------------------------------------------------- data of one's own


IMAGES, LABELS = TEST


def as_floats(images: Any) -> Any:
    return images.astype(np.float32) / 255


@pytest.mark.parametrize(
    "images",
    [
        IMAGES,
        IMAGES.transpose(0, 3, 1, 2),
        as_floats(IMAGES),
        as_floats(IMAGES).astype(np.float64),
        torch.from_numpy(IMAGES),
        torch.from_numpy(as_floats(IMAGES)).permute(0, 3, 1, 2),
    ],
    ids=["bytes", "channels-first", "floats", "doubles", "tensor", "float-tensor"],
)
@pytest.mark.parametrize("labels", [LABELS, LABELS.tolist(), torch.from_numpy(LABELS).int()])
def test_arrays_and_tensors_of_every_layout_become_the_same_split(images: Any, labels: Any) -> None:
    split = as_split((images, labels))
    np.testing.assert_array_equal(split.images, IMAGES)
    np.testing.assert_array_equal(split.labels, LABELS)
    assert split.classes == tuple("0123456789")


class Dataset:
    """A data set as torchvision has them."""

    def __init__(self, convert: Any, classes: Any = None) -> None:
        self._convert = convert
        if classes:
            self.classes = classes

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self._convert(Image.fromarray(IMAGES[index])), int(LABELS[index])


@pytest.mark.parametrize(
    "convert",
    [lambda image: image, np.asarray, TF.to_image, TF.to_tensor],
    ids=["pil", "array", "tv-tensor", "float-tensor"],
)
def test_a_data_set_as_torchvision_has_them_becomes_a_split(convert: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision advises against to_tensor
        split = as_split(Dataset(convert, list("klmnopqrst")))
    np.testing.assert_array_equal(split.images, IMAGES)
    np.testing.assert_array_equal(split.labels, LABELS)
    assert split.classes == tuple("klmnopqrst")


def test_torchvisions_own_data_sets_are_taken() -> None:
    from torchvision.datasets import FakeData

    split = as_split(FakeData(6, (3, 8, 8), 4), classes=tuple("abcd"))
    assert split.images.shape == (6, 8, 8, 3) and split.classes == tuple("abcd")


@pytest.mark.parametrize("dtype", [np.uint16, ">u2", np.int32, np.uint32])
def test_16_bits_become_8(dtype: Any) -> None:
    images = (IMAGES.astype(np.uint16) * 257).astype(dtype)
    sources = [images] if dtype == ">u2" else [images, torch.from_numpy(images)]
    for source in sources:
        np.testing.assert_array_equal(as_split((source, LABELS)).images, IMAGES)


def test_numbers_of_0_and_1_become_black_and_white() -> None:
    split = as_split((IMAGES > 127, LABELS))
    np.testing.assert_array_equal(split.images, (IMAGES > 127) * 255)


def test_a_black_image_among_32_bit_ones_stays_black() -> None:
    images = IMAGES.astype(np.int32) * 257
    images[0] = 0
    images[1] = 255  # nearly black in 16 bits, white in 8
    split = as_split((images, LABELS))
    assert split.images[0].max() == 0 and split.images[1].max() == 1


def test_grey_images_of_a_data_set_become_rgb() -> None:
    split = as_split(Dataset(lambda image: image.convert("L")))
    np.testing.assert_array_equal(split.images[..., 0], split.images[..., 2])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((as_floats(IMAGES) * 4 - 2, LABELS), "leave out Normalize: labkit normalises with"),
        ((as_floats(IMAGES) * np.nan, LABELS), "leave out Normalize"),
        ((IMAGES.astype(np.int64), LABELS), r"images must be uint8.*astype\('uint8'\)"),
        ((IMAGES.astype(np.int32), LABELS), r"own holds int32 from 0 to 255.*astype\('uint8'\)"),
        ((IMAGES.astype(np.int32) * 258, LABELS), "own holds numbers from 0 to 65790"),
        ((IMAGES[..., :1], LABELS), r"got \(20, 32, 32, 1\); repeat the one channel"),
        ((IMAGES, LABELS[:3]), "own has 20 images but 3 labels"),
        ((IMAGES, LABELS / 2), "labels must be whole numbers"),
        ((IMAGES, LABELS[:, None]), r"whole numbers \(N,\)"),
        ((IMAGES, LABELS - 5), "own: labels must be from 0"),
        ((IMAGES[:0], LABELS[:0]), "own holds no images"),
        ((IMAGES, LABELS, 3), "got 3 parts"),
        (7, "got int"),
    ],
)
def test_data_that_cannot_be_used_is_refused_with_the_remedy(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_split(data, "own")


def test_a_data_set_that_normalises_is_told_not_to() -> None:
    with pytest.raises(InputError, match="leave out Normalize"):
        as_split(Dataset(lambda image: torch.from_numpy(as_floats(np.asarray(image))) * 2 - 1))


def test_a_data_set_of_several_sizes_is_told_to_resize() -> None:
    sizes = iter(range(30, 60))
    with pytest.raises(InputError, match=r"\(30, 30\) and of \(31, 31\) pixels; resize"):
        as_split(Dataset(lambda image: image.resize((next(sizes),) * 2)))


def test_own_data_is_identified_by_its_bytes() -> None:
    first, again = (ImageData.from_splits(TRAIN, TEST) for _ in range(2))
    assert first.fingerprint == again.fingerprint and first.source == "custom"
    changed = TRAIN[0].copy()
    changed[0, 0, 0, 0] ^= 1
    for train, test in (
        ((changed, TRAIN[1]), TEST),
        (TRAIN, TRAIN),
        ((TRAIN[0], LABELS.repeat(2)), TEST),
    ):
        assert ImageData.from_splits(train, test).fingerprint != first.fingerprint


def test_the_test_split_takes_the_classes_of_the_training_split() -> None:
    names = tuple("klmnopqrst")
    few = (IMAGES[:2], LABELS[:2])
    data = ImageData.from_splits(Split(*TRAIN, classes=names), few)
    assert data.classes == data.test.classes == names
    with pytest.raises(InputError, match="give both the same names"):
        ImageData.from_splits(TRAIN, Split(*TEST, classes=names))
    with pytest.raises(InputError, match="test: labels must be from 0 to 1"):
        ImageData.from_splits(few, TEST)
    with pytest.raises(InputError, match="custom data has 1 class"):
        ImageData.from_splits((IMAGES, LABELS * 0), (IMAGES, LABELS * 0))
    with pytest.raises(InputError, match="resize them alike"):
        ImageData.from_splits(TRAIN, (IMAGES[:, :16], LABELS))


def test_a_label_as_large_as_an_identifier_makes_no_million_classes() -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(InputError, match=r"a label is 2000000000.*number the classes from 0"):
        as_split((images, np.array([0, 2_000_000_000])))
    assert len(as_split((images, np.array([0, 999]))).classes) == 1000

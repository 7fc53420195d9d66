"""Labelled images: decoded once into memory-mapped files, or converted from arrays of your own."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from labkit.classify.config import MAX_SIZE
from labkit.classify.sources import SPLITS, Batch, Source, find_source
from labkit.files import (
    compute_checksum,
    get_cache_dir,
    lock_file,
    open_atomic,
    parse_json,
    write_json,
)
from labkit.images import (
    check_above_8_bits,
    is_32_bit,
    load_image,
    narrow_to_uint16,
    scale_to_uint8,
    to_rgb,
)
from labkit.runtime import InputError, SourceError, is_interactive

logger = logging.getLogger(__name__)

CACHE_VERSION = 2
MAX_UNNAMED = 100_000  # classes that are known by their numbers alone
NAMED = 10  # classes that a message names; of further ones it says how many
MANIFEST = "content.json"
NORMALISED = (
    "they must lie in [0, 1]; leave out Normalize: labkit normalises with config.mean and "
    "config.std (numbers from 0 to 255 must be uint8)"
)


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images.

    Attributes:
        images: (N, H, W, 3) uint8 RGB.
        labels: (N,) int64, positions in `classes`.
        classes: class names in the order of the labels; by default the numbers as text.

    Raises:
        InputError: the arrays are not of this form, or do not fit each other.

    Example:
        >>> split = Split(np.zeros((4, 32, 32, 3), np.uint8), np.array([0, 1, 1, 0]))
        >>> len(split), split.classes
        (4, ('0', '1'))
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise InputError(
                f"images must be (N, H, W, 3) uint8, got {images.shape} {images.dtype}"
            )
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise InputError(f"labels must be (N,) int64, got {labels.shape} {labels.dtype}")
        highest = int(labels.max(initial=-1))
        if not self.classes:
            object.__setattr__(self, "classes", _number_classes(highest))
        if labels.min(initial=0) < 0 or highest >= len(self.classes):
            raise InputError(
                f"labels must be from 0 to {len(self.classes) - 1}, one for each class, "
                f"got {labels.min()} to {highest}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def reorder_classes(self, classes: Sequence[str]) -> Split:
        """The same images with labels that are positions in `classes`.

        Args:
            classes: the names of `self.classes` in any order.

        Raises:
            InputError: the names are other ones.

        Example:
            >>> split = Split(np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 1]), ("cat", "dog"))
            >>> split.reorder_classes(("dog", "cat")).labels.tolist()
            [1, 0]
        """
        wanted = tuple(classes)
        if wanted == self.classes:
            return self
        if len(set(wanted)) != len(wanted) or sorted(wanted) != sorted(self.classes):
            missing = _name_classes([name for name in wanted if name not in self.classes])
            unknown = _name_classes([name for name in self.classes if name not in wanted])
            raise InputError(
                f"the classes must be the {len(wanted)} names {_name_classes(wanted)}, got "
                f"{len(self.classes)}: missing {missing}, not among them {unknown}"
            )
        positions = np.array([wanted.index(name) for name in self.classes], np.int64)
        return Split(self.images, positions[self.labels], wanted)


def _number_classes(highest: int) -> tuple[str, ...]:
    """Names of the classes up to the label `highest`: the numbers."""
    if highest >= MAX_UNNAMED:
        raise InputError(
            f"a label is {highest}, and so many classes are too many; number the classes from 0"
        )
    return tuple(map(str, range(highest + 1)))


def _name_classes(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return (", ".join(map(repr, names[:NAMED])) or "none") + more


ImagesAndLabels: TypeAlias = "Split | tuple[Any, Any] | Any"
"""A `Split`, a pair (images, labels), or a data set as torchvision has them (see `as_split`)."""


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set as a training run needs it.

    Attributes:
        train: the training split.
        test: the test split, with the same classes.
        source: what was asked for: `hub`, `scenes`, a path …; `custom` for your own data.
        name: the name for titles.
        fingerprint: hex digits that identify the files, the code or the bytes of the pixels.
        remarks: sentences that whoever reads the results should know, such as which files of a
            folder were left out.

    Raises:
        InputError: the two splits differ in their classes or in the size of their images, or there
            is only one class.
    """

    train: Split
    test: Split
    source: str
    name: str
    fingerprint: str
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.train.classes != self.test.classes:
            raise InputError(
                f"train has the classes {self.train.classes}, test {self.test.classes}; "
                "give both the same names: Split(images, labels, classes)"
            )
        if len(self.train.classes) < 2:
            raise InputError(f"{self.name} has {len(self.train.classes)} class; give at least 2")
        if self.train.images.shape[1:] != self.test.images.shape[1:]:
            train, test = self.train.images.shape[1:3], self.test.images.shape[1:3]
            raise InputError(f"train has images of {train}, test of {test}; resize them alike")

    @classmethod
    def from_splits(
        cls, train: ImagesAndLabels, test: ImagesAndLabels, *, name: str = "custom data"
    ) -> ImageData:
        """Your own data, in any form that `as_split` takes; the test split has `train`'s classes.

        Raises:
            InputError: the data cannot be used.

        Example:
            >>> images, labels = np.zeros((6, 3, 8, 8), np.uint8), [0, 1, 2, 0, 1, 2]
            >>> data = ImageData.from_splits((images, labels), (images[:2], labels[:2]))
            >>> data.train.images.shape, data.classes
            ((6, 8, 8, 3), ('0', '1', '2'))
        """
        train = as_split(train, "train")
        test = as_split(test, "test", classes=train.classes)
        digest = hashlib.sha256(repr(train.classes).encode())
        for split in (train, test):
            digest.update(repr(split.images.shape).encode())
            digest.update(np.ascontiguousarray(split.images).data)
            digest.update(np.ascontiguousarray(split.labels).data)
        return cls(train, test, "custom", name, digest.hexdigest())

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels."""
        return self.train.classes

    def reorder_classes(self, classes: Sequence[str]) -> ImageData:
        """The same data with labels that are positions in `classes`; see `Split`.

        Raises:
            InputError: the names are other ones.

        Example:
            >>> images, labels = np.zeros((2, 8, 8, 3), np.uint8), [0, 1]
            >>> data = ImageData.from_splits((images, labels), (images, labels))
            >>> data.reorder_classes(("1", "0")).test.labels.tolist()
            [1, 0]
        """
        train, test = (split.reorder_classes(classes) for split in (self.train, self.test))
        return dataclasses.replace(self, train=train, test=test)

    @property
    def note(self) -> str:
        """What every figure must say on its face; empty for real images."""
        return "demo: procedural scenes, not CIFAR-10" if self.source == "scenes" else ""


def load_data(source: str = "hub", *, cache: Path | None = None, image_size: int = 32) -> ImageData:
    """The images of `source`, fetched and decoded on the first call, memory-mapped after it.

    The maps are copy-on-write: changing a loaded array never reaches the cache.

    Args:
        source: `hub` (CIFAR-10 from the Hugging Face hub), `toronto` (CIFAR-10 from its authors),
            `cifar100` (CIFAR-100 from the hub, not pinned), `scenes` (procedural, needs nothing),
            or a folder: parquet files as on the hub, an extracted `cifar-10-batches-py`, or images
            in `train/<class>/*` and `test/<class>/*`. Where there is no `test`, `val`, `valid` or
            `validation` serves. What is no image is left out with a warning.
        cache: where to keep the decoded pixels and the archive; `labkit.files.get_cache_dir()`.
        image_size: height and width in pixels. The central square of an image of another size is
            resized to it, also the 32 x 32 pixels of CIFAR-10 and CIFAR-100; only the scenes are
            always of 32.

    Raises:
        InputError: `source` is nothing of that, or its content cannot be used.
        SourceError: it could not be fetched or read, or the cache could not be written. Another
            source is never taken in its place.
    """
    if not 1 <= image_size <= MAX_SIZE:
        raise InputError(f"image_size must be at least 1, at most {MAX_SIZE}, got {image_size}")
    cache = cache or get_cache_dir()
    origin = find_source(source, cache=cache, image_size=image_size)
    for remark in origin.remarks:
        logger.warning("%s: %s", origin.name, remark)
    folder = cache / "decoded" / f"{origin.kind}-v{CACHE_VERSION}-{origin.fingerprint[:16]}"
    splits = _load_cache(folder)
    if splits is None:
        with lock_file(folder):
            splits = _load_cache(folder)
            if splits is None:
                _decode(folder, source, origin)
                splits = _load_cache(folder)
    if splits is None:
        raise SourceError(f"what was just written to {folder} cannot be read; is the disk failing?")
    return ImageData(splits[0], splits[1], source, origin.name, origin.fingerprint, origin.remarks)


def _load_cache(folder: Path) -> list[Split] | None:
    """The decoded splits in `folder`; None if they are not there or not what was written."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return None
    try:
        content = parse_json(manifest.read_bytes())
        for name, digest in content["sha256"].items():
            if compute_checksum(folder / name) != digest:
                raise ValueError(f"{name} has changed")
        return [
            Split(
                np.load(folder / f"{split}_images.npy", mmap_mode="c"),
                np.load(folder / f"{split}_labels.npy"),
                tuple(content["classes"]),
            )
            for split in SPLITS
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("The decoded images in %s are damaged (%s); decoding again.", folder, error)
        return None


def _decode(folder: Path, source: str, origin: Source) -> None:
    """Write arrays and manifest, the manifest last: without it nothing counts as cached."""
    content = origin.read()
    classes, highest = content.classes, 0
    if classes is not None and len(classes) < 2:
        raise InputError(f"{source!r} holds {len(classes)} class; a classifier needs at least 2")
    for split in SPLITS:
        path = folder / f"{split}_images.npy"
        labels = _write_images(path, content.batches[split], content.counts.get(split), origin)
        if not len(labels):
            raise InputError(f"{source!r} holds no {split} images")
        highest = max(highest, int(labels.max()))
        if labels.min() < 0 or (classes is not None and highest >= len(classes)):
            limit = "the highest class" if classes is None else len(classes) - 1
            raise InputError(f"{source!r}: a {split} label lies outside 0 to {limit}")
        with open_atomic(folder / f"{split}_labels.npy") as file:
            np.save(file, labels)
    if classes is None:
        classes = _number_classes(highest)
    names = [f"{split}_{part}.npy" for split in SPLITS for part in ("images", "labels")]
    write_json(
        folder / MANIFEST,
        {
            "source": source,
            "fingerprint": origin.fingerprint,
            "classes": classes,
            "sha256": {name: compute_checksum(folder / name) for name in names},
        },
    )


def _write_images(
    path: Path, batches: Iterable[Batch], count: int | None, origin: Source
) -> NDArray[np.int64]:
    """Decode batch by batch straight into the file; the labels (N,) of what was written."""
    from tqdm.auto import tqdm

    npy: Any = np.lib.format  # annotated in some versions of NumPy only
    shape = (origin.image_size, origin.image_size, 3)
    all_labels = [np.zeros(0, np.int64)]

    def write_header(total: int) -> None:
        file.seek(0)
        header = {"descr": "|u1", "fortran_order": False, "shape": (total, *shape)}
        npy.write_array_header_1_0(file, header)

    with (
        open_atomic(path) as file,
        tqdm(total=count, desc=f"decoding {path.stem}", unit="image") as progress,
    ):
        write_header(0)  # NumPy leaves room in it for any number
        for images, labels in batches:
            if images.shape != (len(labels), *shape) or images.dtype != np.uint8:
                raise InputError(
                    f"{origin.name}: expected uint8 images of {shape}, "
                    f"got {images.dtype} {images.shape[1:]}"
                )
            file.write(images.tobytes())
            all_labels.append(labels.astype(np.int64))
            progress.update(len(labels))
        every_label = np.concatenate(all_labels)
        write_header(len(every_label))
    return every_label


def as_split(data: ImagesAndLabels, label: str = "data", *, classes: Sequence[str] = ()) -> Split:
    """Your own labelled images as a `Split`, converted once.

    Args:
        data: a `Split`; or a pair (images, labels) of arrays or tensors, with images
            (N, H, W, 3) or (N, 3, H, W) and whole numbers (N,) as labels; or a data set as
            torchvision has them, with a length and items (image, label), where an image is a PIL
            image, an array or a tensor. Colours are floats in [0, 1] or integers, as
            `labkit.images.scale_to_uint8` takes them. A data set is read once: random augmentation
            belongs into `transform` of `labkit.fit`.
        label: what `data` is called in messages.
        classes: class names where `data` has none; a data set may have them as `data.classes`.

    Raises:
        InputError: lengths, sizes, types or values cannot be used.

    Example:
        >>> images = torch.rand(2, 3, 8, 8)
        >>> as_split((images, torch.tensor([1, 0])), classes=("cat", "dog")).images.shape
        (2, 8, 8, 3)
    """
    if isinstance(data, Split):
        return data
    if isinstance(data, tuple | list):
        if len(data) != 2:
            raise InputError(f"{label} must be a pair (images, labels), got {len(data)} parts")
        images, labels = (_as_array(part) for part in data)
        images = _as_uint8_images(images, label)
    elif hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        images, labels = _read_dataset(data, label)
        classes = getattr(data, "classes", None) or classes
    else:
        raise InputError(
            f"{label} must be a Split, a pair (images, labels) or a data set with a length, "
            f"got {type(data).__name__}"
        )
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise InputError(
            f"{label}: labels must be whole numbers (N,), the position of each image's class, "
            f"got {labels.dtype} {labels.shape}"
        )
    if len(images) != len(labels):
        raise InputError(f"{label} has {len(images)} images but {len(labels)} labels")
    if not len(labels):
        raise InputError(f"{label} holds no images")
    try:
        return Split(images, labels.astype(np.int64), tuple(map(str, classes)))
    except InputError as error:
        raise InputError(f"{label}: {error}") from error


def _as_array(value: Any) -> NDArray[Any]:
    return np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value)


def _as_uint8_images(images: NDArray[Any], label: str) -> NDArray[np.uint8]:
    """(N, H, W, 3) uint8 of images in any layout and type that `as_split` takes."""
    if images.ndim == 4 and images.shape[3] != 3 and images.shape[1] == 3:
        images = images.transpose(0, 2, 3, 1)
    if images.ndim != 4 or images.shape[3] != 3:
        raise InputError(
            f"{label}: images must be (N, H, W, 3) or (N, 3, H, W), got {images.shape}; "
            "repeat the one channel of grey images three times"
        )
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images)
    if is_32_bit(images.dtype):
        check_above_8_bits(images, label)
        images = narrow_to_uint16(images, label)
    is_16_bit = images.dtype.kind == "u" and images.dtype.itemsize == 2
    if images.dtype.kind not in "fb" and not is_16_bit:
        raise InputError(
            f"{label}: images must be uint8, uint16, 32-bit integers or floats in [0, 1], "
            f"got {images.dtype}; use .astype('uint8') for numbers from 0 to 255"
        )
    converted = np.empty(images.shape, np.uint8)
    for index, image in enumerate(images):  # image by image: the numbers between are large
        if images.dtype.kind == "f":
            check_unit_range(image, label)
        converted[index] = scale_to_uint8(image, label)
    return converted


def check_unit_range(values: Any, label: str) -> None:
    """Raise InputError unless the floats of an array or tensor lie in [0, 1]."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):
        raise InputError(f"{label} has floats from {low:g} to {high:g}, {NORMALISED}")


def as_pixels(image: Any, label: str) -> NDArray[np.uint8]:
    """An item of a data set as (H, W, 3) uint8: a PIL image, or an array or tensor.

    Arrays and tensors are (H, W), (H, W, C) or (C, H, W), of numbers that
    `labkit.images.scale_to_uint8` takes.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        return to_rgb(image, label)
    array = _as_array(image)
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.dtype.kind == "f" and array.size:
        check_unit_range(array, label)
    return load_image(array)


def _read_dataset(data: Any, label: str) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Images (N, H, W, 3) and labels (N,) of a data set as torchvision has them."""
    from tqdm.auto import trange

    labels: list[Any] = []
    images = np.zeros((0, 1, 1, 3), np.uint8)
    for index in trange(len(data), desc=f"reading {label}", disable=not is_interactive()):
        image, target = data[index]
        pixels = as_pixels(image, f"{label}[{index}]")
        if index == 0:
            images = np.empty((len(data), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            raise InputError(
                f"{label} has images of {images.shape[1:3]} and of {pixels.shape[:2]} pixels; "
                "resize all to one size, for example with transform=Resize((32, 32))"
            )
        images[index] = pixels
        labels.append(target.item() if isinstance(target, torch.Tensor) else target)
    return images, np.asarray(labels)


def train_val_split(split: Split, val_size: int, *, seed: int = 0) -> tuple[Split, Split]:
    """Part `split` into a training split and a validation split of `val_size` images.

    The two are disjoint, together everything, and keep the order of `split`. Each class gives
    to the validation split in proportion to its size, rounded by largest remainder.

    Raises:
        InputError: unless 0 < val_size < len(split).

    Example:
        >>> split = Split(np.zeros((10, 8, 8, 3), np.uint8), np.arange(10) % 2)
        >>> train, validation = train_val_split(split, 4)
        >>> len(train), validation.labels.tolist()
        (6, [1, 0, 0, 1])
    """
    if not 0 < val_size < len(split):
        raise InputError(f"val_size must be between 1 and {len(split) - 1}, got {val_size}")
    _, member_class, sizes = np.unique(split.labels, return_inverse=True, return_counts=True)
    shares = sizes * val_size / len(split)
    quotas = np.floor(shares).astype(np.int64)
    missing = val_size - int(quotas.sum())
    quotas[np.argsort(quotas - shares, kind="stable")[:missing]] += 1
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(split), dtype=bool)
    for index, quota in enumerate(quotas):
        held_out[rng.permutation(np.flatnonzero(member_class == index))[:quota]] = True
    train, validation = (
        Split(split.images[rows], split.labels[rows], split.classes)
        for rows in (~held_out, held_out)
    )
    return train, validation

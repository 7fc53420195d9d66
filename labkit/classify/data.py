"""Labelled pictures, decoded once into memory-mapped files, and the validation split."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.classify.readers import SPLITS, Content, Pictures
from labkit.classify.sources import Origin, find_origin
from labkit.files import compute_checksum, get_cache_dir, lock_file, open_atomic, write_json
from labkit.runtime import InputError, SourceError

logger = logging.getLogger(__name__)

CACHE_VERSION = 1
MANIFEST = "content.json"


@dataclass(frozen=True, eq=False)
class Split:
    """Pictures (N, H, W, 3) uint8 RGB with their labels (N,) int64, each below the class count."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise InputError(
                f"images must be (N, H, W, 3) uint8, got {images.shape} {images.dtype}"
            )
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise InputError(f"labels must be (N,) int64, got {labels.shape} {labels.dtype}")

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set as a training run needs it.

    `classes` are in the order of the labels, `source` is what was asked for, `name` is for
    titles, and `fingerprint` (hex) identifies the files or the code the pixels come from.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    source: str
    name: str
    fingerprint: str

    @property
    def note(self) -> str:
        """What every figure must say on its face; empty for real pictures."""
        return "demo: procedural scenes, not CIFAR-10" if self.source == "scenes" else ""


def load_data(source: str = "hub", *, cache: Path | None = None, image_size: int = 32) -> ImageData:
    """The pictures of `source`, fetched and decoded on the first call, memory-mapped after it.

    The maps are copy-on-write: changing a loaded array never reaches the cache.

    Args:
        source: `hub` (CIFAR-10 from the Hugging Face hub), `toronto` (CIFAR-10 from its authors),
            `scenes` (procedural, needs nothing), or a folder: parquet files as on the hub, an
            extracted `cifar-10-batches-py`, or images in `train/<class>/*` and `test/<class>/*`.
        cache: Where to keep the decoded pixels and the archive; `labkit.files.get_cache_dir()`.
        image_size: Height and width in pixels; other than 32 only for a folder of images.

    Raises:
        InputError: `source` is nothing of that, or its content cannot be used.
        SourceError: it could not be fetched, or the cache could not be written. Another source is
            never taken in its place.
    """
    if image_size < 1:
        raise InputError(f"image_size must be at least 1, got {image_size}")
    cache = cache or get_cache_dir()
    origin = find_origin(source, cache=cache, image_size=image_size)
    folder = cache / "decoded" / f"{origin.kind}-v{CACHE_VERSION}-{origin.fingerprint[:16]}"
    data = _load(folder, origin)
    if data is None:
        with lock_file(folder):
            data = _load(folder, origin)
            if data is None:
                _decode(folder, origin)
                data = _load(folder, origin)
    if data is None:
        raise SourceError(f"what was just written to {folder} cannot be read; is the disk failing?")
    return data


def _load(folder: Path, origin: Origin) -> ImageData | None:
    """The decoded pixels in `folder`; None if they are not there or not what was written."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return None
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        for name, digest in content["sha256"].items():
            if compute_checksum(folder / name) != digest:
                raise ValueError(f"{name} has changed")
        splits = {
            split: Split(
                np.load(_file(folder, split, "images"), mmap_mode="c"),
                np.load(_file(folder, split, "labels")),
            )
            for split in SPLITS
        }
        classes = tuple(content["classes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning(
            "The decoded pictures in %s are damaged (%s); decoding again.", folder, error
        )
        return None
    return ImageData(
        **splits,
        classes=classes,
        source=origin.source,
        name=origin.name,
        fingerprint=origin.fingerprint,
    )


def _file(folder: Path, split: str, part: str) -> Path:
    return folder / f"{split}_{part}.npy"


def _decode(folder: Path, origin: Origin) -> None:
    """Write arrays and manifest, the manifest last: without it nothing counts as cached."""
    with origin.open() as content:
        _check(content, origin)
        for split in SPLITS:
            _write_split(folder, split, content.splits[split], content.classes, origin)
        files = [_file(folder, split, part) for split in SPLITS for part in ("images", "labels")]
        write_json(
            folder / MANIFEST,
            {
                "source": origin.source,
                "fingerprint": origin.fingerprint,
                "classes": content.classes,
                "sha256": {path.name: compute_checksum(path) for path in files},
            },
        )


def _check(content: Content, origin: Origin) -> None:
    if len(content.classes) < 2:
        raise InputError(
            f"{origin.source!r} holds {len(content.classes)} class; a classifier needs at least 2"
        )
    for split in SPLITS:
        if content.splits[split].count < 1:
            raise InputError(f"{origin.source!r} holds no {split} pictures")


def _write_split(
    folder: Path, split: str, pictures: Pictures, classes: Sequence[str], origin: Origin
) -> None:
    """Decode batch by batch straight into the file, so that memory holds one batch."""
    from tqdm.auto import tqdm

    npy: Any = np.lib.format  # annotated in some versions of NumPy only
    shape = (pictures.count, origin.image_size, origin.image_size, 3)
    all_labels = []
    with (
        open_atomic(_file(folder, split, "images")) as file,
        tqdm(total=pictures.count, desc=f"decoding {split}", unit="picture") as progress,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(file, header)
        for images, labels in pictures.batches:
            if images.shape != (len(labels), *shape[1:]) or images.dtype != np.uint8:
                raise InputError(
                    f"{origin.source!r}: expected uint8 pictures of {shape[1:]}, "
                    f"got {images.dtype} {images.shape[1:]}"
                )
            if labels.min() < 0 or labels.max() >= len(classes):
                raise InputError(
                    f"{origin.source!r}: a {split} label lies outside 0 to {len(classes) - 1}"
                )
            file.write(images.tobytes())
            all_labels.append(labels.astype(np.int64))
            progress.update(len(labels))
    with open_atomic(_file(folder, split, "labels")) as file:
        np.save(file, np.concatenate(all_labels))


def hold_out(split: Split, count: int, *, seed: int = 0) -> tuple[Split, Split]:
    """Part `split` into training and validation pictures with `count` of them in the latter.

    The two are disjoint, together everything, and keep the order of `split`. Each class gives
    to the validation split in proportion to its size, rounded by largest remainder.

    Raises:
        InputError: unless 0 < count < len(split).
    """
    if not 0 < count < len(split):
        raise InputError(f"count must be between 1 and {len(split) - 1}, got {count}")
    _, member_class, sizes = np.unique(split.labels, return_inverse=True, return_counts=True)
    shares = sizes * count / len(split)
    quotas = np.floor(shares).astype(np.int64)
    missing = count - int(quotas.sum())
    quotas[np.argsort(quotas - shares, kind="stable")[:missing]] += 1
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(split), dtype=bool)
    for index, quota in enumerate(quotas):
        chosen[rng.permutation(np.flatnonzero(member_class == index))[:quota]] = True
    return (
        Split(split.images[~chosen], split.labels[~chosen]),
        Split(split.images[chosen], split.labels[chosen]),
    )

"""A small CIFAR-10 in every layout that labkit reads."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from labkit.classify.data import ImageData
from labkit.classify.sources import CIFAR10_CLASSES

HUB_FILES = {split: f"plain_text/{split}-00000-of-00001.parquet" for split in ("train", "test")}
Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


def random_images(count: int, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return images, np.arange(count, dtype=np.int64) % 10


TRAIN, TEST = random_images(40, 0), random_images(20, 1)


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(images_and_labels: Arrays, names: tuple[str, ...] | None = CIFAR10_CLASSES) -> bytes:
    """The images in the layout of `uoft-cs/cifar10`."""
    images, labels = images_and_labels
    cells = [{"bytes": png(image), "path": None} for image in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"img": pa.array(cells, kind), "label": labels})
    if names:
        features = {"label": {"names": list(names), "_type": "ClassLabel"}}
        info = {"info": {"features": {"img": {"_type": "Image"}, **features}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


TRAIN_PARQUET, TEST_PARQUET = parquet(TRAIN), parquet(TEST)


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes bytes as Python 2 wrote its strings, as in the real archive."""

    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def python2_pickle(images_and_labels: Arrays) -> bytes:
    images, labels = images_and_labels
    rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump({b"data": rows, b"labels": labels.tolist()})
    return buffer.getvalue().replace(b"numpy._core.", b"numpy.core.")


def batch_files() -> dict[str, bytes]:
    """The pickles of the Toronto archive: eight images in each training batch."""
    images, labels = TRAIN
    files = {
        f"data_batch_{number + 1}": python2_pickle(
            (images[8 * number : 8 * number + 8], labels[8 * number : 8 * number + 8])
        )
        for number in range(5)
    }
    return files | {"test_batch": python2_pickle(TEST)}


def tar_gz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    return buffer.getvalue()


def archive() -> bytes:
    return tar_gz({f"cifar-10-batches-py/{name}": body for name, body in batch_files().items()})


def assert_is_the_data(loaded: ImageData) -> None:
    for split, (images, labels) in ((loaded.train, TRAIN), (loaded.test, TEST)):
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, labels)
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int64)

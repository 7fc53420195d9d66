"""Pictures out of the formats they come in: parquet, CIFAR-10's pickles, folders of files."""

from __future__ import annotations

import io
import json
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from labkit.runtime import InputError

if TYPE_CHECKING:
    from PIL import Image

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
CIFAR10_BATCHES = {
    "train": tuple(f"data_batch_{number}" for number in range(1, 6)),
    "test": ("test_batch",),
}
CIFAR10_SIZE = 32
SPLITS = ("train", "test")
BATCH = 1000
MAX_PIXELS = 89_000_000
PICTURE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

Batch = tuple[NDArray[np.uint8], NDArray[np.int64]]


@dataclass(frozen=True)
class Pictures:
    """One split that is still encoded: how many pictures, and an iterator that decodes them.

    `batches` yields images (n, H, W, 3) uint8 with labels (n,) int64, in a fixed order.
    """

    count: int
    batches: Iterator[Batch]


@dataclass(frozen=True)
class Content:
    """What a source holds: class names in the order of the labels, and `train` and `test`."""

    classes: tuple[str, ...]
    splits: Mapping[str, Pictures]


def read_parquet(
    files: Mapping[str, Sequence[Path]], default_classes: tuple[str, ...] | None = None
) -> Content:
    """Parquet files with an encoded picture in `img.bytes` and its class in `label`.

    Class names come from the `huggingface` metadata, else from `default_classes`, else they are
    the numbers themselves.

    Args:
        files: The files of `train` and of `test`, in order.
        default_classes: Names to use where the metadata has none.

    Raises:
        InputError: a file is damaged or has another layout.
    """
    counts, highest = {}, 0
    classes = None
    for split in SPLITS:
        labels, names = zip(*map(_parquet_labels, files[split]), strict=True)
        classes = classes or names[0]
        counts[split] = sum(map(len, labels))
        highest = max(highest, *(int(part.max(initial=0)) for part in labels))
    classes = classes or default_classes or tuple(map(str, range(highest + 1)))
    return Content(
        classes, {name: Pictures(counts[name], _parquet_batches(files[name])) for name in SPLITS}
    )


def _parquet_labels(path: Path) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
    """All labels of one file, and the class names in its metadata if there are any."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as parquet:
            schema = parquet.schema_arrow
            labels = parquet.read(columns=["label"]).column("label").to_numpy()
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error
    if labels.dtype.kind not in "iu":
        raise InputError(f"{path}: column 'label' must hold whole numbers without gaps")
    column = schema.get_field_index("img")
    kind = schema.types[column] if column >= 0 else pa.null()
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise InputError(f"{path}: column 'img' must hold encoded pictures in a field 'bytes'")
    return labels.astype(np.int64), _class_names(schema.metadata or {})


def _class_names(metadata: Mapping[bytes, bytes]) -> tuple[str, ...] | None:
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return tuple(map(str, features["label"]["names"]))
    except (KeyError, TypeError, ValueError):
        return None


def _parquet_batches(files: Sequence[Path]) -> Iterator[Batch]:
    import pyarrow.parquet as pq

    for path in files:
        try:
            with pq.ParquetFile(path) as parquet:
                for rows in parquet.iter_batches(BATCH, columns=["img", "label"]):
                    encoded = rows.column("img").field("bytes").to_pylist()
                    images = np.stack([_decode_rgb(item) for item in encoded])
                    yield images, rows.column("label").to_numpy().astype(np.int64)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _unreadable(path, error) from error


def _decode_rgb(encoded: bytes) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG")) as image:
        if image.size != (CIFAR10_SIZE, CIFAR10_SIZE):
            raise InputError(f"a picture of {image.width} x {image.height} pixels, not 32 x 32")
        return np.asarray(image.convert("RGB"))


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is damaged or not what was expected: {error}")


def read_cifar10_batches(folder: Path) -> Content:
    """The extracted Toronto archive: five pickled training batches and one test batch.

    Raises:
        InputError: a batch is missing, damaged, or holds more than arrays and lists.
    """
    splits = {}
    for split, names in CIFAR10_BATCHES.items():
        files = [folder / name for name in names]
        count = sum(len(_load_batch(path)[1]) for path in files)
        splits[split] = Pictures(count, map(_load_batch, files))
    return Content(CIFAR10_CLASSES, splits)


def _load_batch(path: Path) -> Batch:
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="bytes").load()
        planes = np.asarray(content[b"data"], dtype=np.uint8).reshape(
            -1, 3, CIFAR10_SIZE, CIFAR10_SIZE
        )
        labels = np.asarray(content[b"labels"], dtype=np.int64)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise _unreadable(path, error) from error
    if len(planes) != len(labels):
        raise InputError(f"{path} holds {len(planes)} pictures but {len(labels)} labels")
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels  # (n, 32, 32, 3)


def _latin1_bytes(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into the older pickle protocols."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not allowed")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Loads NumPy arrays, bytes and plain containers; anything else could run code."""

    _CONSTRUCTORS: Mapping[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # type: ignore[dict-item]
        ("numeric", "_frombuffer"): np.empty(0).__reduce_ex__(5)[0],  # type: ignore[dict-item]
        ("_codecs", "encode"): _latin1_bytes,
    }

    def find_class(self, module: str, name: str) -> Any:
        for core in ("numpy.core.", "numpy._core."):  # before and since NumPy 2
            if module.startswith(core):
                module = module.removeprefix(core)
                break
        try:
            return self._CONSTRUCTORS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it") from None


def read_image_folder(folder: Path, image_size: int) -> Content:
    """`train/<class>/*` and `test/<class>/*`, each picture cut to its central square.

    Args:
        folder: Holds `train` and `test`; a class is named by its folder.
        image_size: Height and width of the decoded pictures in pixels.

    Raises:
        InputError: the classes differ between the splits, one is empty, or files that are no
            pictures, or too large, lie among them.
    """
    found = {split: _files_by_class(folder / split) for split in SPLITS}
    train, test = (list(found[split]) for split in SPLITS)
    if train != test:
        odd = ", ".join(sorted(set(train) ^ set(test)))
        raise InputError(f"{folder}: train and test must have the same classes, but not: {odd}")
    splits = {}
    for split, files in found.items():
        pairs = [(path, label) for label, paths in enumerate(files.values()) for path in paths]
        splits[split] = Pictures(len(pairs), _folder_batches(pairs, image_size))
    return Content(tuple(train), splits)


def _files_by_class(folder: Path) -> dict[str, list[Path]]:
    """Files of each class, both in order of name; hidden files and folders are left out."""
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = {path.name: picture_files(path) for path in classes}
    if empty := [name for name, paths in files.items() if not paths]:
        raise InputError(f"{folder}: no picture in the class folder {', '.join(empty)}")
    return files


def picture_files(folder: Path) -> list[Path]:
    """Every file below `folder` that is not hidden, in order of path."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )


def _folder_batches(pairs: Sequence[tuple[Path, int]], image_size: int) -> Iterator[Batch]:
    """Decode file after file; the unreadable ones are named together once all were tried."""
    failures = []
    for start in range(0, len(pairs), BATCH):
        chunk = pairs[start : start + BATCH]
        images = np.zeros((len(chunk), image_size, image_size, 3), np.uint8)
        for row, (path, _) in enumerate(chunk):
            try:
                images[row] = _central_square(path, image_size)
            except Exception as error:  # Pillow's decoders share no base class
                failures.append(f"{path} ({error})")
        yield images, np.array([label for _, label in chunk], np.int64)
    if failures:
        more = f" and {len(failures) - 5} more" if len(failures) > 5 else ""
        raise InputError(
            f"{len(failures)} files cannot be read as pictures; remove or mend them: "
            + "; ".join(failures[:5])
            + more
        )


def _central_square(path: Path, size: int) -> NDArray[np.uint8]:
    """Upright RGB pixels (size, size, 3): shorter side resized to `size`, centre kept."""
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        opened = Image.open(path, formats=PICTURE_FORMATS)
    with closing(opened) as image:
        if image.width * image.height > MAX_PIXELS:
            raise InputError(f"{image.width} x {image.height} pixels are too many to decode")
        image.draft(None, (2 * size, 2 * size))
        upright = ImageOps.exif_transpose(image)
        square = ImageOps.fit(_to_rgb(upright), (size, size), Image.Resampling.BICUBIC)
        return np.asarray(square)


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode: 16 bits are scaled, transparency shows white."""
    from PIL import Image

    if image.mode.startswith("I"):
        high = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(high.clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise InputError("floating-point pixels have no known range; save it with 8 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")

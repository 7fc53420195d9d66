"""Where images come from: CIFAR-10 and CIFAR-100, folders of images, the scenes.

`find_source` recognises a source without reading it; `Source.read` then fetches what is missing
and decodes it batch by batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle  # nosec B403: read by _ArrayUnpickler alone, which builds nothing but arrays
import re
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from labkit.files import (
    compute_checksum,
    compute_checksums,
    describe_unreadable,
    download,
    download_from_hub,
    hash_file,
    parse_json,
)
from labkit.images import is_system_file, list_images, open_image, to_rgb
from labkit.runtime import InputError, SourceError, as_one_line

Batch = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images (B, H, W, 3) RGB and their labels (B,)."""

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
CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR10_BATCHES = {
    "train": tuple(f"data_batch_{number}" for number in range(1, 6)),
    "test": ("test_batch",),
}
CIFAR10_SIZE = 32
CIFAR100_REPO = "uoft-cs/cifar100"
CIFAR100_FILES = {split: f"cifar100/{split}-00000-of-00001.parquet" for split in ("train", "test")}
SPLITS = ("train", "test")
SPLIT_NAMES = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
PARQUET_FOLDERS = ("", "plain_text", "data", "cifar100")
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label")
SCENE_COUNTS = {"train": 20_000, "test": 4_000}
SCENE_SEEDS = {"train": 0, "test": 1}
SCENES_HASHED = 200
BATCH = 1000
MAX_PIXELS = 89_000_000
NAMED = 5  # files that a message names; of further ones it says how many
TORONTO_TIMEOUT = 60.0

EXPECTED = (
    "'hub', 'toronto', 'cifar100', 'scenes' or a folder that holds one of: "
    "[data/ or plain_text/]train-*.parquet and test-*.parquet; "
    "[cifar-10-batches-py/]data_batch_1 to data_batch_5 and test_batch; "
    "train/<class>/* and test/<class>/* (or val/<class>/*)"
)


@dataclass(frozen=True, kw_only=True)
class Cifar10Sources:
    """Where CIFAR-10 is fetched from, and the checksums that prove what arrived.

    `hub_files` has, for `train` and `test`, the file in the repository and its digest.
    """

    hub_repo: str
    hub_revision: str
    hub_files: Mapping[str, tuple[str, str]] = field(hash=False)
    toronto_url: str
    toronto_digest: str


CIFAR10_SOURCES = Cifar10Sources(
    hub_repo="uoft-cs/cifar10",
    hub_revision="0b2714987fa478483af9968de7c934580d0bb9a2",
    hub_files={
        "train": (
            "plain_text/train-00000-of-00001.parquet",
            "sha256:8428b53a88a11ac374111006708df51469e315a22ac6d66470afd9c78d2ae883",
        ),
        "test": (
            "plain_text/test-00000-of-00001.parquet",
            "sha256:841389e6f2d64f28bf17310e430aebac20ec3ba611a3c5e231dc93c645ce84de",
        ),
    },
    toronto_url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    toronto_digest="md5:c58f30108f718f92721af3b95e74349a",
)
"""The one table of addresses, revisions and digests; a mirror or a test replaces it as a whole."""


@dataclass(frozen=True)
class Content:
    """What a source holds.

    Attributes:
        classes: class names in the order of the labels; None where the source names none.
        batches: for `train` and `test`, the decoded batches in a fixed order.
        counts: the number of images of a split, where it is known before decoding.
    """

    classes: tuple[str, ...] | None
    batches: Mapping[str, Iterable[Batch]]
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A recognised source of which nothing was decoded yet.

    Attributes:
        kind: the layout: `hub`, `toronto`, `cifar100`, `scenes`, `parquet`, `batches` or `images`.
        name: the name for titles.
        image_size: height and width of the decoded images in pixels.
        fingerprint: hex digits that change whenever the decoded pixels or the classes would, and
            only then: a copy of a folder has the same ones.
        read: fetches what is missing and gives the content.
        remarks: sentences that whoever reads the results should know.
    """

    kind: str
    name: str
    image_size: int
    fingerprint: str
    read: Callable[[], Content]
    remarks: tuple[str, ...] = ()


def find_source(source: str, *, cache: Path, image_size: int = CIFAR10_SIZE) -> Source:
    """Recognise `source` without decoding anything.

    Nothing is fetched either, except for `cifar100`: no checksum of it is known beforehand.

    Args:
        source: `hub`, `toronto`, `cifar100`, `scenes`, or the path of a folder.
        cache: where downloads and the checksums of image files are kept.
        image_size: height and width of the decoded images. Those of CIFAR-10 and CIFAR-100 are
            resized to it from 32.

    Raises:
        InputError: no such source, or an `image_size` that it cannot have.
        SourceError: a file or folder could not be read, or CIFAR-100 could not be had.
    """
    table, size = CIFAR10_SOURCES, CIFAR10_SIZE
    if source == "hub":
        digests = [digest for _, digest in table.hub_files.values()]
        found = Source(source, "CIFAR-10", size, _hash(digests), _read_hub)
    elif source == "toronto":
        read = partial(_read_toronto, cache / "downloads")
        found = Source(source, "CIFAR-10", size, _hash([table.toronto_digest]), read)
    elif source == "cifar100":
        found = _find_cifar100()
    elif source == "scenes":
        if image_size != size:
            raise InputError(
                f"image_size must be {size} for 'scenes', got {image_size}; "
                "the scenes are drawn in one size"
            )
        found = Source(source, "demo scenes", size, _hash_scenes(), _read_scenes)
    else:
        found = _find_folder(source, cache, image_size)
    return found if found.image_size == image_size else _resize_source(found, image_size)


def _resize_source(source: Source, image_size: int) -> Source:
    """`source` with its images resized, as `crop_square` does it."""

    def read() -> Content:
        content = source.read()
        batches = {s: _resize_batches(content.batches[s], image_size) for s in SPLITS}
        return replace(content, batches=batches)

    fingerprint = _hash([source.fingerprint, image_size])
    return replace(source, image_size=image_size, fingerprint=fingerprint, read=read)


def _resize_batches(batches: Iterable[Batch], image_size: int) -> Iterator[Batch]:
    for images, labels in batches:
        yield np.stack([crop_square(image, image_size) for image in images]), labels


def _find_folder(source: str, cache: Path, image_size: int) -> Source:
    try:
        root = Path(source).expanduser()
        root.stat()
    except (OSError, ValueError, RuntimeError) as error:  # also a zero byte, an unknown user
        raise _refuse_source(source, "no such folder") from error
    name = root.resolve().name

    for folder in (root / inner for inner in PARQUET_FOLDERS):
        names, files = {}, {}
        for split in SPLITS:
            names[split], files[split] = _choose_parquet(folder, split)
        if all(files.values()):
            marks = [f"{path.name} {hash_file(path)}" for s in SPLITS for path in files[s]]
            marks += [] if image_size == CIFAR10_SIZE else [str(image_size)]
            read = partial(_read_parquet, files, image_size)
            remarks = _describe_split(names["test"], "-*.parquet")
            return Source("parquet", name, image_size, _hash(marks), read, remarks)

    for folder in (root, root / CIFAR10_FOLDER):
        paths = {s: [folder / file for file in CIFAR10_BATCHES[s]] for s in SPLITS}
        if all(path.is_file() for s in SPLITS for path in paths[s]):
            marks = [hash_file(path) for s in SPLITS for path in paths[s]]
            read = partial(_read_cifar10_folder, paths)
            return Source("batches", name, CIFAR10_SIZE, _hash(marks), read)

    chosen = {split: _choose_folder(root, split) for split in SPLITS}
    if all(chosen.values()):
        return _find_image_folder(root, chosen, cache, image_size)

    raise _refuse_source(source, "nothing of that" if root.is_dir() else "no such folder")


def _refuse_source(source: str, holds: str) -> InputError:
    return InputError(f"data source must be {EXPECTED}; got {source!r}, which holds {holds}")


def _choose_folder(root: Path, split: str) -> str:
    """The name of the folder of a split in `root`; empty if there is none."""
    return next((name for name in SPLIT_NAMES[split] if (root / name).is_dir()), "")


def _choose_parquet(folder: Path, split: str) -> tuple[str, list[Path]]:
    """What a split is called in the parquet files of `folder`, and its files."""
    try:
        found = sorted(entry.name for entry in os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        found = []
    except OSError as error:
        raise describe_unreadable(folder, error) from error
    for name in SPLIT_NAMES[split]:
        if files := [folder / file for file in found if fnmatch(file, f"{name}-*.parquet")]:
            return name, files
    return "", []


def _describe_split(name: str, ending: str) -> tuple[str, ...]:
    """A remark where another split stands in for the test split."""
    if name == "test":
        return ()
    return (f"there is no test{ending}: {name}{ending} serves as the test split",)


def _hash(parts: Sequence[object]) -> str:
    text = "\n".join(map(str, parts))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


# ---------------------------------------------------------------- CIFAR-10


def _read_hub() -> Content:
    table = CIFAR10_SOURCES
    try:
        files = {
            split: [
                download_from_hub(
                    table.hub_repo,
                    filename,
                    revision=table.hub_revision,
                    digest=digest,
                    repo_type="dataset",
                )
            ]
            for split, (filename, digest) in table.hub_files.items()
        }
    except SourceError as error:
        raise _add_remedies("hub", "toronto", error) from error
    content = _read_parquet(files, CIFAR10_SIZE)
    return Content(content.classes or CIFAR10_CLASSES, content.batches, content.counts)


def _find_cifar100() -> Source:
    """CIFAR-100 as it is on the hub today, since no revision or checksum of it is known."""
    try:
        files = {
            split: [
                download_from_hub(
                    CIFAR100_REPO, filename, revision="main", digest=None, repo_type="dataset"
                )
            ]
            for split, filename in CIFAR100_FILES.items()
        }
    except SourceError as error:
        raise _add_remedies("cifar100", "hub (CIFAR-10)", error) from error
    remark = (
        f"CIFAR-100 is that of today's branch main of {CIFAR100_REPO}: no revision or checksum is "
        "pinned, so what arrived was not checked"
    )
    marks = [compute_checksum(path) for split in SPLITS for path in files[split]]
    read = partial(_read_parquet, files, CIFAR10_SIZE)
    return Source("cifar100", "CIFAR-100", CIFAR10_SIZE, _hash(marks), read, (remark,))


def _read_toronto(folder: Path) -> Content:
    table = CIFAR10_SOURCES
    try:
        archive = download(
            table.toronto_url,
            folder / table.toronto_url.rpartition("/")[2],
            digest=table.toronto_digest,
            timeout=TORONTO_TIMEOUT,
        )
    except SourceError as error:
        raise _add_remedies("toronto", "hub", error) from error
    return Content(
        CIFAR10_CLASSES, {split: _read_archive(archive, CIFAR10_BATCHES[split]) for split in SPLITS}
    )


def _add_remedies(source: str, other: str, error: SourceError) -> SourceError:
    return SourceError(
        f"data source {source!r} failed: {str(error).rstrip('.')}. "
        f"Mend that and run again, or try --data {other}, or give a folder (--data PATH), "
        "or choose the embedded images (--data scenes, profile demo)."
    )


def _read_archive(archive: Path, names: Sequence[str]) -> Iterator[Batch]:
    """Batches straight from the tar file: nothing is extracted to the disk."""
    try:
        with tarfile.open(archive) as tar:
            for name in names:
                file = tar.extractfile(f"{CIFAR10_FOLDER}/{name}")
                if file is None:
                    raise KeyError(f"{name} is no file")
                yield read_batch(file, name)
    except (tarfile.TarError, KeyError, OSError, EOFError, zlib.error) as error:
        raise SourceError(
            f"could not read {archive}: {error}. Delete it and run again to download it anew."
        ) from error


def _read_cifar10_folder(paths: Mapping[str, Sequence[Path]]) -> Content:
    def read_files(split: str) -> Iterator[Batch]:
        for path in paths[split]:
            with path.open("rb") as file:
                yield read_batch(file, str(path))

    return Content(CIFAR10_CLASSES, {split: read_files(split) for split in SPLITS})


def read_batch(file: IO[bytes], name: str) -> Batch:
    """Images (B, 32, 32, 3) and labels (B,) of one pickled batch of CIFAR-10.

    Raises:
        InputError: the file is damaged, or holds more than arrays and lists.
    """
    try:
        content = _ArrayUnpickler(file, encoding="bytes").load()
        planes = _to_numbers(content[b"data"], np.uint8)
        planes = planes.reshape(-1, 3, CIFAR10_SIZE, CIFAR10_SIZE)
        labels = _to_numbers(content[b"labels"], np.int64)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise _describe_damage(name, error) from error
    if len(planes) != len(labels):
        raise InputError(f"{name} holds {len(planes)} images but {len(labels)} labels")
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels  # (B, 32, 32, 3)


def _to_numbers(values: object, dtype: type[np.generic]) -> NDArray[Any]:
    """An array of `dtype` of what was pickled: an array or a list of numbers."""
    return np.asarray(values.values if isinstance(values, _Array) else values, dtype=dtype)


def _describe_damage(name: object, error: Exception) -> InputError:
    return InputError(f"{name} is damaged or not what was expected: {error}")


def _encode_latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into the older pickle protocols."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not allowed")
    return text.encode("latin1")


class _Dtype:
    """Stands for a pickled `numpy.dtype`: the name of a plain type of numbers."""

    _ITEM_TYPES: Mapping[object, type[np.generic]] = {
        "u1": np.uint8,
        "i1": np.int8,
        "i8": np.int64,
        "int64": np.int64,
    }

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or code not in self._ITEM_TYPES:
            raise pickle.UnpicklingError(f"arrays of {code!r} are not allowed in it")
        self.type = self._ITEM_TYPES[code]

    def __setstate__(self, state: tuple[object, ...]) -> None:
        """Check what NumPy adds about byte order and fields: plain types have none."""
        if state[1] == ">" or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("an array in it is not of plain numbers")


class _Array:
    """Stands for a pickled `numpy.ndarray`, so that no constructor of NumPy meets the file."""

    def __init__(self, *_: object) -> None:
        self.values: NDArray[Any] = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[object, ...]) -> None:
        """Read the numbers of (version, shape, dtype, is_fortran, bytes)."""
        _, shape, dtype, is_fortran, data = state
        self.values = _read_numbers(data, dtype, shape, "F" if is_fortran else "C")

    @classmethod
    def from_buffer(cls, data: object, dtype: object, shape: object, order: object) -> _Array:
        """Read an array that was pickled by protocol 5."""
        array = cls()
        array.values = _read_numbers(data, dtype, shape, order)
        return array


def _read_numbers(data: object, dtype: object, shape: object, order: object) -> NDArray[Any]:
    if (
        not isinstance(data, bytes | bytearray)
        or not isinstance(dtype, _Dtype)
        or not isinstance(shape, tuple)
        or order not in ("C", "F")
    ):
        raise pickle.UnpicklingError("an array in it is not of plain numbers")
    numbers = np.frombuffer(data, dtype.type)  # checks the length
    return numbers.reshape(shape, order="F" if order == "F" else "C")


class _ArrayUnpickler(pickle.Unpickler):
    """Loads arrays of plain numbers, bytes and containers; anything else could run code."""

    _CONSTRUCTORS: Mapping[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("multiarray", "_reconstruct"): _Array,
        ("numeric", "_frombuffer"): _Array.from_buffer,
        ("_codecs", "encode"): _encode_latin1,
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


# ---------------------------------------------------------------- parquet


def _read_parquet(files: Mapping[str, Sequence[Path]], image_size: int) -> Content:
    """Parquet files with an encoded image and its class in each row.

    The image is in the field `bytes` of the column `img`, as in CIFAR-10 and CIFAR-100, or
    `image`; its class is in the column `label`, `labels` or `fine_label`. An image of `img` must
    have the size that was asked for, or that of CIFAR-10; the central square of an image is
    resized to the size that was asked for.
    Class names come from the `huggingface` metadata of the first training file.

    Raises:
        InputError: a file is missing among those of a split, damaged, or of another layout.
    """
    counts, classes = {}, None
    for split in SPLITS:
        _check_parts(files[split])
        schemas = [_check_parquet(path) for path in files[split]]
        counts[split] = sum(count for count, _ in schemas)
        classes = classes or schemas[0][1]
    batches = {split: _decode_parquet(files[split], image_size) for split in SPLITS}
    return Content(classes, batches, counts)


def _check_parts(files: Sequence[Path]) -> None:
    """Raise InputError unless all files are there of which their names give the number."""
    match = re.search(r"-of-(\d{5})", files[0].name)
    if match and int(match[1]) != len(files):
        raise InputError(
            f"{files[0].parent} holds {len(files)} of the {int(match[1])} files that belong to "
            f"{files[0].name}; copy the missing ones"
        )


def _check_parquet(path: Path) -> tuple[int, tuple[str, ...] | None]:
    """The number of rows of one file, and the class names in its metadata if there are any."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as parquet:
            schema = parquet.schema_arrow
            image_column, label_column = _choose_columns(schema.names)
            labels = parquet.read(columns=[label_column]).column(label_column)
    except Exception as error:  # what the readers of parquet raise has no common base
        raise _describe_damage(path, error) from error
    if not pa.types.is_integer(labels.type) or labels.null_count:
        raise InputError(f"{path}: column {label_column!r} must hold whole numbers without gaps")
    column = schema.get_field_index(image_column)
    kind = schema.types[column] if column >= 0 else pa.null()
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise InputError(
            f"{path}: column {image_column!r} must hold encoded images in a field 'bytes'"
        )
    try:
        features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return len(labels), tuple(map(str, features[label_column]["names"]))
    except (KeyError, TypeError, ValueError):
        return len(labels), None


def _choose_columns(names: Sequence[str]) -> tuple[str, str]:
    """The names of the columns of images and of labels; the first choice where there is none."""
    image, label = (
        next((choice for choice in choices if choice in names), choices[0])
        for choices in (IMAGE_COLUMNS, LABEL_COLUMNS)
    )
    return image, label


def _decode_parquet(files: Sequence[Path], image_size: int) -> Iterator[Batch]:
    import pyarrow.parquet as pq

    for path in files:
        try:
            with pq.ParquetFile(path) as parquet:
                image_column, label_column = _choose_columns(parquet.schema_arrow.names)
                has_any_size = image_column != IMAGE_COLUMNS[0]
                for rows in parquet.iter_batches(BATCH, columns=[image_column, label_column]):
                    cells = rows.column(image_column).field("bytes").to_pylist()
                    images = np.stack([_decode_cell(c, image_size, has_any_size) for c in cells])
                    yield images, rows.column(label_column).to_numpy().astype(np.int64)
        except Exception as error:  # Pillow's decoders share no base class
            raise _describe_damage(path, error) from error


def _decode_cell(encoded: bytes, image_size: int, has_any_size: bool) -> NDArray[np.uint8]:
    image = _decode_image(encoded, "image")
    squares = [(size, size) for size in (image_size, CIFAR10_SIZE)]
    if not has_any_size and image.shape[:2] not in squares:
        raise InputError(
            f"an image of {image.shape[1]} x {image.shape[0]} pixels, "
            f"not {image_size} x {image_size}"
        )
    return crop_square(image, image_size)


# ---------------------------------------------------------------- folders of images


def _find_image_folder(
    root: Path, chosen: Mapping[str, str], cache: Path, image_size: int
) -> Source:
    """`<split>/<class>/*`, the central square of each image.

    Args:
        root: the folder.
        chosen: the name of the folder of each split.
        cache: where the checksums of the files are remembered.
        image_size: height and width of the decoded images.

    Raises:
        InputError: the classes differ between the splits, or one has no image.
        SourceError: a folder or file could not be read.
    """
    root = root.absolute()
    files: dict[str, dict[str, list[Path]]] = {}
    others: list[Path] = []
    strays: list[Path] = []
    for split in SPLITS:
        folder = root / chosen[split]
        images, beside = list_images(folder, recursive=False)
        files[split], inside = _list_classes(folder)
        others += beside + inside
        strays += images
    train, test = (list(files[split]) for split in SPLITS)
    if train != test:
        odd = ", ".join(sorted(set(train) ^ set(test)))
        raise InputError(
            f"{root}: {chosen['train']} and {chosen['test']} must have the same classes, "
            f"but not: {odd}"
        )
    remarks = _describe_split(chosen["test"], "/")
    for paths, reason in (
        (others, "are no images"),
        (strays, "lie beside the class folders, not in one"),
    ):
        if paths:
            paths.sort(key=lambda path: (is_system_file(path.name), path.parts))
            names = _name_some([as_one_line(path.relative_to(root).as_posix()) for path in paths])
            remarks += (f"left out {len(paths)} files that {reason}: {names}",)
    labelled = {
        split: [(path, label) for label, name in enumerate(train) for path in files[split][name]]
        for split in SPLITS
    }
    paths = [path for split in SPLITS for path, _ in labelled[split]]
    hints = cache / "checksums" / f"{_hash([root])[:16]}.json"
    digests = iter(compute_checksums(paths, hints=hints))
    marks = [json.dumps([image_size, train])]
    for split in SPLITS:
        for path, label in labelled[split]:
            name = path.relative_to(root / chosen[split]).as_posix()
            marks.append(json.dumps([split, label, name, next(digests)]))
    read = partial(_read_image_folder, tuple(train), labelled, image_size)
    return Source("images", root.resolve().name, image_size, _hash(marks), read, remarks)


def _list_classes(folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """Image files of each class, both in order of name; and the other files in their folders."""
    files: dict[str, list[Path]] = {}
    others: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not is_system_file(path.name):
            files[path.name], rest = list_images(path)
            others += rest
            if not files[path.name]:
                names = _name_some([as_one_line(other.name) for other in rest])
                holds = f", only {names}" if rest else ""
                raise InputError(f"{folder}: no image in the class folder {path.name}{holds}")
    return files, others


def _name_some(names: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return separator.join(names[:NAMED]) + more


def _read_image_folder(
    classes: tuple[str, ...], labelled: Mapping[str, Sequence[tuple[Path, int]]], image_size: int
) -> Content:
    return Content(
        classes,
        {split: _decode_files(labelled[split], image_size) for split in SPLITS},
        {split: len(labelled[split]) for split in SPLITS},
    )


def _decode_files(labelled: Sequence[tuple[Path, int]], image_size: int) -> Iterator[Batch]:
    """Decode file after file; the unreadable ones are named together once all were tried."""
    failures = []
    for start in range(0, len(labelled), BATCH):
        chunk = labelled[start : start + BATCH]
        images = np.zeros((len(chunk), image_size, image_size, 3), np.uint8)
        for row, (path, _) in enumerate(chunk):
            try:
                images[row] = crop_square(_decode_image(path, path.name), image_size)
            except Exception as error:  # Pillow's decoders share no base class
                failures.append(f"{path} ({error})")
        yield images, np.array([label for _, label in chunk], np.int64)
    if failures:
        raise InputError(
            f"{len(failures)} files cannot be read as images; remove or mend them: "
            + _name_some(failures, "; ")
        )


def _decode_image(file: bytes | Path, label: str) -> NDArray[np.uint8]:
    """The pixels (H, W, 3) of an image file, upright."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what is checked here or harmless
        with open_image(file, label) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(f"{image.width} x {image.height} pixels are too many to decode")
            return to_rgb(image, label, max_pixels=MAX_PIXELS)


def crop_square(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The central square of an image (H, W, 3), resized to (size, size, 3).

    Example:
        >>> crop_square(np.zeros((40, 60, 3), np.uint8), 32).shape
        (32, 32, 3)
    """
    from PIL import Image, ImageOps

    if image.shape[:2] == (size, size):
        return image
    square = ImageOps.fit(Image.fromarray(image), (size, size), Image.Resampling.BICUBIC)
    return np.array(square)


# ---------------------------------------------------------------- scenes


def _read_scenes() -> Content:
    from labkit.scenes import SCENE_CLASSES

    return Content(SCENE_CLASSES, {split: _draw_scenes(split) for split in SPLITS}, SCENE_COUNTS)


def _draw_scenes(split: str) -> Iterator[Batch]:
    from labkit.scenes import make_classification_scenes

    for start in range(0, SCENE_COUNTS[split], BATCH):
        count = min(BATCH, SCENE_COUNTS[split] - start)
        yield make_classification_scenes(count, seed=SCENE_SEEDS[split], start=start)


def _hash_scenes() -> str:
    """A hash of the first images, so that a cache never outlives the code that draws them."""
    from labkit.scenes import make_classification_scenes

    digest = hashlib.sha256(_hash([SCENE_COUNTS, SCENE_SEEDS]).encode())
    for split in SPLITS:
        for array in make_classification_scenes(SCENES_HASHED, seed=SCENE_SEEDS[split]):
            digest.update(array.tobytes())
    return digest.hexdigest()

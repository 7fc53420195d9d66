"""Where images come from: CIFAR-10 (hub, Toronto, a folder), folders of images, the scenes.

`find_source` recognises a source without reading it; `Source.read` then fetches what is missing
and decodes it batch by batch.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from labkit.files import compute_checksum, download, download_from_hub
from labkit.images import to_rgb
from labkit.runtime import InputError, SourceError

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
SPLITS = ("train", "test")
SCENE_COUNTS = {"train": 20_000, "test": 4_000}
SCENE_SEEDS = {"train": 0, "test": 1}
SCENES_HASHED = 200
BATCH = 1000
MAX_PIXELS = 89_000_000
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
TORONTO_TIMEOUT = 60.0

EXPECTED = (
    "'hub', 'toronto', 'scenes' or a folder that holds one of: "
    "[plain_text/]train-*.parquet and test-*.parquet; "
    "[cifar-10-batches-py/]data_batch_1 to data_batch_5 and test_batch; "
    "train/<class>/* and test/<class>/*"
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
        kind: the layout: `hub`, `toronto`, `scenes`, `parquet`, `batches` or `images`.
        name: the name for titles.
        image_size: height and width of the decoded images in pixels.
        fingerprint: hex digits that change whenever the decoded pixels would.
        read: fetches what is missing and gives the content.
    """

    kind: str
    name: str
    image_size: int
    fingerprint: str
    read: Callable[[], Content]


def find_source(source: str, *, cache: Path, image_size: int = CIFAR10_SIZE) -> Source:
    """Recognise `source` without fetching or decoding anything.

    Args:
        source: `hub`, `toronto`, `scenes`, or the path of a folder.
        cache: where downloads are kept.
        image_size: height and width of the decoded images, for a folder of image files.

    Raises:
        InputError: no such source, or an `image_size` that it cannot have.
    """
    table = CIFAR10_SOURCES
    if source == "hub":
        digests = [digest for _, digest in table.hub_files.values()]
        origin = Source(source, "CIFAR-10", CIFAR10_SIZE, _hash(digests), _read_hub)
    elif source == "toronto":
        read = partial(_read_toronto, cache / "downloads")
        origin = Source(source, "CIFAR-10", CIFAR10_SIZE, _hash([table.toronto_digest]), read)
    elif source == "scenes":
        origin = Source(source, "demo scenes", CIFAR10_SIZE, _hash_scenes(), _read_scenes)
    else:
        origin = _find_folder(source, image_size)
    if image_size != origin.image_size:
        raise InputError(
            f"image_size must be {CIFAR10_SIZE} for {source!r}, got {image_size}; "
            "only the images of an image folder can have another size"
        )
    return origin


def _find_folder(source: str, image_size: int) -> Source:
    root = Path(source).expanduser()
    name = root.resolve().name

    for folder in (root, root / "plain_text"):
        files = {split: sorted(folder.glob(f"{split}-*.parquet")) for split in SPLITS}
        if all(files.values()):
            marks = [f"{path.name} {compute_checksum(path)}" for s in SPLITS for path in files[s]]
            read = partial(_read_parquet, files)
            return Source("parquet", name, CIFAR10_SIZE, _hash(marks), read)

    for folder in (root, root / CIFAR10_FOLDER):
        paths = {s: [folder / file for file in CIFAR10_BATCHES[s]] for s in SPLITS}
        if all(path.is_file() for s in SPLITS for path in paths[s]):
            marks = [compute_checksum(path) for s in SPLITS for path in paths[s]]
            read = partial(_read_cifar10_folder, paths)
            return Source("batches", name, CIFAR10_SIZE, _hash(marks), read)

    if all((root / split).is_dir() for split in SPLITS):
        marks = [str(image_size)]
        for path in (path for split in SPLITS for path in _list_files(root / split)):
            status, relative = path.stat(), path.relative_to(root).as_posix()
            marks.append(f"{relative} {status.st_size} {status.st_mtime_ns}")
        read = partial(_read_image_folder, root, image_size)
        return Source("images", name, image_size, _hash(marks), read)

    holds = "nothing of that" if root.is_dir() else "no such folder"
    raise InputError(f"data source must be {EXPECTED}; got {source!r}, which holds {holds}")


def _hash(parts: Sequence[object]) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


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
    content = _read_parquet(files)
    return Content(content.classes or CIFAR10_CLASSES, content.batches, content.counts)


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
        planes = np.asarray(content[b"data"], dtype=np.uint8)
        planes = planes.reshape(-1, 3, CIFAR10_SIZE, CIFAR10_SIZE)
        labels = np.asarray(content[b"labels"], dtype=np.int64)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise _describe_damage(name, error) from error
    if len(planes) != len(labels):
        raise InputError(f"{name} holds {len(planes)} images but {len(labels)} labels")
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels  # (B, 32, 32, 3)


def _describe_damage(name: object, error: Exception) -> InputError:
    return InputError(f"{name} is damaged or not what was expected: {error}")


def _encode_latin1(text: str, encoding: str) -> bytes:
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


def _read_parquet(files: Mapping[str, Sequence[Path]]) -> Content:
    """Parquet files with an encoded image in `img.bytes` and its class in `label`.

    Class names come from the `huggingface` metadata of the first training file.
    """
    counts, classes = {}, None
    for split in SPLITS:
        schemas = [_check_parquet(path) for path in files[split]]
        counts[split] = sum(count for count, _ in schemas)
        classes = classes or schemas[0][1]
    return Content(classes, {split: _decode_parquet(files[split]) for split in SPLITS}, counts)


def _check_parquet(path: Path) -> tuple[int, tuple[str, ...] | None]:
    """The number of rows of one file, and the class names in its metadata if there are any."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as parquet:
            schema = parquet.schema_arrow
            labels = parquet.read(columns=["label"]).column("label")
    except (OSError, ValueError, KeyError) as error:
        raise _describe_damage(path, error) from error
    if not pa.types.is_integer(labels.type) or labels.null_count:
        raise InputError(f"{path}: column 'label' must hold whole numbers without gaps")
    column = schema.get_field_index("img")
    kind = schema.types[column] if column >= 0 else pa.null()
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise InputError(f"{path}: column 'img' must hold encoded images in a field 'bytes'")
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return len(labels), tuple(map(str, features["label"]["names"]))
    except (KeyError, TypeError, ValueError):
        return len(labels), None


def _decode_parquet(files: Sequence[Path]) -> Iterator[Batch]:
    import pyarrow.parquet as pq

    for path in files:
        try:
            with pq.ParquetFile(path) as parquet:
                for rows in parquet.iter_batches(BATCH, columns=["img", "label"]):
                    encoded = rows.column("img").field("bytes").to_pylist()
                    images = np.stack([_decode_cifar10_image(item) for item in encoded])
                    yield images, rows.column("label").to_numpy().astype(np.int64)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _describe_damage(path, error) from error


def _decode_cifar10_image(encoded: bytes) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG")) as image:
        if image.size != (CIFAR10_SIZE, CIFAR10_SIZE):
            raise InputError(f"an image of {image.width} x {image.height} pixels, not 32 x 32")
        return to_rgb(image)


# ---------------------------------------------------------------- folders of images


def _read_image_folder(folder: Path, image_size: int) -> Content:
    """`train/<class>/*` and `test/<class>/*`, the central square of each image.

    Raises:
        InputError: the classes differ between the splits, or one is empty.
    """
    files = {split: _list_classes(folder / split) for split in SPLITS}
    train, test = (list(files[split]) for split in SPLITS)
    if train != test:
        odd = ", ".join(sorted(set(train) ^ set(test)))
        raise InputError(f"{folder}: train and test must have the same classes, but not: {odd}")
    labelled = {
        split: [(path, label) for label, name in enumerate(train) for path in files[split][name]]
        for split in SPLITS
    }
    return Content(
        tuple(train),
        {split: _decode_files(labelled[split], image_size) for split in SPLITS},
        {split: len(labelled[split]) for split in SPLITS},
    )


def _list_classes(folder: Path) -> dict[str, list[Path]]:
    """Files of each class, both in order of name; hidden files and folders are left out."""
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = {path.name: _list_files(path) for path in classes}
    if empty := [name for name, paths in files.items() if not paths]:
        raise InputError(f"{folder}: no image in the class folder {', '.join(empty)}")
    return files


def _list_files(folder: Path) -> list[Path]:
    """Every file below `folder` that is not hidden, in order of path."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )


def _decode_files(labelled: Sequence[tuple[Path, int]], image_size: int) -> Iterator[Batch]:
    """Decode file after file; the unreadable ones are named together once all were tried."""
    failures = []
    for start in range(0, len(labelled), BATCH):
        chunk = labelled[start : start + BATCH]
        images = np.zeros((len(chunk), image_size, image_size, 3), np.uint8)
        for row, (path, _) in enumerate(chunk):
            try:
                images[row] = crop_square(_decode_file(path), image_size)
            except Exception as error:  # Pillow's decoders share no base class
                failures.append(f"{path} ({error})")
        yield images, np.array([label for _, label in chunk], np.int64)
    if failures:
        more = f" and {len(failures) - 5} more" if len(failures) > 5 else ""
        raise InputError(
            f"{len(failures)} files cannot be read as images; remove or mend them: "
            + "; ".join(failures[:5])
            + more
        )


def _decode_file(path: Path) -> NDArray[np.uint8]:
    """The pixels (H, W, 3) of an image file, upright."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what is checked here or harmless
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(f"{image.width} x {image.height} pixels are too many to decode")
            return to_rgb(image, path.name, max_pixels=MAX_PIXELS)


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

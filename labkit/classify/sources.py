"""Where pictures come from: the hub, Toronto, the embedded scenes, or a folder."""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from labkit.classify.readers import (
    BATCH,
    CIFAR10_BATCHES,
    CIFAR10_CLASSES,
    CIFAR10_SIZE,
    SPLITS,
    Batch,
    Content,
    Pictures,
    picture_files,
    read_cifar10_batches,
    read_image_folder,
    read_parquet,
)
from labkit.files import compute_checksum, download, download_from_hub
from labkit.runtime import InputError, SourceError


@dataclass(frozen=True, kw_only=True)
class Pins:
    """Where CIFAR-10 is fetched from, and the checksums that prove what arrived.

    `hub_files` has, for `train` and `test`, the file in the repository and its digest.
    """

    hub_repo: str
    hub_revision: str
    hub_files: Mapping[str, tuple[str, str]] = field(hash=False)
    toronto_url: str
    toronto_digest: str


PINS = Pins(
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
"""The one table of pins of this package; a mirror or a test replaces it as a whole."""

SCENE_COUNTS = {"train": 20_000, "test": 4_000}
SCENE_SEEDS = {"train": 0, "test": 1}
TORONTO_TIMEOUT = 60.0

EXPECTED = (
    "'hub', 'toronto', 'scenes' or a folder that holds one of: "
    "[plain_text/]train-*.parquet and test-*.parquet; "
    "[cifar-10-batches-py/]data_batch_1 to data_batch_5 and test_batch; "
    "train/<class>/* and test/<class>/*"
)


@dataclass(frozen=True)
class Origin:
    """A recognised source whose pixels were not read yet.

    `kind` names the layout, `fingerprint` (hex) changes whenever the decoded pixels would, and
    `open` fetches what is missing and gives the content for the length of a block.
    """

    source: str
    kind: str
    name: str
    image_size: int
    fingerprint: str
    open: Callable[[], AbstractContextManager[Content]]


def find_origin(source: str, *, cache: Path, image_size: int) -> Origin:
    """Recognise `source` without fetching or decoding anything.

    Args:
        source: `hub`, `toronto`, `scenes`, or the path of a folder.
        cache: Where downloads are kept.
        image_size: Height and width of decoded pictures, for a folder of image files.

    Raises:
        InputError: no such source, or an `image_size` that it cannot have.
    """
    local = None if source in ("hub", "toronto", "scenes") else _find_folder(source, image_size)
    if image_size != CIFAR10_SIZE and (local is None or local.kind != "images"):
        raise InputError(
            f"image_size must be {CIFAR10_SIZE} for {source!r}, got {image_size}; "
            "only the pictures of an image folder can have another size"
        )
    if local:
        return local
    if source == "hub":
        digests = [digest for _, digest in PINS.hub_files.values()]
        return Origin(source, source, "CIFAR-10", CIFAR10_SIZE, _hash(digests), _open_hub)
    if source == "toronto":
        opener = partial(_open_toronto, cache / "downloads")
        fingerprint = _hash([PINS.toronto_digest])
        return Origin(source, source, "CIFAR-10", CIFAR10_SIZE, fingerprint, opener)
    return Origin(source, source, "demo scenes", CIFAR10_SIZE, _scenes_hash(), _open_scenes)


def _hash(parts: Sequence[object]) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _find_folder(source: str, image_size: int) -> Origin:
    root = Path(source).expanduser()
    name = root.resolve().name

    for folder in (root, root / "plain_text"):
        files = {split: sorted(folder.glob(f"{split}-*.parquet")) for split in SPLITS}
        if all(files.values()):
            hashes = [
                f"{path.name} {compute_checksum(path)}" for split in SPLITS for path in files[split]
            ]
            opener = partial(_opened, partial(read_parquet, files))
            return Origin(source, "parquet", name, CIFAR10_SIZE, _hash(hashes), opener)

    for folder in (root, root / "cifar-10-batches-py"):
        paths = [folder / file for split in SPLITS for file in CIFAR10_BATCHES[split]]
        if all(path.is_file() for path in paths):
            opener = partial(_opened, partial(read_cifar10_batches, folder))
            hashes = list(map(compute_checksum, paths))
            return Origin(source, "batches", name, CIFAR10_SIZE, _hash(hashes), opener)

    if all((root / split).is_dir() for split in SPLITS):
        marks = [str(image_size)]
        for split in SPLITS:
            for path in picture_files(root / split):
                status = path.stat()
                relative = path.relative_to(root).as_posix()
                marks.append(f"{relative} {status.st_size} {status.st_mtime_ns}")
        opener = partial(_opened, partial(read_image_folder, root, image_size))
        return Origin(source, "images", name, image_size, _hash(marks), opener)

    found = "nothing of that" if root.is_dir() else "no such folder"
    raise InputError(f"data source must be {EXPECTED}; got {source!r}, which holds {found}")


@contextmanager
def _opened(read: Callable[[], Content]) -> Iterator[Content]:
    yield read()


@contextmanager
def _open_hub() -> Iterator[Content]:
    pins = PINS
    try:
        files = {
            split: [
                download_from_hub(
                    pins.hub_repo,
                    filename,
                    revision=pins.hub_revision,
                    digest=digest,
                    repo_type="dataset",
                )
            ]
            for split, (filename, digest) in pins.hub_files.items()
        }
    except SourceError as error:
        raise _with_remedies("hub", "toronto", error) from error
    yield read_parquet(files, CIFAR10_CLASSES)


@contextmanager
def _open_toronto(folder: Path) -> Iterator[Content]:
    pins = PINS
    try:
        archive = download(
            pins.toronto_url,
            folder / pins.toronto_url.rpartition("/")[2],
            digest=pins.toronto_digest,
            timeout=TORONTO_TIMEOUT,
        )
    except SourceError as error:
        raise _with_remedies("toronto", "hub", error) from error
    with tempfile.TemporaryDirectory(dir=folder) as extracted:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(extracted, filter="data")
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise SourceError(f"could not extract {archive} into {folder}: {error}") from error
        yield read_cifar10_batches(Path(extracted) / "cifar-10-batches-py")


def _with_remedies(source: str, other: str, error: SourceError) -> SourceError:
    return SourceError(
        f"data source {source!r} failed: {str(error).rstrip('.')}. "
        f"Mend that and run again, or try --data {other}, or give a folder (--data PATH), "
        "or choose the embedded pictures (--data scenes, profile demo)."
    )


@contextmanager
def _open_scenes() -> Iterator[Content]:
    from labkit.scenes import SCENE_CLASSES

    yield Content(
        SCENE_CLASSES,
        {split: Pictures(SCENE_COUNTS[split], _scene_batches(split)) for split in SPLITS},
    )


def _scene_batches(split: str) -> Iterator[Batch]:
    from labkit.scenes import make_classification_scenes

    total = SCENE_COUNTS[split]
    for start in range(0, total, BATCH):
        count = min(BATCH, total - start)
        yield make_classification_scenes(count, seed=SCENE_SEEDS[split], start=start)


def _scenes_hash() -> str:
    """Changes with the generator's code, so that a cache never outlives it."""
    from labkit import drawing, scenes

    code = [compute_checksum(Path(str(module.__file__))) for module in (drawing, scenes)]
    return _hash([*code, SCENE_COUNTS, SCENE_SEEDS])

"""CIFAR-10 and other images from every source."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, features

from labkit.classify import data, sources
from labkit.classify.data import as_split, load_data
from labkit.classify.sources import crop_square
from labkit.images import load_image
from labkit.runtime import InputError, SourceError
from tests.classify.small_cifar import (
    HUB_FILES,
    TEST,
    TEST_PARQUET,
    TRAIN,
    TRAIN_PARQUET,
    archive,
    assert_is_the_data,
    batch_files,
    parquet,
    png,
    random_images,
    tar_gz,
)
from tests.loopback import Fault, LoopbackHub, LoopbackServer

COMMIT = "c1fa" * 10


@pytest.fixture
def hub_paths(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The stand-in hub with a small CIFAR-10, pinned; the paths that faults go to."""
    bodies = {"train": TRAIN_PARQUET, "test": TEST_PARQUET}
    monkeypatch.setattr(sources, "CIFAR10_SOURCES", small_sources(bodies))
    return {
        split: hub.add("lab/cifar", HUB_FILES[split], body, repo_type="dataset", revision=COMMIT)
        for split, body in bodies.items()
    }


def small_sources(bodies: dict[str, bytes]) -> sources.Cifar10Sources:
    return replace(
        sources.CIFAR10_SOURCES,
        hub_repo="lab/cifar",
        hub_revision=COMMIT,
        hub_files={
            split: (HUB_FILES[split], "sha256:" + hashlib.sha256(body).hexdigest())
            for split, body in bodies.items()
        },
    )


def serve_toronto(loopback: LoopbackServer, monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    monkeypatch.setattr(sources, "TORONTO_TIMEOUT", 0.1)
    table = replace(
        sources.CIFAR10_SOURCES,
        toronto_url=loopback.add("/cifar.tar.gz", body),
        toronto_digest="md5:" + hashlib.md5(body).hexdigest(),
    )
    monkeypatch.setattr(sources, "CIFAR10_SOURCES", table)


# ---------------------------------------------------------------- hub


def test_hub_end_to_end(hub_paths: dict[str, str]) -> None:
    loaded = load_data("hub")
    assert_is_the_data(loaded)
    assert (loaded.source, loaded.name) == ("hub", "CIFAR-10")
    assert loaded.classes == sources.CIFAR10_CLASSES


def test_second_call_needs_no_network(
    hub: LoopbackHub, hub_paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_data("hub")
    asked = len(hub.server.requests)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    again = load_data("hub")
    assert_is_the_data(again)
    assert again.fingerprint == first.fingerprint
    assert len(hub.server.requests) == asked


@pytest.mark.parametrize("fault", [Fault.WRONG_BYTES, Fault.HTML_PAGE, Fault.STALL])
def test_failing_hub_is_named_with_remedies_and_recovers(
    hub: LoopbackHub, hub_paths: dict[str, str], labkit_cache: Path, fault: Fault
) -> None:
    hub.server.fail(hub_paths["test"], fault)
    with pytest.raises(SourceError) as caught:
        load_data("hub")
    for part in ("'hub'", "lab/cifar", "--data toronto", "--data PATH", "--data scenes"):
        assert part in str(caught.value)
    assert not list(labkit_cache.rglob("*.npy"))
    assert_is_the_data(load_data("hub"))


def test_failing_source_is_never_replaced_by_another(
    hub: LoopbackHub, hub_paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_toronto(hub.server, monkeypatch, archive())
    hub.server.fail("/cifar.tar.gz", Fault.HTML_PAGE)
    with pytest.raises(SourceError, match="data source 'toronto' failed"):
        load_data("toronto")
    assert {request.path for request in hub.server.requests} == {"/cifar.tar.gz"}


@pytest.mark.slow
def test_hub_address_comes_from_the_environment(hub: LoopbackHub, tmp_path: Path) -> None:
    bodies = {"train": TRAIN_PARQUET, "test": TEST_PARQUET}
    for split, body in bodies.items():
        hub.add("lab/cifar", HUB_FILES[split], body, repo_type="dataset", revision=COMMIT)
    script = tmp_path / "load.py"
    script.write_text(
        "from labkit.classify import data, sources\n"
        f"sources.CIFAR10_SOURCES = sources.{small_sources(bodies)!r}\n"
        "print(len(data.load_data('hub').train))\n"
    )
    environment = os.environ | {
        "HF_ENDPOINT": hub.server.url,
        "HF_HOME": str(tmp_path / "hf"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "40\n", done.stderr


# ---------------------------------------------------------------- Toronto


def test_toronto_end_to_end(
    loopback: LoopbackServer, monkeypatch: pytest.MonkeyPatch, labkit_cache: Path
) -> None:
    serve_toronto(loopback, monkeypatch, archive())
    for _ in range(2):
        loaded = load_data("toronto")
        assert_is_the_data(loaded)
    assert (loaded.source, loaded.name) == ("toronto", "CIFAR-10")
    assert len(loopback.requests) == 1
    kept = sorted(p.name for p in (labkit_cache / "downloads").iterdir() if p.name[0] != ".")
    assert kept == ["cifar.tar.gz"]


@pytest.mark.parametrize("fault", [Fault.STALL, Fault.SHORT_BODY, Fault.UNAVAILABLE])
def test_toronto_survives_a_passing_fault(
    loopback: LoopbackServer,
    monkeypatch: pytest.MonkeyPatch,
    no_waiting: list[float],
    fault: Fault,
) -> None:
    serve_toronto(loopback, monkeypatch, archive())
    loopback.fail("/cifar.tar.gz", fault)
    assert_is_the_data(load_data("toronto"))
    assert len(no_waiting) == 1


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (Fault.WRONG_BYTES, "wrong checksum"),
        (Fault.HTML_PAGE, "HTML page"),
        (Fault.STALL, "no answer"),
    ],
)
def test_failing_toronto_is_named_with_remedies(
    loopback: LoopbackServer,
    monkeypatch: pytest.MonkeyPatch,
    no_waiting: list[float],
    labkit_cache: Path,
    fault: Fault,
    cause: str,
) -> None:
    serve_toronto(loopback, monkeypatch, archive())
    loopback.fail("/cifar.tar.gz", *[fault] * 9)
    with pytest.raises(SourceError, match=cause) as caught:
        load_data("toronto")
    for part in ("'toronto'", "--data hub", "--data PATH", "--data scenes"):
        assert part in str(caught.value)
    assert not list(labkit_cache.rglob("*.tar.gz"))


def test_archive_that_writes_outside_its_folder_is_refused(
    loopback: LoopbackServer, monkeypatch: pytest.MonkeyPatch, labkit_cache: Path
) -> None:
    serve_toronto(loopback, monkeypatch, tar_gz({"../escaped": b"x"}))
    with pytest.raises(SourceError, match="could not read"):
        load_data("toronto")
    assert not list(labkit_cache.rglob("escaped"))


def test_extracted_archive_is_read_from_itself_or_its_parent(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, body in batch_files().items():
        (folder / name).write_bytes(body)
    for path in (folder, tmp_path):
        assert_is_the_data(load_data(str(path)))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_batches_written_by_python_3_are_read(tmp_path: Path, protocol: int) -> None:
    images, labels = TEST
    rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
    path = tmp_path / "test_batch"
    content = {b"data": rows, b"labels": labels.tolist()}
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    with path.open("rb") as file:
        got_images, got_labels = sources.read_batch(file, path.name)
    np.testing.assert_array_equal(got_images, images)
    np.testing.assert_array_equal(got_labels, labels)


class RunsCode:
    """What an attacker would pickle."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "attacked"
    for name, body in batch_files().items():
        (tmp_path / name).write_bytes(body)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": RunsCode(target)}))
    with pytest.raises(InputError, match=r"data_batch_3.*mkdir is not allowed"):
        load_data(str(tmp_path))
    assert not target.exists()


class Rebuilt:
    """An object that is pickled as a call of `function`, and perhaps a state."""

    def __init__(self, function: object, arguments: tuple[Any, ...], *state: Any) -> None:
        self.reduced = (function, arguments, *state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


RECONSTRUCT = np.empty(0).__reduce__()[0]
PLAIN = np.dtype("u1")


@pytest.mark.parametrize(
    "data",
    [
        # Reads before and after its buffer, were it built by NumPy.
        Rebuilt(np.ndarray, ((3072,), "u1", b"x" * 16, 0, (4096,))),
        Rebuilt(np.ndarray, ((1 << 40,), "O")),
        # Pointers from the file, were they taken for objects.
        Rebuilt(
            RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (384,), np.dtype("O"), False, [1] * 384)
        ),
        Rebuilt(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (1 << 40,), PLAIN, False, b"x" * 3072)),
        Rebuilt(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (-5, 3072), PLAIN, False, b"")),
        Rebuilt(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (3072,), PLAIN, False, 7)),
        np.zeros((1, 3072), ">i8"),
        np.zeros((1, 3072), [("x", "u1")]),
    ],
)
def test_crafted_arrays_are_refused_and_meet_no_constructor_of_numpy(
    tmp_path: Path, data: object
) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({b"data": data, b"labels": [0]}, protocol=2))
    with pytest.raises(InputError, match="data_batch_1"), path.open("rb") as file:
        sources.read_batch(file, path.name)


@pytest.mark.parametrize("damage", [b"", b"not a pickle", batch_files()["test_batch"][:5000]])
def test_damaged_batch_is_named(tmp_path: Path, damage: bytes) -> None:
    for name, body in batch_files().items():
        (tmp_path / name).write_bytes(body)
    (tmp_path / "data_batch_2").write_bytes(damage)
    with pytest.raises(InputError, match="data_batch_2 is damaged"):
        load_data(str(tmp_path))


# ---------------------------------------------------------------- parquet folders


def test_parquet_folder_is_read_from_itself_or_its_parent(parquet_folder: Path) -> None:
    loaded = load_data(str(parquet_folder))
    assert_is_the_data(loaded)
    assert (loaded.source, loaded.name) == (str(parquet_folder), "small-cifar")
    assert_is_the_data(load_data(str(parquet_folder / "plain_text")))


def test_class_names_come_from_the_metadata_else_are_numbers(parquet_folder: Path) -> None:
    names = tuple("klmnopqrst")
    train, test = (parquet_folder / HUB_FILES[split] for split in ("train", "test"))
    train.write_bytes(parquet(TRAIN, names))
    assert load_data(str(parquet_folder)).classes == names
    train.write_bytes(parquet(TRAIN, None))
    test.write_bytes(parquet(TEST, None))
    assert load_data(str(parquet_folder)).classes == tuple("0123456789")


def test_several_parquet_files_follow_each_other(parquet_folder: Path) -> None:
    (images, labels), folder = TRAIN, parquet_folder / "plain_text"
    (parquet_folder / HUB_FILES["train"]).unlink()
    for part in (slice(0, 15), slice(15, 40)):
        body = parquet((images[part], labels[part]))
        (folder / f"train-{part.start:05}-of-00002.parquet").write_bytes(body)
    assert_is_the_data(load_data(str(parquet_folder)))


@pytest.mark.parametrize("keep", [0, 100, len(TRAIN_PARQUET) // 2, len(TRAIN_PARQUET) - 1])
def test_truncated_parquet_is_named(parquet_folder: Path, labkit_cache: Path, keep: int) -> None:
    (parquet_folder / HUB_FILES["train"]).write_bytes(TRAIN_PARQUET[:keep])
    with pytest.raises(InputError, match=r"train-00000-of-00001\.parquet is damaged"):
        load_data(str(parquet_folder))
    assert not list(labkit_cache.rglob("*.json"))


def test_image_damaged_inside_a_parquet_is_named(parquet_folder: Path) -> None:
    table = pq.read_table(parquet_folder / HUB_FILES["test"])
    cells = table.column("img").to_pylist()
    cells[3]["bytes"] = cells[3]["bytes"][:60]
    table = table.set_column(0, "img", pa.array(cells, table.schema.field("img").type))
    pq.write_table(table, parquet_folder / HUB_FILES["test"])
    with pytest.raises(InputError, match="test-00000-of-00001"):
        load_data(str(parquet_folder))


def test_parquet_of_another_layout_is_refused(parquet_folder: Path) -> None:
    path = parquet_folder / HUB_FILES["test"]
    pq.write_table(pa.table({"img": TEST[1], "label": TEST[1]}), path)
    with pytest.raises(InputError, match=r"test-00000-of-00001.*field 'bytes'"):
        load_data(str(parquet_folder))
    pq.write_table(pa.table({"label": [0, 1]}), path)
    with pytest.raises(InputError, match="field 'bytes'"):
        load_data(str(parquet_folder))
    pq.write_table(pa.table({"label": ["cat", "dog"]}), path)
    with pytest.raises(InputError, match="whole numbers"):
        load_data(str(parquet_folder))


def test_parquet_images_of_another_size_are_refused(parquet_folder: Path) -> None:
    images = np.zeros((20, 28, 28, 3), np.uint8)
    (parquet_folder / HUB_FILES["test"]).write_bytes(parquet((images, TEST[1])))
    with pytest.raises(InputError, match="28 x 28 pixels, not 32 x 32"):
        load_data(str(parquet_folder))


def test_label_without_a_name_is_refused(parquet_folder: Path) -> None:
    (parquet_folder / HUB_FILES["test"]).write_bytes(parquet((TEST[0], TEST[1] - 1)))
    with pytest.raises(InputError, match="label lies outside 0 to 9"):
        load_data(str(parquet_folder))


def write_cells(
    path: Path, column: str, cells: list[bytes], label: str = "label", names: str = "0123456789"
) -> None:
    """A parquet file of encoded images, whose labels count up from 0."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": cell, "path": None} for cell in cells], kind)
    table = pa.table({column: images, label: np.arange(len(cells)) % len(names)})
    info = {"info": {"features": {label: {"names": list(names), "_type": "ClassLabel"}}}}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_data_set_cloned_from_the_hub_is_read(tmp_path: Path, split: str) -> None:
    """Its files are in `data`, its images in a column `image` and of any size."""
    wide = Image.fromarray(np.repeat(TEST[0][0], 2, 0).repeat(2, 1))
    cells = [png(np.asarray(wide)), png(TEST[0][1])]
    folder = tmp_path / "beans"
    write_cells(folder / "data" / "train-00000-of-00001.parquet", "image", cells, names="ab")
    write_cells(folder / "data" / f"{split}-00000-of-00001.parquet", "image", cells, names="ab")
    loaded = load_data(str(folder))
    assert (loaded.name, loaded.classes) == ("beans", ("a", "b"))
    np.testing.assert_array_equal(loaded.train.images[1], TEST[0][1])
    np.testing.assert_array_equal(loaded.test.images[0], crop_square(np.asarray(wide), 32))
    assert load_data(str(folder), image_size=48).train.images.shape == (2, 48, 48, 3)
    assert bool(loaded.remarks) == (split != "test")


@pytest.mark.parametrize(("column", "label"), [("image", "labels"), ("img", "fine_label")])
def test_columns_have_the_names_that_data_sets_of_the_hub_give_them(
    tmp_path: Path, column: str, label: str
) -> None:
    cells = [png(image) for image in TEST[0][:3]]
    for split in ("train", "test"):
        path = tmp_path / f"{split}-00000-of-00001.parquet"
        write_cells(path, column, cells, label, names="abc")
    loaded = load_data(str(tmp_path))
    np.testing.assert_array_equal(loaded.test.images, TEST[0][:3])
    assert (loaded.classes, loaded.test.labels.tolist()) == (("a", "b", "c"), [0, 1, 2])


def test_a_missing_parquet_file_is_no_silent_loss(parquet_folder: Path) -> None:
    path = parquet_folder / HUB_FILES["train"]
    path.rename(path.with_name("train-00001-of-00002.parquet"))
    with pytest.raises(InputError, match=r"holds 1 of the 2 files .* copy the missing ones"):
        load_data(str(parquet_folder))


def write_cifar100(folder: Path) -> dict[str, bytes]:
    """A small CIFAR-100 in the layout of the hub: its two files."""
    bodies = {}
    for split, (images, _) in (("train", TRAIN), ("test", TEST)):
        path = folder / sources.CIFAR100_FILES[split]
        write_cells(path, "img", [png(image) for image in images], "fine_label")
        table = pq.read_table(path).append_column("coarse_label", pa.array([0] * len(images)))
        pq.write_table(table, path)
        bodies[split] = path.read_bytes()
    return bodies


def test_cifar100_comes_from_the_hub_unchecked_and_says_so(
    hub: LoopbackHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for split, body in write_cifar100(tmp_path / "cifar100").items():
        hub.add("uoft-cs/cifar100", sources.CIFAR100_FILES[split], body, repo_type="dataset")
    loaded = load_data("cifar100")
    assert_is_the_data(loaded)
    assert (loaded.source, loaded.name, loaded.classes) == (
        "cifar100",
        "CIFAR-100",
        tuple("0123456789"),
    )
    assert "was not checked" in loaded.remarks[0] and "was not checked" in caplog.text
    assert_is_the_data(load_data(str(tmp_path / "cifar100")))
    assert load_data("cifar100", image_size=20).train.images.shape == (len(TRAIN[0]), 20, 20, 3)


def test_cifar100_that_cannot_be_had_is_named_with_remedies(
    hub: LoopbackHub, no_waiting: list[float]
) -> None:
    with pytest.raises(SourceError, match="data source 'cifar100' failed") as caught:
        load_data("cifar100")
    assert "uoft-cs/cifar100" in str(caught.value) and "--data PATH" in str(caught.value)


@pytest.mark.data
def test_real_pixels_equal_those_of_a_plain_decoder(real_data: Path, tmp_path: Path) -> None:
    rows = {}
    for split, filename in HUB_FILES.items():
        table = pq.read_table(real_data / "cifar10-jpeg" / filename).slice(1234, 50)
        pq.write_table(table, tmp_path / Path(filename).name)
        rows[split] = table.to_pylist()
    loaded = load_data(str(tmp_path))
    assert loaded.classes == sources.CIFAR10_CLASSES
    for split, name in ((loaded.train, "train"), (loaded.test, "test")):
        assert split.labels.tolist() == [row["label"] for row in rows[name]]
        for image, row in zip(split.images, rows[name], strict=True):
            expected = np.asarray(Image.open(io.BytesIO(row["img"]["bytes"])))
            np.testing.assert_array_equal(image, expected)


# ---------------------------------------------------------------- image folders


def test_image_folder_names_its_classes(image_folder: Path) -> None:
    loaded = load_data(str(image_folder), image_size=16)
    assert loaded.classes == ("ant", "cat")
    assert loaded.name == "animals"
    assert loaded.train.labels.tolist() == [0, 0, 1, 1]
    assert loaded.test.labels.tolist() == [0, 1]
    assert loaded.train.images.shape == (4, 16, 16, 3)


def test_images_are_resized_then_cut_to_the_centre(image_folder: Path) -> None:
    image = Image.fromarray(random_images(1, 3)[0][0]).resize((128, 64))
    image.save(image_folder / "train" / "ant" / "0.png")
    resized = image.resize((64, 32), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((16, 0, 48, 32)))
    got = load_data(str(image_folder)).train.images[0]
    inner = slice(4, -4)  # nearer to the cut the filter sees other neighbours
    np.testing.assert_array_equal(got[:, inner], expected[:, inner])


def test_camera_orientation_is_honoured(image_folder: Path) -> None:
    upright = np.zeros((40, 40, 3), np.uint8)
    upright[:20, :, 0], upright[20:, :, 2] = 255, 255
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn to the left
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(upright)))
    stored.save(image_folder / "train" / "ant" / "0.png", exif=exif)
    got = load_data(str(image_folder)).train.images[0]
    assert got[4, 16].tolist() == [255, 0, 0]
    assert got[28, 16].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (Image.new("L", (40, 40), 77), "png", [77, 77, 77]),
        (Image.new("1", (40, 40), 1), "png", [255, 255, 255]),
        (Image.new("CMYK", (40, 40), (0, 0, 0, 255)), "tiff", [0, 0, 0]),
        (Image.new("RGBA", (40, 40), (9, 9, 9, 0)), "png", [255, 255, 255]),
        (Image.new("LA", (40, 40), (50, 255)), "png", [50, 50, 50]),
        (Image.fromarray(np.full((40, 40), 0x80FF, np.uint16)), "png", [128, 128, 128]),
        (Image.fromarray(np.full((40, 40), 0x80FF, np.int32)), "tiff", [128, 128, 128]),
        (Image.fromarray(np.full((40, 40), 0x00FF, np.uint16)), "png", [1, 1, 1]),
        (Image.fromarray(np.full((40, 40), 0.25, np.float32)), "tiff", [64, 64, 64]),
        (Image.new("RGB", (40, 40), (1, 2, 3)), "bmp", [1, 2, 3]),
        (Image.new("RGB", (1, 3000), (1, 2, 3)), "png", [1, 2, 3]),
    ],
    ids=[
        "grey",
        "bilevel",
        "cmyk",
        "clear",
        "grey-alpha",
        "16-bit",
        "32-bit",
        "16-bit-dark",
        "float",
        "bmp",
        "thin",
    ],
)
def test_every_mode_becomes_rgb(
    image_folder: Path, image: Image.Image, suffix: str, expected: list[int]
) -> None:
    image.save(image_folder / "train" / "ant" / f"!.{suffix}")  # sorts first
    got = load_data(str(image_folder)).train.images[0]
    np.testing.assert_array_equal(got, np.broadcast_to(expected, (32, 32, 3)))


def test_floats_outside_0_to_1_are_named(image_folder: Path) -> None:
    image = Image.fromarray(np.full((40, 40), 7.0, np.float32))
    image.save(image_folder / "train" / "ant" / "bright.tiff")
    with pytest.raises(InputError, match=r"1 files.*bright\.tiff.*must lie in \[0, 1\]"):
        load_data(str(image_folder))


def test_palette_with_transparency_shows_white(image_folder: Path) -> None:
    image = Image.new("P", (40, 40), 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    path = image_folder / "train" / "ant" / "0.png"
    image.save(path, transparency=bytes([255, 0]))
    assert load_data(str(image_folder)).train.images[0].min() == 255


def test_hidden_files_are_left_out(image_folder: Path) -> None:
    (image_folder / "train" / "ant" / ".DS_Store").write_bytes(b"x")
    (image_folder / "train" / ".cache").mkdir()
    assert len(load_data(str(image_folder)).train) == 4


def test_what_is_no_image_is_left_out_counted_and_named_once(
    image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ant = image_folder / "train" / "ant"
    for name in ("._0.png", "Thumbs.db", ".DS_Store", "notes.txt", "labels.csv"):
        (ant / name).write_bytes(b"x")
    (image_folder / "test" / "desktop.ini").write_bytes(b"x")
    loaded = load_data(str(image_folder))
    assert (len(loaded.train), len(loaded.test)) == (4, 2)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == f"animals: {loaded.remarks[0]}"
    assert loaded.remarks == (
        "left out 6 files that are no images: train/ant/labels.csv, train/ant/notes.txt, "
        "test/desktop.ini, train/ant/.DS_Store, train/ant/._0.png and 1 more",
    )


def test_a_class_of_which_nothing_is_left_is_an_error(image_folder: Path) -> None:
    for path in (image_folder / "test" / "ant").iterdir():
        path.rename(path.with_name(f"._{path.name}"))
    with pytest.raises(InputError, match=r"test: no image in the class folder ant, only \._0\.png"):
        load_data(str(image_folder))


def test_images_outside_the_class_folders_are_named(
    image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (8, 8)).save(image_folder / "train" / "stray.png")
    assert len(load_data(str(image_folder)).train) == 4
    assert "1 files that lie beside the class folders, not in one: train/stray.png" in caplog.text


def test_folders_and_files_have_any_name(
    image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Class folders and folders in them named like image files; suffixes in capitals or rare."""
    for split in ("train", "test"):
        folder = (image_folder / split / "cat").rename(image_folder / split / "cat.jpg")
        (folder / "0.png").rename(folder / "0.PNG")
    inner = image_folder / "train" / "cat.jpg" / "more.png"
    inner.mkdir()
    Image.new("RGB", (40, 40), (1, 2, 3)).save(inner / "a.jfif", "JPEG")
    Image.new("RGB", (40, 40), (1, 2, 3)).save(inner / "b.PPM")
    Image.new("RGB", (40, 40), (1, 2, 3)).save(inner / "c", "PNG")
    loaded = load_data(str(image_folder))
    assert loaded.classes == ("ant", "cat.jpg")
    assert loaded.train.labels.tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert loaded.train.images[-1, 0, 0].tolist() == [1, 2, 3]
    assert not caplog.records


def test_an_unreadable_class_folder_is_an_error(
    image_folder: Path, deny_folder: Callable[[str], None]
) -> None:
    (image_folder / "train" / "ant" / "more").mkdir()
    deny_folder("more")
    with pytest.raises(SourceError, match="more could not be read: Permission denied"):
        load_data(str(image_folder))


def test_heic_without_the_plug_in_is_named_with_the_remedy(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    head = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic"
    (image_folder / "train" / "ant" / "IMG_1.HEIC").write_bytes(head + bytes(500))
    with pytest.raises(InputError, match=r"1 files.*IMG_1\.HEIC.*pip install pillow-heif"):
        load_data(str(image_folder))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow decodes no AVIF")
def test_avif_is_read(image_folder: Path) -> None:
    Image.new("RGB", (40, 40), (200, 10, 10)).save(image_folder / "train" / "ant" / "!.avif")
    first = load_data(str(image_folder)).train.images[0]
    assert np.abs(first.astype(int) - (200, 10, 10)).max() < 6


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_another_split_serves_where_there_is_no_test_and_says_so(
    image_folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with_test = load_data(str(image_folder))
    assert with_test.remarks == ()
    (image_folder / "test").rename(image_folder / name)
    loaded = load_data(str(image_folder))
    np.testing.assert_array_equal(loaded.test.images, with_test.test.images)
    assert loaded.remarks == (f"there is no test/: {name}/ serves as the test split",)
    assert loaded.remarks[0] in caplog.text
    assert loaded.fingerprint == with_test.fingerprint


def test_test_is_preferred_to_val(image_folder: Path) -> None:
    before = load_data(str(image_folder))
    shutil.copytree(image_folder / "train", image_folder / "val")
    after = load_data(str(image_folder))
    assert (len(after.test), after.remarks) == (2, ())
    assert before.fingerprint == after.fingerprint


def test_unreadable_images_are_named_together(image_folder: Path, labkit_cache: Path) -> None:
    whole = (image_folder / "train" / "cat" / "1.png").read_bytes()
    (image_folder / "train" / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (image_folder / "train" / "ant" / "notes.png").write_text("hello")
    with pytest.raises(InputError, match=r"2 files.*notes\.png.*cut\.png"):
        load_data(str(image_folder))
    assert not list(labkit_cache.rglob("*.npy"))


def test_images_with_too_many_pixels_are_not_decoded(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_PIXELS", 40 * 50)
    big = image_folder / "train" / "ant" / "big.png"
    Image.new("RGB", (41, 50)).save(big)
    with pytest.raises(InputError, match=r"1 files.*big\.png \(41 x 50 pixels are too many"):
        load_data(str(image_folder))


def test_bomb_is_refused_without_a_warning(image_folder: Path) -> None:
    header = b"BM" + struct.pack("<IHHI", 54, 0, 0, 54)
    header += struct.pack("<IiiHHIIiiII", 40, 10_000, 9_000, 1, 24, 0, 0, 0, 0, 0, 0)
    (image_folder / "train" / "ant" / "bomb.bmp").write_bytes(header)
    with pytest.raises(InputError, match="10000 x 9000 pixels are too many"):
        load_data(str(image_folder))


def test_one_class_is_not_enough(image_folder: Path) -> None:
    for split in ("train", "test"):
        (image_folder / split / "cat").rename(image_folder / f"{split}-cat")
    with pytest.raises(InputError, match="1 class"):
        load_data(str(image_folder))


def test_empty_class_is_named(image_folder: Path) -> None:
    (image_folder / "train" / "bee").mkdir()
    with pytest.raises(InputError, match="class folder bee"):
        load_data(str(image_folder))


def test_train_and_test_must_agree_on_classes(image_folder: Path) -> None:
    (image_folder / "test" / "cat").rename(image_folder / "test" / "dog")
    with pytest.raises(InputError, match="cat, dog"):
        load_data(str(image_folder))


def test_new_image_or_size_is_decoded_anew(image_folder: Path) -> None:
    before = load_data(str(image_folder))
    Image.new("RGB", (33, 33)).save(image_folder / "train" / "ant" / "9.png")
    after = load_data(str(image_folder))
    assert (len(before.train), len(after.train)) == (4, 5)
    assert load_data(str(image_folder), image_size=8).train.images.shape == (5, 8, 8, 3)
    assert before.fingerprint != after.fingerprint


# ---------------------------------------------------------------- what identifies a folder


def test_a_copy_with_other_times_is_the_same_data(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_data(str(image_folder))
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(image_folder, copy, copy_function=shutil.copyfile)
    for path in copy.rglob("*.png"):
        os.utime(path, (1, 1))
    monkeypatch.setattr(data, "_decode", None)
    again = load_data(str(copy))
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.train.images, first.train.images)


def test_other_images_of_the_same_size_and_times_are_other_data(image_folder: Path) -> None:
    """Uncompressed files: their size says nothing about their content."""
    path = image_folder / "train" / "ant" / "0.bmp"
    Image.new("RGB", (40, 40), (1, 1, 1)).save(path)
    status = path.stat()
    time.sleep(0.15)  # after which the file counts as settled
    before = load_data(str(image_folder))
    Image.new("RGB", (40, 40), (2, 2, 2)).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    after = load_data(str(image_folder))
    assert before.train.images[0].max() == 1 and after.train.images[0].max() == 2
    assert before.fingerprint != after.fingerprint


def test_class_folders_that_are_links_are_read_and_followed_when_they_change(
    image_folder: Path, tmp_path: Path
) -> None:
    """Both targets have files of the same name, size and time."""
    for level in (1, 2):
        folder = tmp_path / f"target-{level}"
        folder.mkdir()
        Image.new("RGB", (40, 40), (level,) * 3).save(folder / "0.bmp")
        os.utime(folder / "0.bmp", (1, 1))
    link = image_folder / "train" / "bee"
    Image.new("RGB", (40, 40)).save(image_folder / "test" / "ant" / "9.bmp")
    (image_folder / "test" / "bee").symlink_to(tmp_path / "target-1")
    levels = []
    for level in (1, 2):
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / f"target-{level}")
        loaded = load_data(str(image_folder))
        assert loaded.classes == ("ant", "bee", "cat")
        levels.append(loaded.train.images[loaded.train.labels == 1].max())
    assert levels == [1, 2]
    linked = loaded.fingerprint
    link.unlink()
    shutil.copytree(tmp_path / "target-2", link)
    assert load_data(str(image_folder)).fingerprint == linked


def test_an_added_class_is_noticed(image_folder: Path) -> None:
    before = load_data(str(image_folder))
    for split in ("train", "test"):
        shutil.copytree(image_folder / split / "ant", image_folder / split / "bee")
    after = load_data(str(image_folder))
    assert after.classes == ("ant", "bee", "cat")
    assert before.fingerprint != after.fingerprint
    (image_folder / "train" / "cow").mkdir()
    with pytest.raises(InputError, match="class folder cow"):
        load_data(str(image_folder))


def test_a_renamed_class_is_noticed(image_folder: Path) -> None:
    before = load_data(str(image_folder))
    for split in ("train", "test"):
        (image_folder / split / "ant").rename(image_folder / split / "bee")
    after = load_data(str(image_folder))
    assert (before.classes, after.classes) == (("ant", "cat"), ("bee", "cat"))
    assert before.fingerprint != after.fingerprint


def test_names_that_are_no_text_are_names_too(image_folder: Path) -> None:
    name = os.fsdecode(b"na\xefve\n")
    try:
        for split in ("train", "test"):
            (image_folder / split / "ant").rename(image_folder / split / name)
    except OSError:
        pytest.skip("this file system wants names in UTF-8")
    assert load_data(str(image_folder)).classes == ("cat", name)


def test_names_that_are_no_text_are_told_as_text(image_folder: Path) -> None:
    path = os.path.join(os.fsencode(image_folder / "train" / "ant"), b"na\xefve\nname.txt")
    try:
        Path(os.fsdecode(path)).touch()
    except OSError:
        pytest.skip("this file system wants names in UTF-8")
    (remark,) = load_data(str(image_folder)).remarks
    assert remark.isprintable() and "train/ant/na ve name.txt" in remark


# ---------------------------------------------------------------- depth


RAMP = np.linspace(0, 65535, 32 * 32).round().reshape(32, 32).astype(np.uint16)


@pytest.mark.parametrize(
    ("numbers", "formats"),
    [
        (RAMP, ("PNG", "TIFF")),
        (RAMP.astype(np.int32), ("TIFF",)),
        ((RAMP / 65535).astype(np.float32), ("TIFF",)),
    ],
    ids=["16-bit", "32-bit", "float"],
)
def test_every_reader_has_the_same_rule_for_depth(
    image_folder: Path, parquet_folder: Path, numbers: Any, formats: tuple[str, ...]
) -> None:
    exact = RAMP / 65535 * 255 if numbers.dtype.kind == "f" else RAMP / 257
    expected = np.stack([np.rint(exact)] * 3, 2)
    colours = np.stack([numbers] * 3, 2)
    got = {
        "array": load_image(numbers),
        "pillow": load_image(Image.fromarray(numbers)),
        "pair": as_split((colours[None], [0])).images[0],
        "tensor": as_split((torch.from_numpy(colours[None]), [0])).images[0],
        "items": as_split(Items(numbers)).images[0],
        "item-arrays": as_split(Items(numbers, as_array=True)).images[0],
    }
    for kind in formats:
        file = io.BytesIO()
        Image.fromarray(numbers).save(file, kind)
        got[f"file {kind}"] = load_image(file.getvalue())
        path = image_folder / "train" / "ant" / f"!.{kind}"
        path.write_bytes(file.getvalue())
        got[f"folder {kind}"] = load_data(str(image_folder)).train.images[0]
        path.unlink()
        write_cells(parquet_folder / HUB_FILES["test"], "img", [file.getvalue()] * 2)
        got[f"parquet {kind}"] = load_data(str(parquet_folder)).test.images[0]
    for name, pixels in got.items():
        np.testing.assert_array_equal(pixels, expected, err_msg=name)


class Items:
    """A data set of one image, as torchvision has them."""

    def __init__(self, numbers: Any, as_array: bool = False) -> None:
        self._image = numbers if as_array else Image.fromarray(numbers)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self._image, 0


# ---------------------------------------------------------------- scenes and bad sources


def test_scenes_are_those_of_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    from labkit.scenes import SCENE_CLASSES, make_classification_scenes

    monkeypatch.setattr(sources, "SCENE_COUNTS", {"train": 30, "test": 20})
    monkeypatch.setattr(sources, "BATCH", 12)
    loaded = load_data("scenes")
    assert (loaded.source, loaded.name, loaded.classes) == ("scenes", "demo scenes", SCENE_CLASSES)
    for split, kind in ((loaded.train, "train"), (loaded.test, "test")):
        images, labels = make_classification_scenes(len(split), seed=sources.SCENE_SEEDS[kind])
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, labels)
    assert not np.array_equal(loaded.train.images[:20], loaded.test.images)


@pytest.mark.parametrize("there", [True, False])
def test_unknown_source_lists_what_there_is(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "somewhere"
    if there:
        path.mkdir()
    with pytest.raises(InputError) as caught:
        load_data(str(path))
    for part in ("'hub'", "'toronto'", "'scenes'", "parquet", "data_batch_1", "<class>"):
        assert part in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("source", ["a\0b", "x" * 300, "x/" * 3000, "~no such user/x", "a\nb"])
def test_names_that_no_folder_can_have_are_no_source(source: str) -> None:
    with pytest.raises(InputError, match="which holds no such folder") as caught:
        load_data(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_parquet_file_that_is_none_is_named(tmp_path: Path, kind: str) -> None:
    """A snapshot of the hub's cache that was copied without its blobs holds such links."""
    for split in ("train", "test"):
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        if kind == "link":
            path.parent.mkdir(exist_ok=True)
            path.symlink_to(tmp_path / "gone")
        else:
            path.mkdir(parents=True)
    with pytest.raises(SourceError, match=r"train-00000-of-00001\.parquet could not be read"):
        load_data(str(tmp_path))


def test_incomplete_batches_are_not_a_data_set(tmp_path: Path) -> None:
    for name, body in batch_files().items():
        (tmp_path / name).write_bytes(body)
    (tmp_path / "data_batch_4").unlink()
    with pytest.raises(InputError, match="data_batch_1 to data_batch_5"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("size", [0, -1])
def test_size_must_be_positive(image_folder: Path, size: int) -> None:
    with pytest.raises(InputError, match=f"got {size}"):
        load_data(str(image_folder), image_size=size)


def test_scenes_are_drawn_in_one_size() -> None:
    with pytest.raises(InputError, match="image_size must be 32"):
        load_data("scenes", image_size=64)


def test_cifar10_is_resized_to_another_size(
    hub_paths: dict[str, str],
    hub: LoopbackHub,
    parquet_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By one filter from every source; each size has its own place in the cache."""
    serve_toronto(hub.server, monkeypatch, archive())
    for name, body in batch_files().items():
        (tmp_path / name).write_bytes(body)
    for source in ("hub", "toronto", str(parquet_folder), str(tmp_path)):
        fingerprints = {load_data(source).fingerprint}
        for size in (48, 20):
            loaded = load_data(source, image_size=size)
            fingerprints.add(loaded.fingerprint)
            for split, (images, labels) in ((loaded.train, TRAIN), (loaded.test, TEST)):
                expected = [
                    Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
                    for image in images
                ]
                np.testing.assert_array_equal(split.images, np.stack(expected))
                np.testing.assert_array_equal(split.labels, labels)
        assert len(fingerprints) == 3
        assert_is_the_data(load_data(source))

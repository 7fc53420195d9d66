"""CIFAR-10 and other images from every source."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from labkit.classify import sources
from labkit.classify.data import load_data
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


def test_unreadable_images_are_named_together(image_folder: Path, labkit_cache: Path) -> None:
    whole = (image_folder / "train" / "cat" / "1.png").read_bytes()
    (image_folder / "train" / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (image_folder / "train" / "ant" / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=r"2 files.*notes\.txt.*cut\.png"):
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


@pytest.mark.parametrize("source", ["hub", "toronto", "scenes"])
def test_only_image_folders_have_another_size(source: str) -> None:
    with pytest.raises(InputError, match="image_size must be 32"):
        load_data(source, image_size=64)

"""The full profile from a loopback hub: the published sizes and file layouts, random weights."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.standins import SENTENCES
from labkit.files import has_digest
from labkit.images import load_image
from labkit.runtime import SourceError
from labkit.segment.checkpoints import Checkpoint, Profile, get_profile
from labkit.segment.pipeline import TextSegmenter
from tests.conftest import hub_at
from tests.loopback import Fault, LoopbackHub, LoopbackServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.data,
    # The repository has no tokenizer.json, and transformers reads what it has in a deprecated way.
    pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0:DeprecationWarning"),
]
PATIENCE = 30.0  # seconds; on a busy machine half a gigabyte can falter for longer than usual
CLIPSEG, SAM2 = "CIDAS/clipseg-rd64-refined", "facebook/sam2.1-hiera-tiny"
REMEDIES = r"(?s)Check the network and the source, or choose profile='demo'"


@pytest.fixture(autouse=True, scope="module")
def hosts() -> Iterator[list[str]]:
    """The hosts that anything asked for, as long as this module runs."""
    asked: list[str] = []
    look_up = socket.getaddrinfo

    def recorded(host: str, *rest: Any, **options: Any) -> Any:
        asked.append(host)
        return look_up(host, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", recorded)
        yield asked


@pytest.fixture(autouse=True)
def only_this_machine(hosts: list[str]) -> Iterator[None]:
    """No test, nor what it builds on, asks for another host."""
    yield
    assert set(hosts) <= {"127.0.0.1"}


@pytest.fixture(scope="module")
def server() -> Iterator[LoopbackServer]:
    with LoopbackServer() as server:
        yield server


@pytest.fixture(scope="module")
def profile(server: LoopbackServer, full_size: Path) -> Profile:
    """The full profile with the digests of the twins, which the server offers as the hub does."""
    full, hub = get_profile("full"), LoopbackHub(server)
    tiny = full.get_sam2("tiny")
    return dataclasses.replace(
        full,
        clipseg=dataclasses.replace(
            full.clipseg, digest=offer(hub, full.clipseg, full_size / "clipseg")
        ),
        sam2={"tiny": dataclasses.replace(tiny, digest=offer(hub, tiny, full_size / "sam2"))},
        default_sam2="tiny",
    )


def offer(hub: LoopbackHub, checkpoint: Checkpoint, folder: Path) -> str:
    """The digest of the largest file, after all of `folder` were put on the hub."""
    files = sorted(folder.iterdir(), key=lambda file: file.stat().st_size)
    for path in files:
        with path.open("rb") as file:
            body = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        served = hub.add(checkpoint.source, path.name, body, revision=checkpoint.revision)
    return "sha256:" + hub.server.files[served].headers["ETag"].strip('"')


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The hub's cache on this machine."""
    folder = tmp_path_factory.mktemp("hub-cache")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def segmenter(server: LoopbackServer, profile: Profile, cache: Path) -> TextSegmenter:
    """The one that downloaded the weights."""
    with hub_at(server, cache, PATIENCE):
        return TextSegmenter.from_profile(profile, device="cpu")


@pytest.fixture(scope="module")
def photo(real_data: Path) -> NDArray[np.uint8]:
    return load_image(real_data / "images" / "zidane.jpg")


@pytest.fixture
def gone() -> LoopbackServer:
    """A server that refuses every connection."""
    with LoopbackServer() as server:
        pass
    return server


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Path]:
    """A cache with nothing in it."""
    yield tmp_path / "empty"
    shutil.rmtree(tmp_path / "empty", ignore_errors=True)


def fetch(checkpoint: Checkpoint) -> Path:
    """The file with the weights, downloaded and checked if need be."""
    return checkpoint.fetch()


def checkpoints_of(profile: Profile) -> dict[str, Checkpoint]:
    return {"clipseg": profile.clipseg, "sam2": profile.get_sam2("tiny")}


def alter(path: Path) -> None:
    """Give `path` another byte in its middle, but not to who has the old file in memory."""
    copy = path.with_name("altered")
    shutil.copyfile(path, copy)
    with copy.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.replace(copy, path)


@contextlib.contextmanager
def calls_of(module: torch.nn.Module) -> Iterator[list[None]]:
    """An entry for each forward pass of `module`."""
    calls: list[None] = []
    hook = module.register_forward_hook(lambda *_: calls.append(None))
    yield calls
    hook.remove()


def test_twins_are_as_large_as_the_published_files(full_size: Path) -> None:
    assert (full_size / "clipseg" / "model.safetensors").stat().st_size == 603_049_496
    sam2 = (full_size / "sam2" / "sam2.1_hiera_tiny.pt").stat().st_size
    assert sam2 == pytest.approx(156_008_466, rel=1e-4)


def test_weights_are_downloaded_once(
    segmenter: TextSegmenter, server: LoopbackServer, profile: Profile
) -> None:
    assert segmenter.models == {
        "CLIPSeg": "CIDAS/clipseg-rd64-refined at 999e0328d9e1",
        "SAM-2": "facebook/sam2.1-hiera-tiny at main",
    }
    names = ("model.safetensors", profile.get_sam2("tiny").filename)
    large = [request.path for request in server.seen() if request.path.endswith(names)]
    assert len(large) == len(set(large)) == 2


def test_photograph_is_encoded_once_for_several_sentences_and_masks_have_its_size(
    segmenter: TextSegmenter, photo: NDArray[np.uint8]
) -> None:
    seen, encoded = segmenter.clipseg.model.clip.vision_model, segmenter.sam2.model.image_encoder
    with calls_of(seen) as by_clipseg, calls_of(encoded) as by_sam2:
        found = segmenter(photo, SENTENCES[:2], assume_present=True)
    assert len(by_clipseg) == len(by_sam2) == 1
    assert all(result.prompts for result in found.sentences)
    assert found.objects
    assert found.masks.shape[1:] == (720, 1280)


def test_cache_is_enough_when_the_network_is_gone(
    segmenter: TextSegmenter,
    gone: LoopbackServer,
    profile: Profile,
    cache: Path,
    photo: NDArray[np.uint8],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with hub_at(gone, cache):
        alone = TextSegmenter.from_profile(profile, device="cpu")
    heats = [
        each.clipseg.predict_heat(photo, ["football player"], segmenter.templates)
        for each in (alone, segmenter)
    ]
    np.testing.assert_array_equal(*heats)
    weights = segmenter.sam2.model.state_dict()
    for name, weight in alone.sam2.model.state_dict().items():
        assert torch.equal(weight, weights[name])


@pytest.mark.parametrize("name", ["clipseg", "sam2"])
def test_weights_altered_in_the_cache_are_refused_removed_and_fetched_anew(
    name: str, segmenter: TextSegmenter, server: LoopbackServer, profile: Profile, cache: Path
) -> None:
    checkpoint = checkpoints_of(profile)[name]
    with hub_at(server, cache, PATIENCE):
        file = fetch(checkpoint)
        alter(file.resolve())
        with pytest.raises(SourceError, match=r"(?s)wrong checksum.*run again to download"):
            TextSegmenter.from_profile(profile, device="cpu")
        assert not file.exists() and not file.is_symlink()
        assert has_digest(fetch(checkpoint), checkpoint.digest)


def test_weights_altered_on_the_way_are_refused_removed_and_fetched_anew(
    server: LoopbackServer, profile: Profile, empty: Path
) -> None:
    checkpoint = profile.get_sam2("tiny")
    server.fail(f"/{SAM2}/resolve/main/{checkpoint.filename}", Fault.WRONG_BYTES)
    with hub_at(server, empty, PATIENCE):
        with pytest.raises(SourceError, match=r"(?s)wrong checksum.*run again to download"):
            checkpoint.fetch()
        assert not [path for path in empty.rglob("*") if path.name == checkpoint.filename]
        assert has_digest(checkpoint.fetch(), checkpoint.digest)


@pytest.mark.parametrize("name", ["clipseg", "sam2"])
def test_network_that_is_gone_names_both_remedies_when_nothing_is_cached(
    name: str, gone: LoopbackServer, profile: Profile, empty: Path, no_waiting: list[float]
) -> None:
    with hub_at(gone, empty), pytest.raises(SourceError, match=REMEDIES) as caught:
        fetch(checkpoints_of(profile)[name])
    assert checkpoints_of(profile)[name].source in str(caught.value)


@pytest.mark.parametrize("name", ["clipseg", "sam2"])
def test_hub_that_is_down_names_both_remedies_when_nothing_is_cached(
    name: str,
    loopback: LoopbackServer,
    profile: Profile,
    empty: Path,
    no_waiting: list[float],
) -> None:
    down(loopback, profile)
    with hub_at(loopback, empty), pytest.raises(SourceError, match=REMEDIES) as caught:
        fetch(checkpoints_of(profile)[name])
    assert "503" in str(caught.value)


def test_cache_is_enough_when_the_hub_is_down(
    segmenter: TextSegmenter,
    loopback: LoopbackServer,
    profile: Profile,
    cache: Path,
    no_waiting: list[float],
) -> None:
    down(loopback, profile)
    with hub_at(loopback, cache):
        for checkpoint in checkpoints_of(profile).values():
            assert has_digest(fetch(checkpoint), checkpoint.digest)


def down(server: LoopbackServer, profile: Profile) -> None:
    """Let `server` answer 503 to whatever is asked about the repositories."""
    checkpoint, busy = profile.clipseg, [Fault.UNAVAILABLE] * 100
    for kind in ("revision", "tree"):
        server.fail(f"/api/models/{CLIPSEG}/{kind}/{checkpoint.revision}", *busy)
    server.fail(f"/{CLIPSEG}/resolve/{checkpoint.revision}/model.safetensors", *busy, method="HEAD")
    file = profile.get_sam2("tiny").filename
    server.fail(f"/{SAM2}/resolve/main/{file}", *busy, method="HEAD")


def test_maps_equal_a_forward_pass_for_each_sentence(
    segmenter: TextSegmenter, photo: NDArray[np.uint8]
) -> None:
    square = np.ascontiguousarray(photo[:, 280:1000])
    maps = segmenter.clipseg.predict_heat(square, SENTENCES[:2], segmenter.templates)
    model, processor = segmenter.clipseg.model, segmenter.clipseg.processor
    (template,) = segmenter.templates
    for sentence, heat in zip(SENTENCES, maps, strict=False):
        text = [template.format(sentence)]
        inputs = processor(text=text, images=Image.fromarray(square), return_tensors="pt")
        with torch.inference_mode():
            (reference,) = model(**inputs).logits.sigmoid()
        np.testing.assert_allclose(heat, reference, atol=1e-4)
    assert np.abs(maps[0] - maps[1]).max() > 1e-3

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import labkit
from labkit.files import compute_checksum
from labkit.object_scenes import EVALUATION_SEED, make_object_scene
from labkit.runtime import InputError, SourceError
from labkit.segment.checkpoints import (
    Checkpoint,
    Profile,
    Sam2Checkpoint,
    find_clipseg,
    find_sam2,
    get_profile,
)
from labkit.segment.pipeline import TextSegmenter
from tests.loopback import LoopbackHub

ASSETS = Path(labkit.__file__).parent / "assets"
DIGEST = "sha256:" + "0" * 64


def test_a_folder_a_repository_a_revision_and_a_digest_are_told_apart(tmp_path: Path) -> None:
    odd = tmp_path / "weights@2#new"
    shutil.copytree(ASSETS / "clipseg-tiny", odd)
    assert find_clipseg(str(odd)).source == str(odd)
    assert find_clipseg(str(odd)).name == "weights@2#new (local, not checked)"
    assert find_clipseg(f"me/clip.seg@v1#{DIGEST}") == Checkpoint(
        source="me/clip.seg", revision="v1", digest=DIGEST
    )
    assert find_clipseg("me/clip.seg").name == "me/clip.seg at main (not checked)"
    assert Checkpoint(source="me/clip", digest=DIGEST).name == "me/clip at main"


def test_the_published_repositories_keep_their_pins() -> None:
    full = get_profile("full")
    assert find_clipseg("CIDAS/clipseg-rd64-refined") == full.clipseg
    assert find_sam2("facebook/sam2.1-hiera-large") == full.sam2["large"]
    unpinned = find_sam2("facebook/sam2.1-hiera-base-plus@main")
    assert unpinned.filename == full.sam2["base-plus"].filename
    assert unpinned.config == full.sam2["base-plus"].config and not unpinned.digest
    assert find_sam2("facebook/sam2-hiera-small").filename == "sam2_hiera_small.pt"


def test_the_architecture_of_a_sam2_is_in_its_folder_or_its_file_name(tmp_path: Path) -> None:
    own = find_sam2(str(ASSETS / "sam2-tiny"))
    assert own.filename == "sam2.safetensors" and Path(own.config).name == "sam2.yaml"
    assert own.find_config() == ASSETS / "sam2-tiny" / "sam2.yaml"
    (tmp_path / "sam2.1_hiera_base_plus.pt").touch()
    (tmp_path / "other.pt").touch()
    by_file = find_sam2(str(tmp_path / "sam2.1_hiera_base_plus.pt"))
    assert by_file.config == "sam2.1/sam2.1_hiera_b+.yaml"
    assert by_file.find_config().is_file() and by_file.fetch().is_file()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"must hold one file of weights, \.pt or \.safetensors, got none"),
        (["a.pt", "b.safetensors"], r"got 2: a\.pt, b\.safetensors"),
        (["a.pt"], "architecture of .* is unknown; put its YAML file beside the weights"),
        (["a.pt", "a.yaml", "b.yml"], r"must hold one YAML file, got a\.yaml, b\.yml"),
    ],
)
def test_a_folder_that_is_no_sam2_is_one_line(
    files: list[str], message: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=message) as error:
        find_sam2(str(tmp_path))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere", "clipseg must be a folder or a repository of the hub, owner/name, got"),
        ("./no/where", "clipseg must be a folder or"),
        ("me/clip#md5:12", "a digest is sha256: and 64 hex digits"),
        ("{folder}", r"is no CLIPSeg, it lacks config\.json and model\.safetensors"),
    ],
)
def test_what_is_no_clipseg_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        find_clipseg(text.format(folder=tmp_path))


def test_a_repository_of_the_hub_with_another_architecture_is_refused() -> None:
    with pytest.raises(InputError, match="architecture of me/my-sam is unknown"):
        find_sam2("me/my-sam")


def test_a_folder_of_other_weights_fails_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"none")
    with pytest.raises(SourceError, match="could not be loaded as a CLIPSeg") as error:
        TextSegmenter.from_profile("demo", clipseg=str(tmp_path), device="cpu")
    assert len(str(error.value).splitlines()) == 1


def test_a_file_of_the_hub_without_a_digest_is_taken_as_it_is(hub: LoopbackHub) -> None:
    hub.add("me/clip", "model.safetensors", b"weights")
    assert Checkpoint(source="me/clip").fetch().read_bytes() == b"weights"
    with pytest.raises(SourceError, match="wrong checksum"):
        Checkpoint(source="me/clip", digest=DIGEST).fetch()


@pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0:DeprecationWarning")
def test_own_weights_take_the_place_of_the_published_ones(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    clipseg = tmp_path / "clipseg"
    shutil.copytree(ASSETS / "clipseg-tiny", clipseg)
    demo = get_profile("demo")
    weights = load_file(ASSETS / "sam2-tiny" / "sam2.safetensors")
    (tmp_path / "sam2").mkdir()
    torch.save({"model": weights}, tmp_path / "sam2" / "checkpoint.pt")
    shutil.copy(ASSETS / "sam2-tiny" / "sam2.yaml", tmp_path / "sam2")
    digest = compute_checksum(tmp_path / "sam2" / "checkpoint.pt")
    sam2 = Sam2Checkpoint(
        source=str(tmp_path / "sam2"),
        filename="checkpoint.pt",
        config=str(tmp_path / "sam2" / "sam2.yaml"),
        digest=f"sha256:{digest}",
    )
    with caplog.at_level(logging.INFO, logger="labkit"):
        segmenter = TextSegmenter.from_profile(
            "full", clipseg=str(clipseg), sam2=sam2, device="cpu"
        )
    assert "clipseg (local, not checked): give a digest" in caplog.text
    assert "sam2 (local)" not in caplog.text
    assert segmenter.models == {"CLIPSeg": "clipseg (local, not checked)", "SAM-2": "sam2 (local)"}
    assert segmenter.note == "own weights, presence not calibrated for them"
    assert segmenter.presence == get_profile("full").presence

    (clipseg / "presence.json").write_text(json.dumps({"presence": asdict(demo.presence)}))
    segmenter = TextSegmenter.from_profile("full", clipseg=str(clipseg), sam2=sam2, device="cpu")
    assert segmenter.note == "own weights" and segmenter.presence == demo.presence
    scene = make_object_scene(1, seed=EVALUATION_SEED)
    sentence = scene.present[0]
    segmenter.templates = demo.templates
    own = segmenter(scene.image, [sentence])
    usual = TextSegmenter.from_profile("demo", device="cpu")(scene.image, [sentence])
    assert own[sentence].present
    assert own[sentence].presence == usual[sentence].presence
    assert (own[sentence].mask == usual[sentence].mask).all()


@pytest.mark.parametrize("text", ["{", "[]", '{"peak": 1}', '{"presence": {"peak": "high"}}'])
def test_a_damaged_presence_model_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "presence.json").write_text(text)
    profile: Profile = get_profile("demo")
    with pytest.raises(InputError, match="must hold numbers called peak, contrast"):
        profile.replace_weights(clipseg=Checkpoint(source=str(tmp_path)))


def test_a_size_is_chosen_and_own_weights_are_the_default() -> None:
    full = get_profile("full")
    assert full.replace_weights(sam2="tiny").get_sam2() == full.sam2["tiny"]
    own = full.replace_weights(sam2=str(ASSETS / "sam2-tiny"))
    assert own.get_sam2().name == "sam2-tiny (local, not checked)"
    assert own.clipseg == full.clipseg and own.note == ""

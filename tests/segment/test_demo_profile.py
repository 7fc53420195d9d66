"""The models that come with labkit, as anybody gets them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import labkit
from labkit.images import load_image
from labkit.object_scenes import EVALUATION_SEED, make_object_scene
from labkit.runtime import InputError, SourceError
from labkit.segment import checkpoints
from labkit.segment.bench import measure_scenes
from labkit.segment.checkpoints import get_profile
from labkit.segment.examples import load_example
from labkit.segment.metrics import iou
from labkit.segment.pipeline import TextSegmenter


@pytest.fixture(scope="module")
def segmenter() -> TextSegmenter:
    return TextSegmenter.from_profile("demo", device="cpu")


@pytest.fixture(scope="module")
def figures(segmenter: TextSegmenter) -> dict[str, Any]:
    return measure_scenes(segmenter, 24, start=2000)


def test_assets_take_at_most_ten_megabytes() -> None:
    assets = Path(labkit.__file__).parent / "assets"
    sizes = [path.stat().st_size for path in assets.rglob("*") if path.is_file()]
    assert 0 < sum(sizes) <= 10e6


@pytest.mark.slow
def test_masks_and_presence_are_good_on_scenes_never_seen(figures: dict[str, Any]) -> None:
    assert figures["n_scenes"] == 24 and figures["seed"] == EVALUATION_SEED
    assert figures["miou"] > 0.75
    assert figures["miou_gain"] > 0
    assert figures["presence_auroc"] > 0.93
    assert figures["presence_mcc"] > 0.7


@pytest.mark.slow
def test_weak_maps_give_the_same_masks_once_presence_is_assumed(figures: dict[str, Any]) -> None:
    assert figures["miou_peak_0013"] == pytest.approx(figures["miou_assumed"], abs=0.01)


def test_a_true_sentence_is_outlined_and_a_false_one_is_absent(segmenter: TextSegmenter) -> None:
    example = load_example("demo")
    found = segmenter(example.image, [*example.sentences, example.absent])
    for sentence in example.sentences:
        assert iou(example.truth[sentence], found[sentence].mask) > 0.7
    absent = found[example.absent]
    assert not absent.present and absent.reason and absent.prompts == ()
    assert not found[example.absent].mask.any()
    assert "demo" in found.note


@pytest.mark.parametrize("sentence", ["zebra", "a very long telephone", "violin", "two umbrellas"])
def test_words_of_another_world_find_nothing(segmenter: TextSegmenter, sentence: str) -> None:
    scenes = (make_object_scene(number, seed=EVALUATION_SEED) for number in range(3000, 3006))
    assert sum(bool(segmenter(scene.image, [sentence]).objects) for scene in scenes) <= 1


@pytest.mark.data
def test_a_photograph_shows_none_of_the_shapes(segmenter: TextSegmenter, real_data: Path) -> None:
    photo = load_image(real_data / "images" / "bus.jpg")
    found = segmenter(photo, ["football player"])
    assert found.masks.shape == (0, 1080, 810)


def test_an_altered_weight_file_is_refused(tmp_path: Path) -> None:
    demo = get_profile("demo")
    checkpoint = demo.get_sam2()
    bytes_ = bytearray(checkpoint.fetch().read_bytes())
    bytes_[-1] ^= 1
    (tmp_path / checkpoint.filename).write_bytes(bytes_)
    altered = replace(demo, sam2={"demo": replace(checkpoint, source=str(tmp_path))})
    with pytest.raises(SourceError, match="wrong checksum"):
        TextSegmenter.from_profile(altered, device="cpu")


def test_profiles_and_sizes_that_do_not_exist_are_named() -> None:
    with pytest.raises(InputError, match="'full' or 'demo'"):
        get_profile("dmeo")
    with pytest.raises(InputError, match="tiny, small, base-plus, large"):
        get_profile("full").get_sam2("huge")


def test_a_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = checkpoints.find_spec
    monkeypatch.setattr(checkpoints, "find_spec", lambda n: None if n == "sam2" else find_spec(n))
    with pytest.raises(
        SourceError,
        match=r"needs sam2: in a clone of labkit, pip install .*-r requirements-sam2.txt",
    ):
        TextSegmenter.from_profile("demo")


def test_an_over_long_sentence_is_refused_in_one_line(segmenter: TextSegmenter) -> None:
    with pytest.raises(InputError, match="32 tokens") as refusal:
        segmenter(np.zeros((64, 64, 3), dtype=np.uint8), ["red circle " * 30])
    assert "\n" not in str(refusal.value)

from __future__ import annotations

import json
import math
import random
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pycocotools import mask as coco

from labkit.runtime import InputError
from labkit.segment.checkpoints import PresencePin, Profile
from labkit.segment.pipeline import TextSegmenter
from labkit.segment.prompts import Prompt
from labkit.segment.sam2 import Sam2
from labkit.segment.segmentation import Segmentation
from tests.segment.conftest import CallsOf, noise

GRID = 48
PIN = PresencePin(strength=1.0, contrast=2.0, rivalry=-1.0, agreement=1.0, constant=-0.5)
Maps = NDArray[np.float32]


def discs(*places: tuple[int, int], radius: int = 6, heat: float = 0.75) -> Maps:
    """A map (48, 48) that is `heat` in discs around the pixels `places`, and 0 around them."""
    y, x = np.mgrid[:GRID, :GRID]
    inside = [np.hypot(x - x0, y - y0) <= radius for x0, y0 in places]
    return np.where(np.any(inside, axis=0), heat, 0).astype(np.float32)


def slope(x0: int, y0: int) -> Maps:
    """A smooth hill in steps of 1/64, its top 1, so that no rounding of a multiple shows."""
    y, x = np.mgrid[:GRID, :GRID]
    hill = np.exp(-((x - x0) ** 2 + 1.5 * (y - y0) ** 2) / 120)
    return (np.rint(hill * 64) / 64).astype(np.float32)


class GivenMaps:
    """In the place of CLIPSeg: maps that are given, and a record of what was asked."""

    def __init__(self, **maps: Maps) -> None:
        self.maps, self.asked = maps, list[str]()
        self.patch = 3

    def heat_maps(self, _: object, sentences: Sequence[str], templates: Sequence[str]) -> Maps:
        self.asked += sentences
        return np.stack([self.maps[sentence] for sentence in sentences])


class Copyist:
    """In the place of SAM-2: masks are the mask prompts, moved by `shift`; clicks yield none."""

    side = grid = GRID

    def __init__(self, shift: int = 0) -> None:
        self.shift, self.encoded, self.told = shift, 0, list[Prompt]()

    def encode(self, _: object) -> object:
        self.encoded += 1
        return object()

    def decode(self, _: object, prompts: Sequence[Prompt]) -> tuple[Maps, Maps]:
        self.told += prompts
        logits = np.stack([np.roll(one.mask_logits, self.shift, axis=1) for one in prompts])
        return np.stack([logits] * 4, axis=1), np.full((len(prompts), 4), 0.9, np.float32)

    def click(self, _: object, points: NDArray[np.float64]) -> tuple[Maps, Maps]:
        shape = (len(points), 4)
        return np.zeros((*shape, GRID, GRID), np.float32), np.zeros(shape, np.float32)


def segmenter(sam2: Any = None, pin: PresencePin = PIN, **maps: Maps) -> Any:
    given: Any = GivenMaps(**maps)
    return TextSegmenter(given, sam2 or Copyist(), presence=pin, note="by hand")


@pytest.fixture(scope="module")
def tiny(tiny_profile: Profile) -> TextSegmenter:
    return TextSegmenter.from_profile(tiny_profile, device="cpu")


@pytest.fixture(scope="module")
def found() -> Segmentation:
    """Two cats, no horse and a dog, in an image twice as large as the maps."""
    ask = segmenter(
        cat=discs((10, 10), heat=0.75) + discs((36, 30), radius=8, heat=0.65),
        horse=discs((30, 5), heat=0.013),
        dog=discs((10, 38), heat=0.75),
    )
    answer: Segmentation = ask(noise(96, 96), ["cat", "horse", "dog"])
    return answer


def test_each_thing_that_is_there_has_its_mask_scores_and_box(found: Segmentation) -> None:
    assert [thing.prompt for thing in found.objects] == ["cat", "cat", "dog"]
    large, small, dog = found.objects
    for thing, disc in ((small, discs((10, 10))), (large, discs((36, 30), radius=8))):
        exact = (disc > 0).repeat(2, axis=0).repeat(2, axis=1)
        wrong = np.count_nonzero(thing.mask ^ exact)
        assert wrong < 0.12 * exact.sum()  # the outline, drawn between pixels of the grid
        assert thing.predicted_iou == pytest.approx(0.9) and 0.6 < thing.agreement < 1  # soft edges
    assert found.answer("cat").evidence.agreement == large.agreement > small.agreement
    assert (large.grounding, small.grounding) == (pytest.approx(0.65), pytest.approx(0.75))
    assert dog.presence == found.answer("dog").presence > PIN.cut
    for thing in found.objects:
        x, y, width, height = coco.toBbox({**thing.rle, "counts": thing.rle["counts"].encode()})
        assert thing.box == (x, y, x + width, y + height)


def test_answers_come_in_the_order_asked(found: Segmentation) -> None:
    assert [answer.prompt for answer in found.answers] == ["cat", "horse", "dog"]
    assert [answer.present for answer in found.answers] == [True, False, True]
    assert [answer.reason == "" for answer in found.answers] == [True, False, True]
    assert [len(answer.prompts) for answer in found.answers] == [2, 0, 1]


def test_arrays_have_an_entry_for_each_object(found: Segmentation) -> None:
    assert found.masks.shape == (3, 96, 96) and found.masks.dtype == bool
    assert found.boxes.shape == (3, 4)
    assert np.array_equal(found.mask_of("cat"), found.masks[0] | found.masks[1])
    assert not found.mask_of("horse").any()


def test_what_is_absent_gets_no_mask_but_a_reason(sam2: Sam2, calls_of: CallsOf) -> None:
    encoder = calls_of(sam2.model.image_encoder)
    ask = segmenter(sam2, player=0.013 * slope(20, 20))
    result = ask(noise(60, 60), ["player"])
    assert result.objects == () and result.masks.shape == (0, 60, 60)
    (answer,) = result.answers
    assert not answer.present and answer.presence < PIN.cut
    assert answer.reason == f"its highest probability is only {answer.evidence.strength:.3f}"
    assert answer.prompts == () and answer.evidence.agreement == 1.0
    assert encoder == []


def iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("peak", [2**-6, 2**-13, 0.013, 1e-4])
def test_assumed_present_masks_do_not_depend_on_the_peak(sam2: Sam2, peak: float) -> None:
    """To the last pixel for a power of two; other factors round, and may move an outline a bit."""
    maps = np.stack([slope(12, 12), np.maximum(slope(34, 30), slope(8, 40))])
    ask, image, wanted = segmenter(sam2), noise(90, 120), ["one", "two"]
    strong = ask.refine(image, wanted, maps, assume_present=True)
    weak = ask.refine(image, wanted, maps * np.float32(peak), assume_present=True)
    assert len(strong.objects) >= 2
    if math.log2(peak).is_integer():
        assert [thing.rle for thing in weak.objects] == [thing.rle for thing in strong.objects]
        assert [thing.box for thing in weak.objects] == [thing.box for thing in strong.objects]
    for thing, other in zip(weak.objects, strong.objects, strict=True):
        assert thing.prompt == other.prompt and iou(thing.mask, other.mask) > 0.98
    for ours, theirs in zip(weak.answers, strong.answers, strict=True):
        assert ours.present and ours.presence < theirs.presence
        assert len(ours.prompts) == len(theirs.prompts) > 0


def test_image_is_encoded_once_for_many_sentences_and_objects(
    sam2: Sam2, calls_of: CallsOf
) -> None:
    encoder = calls_of(sam2.model.image_encoder)
    names = ["one", "two", "three", "four", "five"]
    maps = {
        name: discs((8, 8 + index), (24, 40 - index), (40, 20 + index), radius=4)
        for index, name in enumerate(names)
    }
    result = segmenter(sam2, **maps)(noise(70, 50), names, assume_present=True)
    assert sum(len(answer.prompts) for answer in result.answers) >= 15
    assert len(encoder) == 1


def test_repeated_sentences_are_computed_once() -> None:
    ask = segmenter(cat=discs((10, 10)), dog=discs((30, 30)), horse=discs((5, 40)))
    result = ask(noise(48, 48), ["cat", " dog", "cat ", "cat"], ["horse", "horse"])
    assert ask.clipseg.asked == ["cat", "dog", "horse"]
    assert [answer.prompt for answer in result.answers] == ["cat", "dog"]
    assert len(ask.sam2.told) == 2 and ask.sam2.encoded == 1


@pytest.mark.parametrize(
    ("prompts", "negatives", "message"),
    [
        ([], [], "got none"),
        (["cat", "  "], [], "empty"),
        (["cat"], [""], "empty"),
        (["cat", "dog"], ["horse", " dog"], "'dog' is both wanted and not"),
        ("cat", [], "must be lists"),
        (["cat"], "dog", "must be lists"),
    ],
)
def test_unusable_sentences_are_refused_before_anything_runs(
    prompts: Any, negatives: Any, message: str
) -> None:
    ask = segmenter(cat=discs((10, 10)))
    with pytest.raises(InputError, match=message):
        ask(noise(48, 48), prompts, negatives)
    assert ask.clipseg.asked == []


def test_ground_of_what_is_not_meant_does_not_count() -> None:
    cat = discs((10, 10), heat=0.7) + discs((36, 34), heat=0.6)
    dog = discs((36, 34), radius=8, heat=0.9)
    assert len(segmenter(cat=cat)(noise(48, 48), ["cat"]).objects) == 2
    result = segmenter(cat=cat, dog=dog)(noise(48, 48), ["cat"], ["dog"])
    assert [answer.prompt for answer in result.answers] == ["cat"]
    alone = segmenter(cat=discs((10, 10), heat=0.7))(noise(48, 48), ["cat"])
    assert np.array_equal(result.masks, alone.masks)
    assert iou(alone.masks[0], discs((10, 10)) > 0) > 0.85


def test_what_is_not_meant_and_not_there_takes_nothing_away() -> None:
    cat, dog = discs((10, 10), heat=0.7), discs((10, 10), radius=9, heat=0.01)
    assert len(segmenter(cat=cat, dog=dog)(noise(48, 48), ["cat"], ["dog"]).objects) == 1


def test_nothing_is_left_where_all_of_it_is_not_meant() -> None:
    ask = segmenter(cat=0.5 * slope(20, 20), dog=discs((20, 20), radius=20, heat=0.9))
    result = ask(noise(48, 48), ["cat"], ["dog"])
    (answer,) = result.answers
    assert result.objects == () and not answer.present and ask.sam2.encoded == 0
    assert "another sentence explains the same place better" in answer.reason


def test_rivals_get_background_points_where_the_other_is() -> None:
    ask = segmenter(cat=discs((14, 24)), dog=discs((30, 24)))
    result = ask(noise(48, 48), ["cat", "dog"])
    for answer, other in zip(result.answers, ((30, 24), (14, 24)), strict=True):
        (prompt,) = answer.prompts
        behind = prompt.points[prompt.labels == 0]
        assert len(behind) and (np.hypot(*(behind - other).T) <= 6).all()


def test_mask_that_is_nowhere_near_the_heat_shows_that_nothing_is_there() -> None:
    cat = discs((14, 24), heat=0.6)
    pin = replace(PIN, agreement=6.0, constant=-4.0)
    assert segmenter(pin=pin, cat=cat)(noise(48, 48), ["cat"]).answers[0].present
    (answer,) = segmenter(Copyist(shift=20), pin, cat=cat)(noise(48, 48), ["cat"]).answers
    assert not answer.present and answer.evidence.agreement == 0
    assert "no mask there agrees with its map" in answer.reason


def test_zero_map_gives_an_empty_result_whatever_is_assumed() -> None:
    for assumed in (False, True):
        ask = segmenter(cat=np.zeros((30, 40), np.float32))
        result = ask(noise(30, 40), ["cat"], assume_present=assumed)
        assert result.objects == () and result.masks.shape == (0, 30, 40)
        assert not result.answers[0].present and result.answers[0].reason
        assert ask.sam2.encoded == 0
        assert isinstance(result.figure(), Figure)


@pytest.mark.parametrize("shape", [(1, 1), (1, 60), (60, 1), (2, 3), (150, 40)])
def test_images_of_any_shape_go_through_the_real_networks(
    tiny: TextSegmenter, shape: tuple[int, int]
) -> None:
    result = tiny(noise(*shape), ["cat", "dog"], ["horse"], assume_present=True)
    assert result.masks.shape == (len(result.objects), *shape)
    assert all(thing.mask.any() for thing in result.objects)
    assert isinstance(result.overlay(), Figure) and isinstance(result.figure(), Figure)


def test_prompts_reach_sam2_in_the_pixels_of_its_square() -> None:
    ask = segmenter()
    wide = discs((9, 12))[None, :24]  # (1, 24, 48), of an image twice as wide as high
    ask.refine(noise(100, 200), ["cat"], wide, assume_present=True)
    told = ask.sam2.told[0]
    left, top, right, bottom = told.box
    assert (left + right, top + bottom) == (2 * 9.5, 2 * 25)
    assert bottom - top == 2 * (right - left) and abs(right - left - 13) <= 2
    assert told.points[0].tolist() == [9, 2 * 12 + 0.5]


def test_profile_names_its_weights_and_its_note(tiny: TextSegmenter, tiny_profile: Profile) -> None:
    result = tiny(noise(40, 40), ["cat"])
    assert result.note == "random weights"
    assert set(result.models) == {"CLIPSeg", "SAM-2"}
    assert tiny.templates == tiny_profile.templates
    with pytest.raises(InputError, match="sam2 must be one of tiny, got 'huge'"):
        TextSegmenter.from_profile(tiny_profile, sam2="huge")


def test_local_weights_need_no_network_and_leave_random_numbers_as_found(
    tiny_profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    states = [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]
    fresh = TextSegmenter.from_profile(tiny_profile, device="cpu")
    first = fresh(noise(40, 40), ["cat", "dog"], assume_present=True)
    assert states == [
        torch.get_rng_state().tolist(),
        random.getstate(),
        str(np.random.get_state()),
    ]
    second = fresh(noise(40, 40), ["cat", "dog"], assume_present=True)
    assert [thing.rle for thing in first.objects] == [thing.rle for thing in second.objects]


def test_saved_folder_holds_masks_picture_and_report(found: Segmentation, tmp_path: Path) -> None:
    from PIL import Image

    folder = found.save(tmp_path / "new" / "folder", "photo.jpg")
    assert {file.name for file in folder.iterdir()} == {"masks.json", "overlay.png", "report.html"}
    document = json.loads((folder / "masks.json").read_text())
    assert document == found.to_coco("photo.jpg")
    assert document["info"]["description"] == "by hand"
    with Image.open(folder / "overlay.png") as picture:
        assert min(picture.size) > 200
    page = (folder / "report.html").read_text()
    assert "by hand" in page and "photo.jpg" in page
    assert page.count("<img") == 2 and found.answers[1].reason in page


@pytest.mark.parametrize("kind", ["overlay", "figure"])
def test_figures_are_returned_with_the_note_and_pyplot_stays_as_found(
    found: Segmentation, kind: str
) -> None:
    import matplotlib
    import matplotlib.pyplot as plt

    before = plt.get_fignums(), dict(matplotlib.rcParams), matplotlib.get_backend()
    figure = getattr(found, kind)()
    assert isinstance(figure, Figure)
    assert (plt.get_fignums(), dict(matplotlib.rcParams), matplotlib.get_backend()) == before
    assert "by hand" in [text.get_text() for text in figure.texts]


def test_tables_have_a_row_for_each_answer_and_object(found: Segmentation) -> None:
    tables = found.tables()
    assert [row[:2] for row in tables["Answers"].rows] == [
        ["cat", "yes"],
        ["horse", "no"],
        ["dog", "yes"],
    ]
    assert len(tables["Objects"].rows) == 3

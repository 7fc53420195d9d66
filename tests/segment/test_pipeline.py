from __future__ import annotations

import html
import inspect
import json
import logging
import math
import os
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

from labkit.object_scenes import CALIBRATION_SEED, SCENE_SENTENCES, make_object_scene
from labkit.runtime import InputError
from labkit.segment.checkpoints import PresenceModel, Profile
from labkit.segment.clipseg import normalize_sentence
from labkit.segment.pipeline import TextSegmenter
from labkit.segment.presence import score_presence
from labkit.segment.prompts import Prompt
from labkit.segment.results import Segmentation
from labkit.segment.sam2 import Sam2
from tests.segment.conftest import CallsOf, noise

LOW_RES = 48
MODEL = PresenceModel(peak=1.0, contrast=2.0, contrastive_margin=1.0, agreement=1.0, constant=-0.5)
Maps = NDArray[np.float32]


def discs(*places: tuple[int, int], radius: int = 6, heat: float = 0.75) -> Maps:
    """A map (48, 48) that is `heat` in discs around the pixels `places`, and 0 around them."""
    y, x = np.mgrid[:LOW_RES, :LOW_RES]
    inside = [np.hypot(x - x0, y - y0) <= radius for x0, y0 in places]
    return np.where(np.any(inside, axis=0), heat, 0).astype(np.float32)


def slope(x0: int, y0: int) -> Maps:
    """A smooth hill in steps of 1/64, its top 1, so that no rounding of a multiple shows."""
    y, x = np.mgrid[:LOW_RES, :LOW_RES]
    hill = np.exp(-((x - x0) ** 2 + 1.5 * (y - y0) ** 2) / 120)
    return (np.rint(hill * 64) / 64).astype(np.float32)


class GivenMaps:
    """In the place of CLIPSeg: maps that are given, and a record of what was asked.

    A sentence without a map is nowhere.
    """

    def __init__(self, **maps: Maps) -> None:
        self.maps, self.sentences = maps, list[str]()
        self.patch_size, self.encode_calls = 3, 0

    def encode(self, _: object) -> object:
        self.encode_calls += 1
        return object()

    def predict_heat(self, _: object, sentences: Sequence[str], templates: Sequence[str]) -> Maps:
        self.sentences += sentences
        nowhere = np.zeros_like(next(iter(self.maps.values())))
        return np.stack([self.maps.get(sentence, nowhere) for sentence in sentences])


class Copyist:
    """In the place of SAM-2: masks are the mask prompts, moved by `shift`; points yield none."""

    image_size = low_res_size = LOW_RES

    def __init__(self, shift: int = 0) -> None:
        self.shift, self.encode_calls, self.prompts = shift, 0, list[Prompt]()

    def encode(self, _: object) -> object:
        self.encode_calls += 1
        return object()

    def predict(self, _: object, prompts: Sequence[Prompt]) -> tuple[Maps, Maps]:
        self.prompts += prompts
        logits = np.stack([np.roll(prompt.mask_logits, self.shift, axis=1) for prompt in prompts])
        return np.stack([logits] * 4, axis=1), np.full((len(prompts), 4), 0.9, np.float32)

    def predict_points(self, _: object, points: NDArray[np.float64]) -> tuple[Maps, Maps]:
        shape = (len(points), 4)
        return np.zeros((*shape, LOW_RES, LOW_RES), np.float32), np.zeros(shape, np.float32)


def segmenter(sam2: Any = None, model: PresenceModel = MODEL, **maps: Maps) -> Any:
    given: Any = GivenMaps(**maps)
    return TextSegmenter(given, sam2 or Copyist(), presence=model, note="by hand")


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
    segmentation: Segmentation = ask(noise(96, 96), ["cat", "horse", "dog"])
    return segmentation


def test_each_thing_that_is_there_has_its_mask_scores_and_box(found: Segmentation) -> None:
    assert [segmented.sentence for segmented in found.objects] == ["cat", "cat", "dog"]
    large, small, dog = found.objects
    for segmented, disc in ((small, discs((10, 10))), (large, discs((36, 30), radius=8))):
        exact = (disc > 0).repeat(2, axis=0).repeat(2, axis=1)
        wrong = np.count_nonzero(segmented.mask ^ exact)
        assert wrong < 0.12 * exact.sum()  # the outline, drawn between pixels of the grid
        assert (
            segmented.predicted_iou == pytest.approx(0.9) and 0.6 < segmented.agreement < 1
        )  # soft edges
    assert found["cat"].evidence.agreement == large.agreement > small.agreement
    assert (large.grounding, small.grounding) == (pytest.approx(0.65), pytest.approx(0.75))
    assert dog.presence == found["dog"].presence > MODEL.threshold
    for segmented in found.objects:
        x, y, width, height = coco.toBbox(
            {**segmented.rle, "counts": segmented.rle["counts"].encode()}
        )
        assert segmented.box == (x, y, x + width, y + height)


def test_small_objects_and_more_than_enough_are_left_out() -> None:
    cat = discs((10, 10), heat=0.75) + discs((36, 30), radius=8, heat=0.65)
    ask, image = segmenter(cat=cat), noise(96, 96)
    large, small = sorted(ask(image, ["cat"]).objects, key=lambda o: -o.mask.sum())
    (kept,) = ask(image, ["cat"], minimum_area=small.mask.mean() + 1e-4).objects
    assert kept.rle == large.rle
    assert len(ask(image, ["cat"], minimum_area=small.mask.mean())) == 2
    best, _ = ask(image, ["cat"]).objects
    (kept,) = ask(image, ["cat"], maximum_objects=1).objects
    assert kept.rle == best.rle
    (result,) = ask(image, ["cat"], minimum_area=0.5).sentences
    assert not result.present and result.reason == "its masks cover less than 0.5 of the image"


def test_results_say_whether_presence_was_assumed(found: Segmentation) -> None:
    assert [result.assumed for result in found.sentences] == [False] * 3
    ask = segmenter(cat=discs((10, 10), heat=0.013))
    (result,) = ask(noise(48, 48), ["cat"], assume_present=True).sentences
    assert result.present and result.assumed and result.presence < MODEL.threshold


def test_sentences_come_in_the_order_asked(found: Segmentation) -> None:
    assert [result.sentence for result in found.sentences] == ["cat", "horse", "dog"]
    assert [result.present for result in found.sentences] == [True, False, True]
    assert [result.reason == "" for result in found.sentences] == [True, False, True]
    assert [len(result.prompts) for result in found.sentences] == [2, 0, 1]


def test_arrays_have_an_entry_for_each_object(found: Segmentation) -> None:
    assert found.masks.shape == (3, 96, 96) and found.masks.dtype == bool
    assert found.boxes.shape == (3, 4)
    assert np.array_equal(found["cat"].mask, found.masks[0] | found.masks[1])
    assert not found["horse"].mask.any()


def test_what_is_absent_gets_no_mask_but_a_reason(sam2: Sam2, calls_of: CallsOf) -> None:
    encoder = calls_of(sam2.model.image_encoder)
    ask = segmenter(sam2, player=0.013 * slope(20, 20))
    segmentation = ask(noise(60, 60), ["player"])
    assert segmentation.objects == () and segmentation.masks.shape == (0, 60, 60)
    (result,) = segmentation.sentences
    assert not result.present and result.presence < MODEL.threshold
    assert result.reason == f"its highest probability is only {result.evidence.peak:.3f}"
    assert result.prompts == () and result.evidence.agreement == 1.0
    assert encoder == []


def iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("peak", [2**-6, 2**-13, 0.013, 1e-4])
def test_assumed_present_masks_do_not_depend_on_the_peak(sam2: Sam2, peak: float) -> None:
    """To the last pixel for a power of two; other factors round, and may move an outline a bit."""
    maps = np.stack([slope(12, 12), np.maximum(slope(34, 30), slope(8, 40))])
    ask, image, sentences = segmenter(sam2), noise(90, 120), ["one", "two"]
    strong = ask.segment_maps(image, sentences, wanted=maps, assume_present=True)
    weak = ask.segment_maps(image, sentences, wanted=maps * np.float32(peak), assume_present=True)
    assert len(strong.objects) >= 2
    if math.log2(peak).is_integer():
        assert [segmented.rle for segmented in weak.objects] == [
            segmented.rle for segmented in strong.objects
        ]
        assert [segmented.box for segmented in weak.objects] == [
            segmented.box for segmented in strong.objects
        ]
    for segmented, other in zip(weak.objects, strong.objects, strict=True):
        assert segmented.sentence == other.sentence and iou(segmented.mask, other.mask) > 0.98
    for result, reference in zip(weak.sentences, strong.sentences, strict=True):
        assert result.present and result.presence < reference.presence
        assert len(result.prompts) == len(reference.prompts) > 0


def test_image_is_encoded_once_for_many_sentences_and_objects(
    sam2: Sam2, calls_of: CallsOf
) -> None:
    encoder = calls_of(sam2.model.image_encoder)
    names = ["one", "two", "three", "four", "five"]
    maps = {
        name: discs((8, 8 + index), (24, 40 - index), (40, 20 + index), radius=4)
        for index, name in enumerate(names)
    }
    segmentation = segmenter(sam2, **maps)(noise(70, 50), names, assume_present=True)
    assert sum(len(result.prompts) for result in segmentation.sentences) >= 15
    assert len(encoder) == 1


def test_at_most_six_calls_lead_to_sam2s_decoder(
    tiny: TextSegmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, calls = tiny.sam2.model.sam_mask_decoder, []
    predict_masks = decoder.predict_masks

    def count_calls(**arguments: Any) -> Any:
        functions = [frame.function for frame in inspect.stack(0)]
        calls.append(functions.index("__call__"))  # frames between it and the decoder, and this
        return predict_masks(**arguments)

    monkeypatch.setattr(decoder, "predict_masks", count_calls)
    tiny(noise(40, 40), ["cat", "dog"], assume_present=True)
    assert calls and max(calls) <= 6


def test_repeated_sentences_are_computed_once() -> None:
    ask = segmenter(cat=discs((10, 10)), dog=discs((30, 30)), horse=discs((5, 40)))
    segmentation = ask(noise(48, 48), ["cat", " dog", "cat ", "cat"], ["horse", "horse"])
    assert ask.clipseg.sentences == ["cat", "dog", "horse"]
    assert [result.sentence for result in segmentation.sentences] == ["cat", "dog"]
    assert len(ask.sam2.prompts) == 2 and ask.sam2.encode_calls == 1


@pytest.mark.parametrize(
    ("prompts", "negatives", "message"),
    [
        ([], [], "got none"),
        (["cat", "  "], [], "empty"),
        (["cat"], [""], "empty"),
        (["cat", "dog"], ["horse", " dog"], "'dog' is both wanted and not"),
        ("cat", [], "must be lists"),
        (["cat"], "dog", "must be lists"),
        (["Dog."], ["dog"], "'Dog.' is both wanted and not"),
        (["caf\u00e9"], ["CAFE\u0301 !"], "'café' is both wanted and not"),
        (3, [], "must be lists of sentences, got int"),
        (["cat"], None, "must be lists of sentences, got NoneType"),
        (["cat", None], [], "must be a str, got None"),
        ([b"cat"], [], "must be a str, got b'cat'"),
        (["..."], [], r"no word in it, got '\.\.\.'"),
        (["cat"], ["?!"], "no word in it"),
        (["\u200b"], [], "no word in it"),
        (["cat\x07"], [], r"control characters or broken text, got 'cat\\x07'"),
        (["a\x00b"], [], "control characters"),
        (["caf\udce9"], [], r"broken text, got 'caf\\udce9'"),
    ],
)
def test_unusable_sentences_are_refused_before_anything_runs(
    prompts: Any, negatives: Any, message: str
) -> None:
    ask = segmenter(cat=discs((10, 10)))
    with pytest.raises(InputError, match=message):
        ask(noise(48, 48), prompts, negatives)
    assert ask.clipseg.sentences == []


SPELLINGS = [
    "dog",
    "Dog",
    " DOG ",
    "dog.",
    "Dog!",
    "dog ,",
    "\uff44\uff4f\uff47",
    "d\u00adog",
    "dog\n",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_all_spellings_of_a_sentence_are_one_sentence(spelling: str) -> None:
    ask = segmenter(dog=discs((10, 10)), cat=discs((30, 30)))
    segmentation = ask(noise(48, 48), [spelling, "cat", *SPELLINGS])
    assert ask.clipseg.sentences == ["dog", "cat"]
    assert [result.sentence for result in segmentation.sentences] == [
        " ".join(spelling.split()),
        "cat",
    ]
    for key in SPELLINGS:
        assert segmentation[key] is segmentation.sentences[0]
    assert len(segmentation.objects) == 2


def test_masks_do_not_depend_on_the_spelling(tiny: TextSegmenter) -> None:
    image = noise(40, 40)
    plain = tiny(image, ["red ball"], assume_present=True)
    assert len(plain) > 0
    spelt = tiny(image, ["Red  Ball."], assume_present=True)
    assert [segmented.rle for segmented in spelt] == [segmented.rle for segmented in plain]


@pytest.mark.parametrize(
    ("sentence", "parts"),
    [
        ("ant. bee. cow.", "'ant', 'bee', 'cow'"),
        ("ant, bee", "'ant', 'bee'"),
        ("ant;bee", "'ant', 'bee'"),
        ("Ant . Bee .", "'ant', 'bee'"),
        ("ant\uff0cbee", "'ant', 'bee'"),
    ],
)
def test_a_list_in_one_sentence_works_and_gives_a_hint_once(
    sentence: str, parts: str, caplog: pytest.LogCaptureFixture
) -> None:
    given = {normalize_sentence(sentence): discs((10, 10))}
    ask = segmenter(**given)
    with caplog.at_level(logging.WARNING):
        segmentations = [ask(noise(48, 48), [sentence]) for _ in range(2)]
    assert [len(segmentation) for segmentation in segmentations] == [1, 1]
    (record,) = caplog.records
    assert repr(sentence) in record.getMessage() and parts in record.getMessage()


def test_a_plain_sentence_gives_no_hint(caplog: pytest.LogCaptureFixture) -> None:
    names = ["dog.", "v1.5 engine", "1,000 ants", "dog", "man's hat", "dog!"]
    ask = segmenter(**{normalize_sentence(name): discs((10, 10)) for name in names})
    ask(noise(48, 48), names)
    assert caplog.records == []


def test_the_other_number_of_an_absent_noun_is_suggested_and_never_used(tmp_path: Path) -> None:
    ask = segmenter(
        dogs=discs((10, 10), heat=0.013), dog=discs((10, 10)), cat=discs((36, 30)), cats=slope(9, 9)
    )
    segmentation = ask(noise(48, 48), ["Dogs.", "cat"])
    dogs, cat = segmentation.sentences
    alone = segmenter(dog=discs((10, 10)), cat=discs((36, 30)))(noise(48, 48), ["dog", "cat"])
    assert not dogs.present and dogs.objects == () and dogs.prompts == () and not dogs.mask.any()
    before_masks = replace(alone["dog"].evidence, agreement=1.0)
    assert dogs.suggestions == {"dog": score_presence(before_masks, MODEL)}
    assert cat.suggestions == {} and ask.clipseg.sentences == ["dogs", "cat", "dog"]
    assert ask.clipseg.encode_calls == 1 and len(ask.sam2.prompts) == 1
    assert [segmented.sentence for segmented in segmentation] == ["cat"]
    folder = segmentation.save(tmp_path)
    document = json.loads((folder / "masks.json").read_text())
    assert [row.get("suggestions") for row in document["sentences"]] == [dogs.suggestions, None]
    shown = f"'dog' ({dogs.suggestions['dog']:.2f})"
    assert shown in html.unescape((folder / "report.html").read_text())
    assert segmentation.tables()["Sentences"].rows[0][-1] == shown


def test_where_everything_is_present_nothing_else_is_asked() -> None:
    ask = segmenter(dog=discs((10, 10)), cat=discs((36, 30)))
    ask(noise(48, 48), ["dog", "cat"])
    assert ask.clipseg.sentences == ["dog", "cat"] and ask.clipseg.encode_calls == 1


@pytest.mark.parametrize(
    ("maps", "sentences", "negatives"),
    [
        ({"dogs": discs((10, 10), heat=0.01)}, ["dogs"], []),  # neither is there
        ({"dog": discs((10, 10))}, ["dogs", "dog"], []),  # both were asked
        ({"dog": discs((10, 10))}, ["dogs"], ["dog"]),  # it is not meant
        (
            {"dog": discs((10, 10), heat=0.6), "cat": discs((10, 10), heat=0.95)},
            ["dogs"],
            ["cat"],
        ),
        ({"sheep": discs((10, 10), heat=0.01)}, ["sheep"], []),  # it has one form
    ],
)
def test_nothing_is_suggested_that_is_no_help(
    maps: dict[str, Maps], sentences: list[str], negatives: list[str]
) -> None:
    strict = replace(MODEL, contrastive_margin=20.0)
    segmentation = segmenter(model=strict, **maps)(noise(48, 48), sentences, negatives)
    result = segmentation.sentences[0]
    assert not result.present and result.suggestions == {} and result.objects == ()


def test_shorter_forms_of_an_absent_sentence_are_suggested_and_never_used() -> None:
    ask = segmenter(ball=discs((10, 10)), **{"red ball": discs((10, 10), heat=0.013)})
    found = ask(noise(48, 48), ["large red ball on grass"])
    (result,) = found.sentences
    assert list(result.suggestions) == ["ball"] and result.suggestions["ball"] > MODEL.threshold
    assert not result.present and result.objects == () and ask.sam2.prompts == []
    assert ask.clipseg.sentences[1:] == [
        *("large red balls on grass", "large red ball", "red ball", "ball")
    ]


def test_a_form_is_held_against_the_masks_that_did_not_agree() -> None:
    cat = discs((14, 24), heat=0.6)
    model = replace(MODEL, agreement=6.0, constant=-4.0)
    ask = segmenter(Copyist(shift=20), model, cats=cat, cat=cat)
    (result,) = ask(noise(48, 48), ["cats"]).sentences
    assert not result.present and result.evidence.agreement == 0 and result.suggestions == {}


def test_a_form_that_is_too_long_for_the_model_is_not_suggested(tiny: TextSegmenter) -> None:
    """The tiny model takes 24 tokens: two marks, those of the template, one for each letter."""
    image, longest = noise(20, 20), "z" * 18 + "box"
    with pytest.raises(InputError, match="24 tokens"):
        tiny(image, [f"{longest}es"])
    (result,) = tiny(image, [longest], presence_threshold=1.0).sentences
    assert not result.present and result.suggestions == {}


def test_every_sentence_of_the_scenes_is_asked_as_it_is() -> None:
    assert [normalize_sentence(sentence) for sentence in SCENE_SENTENCES] == list(SCENE_SENTENCES)


def test_segmentation_knows_the_real_name_of_its_image(tmp_path: Path) -> None:
    from PIL import Image

    name = os.fsdecode(b"my  caf\xe9\n1.png")
    path = tmp_path / name
    Image.fromarray(noise(48, 48)).save(tmp_path / "plain.png")
    try:
        path.write_bytes((tmp_path / "plain.png").read_bytes())
    except OSError:
        pytest.skip("this file system stores no such name")
    segmentation = segmenter(cat=discs((10, 10)))(path, ["cat"])
    folder = segmentation.save(tmp_path / "out")
    (image,) = json.loads((folder / "masks.json").read_text())["images"]
    assert os.fsencode(image["file_name"]) == b"my  caf\xe9\n1.png"
    assert segmentation.to_coco("other.png")["images"][0]["file_name"] == "other.png"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "What the sentences name in my caf 1.png" in page
    assert segmenter(cat=discs((10, 10)))(noise(48, 48), ["cat"]).file_name == "image"


def test_ground_of_what_is_not_meant_does_not_count() -> None:
    cat = discs((10, 10), heat=0.7) + discs((36, 34), heat=0.6)
    dog = discs((36, 34), radius=8, heat=0.9)
    assert len(segmenter(cat=cat)(noise(48, 48), ["cat"]).objects) == 2
    segmentation = segmenter(cat=cat, dog=dog)(noise(48, 48), ["cat"], ["dog"])
    assert [result.sentence for result in segmentation.sentences] == ["cat"]
    alone = segmenter(cat=discs((10, 10), heat=0.7))(noise(48, 48), ["cat"])
    assert np.array_equal(segmentation.masks, alone.masks)
    assert iou(alone.masks[0], discs((10, 10)) > 0) > 0.85


def test_what_is_not_meant_and_not_there_takes_nothing_away() -> None:
    cat, dog = discs((10, 10), heat=0.7), discs((10, 10), radius=9, heat=0.01)
    assert len(segmenter(cat=cat, dog=dog)(noise(48, 48), ["cat"], ["dog"]).objects) == 1


def test_nothing_is_left_where_all_of_it_is_not_meant() -> None:
    ask = segmenter(cat=0.5 * slope(20, 20), dog=discs((20, 20), radius=20, heat=0.9))
    segmentation = ask(noise(48, 48), ["cat"], ["dog"])
    (result,) = segmentation.sentences
    assert segmentation.objects == () and not result.present and ask.sam2.encode_calls == 0
    assert "another sentence explains the same place better" in result.reason


def test_a_sentence_is_not_turned_away_by_another_that_is_true_of_the_same_place() -> None:
    strict = replace(MODEL, contrastive_margin=20.0)
    ask = segmenter(model=strict, animal=discs((14, 24), heat=0.6), dog=discs((14, 24), heat=0.95))
    both = ask(noise(48, 48), ["animal", "dog"])
    assert [result.present for result in both.sentences] == [True, True] and len(both) == 2
    apart = ask(noise(48, 48), ["animal", "dog"], exclusive=True)
    assert [result.present for result in apart.sentences] == [False, True]
    negative = ask(noise(48, 48), ["animal"], ["dog"])
    assert not negative["animal"].present


def test_rivals_get_background_points_where_the_other_is() -> None:
    ask = segmenter(cat=discs((14, 24)), dog=discs((30, 24)))
    segmentation = ask(noise(48, 48), ["cat", "dog"])
    for result, other in zip(segmentation.sentences, ((30, 24), (14, 24)), strict=True):
        (prompt,) = result.prompts
        behind = prompt.points[prompt.labels == 0]
        assert len(behind) and (np.hypot(*(behind - other).T) <= 6).all()


def test_mask_that_is_nowhere_near_the_heat_shows_that_nothing_is_there() -> None:
    cat = discs((14, 24), heat=0.6)
    model = replace(MODEL, agreement=6.0, constant=-4.0)
    assert segmenter(model=model, cat=cat)(noise(48, 48), ["cat"]).sentences[0].present
    (result,) = segmenter(Copyist(shift=20), model, cat=cat)(noise(48, 48), ["cat"]).sentences
    assert not result.present and result.evidence.agreement == 0
    assert "no mask there agrees with its map" in result.reason


def test_zero_map_gives_an_empty_result_whatever_is_assumed() -> None:
    for assumed in (False, True):
        ask = segmenter(cat=np.zeros((30, 40), np.float32))
        segmentation = ask(noise(30, 40), ["cat"], assume_present=assumed)
        assert segmentation.objects == () and segmentation.masks.shape == (0, 30, 40)
        assert not segmentation.sentences[0].present and segmentation.sentences[0].reason
        assert ask.sam2.encode_calls == 0
        assert isinstance(segmentation.figure(), Figure)


@pytest.mark.parametrize("shape", [(1, 1), (1, 60), (60, 1), (2, 3), (150, 40)])
def test_images_of_any_shape_go_through_the_real_networks(
    tiny: TextSegmenter, shape: tuple[int, int]
) -> None:
    segmentation = tiny(noise(*shape), ["cat", "dog"], ["horse"], assume_present=True)
    assert segmentation.masks.shape == (len(segmentation.objects), *shape)
    assert all(segmented.mask.any() for segmented in segmentation.objects)
    assert isinstance(segmentation.overlay(), Figure) and isinstance(segmentation.figure(), Figure)


def test_prompts_reach_sam2_in_the_pixels_of_its_square() -> None:
    ask = segmenter()
    wide = discs((9, 12))[None, :24]  # (1, 24, 48), of an image twice as wide as high
    ask.segment_maps(noise(100, 200), ["cat"], wanted=wide, assume_present=True)
    told = ask.sam2.prompts[0]
    left, top, right, bottom = told.box
    assert (left + right, top + bottom) == (2 * 9.5, 2 * 25)
    assert bottom - top == 2 * (right - left) and abs(right - left - 13) <= 2
    assert told.points[0].tolist() == [9, 2 * 12 + 0.5]


def test_profile_names_its_weights_and_its_note(tiny: TextSegmenter, tiny_profile: Profile) -> None:
    segmentation = tiny(noise(40, 40), ["cat"])
    assert segmentation.note == "random weights"
    assert set(segmentation.models) == {"CLIPSeg", "SAM-2"}
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
    assert [segmented.rle for segmented in first.objects] == [
        segmented.rle for segmented in second.objects
    ]


def test_saved_folder_holds_masks_picture_and_report(found: Segmentation, tmp_path: Path) -> None:
    from PIL import Image

    folder = found.save(tmp_path / "new" / "folder", "photo.jpg")
    assert {file.name for file in folder.iterdir()} == {"masks.json", "overlay.png", "report.html"}
    document = json.loads((folder / "masks.json").read_text())
    assert document == found.to_coco("photo.jpg")
    assert document["info"]["description"] == "by hand"
    with Image.open(folder / "overlay.png") as overlay:
        assert min(overlay.size) > 200
    page = (folder / "report.html").read_text()
    assert "by hand" in page and "photo.jpg" in page
    assert page.count("<img") == 2 and found.sentences[1].reason in page


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


def test_tables_have_a_row_for_each_sentence_and_object(found: Segmentation) -> None:
    tables = found.tables()
    assert [row[:2] for row in tables["Sentences"].rows] == [
        ["cat", "yes"],
        ["horse", "no"],
        ["dog", "yes"],
    ]
    assert len(tables["Objects"].rows) == 3


def list_masks(found: Segmentation) -> list[Any]:
    return [(o.sentence, o.rle, o.box, o.presence, o.predicted_iou, o.agreement) for o in found]


def write_images(folder: Path, count: int) -> list[Path]:
    from PIL import Image

    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(make_object_scene(number, seed=CALIBRATION_SEED).image).save(path)
    return paths


def test_a_stream_gives_what_single_calls_give(tmp_path: Path) -> None:
    demo = TextSegmenter.from_profile("demo", device="cpu")
    paths = write_images(tmp_path, 5)
    arguments = (["star", "red circle", "zebra"], ["square"])
    alone = [demo(path, *arguments, box_threshold=0.4) for path in paths]
    assert sum(map(len, alone)) >= 3
    for batch_size in (1, 2, 8):
        stream = demo.stream(paths, *arguments, batch_size=batch_size, box_threshold=0.4)
        for found, expected in zip(stream, alone, strict=True):
            assert found.file_name == expected.file_name and found.settings == expected.settings
            assert list_masks(found) == list_masks(expected)
            for result, other in zip(found.sentences, expected.sentences, strict=True):
                assert (result.presence, result.reason) == (other.presence, other.reason)
                assert result.suggestions == other.suggestions


def test_a_stream_encodes_batches_and_reads_only_a_little_ahead(
    tiny: TextSegmenter, calls_of: CallsOf
) -> None:
    taken: list[int] = []

    def list_images() -> Any:
        for number in range(20):
            taken.append(number)
            yield noise(20, 20, number)

    tower = calls_of(tiny.clipseg.model.clip.vision_model)
    stream = tiny.stream(list_images(), ["cat"], batch_size=4)
    assert taken == []
    next(stream)
    assert len(taken) <= 3 * 4 + 1 and len(tower) == 1
    assert len(list(stream)) == 19 and len(tower) == 5
    assert len(tiny._correctors) <= 4


def test_a_stream_leaves_out_what_fails_in_its_turn(tiny: TextSegmenter, tmp_path: Path) -> None:
    good = write_images(tmp_path, 3)
    sources = [good[0], tmp_path / "gone.png", good[1], good[2]]
    told: list[Any] = []
    for found in tiny.stream(sources, ["a"], on_error=lambda *each: told.append(each)):
        told.append(found.file_name)
    assert [each if isinstance(each, str) else each[0] for each in told] == [
        "0.png",
        tmp_path / "gone.png",
        "1.png",
        "2.png",
    ]
    assert "gone.png does not exist" in str(told[1][1])
    stream = tiny.stream(sources, ["a"])
    assert next(stream).file_name == "0.png"
    with pytest.raises(InputError, match=r"gone\.png does not exist"):
        next(stream)


def test_a_stream_refuses_bad_arguments_before_its_first_image(tiny: TextSegmenter) -> None:
    with pytest.raises(InputError, match="batch_size must be 1 or more, got 0"):
        tiny.stream([], ["a"], batch_size=0)
    with pytest.raises(InputError, match="empty"):
        tiny.stream([], [" "])
    with pytest.raises(InputError, match="box_threshold"):
        tiny.stream([], ["a"], box_threshold=2)
    assert list(tiny.stream([], ["a"])) == []

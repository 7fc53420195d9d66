from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from torch import nn

from labkit.runtime import InputError, SourceError, use_seed
from labkit.segment.checkpoints import DETECTORS, DetectorCheckpoint, Profile, find_detector
from labkit.segment.detectors import (
    Detections,
    Detector,
    GroundingDino,
    Owlv2,
    detect_boxes,
    fuse_prompts,
    load_detector,
    select_boxes,
)
from labkit.segment.pipeline import TextSegmenter
from labkit.segment.prompts import Prompt, make_prompts
from tests.loopback import Fault, LoopbackHub
from tests.segment.conftest import CPU, CallsOf, enliven, make_letter_tokenizer, noise

SENTENCES = ["red ball", "blue dog", "saint bernard"]
LOW_RES = 32


def save_grounding_dino(folder: Path) -> Path:
    """A tiny one; full stop and question mark have the ids that the model looks for."""
    from transformers import (
        BertTokenizer,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        MMGroundingDinoConfig,
        MMGroundingDinoForObjectDetection,
    )

    tokens = [f"[unused{number}]" for number in range(1030)]
    tokens[0], tokens[100:104] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens[1012], tokens[1029] = ".", "?"
    words = ["a", "st", "red", "blue", "ball", "dog", "saint", "bernard"]
    tokens[200 : 200 + len(words)] = words
    tokenizer = BertTokenizer(vocab={token: number for number, token in enumerate(tokens)})
    size = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
    layers = {"layers": 2, "ffn_dim": 32, "attention_heads": 2}
    both = {f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in layers.items()}
    config = MMGroundingDinoConfig(
        backbone_config={
            "model_type": "swin",
            "image_size": 64,
            "embed_dim": 16,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 2, 2],
            "window_size": 4,
            "out_indices": [2, 3, 4],
        },
        text_config={
            "model_type": "bert",
            "vocab_size": len(tokens),
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            **size,
        },
        d_model=32,
        num_queries=12,
        max_text_len=24,
        **both,
    )
    with use_seed(0):
        model = MMGroundingDinoForObjectDetection(config)
        enliven(model)
    model.save_pretrained(folder)
    images = GroundingDinoImageProcessor(size={"shortest_edge": 48, "longest_edge": 96})
    GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def save_owlv2(folder: Path) -> Path:
    """A tiny one, whose tokenizer knows single letters."""
    from transformers import (
        Owlv2Config,
        Owlv2ForObjectDetection,
        Owlv2ImageProcessor,
        Owlv2Processor,
    )

    tokenizer = make_letter_tokenizer(40, pad_token="!")
    end = tokenizer.eos_token_id
    size = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    special = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": 0}
    config = Owlv2Config(
        text_config={
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 40,
            **size,
            **special,
        },
        vision_config={"image_size": 32, "patch_size": 8, **size},
        projection_dim=32,
    )
    with use_seed(0):
        model = Owlv2ForObjectDetection(config)
        enliven(model)
    model.save_pretrained(folder)
    images = Owlv2ImageProcessor(size={"height": 32, "width": 32})
    Owlv2Processor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("detectors")
    return {
        "mm-grounding-dino": save_grounding_dino(folder / "mm-grounding-dino"),
        "owlv2": save_owlv2(folder / "owlv2"),
    }


@pytest.fixture
def dino(folders: dict[str, Path]) -> GroundingDino:
    detector = load_detector(str(folders["mm-grounding-dino"]), CPU)
    assert isinstance(detector, GroundingDino)
    return detector


@pytest.fixture
def owl(folders: dict[str, Path]) -> Owlv2:
    detector = load_detector(str(folders["owlv2"]), CPU)
    assert isinstance(detector, Owlv2)
    return detector


def offer(hub: LoopbackHub, name: str, folder: Path) -> DetectorCheckpoint:
    """Put the files where the published ones lie; the checkpoint with the digest of these."""
    published = DETECTORS[name]
    for path in folder.iterdir():
        hub.add(published.source, path.name, path.read_bytes(), revision=published.revision)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return dataclasses.replace(published, digest=f"sha256:{digest}")


# The models


def test_grounding_dino_equals_transformers_own_forward_and_boxes(
    dino: GroundingDino, folders: dict[str, Path]
) -> None:
    from transformers import MMGroundingDinoForObjectDetection

    plain = MMGroundingDinoForObjectDetection.from_pretrained(folders["mm-grounding-dino"])
    compare(dino, plain.eval(), [f"{sentence}." for sentence in SENTENCES])


def test_owlv2_equals_transformers_own_forward_and_boxes(
    owl: Owlv2, folders: dict[str, Path]
) -> None:
    from transformers import Owlv2ForObjectDetection

    plain = Owlv2ForObjectDetection.from_pretrained(folders["owlv2"])
    compare(owl, plain.eval(), [[[f"a photo of a {sentence}"]] for sentence in SENTENCES])


def compare(detector: GroundingDino | Owlv2, plain: Any, texts: Sequence[Any]) -> None:
    """Of all sentences at once, boxes are those of transformers for each sentence alone.

    They are clipped to the image, without those that torchvision's NMS takes out. The threshold
    lets half of the boxes through.
    """
    image, processor = noise(40, 64), detector.processor
    for index, text in enumerate(texts):
        inputs = processor(images=image, text=text, return_tensors="pt")
        with torch.inference_mode():
            outputs = plain(**inputs)
        scores = outputs.logits[0].max(dim=-1).values.sigmoid().sort().values
        middle = len(scores) // 2
        detector.threshold = threshold = float(scores[middle - 1 : middle + 1].mean())
        (reference,) = processor.post_process_grounded_object_detection(
            outputs, threshold=threshold, target_sizes=[image.shape[:2]]
        )
        boxes = torchvision.ops.clip_boxes_to_image(reference["boxes"], image.shape[:2])
        has_area = (boxes[:, :2] < boxes[:, 2:]).all(dim=1)
        boxes, scores = boxes[has_area], reference["scores"][has_area]
        kept = torchvision.ops.nms(boxes, scores, 0.7)
        found = detector.detect(image, SENTENCES)[index]
        assert len(found.scores) == len(kept) > 0
        np.testing.assert_allclose(found.boxes, boxes[kept], atol=1e-3)
        np.testing.assert_allclose(found.scores, scores[kept], atol=1e-5)


def test_an_image_is_encoded_once_for_all_sentences(
    dino: GroundingDino, owl: Owlv2, calls_of: CallsOf
) -> None:
    by_dino = calls_of(dino.model.model.backbone.conv_encoder.backbone)
    by_owl = calls_of(owl.model.owlv2.vision_model)
    for count, seed in ((1, 0), (2, 1)):
        dino.detect(noise(40, 64, seed), SENTENCES)
        owl.detect(noise(40, 64, seed), SENTENCES)
        assert len(by_dino) == len(by_owl) == count


def test_grounding_dino_is_asked_one_phrase_in_its_own_form(
    dino: GroundingDino, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    forward = dino.model.forward

    def recorded(**inputs: Any) -> Any:
        ids = inputs["input_ids"][0]
        asked.append(dino.processor.tokenizer.convert_ids_to_tokens(ids))
        return forward(**inputs)

    monkeypatch.setattr(dino.model, "forward", recorded)
    dino.detect(noise(40, 64), ["Red  Ball.", "A St. Bernard", "dog?"])
    assert [" ".join(tokens[1:-1]) for tokens in asked] == [
        "red ball .",
        "a st bernard .",
        "dog .",
    ]


class HandMade(nn.Module):
    """A model with given outputs."""

    def __init__(self, config: Any, boxes: list[list[float]], logits: list[list[float]]) -> None:
        super().__init__()
        self.config = config
        self.boxes, self.logits = torch.tensor([boxes]), torch.tensor([logits])

    def forward(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(pred_boxes=self.boxes, logits=self.logits)


def test_boxes_of_owlv2_are_shares_of_the_square_around_the_image(owl: Owlv2) -> None:
    boxes = [
        [0.5, 0.25, 0.5, 0.25],
        [0.9, 0.5, 0.4, 0.5],  # over the right edge and into the padding below
        [0.5, 0.8, 0.2, 0.2],  # in the padding
        [0.5, 0.25, 0.1, 0.1],  # not sure enough
    ]
    logits = [[0.0, -9.0], [-9.0, 1.0], [3.0, 3.0], [-2.2, -9.0]]
    owl.model = HandMade(owl.model.config, boxes, logits)
    first, second = owl.detect(noise(40, 80), ["dog", "cat"])
    np.testing.assert_allclose(first.boxes, [[20, 10, 60, 30]], atol=1e-4)
    np.testing.assert_allclose(first.scores, [0.5])
    np.testing.assert_allclose(second.boxes, [[56, 20, 80, 40]], atol=1e-4)
    assert second.score == pytest.approx(1 / (1 + np.exp(-1)))


def test_boxes_of_grounding_dino_are_shares_of_the_image_and_the_best_token_counts(
    dino: GroundingDino,
) -> None:
    boxes = [[0.5, 0.25, 0.5, 0.25], [0.25, 0.5, 0.5, 0.5]]
    dino.model = HandMade(dino.model.config, boxes, [[-9.0, 0.0, -np.inf], [-9.0, -2.0, -np.inf]])
    (found,) = dino.detect(noise(40, 80), ["dog"])
    np.testing.assert_allclose(found.boxes, [[20, 5, 60, 15]], atol=1e-4)
    np.testing.assert_allclose(found.scores, [0.5])


@pytest.mark.parametrize("name", ["dino", "owl"])
def test_a_sentence_that_is_too_long_is_one_line(name: str, request: Any) -> None:
    detector = request.getfixturevalue(name)
    with pytest.raises(InputError, match=r"must fit into \d+ tokens, got 'dog dog") as error:
        detector.detect(noise(40, 64), ["dog " * 40])
    assert "fewer words, or choose detector='none'" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_strip_too_narrow_for_grounding_dino_has_no_boxes(dino: GroundingDino) -> None:
    (found,) = dino.detect(noise(2, 64), ["dog"])
    assert found.score == 0 and found.boxes.shape == (0, 4)


# Where they come from


@pytest.mark.parametrize("name", list(DETECTORS))
def test_a_detector_is_downloaded_checked_and_loaded(
    name: str, hub: LoopbackHub, folders: dict[str, Path]
) -> None:
    checkpoint = offer(hub, name, folders[name])
    detector = load_detector(checkpoint, CPU)
    assert detector.name == checkpoint.name and "not checked" not in detector.name
    assert len(detector.detect(noise(40, 64), SENTENCES)) == 3
    wrong = dataclasses.replace(checkpoint, digest="sha256:" + "0" * 64)
    with pytest.raises(SourceError, match=r"wrong checksum.*or choose detector='none'"):
        load_detector(wrong, CPU)


def test_the_published_detectors_keep_their_pins_and_say_what_is_not_checked() -> None:
    for checkpoint in DETECTORS.values():
        assert find_detector(checkpoint.source) == checkpoint
    assert find_detector("owlv2").digest
    assert find_detector("mm-grounding-dino").name.endswith("at main (not checked)")
    assert find_detector("me/mine@v1") == DetectorCheckpoint(source="me/mine", revision="v1")
    with pytest.raises(InputError, match="detector must be one of none, mm-grounding-dino, owlv2"):
        find_detector("yolo")


@pytest.mark.parametrize("fault", [Fault.GATED, Fault.UNAUTHORIZED])
@pytest.mark.parametrize("place", ["listing", "file"])
def test_a_gated_repository_is_one_line(
    place: str, fault: Fault, hub: LoopbackHub, folders: dict[str, Path]
) -> None:
    checkpoint = offer(hub, "owlv2", folders["owlv2"])
    source, revision = checkpoint.source, checkpoint.revision
    if place == "listing":
        hub.server.fail(f"/api/models/{source}/revision/{revision}", *[fault] * 9)
    for path in folders["owlv2"].iterdir():
        for method in ("HEAD", "GET"):
            served = f"/{source}/resolve/{revision}/{path.name}"
            hub.server.fail(served, *[fault] * 9, method=method)
    with pytest.raises(SourceError, match=rf"the hub refuses {source} \(40[13]\)") as error:
        load_detector(checkpoint, CPU)
    assert "accept its licence on its page and log in" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", list(DETECTORS))
def test_a_model_without_a_tokenizer_is_one_line(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders[name], tmp_path / "model")
    for tokens in ("tokenizer.json", "vocab.txt", "vocab.json"):
        (tmp_path / "model" / tokens).unlink(missing_ok=True)
    with pytest.raises(SourceError, match="it has no tokenizer") as error:
        load_detector(str(tmp_path / "model"), CPU)
    assert len(str(error.value).splitlines()) == 1


def test_another_architecture_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"none")
    with pytest.raises(SourceError, match="model_type is 'bert', not one of mm-grounding-dino"):
        load_detector(str(tmp_path), CPU)


# Boxes


def test_of_boxes_that_repeat_each_other_the_surest_is_kept_as_torchvision_does() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 60, (80, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(20, 40, (80, 2))], axis=1)
    scores = rng.uniform(0, 1, 80)
    kept = torchvision.ops.nms(torch.tensor(boxes), torch.tensor(scores), 0.7).numpy()
    found = select_boxes(boxes, scores, size=(100, 100), threshold=0.0)
    assert 10 < len(kept) < 80
    np.testing.assert_array_equal(found.boxes, boxes[kept])
    np.testing.assert_array_equal(found.scores, scores[kept])


@pytest.mark.parametrize(
    ("boxes", "scores", "message"),
    [
        (np.zeros((2, 4)), np.zeros(3), r"boxes must be \(N, 4\) and scores \(N,\), got"),
        (np.array([[0.0, 0, 9, 9]]), np.array([1.5]), r"must lie in \[0, 1\]"),
        (np.array([[9.0, 0, 0, 9]]), np.array([0.5]), r"left, top, right, bottom in pixels, got"),
        (np.array([[np.nan, 0, 9, 9]]), np.array([0.5]), r"left, top, right, bottom in pixels"),
    ],
)
def test_what_is_no_box_is_one_line(boxes: Any, scores: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Detections(boxes=boxes, scores=scores)


class FixedDetector:
    """Gives the same boxes for every sentence."""

    name = "fixed boxes"

    def __init__(self, *boxes: Sequence[float], score: float = 0.9) -> None:
        self.detections = Detections(
            boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
            scores=np.full(len(boxes), score),
        )

    def detect(self, image: NDArray[np.uint8], sentences: Sequence[str]) -> list[Detections]:
        return [self.detections for _ in sentences]


def test_boxes_of_ones_own_detector_are_clipped_and_one_outside_is_one_line() -> None:
    detector: Detector = FixedDetector((-5, 10, 30, 90))
    (found,) = detect_boxes(detector, noise(40, 80), ["dog"])
    np.testing.assert_array_equal(found.boxes, [[0, 10, 30, 40]])
    with pytest.raises(InputError, match=r"fixed boxes gave a box outside the image for 'dog'"):
        detect_boxes(FixedDetector((90, 10, 99, 20)), noise(40, 80), ["dog"])


# Fusion: exact, on a map of 20 x 40 with two instances


def two_squares(left: float = 0.8, right: float = 0.8) -> NDArray[np.float64]:
    heat = np.zeros((20, 40))
    heat[5:15, 5:15], heat[5:15, 25:35] = left, right
    return heat


def fuse(
    heat: NDArray[np.float64], *boxes: Sequence[float], scores: Sequence[float] | None = None
) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts of a map, and what boxes make of them."""
    prompts = make_prompts(heat, low_res_size=LOW_RES)
    detections = Detections(
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        scores=np.array(scores if scores is not None else [0.5] * len(boxes), dtype=np.float64),
    )
    return prompts, fuse_prompts(prompts, heat, detections, low_res_size=LOW_RES)


def same_but_box(prompt: Prompt, other: Prompt) -> bool:
    names = ("points", "labels", "mask_logits", "region")
    return all(np.array_equal(getattr(prompt, name), getattr(other, name)) for name in names)


def test_a_box_around_an_instance_replaces_its_box_prompt_and_nothing_else() -> None:
    prompts, fused = fuse(two_squares(), (3.5, 4, 17, 16))
    assert len(prompts) == len(fused) == 2
    assert same_but_box(fused[0], prompts[0]) and fused[0].box.tolist() == [3.5, 4, 17, 16]
    assert fused[1] is prompts[1]


def test_a_box_without_heat_makes_no_prompt() -> None:
    prompts, fused = fuse(two_squares(), (16, 0, 24, 20), (0, 16, 40, 20))
    assert fused == prompts
    nothing, fused = fuse(np.zeros((20, 40)), (3, 3, 17, 17))
    assert nothing == fused == []


def test_a_box_that_only_touches_the_edge_of_heat_makes_no_prompt() -> None:
    prompts, fused = fuse(two_squares(), (14, 0, 26, 20))  # 20 hot pixels of 240
    assert fused == prompts


def test_heat_that_no_box_covers_keeps_its_prompt() -> None:
    for boxes in ([], [(23, 4, 37, 16)]):
        prompts, fused = fuse(two_squares(0.8, 0.7), *boxes)
        assert len(fused) == 2 and fused[-1] is prompts[0 if boxes else 1]


def test_two_boxes_in_one_instance_make_two_prompts_with_points_and_masks_of_the_map() -> None:
    heat = np.zeros((20, 40))
    heat[5:15, 5:35] = 0.8
    prompts, fused = fuse(heat, (5, 5, 20, 15), (20, 5, 35, 15))
    assert len(prompts) == 1 and len(fused) == 2
    for prompt, (left, right) in zip(fused, ((5, 20), (20, 35)), strict=True):
        expected = np.zeros((20, 40), dtype=bool)
        expected[5:15, left:right] = True
        np.testing.assert_array_equal(prompt.region, expected)
        assert prompt.box.tolist() == [left, 5, right, 15]
        columns = prompt.points[prompt.labels == 1][:, 0]
        assert len(columns) == 3 and ((columns >= left) & (columns < right)).all()
        hot = np.flatnonzero((prompt.mask_logits > 0).any(axis=0)) * 40 / LOW_RES
        assert left - 1 <= hot.min() and hot.max() <= right


def test_boxes_that_reach_into_each_others_instance_leave_it_to_the_one_that_holds_it() -> None:
    boxes = ((4, 4, 27, 16), (13, 4, 37, 16))
    prompts, fused = fuse(two_squares(), *boxes, scores=(0.9, 0.6))
    assert [prompt.box.tolist() for prompt in fused] == [list(box) for box in boxes]
    assert all(same_but_box(new, old) for new, old in zip(fused, prompts, strict=True))


def test_a_box_around_all_leaves_the_instances_to_the_boxes_that_fit_them() -> None:
    boxes = ((4, 4, 36, 16), (4, 4, 16, 16), (24, 4, 36, 16))  # a crowd, two persons
    _, fused = fuse(two_squares(), *boxes, scores=(0.9, 0.5, 0.4))
    assert [prompt.box.tolist() for prompt in fused] == [list(box) for box in boxes[1:]]


def test_a_box_that_is_much_larger_than_its_heat_makes_no_prompt() -> None:
    heat = np.zeros((20, 40))
    heat[8:12, 10:20] = 0.8  # 40 pixels of 800
    prompts, fused = fuse(heat, (0, 0, 40, 20))
    assert len(prompts) == 1 and fused == prompts


def test_a_box_that_is_too_large_takes_no_instance_from_those_that_share_it() -> None:
    heat = np.zeros((20, 40))
    heat[8:12, 10:20] = 0.8
    halves = ((10, 8, 15, 12), (15, 8, 20, 12))
    _, fused = fuse(heat, (0, 0, 40, 20), *halves, scores=(0.9, 0.5, 0.4))
    assert [prompt.box.tolist() for prompt in fused] == [list(box) for box in halves]


def test_ground_that_two_boxes_share_goes_to_the_one_in_which_it_lies_deeper() -> None:
    heat = np.zeros((20, 40))
    heat[5:15, 5:35] = 0.8
    _, fused = fuse(heat, (5, 5, 25, 15), (15, 5, 35, 15), scores=(0.9, 0.5))
    assert [prompt.box.tolist() for prompt in fused] == [[5, 5, 25, 15], [15, 5, 35, 15]]
    assert [np.flatnonzero(prompt.region[10])[[0, -1]].tolist() for prompt in fused] == [
        [5, 19],
        [20, 34],
    ]


def test_the_surer_box_takes_the_ground_and_one_inside_it_makes_no_prompt() -> None:
    boxes = ((6, 6, 10, 10), (4, 4, 16, 16))  # a head, a person
    _, fused = fuse(two_squares(), *boxes, scores=(0.4, 0.6))
    assert [prompt.box.tolist() for prompt in fused] == [[4, 4, 16, 16], [25, 5, 35, 15]]


def test_a_box_around_two_instances_is_one_prompt_with_points_in_both() -> None:
    prompts, fused = fuse(two_squares(), (4, 4, 36, 16))
    assert len(prompts) == 2 and len(fused) == 1
    np.testing.assert_array_equal(fused[0].region, two_squares() > 0)
    columns = fused[0].points[fused[0].labels == 1][:, 0]
    assert (columns < 15).any() and (columns >= 25).any()


def test_background_points_in_the_ground_of_a_box_are_left_out() -> None:
    heat = two_squares()
    prompts, fused = fuse(heat, (4, 4, 36, 16))
    assert all((prompt.labels == 0).any() for prompt in prompts)  # each competes with the other
    assert (fused[0].labels == 1).all()


# The pipeline


@pytest.fixture(scope="module")
def segmenter(tiny_profile: Profile) -> TextSegmenter:
    return TextSegmenter.from_profile(tiny_profile, device="cpu")


def find(
    segmenter: TextSegmenter, heat: NDArray[np.float64], detector: Detector | None
) -> dict[str, Any]:
    """The results of a map for "dog" and of an empty one for "cat", by sentence."""
    maps = np.array([heat, np.zeros_like(heat)], dtype=np.float32)
    with_detector = TextSegmenter(
        segmenter.clipseg, segmenter.sam2, presence=segmenter.presence, detector=detector
    )
    found = with_detector.segment_maps(noise(40, 80), ["dog", "cat"], wanted=maps)
    exported = {each["sentence"]: each for each in found.to_coco()["sentences"]}
    return {r.sentence: (r, exported[r.sentence]) for r in found.sentences}


def test_a_detector_that_is_sure_never_makes_an_absent_sentence_present(
    segmenter: TextSegmenter,
) -> None:
    heat = np.zeros((40, 80))
    heat[10:30, 10:30] = 0.9
    plain = find(segmenter, heat, None)
    found = find(segmenter, heat, FixedDetector((8, 8, 33, 33), score=0.99))
    result, exported = found["cat"]
    assert not result.present and not result.prompts and not result.objects
    assert result.presence == plain["cat"][0].presence
    assert result.detector_score == exported["detector_score"] == 0.99
    assert "detector_score" not in plain["cat"][1] and plain["cat"][0].detector_score is None


def test_boxes_reach_the_prompts_of_a_sentence_in_pixels_of_its_map(
    segmenter: TextSegmenter,
) -> None:
    heat = np.zeros((20, 40))
    heat[5:15, 5:15] = 0.9
    found = find(segmenter, heat, FixedDetector((4, 4, 36, 36)))
    assert [2, 2, 18, 18] in [prompt.box.tolist() for prompt in found["dog"][0].prompts]


def test_a_profile_takes_a_detector_by_name_or_none(
    tiny_profile: Profile, folders: dict[str, Path]
) -> None:
    plain = TextSegmenter.from_profile(tiny_profile, detector="none", device="cpu")
    assert plain.detector is None and "detector" not in plain.models
    folder = str(folders["owlv2"])
    found = TextSegmenter.from_profile(tiny_profile, detector=folder, device="cpu")
    assert isinstance(found.detector, Owlv2)
    assert found.models["detector"] == "owlv2 (local, not checked)"
    result = found(noise(40, 64), ["dog"])["dog"]
    assert result.detector_score is not None and 0 <= result.detector_score <= 1

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sam2.sam2_image_predictor import SAM2ImagePredictor
from sam2.utils.amg import calculate_stability_score
from skimage.morphology import area_closing, area_opening

from labkit.files import compute_checksum
from labkit.runtime import OutOfMemoryError, SourceError
from labkit.segment import sam2 as refine
from labkit.segment.checkpoints import Profile
from labkit.segment.prompts import Prompt
from labkit.segment.sam2 import Candidate, Sam2
from tests.segment.conftest import CPU, CallsOf, noise

SIDE, GRID = 192, 48
Mask = NDArray[np.bool_]


def prompt(positives: int = 1, negatives: int = 0, *, seed: int = 0) -> Prompt:
    """Random points, a box and a mask, in pixels of SAM-2's square."""
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, SIDE, (2, 2)), axis=0)
    return Prompt(
        points=rng.uniform(0, SIDE - 1, (positives + negatives, 2)),
        labels=np.repeat([1, 0], [positives, negatives]),
        box=corners.ravel(),
        mask_logits=rng.uniform(-10, 10, (GRID, GRID)).astype(np.float32),
        region=np.ones((4, 4), dtype=bool),
    )


def mixed(count: int = 6) -> list[Prompt]:
    """With different numbers of points, from none to five."""
    numbers = [(1, 0), (3, 2), (2, 1), (0, 0), (3, 2), (1, 1)]
    return [prompt(*numbers[index % 6], seed=index) for index in range(count)]


@pytest.fixture
def predictor(sam2: Sam2, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Meta's own predictor with the same model, and the plain first mask for a single one."""
    with pytest.warns(DeprecationWarning, match=r"torch\.jit\.script"):
        predictor = SAM2ImagePredictor(sam2.model)
    predictor._bb_feat_sizes = [(48, 48), (24, 24), (12, 12)]
    monkeypatch.setattr(sam2.model.sam_mask_decoder, "dynamic_multimask_via_stability", False)
    return predictor


def predicted(predictor: Any, one: Prompt, **options: Any) -> tuple[Any, Any, Any]:
    """Full-size logits, IoUs (4,) and coarse logits (4, G, G): of one mask, then of three."""
    points = len(one.points) > 0
    answers = [
        predictor.predict(
            point_coords=one.points if points else None,
            point_labels=one.labels if points else None,
            box=one.box,
            mask_input=one.mask_logits[None],
            multimask_output=several,
            return_logits=True,
            **options,
        )
        for several in (False, True)
    ]
    full, ious, coarse = (np.concatenate(pair) for pair in zip(*answers, strict=True))
    return full, ious, coarse


def test_masks_equal_those_of_sam2s_own_predictor(sam2: Sam2, predictor: Any) -> None:
    image = noise(SIDE, SIDE)
    prompts = mixed()
    logits, ious = sam2.decode(sam2.encode(image), prompts)
    assert (sam2.side, sam2.grid) == (SIDE, GRID)
    assert logits.shape == (6, 4, GRID, GRID) and ious.shape == (6, 4)
    predictor.set_image(image)
    for row, one in enumerate(prompts):
        _, expected_ious, expected = predicted(predictor, one)
        assert np.abs(logits[row]).max() < 32  # beyond which the predictor clips
        assert np.abs(logits[row] - expected).max() <= 1e-4
        assert np.abs(ious[row] - expected_ious).max() <= 1e-4
    apart = np.abs(logits[:, None] - logits[None]).max(axis=(2, 3, 4))
    assert apart[~np.eye(6, dtype=bool)].min() > 0.01  # else the comparison proves nothing


@pytest.mark.parametrize("shape", [(100, 250), (333, 150), (7, 5)])
def test_masks_equal_those_of_the_predictor_for_other_sizes(
    sam2: Sam2, predictor: Any, shape: tuple[int, int]
) -> None:
    image = noise(*shape)
    prompts = mixed(3)
    logits, ious = sam2.decode(sam2.encode(image), prompts)
    predictor.set_image(image)
    for row, one in enumerate(prompts):
        shares = replace(one, points=one.points / SIDE, box=one.box / SIDE)
        full, expected_ious, expected = predicted(predictor, shares, normalize_coords=False)
        assert np.abs(logits[row] - expected).max() <= 1e-4
        assert np.abs(ious[row] - expected_ious).max() <= 1e-4
        for mask, wanted in zip(expected, full, strict=True):
            assert np.array_equal(refine.enlarged(mask, shape), wanted > 0)


def test_prompts_scaled_to_the_square_mean_what_pixels_mean_to_the_predictor(
    sam2: Sam2, predictor: Any
) -> None:
    """But that a point stands for the middle of its pixel at both sizes, not for its corner."""
    image, one = noise(SIDE // 2, SIDE // 2), prompt(2, 1)
    small = replace(one, points=one.points / 2, box=one.box / 2)
    logits, _ = sam2.decode(sam2.encode(image), [small.scaled(2, 2)])
    predictor.set_image(image)
    _, _, expected = predicted(predictor, replace(small, points=small.points + 0.25))
    assert np.abs(logits[0] - expected).max() <= 1e-4


def test_clicks_equal_those_of_the_predictor_with_a_point_and_nothing_else(
    sam2: Sam2, predictor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, points = noise(SIDE, SIDE), np.random.default_rng(1).uniform(0, SIDE - 1, (5, 2))
    features = sam2.encode(image)
    logits, ious = sam2.click(features, points)
    assert logits.shape == (5, 4, GRID, GRID) and ious.shape == (5, 4)
    predictor.set_image(image)
    for row, point in enumerate(points):
        answers = [
            predictor.predict(point[None], np.array([1]), multimask_output=several)[1:]
            for several in (False, True)
        ]
        expected_ious, expected = (np.concatenate(pair) for pair in zip(*answers, strict=True))
        assert np.abs(logits[row]).max() < 32  # beyond which the predictor clips
        assert np.abs(logits[row] - expected).max() <= 1e-4
        assert np.abs(ious[row] - expected_ious).max() <= 1e-4
    apart = np.abs(logits[:, None] - logits[None]).max(axis=(2, 3, 4))
    assert apart[~np.eye(5, dtype=bool)].min() > 0.01  # else the comparison proves nothing
    for size in (1, 2):
        monkeypatch.setattr(refine, "_PROMPTS_AT_ONCE", size)
        again = sam2.click(features, points)
        assert np.abs(again[0] - logits).max() <= 1e-5
        assert np.abs(again[1] - ious).max() <= 1e-5


def test_company_and_size_of_parts_change_nothing(
    sam2: Sam2, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, prompts = sam2.encode(noise(30, 40)), mixed(20)
    logits, ious = sam2.decode(features, prompts)
    alone = [sam2.decode(features, [one]) for one in prompts]
    assert np.abs(np.concatenate([pair[0] for pair in alone]) - logits).max() <= 1e-5
    assert np.abs(np.concatenate([pair[1] for pair in alone]) - ious).max() <= 1e-5
    monkeypatch.setattr(refine, "_PROMPTS_AT_ONCE", 3)
    for order in (slice(None), slice(None, None, -1)):
        again = sam2.decode(features, prompts[order])
        assert np.abs(again[0][order] - logits).max() <= 1e-5
        assert np.abs(again[1][order] - ious).max() <= 1e-5


def test_image_is_encoded_once_for_many_prompts(
    sam2: Sam2, calls_of: CallsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refine, "_PROMPTS_AT_ONCE", 4)
    encoder = calls_of(sam2.model.image_encoder)
    transformer = calls_of(sam2.model.sam_mask_decoder.transformer)
    sam2.decode(sam2.encode(noise(30, 40)), [prompt(seed=seed) for seed in range(10)])
    assert (len(encoder), len(transformer)) == (1, 3)


def test_no_prompts_and_no_clicks_give_no_masks(sam2: Sam2) -> None:
    features = sam2.encode(noise(9, 9))
    for logits, ious in (sam2.decode(features, []), sam2.click(features, np.zeros((0, 2)))):
        assert logits.shape == (0, 4, GRID, GRID) and ious.shape == (0, 4)


def test_prompts_that_do_not_fit_into_memory_are_decoded_in_smaller_parts(
    sam2: Sam2, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, prompts, whole = sam2.encode(noise(30, 40)), mixed(9), sam2._decoded
    logits, _ = sam2.decode(features, prompts)

    def cramped(features: Any, some: Any) -> Any:
        if len(some) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(features, some)

    monkeypatch.setattr(sam2, "_decoded", cramped)
    assert np.abs(sam2.decode(features, prompts)[0] - logits).max() <= 1e-5


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemoryError),
        (RuntimeError("a bug"), RuntimeError),
    ],
)
def test_only_want_of_memory_is_called_so_when_encoding(
    sam2: Sam2, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[Exception]
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(sam2.model, "forward_image", fail)
    with pytest.raises(expected) as info:
        sam2.encode(noise(9, 9))
    assert ("smaller SAM-2" in str(info.value)) == (expected is OutOfMemoryError)


def test_loading_and_inference_leave_global_state_as_found(tiny_profile: Profile) -> None:
    def state() -> list[Any]:
        numpy_state = str(np.random.get_state())
        return [torch.get_rng_state().tolist(), random.getstate(), numpy_state]

    before = state()
    sam2 = Sam2.from_pin(tiny_profile.sam2["tiny"], CPU)
    sam2.decode(sam2.encode(noise(9, 9)), [prompt()])
    assert state() == before and torch.is_grad_enabled()
    assert {parameter.dtype for parameter in sam2.model.parameters()} == {torch.float32}
    assert not sam2.model.training


def as_published(file: Path) -> Path:
    """The same weights in the layout of Meta's checkpoints."""
    from safetensors.torch import load_file

    other = file.with_suffix(".pt")
    torch.save({"model": load_file(file)}, other)
    return other


def test_checkpoint_in_metas_layout_gives_the_same_model(
    tiny_profile: Profile, sam2: Sam2, tmp_path: Path
) -> None:
    pin = tiny_profile.sam2["tiny"]
    file = as_published(Path(shutil.copy(pin.file(), tmp_path)))
    digest = f"sha256:{compute_checksum(file)}"
    other = Sam2.from_pin(
        replace(pin, source=str(tmp_path), filename=file.name, digest=digest), CPU
    )
    weights = other.model.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in sam2.model.state_dict().items())


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def without(name: str) -> Callable[[Path], None]:
    def drop(file: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(file)
        del weights[name]
        save_file(weights, file)

    return drop


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut short": cut,
    "no weights in it": lambda file: file.write_bytes(b"?" * 99),
    "a weight missing": without("no_mem_embed"),
    "another model's": lambda file: shutil.copy(file.parent / "clipseg.safetensors", file),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("name", DAMAGE)
def test_files_of_no_whole_sam2_are_refused_in_one_line(
    tiny_profile: Profile, tmp_path: Path, name: str, suffix: str
) -> None:
    pin = tiny_profile.sam2["tiny"]
    file = tmp_path / pin.filename
    shutil.copy(pin.file(), file)
    other = Path(tiny_profile.clipseg.source) / "model.safetensors"
    shutil.copy(other, tmp_path / "clipseg.safetensors")
    at_rest = name in ("cut short", "no weights in it")
    if not at_rest:
        DAMAGE[name](file)
    if suffix == ".pt":
        file = as_published(file)
    if at_rest:
        DAMAGE[name](file)
    with pytest.raises(SourceError, match="could not be loaded as") as info:
        Sam2.from_pin(replace(pin, source=str(tmp_path), filename=file.name), CPU)
    assert "\n" not in str(info.value) and str(file) in str(info.value)


def test_altered_file_is_refused_by_its_digest(tiny_profile: Profile, tmp_path: Path) -> None:
    pin = tiny_profile.sam2["tiny"]
    digest = f"sha256:{compute_checksum(pin.file())}"
    assert Sam2.from_pin(replace(pin, digest=digest), CPU).side == SIDE
    data = bytearray(pin.file().read_bytes())
    data[-1] ^= 1
    (tmp_path / pin.filename).write_bytes(data)
    with pytest.raises(SourceError, match="wrong checksum"):
        Sam2.from_pin(replace(pin, source=str(tmp_path), digest=digest), CPU)


def test_missing_file_or_configuration_is_named(tiny_profile: Profile, tmp_path: Path) -> None:
    pin = tiny_profile.sam2["tiny"]
    with pytest.raises(SourceError, match=r"there is no .*sam2\.safetensors"):
        Sam2.from_pin(replace(pin, source=str(tmp_path)), CPU)
    with pytest.raises(SourceError, match="no SAM-2 configuration"):
        Sam2.from_pin(replace(pin, config=str(tmp_path / "none.yaml")), CPU)


def test_stability_is_that_of_sam2s_own_mask_generator() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (5, 20, 30)).astype(np.float32)
    expected = calculate_stability_score(torch.from_numpy(logits), 0.0, 1.0)
    assert [refine.stability(one) for one in logits] == pytest.approx(expected.tolist())
    assert refine.stability(np.array([[2.0, 0.5, -0.5, -2.0]], np.float32)) == pytest.approx(1 / 3)
    assert refine.stability(np.full((3, 3), -2, np.float32)) == 0


def test_agreement_is_intersection_over_union_of_hard_with_soft() -> None:
    mask = np.array([[True, True, False, False]])
    heat = np.array([[1.0, 0.5, 0.5, 0.0]], np.float32)
    assert refine.agreement(mask, heat) == pytest.approx(1.5 / (2 + 2 - 1.5))
    assert refine.agreement(mask, mask.astype(np.float32)) == 1
    assert refine.agreement(mask, (~mask).astype(np.float32)) == 0
    assert refine.agreement(mask & False, heat * 0) == 0


def square(low: int, high: int, side: int = 20) -> Mask:
    mask = np.zeros((side, side), dtype=bool)
    mask[low:high, low:high] = True
    return mask


def as_logits(mask: Mask, size: float = 5.0) -> NDArray[np.float32]:
    return np.where(mask, size, -size).astype(np.float32)


def candidate(mask: Mask, score: float = 1.0, one: Prompt | None = None) -> Candidate:
    return Candidate(
        prompt=one or prompt(),
        logits=as_logits(mask),
        predicted_iou=score,
        stability=1.0,
        agreement=1.0,
    )


def test_choice_is_the_best_product_of_the_three_scores() -> None:
    mask = square(5, 15)
    one = replace(prompt(), mask_logits=np.where(mask, 10, -10).astype(np.float32))
    shaky = np.where(mask, 0.5, -5).astype(np.float32)
    elsewhere = as_logits(square(0, 5))
    logits = np.stack([shaky, elsewhere, as_logits(square(5, 14)), as_logits(mask)])
    best = refine.choose(one, logits, np.array([0.9, 1.2, 0.8, 0.6], np.float32))
    assert best.prompt is one and np.array_equal(best.logits, logits[2])
    assert best.predicted_iou == pytest.approx(0.8)
    assert (best.stability, best.agreement) == (1.0, pytest.approx(0.81))
    assert best.score == pytest.approx(0.8 * 0.81)
    only = refine.choose(one, logits[1:2], np.array([1.2], np.float32))
    assert (only.predicted_iou, only.agreement) == (1.0, 0.0)


def test_small_hole_is_filled_and_a_rings_stays() -> None:
    solid = square(2, 18)
    pierced = solid.copy()
    pierced[9, 9:11] = False  # 2 of 254 pixels
    ring = solid & ~square(8, 12)  # 16 of 240
    assert np.array_equal(refine.cleaned(as_logits(pierced)) > 0, solid)
    assert np.array_equal(refine.cleaned(as_logits(ring)) > 0, ring)


def test_gaps_at_the_border_stay() -> None:
    mask = np.ones((20, 20), dtype=bool)
    mask[0, 5] = mask[19, 7] = mask[3, 0] = mask[4, 19] = False
    assert np.array_equal(refine.cleaned(as_logits(mask)) > 0, mask)


def test_islands_are_cleared_and_large_pieces_stay() -> None:
    main, island, second = square(1, 9), np.zeros((20, 20), bool), square(15, 18)
    island[1, 15:19] = True
    cleaned = refine.cleaned(as_logits(main | island | second))
    assert np.array_equal(cleaned > 0, main | second)  # 64, 4 and 9 pixels


def test_pixels_that_touch_at_a_corner_belong_together() -> None:
    mask = square(2, 10)
    mask[10, 10] = mask[11, 11] = True
    assert np.array_equal(refine.cleaned(as_logits(mask)) > 0, mask)


def test_cleaning_turns_signs_and_leaves_all_else() -> None:
    logits = np.full((20, 20), -3.0, np.float32)
    logits[2:12, 2:12] = 4.0
    logits[5, 5], logits[6, 8], logits[15, 15] = -2.0, 0.0, 1.5
    before = logits.copy()
    cleaned = refine.cleaned(logits)
    assert np.array_equal(logits, before) and cleaned.dtype == np.float32
    assert (cleaned[5, 5], cleaned[15, 15]) == (2.0, -1.5) and 0 < cleaned[6, 8] < 0.01
    same = np.ones((20, 20), dtype=bool)
    same[[5, 6, 15], [5, 8, 15]] = False
    assert np.array_equal(cleaned[same], logits[same])


@pytest.mark.parametrize("value", [-3.0, 3.0, 0.0])
def test_cleaning_nothing_or_everything_changes_nothing(value: float) -> None:
    logits = np.full((6, 6), value, np.float32)
    assert np.array_equal(refine.cleaned(logits), logits)


@pytest.mark.parametrize("seed", range(8))
def test_cleaned_masks_equal_those_of_skimage(seed: int) -> None:
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(60, 60)), 1.2)
    mask = np.pad(smooth > np.quantile(smooth, 0.35), 6)
    largest = max(ndimage.sum_labels(mask, *_pieces(mask)))
    opened = area_opening(mask, int(np.ceil(0.1 * largest)), connectivity=2)
    expected = area_closing(opened, max(2, int(np.ceil(0.01 * opened.sum()))), connectivity=1)
    cleaned = refine.cleaned(as_logits(mask)) > 0
    assert np.array_equal(cleaned, expected) and not np.array_equal(opened, expected)


def _pieces(mask: Mask) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    from scipy import ndimage

    labels, count = ndimage.label(mask, np.ones((3, 3)))
    return labels, np.arange(1, count + 1)


def test_distinct_drops_repetitions_parts_and_empty_masks() -> None:
    best = candidate(square(2, 12), 0.9)
    again = candidate(square(2, 11), 0.8)  # IoU 0.81
    part = candidate(square(3, 6), 0.7)
    apart = candidate(square(13, 19), 0.6)
    overlapping = candidate(square(9, 16), 0.5)  # shares 9 of 49 pixels with each
    nothing = candidate(square(0, 0), 0.95)
    kept = refine.distinct([overlapping, nothing, part, again, apart, best])
    assert kept == [best, apart, overlapping]
    assert refine.distinct([]) == [] and refine.distinct([nothing]) == []


def test_a_whole_is_dropped_for_its_better_part() -> None:
    part, whole = candidate(square(3, 6), 0.9), candidate(square(2, 12), 0.8)
    assert refine.distinct([whole, part]) == [part]


def test_enlarged_mask_has_the_shape_and_proportions_of_the_image() -> None:
    left = np.zeros((4, 4), dtype=bool)
    left[:, :2] = True
    mask = refine.enlarged(as_logits(left), (6, 20))
    assert mask.dtype == bool and mask.shape == (6, 20)
    assert mask[:, :10].all() and not mask[:, 10:].any()
    assert np.array_equal(refine.enlarged(as_logits(left), (4, 4)), left)
    assert refine.enlarged(as_logits(left | True), (1, 1)).all()

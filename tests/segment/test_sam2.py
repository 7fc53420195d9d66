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
from sam2.sam2_image_predictor import SAM2ImagePredictor

from labkit.files import compute_checksum
from labkit.runtime import OutOfMemoryError, SourceError
from labkit.segment import sam2 as sam2_module
from labkit.segment.checkpoints import Profile
from labkit.segment.masks import upsample_mask
from labkit.segment.prompts import Prompt
from labkit.segment.sam2 import Sam2
from tests.segment.conftest import CPU, CallsOf, noise

IMAGE_SIZE, LOW_RES = 192, 48


def make_prompt(foreground: int = 1, background: int = 0, *, seed: int = 0) -> Prompt:
    """Random points, a box and a mask, in pixels of SAM-2's square."""
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, IMAGE_SIZE, (2, 2)), axis=0)
    return Prompt(
        points=rng.uniform(0, IMAGE_SIZE - 1, (foreground + background, 2)),
        labels=np.repeat([1, 0], [foreground, background]),
        box=corners.ravel(),
        mask_logits=rng.uniform(-10, 10, (LOW_RES, LOW_RES)).astype(np.float32),
        region=np.ones((4, 4), dtype=bool),
    )


def make_prompts(count: int = 6) -> list[Prompt]:
    """With different numbers of points, from none to five."""
    numbers = [(1, 0), (3, 2), (2, 1), (0, 0), (3, 2), (1, 1)]
    return [make_prompt(*numbers[index % 6], seed=index) for index in range(count)]


@pytest.fixture
def predictor(sam2: Sam2, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Meta's own predictor with the same model, and the plain first mask for a single one."""
    with pytest.warns(DeprecationWarning, match=r"torch\.jit\.script"):
        predictor = SAM2ImagePredictor(sam2.model)
    predictor._bb_feat_sizes = [(48, 48), (24, 24), (12, 12)]
    monkeypatch.setattr(sam2.model.sam_mask_decoder, "dynamic_multimask_via_stability", False)
    return predictor


def predict_by_meta(predictor: Any, prompt: Prompt, **options: Any) -> tuple[Any, Any, Any]:
    """Full-size logits, IoUs (4,) and coarse logits (4, G, G): of one mask, then of three."""
    points = len(prompt.points) > 0
    predictions = [
        predictor.predict(
            point_coords=prompt.points if points else None,
            point_labels=prompt.labels if points else None,
            box=prompt.box,
            mask_input=prompt.mask_logits[None],
            multimask_output=several,
            return_logits=True,
            **options,
        )
        for several in (False, True)
    ]
    full, ious, coarse = (np.concatenate(pair) for pair in zip(*predictions, strict=True))
    return full, ious, coarse


def test_masks_equal_those_of_sam2s_own_predictor(sam2: Sam2, predictor: Any) -> None:
    image = noise(IMAGE_SIZE, IMAGE_SIZE)
    prompts = make_prompts()
    logits, ious = sam2.predict(sam2.encode(image), prompts)
    assert (sam2.image_size, sam2.low_res_size) == (IMAGE_SIZE, LOW_RES)
    assert logits.shape == (6, 4, LOW_RES, LOW_RES) and ious.shape == (6, 4)
    predictor.set_image(image)
    for row, prompt in enumerate(prompts):
        _, expected_ious, expected = predict_by_meta(predictor, prompt)
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
    prompts = make_prompts(3)
    logits, ious = sam2.predict(sam2.encode(image), prompts)
    predictor.set_image(image)
    for row, prompt in enumerate(prompts):
        shares = replace(prompt, points=prompt.points / IMAGE_SIZE, box=prompt.box / IMAGE_SIZE)
        full, expected_ious, expected = predict_by_meta(predictor, shares, normalize_coords=False)
        assert np.abs(logits[row] - expected).max() <= 1e-4
        assert np.abs(ious[row] - expected_ious).max() <= 1e-4
        for mask, wanted in zip(expected, full, strict=True):
            assert np.array_equal(upsample_mask(mask, shape), wanted > 0)


def test_prompts_scaled_to_the_square_mean_what_pixels_mean_to_the_predictor(
    sam2: Sam2, predictor: Any
) -> None:
    """But that a point stands for the middle of its pixel at both sizes, not for its corner."""
    image, prompt = noise(IMAGE_SIZE // 2, IMAGE_SIZE // 2), make_prompt(2, 1)
    small = replace(prompt, points=prompt.points / 2, box=prompt.box / 2)
    logits, _ = sam2.predict(sam2.encode(image), [small.scale(2, 2)])
    predictor.set_image(image)
    _, _, expected = predict_by_meta(predictor, replace(small, points=small.points + 0.25))
    assert np.abs(logits[0] - expected).max() <= 1e-4


def test_points_equal_those_of_the_predictor_with_a_point_and_nothing_else(
    sam2: Sam2, predictor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, points = (
        noise(IMAGE_SIZE, IMAGE_SIZE),
        np.random.default_rng(1).uniform(0, IMAGE_SIZE - 1, (5, 2)),
    )
    features = sam2.encode(image)
    logits, ious = sam2.predict_points(features, points)
    assert logits.shape == (5, 4, LOW_RES, LOW_RES) and ious.shape == (5, 4)
    predictor.set_image(image)
    for row, point in enumerate(points):
        predictions = [
            predictor.predict(point[None], np.array([1]), multimask_output=several)[1:]
            for several in (False, True)
        ]
        expected_ious, expected = (np.concatenate(pair) for pair in zip(*predictions, strict=True))
        assert np.abs(logits[row]).max() < 32  # beyond which the predictor clips
        assert np.abs(logits[row] - expected).max() <= 1e-4
        assert np.abs(ious[row] - expected_ious).max() <= 1e-4
    apart = np.abs(logits[:, None] - logits[None]).max(axis=(2, 3, 4))
    assert apart[~np.eye(5, dtype=bool)].min() > 0.01  # else the comparison proves nothing
    for size in (1, 2):
        monkeypatch.setattr(sam2_module, "_PROMPTS_AT_ONCE", size)
        again = sam2.predict_points(features, points)
        assert np.abs(again[0] - logits).max() <= 1e-5
        assert np.abs(again[1] - ious).max() <= 1e-5


def test_company_and_size_of_parts_change_nothing(
    sam2: Sam2, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, prompts = sam2.encode(noise(30, 40)), make_prompts(20)
    logits, ious = sam2.predict(features, prompts)
    alone = [sam2.predict(features, [prompt]) for prompt in prompts]
    assert np.abs(np.concatenate([pair[0] for pair in alone]) - logits).max() <= 1e-5
    assert np.abs(np.concatenate([pair[1] for pair in alone]) - ious).max() <= 1e-5
    monkeypatch.setattr(sam2_module, "_PROMPTS_AT_ONCE", 3)
    for order in (slice(None), slice(None, None, -1)):
        again = sam2.predict(features, prompts[order])
        assert np.abs(again[0][order] - logits).max() <= 1e-5
        assert np.abs(again[1][order] - ious).max() <= 1e-5


def test_image_is_encoded_once_for_many_prompts(
    sam2: Sam2, calls_of: CallsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sam2_module, "_PROMPTS_AT_ONCE", 4)
    encoder = calls_of(sam2.model.image_encoder)
    transformer = calls_of(sam2.model.sam_mask_decoder.transformer)
    sam2.predict(sam2.encode(noise(30, 40)), [make_prompt(seed=seed) for seed in range(10)])
    assert (len(encoder), len(transformer)) == (1, 3)


def test_images_that_are_encoded_together_have_the_features_of_each_alone(
    sam2: Sam2, calls_of: CallsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sam2_module, "_PIXELS_AT_ONCE", {"cpu": 2 * sam2.image_size**2})
    encoder = calls_of(sam2.model.image_encoder)
    images = [noise(30, 40), noise(9, 60, seed=1), noise(50, 50, seed=2)]
    together = sam2.encode_batch(images)
    assert len(encoder) == 2 and sam2.encode_batch([]) == []
    for image, features in zip(images, together, strict=True):
        alone = sam2.encode(image)
        assert (features.embedding - alone.embedding).abs().max() <= 1e-5
        for finer, expected in zip(features.high_res, alone.high_res, strict=True):
            assert finer.shape == expected.shape and (finer - expected).abs().max() <= 1e-5


def test_no_prompts_and_no_points_give_no_masks(sam2: Sam2) -> None:
    features = sam2.encode(noise(9, 9))
    for logits, ious in (
        sam2.predict(features, []),
        sam2.predict_points(features, np.zeros((0, 2))),
    ):
        assert logits.shape == (0, 4, LOW_RES, LOW_RES) and ious.shape == (0, 4)


def test_prompts_that_do_not_fit_into_memory_are_decoded_in_smaller_parts(
    sam2: Sam2, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, prompts, decode = sam2.encode(noise(30, 40)), make_prompts(9), sam2._decode
    logits, _ = sam2.predict(features, prompts)

    def decode_one(*arguments: Any) -> Any:
        part = arguments[-1]
        if part.stop - part.start > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(*arguments)

    monkeypatch.setattr(sam2, "_decode", decode_one)
    assert np.abs(sam2.predict(features, prompts)[0] - logits).max() <= 1e-5


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
    sam2 = Sam2.from_checkpoint(tiny_profile.sam2["tiny"], CPU)
    sam2.predict(sam2.encode(noise(9, 9)), [make_prompt()])
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
    checkpoint = tiny_profile.sam2["tiny"]
    file = as_published(Path(shutil.copy(checkpoint.fetch(), tmp_path)))
    digest = f"sha256:{compute_checksum(file)}"
    other = Sam2.from_checkpoint(
        replace(checkpoint, source=str(tmp_path), filename=file.name, digest=digest), CPU
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
    checkpoint = tiny_profile.sam2["tiny"]
    file = tmp_path / checkpoint.filename
    shutil.copy(checkpoint.fetch(), file)
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
        Sam2.from_checkpoint(replace(checkpoint, source=str(tmp_path), filename=file.name), CPU)
    assert "\n" not in str(info.value) and str(file) in str(info.value)


def test_altered_file_is_refused_by_its_digest(tiny_profile: Profile, tmp_path: Path) -> None:
    checkpoint = tiny_profile.sam2["tiny"]
    digest = f"sha256:{compute_checksum(checkpoint.fetch())}"
    assert Sam2.from_checkpoint(replace(checkpoint, digest=digest), CPU).image_size == IMAGE_SIZE
    data = bytearray(checkpoint.fetch().read_bytes())
    data[-1] ^= 1
    (tmp_path / checkpoint.filename).write_bytes(data)
    with pytest.raises(SourceError, match="wrong checksum"):
        Sam2.from_checkpoint(replace(checkpoint, source=str(tmp_path), digest=digest), CPU)


def test_missing_file_or_configuration_is_named(tiny_profile: Profile, tmp_path: Path) -> None:
    checkpoint = tiny_profile.sam2["tiny"]
    with pytest.raises(SourceError, match=r"there is no .*sam2\.safetensors"):
        Sam2.from_checkpoint(replace(checkpoint, source=str(tmp_path)), CPU)
    with pytest.raises(SourceError, match="no SAM-2 configuration"):
        Sam2.from_checkpoint(replace(checkpoint, config=str(tmp_path / "none.yaml")), CPU)

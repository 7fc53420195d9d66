"""The image that q2 begins with, in each profile, and what to ask of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from labkit.files import download, get_cache_dir
from labkit.images import load_image
from labkit.object_scenes import EVALUATION_SEED, make_object_scene
from labkit.runtime import InputError
from labkit.segment.pipeline import TextSegmenter

CATS = "http://images.cocodataset.org/val2017/000000039769.jpg"
TRUCK = "https://huggingface.co/datasets/hf-internal-testing/sam2-fixtures/resolve/main/truck.jpg"
PUBLISHED_LOGITS = (
    *(-7.4613, -7.4785, -7.3628),
    *(-7.3268, -7.0899, -7.1333),
    *(-6.9838, -6.7900, -6.8913),
)
"""Of CLIPSeg for "a cat", in 3 x 3 pixels at the upper left of CATS, from transformers' tests."""
PUBLISHED_IOUS = (0.9547, 0.4932, 0.0427)
"""Of SAM 2.1 tiny for the point (500, 375) of TRUCK, sorted, from transformers' tests."""
ZIDANE = "https://raw.githubusercontent.com/ultralytics/yolov5/v7.0/data/images/zidane.jpg"
ZIDANE_DIGEST = "sha256:356dad2107bb0254e4e4a81bc1d9c7140043e88569d546e5b404b19bffa77d0a"
_SCENE = 1  # of the evaluation seed


@dataclass(frozen=True, eq=False, kw_only=True)
class Example:
    """An image to begin with.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        sentences: sentences that are true of it.
        absent: a sentence that is not.
        truth: masks (H, W) of what sentences name, where they are known.
    """

    image: NDArray[np.uint8]
    sentences: tuple[str, ...]
    absent: str
    truth: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)


def load_example(profile: str) -> Example:
    """Load the example of a profile: for "full" the photograph of the lab's own failed attempt.

    It shows two men in suits, one with a tie, and was asked for a "football player": there is none
    to see, and the highest probability, 0.013, was nearly right. For "demo" it is a scene.

    Raises:
        InputError: there is no such profile.
        SourceError: the photograph could not be downloaded.
    """
    if profile == "full":
        path = download(ZIDANE, get_cache_dir() / "zidane.jpg", digest=ZIDANE_DIGEST)
        image = load_image(path)
        return Example(image=image, sentences=("man", "tie"), absent="football player")
    if profile != "demo":
        raise InputError(f"profile must be 'full' or 'demo', got {profile!r}")
    scene = make_object_scene(_SCENE, seed=EVALUATION_SEED)
    return Example(
        image=scene.image,
        sentences=_pick_sentences(scene.present),
        absent="football player",
        truth={sentence: scene.masks_of(sentence).any(axis=0) for sentence in scene.present},
    )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A figure of a published model, and the same measured here.

    Attributes:
        name: what was measured.
        published: the figures of others.
        measured: ours, in the same order.
        agrees: whether they are near enough to each other.
    """

    name: str
    published: tuple[float, ...]
    measured: tuple[float, ...]
    agrees: bool


def compare_published(
    segmenter: TextSegmenter, cats: NDArray[np.uint8], truck: NDArray[np.uint8]
) -> list[Comparison]:
    """Compare the published models with figures that others published of them.

    The images are resized by another library than there, so figures of SAM-2 may differ by 0.03;
    CLIPSeg's logits may differ by 0.1.

    Args:
        segmenter: of the profile "full", with SAM-2 tiny.
        cats: the image at CATS, (H, W, 3) uint8.
        truck: the image at TRUCK, (H, W, 3) uint8.
    """
    clipseg, sam2 = segmenter.clipseg, segmenter.sam2
    heat = clipseg.predict_square("a cat", cats)[:3, :3].astype(np.float64)
    logits = np.log(heat / (1 - heat)).ravel()
    scale = np.array([sam2.image_size / truck.shape[1], sam2.image_size / truck.shape[0]])
    point = (np.array([[500.0, 375.0]]) + 0.5) * scale - 0.5
    _, ious = sam2.predict_points(sam2.encode(truck), point)
    best_ious = sorted(ious[0, 1:].tolist(), reverse=True)
    return [
        _compare("CLIPSeg, logits of 'a cat'", PUBLISHED_LOGITS, logits.tolist(), 0.1),
        _compare("SAM-2 tiny, predicted IoUs", PUBLISHED_IOUS, best_ious, 0.03),
    ]


def _compare(
    name: str, published: Sequence[float], measured: Sequence[float], tolerance: float
) -> Comparison:
    agrees = bool(np.allclose(published, measured, rtol=0, atol=tolerance))
    rounded = tuple(round(value, 4) for value in measured)
    return Comparison(name=name, published=tuple(published), measured=rounded, agrees=agrees)


def _pick_sentences(sentences: tuple[str, ...]) -> tuple[str, ...]:
    """Up to three sentences of two words, no two about the same shape."""
    by_shape = {s.split()[-1]: s for s in sentences if len(s.split()) == 2}
    return tuple(sorted(by_shape.values()))[:3]

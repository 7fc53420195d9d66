"""The picture that the notebook begins with, in each profile, and what to ask of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from labkit.files import download, get_cache_dir
from labkit.images import load_image
from labkit.object_scenes import EVALUATION_SEED, make_object_scene
from labkit.runtime import InputError

ZIDANE = "https://raw.githubusercontent.com/ultralytics/yolov5/v7.0/data/images/zidane.jpg"
ZIDANE_DIGEST = "sha256:356dad2107bb0254e4e4a81bc1d9c7140043e88569d546e5b404b19bffa77d0a"
_SCENE = 1  # of the evaluation seed


@dataclass(frozen=True, eq=False, kw_only=True)
class Example:
    """A picture to begin with.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        prompts: sentences that are true of it.
        absent: a sentence that is not.
        truth: masks (H, W) of what sentences name, where they are known.
    """

    image: NDArray[np.uint8]
    prompts: tuple[str, ...]
    absent: str
    truth: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)


def example(profile: str) -> Example:
    """The example of a profile: for "full" the photograph of the lab's own failed attempt.

    It shows two men in suits, one with a tie, and was asked for a "football player": there is none
    to see, and the highest probability, 0.013, was nearly right. For "demo" it is a scene.

    Raises:
        InputError: there is no such profile.
        SourceError: the photograph could not be downloaded.
    """
    if profile == "full":
        path = download(ZIDANE, get_cache_dir() / "zidane.jpg", digest=ZIDANE_DIGEST)
        image = load_image(path)
        return Example(image=image, prompts=("man", "tie"), absent="football player")
    if profile != "demo":
        raise InputError(f"profile must be 'full' or 'demo', got {profile!r}")
    scene = make_object_scene(_SCENE, seed=EVALUATION_SEED)
    return Example(
        image=scene.image,
        prompts=_told_apart(scene.present),
        absent="football player",
        truth={sentence: scene.masks_of(sentence).any(axis=0) for sentence in scene.present},
    )


def _told_apart(sentences: tuple[str, ...]) -> tuple[str, ...]:
    """Up to three sentences of two words, no two about the same shape."""
    by_shape = {s.split()[-1]: s for s in sentences if len(s.split()) == 2}
    return tuple(sorted(by_shape.values()))[:3]

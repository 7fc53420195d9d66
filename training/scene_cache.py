"""Training scenes drawn once and kept on disk as arrays, since drawing takes longer than a step."""

from __future__ import annotations

import functools
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from labkit.object_scenes import SCENE_COLOURS, SCENE_PATTERNS, SCENE_SHAPES, make_object_scene

SIDE, MOST = 128, 5
PARTS = ("images", "owners", "looks")


class SceneCache:
    """Scenes as arrays.

    Attributes:
        images: (S, 128, 128, 3) uint8 RGB.
        owners: (S, 128, 128) uint8, 0 where there is ground, 1 + n where object n is seen.
        looks: (S, 5, 3) uint8, numbers of shape, colour and pattern; 255 where there is no object.
    """

    def __init__(self, folder: Path, count: int, *, seed: int, workers: int = 2) -> None:
        paths = [folder / f"{name}-{seed}-{count}.npy" for name in PARTS]
        if not all(path.exists() for path in paths):
            folder.mkdir(parents=True, exist_ok=True)
            draw = functools.partial(_draw, seed=seed)
            with ProcessPoolExecutor(workers) as pool:
                drawn = pool.map(draw, range(count), chunksize=64)
                rows = list(tqdm(drawn, total=count, desc="scenes"))
            for path, part in zip(paths, zip(*rows, strict=True), strict=True):
                np.save(path, np.stack(part))
        self.images, self.owners, self.looks = (np.load(path, mmap_mode="r") for path in paths)

    def __len__(self) -> int:
        return len(self.images)


def _draw(number: int, *, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scene = make_object_scene(number, seed=seed, side=SIDE)
    owners = np.zeros((SIDE, SIDE), dtype=np.uint8)
    looks = np.full((MOST, 3), 255, dtype=np.uint8)
    for index, (mask, thing) in enumerate(zip(scene.masks, scene.objects, strict=True)):
        owners[mask] = 1 + index
        looks[index] = (
            SCENE_SHAPES.index(thing.shape),
            list(SCENE_COLOURS).index(thing.colour),
            SCENE_PATTERNS.index(thing.pattern),
        )
    return scene.image, owners, looks

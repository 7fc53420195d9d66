"""Training scenes, drawn once and kept on disk, since drawing takes longer than a step."""

from __future__ import annotations

import functools
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from labkit.object_scenes import SCENE_COLOURS, SCENE_PATTERNS, SCENE_SHAPES, make_object_scene

IMAGE_SIZE, MAX_OBJECTS = 128, 5
NAMES = ("images", "index_maps", "attributes")


class SceneCache:
    """Scenes as arrays.

    Attributes:
        images: (S, 128, 128, 3) uint8 RGB.
        index_maps: (S, 128, 128) uint8; 0 on the ground, 1 + n where object n is visible.
        attributes: (S, 5, 3) uint8, the index of the shape, the colour and the pattern of each
            object; 255 where there is no object.
    """

    def __init__(self, folder: Path, count: int, *, seed: int, workers: int = 2) -> None:
        paths = [folder / f"{name}-{seed}-{count}.npy" for name in NAMES]
        if not all(path.exists() for path in paths):
            folder.mkdir(parents=True, exist_ok=True)
            draw_scene = functools.partial(_draw_scene, seed=seed)
            with ProcessPoolExecutor(workers) as pool:
                scenes = pool.map(draw_scene, range(count), chunksize=64)
                rows = list(tqdm(scenes, total=count, desc="scenes"))
            for path, arrays in zip(paths, zip(*rows, strict=True), strict=True):
                np.save(path, np.stack(arrays))
        self.images, self.index_maps, self.attributes = (
            np.load(path, mmap_mode="r") for path in paths
        )

    def __len__(self) -> int:
        return len(self.images)


def _draw_scene(number: int, *, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a scene: image (128, 128, 3), index map (128, 128) and attributes (5, 3)."""
    scene = make_object_scene(number, seed=seed, image_size=IMAGE_SIZE)
    index_map = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    attributes = np.full((MAX_OBJECTS, 3), 255, dtype=np.uint8)
    for index, (mask, scene_object) in enumerate(zip(scene.masks, scene.objects, strict=True)):
        index_map[mask] = 1 + index
        attributes[index] = (
            SCENE_SHAPES.index(scene_object.shape),
            list(SCENE_COLOURS).index(scene_object.colour),
            SCENE_PATTERNS.index(scene_object.pattern),
        )
    return scene.image, index_map, attributes

"""What goes beyond one image and one sentence: corrections, folders; a function for each row.

    python benchmarks/segment_beyond.py --data ../shared/data/camvid
    python benchmarks/segment_beyond.py --only click      # the other rows stay as they are

`click_gain` is what one click adds to the IoU of the worst tenth of masks on scenes that nothing
was trained or tuned on: in the middle of the largest region where mask and truth differ, on the
object or not. `stream_ratio` is how many times more images a second `stream` segments and saves as
COCO than single calls do that save all that `labkit segment` saves of one image, report included;
`stream_ratio_unsaved` is the same without saving anything. Both use the demo profile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from common import write_result
from numpy.typing import NDArray

from labkit import TextSegmenter, make_object_scene
from labkit.object_scenes import EVALUATION_SEED
from labkit.runtime import InputError

Mask = NDArray[np.bool_]

OUT = Path("benchmarks/results/segment-beyond.json")
WORST = 10  # one mask in so many is among the worst
SENTENCES = ("red circle", "star", "blue square", "green triangle")
ROUNDS = 3


def main() -> None:
    """Measure the rows, and write them beside those that the file has already."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of photographs, such as camvid")
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    rows: Mapping[str, Callable[[], dict[str, Any]]] = {
        "click": lambda: measure_click_gain(arguments.scenes),
        "stream": lambda: measure_stream_ratio(arguments.data, arguments.images),
    }
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name, measure in rows.items():
        if arguments.only in name:
            result |= measure()
    write_result(arguments.out, result)


def measure_click_gain(scenes: int) -> dict[str, Any]:
    """Mean IoU of the worst tenth of masks before and after one click, and the gain."""
    segmenter = TextSegmenter.from_profile("demo", device="cpu")
    pairs = []
    for number in range(scenes):
        scene = make_object_scene(number, seed=EVALUATION_SEED)
        found = segmenter(scene.image, scene.sample_sentences(number, present=3, absent=0))
        for index, segmented in enumerate(found):
            mask = segmented.mask
            truth = max(scene.masks_of(segmented.sentence), key=lambda t: measure_iou(mask, t))
            if np.array_equal(mask, truth):
                pairs.append((1.0, 1.0))
                continue
            point, label = find_click(mask, truth)
            try:
                corrected = found.refine(index, points=[point], labels=[label])[index].mask
            except InputError:  # nothing is left of it
                corrected = np.zeros_like(mask)
            pairs.append((measure_iou(mask, truth), measure_iou(corrected, truth)))
    worst = np.array(sorted(pairs)[: len(pairs) // WORST])
    before, after = worst.T
    return {
        "click_gain": float((after - before).mean()),
        "click_gain_ci": bootstrap(after - before),
        "click_iou_before": float(before.mean()),
        "click_iou_after": float(after.mean()),
        "click_masks": len(worst),
        "click_masks_in_all": len(pairs),
        "click_scenes": scenes,
    }


def find_click(mask: Mask, truth: Mask) -> tuple[tuple[int, int], int]:
    """The middle (x, y) of the largest region where a mask is wrong, and 1 if it lacks there."""
    import cv2

    regions = []
    for label, wrong in ((1, truth & ~mask), (0, mask & ~truth)):
        count, pieces, stats, _ = cv2.connectedComponentsWithStats(wrong.astype(np.uint8))
        regions += [(int(stats[k, cv2.CC_STAT_AREA]), label, pieces == k) for k in range(1, count)]
    _, label, region = max(regions, key=lambda each: each[0])
    depth = cv2.distanceTransform(np.pad(region, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return (int(x), int(y)), label


def measure_iou(a: Mask, b: Mask) -> float:
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 0.0


def bootstrap(values: NDArray[np.float64], draws: int = 2000) -> list[float]:
    """The 95 % interval of the mean, from resampled values."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (draws, len(values))).mean(axis=1)
    return [float(edge) for edge in np.quantile(means, (0.025, 0.975))]


def measure_stream_ratio(data: Path | None, images: int) -> dict[str, Any]:
    """Images a second of a stream against single calls, taken in turn."""
    paths = sorted(data.rglob("*.jpg")) if data else []
    if not paths:
        raise SystemExit("the row stream needs --data FOLDER with photographs (*.jpg)")
    paths = paths[:: max(1, len(paths) // images)][:images]
    segmenter = TextSegmenter.from_profile("demo", device="cpu")
    size = -(-len(paths) // ROUNDS)
    parts = [paths[start : start + size] for start in range(0, len(paths), size)]
    list(segmenter.stream(paths[:2], SENTENCES))  # warms up
    seconds: dict[str, list[float]] = {}
    for part in parts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)

            def call_and_save_all(part: list[Path] = part, folder: Path = folder) -> None:
                for path in part:
                    segmenter(path, SENTENCES).save(folder / path.stem)

            def stream_and_save(part: list[Path] = part, folder: Path = folder) -> None:
                for path, found in zip(part, segmenter.stream(part, SENTENCES), strict=True):
                    found.save(folder / path.stem, formats=["coco"])

            def call(part: list[Path] = part) -> None:
                for path in part:
                    segmenter(path, SENTENCES)

            def stream(part: list[Path] = part) -> None:
                for _ in segmenter.stream(part, SENTENCES):
                    pass

            for run in (stream, call, stream_and_save, call_and_save_all):
                started = time.process_time()
                run()
                taken = (time.process_time() - started) / len(part)
                seconds.setdefault(run.__name__, []).append(taken)
                print(f"{run.__name__:<20}{taken:8.3f} s of a processor an image", flush=True)
    saved, unsaved = (
        [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
        for slow, fast in (("call_and_save_all", "stream_and_save"), ("call", "stream"))
    )
    return {
        "stream_ratio": statistics.median(saved),
        "stream_ratio_ci": [min(saved), max(saved)],
        "stream_ratio_unsaved": statistics.median(unsaved),
        "stream_ratio_unsaved_ci": [min(unsaved), max(unsaved)],
        "stream_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "stream_images": len(paths),
        "stream_profile": "demo",
        "stream_clock": "processor time",
    }


if __name__ == "__main__":
    main()

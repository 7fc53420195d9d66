"""Speed and memory of segmentation with models of the published sizes and random weights.

Random weights take as long as trained ones, but find nothing. So, where the number of objects
matters, CLIPSeg's maps are computed and then replaced by separate round spots; and for the memory,
SAM-2's masks are computed and then replaced by the outlines of those spots, so that none repeats
another: each is kept, drawn at the size of the image and encoded. The map of so many spots has
twice CLIPSeg's image size, since at its own they would run together. Memory is that of a process
of its own on the CPU, which holds all weights before and does nothing else.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from common import summary, write_result
from numpy.typing import NDArray
from PIL import Image
from standins import SENTENCES, local_profile

from labkit import TextSegmenter
from labkit.runtime import measure_peak_memory, pick_device
from labkit.segment.clipseg import ClipSeg, fit_size
from labkit.segment.prompts import Prompt
from labkit.segment.sam2 import ImageFeatures, Sam2

PHOTO = (720, 1280)  # rows and columns, as in the lab's own example
LARGE = (3000, 4000)
MANY = 100
CPU = torch.device("cpu")


class SpottedClipSeg(ClipSeg):
    """Computes its maps, and shows `objects` spots in each instead."""

    objects = 2

    def predict_heat(
        self,
        image: NDArray[np.uint8],
        sentences: Sequence[str],
        templates: Sequence[str] = ("{}",),
    ) -> NDArray[np.float32]:
        """As `ClipSeg.predict_heat`."""
        count, height, width = super().predict_heat(image, sentences, templates).shape
        return np.stack([spots(self.objects, (height, width))] * count)


class OutliningSam2(Sam2):
    """Computes its masks, and gives each prompt the outline of its own spot instead."""

    prompts = 0

    def predict(
        self, features: ImageFeatures, prompts: Sequence[Prompt]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """As `Sam2.predict`."""
        self.prompts += len(prompts)
        logits, ious = super().predict(features, prompts)
        for row, prompt in zip(logits, prompts, strict=True):
            row[:] = prompt.mask_logits
        ious[:] = 1
        return logits, ious


def main() -> None:
    """Measure, and write benchmarks/results/segment-speed.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/segment-speed.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        local_profile(folder)  # writes the weights
        # A process that starts anew, so that it has no memory to reuse.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory = pool.apply(peak_gib_of_many, [folder])
        print(f"{MANY} objects at {LARGE[1]} x {LARGE[0]}: {memory:.2f} GiB above the weights")
        times = speed(folder, arguments.rounds)
    write_result(
        arguments.out,
        {**times, f"peak_gib_{MANY}_objects": memory, "weights": "random", "sam2": "tiny"},
    )


def speed(folder: Path, rounds: int) -> dict[str, object]:
    """Seconds and their ratios, and how often SAM-2 encodes an image for eight sentences."""
    profile, device = local_profile(folder), pick_device()
    clipseg = ClipSeg.from_checkpoint(profile.clipseg, device)
    spotted = SpottedClipSeg(clipseg.model, clipseg.processor, device, clipseg.precision)
    sam2 = Sam2.from_checkpoint(profile.get_sam2(), device)
    segmenter = TextSegmenter(spotted, sam2, presence=profile.presence, templates=profile.templates)
    photo = np.random.default_rng(0).integers(0, 256, (*PHOTO, 3), dtype=np.uint8)
    seconds = in_turn(
        {
            "1": lambda: clipseg.predict_heat(photo, SENTENCES[:1], profile.templates),
            "8": lambda: clipseg.predict_heat(photo, SENTENCES, profile.templates),
            "naive_1": lambda: naive_maps(clipseg, photo, SENTENCES[:1], profile.templates),
            "naive_8": lambda: naive_maps(clipseg, photo, SENTENCES, profile.templates),
            "end_to_end": lambda: segmenter(photo, SENTENCES[:1], assume_present=True),
        },
        rounds,
    )
    ratios = [eight / one for eight, one in zip(seconds["8"], seconds["1"], strict=True)]
    naive = [a / b for a, b in zip(seconds["naive_8"], seconds["naive_1"], strict=True)]
    calls: list[None] = []
    sam2.model.image_encoder.register_forward_hook(lambda *_: calls.append(None))
    spotted.objects = 3
    found = segmenter(photo, SENTENCES, assume_present=True)
    if any(len(result.prompts) < spotted.objects for result in found.sentences):
        raise RuntimeError("a sentence has too few prompts: the spots ran together")
    return {
        "ratio_8_to_1": statistics.median(ratios),
        "ratio_8_to_1_naive": statistics.median(naive),
        "seconds_1": statistics.median(seconds["1"]),
        "seconds_8": statistics.median(seconds["8"]),
        "seconds_end_to_end": statistics.median(seconds["end_to_end"]),
        "encoder_calls": len(calls),
        "ratio_spread": summary(ratios),
        "ratio_naive_spread": summary(naive),
        "seconds_spread": {name: summary(values) for name, values in seconds.items()},
        "threads": torch.get_num_threads(),
        "clipseg_image_size": clipseg.image_size,
        "image": f"{PHOTO[1]} x {PHOTO[0]}",
        "objects_end_to_end": SpottedClipSeg.objects,
        "objects_for_encoder_calls": spotted.objects * len(SENTENCES),
    }


def naive_maps(
    clipseg: ClipSeg, image: NDArray[np.uint8], sentences: Sequence[str], templates: Sequence[str]
) -> NDArray[np.float32]:
    """Maps (S, side, side) as in transformers' own example: the image once for each sentence."""
    texts = [template.format(sentence) for sentence in sentences for template in templates]
    pictures = [Image.fromarray(image)] * len(texts)
    inputs = clipseg.processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    with torch.inference_mode(), clipseg.precision.autocast(clipseg.device):
        logits = clipseg.model(**inputs.to(clipseg.device)).logits
    maps: NDArray[np.float32] = logits.float().sigmoid().cpu().numpy()
    return maps


def in_turn(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each of `runs`, taken in turn; one round before the first is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            taken = time.perf_counter() - started
            print(f"round {number} {name:<12}{taken:8.3f} s", flush=True)
            if number:
                seconds[name].append(taken)
    return seconds


def peak_gib_of_many(folder: Path) -> float:
    """Peak memory in GiB above that of the weights, for `MANY` objects in a `LARGE` image."""
    profile = local_profile(folder)
    clipseg = ClipSeg.from_checkpoint(profile.clipseg, CPU)
    sam2 = OutliningSam2.from_checkpoint(profile.get_sam2(), CPU)
    segmenter = TextSegmenter(clipseg, sam2, presence=profile.presence)
    image = np.random.default_rng(0).integers(0, 256, (*LARGE, 3), dtype=np.uint8)
    maps = spots(MANY, fit_size(LARGE, 2 * clipseg.image_size))[None]
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # nothing that was freed while loading is left to reuse
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    except (AttributeError, OSError) as error:
        raise RuntimeError(
            f"peak memory can only be measured on Linux with glibc: {error}"
        ) from error
    before = measure_peak_memory(CPU)
    found = segmenter.segment_maps(image, SENTENCES[:1], wanted=maps, assume_present=True)
    peak = measure_peak_memory(CPU)
    if not sam2.prompts == len(found.objects) == MANY:
        raise RuntimeError(f"{sam2.prompts} prompts and {len(found.objects)} masks, not {MANY}")
    return peak - before


def spots(count: int, size: tuple[int, int]) -> NDArray[np.float32]:
    """A map (h, w) in [0, 1] with `count` round spots, apart from each other."""
    height, width = size
    columns = math.ceil(math.sqrt(count * width / height))
    rows = math.ceil(count / columns)
    radius = min(height / rows, width / columns) / 5
    y, x = np.mgrid[:height, :width]
    heat = np.zeros(size)
    for number in range(count):
        row, column = divmod(number, columns)
        top, left = (row + 0.5) * height / rows, (column + 0.5) * width / columns
        squared = (y - top) ** 2 + (x - left) ** 2
        heat = np.maximum(heat, 0.8 * np.exp(-squared / (2 * radius**2)))
    return heat.astype(np.float32)


if __name__ == "__main__":
    main()

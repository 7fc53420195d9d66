"""Fit the presence score of the `demo` profile, and write labkit/assets/demo.json.

    python training/calibrate_presence.py

A logistic regression on the evidence of scenes that neither training nor evaluation has seen, with
weights that are not negative, since each piece of evidence speaks for the sentence. The file also
holds the digests of the weights, so run this after both trainings.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from tqdm import tqdm

from labkit.files import compute_checksum, write_json
from labkit.object_scenes import CALIBRATION_SEED, make_object_scene
from labkit.segment.checkpoints import get_profile
from labkit.segment.metrics import auroc, mcc
from labkit.segment.pipeline import TextSegmenter

ASSETS = Path(__file__).resolve().parents[1] / "labkit" / "assets"
FIRST = 1000  # the trainings watch themselves on the scenes before
SHRINKAGE = 0.1
NAMES = ("peak", "contrast", "contrastive_margin", "agreement", "constant")


def collect_evidence(segmenter: TextSegmenter, scenes: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, 4) of the evidence for N sentences, presence assumed, and their truth (N,)."""
    rows, truth = [], []
    for number in tqdm(range(FIRST, FIRST + scenes), desc="scenes"):
        scene = make_object_scene(number, seed=CALIBRATION_SEED)
        sentences = scene.sample_sentences(number)
        found = segmenter(scene.image, sentences, exclusive=True, assume_present=True)
        rows += [result.evidence.to_features() for result in found.sentences]
        truth += [sentence in scene.present for sentence in sentences]
    return np.array(rows), np.array(truth)


def fit_weights(features: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Fit four weights, none of them negative, and a constant (5,), by a ridge-penalised logit."""
    rows = np.column_stack([features, np.ones(len(features))])
    signs = 2.0 * truth - 1

    def cost(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margins = signs * (rows @ weights)
        loss = np.logaddexp(0, -margins).sum() + 0.5 * SHRINKAGE * (weights[:4] ** 2).sum()
        slope = -(signs * expit(-margins)) @ rows
        slope[:4] += SHRINKAGE * weights[:4]
        return loss, slope

    bounds = [*[(0, None)] * 4, (None, None)]
    return minimize(cost, np.zeros(5), jac=True, bounds=bounds, method="L-BFGS-B").x


def main() -> None:
    """Fit, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=400)
    arguments = parser.parse_args()
    digests = {
        "clipseg": f"sha256:{compute_checksum(ASSETS / 'clipseg-tiny' / 'model.safetensors')}",
        "sam2": f"sha256:{compute_checksum(ASSETS / 'sam2-tiny' / 'sam2.safetensors')}",
    }
    neutral = {name: float(name == "peak") for name in NAMES}
    write_json(ASSETS / "demo.json", {**digests, "presence": neutral})
    segmenter = TextSegmenter.from_profile(get_profile("demo"))
    features, truth = collect_evidence(segmenter, arguments.scenes)
    half = len(truth) // 2
    *weights, constant = fit_weights(features[:half], truth[:half])
    chance = expit(features[half:] @ weights + constant)
    final = fit_weights(features, truth).round(4).tolist()
    presence = {**dict(zip(NAMES, final, strict=True)), "threshold": 0.5}
    calibration = {
        "scenes": arguments.scenes,
        "sentences": len(truth),
        "second_half_auroc": round(auroc(truth[half:], chance), 4),
        "second_half_mcc": round(mcc(truth[half:], chance >= 0.5), 4),
    }
    facts = {**digests, "presence": presence, "calibration": calibration}
    write_json(ASSETS / "demo.json", facts)
    print(facts)


if __name__ == "__main__":
    main()

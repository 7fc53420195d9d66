"""Fit the presence score of the `demo` profile, and write labkit/assets/demo.json.

    python training/calibrate_presence.py

A logistic regression on the evidence of scenes that neither training nor evaluation has seen. The
file also holds the digests of the weights, so run this after both trainings.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from labkit.files import checksum, write_json
from labkit.object_scenes import CALIBRATION_SEED, object_scene
from labkit.segment.metrics import auroc, mcc
from labkit.segment.pipeline import TextSegmenter
from labkit.segment.weights import get_profile

ASSETS = Path(__file__).resolve().parents[1] / "labkit" / "assets"
FIRST = 1000  # the trainings watch themselves on the scenes before
NEUTRAL = {"strength": 1.0, "contrast": 0.0, "rivalry": 0.0, "agreement": 0.0, "constant": 0.0}


def evidence(segmenter: TextSegmenter, scenes: int) -> tuple[np.ndarray, np.ndarray]:
    """Evidence (N, 4) for sentences, each with what the masks would be if it were there; truth."""
    rows, truth = [], []
    for number in tqdm(range(FIRST, FIRST + scenes), desc="scenes"):
        scene = object_scene(number, seed=CALIBRATION_SEED)
        sentences = scene.questions(number)
        found = segmenter(scene.image, sentences, assume_present=True)
        rows += [answer.evidence.features() for answer in found.answers]
        truth += [sentence in scene.present for sentence in sentences]
    return np.array(rows), np.array(truth)


def main() -> None:
    """Fit, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=400)
    arguments = parser.parse_args()
    about = {
        "clipseg": f"sha256:{checksum(ASSETS / 'clipseg-tiny' / 'model.safetensors')}",
        "sam2": f"sha256:{checksum(ASSETS / 'sam2-tiny' / 'sam2.safetensors')}",
    }
    write_json(ASSETS / "demo.json", {**about, "presence": NEUTRAL})
    segmenter = TextSegmenter.from_profile(get_profile("demo"))
    features, truth = evidence(segmenter, arguments.scenes)
    half = len(truth) // 2
    check = LogisticRegression(C=10.0).fit(features[:half], truth[:half])
    chance = check.predict_proba(features[half:])[:, 1]
    model = LogisticRegression(C=10.0).fit(features, truth)
    names = ("strength", "contrast", "rivalry", "agreement")
    weights = dict(zip(names, model.coef_[0].round(4).tolist(), strict=True))
    presence = {**weights, "constant": round(float(model.intercept_[0]), 4), "cut": 0.5}
    calibration = {
        "scenes": arguments.scenes,
        "sentences": len(truth),
        "second_half_auroc": round(auroc(truth[half:], chance), 4),
        "second_half_mcc": round(mcc(truth[half:], chance >= 0.5), 4),
    }
    facts = {**about, "presence": presence, "calibration": calibration}
    write_json(ASSETS / "demo.json", facts)
    print(facts)


if __name__ == "__main__":
    main()

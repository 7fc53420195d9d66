"""Fit the presence score of a pair of weights.

    python training/calibrate_presence.py
    python training/calibrate_presence.py --data FOLDER --clipseg FOLDER --sam2 FOLDER

A logistic regression, with weights that are not negative, since each piece of evidence speaks for
the sentence. The first command fits the `demo` profile on scenes that neither training nor
evaluation has seen, and writes `labkit/assets/demo.json`. The second fits the weights that the
trainings on photographs wrote, on frames and crops of `val` in the folder of `--data`, and writes
`presence.json` beside those of CLIPSeg. Both files also hold the digests of the weights, so run
this after both trainings.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from tqdm import tqdm
from vocabulary import OTHER_NOUNS, STREET_NOUNS

from labkit.files import compute_checksum, write_json
from labkit.object_scenes import CALIBRATION_SEED, make_object_scene
from labkit.segment.annotations import load_annotations
from labkit.segment.checkpoints import PresenceModel, get_profile
from labkit.segment.metrics import auroc, mcc
from labkit.segment.pipeline import TextSegmenter

ASSETS = Path(__file__).resolve().parents[1] / "labkit" / "assets"
FIRST = 1000  # the trainings watch themselves on the scenes before
SHRINKAGE = 0.1
NAMES = ("peak", "contrast", "contrastive_margin", "agreement", "constant")
NEUTRAL = PresenceModel(peak=1, contrast=0, contrastive_margin=0, agreement=0, constant=0)
NUM_FOREIGN = 3


Question = tuple[np.ndarray, Sequence[str], Sequence[bool]]
"""An image (H, W, 3), sentences, and which of them are true of it."""


def ask_about_scenes(count: int) -> Iterator[Question]:
    """Yield scenes, each with true and false sentences."""
    for number in tqdm(range(FIRST, FIRST + count), desc="scenes", disable=None):
        scene = make_object_scene(number, seed=CALIBRATION_SEED)
        sentences = scene.sample_sentences(number)
        yield scene.image, sentences, [sentence in scene.present for sentence in sentences]


def ask_about_photographs(folder: Path, count: int) -> Iterator[Question]:
    """Yield `count` photographs, evenly spread, and their crops, each with all its sentences.

    To these, NUM_FOREIGN nouns are added that no street shows.
    """
    photographs = load_annotations(folder)
    nouns = [noun for noun in OTHER_NOUNS if noun not in STREET_NOUNS]
    chosen = np.linspace(0, len(photographs) - 1, min(count, len(photographs))).round()
    for number in tqdm(chosen.astype(int).tolist(), desc="photographs", disable=None):
        frame = photographs[number]
        for part, image in enumerate([frame, *frame.split_into_crops()]):
            rng = np.random.default_rng([number, part])
            foreign = [str(noun) for noun in rng.choice(nouns, NUM_FOREIGN, replace=False)]
            sentences = [target.sentence for target in image.targets]
            truth = [target.is_present for target in image.targets]
            yield image.image, sentences + foreign, truth + [False] * NUM_FOREIGN


def collect_evidence(
    segmenter: TextSegmenter, questions: Iterable[Question]
) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, 4) of the evidence for N sentences, presence assumed, and their truth (N,)."""
    rows, truth = [], []
    for image, sentences, answers in questions:
        found = segmenter(image, sentences, exclusive=True, assume_present=True)
        rows += [result.evidence.to_features() for result in found.sentences]
        truth += answers
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--data", type=Path, help="folder of train and val; without it, scenes")
    parser.add_argument("--clipseg", type=Path, default=ASSETS / "clipseg-tiny")
    parser.add_argument("--sam2", type=Path, default=ASSETS / "sam2-tiny")
    parser.add_argument("--photographs", type=int, default=26)
    arguments = parser.parse_args()
    if arguments.data and ASSETS in (arguments.clipseg.parent, arguments.sam2.parent):
        parser.error("--data needs --clipseg and --sam2, the output folders of both trainings")
    weights = {"clipseg": str(arguments.clipseg), "sam2": str(arguments.sam2)}
    profile = replace(get_profile("demo").replace_weights(**weights), presence=NEUTRAL)
    if arguments.data:
        path = arguments.clipseg / "presence.json"
        kind, count = "photographs", arguments.photographs
        questions = ask_about_photographs(arguments.data / "val", count)
    else:
        path, kind, count = ASSETS / "demo.json", "scenes", arguments.scenes
        questions = ask_about_scenes(count)
    features, truth = collect_evidence(TextSegmenter.from_profile(profile), questions)
    half = len(truth) // 2
    *weights, constant = fit_weights(features[:half], truth[:half])
    chance = expit(features[half:] @ weights + constant)
    final = fit_weights(features, truth).round(4).tolist()
    digests = {
        "clipseg": f"sha256:{compute_checksum(arguments.clipseg / 'model.safetensors')}",
        "sam2": f"sha256:{compute_checksum(arguments.sam2 / 'sam2.safetensors')}",
    }
    presence = {**dict(zip(NAMES, final, strict=True)), "threshold": 0.5}
    calibration = {
        kind: count,
        "sentences": len(truth),
        "second_half_auroc": round(auroc(truth[half:], chance), 4),
        "second_half_mcc": round(mcc(truth[half:], chance >= 0.5), 4),
    }
    facts = {**digests, "presence": presence, "calibration": calibration}
    write_json(path, facts)
    print(facts)


if __name__ == "__main__":
    main()

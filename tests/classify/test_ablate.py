from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from labkit.classify import ablate
from labkit.classify.ablate import (
    Claim,
    compare,
    compute_interval,
    judge,
    list_claims,
    make_base,
    run_ablation,
)
from labkit.classify.config import AugmentConfig, TrainConfig
from labkit.classify.data import ImageData
from labkit.classify.fit import fit
from labkit.runtime import InputError

FLIP = Claim(
    name="flip", text="flips bring 2 points", without={"augment": AugmentConfig()}, claimed=2.0
)
CONSTANT = Claim(name="cosine", text="cosine helps", without={}, constant_rate=True)


@pytest.fixture
def base(squares: ImageData) -> TrainConfig:
    return TrainConfig(
        data="squares",
        image_size=16,
        model="vit",
        model_options={"patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2},
        epochs=2,
        batch_size=50,
        decay_all=True,
        val_size=20,
        augment=AugmentConfig(flip="random"),
    )


def make_history(accuracy: float, speed: float = 100.0) -> list[dict[str, float]]:
    return [
        {"epoch": 1, "validation_accuracy": 0.9, "images_per_second": 1.0},
        {"epoch": 2, "validation_accuracy": 0.1, "images_per_second": speed},
        {"epoch": 3, "validation_accuracy": accuracy, "images_per_second": 10 * speed},
    ]


def test_the_interval_is_that_of_scipys_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    more, less = rng.normal(0.7, 0.1, (2, 5))
    expected = stats.ttest_rel(more, less).confidence_interval(0.95)
    assert compute_interval(list(more - less)) == pytest.approx(tuple(expected))
    assert compute_interval([1.0]) is None


@pytest.mark.parametrize(
    ("interval", "claimed", "verdict"),
    [
        ((3.0, 5.0), 4.0, "holds"),
        ((5.0, 6.0), 4.0, "holds"),  # more than was claimed
        ((0.5, 3.9), 4.0, "does not hold"),  # an effect, but less than was claimed
        ((-0.5, 3.9), 4.0, "does not hold"),
        ((-0.5, 4.1), 4.0, "cannot be told"),
        (None, 4.0, "cannot be told"),
        ((0.1, 0.2), None, "holds"),
        ((-0.1, 0.2), None, "cannot be told"),
        ((-0.2, -0.1), None, "does not hold"),
    ],
)
def test_the_verdict_follows_from_the_interval(
    interval: tuple[float, float] | None, claimed: float | None, verdict: str
) -> None:
    assert judge(interval, claimed, 0.0) == verdict


def test_accuracies_are_compared_in_points_after_the_last_epoch_seed_by_seed() -> None:
    included = [make_history(0.60), make_history(0.80), make_history(0.70)]
    without = [make_history(0.57), make_history(0.77), make_history(0.67)]
    effect = compare(FLIP, included, without)
    assert effect.values == pytest.approx((3.0, 3.0, 3.0))
    assert effect.interval == pytest.approx((3.0, 3.0))
    assert effect.verdict == "holds"


def test_speeds_are_compared_as_ratios_whose_mean_is_geometric() -> None:
    claim = dataclasses.replace(FLIP, measure="speed", claimed=1.3)
    included = [make_history(0.5, speed) for speed in (100.0, 400.0)]
    without = [make_history(0.5, speed) for speed in (100.0, 100.0)]
    effect = compare(claim, included, without)
    assert effect.values == pytest.approx((1.0, 4.0)) and effect.mean == pytest.approx(2.0)
    assert effect.interval is not None
    low, high = effect.interval
    assert low * high == pytest.approx(4.0)
    assert math.log(high / 2) == pytest.approx(12.706 * math.log(2), rel=1e-3)  # df = 1


def test_an_ablation_writes_its_table_and_figures_and_repeats_no_run(
    base: TrainConfig, squares: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def count(config: TrainConfig, **options: Any) -> Any:
        begun.append((config.seed, config.augment.flip, options["optimizer"] is not None))
        if len(begun) == 4:
            raise KeyboardInterrupt
        return fit(config, **options)

    monkeypatch.setattr(ablate, "fit", count)
    arguments: Mapping[str, Any] = {"seeds": (0, 1), "data": squares, "out": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        run_ablation(base, [FLIP, CONSTANT], **arguments, device="cpu")
    ablation = run_ablation(base, [FLIP, CONSTANT], **arguments, device="cpu")
    runs = [("random", False), ("none", False), ("random", True)]  # the base is trained once
    once = [(seed, *run) for seed in (0, 1) for run in runs]
    assert begun == [*once[:4], *once[3:]]
    again = run_ablation(base, [FLIP, CONSTANT], **arguments, device="cpu")
    assert len(begun) == 7
    assert again.to_json() == ablation.to_json()
    result = json.loads((tmp_path / "ablate.json").read_text())
    assert result == ablation.to_json()
    assert [row["name"] for row in result["claims"]] == ["flip", "cosine"]
    assert result["seeds"] == [0, 1] and result["epochs"] == 2
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "effects.png",
        "flip.png",
        "cosine.png",
    }
    included, without = ablation.histories["cosine"]
    assert included[0][1]["learning_rate"] < 1e-3
    assert [row["learning_rate"] for row in without[0]] == [1e-3, 1e-3]


def test_a_constant_rate_is_that_of_the_plain_optimizer(
    base: TrainConfig, squares: ImageData, tmp_path: Path
) -> None:
    """An independent loop: the same batches through torch's own AdamW that nobody schedules."""
    import torch

    from labkit.classify.augment import TrainLoader
    from labkit.classify.data import train_val_split
    from labkit.classify.models import create_from_config
    from labkit.rng import permutation

    plain = dataclasses.replace(base, augment=AugmentConfig())
    ablation = run_ablation(plain, [CONSTANT], seeds=[0], data=squares, out=tmp_path, device="cpu")
    torch.manual_seed(0)
    model = create_from_config(plain, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    train, _ = train_val_split(squares.train, plain.val_size)
    loader = TrainLoader(train, plain, torch.device("cpu"))
    losses = []
    for epoch in range(2):
        total = 0.0
        for indices in permutation(0, epoch, len(train)).split(50):
            images, labels = loader.batch(epoch, indices)
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(indices)
        losses.append(total / len(train))
    _, (history,) = ablation.histories["cosine"]
    assert [row["train_loss"] for row in history] == pytest.approx(losses, rel=1e-5)


def test_a_folder_of_another_ablation_is_refused(
    base: TrainConfig, squares: ImageData, tmp_path: Path
) -> None:
    run_ablation(base, [FLIP], seeds=[0], data=squares, out=tmp_path, device="cpu")
    other = dataclasses.replace(base, epochs=3)
    with pytest.raises(InputError, match="another configuration"):
        run_ablation(other, [FLIP], seeds=[0], data=squares, out=tmp_path, device="cpu")


def test_wrong_arguments_are_refused_before_anything_is_trained(
    base: TrainConfig, squares: ImageData, tmp_path: Path
) -> None:
    def run(config: TrainConfig, claims: list[Claim], seeds: list[int]) -> None:
        run_ablation(config, claims, seeds=seeds, data=squares, out=tmp_path / "out")

    with pytest.raises(InputError, match="seeds must be at least one, and none of them twice"):
        run(base, [FLIP], [1, 1])
    with pytest.raises(InputError, match="claims must be at least one"):
        run(base, [], [0])
    with pytest.raises(InputError, match="val_size"):
        run(dataclasses.replace(base, val_size=0), [FLIP], [0])
    with pytest.raises(InputError, match="width must be between"):
        make_base(squares, width=0, device="cpu")
    with pytest.raises(InputError, match="seed-resnet18"):
        list_claims(base, device="cpu")
    assert not (tmp_path / "out").exists()


def test_the_claims_of_the_lab_change_one_ingredient_each(squares: ImageData) -> None:
    base = make_base(squares, width=0.25, device="cpu")
    assert base.epochs == 3 and base.val_size == 12
    assert base.model_options == {"channels": [16, 32, 64, 128]}
    claims = {claim.name: claim for claim in list_claims(base, device="cpu")}
    claimed = {name: claim.claimed for name, claim in claims.items() if claim.claimed}
    assert claimed == {"adamw-cosine": 4.0, "crop-flip": 2.0, "mixed-precision": 1.3}
    assert claims["width"].without["model_options"] == {"channels": [8, 16, 32, 64]}
    layers = {"channels": [16, 32, 64, 128], "layers": [1, 1, 1, 1]}
    assert claims["depth"].without["model_options"] == layers
    for claim in claims.values():
        dataclasses.replace(base, **claim.without)

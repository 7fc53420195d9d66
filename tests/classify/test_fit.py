from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from labkit.classify.checkpoint import CheckpointStore
from labkit.classify.config import AugmentConfig, TrainConfig
from labkit.classify.data import ImageData
from labkit.classify.fit import fit
from labkit.classify.run import load_run
from labkit.classify.trainer import Trainer, check_health, try_compile
from labkit.runtime import InputError, Precision, TrainingError

FP32 = Precision(autocast_dtype=None, scale_loss=False)


def assert_same_weights(left: nn.Module, right: nn.Module) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_plain_configuration_equals_a_hand_written_loop(squares: ImageData) -> None:
    config = TrainConfig(
        data="squares",
        image_size=16,
        model="vit",
        model_options={"patch": 4, "width": 16, "depth": 1, "heads": 2},
        epochs=2,
        batch_size=50,
        decay_all=True,
        schedule_per="epoch",
    )
    run = fit(config, data=squares)

    torch.manual_seed(config.seed)
    from labkit.classify.models import build_model
    from labkit.rng import permutation

    model = build_model("vit", classes=3, image_size=16, **config.model_options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
    mean = torch.tensor(config.mean).view(1, 3, 1, 1)
    std = torch.tensor(config.std).view(1, 3, 1, 1)
    pixels = torch.from_numpy(squares.train.images).permute(0, 3, 1, 2) / 255
    labels = torch.from_numpy(squares.train.labels)
    for epoch in range(2):
        losses = []
        for indices in permutation(0, epoch, 120).split(50):
            loss = nn.functional.cross_entropy(
                model((pixels[indices] - mean) / std), labels[indices]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item() * len(indices))
        assert run.history[epoch]["train_loss"] == pytest.approx(sum(losses) / 120, rel=1e-5)
        scheduler.step()
    for ours, theirs in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_training_learns_and_leaves_every_promised_file(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config, epochs=8, augment=AugmentConfig(flip="random"))
    run = fit(config, data=squares, out=tmp_path)
    assert run.metrics.accuracy > 0.9
    assert json.loads((tmp_path / "config.json").read_text()) == config.to_json()
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 9))
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    saved = json.loads((tmp_path / "metrics.json").read_text())
    promised = {
        "preset",
        "data",
        "test_accuracy",
        "test_accuracy_tta",
        "test_accuracy_interval",
        "train_accuracy",
        "epochs",
        "passes",
        "train_seconds",
        "images_per_second",
        "device",
        "versions",
    }
    assert promised <= saved.keys()
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_a_saved_run_loads_with_the_same_weights_and_metrics(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    run = fit(tiny_config, data=squares, out=tmp_path)
    loaded = load_run(tmp_path, data=squares)
    assert_same_weights(loaded.model, run.model)
    assert loaded.metrics.accuracy == run.metrics.accuracy
    np.testing.assert_allclose(loaded.probabilities, run.probabilities, atol=1e-6)
    assert loaded.to_json().keys() == run.to_json().keys()


def test_loading_a_folder_without_a_run_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        load_run(tmp_path)


def test_global_random_state_is_left_as_found(squares: ImageData, tiny_config: TrainConfig) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    fit(dataclasses.replace(tiny_config, epochs=1), data=squares)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_resume_is_bit_exact_mid_epoch(
    squares: ImageData,
    tiny_config: TrainConfig,
    tmp_path: Path,
    optimizer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = dataclasses.replace(tiny_config, optimizer=optimizer, learning_rate=0.01)
    whole = fit(config, data=squares)

    steps = iter(range(100))
    step = Trainer.step

    def interrupted_step(self: Trainer, *arguments: object) -> None:
        if next(steps) == 6:  # in the second epoch, which has 4 steps
            raise KeyboardInterrupt
        step(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", interrupted_step)
        fit(config, data=squares, out=tmp_path, save_every=0)
    assert CheckpointStore(tmp_path / "checkpoints").generations()[0].name == "step-6"
    resumed = fit(config, data=squares, out=tmp_path, resume=True)
    assert_same_weights(resumed.model, whole.model)
    for ours, theirs in zip(resumed.history, whole.history, strict=True):
        assert ours["train_loss"] == theirs["train_loss"]
        assert ours["train_accuracy"] == theirs["train_accuracy"]


SCRIPT = """
    import sys
    from tests.classify.conftest import coloured_squares
    from labkit.classify.data import ImageData
    from labkit.classify.fit import fit
    from labkit.classify.config import TrainConfig
    import json, torch

    data = ImageData(
        train=coloured_squares(120, 0), test=coloured_squares(60, 1),
        classes=("red", "green", "blue"), source="squares", name="squares", fingerprint="s",
    )
    config = TrainConfig.from_json(json.loads(sys.argv[1]))
    run = fit(config, data=data, out=sys.argv[2], resume=True, device="cpu", save_every=0)
"""


def command(config: TrainConfig, folder: Path) -> list[str]:
    return [
        sys.executable,
        "-c",
        textwrap.dedent(SCRIPT),
        json.dumps(config.to_json()),
        str(folder),
    ]


def newest_step(store: CheckpointStore) -> int:
    return max((int(g.name.removeprefix("step-")) for g in store.generations()), default=0)


@pytest.mark.slow
def test_a_run_killed_in_mid_epoch_ends_with_the_weights_of_an_uninterrupted_one(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config, epochs=40)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(command(config, killed), stderr=subprocess.DEVNULL)
    store = CheckpointStore(killed / "checkpoints")
    deadline = time.monotonic() + 120
    try:
        while newest_step(store) < 10:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert 10 <= newest_step(store) < 160 and not (killed / "metrics.json").exists()
    for folder in (killed, whole):
        subprocess.run(command(config, folder), check=True, stderr=subprocess.DEVNULL)
    from safetensors.torch import load_file

    left, right = (load_file(folder / "model.safetensors") for folder in (killed, whole))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
def test_two_processes_follow_one(tiny_config: TrainConfig, tmp_path: Path) -> None:
    options = {"patch": 4, "width": 16, "depth": 2, "heads": 2}
    config = dataclasses.replace(tiny_config, model_options=options, batch_size=50)
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    arguments = [json.dumps(config.to_json())]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    for prefix, folder in ((launch, "two"), ([sys.executable], "one")):
        subprocess.run(
            [*prefix, str(script), *arguments, str(tmp_path / folder)],
            check=True,
            env=environment,
            capture_output=True,
        )
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == config.epochs
    for ours, theirs in zip(one, two, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-4)


def test_an_interrupt_finishes_the_step_saves_and_stops(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    config = dataclasses.replace(tiny_config, epochs=10_000)
    timer = threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        fit(config, data=squares, out=tmp_path)
    assert len(CheckpointStore(tmp_path / "checkpoints").generations()) == 1
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_finished_run_is_not_trained_again(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fit(tiny_config, data=squares, out=tmp_path)
    monkeypatch.setattr(Trainer, "step", None)
    again = fit(tiny_config, data=squares, out=tmp_path, resume=True)
    assert_same_weights(run.model, again.model)


def test_a_lost_folder_is_brought_back_from_its_mirror(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, drive = tmp_path / "local", tmp_path / "drive"
    run = fit(tiny_config, data=squares, out=local, mirror=drive, save_every=0)
    assert sorted(p.relative_to(local) for p in local.rglob("*")) == sorted(
        p.relative_to(drive) for p in drive.rglob("*")
    )
    shutil.rmtree(local)
    monkeypatch.setattr(Trainer, "step", None)
    again = fit(tiny_config, data=squares, out=local, mirror=drive, resume=True)
    assert_same_weights(run.model, again.model)


def test_an_existing_run_is_not_overwritten(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    fit(dataclasses.replace(tiny_config, epochs=1), data=squares, out=tmp_path)
    with pytest.raises(InputError, match="--resume"):
        fit(tiny_config, data=squares, out=tmp_path)


def test_a_checkpoint_of_another_configuration_is_refused_by_name(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    fit(dataclasses.replace(tiny_config, epochs=1), data=squares, out=tmp_path)
    with pytest.raises(InputError, match=r"epochs: 1 -> 3"):
        fit(tiny_config, data=squares, out=tmp_path, resume=True)
    other = dataclasses.replace(squares, fingerprint="other")
    with pytest.raises(InputError, match="pictures"):
        fit(dataclasses.replace(tiny_config, epochs=1), data=other, out=tmp_path, resume=True)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = fit(tiny_config, data=squares, out=tmp_path, save_every=0)
    newest = CheckpointStore(tmp_path / "checkpoints").generations()[0]
    content = (newest / "tensors.safetensors").read_bytes()
    (newest / "tensors.safetensors").write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING):
        again = fit(tiny_config, data=squares, out=tmp_path, resume=True)
    assert "damaged" in caplog.text
    assert_same_weights(again.model, whole.model)


def test_the_best_validation_epoch_counts_when_pictures_are_held_out(
    squares: ImageData, tiny_config: TrainConfig
) -> None:
    run = fit(dataclasses.replace(tiny_config, hold_out=30, epochs=4), data=squares)
    best = max(row["validation_accuracy"] for row in run.history)
    assert run.facts["training_pictures"] == 90
    from labkit.classify.data import hold_out
    from labkit.classify.run import evaluate

    _, validation = hold_out(squares.train, 30)
    metrics, _ = evaluate(run.model, dataclasses.replace(squares, test=validation))
    assert metrics.accuracy == pytest.approx(best)


def test_a_non_finite_loss_stops_the_run_and_says_so(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config, optimizer="sgd", learning_rate=1e20, clip_norm=0)
    with pytest.raises(TrainingError, match="learning rate"):
        fit(config, data=squares, out=tmp_path, save_every=0)


class CollapsedScaler:
    def is_enabled(self) -> bool:
        return True

    def get_scale(self) -> float:
        return 2.0**-20


def test_a_collapsed_loss_scale_stops_the_run() -> None:
    with pytest.raises(TrainingError, match="collapsed"):
        check_health(1.0, CollapsedScaler(), 0)  # type: ignore[arg-type]


def test_fp16_without_a_gpu_names_the_remedy(squares: ImageData, tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, precision="fp16")
    with pytest.raises(InputError, match="Change runtime type"):
        fit(config, data=squares, device="cpu")


def test_bf16_autocast_trains_on_a_cpu(squares: ImageData, tiny_config: TrainConfig) -> None:
    run = fit(dataclasses.replace(tiny_config, precision="bf16"), data=squares, device="cpu")
    assert run.facts["precision"] == "bf16"
    assert all(np.isfinite(row["train_loss"]) for row in run.history)


def test_a_failing_compiler_is_a_warning_and_the_plain_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(model: nn.Module) -> nn.Module:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    with caplog.at_level(logging.WARNING):
        assert try_compile(model, 4, torch.device("cpu"), FP32) is model
    assert "no compiler" in caplog.text
    assert model.training and model[1].weight.grad is None

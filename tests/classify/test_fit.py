from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from labkit.classify.checkpoint import RunFolder
from labkit.classify.config import AugmentConfig, TrainConfig
from labkit.classify.data import ImageData, Split, train_val_split
from labkit.classify.evaluate import evaluate
from labkit.classify.fit import fit
from labkit.classify.optim import lr_at
from labkit.classify.run import Run, load_run
from labkit.classify.trainer import (
    Callback,
    TensorBoard,
    Trainer,
    TrainState,
    check_health,
    try_compile,
)
from labkit.runtime import InputError, Precision, TrainingError, use_seed

FP32 = Precision(autocast_dtype=None, scale_loss=False)


def assert_same_weights(left: nn.Module, right: nn.Module) -> None:
    first, second = left.state_dict(), right.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_a_plain_configuration_equals_a_hand_written_loop(squares: ImageData) -> None:
    config = TrainConfig(
        data="squares",
        image_size=16,
        model="vit",
        model_options={"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
        epochs=2,
        batch_size=50,
        decay_all=True,
        schedule_per="epoch",
    )
    run = fit(config, data=squares)

    torch.manual_seed(config.seed)
    from labkit.classify.models import create_model
    from labkit.rng import permutation

    model = create_model("vit", num_classes=3, image_size=16, **config.model_options)
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
    for first, second in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)


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
    np.testing.assert_allclose(loaded.metrics.probabilities, run.metrics.probabilities, atol=1e-6)
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


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw"},
        {"optimizer": "sgd"},
        {"optimizer": "muon"},
        {"ema_decay": 0.0, "lookahead": 4, "cycle_momentum": True},
    ],
)
def test_resume_is_bit_exact_mid_epoch(
    squares: ImageData,
    tiny_config: TrainConfig,
    tmp_path: Path,
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = dataclasses.replace(tiny_config, learning_rate=0.01, **changes)
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
    assert generations(tmp_path)[0].name == "step-6"
    resumed = fit(config, data=squares, out=tmp_path, resume=True)
    assert_same_weights(resumed.model, whole.model)
    for first, second in zip(resumed.history, whole.history, strict=True):
        assert first["train_loss"] == second["train_loss"]
        assert first["train_accuracy"] == second["train_accuracy"]


SCRIPT = """
    import sys
    from tests.classify.conftest import coloured_squares
    from labkit.classify.data import ImageData
    from labkit.classify.fit import fit
    from labkit.classify.config import TrainConfig
    import json, torch

    data = ImageData(
        train=coloured_squares(120, 0), test=coloured_squares(60, 1),
        source="squares", name="squares", fingerprint="s",
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


def generations(folder: Path) -> list[Path]:
    return RunFolder(folder, TrainConfig(), "").generations()


def newest_step(folder: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in generations(folder)), default=0)


@pytest.mark.slow
def test_a_run_killed_in_mid_epoch_ends_with_the_weights_of_an_uninterrupted_one(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config, epochs=12)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(command(config, killed), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    try:
        while newest_step(killed) < 6:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert 6 <= newest_step(killed) < 48 and not (killed / "metrics.json").exists()
    for folder in (killed, whole):
        subprocess.run(command(config, folder), check=True, stderr=subprocess.DEVNULL)
    from safetensors.torch import load_file

    left, right = (load_file(folder / "model.safetensors") for folder in (killed, whole))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
def test_two_processes_follow_one(tiny_config: TrainConfig, tmp_path: Path) -> None:
    options = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    config = dataclasses.replace(tiny_config, model_options=options, batch_size=50)
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    arguments = [json.dumps(config.to_json())]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
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
    for first, second in zip(one, two, strict=True):
        assert first["train_loss"] == pytest.approx(second["train_loss"], abs=1e-4)


INTERRUPTED = """
    import sys
    from labkit.classify.trainer import Trainer

    step = Trainer.step

    def interrupted_step(self, state, images, targets):
        if state.epoch == 1 and state.step == 2:
            sys.exit(3)
        step(self, state, images, targets)

    if sys.argv.pop() == "interrupt":
        Trainer.step = interrupted_step
"""


@pytest.mark.slow
def test_statistics_of_two_processes_resumed_mid_epoch_are_those_of_a_whole_run(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(INTERRUPTED) + textwrap.dedent(SCRIPT))
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]

    def train(name: str, how: str) -> int:
        arguments = [json.dumps(tiny_config.to_json()), str(tmp_path / name), how]
        command = [*launch, str(script), *arguments]
        return subprocess.run(command, env=environment, capture_output=True).returncode

    assert train("whole", "finish") == 0
    assert train("resumed", "interrupt") != 0
    assert newest_step(tmp_path / "resumed") == 6  # two steps into the second of 4 steps each
    assert train("resumed", "finish") == 0
    whole, resumed = (
        [json.loads(line) for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
        for name in ("whole", "resumed")
    )
    assert len(whole) == len(resumed) == 3
    for first, second in zip(whole, resumed, strict=True):
        for name in ("train_loss", "train_accuracy"):
            assert first[name] == pytest.approx(second[name], rel=1e-6)


@pytest.mark.slow
def test_two_processes_train_batch_norm_on_a_last_batch_of_one_image(tmp_path: Path) -> None:
    config = TrainConfig(
        data="squares", image_size=16, model="resnet18", epochs=1, batch_size=17, val_size=0
    )
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))  # trains on 120 images: 6 batches of 17, one of 18
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    subprocess.run(
        [*launch, str(script), json.dumps(config.to_json()), str(tmp_path / "two")],
        check=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
    )
    assert newest_step(tmp_path / "two") == 7
    row = json.loads((tmp_path / "two" / "history.jsonl").read_text())
    assert np.isfinite(row["train_loss"])


def test_deterministic_algorithms_are_those_of_the_run_alone(
    squares: ImageData, tiny_config: TrainConfig
) -> None:
    found: list[bool] = []

    class Look(Callback):
        def on_step_end(self, state: TrainState) -> None:
            found.append(torch.are_deterministic_algorithms_enabled())

    config = dataclasses.replace(tiny_config, epochs=1, deterministic=True)
    fit(config, data=squares, callbacks=[Look()], device="cpu")
    assert all(found) and len(found) == 4
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_interrupt_finishes_the_step_saves_and_stops(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    config = dataclasses.replace(tiny_config, epochs=10_000)
    timer = threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        fit(config, data=squares, out=tmp_path)
    assert len(generations(tmp_path)) == 1
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
    with pytest.raises(InputError, match=r"clip_norm: 1.0 -> 2.0"):  # also where epochs are added
        changed = dataclasses.replace(tiny_config, epochs=3, clip_norm=2.0)
        fit(changed, data=squares, out=tmp_path, resume=True)
    other = dataclasses.replace(squares, fingerprint="other")
    with pytest.raises(InputError, match="images"):
        fit(dataclasses.replace(tiny_config, epochs=1), data=other, out=tmp_path, resume=True)


def interrupt_at(patch: pytest.MonkeyPatch, number: int) -> None:
    """Let the step `number`, counted from 0 in this process, raise KeyboardInterrupt."""
    steps, step = iter(range(1000)), Trainer.step

    def interrupted_step(self: Trainer, *arguments: Any) -> None:
        if next(steps) == number:
            raise KeyboardInterrupt
        step(self, *arguments)

    patch.setattr(Trainer, "step", interrupted_step)


def test_a_finished_run_is_extended_on_the_schedule_of_the_longer_one(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    longer = dataclasses.replace(tiny_config, epochs=5)
    first = fit(tiny_config, data=squares, out=tmp_path)
    with caplog.at_level(logging.INFO):
        run = fit(longer, data=squares, out=tmp_path, resume=True)
    assert list(run.history[:3]) == list(first.history)
    # The rate of a row is that of the last of the 4 steps of its epoch.
    expected = [3e-3 * lr_at(4 * epoch - 1, 4, longer) for epoch in (4, 5)]
    assert [row["learning_rate"] for row in run.history[3:]] == pytest.approx(expected)
    factor = lr_at(3 * 4, 4, longer)
    (line,) = [r.getMessage() for r in caplog.records if "goes on to 5" in r.getMessage()]
    assert "finished run of 3 epochs" in line and "schedule of a run of 5 epochs" in line
    told = float(line.split("goes on at ")[1].split(" of its peak")[0])
    assert told == pytest.approx(factor, abs=0.15)
    assert run.facts["epochs"] == run.facts["chosen_epoch"] == 5
    assert load_run(tmp_path, data=squares).config.epochs == 5


def test_an_extension_that_stops_leaves_what_was_finished_and_resumes_bit_for_bit(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = dataclasses.replace(tiny_config, epochs=5)
    one, two = tmp_path / "one", tmp_path / "two"
    finished = fit(tiny_config, data=squares, out=one)
    shutil.copytree(one, two)
    whole = fit(longer, data=squares, out=one, resume=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 6)  # in the fifth epoch
        fit(longer, data=squares, out=two, resume=True, save_every=0)
    kept = load_run(two, data=squares)
    assert kept.config == tiny_config and list(kept.history) == list(finished.history)
    assert_same_weights(kept.model, finished.model)
    with pytest.raises(InputError, match=r"epochs: 5 -> 3"):
        fit(tiny_config, data=squares, out=two, resume=True)
    with pytest.raises(InputError, match=r"epochs: 5 -> 6"):  # it is not finished
        fit(dataclasses.replace(longer, epochs=6), data=squares, out=two, resume=True)
    resumed = fit(longer, data=squares, out=two, resume=True)
    assert_same_weights(resumed.model, whole.model)


def test_the_epoch_that_counts_is_recorded(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config, val_size=30, epochs=4)
    run = fit(config, data=squares, out=tmp_path)
    accuracies = [row["validation_accuracy"] for row in run.history]
    best = 1 + accuracies.index(max(accuracies))
    assert json.loads((tmp_path / "metrics.json").read_text())["chosen_epoch"] == best
    assert "Chosen epoch" in (tmp_path / "report.html").read_text()


def test_seconds_and_memory_say_what_they_include(
    squares: ImageData, tiny_config: TrainConfig
) -> None:
    facts = fit(dataclasses.replace(tiny_config, epochs=1), data=squares, device="cpu").facts
    assert "not validation" in facts["train_seconds_include"]
    assert "whole process" in facts["peak_memory_is"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_peak_memory_begins_with_the_run(squares: ImageData, tiny_config: TrainConfig) -> None:
    torch.empty(2**30, dtype=torch.uint8, device="cuda")
    run = fit(dataclasses.replace(tiny_config, epochs=1), data=squares, device="cuda")
    assert run.facts["peak_memory_gib"] < 0.5


def test_neither_resuming_nor_loading_asks_for_pretrained_weights(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    asked: list[bool] = []
    create = timm.create_model

    def create_offline(name: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
        asked.append(pretrained)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", create_offline)
    options = {"backbone": "test_vit", "img_size": 32}
    config = dataclasses.replace(
        tiny_config, model="vit-finetune", model_options=options, epochs=1, ema_decay=0.0
    )
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2)
        fit(config, data=squares, out=tmp_path, save_every=0)
    assert asked == [True]
    run = fit(config, data=squares, out=tmp_path, resume=True)
    loaded = load_run(tmp_path, data=squares)
    assert asked == [True, False, False]
    assert_same_weights(run.model, loaded.model)


@pytest.mark.parametrize(("epochs", "warns"), [(2, True), (3, False)])
def test_a_preset_that_mixes_images_warns_of_a_short_run(
    epochs: int,
    warns: bool,
    squares: ImageData,
    tiny_config: TrainConfig,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    preset = dataclasses.replace(tiny_config, epochs=12)
    monkeypatch.setattr("labkit.classify.fit.PRESETS", {"tiny": preset})
    fit(dataclasses.replace(preset, epochs=epochs), data=squares)
    hints = [r.getMessage() for r in caplog.records if "mixes images" in r.getMessage()]
    assert len(hints) == warns
    assert not warns or "made for 12 epochs and gets 2" in hints[0]
    caplog.clear()
    plain = dataclasses.replace(preset, epochs=2, augment=AugmentConfig(flip="random"))
    fit(plain, data=squares)
    assert "mixes images" not in caplog.text


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = fit(tiny_config, data=squares, out=tmp_path, save_every=0)
    newest = generations(tmp_path)[0]
    content = (newest / "state.pt").read_bytes()
    (newest / "state.pt").write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING):
        again = fit(tiny_config, data=squares, out=tmp_path, resume=True)
    assert "damaged" in caplog.text
    assert_same_weights(again.model, whole.model)


def test_the_best_validation_epoch_counts_when_there_is_a_validation_split(
    squares: ImageData, tiny_config: TrainConfig
) -> None:
    run = fit(dataclasses.replace(tiny_config, val_size=30, epochs=4), data=squares)
    best = max(row["validation_accuracy"] for row in run.history)
    assert run.facts["training_images"] == 90
    _, validation = train_val_split(squares.train, 30)
    assert evaluate(run.model, validation).accuracy == pytest.approx(best)


def test_a_non_finite_loss_stops_the_run_and_says_so(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config, optimizer="sgd", learning_rate=1e20, clip_norm=0)
    with pytest.raises(TrainingError, match="learning rate"):
        fit(config, data=squares, out=tmp_path, save_every=0)


class Root(nn.Module):
    """Its first loss is finite, but the gradient of the square root at 0 is not."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16 * 16 * 3, 3)
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(images.flatten(1))
        return logits + 0 * self.zero.sqrt()


def test_a_spoiled_state_is_never_saved(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config, clip_norm=0.0, ema_decay=0.0)
    with pytest.raises(TrainingError, match=r"weights became non-finite in epoch 1\. Lower the"):
        fit(config, model=Root(), data=squares, out=tmp_path, save_every=0)
    assert generations(tmp_path) == []


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
    def broken(model: nn.Module, **options: Any) -> nn.Module:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    with caplog.at_level(logging.WARNING):
        assert try_compile(model, (8, 3, 4, 4), torch.device("cpu"), FP32) is model
    assert "no compiler" in caplog.text
    assert model.training and model[1].weight.grad is None


def test_a_process_that_is_not_the_main_one_has_the_folder_but_does_not_write(
    squares: ImageData,
    tiny_config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")
    calls: list[str] = []
    config = dataclasses.replace(tiny_config, epochs=1)
    folder = tmp_path / "run"
    run = fit(config, data=squares, out=folder, callbacks=[Recorder(calls)])
    assert run.folder == folder
    assert not folder.exists() and not calls


class Recorder(Callback):
    """Notes the names of the calls, and what the state holds then."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.rows: list[dict[str, float]] = []

    def on_train_begin(self, state: TrainState) -> None:
        self.calls.append("begin")

    def on_step_end(self, state: TrainState) -> None:
        self.calls.append("step")

    def on_epoch_end(self, state: TrainState) -> None:
        self.calls.append("epoch")
        assert state.history[-1]["epoch"] == state.epoch
        assert isinstance(state.model, nn.Module)
        self.rows.append(state.history[-1])

    def on_train_end(self, state: TrainState) -> None:
        self.calls.append("end")


def test_callbacks_are_called_in_order(squares: ImageData, tiny_config: TrainConfig) -> None:
    recorder = Recorder([])
    run = fit(dataclasses.replace(tiny_config, epochs=2), data=squares, callbacks=[recorder])
    epoch = ["step"] * 4 + ["epoch"]
    assert recorder.calls == ["begin", *epoch, *epoch, "end"]
    assert recorder.rows == list(run.history)


def test_a_failing_callback_ends_training_after_the_history_is_written(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    class Failing(Callback):
        def on_epoch_end(self, state: TrainState) -> None:
            raise RuntimeError("disk of the logger")

    recorder = Recorder([])
    with pytest.raises(RuntimeError, match="disk of the logger"):
        fit(tiny_config, data=squares, out=tmp_path, callbacks=[recorder, Failing()])
    assert recorder.calls[-1] == "end"
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 1


class FakeWriter:
    """Stands for `torch.utils.tensorboard.SummaryWriter`."""

    def __init__(self, folder: str | None) -> None:
        self.folder = folder
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = False
        writers.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        assert not self.closed

    def close(self) -> None:
        self.closed = True


writers: list[FakeWriter] = []


def test_tensorboard_gets_every_number_of_every_epoch(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run = fit(
        dataclasses.replace(tiny_config, epochs=2),
        data=squares,
        callbacks=[TensorBoard(tmp_path / "logs")],
    )
    writer = writers.pop()
    assert writer.folder == str(tmp_path / "logs") and writer.closed
    expected = [
        (name, value, row["epoch"])
        for row in run.history
        for name, value in row.items()
        if name != "epoch"
    ]
    assert writer.scalars == expected


def test_a_missing_tensorboard_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        TensorBoard()


def test_tensorboard_itself_reads_what_was_written(
    squares: ImageData, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    fit(dataclasses.replace(tiny_config, epochs=1), data=squares, callbacks=[TensorBoard(tmp_path)])
    assert list(tmp_path.glob("events.out.tfevents.*"))


# ---------------------------------------------------------------- things of one's own


class OwnNetwork(nn.Module):
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.features(images).mean((2, 3))))


def own_network(num_classes: int = 3) -> OwnNetwork:
    with use_seed(0):
        return OwnNetwork(num_classes)


class OwnDataset:
    """A data set as torchvision has them."""

    classes = ("red", "green", "blue")

    def __init__(self, split: Split) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._split.images[index]), int(self._split.labels[index])


def own_transform(image: Image.Image) -> torch.Tensor:
    """Draws from all three generators."""
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(image, np.float32) / 255 * np.random.uniform(0.8, 1.0)
    pixels = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)
    return (pixels + 0.02 * torch.rand(3, 1, 1)).clamp(0, 1)


OWN = TrainConfig(epochs=4, batch_size=32, schedule="one-cycle", warmup=0.25, seed=5)


def fit_own(squares: ImageData, **options: Any) -> Run:
    settings: dict[str, Any] = {
        "model": own_network(),
        "train": OwnDataset(squares.train),
        "test": (squares.test.images, squares.test.labels),
        "transform": own_transform,
        "optimizer": lambda parameters: torch.optim.RMSprop(parameters, lr=0.02),
    }
    return fit(OWN, **{**settings, **options})


def test_own_network_data_transform_and_optimizer_are_trained(
    squares: ImageData, tmp_path: Path
) -> None:
    model = own_network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = fit_own(squares, model=model, out=tmp_path)
    assert run.model is model and not torch.equal(before["head.weight"], model.head.weight)
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]
    assert run.metrics.accuracy > 0.8 and run.metrics.classes == ("red", "green", "blue")
    saved = json.loads((tmp_path / "config.json").read_text())
    custom = {"model": "custom", "data": "custom", "optimizer": "custom", "image_size": 16}
    assert {name: saved[name] for name in custom} == custom
    assert saved["augment"] == AugmentConfig().__dict__
    peak = max(row["learning_rate"] for row in run.history)
    assert 0.005 < peak <= 0.02


def test_a_run_of_own_things_resumes_bit_for_bit(
    squares: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit_own(squares)
    steps, step = iter(range(100)), Trainer.step

    def interrupted_step(self: Trainer, *arguments: Any) -> None:
        if next(steps) == 6:
            raise KeyboardInterrupt
        step(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", interrupted_step)
        fit_own(squares, out=tmp_path, save_every=0)
    random.seed(77), np.random.seed(77), torch.manual_seed(77)
    resumed = fit_own(squares, out=tmp_path, resume=True)
    assert_same_weights(resumed.model, whole.model)


def test_a_run_of_own_things_is_not_resumed_with_others(
    squares: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2)
        fit_own(squares, out=tmp_path, save_every=0)
    other = nn.Sequential(nn.Flatten(), nn.Linear(16 * 16 * 3, 3))
    with pytest.raises(InputError, match="do not fit this network and optimiser"):
        fit_own(squares, model=other, out=tmp_path, resume=True)


def test_a_run_of_own_things_is_loaded_with_them(squares: ImageData, tmp_path: Path) -> None:
    run = fit_own(squares, out=tmp_path)
    data = ImageData.from_splits(OwnDataset(squares.train), OwnDataset(squares.test))
    loaded = load_run(tmp_path, data=data, model=OwnNetwork())
    assert_same_weights(loaded.model, run.model)
    assert loaded.metrics.accuracy == run.metrics.accuracy
    with pytest.raises(InputError, match=r"pass data=labkit\.ImageData\.from_splits"):
        load_run(tmp_path, model=OwnNetwork())
    with pytest.raises(InputError, match="pass model="):
        load_run(tmp_path, data=data)
    with pytest.raises(InputError, match="do not fit the model"):
        load_run(tmp_path, data=data, model=OwnNetwork(4))


def test_an_optimizer_over_the_parameters_keeps_the_peaks_of_its_groups(squares: ImageData) -> None:
    model = own_network()
    groups = [
        {"params": model.features.parameters(), "lr": 0.001},
        {"params": model.head.parameters()},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    rates: list[list[float]] = []

    class Rates(Callback):
        def on_step_end(self, state: TrainState) -> None:
            rates.append([group["lr"] for group in state.optimizer.param_groups])

    fit_own(squares, model=model, optimizer=optimizer, callbacks=[Rates()])
    for low, high in rates:
        assert low == pytest.approx(high / 100)
    assert max(high for _, high in rates) == pytest.approx(0.1, rel=0.05)
    rates.clear()
    fit_own(squares, model=model, optimizer=optimizer, callbacks=[Rates()])
    assert max(high for _, high in rates) == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test": None}, "train and test belong together"),
        (
            {"model": own_network(5)},
            r"give logits \(2, 3\) for 2 images and 3 classes, got \(2, 5\)",
        ),
        ({"model": nn.Linear(4, 3)}, r"cannot classify images of shape \(2, 3, 16, 16\)"),
        ({"model": nn.Identity()}, r"got \(2, 3, 16, 16\)"),
        ({"optimizer": torch.optim.SGD(own_network().parameters())}, "not of the model"),
        ({"transform": lambda image: torch.full((3, 16, 16), 1.5)}, "leave out Normalize"),
        (
            {"transform": lambda image: image.resize((8, 8))},
            r"must give \(3, 16, 16\).*got \(3, 8, 8\)",
        ),
    ],
)
def test_own_things_that_do_not_fit_are_refused(
    squares: ImageData, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        fit_own(squares, **options)


def test_data_and_train_are_not_both_given(squares: ImageData) -> None:
    with pytest.raises(InputError, match="not both"):
        fit_own(squares, data=squares)


@pytest.mark.parametrize(
    ("name", "message"),
    [("data", "give train and test"), ("model", "give model"), ("optimizer", "give it")],
)
def test_a_recipe_of_own_things_asks_for_them(
    squares: ImageData, tiny_config: TrainConfig, name: str, message: str
) -> None:
    config = dataclasses.replace(tiny_config, **{name: "custom"})
    with pytest.raises(InputError, match=message):
        fit(config, data=None if name == "data" else squares)


def test_images_that_are_not_square_are_refused(squares: ImageData) -> None:
    images, labels = squares.train.images[:, :12], squares.train.labels
    with pytest.raises(InputError, match="must be square, got 12 x 16"):
        fit_own(squares, train=(images, labels), test=(images, labels))


class Narrow(nn.Module):
    """A network that has no memory for more than `most` images at a time."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.seen: list[int] = []
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16 * 16 * 3, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            if len(images) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            self.seen.append(len(images))
        logits: torch.Tensor = self.layers(images)
        return logits


def test_a_batch_without_memory_goes_in_parts_and_gives_the_same_weights(
    squares: ImageData, tiny_config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = dataclasses.replace(tiny_config, batch_size=40, precision="fp32")

    def train(most: int) -> Run:
        with use_seed(0):
            model = Narrow(most)
        return fit(config, model=model, data=squares, device="cpu")

    whole, parts = train(1000), train(11)
    warnings = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert len(warnings) == 2  # halves do not fit either, quarters do
    assert "batches of 40 images go through the network in 4 parts" in warnings[-1]
    assert set(parts.model.seen) == {10}  # type: ignore[arg-type]
    for first, second in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    for row, other in zip(whole.history, parts.history, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert row["train_accuracy"] == other["train_accuracy"]


def test_no_memory_for_a_single_image_names_batch_and_device(
    squares: ImageData, tiny_config: TrainConfig
) -> None:
    with pytest.raises(TrainingError, match=r"out of memory on cpu with batches of 32 images"):
        fit(tiny_config, model=Narrow(0), data=squares, device="cpu")

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from labkit.runtime import (
    InputError,
    World,
    deferred_interrupt,
    gpu_advice,
    pick_device,
    resolve_precision,
    scoped_seed,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_auto_precision_on_a_cpu_is_fp32() -> None:
    assert resolve_precision("auto", CPU).name == "fp32"


@pytest.mark.parametrize(("capability", "name"), [((7, 5), "fp16"), ((8, 0), "bf16")])
def test_auto_precision_on_a_gpu_follows_its_capability(
    capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    precision = resolve_precision("auto", GPU)
    assert precision.name == name
    assert precision.scale_loss == (name == "fp16")


def test_a_gpu_that_is_not_there_is_refused_with_the_menu_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="Change runtime type"):
        pick_device("cuda")
    assert "Change runtime type" in gpu_advice(CPU)


def test_a_scoped_seed_repeats_and_leaves_every_generator_as_found() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with scoped_seed(7):
        first = draw()
    with pytest.raises(KeyError), scoped_seed(7):
        assert draw() == first
        raise KeyError
    assert draw() == expected


def test_an_interrupt_is_held_back_until_asked_for() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with deferred_interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            interrupt.raise_if_requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_peak_memory_is_that_of_this_process_and_grows_by_what_it_held() -> None:
    code = (
        "import torch; from labkit.runtime import peak_memory_gib as peak;"
        "cpu = torch.device('cpu'); before = peak(cpu); torch.ones(2**27); print(before, peak(cpu))"
    )
    held = torch.ones(2**28)  # 1 GiB here must not count there
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    before, after = map(float, done.stdout.split())
    assert held.numel() == 2**28 and 0.05 < before < 1
    assert after - before == pytest.approx(0.5, abs=0.05)


def test_the_world_is_what_torchrun_announces(monkeypatch: pytest.MonkeyPatch) -> None:
    assert World.from_environment() == World(0, 1, 0)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    world = World.from_environment()
    assert world == World(3, 4, 1) and not world.leads

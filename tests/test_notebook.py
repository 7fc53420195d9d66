from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch

from labkit.classify.config import PRESETS
from labkit.classify.data import ImageData
from labkit.notebook import (
    advise_gpu,
    describe_untrained,
    make_config,
    mount_drive,
    show_augmentations,
)
from labkit.runtime import InputError


def test_without_a_gpu_the_advice_names_the_menu_path() -> None:
    assert "Change runtime type" in advise_gpu(torch.device("cpu"))


def test_the_drive_is_refused_outside_colab() -> None:
    with pytest.raises(InputError, match="use_drive = False"):
        mount_drive("runs/a")


def test_the_drive_is_mounted_in_colab(monkeypatch: pytest.MonkeyPatch) -> None:
    mounted: list[str] = []
    colab = types.ModuleType("google.colab")
    colab.drive = types.SimpleNamespace(mount=mounted.append)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    assert mount_drive("runs/a") == Path("/content/drive/MyDrive/labkit/runs/a")
    assert mounted == ["/content/drive"]


def test_the_demo_profile_never_asks_for_real_data() -> None:
    config = make_config("vit", profile="demo", epochs=2, seed=4)
    assert (config.data, config.epochs, config.seed) == ("scenes", 2, 4)


def test_the_full_profile_is_the_preset_itself() -> None:
    assert make_config("vit", profile="full") == PRESETS["vit"]
    with pytest.raises(InputError, match="profile"):
        make_config("vit", profile="half")


def scenes(count: int) -> ImageData:
    from labkit.scenes import make_classification_scenes

    train, test = (make_classification_scenes(count, seed=seed) for seed in (0, 1))
    return ImageData.from_splits(train, test)


def test_the_cells_of_the_notebook_get_their_line_and_their_figure() -> None:
    data, config = scenes(1200), make_config("vit", profile="demo")
    line = describe_untrained(data, config, "cpu")
    assert line.endswith("of 1,000 images right") and "parameters, untrained" in line
    assert len(show_augmentations(data, config).axes[0].images) == 6 * 7

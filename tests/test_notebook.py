from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from labkit.classify.config import PRESETS
from labkit.classify.data import ImageData
from labkit.notebook import (
    advise_gpu,
    describe_untrained,
    load_own_image,
    make_config,
    mount_drive,
    name_run,
    prepare_training,
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


def test_own_data_and_their_size_reach_the_recipe_and_the_name_of_the_run() -> None:
    config = make_config("vit", profile="full", data="photos/birds", image_size=48)
    assert (config.data, config.image_size) == ("photos/birds", 48)
    assert name_run(config) == "vit-birds-48px-seed0"
    assert name_run(make_config("vit", profile="demo", seed=2)) == "demo-seed2"
    with pytest.raises(InputError, match="image_size must be at least 1, got -3"):
        make_config("vit", profile="full", image_size=-3)


@pytest.mark.parametrize("changes", [{"data": "photos"}, {"image_size": 48}])
def test_the_demo_profile_refuses_other_data_instead_of_forgetting_them(
    changes: dict[str, Any],
) -> None:
    with pytest.raises(InputError, match="choose profile='full'"):
        make_config("vit", profile="demo", **changes)


def scenes(count: int) -> ImageData:
    from labkit.scenes import make_classification_scenes

    train, test = (make_classification_scenes(count, seed=seed) for seed in (0, 1))
    return ImageData.from_splits(train, test)


def test_the_cells_of_the_notebook_get_their_line_and_their_figure() -> None:
    data, config = scenes(1200), make_config("vit", profile="demo")
    line = describe_untrained(data, config, "cpu")
    assert line.endswith("of 1,000 images right") and "parameters, untrained" in line
    assert len(show_augmentations(data, config).axes[0].images) == 6 * 7


def test_the_training_step_of_the_notebook_lowers_the_loss() -> None:
    data, config = scenes(400), make_config("vit", profile="demo")
    loader, model, optimizer, scaler, precision = prepare_training(data, config, "cpu")
    assert model.training and len(loader) == 400
    losses = []
    for _ in range(8):
        images, targets = loader.batch(0, torch.arange(128))
        with precision.autocast(torch.device("cpu")):
            loss = torch.nn.functional.cross_entropy(model(images), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(10)) < 0.3
    assert losses[-1] < losses[0] - 0.02


def test_the_image_to_classify_is_the_one_that_is_named_or_the_first_of_the_test_split(
    tmp_path: Path,
) -> None:
    from PIL import Image

    data = scenes(10)
    np.testing.assert_array_equal(load_own_image("", data), data.test.images[0])
    Image.fromarray(data.train.images[3]).save(tmp_path / "own.png")
    np.testing.assert_array_equal(
        load_own_image(str(tmp_path / "own.png"), data), data.train.images[3]
    )
    with pytest.raises(InputError, match="only Colab can upload"):
        load_own_image("upload", data)


def test_an_image_is_uploaded_in_colab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    data, path = scenes(10), tmp_path / "own.png"
    Image.fromarray(data.train.images[3]).save(path)
    uploads = [{"own.png": path.read_bytes()}, {}]
    colab = types.ModuleType("google.colab")
    colab.files = types.SimpleNamespace(upload=lambda: uploads.pop(0))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    np.testing.assert_array_equal(load_own_image("upload", data), data.train.images[3])
    with pytest.raises(InputError, match="nothing was uploaded"):
        load_own_image("upload", data)

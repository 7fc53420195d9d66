from __future__ import annotations

import json
import re
from typing import Any

import pytest

from labkit.classify.config import (
    PRESETS,
    AugmentConfig,
    TrainConfig,
    change_settings,
    get_preset,
    list_presets,
)
from labkit.runtime import InputError


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name: str) -> None:
    config = PRESETS[name]
    assert config.preset == name
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_the_seed_preset_is_the_labs_table() -> None:
    config = PRESETS["seed-resnet18"]
    assert (config.model, config.epochs, config.batch_size) == ("resnet18", 40, 256)
    assert (config.optimizer, config.learning_rate, config.weight_decay) == ("adamw", 1e-3, 1e-2)
    assert (config.schedule, config.warmup, config.decay_all) == ("cosine", 0, True)
    assert config.augment == AugmentConfig(pad=4, pad_mode="zero", flip="random")
    assert config.mean == config.std == (0.5, 0.5, 0.5)


def test_an_unknown_preset_gets_the_nearest_name() -> None:
    with pytest.raises(InputError, match="did you mean 'seed-resnet18'"):
        get_preset("seed-resnet")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"label_smoothing": 1.5}, "label_smoothing must be between 0 and 1"),
        ({"optimizer": "lion"}, "optimizer must be one of adamw, sgd, muon"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"warmup": 1.5}, "warmup must be between 0 and 1"),
        ({"final_lr": -0.1}, "final_lr must be between 0 and 1"),
        ({"layer_decay": 0.0}, "layer_decay must be above 0 and at most 1"),
        ({"stem_bias_until": 2.0}, "stem_bias_until must be between 0 and 1"),
        ({"lookahead": -1}, "lookahead must be at least 0"),
        ({"lookahead": 5, "ema_decay": 0.9}, "both average the weights"),
        ({"tta": "crop"}, "tta must be one of flip, flip-shift, got 'crop'"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite"),
        ({"weight_decay": float("inf")}, "weight_decay must be at least 0, got inf"),
        ({"std": (0.0, 1.0, 1.0)}, "std must be positive"),
    ],
)
def test_a_setting_out_of_range_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        get_preset("seed-resnet18", **changes)


def test_augmentation_settings_are_checked_too() -> None:
    with pytest.raises(InputError, match="erase must be between 0 and 1"):
        AugmentConfig(erase=2)
    with pytest.raises(InputError, match="flip must be one of"):
        AugmentConfig(flip="diagonal")  # type: ignore[arg-type]


def test_unknown_keys_of_a_saved_configuration_are_named() -> None:
    with pytest.raises(InputError, match="colour"):
        TrainConfig.from_json({"colour": 1})


def test_presets_are_listed_by_name() -> None:
    assert list_presets() == list(PRESETS) and "vit" in list_presets()


OLD_RUN = {
    "preset": "vit",
    "model": "vit",
    "model_options": {"patch": 2, "width": 64, "heads": 4, "drop_path": 0.1, "depth": 3},
    "augment": {"pad": 4, "policy": "trivial"},
    "hold_out": 500,
    "mean": [0.4914, 0.4822, 0.4465],
}


def test_the_configuration_of_an_older_run_is_read_under_its_new_names() -> None:
    config = TrainConfig.from_json(OLD_RUN)
    assert config.val_size == 500
    assert config.augment == AugmentConfig(pad=4, auto_augment="trivial")
    assert config.model_options == {
        "patch_size": 2,
        "embed_dim": 64,
        "num_heads": 4,
        "drop_path_rate": 0.1,
        "depth": 3,
    }
    assert TrainConfig.from_json(config.to_json()) == config


def test_unknown_keys_of_a_saved_augmentation_are_named() -> None:
    with pytest.raises(InputError, match="hue"):
        TrainConfig.from_json({"augment": {"hue": 1}})


def test_a_warm_up_that_was_saved_as_epochs_becomes_a_share_of_the_run() -> None:
    config = TrainConfig.from_json({"epochs": 80, "warmup_epochs": 16})
    assert (config.epochs, config.warmup) == (80, 0.2)
    assert TrainConfig.from_json({"warmup_epochs": 4}).warmup == 0.1  # of 40, the default


def test_settings_are_changed_by_their_texts() -> None:
    texts = ["label_smoothing=0.2", "batch_size=64", "compile=True", "schedule=triangle"]
    texts += ["mean=0.5,0.5,0.4", "augment.cutmix=0", "augment.flip=none"]
    texts += ["model_options.depth=6", "model_options.mimetic=False", "model_options.pool=cls"]
    config = change_settings(PRESETS["vit"], texts)
    assert (config.label_smoothing, config.batch_size, config.compile) == (0.2, 64, True)
    assert (config.schedule, config.mean) == ("triangle", (0.5, 0.5, 0.4))
    assert (config.augment.cutmix, config.augment.flip, config.augment.erase) == (0.0, "none", 0.1)
    options = {**PRESETS["vit"].model_options, "depth": 6, "mimetic": False, "pool": "cls"}
    assert config.model_options == options
    assert change_settings(config, ()) == config
    for text in ("8,16,16", "[8, 16, 16]"):
        narrow = change_settings(PRESETS["speed"], [f"model_options.widths={text}"])
        assert narrow.model_options == {"widths": [8, 16, 16]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs", "must be NAME=VALUE, such as label_smoothing=0.1, got 'epochs'"),
        ("=3", "must be NAME=VALUE"),
        ("epoch=3", "setting 'epoch' is unknown; did you mean 'epochs'"),
        ("augment.cutmx=1", "did you mean 'cutmix'"),
        ("epochs=2.5", "epochs must be a whole number, got '2.5'"),
        ("epochs=0", "epochs must be at least 1, got 0"),
        ("warmup=2", "warmup must be between 0 and 1, got 2.0"),
        ("momentum=high", "momentum must be a number, got 'high'"),
        ("compile=maybe", "compile must be true or false, got 'maybe'"),
        ("std=1,2", "std must be three numbers, separated by commas, got '1,2'"),
        ("schedule=flat", "schedule must be one of cosine, one-cycle, triangle, got 'flat'"),
        ("augment.erase=7", "erase must be between 0 and 1, got 7.0"),
        ("augment=strong", "augment has settings of its own: name one, such as augment.cutmix"),
        ("model_options={}", "name one, such as model_options.depth=6"),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        change_settings(PRESETS["vit"], [text])
    assert "\n" not in str(caught.value)

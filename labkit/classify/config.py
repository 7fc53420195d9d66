"""What a training run is: `TrainConfig`, and the presets that fill it in."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

import numpy as np

from labkit.runtime import InputError, PrecisionName, as_one_line

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


_OLD_NAMES: Mapping[str, Mapping[str, str]] = {
    "config": {"hold_out": "val_size"},
    "augment": {"policy": "auto_augment"},
    "vit": {
        "patch": "patch_size",
        "width": "embed_dim",
        "heads": "num_heads",
        "drop_path": "drop_path_rate",
    },
}
"""What settings were called when runs of earlier versions were saved."""


MAX_INTEGER = 2**63 - 1  # what torch and the files of a run can hold
MAX_SIZE = 8192  # pixels
Numbers = tuple[float, float, float]
KINDS: Mapping[Any, tuple[str, Callable[[Any], bool], Callable[[Any], Any]]] = {
    bool: ("true or false", lambda value: isinstance(value, bool | np.bool_), bool),
    int: ("a whole number", lambda value: _is_number(value, numbers.Integral), int),
    float: ("a number", lambda value: _is_number(value, numbers.Real), lambda value: value),
    str: ("a text", lambda value: isinstance(value, str), str),
    Numbers: (
        "three numbers",
        lambda value: (
            isinstance(value, Sequence)
            and len(value) == 3
            and all(_is_number(part, numbers.Real) and math.isfinite(part) for part in value)
        ),
        tuple,
    ),
    Mapping[str, Any]: ("a dictionary of plain values", lambda value: _is_plain(value), dict),
}
"""Of each type of a field: what it is called, whether a value is one, and what is kept of it."""


def _is_number(value: object, kind: type) -> bool:
    """Whether a value, also one of NumPy, is a number of this kind that 64 bits can hold."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, kind):
        return False
    return not isinstance(value, numbers.Integral) or abs(int(value)) <= MAX_INTEGER


def _is_plain(value: object) -> bool:
    try:
        return isinstance(value, Mapping) and bool(json.dumps(dict(value)))
    except (TypeError, ValueError, RecursionError):
        return False


def _check_fields(config: object) -> None:
    """Raise InputError unless every field of a configuration is of its type, or among its choices.

    Numbers of NumPy become those of Python.
    """
    for name, hint in get_type_hints(type(config)).items():
        choices, value = get_args(hint), getattr(config, name)
        if hint in KINDS:
            kind, is_one, convert = KINDS[hint]
            if not is_one(value):
                raise InputError(f"{name} must be {kind}, got {as_one_line(repr(value))}")
            if type(value) is not hint:
                value = value.item() if isinstance(value, np.generic) else convert(value)
                object.__setattr__(config, name, value)
        elif isinstance(hint, type):
            if not isinstance(value, hint):
                got = as_one_line(repr(value))
                raise InputError(f"{name} must be of {hint.__name__}, got {got}")
        elif value not in choices:
            raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    if not low <= value <= high or value == float("inf"):
        limit = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
        raise InputError(f"{name} must be {limit}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How a training image is varied; each step is off at its default.

    Attributes:
        pad: pixels added on every side before a random crop of the original size.
        pad_mode: what the added pixels show: black (`zero`), or the image mirrored (`reflect`).
        flip: mirror left-right at random, or in alternate epochs after a random first one.
        auto_augment: TrivialAugmentWide, or RandAugment with 2 operations of magnitude 9.
        erase: probability of setting a rectangle to 0 (random erasing).
        cutout: side in pixels of a square that is set to 0 in every image (0: none).
        mixup: alpha of the Beta distribution of mixup weights (0: off).
        cutmix: alpha of the Beta distribution of CutMix areas (0: off).
        mix_until: fraction of the epochs after which mixup and CutMix stop.

    Raises:
        InputError: a setting is out of range.

    Example:
        >>> AugmentConfig(pad=4, flip="random").cutout
        0
    """

    pad: int = 0
    pad_mode: Literal["zero", "reflect"] = "zero"
    flip: Literal["none", "random", "alternating"] = "none"
    auto_augment: Literal["none", "trivial", "rand"] = "none"
    erase: float = 0.0
    cutout: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_until: float = 1.0

    def __post_init__(self) -> None:
        _check_fields(self)
        for name in ("pad", "cutout", "mixup", "cutmix"):
            _check_range(name, getattr(self, name), 0)
        for name in ("pad", "cutout"):
            _check_range(name, getattr(self, name), 0, MAX_SIZE)
        _check_range("erase", self.erase, 0, 1)
        _check_range("mix_until", self.mix_until, 0, 1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides how a model is trained; two runs of equal configuration are equal.

    Attributes:
        preset: name of the recipe this configuration began as.
        data: where the images come from (see `labkit.load_data`); `custom` for your own.
        image_size: height and width in pixels to which images are cropped and resized; the scenes
            are always of 32.
        model: a name that `labkit.create_model` knows; `custom` for your own network.
        model_options: further arguments of `labkit.create_model`.
        epochs: how often training shows every training image.
        batch_size: images per optimiser step, over all processes together.
        optimizer: AdamW, SGD with Nesterov momentum, or Muon; `custom` for your own.
        learning_rate: peak of the schedule.
        weight_decay: decay of the weights of linear and convolutional layers.
        momentum: momentum of SGD.
        decay_all: decay norms and biases too, as plain `AdamW(model.parameters())` does.
        norm_bias_lr_scale: factor on the learning rate of BatchNorm biases.
        layer_decay: factor on the learning rate from each block of a pretrained ViT to the block
            before it, in (0, 1]: the first blocks change least (Clark 2020, arXiv 2003.10555).
        stem_bias_until: share of the run after which the bias of the first convolution stays as it
            is, in [0, 1].
        schedule: shape of the learning rate over the run (see `labkit.classify.optim.lr_factor`).
        warmup: share of the run in which the learning rate rises to its peak, in [0, 1]. A share
            keeps the shape of the schedule at any number of epochs.
        final_lr: share of the peak at which the schedule `triangle` ends, in [0, 1].
        cycle_momentum: let the momentum (of AdamW, beta 1) of the schedule `one-cycle` fall from
            0.95 to 0.85 while the learning rate rises, and rise again while it falls.
        schedule_per: the schedule moves with every step, or stays constant within an epoch.
        ema_decay: decay per step of the averaged weights that are evaluated (0: off).
        lookahead: number of steps after which averaged weights replace those that are trained
            (0: off; see `labkit.classify.optim.Lookahead`).
        label_smoothing: share of the target spread evenly over all classes, in [0, 1].
        clip_norm: largest norm of the gradient (0: no clipping).
        augment: how training images are varied.
        tta: views that are averaged for the accuracy with test-time augmentation: the image and
            its mirror image (`flip`), or both also shifted by a pixel up-left and down-right
            (`flip-shift`; Jordan 2024).
        precision: arithmetic of the forward passes (see `labkit.runtime.resolve_precision`).
        compile: use `torch.compile` where this machine can.
        deterministic: make two runs equal bit for bit on a GPU too, at some cost in speed; on a
            CPU they are (see `labkit.runtime.use_backends`).
        sync_batch_norm: with several GPUs, BatchNorm takes mean and variance of the whole batch,
            as on one GPU, and GPUs wait for each other in each such layer; otherwise each GPU
            takes those of its share. It makes no difference to a single process.
        val_size: number of training images in the validation split; when there are any, the epoch
            of best validation accuracy counts, otherwise the last one.
        seed: random seed.
        mean: channel means of the normalisation, in [0, 1].
        std: channel deviations of the normalisation.

    Raises:
        InputError: a setting is out of range.

    Example:
        >>> TrainConfig(model="vit", epochs=3).batch_size
        256
    """

    preset: str = "custom"
    data: str = "hub"
    image_size: int = 32
    model: str = "resnet18"
    model_options: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 40
    batch_size: int = 256
    optimizer: Literal["adamw", "sgd", "muon", "custom"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    momentum: float = 0.9
    decay_all: bool = False
    norm_bias_lr_scale: float = 1.0
    layer_decay: float = 1.0
    stem_bias_until: float = 1.0
    schedule: Literal["cosine", "one-cycle", "triangle"] = "cosine"
    schedule_per: Literal["step", "epoch"] = "step"
    warmup: float = 0.0
    final_lr: float = 0.0
    cycle_momentum: bool = False
    label_smoothing: float = 0.0
    clip_norm: float = 0.0
    ema_decay: float = 0.0
    lookahead: int = 0
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    tta: Literal["flip", "flip-shift"] = "flip"
    precision: PrecisionName = "auto"
    compile: bool = False
    deterministic: bool = False
    sync_batch_norm: bool = False
    val_size: int = 0
    seed: int = 0
    mean: Numbers = CIFAR10_MEAN
    std: Numbers = CIFAR10_STD

    def __post_init__(self) -> None:
        _check_fields(self)
        for name in ("epochs", "batch_size", "image_size"):
            _check_range(name, getattr(self, name), 1)
        _check_range("image_size", self.image_size, 1, MAX_SIZE)
        for name in (
            "weight_decay",
            "clip_norm",
            "val_size",
            "norm_bias_lr_scale",
            "seed",
            "lookahead",
        ):
            _check_range(name, getattr(self, name), 0)
        for name in ("momentum", "label_smoothing", "ema_decay", "warmup", "final_lr"):
            _check_range(name, getattr(self, name), 0, 1)
        _check_range("stem_bias_until", self.stem_bias_until, 0, 1)
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"layer_decay must be above 0 and at most 1, got {self.layer_decay!r}")
        if self.ema_decay and self.lookahead:
            raise InputError(
                "ema_decay and lookahead both average the weights: set one of them to 0"
            )
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(
                f"learning_rate must be positive and finite, got {self.learning_rate!r}"
            )
        if min(self.std) <= 0:
            raise InputError(f"std must be positive in every channel, got {self.std!r}")

    def to_json(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> TrainConfig:
        """The configuration that `to_json` described, also in an earlier version of labkit.

        Raises:
            InputError: a setting is unknown to this version of labkit, or out of range.
        """
        if not isinstance(plain, Mapping):
            raise InputError(f"a configuration must be an object of settings, got {plain!r:.60}")
        values = _rename(plain, "config")
        if "warmup_epochs" in values:  # it counted epochs once
            values["warmup"] = values.pop("warmup_epochs") / values.get("epochs", cls.epochs)
        if "augment" in values:
            values["augment"] = _rename(values["augment"], "augment")
        if values.get("model") == "vit":
            values["model_options"] = _rename(values.get("model_options", {}), "vit")
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        unknown |= set(values.get("augment", ())) - {
            field.name for field in dataclasses.fields(AugmentConfig)
        }
        if unknown:
            raise InputError(
                f"settings {sorted(unknown)} are unknown to this version of labkit; "
                "use the version that wrote the run, or start a new one"
            )
        for name in ("mean", "std"):
            if name in values:
                values[name] = tuple(values[name])
        if "augment" in values:
            values["augment"] = AugmentConfig(**values["augment"])
        return cls(**values)


def _rename(settings: Mapping[str, Any], table: str) -> dict[str, Any]:
    return {_OLD_NAMES[table].get(name, name): value for name, value in settings.items()}


_CROP_FLIP = AugmentConfig(pad=4, flip="random")
_STRONG = AugmentConfig(pad=4, flip="random", auto_augment="trivial", erase=0.1, cutmix=1.0)

# airbench94 (Jordan 2024, arXiv 2404.00498), its rates turned from summed to mean loss.
_SPEED = TrainConfig(
    preset="speed",
    model="speed",
    epochs=10,
    batch_size=1024,
    optimizer="sgd",
    learning_rate=1.5,
    weight_decay=1.33e-3,
    momentum=0.85,
    norm_bias_lr_scale=64.0,
    stem_bias_until=0.3,
    schedule="triangle",
    warmup=0.23,
    final_lr=0.07,
    label_smoothing=0.2,
    lookahead=5,
    tta="flip-shift",
    augment=AugmentConfig(pad=2, pad_mode="reflect", flip="alternating"),
)

PRESETS: Mapping[str, TrainConfig] = {
    config.preset: config
    for config in (
        # The lab's own recipe, to the letter: decay on everything, a learning rate per epoch.
        TrainConfig(
            preset="seed-resnet18",
            model="resnet18",
            epochs=40,
            batch_size=256,
            optimizer="adamw",
            learning_rate=1e-3,
            weight_decay=1e-2,
            decay_all=True,
            schedule="cosine",
            schedule_per="epoch",
            augment=_CROP_FLIP,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        TrainConfig(
            preset="resnet18",
            model="resnet18-3x3",
            epochs=80,
            batch_size=512,
            optimizer="sgd",
            learning_rate=0.2,
            weight_decay=5e-4,
            schedule="triangle",
            warmup=0.2,
            label_smoothing=0.1,
            augment=AugmentConfig(pad=4, pad_mode="reflect", flip="alternating", cutout=8),
        ),
        # The textbook Vision Transformer, at the size of ViT-CIFAR.
        TrainConfig(
            preset="vit-classic",
            model="vit",
            model_options={
                "patch_size": 4,
                "embed_dim": 384,
                "depth": 7,
                "num_heads": 12,
                "mlp_ratio": 1.0,
            },
            epochs=200,
            batch_size=128,
            learning_rate=1e-3,
            weight_decay=5e-2,
            warmup=0.025,
            label_smoothing=0.1,
            augment=AugmentConfig(pad=4, flip="random", auto_augment="trivial"),
        ),
        # What a T4 can afford in a lesson: 64 tokens that a stem of convolutions makes, as in CCT
        # (Hassani et al. 2021, arXiv 2104.05704).
        TrainConfig(
            preset="vit",
            model="vit",
            model_options={
                "patch_size": 4,
                "tokens": "stem",
                "embed_dim": 256,
                "depth": 7,
                "num_heads": 8,
                "mlp_ratio": 2.0,
                "pool": "mean",
                "relative_bias": True,
                "mimetic": True,
                "drop_path_rate": 0.1,
            },
            epochs=200,
            batch_size=256,
            learning_rate=1e-3,
            weight_decay=5e-2,
            schedule="one-cycle",
            warmup=0.1,
            label_smoothing=0.1,
            clip_norm=1.0,
            ema_decay=0.999,
            augment=dataclasses.replace(_STRONG, mix_until=0.7),
        ),
        # The best public recipe of the lab for a ViT from scratch (96.9 %), to the letter.
        TrainConfig(
            preset="vit-long",
            model="vit",
            model_options={
                "patch_size": 2,
                "tokens": "conv",
                "embed_dim": 256,
                "depth": 8,
                "num_heads": 8,
                "pool": "mean",
                "relative_bias": True,
                "head_dropout": 0.3,
            },
            epochs=200,
            batch_size=32,
            learning_rate=1e-3,
            weight_decay=0.1,
            schedule="one-cycle",
            warmup=0.3,
            cycle_momentum=True,
            label_smoothing=0.1,
            augment=_STRONG,
        ),
        # A ViT for two CPU cores and an evening.
        TrainConfig(
            preset="vit-nano",
            model="vit",
            model_options={
                "patch_size": 4,
                "tokens": "stem",
                "embed_dim": 128,
                "depth": 6,
                "num_heads": 2,
                "mlp_ratio": 2.0,
                "pool": "mean",
                "relative_bias": True,
                "mimetic": True,
            },
            epochs=60,
            batch_size=128,
            optimizer="muon",
            learning_rate=2e-3,
            weight_decay=5e-2,
            schedule="one-cycle",
            warmup=0.15,
            label_smoothing=0.1,
            clip_norm=1.0,
            ema_decay=0.999,
            augment=AugmentConfig(pad=4, flip="random", auto_augment="trivial"),
        ),
        # ImageNet-21k weights at 224 pixels; a few epochs are enough.
        TrainConfig(
            preset="vit-finetune",
            model="vit-finetune",
            model_options={"crop_scale": 0.8},
            epochs=5,
            batch_size=128,
            learning_rate=3e-4,
            layer_decay=0.75,
            weight_decay=5e-2,
            warmup=0.1,
            label_smoothing=0.1,
            clip_norm=1.0,
            ema_decay=0.999,
            augment=AugmentConfig(flip="random"),
        ),
        _SPEED,
        # The same with half of the channels, for a CPU: a quarter of the work an image.
        dataclasses.replace(
            _SPEED,
            preset="speed-narrow",
            model_options={"widths": [32, 128, 128]},
            epochs=5,
        ),
        # What the notebook trains on the embedded scenes: a small ViT, minutes on two CPU cores.
        TrainConfig(
            preset="demo",
            data="scenes",
            model="vit",
            model_options={
                "patch_size": 4,
                "tokens": "conv",
                "embed_dim": 96,
                "depth": 4,
                "num_heads": 4,
                "pool": "mean",
                "relative_bias": True,
                "mimetic": True,
            },
            epochs=6,
            batch_size=128,
            learning_rate=2e-3,
            weight_decay=5e-2,
            schedule="one-cycle",
            warmup=1 / 3,
            clip_norm=1.0,
            val_size=1000,
            augment=_CROP_FLIP,
        ),
    )
}


def list_presets() -> list[str]:
    """The names of the recipes that `get_preset` knows.

    Example:
        >>> "seed-resnet18" in list_presets()
        True
    """
    return list(PRESETS)


def get_preset(name: str, **changes: Any) -> TrainConfig:
    """The recipe called `name`, with `changes` to single fields of `TrainConfig`.

    Raises:
        InputError: there is no such preset, or a change is out of range.

    Example:
        >>> config = get_preset("vit", epochs=20)
        >>> config.model, config.epochs
        ('vit', 20)
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(f"preset {name!r} is unknown; {hint}there are: {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)


def change_settings(config: TrainConfig, changes: Iterable[str]) -> TrainConfig:
    """`config` with the changes that texts such as `batch_size=64` describe.

    Args:
        config: the recipe to begin with.
        changes: each `NAME=VALUE`, where NAME is a field of `TrainConfig`, `augment.` and a field
            of `AugmentConfig`, or `model_options.` and an option of the network. Several numbers
            are separated by commas.

    Raises:
        InputError: a text has another form, a name is unknown, or a value is out of range.

    Example:
        >>> texts = ["epochs=3", "augment.cutmix=1.0", "model_options.depth=6"]
        >>> config = change_settings(get_preset("vit"), texts)
        >>> config.epochs, config.augment.cutmix, config.model_options["depth"]
        (3, 1.0, 6)
    """
    for change in changes:
        name, equals, text = change.partition("=")
        if not name or not equals:
            raise InputError(
                f"a setting must be NAME=VALUE, such as label_smoothing=0.1, got {change!r}"
            )
        group, _, option = name.partition(".")
        if group == "augment" and option:
            value = _parse_setting(AugmentConfig, option, text)
            augment = dataclasses.replace(config.augment, **{option: value})
            config = dataclasses.replace(config, augment=augment)
        elif group == "model_options" and option:
            options = {**config.model_options, option: _parse_option(text)}
            config = dataclasses.replace(config, model_options=options)
        else:
            value = _parse_setting(TrainConfig, name, text)
            config = dataclasses.replace(config, **{name: value})
    return config


def _parse_setting(owner: type, name: str, text: str) -> Any:
    """`text` as a value of the field `name` of `owner`."""
    hints = get_type_hints(owner)
    if name not in hints:
        close = difflib.get_close_matches(name, hints, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(f"setting {name!r} is unknown; {hint}there are: {', '.join(hints)}")
    hint = hints[name]
    parsers: dict[Any, tuple[Any, str]] = {
        int: (int, "a whole number"),
        float: (float, "a number"),
        bool: ({"true": True, "false": False}.__getitem__, "true or false"),
        Numbers: (_parse_triple, "three numbers, separated by commas"),
    }
    if hint in (AugmentConfig, Mapping[str, Any]):
        example = "augment.cutmix=1.0" if name == "augment" else "model_options.depth=6"
        raise InputError(f"{name} has settings of its own: name one, such as {example}")
    parse, kind = parsers.get(hint, (str, "a text"))
    try:
        return parse(text.strip().lower() if hint is bool else text)
    except (ValueError, KeyError) as error:
        raise InputError(f"{name} must be {kind}, got {text!r}") from error


def _parse_triple(text: str) -> tuple[float, float, float]:
    red, green, blue = map(float, text.split(","))
    return red, green, blue


def _parse_option(text: str) -> Any:
    """`text` as JSON has it, or numbers with commas between them; else the text itself."""
    lowered = text.lower() if text.lower() in ("true", "false") else text
    for candidate in (lowered, f"[{text}]"):
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(candidate)
    return text

"""The lab's claims put to the test: one ingredient at a time, over several random seeds.

A claim says what an ingredient of a recipe brings. Two configurations that differ in nothing but
this ingredient are trained with the same random seeds; the difference of each pair, its mean and
its 95 % interval decide. Accuracies are those of the validation split after the last epoch: the
test split is there for results, not for choices.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.optim import Optimizer

from labkit import viz
from labkit.classify.checkpoint import CONFIG, METRICS
from labkit.classify.config import AugmentConfig, TrainConfig, get_preset
from labkit.classify.data import ImageData, load_data
from labkit.classify.fit import fit
from labkit.classify.optim import make_optimizer
from labkit.classify.run import read_history
from labkit.files import open_atomic, write_json
from labkit.runtime import InputError, describe_device, get_versions, pick_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

Measure = Literal["accuracy", "speed"]
History = Sequence[Mapping[str, float]]

CONFIDENCE = 0.95
CPU_EPOCHS = 3
VAL_SIZE = 5000
RESULT = "ablate.json"
_NEUTRAL: Mapping[Measure, float] = {"accuracy": 0.0, "speed": 1.0}
_UNITS: Mapping[Measure, str] = {"accuracy": "points", "speed": "times"}
_CHANNELS = (64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What an ingredient is said to bring.

    Attributes:
        name: short name; it is part of the names of the run folders.
        text: the claim in words.
        without: changes to the base configuration that take the ingredient out.
        included: changes that put it in; none where the base has it.
        claimed: what it is said to bring, in percentage points of accuracy or as a ratio of
            speeds; None for an effect of no stated size.
        measure: whether accuracy or speed is compared.
        constant_rate: whether the run without the ingredient has no schedule: its learning rate
            stays at `learning_rate` in every step.

    Example:
        >>> Claim(name="flip", text="flips help", without={"augment": AugmentConfig()}).claimed
    """

    name: str
    text: str
    without: Mapping[str, Any]
    included: Mapping[str, Any] = field(default_factory=dict)
    claimed: float | None = None
    measure: Measure = "accuracy"
    constant_rate: bool = False


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What was measured of a claim.

    Attributes:
        claim: the claim.
        values: what the ingredient brought with each random seed: percentage points of accuracy,
            or the ratio of speeds.
        mean: mean of `values`, for ratios the geometric one.
        interval: 95 % interval of the mean; None with fewer than two random seeds.
        verdict: see `judge`.
    """

    claim: Claim
    values: tuple[float, ...]
    mean: float
    interval: tuple[float, float] | None
    verdict: str

    def describe(self) -> str:
        """The claim, what was measured of it, and the verdict, in one line."""
        unit = _UNITS[self.claim.measure]
        span = "no interval"
        if self.interval is not None:
            span = f"95 % interval {self.interval[0]:.2f} to {self.interval[1]:.2f}"
        return (
            f"{self.claim.text}: {self.verdict} ({self.mean:.2f} {unit}, {span}, "
            f"n = {len(self.values)})"
        )

    def to_json(self) -> dict[str, Any]:
        """The row of this claim in `ablate.json`."""
        return {
            "name": self.claim.name,
            "claim": self.claim.text,
            "measure": self.claim.measure,
            "unit": _UNITS[self.claim.measure],
            "claimed": self.claim.claimed,
            "mean": self.mean,
            "interval": None if self.interval is None else list(self.interval),
            "values": list(self.values),
            "n": len(self.values),
            "verdict": self.verdict,
        }


def list_claims(base: TrainConfig, *, device: str = "auto") -> tuple[Claim, ...]:
    """The claims of the lab about its own recipe, `seed-resnet18`.

    The lab says that AdamW with a cosine schedule brings 4 points and does not say over what: here
    it is SGD with momentum at the textbook's constant rate of 0.1. Two more rows tell optimiser
    and schedule apart. Mixed precision is what `auto` means on a GPU, and bf16 on a CPU.

    Args:
        base: the configuration to vary; its network must be timm's `resnet18`.
        device: `auto`, `cpu`, `cuda` or `cuda:<n>`.

    Raises:
        InputError: `base` has another network, or spares some weights from weight decay.

    Example:
        >>> [claim.name for claim in list_claims(get_preset("seed-resnet18"), device="cpu")]
        ['adamw-cosine', 'adamw', 'cosine', 'crop-flip', 'mixed-precision', 'depth', 'width']
    """
    if base.model != "resnet18" or not base.decay_all:
        raise InputError(
            "the claims are about the preset seed-resnet18: base needs model='resnet18' and "
            f"decay_all=True, got {base.model!r} and {base.decay_all}"
        )
    sgd = {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 5e-4}
    options = dict(base.model_options)
    half = [max(1, width // 2) for width in options.get("channels", _CHANNELS)]
    mixed = "bf16" if pick_device(device).type == "cpu" else "auto"
    return (
        Claim(
            name="adamw-cosine",
            text="AdamW with a cosine schedule brings 4 points over SGD at a constant rate",
            without=sgd,
            constant_rate=True,
            claimed=4.0,
        ),
        Claim(name="adamw", text="of these, AdamW instead of SGD, both with cosine", without=sgd),
        Claim(
            name="cosine",
            text="of these, cosine instead of a constant rate, both with AdamW",
            without={},
            constant_rate=True,
        ),
        Claim(
            name="crop-flip",
            text="random crop and flip bring 2 points",
            without={"augment": AugmentConfig()},
            claimed=2.0,
        ),
        Claim(
            name="mixed-precision",
            text="mixed precision trains 1.3 times as fast",
            included={"precision": mixed},
            without={"precision": "fp32"},
            claimed=1.3,
            measure="speed",
        ),
        Claim(
            name="depth",
            text="18 layers beat 10",
            without={"model_options": {**options, "layers": [1, 1, 1, 1]}},
        ),
        Claim(
            name="width",
            text="the full width beats half of it",
            without={"model_options": {**options, "channels": half}},
        ),
    )


def make_base(
    data: ImageData, *, epochs: int | None = None, width: float = 1.0, device: str = "auto"
) -> TrainConfig:
    """The lab's recipe at a stated budget, with a validation split to compare on.

    Args:
        data: the images; a tenth of the training images, at most 5,000, are for validation.
        epochs: by default 3 on a CPU, and the recipe's own 40 on a GPU.
        width: factor on the number of channels, in (0, 1]; less is faster on a CPU.
        device: `auto`, `cpu`, `cuda` or `cuda:<n>`.

    Raises:
        InputError: `epochs` or `width` is out of range.
    """
    if not 1 / 64 <= width <= 1:
        raise InputError(f"width must be between {1 / 64} and 1, got {width}")
    recipe = get_preset("seed-resnet18")
    on_cpu = pick_device(device).type == "cpu"
    options = {} if width == 1 else {"channels": [round(width * c) for c in _CHANNELS]}
    return dataclasses.replace(
        recipe,
        data=data.source,
        image_size=data.train.images.shape[1],
        epochs=epochs if epochs is not None else (CPU_EPOCHS if on_cpu else recipe.epochs),
        val_size=min(VAL_SIZE, len(data.train) // 10),
        model_options=options,
        precision="fp32" if on_cpu else "auto",
    )


def compute_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of `values`, by Student's t; None with fewer than two.

    It is meant for differences of pairs, which share a random seed.

    Example:
        >>> low, high = compute_interval([1.0, 2.0, 3.0])
        >>> round(low, 3), round(high, 3)
        (-0.484, 4.484)
    """
    if len(values) < 2:
        return None
    from scipy.stats import t

    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    return mean - half, mean + half


def judge(interval: tuple[float, float] | None, claimed: float | None, neutral: float) -> str:
    """What an interval says of a claim, in words.

    `does not hold`: the whole interval lies below what is claimed. `holds`: it does not, and the
    whole interval lies above no effect. `cannot be told`: the interval has room for the claim and
    for no effect alike, or there is no interval. A claim without a size claims any gain: it does
    not hold where the whole interval lies below no effect.

    Args:
        interval: 95 % interval of the mean effect.
        claimed: the effect that is claimed; None for one of no stated size.
        neutral: no effect: 0 for a difference, 1 for a ratio.

    Example:
        >>> judge((3.0, 6.0), 4.0, 0.0), judge((0.5, 2.0), 4.0, 0.0), judge((-1.0, 5.0), 4.0, 0.0)
        ('holds', 'does not hold', 'cannot be told')
    """
    if interval is None:
        return "cannot be told"
    low, high = interval
    if high < (neutral if claimed is None else claimed):
        return "does not hold"
    return "holds" if low > neutral else "cannot be told"


def compare(claim: Claim, included: Sequence[History], without: Sequence[History]) -> Effect:
    """The effect of the ingredient of `claim`.

    Args:
        claim: the claim.
        included: histories of the runs with the ingredient, one for each random seed.
        without: histories of the runs without it, in the same order of random seeds.
    """
    pairs = list(zip(included, without, strict=True))
    if claim.measure == "accuracy":
        key = "validation_accuracy"
        values = [100 * (more[-1][key] - less[-1][key]) for more, less in pairs]
        mean, interval = statistics.fmean(values), compute_interval(values)
    else:
        values = [_measure_speed(more) / _measure_speed(less) for more, less in pairs]
        logs = [math.log(value) for value in values]
        bounds = compute_interval(logs)
        mean = math.exp(statistics.fmean(logs))
        interval = None if bounds is None else (math.exp(bounds[0]), math.exp(bounds[1]))
    return Effect(
        claim=claim,
        values=tuple(values),
        mean=mean,
        interval=interval,
        verdict=judge(interval, claim.claimed, _NEUTRAL[claim.measure]),
    )


def _measure_speed(history: History) -> float:
    """Median over the epochs of the images per second."""
    return statistics.median(row["images_per_second"] for row in history)


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """The table of an ablation.

    Attributes:
        base: the configuration that is varied.
        seeds: the random seeds.
        effects: one row for each claim.
        histories: for each claim the histories of its runs, `included` and `without`, in the order
            of `seeds`.
        note: what every figure must say on its face; empty for real data.
        data_name: name of the images.
        device: name of the device.
    """

    base: TrainConfig
    seeds: tuple[int, ...]
    effects: tuple[Effect, ...]
    histories: Mapping[str, tuple[Sequence[History], Sequence[History]]]
    note: str
    data_name: str
    device: str

    def to_json(self) -> dict[str, Any]:
        """The content of `ablate.json`."""
        return {
            "data_name": self.data_name,
            "epochs": self.base.epochs,
            "seeds": list(self.seeds),
            "compared": "validation accuracy after the last epoch; speed: median of the epochs",
            "base": self.base.to_json(),
            "claims": [effect.to_json() for effect in self.effects],
            "device": self.device,
            "versions": get_versions(),
        }

    def figure(self) -> Figure:
        """Every effect with its interval, beside what is claimed."""
        rows = [effect.to_json() for effect in self.effects]
        return viz.plot_effects(rows, self.note)

    def learning_curves(self, name: str) -> Figure:
        """Validation accuracy by epoch, with and without the ingredient of the claim `name`.

        Raises:
            InputError: there is no claim of this name.
        """
        if name not in self.histories:
            raise InputError(f"claim must be one of {', '.join(self.histories)}, got {name!r}")
        included, without = self.histories[name]
        text = next(e.claim.text for e in self.effects if e.claim.name == name)
        return viz.plot_compared_curves({"with": included, "without": without}, text, self.note)

    def save(self, out: Path) -> None:
        """Write `ablate.json`, `effects.png`, and `<claim>.png` for each claim to `out`."""
        write_json(out / RESULT, self.to_json())
        figures = {"effects": self.figure()}
        figures |= {name: self.learning_curves(name) for name in self.histories}
        for name, figure in figures.items():
            with open_atomic(out / f"{name}.png") as file:
                figure.savefig(file, format="png")


def run_ablation(
    base: TrainConfig,
    claims: Sequence[Claim],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    data: ImageData | None = None,
    out: Path | str,
    device: str = "auto",
) -> Ablation:
    """Train what the claims compare, and judge them.

    Each run has a folder `runs/<name>-seed<n>` in `out`. A finished one is not repeated, an
    interrupted one goes on where it stopped, and a configuration that several claims share is
    trained once. All configurations of a random seed are trained before the next seed begins.

    Args:
        base: the configuration that is varied; it must have a validation split.
        claims: what to compare, each name once.
        seeds: the random seeds, each once.
        data: images already loaded; by default those of `base.data`.
        out: folder for the runs, `ablate.json` and the figures.
        device: `auto`, `cpu`, `cuda` or `cuda:<n>`.

    Raises:
        InputError: an argument cannot be used, or `out` holds runs of other configurations.
        TrainingError: a training cannot go on.
        KeyboardInterrupt: interrupted; the same call goes on from there.
    """
    _check_unique("seeds", seeds)
    _check_unique("claims", [claim.name for claim in claims])
    if base.val_size < 1:
        raise InputError("an ablation compares validation accuracies: base needs val_size above 0")
    data = load_data(base.data, image_size=base.image_size) if data is None else data
    folder = Path(out)
    pairs = _list_pairs(base, claims)
    variants = {variant.name: variant for pair in pairs.values() for variant in pair}
    histories: dict[str, list[History]] = {name: [] for name in variants}
    for seed in seeds:
        for name, variant in variants.items():
            run_folder = folder / "runs" / f"{name}-seed{seed}"
            histories[name].append(_train(variant, seed, data, run_folder, device))
    by_claim = {
        name: (histories[included.name], histories[without.name])
        for name, (included, without) in pairs.items()
    }
    ablation = Ablation(
        base=base,
        seeds=tuple(seeds),
        effects=tuple(compare(claim, *by_claim[claim.name]) for claim in claims),
        histories=by_claim,
        note=data.note,
        data_name=data.name,
        device=describe_device(pick_device(device)),
    )
    ablation.save(folder)
    return ablation


@dataclass(frozen=True)
class _Variant:
    """A configuration to train, and whether its learning rate stays constant."""

    name: str
    config: TrainConfig
    constant_rate: bool = False


def _list_pairs(base: TrainConfig, claims: Sequence[Claim]) -> dict[str, tuple[_Variant, _Variant]]:
    """For each claim the variants with and without its ingredient; equal ones are one."""
    known = [_Variant("base", base)]

    def find(name: str, changes: Mapping[str, Any], constant_rate: bool) -> _Variant:
        new = _Variant(name, dataclasses.replace(base, **changes), constant_rate)
        for variant in known:
            if (variant.config, variant.constant_rate) == (new.config, new.constant_rate):
                return variant
        known.append(new)
        return new

    return {
        claim.name: (
            find(f"{claim.name}-with", claim.included, False),
            find(f"{claim.name}-without", claim.without, claim.constant_rate),
        )
        for claim in claims
    }


def _train(variant: _Variant, seed: int, data: ImageData, folder: Path, device: str) -> History:
    """The history of a variant with a random seed: read if it is finished, else trained."""
    config = dataclasses.replace(variant.config, seed=seed)
    make = _make_constant(config) if variant.constant_rate else None
    if (folder / METRICS).exists():
        _check_same_run(folder, config, variant, data)
        logger.info("%s is finished", folder)
        return read_history(folder)
    logger.info("%s begins", folder)
    return fit(config, data=data, optimizer=make, out=folder, resume=True, device=device).history


def _check_same_run(folder: Path, config: TrainConfig, variant: _Variant, data: ImageData) -> None:
    """Raise InputError unless the finished run in `folder` is the one that is wanted."""
    saved = TrainConfig.from_json(json.loads((folder / CONFIG).read_text()))
    optimizer = "custom" if variant.constant_rate else config.optimizer
    # Of data and network of one's own, `fit` records only that they are.
    same = dataclasses.replace(config, optimizer=optimizer, data=saved.data)
    fingerprint = json.loads((folder / METRICS).read_text()).get("data_fingerprint")
    if saved.to_json() != same.to_json() or fingerprint != data.fingerprint:
        raise InputError(
            f"{folder} holds a run of another configuration or of other data; choose another "
            "folder for this ablation, or delete that one"
        )


def _make_constant(config: TrainConfig) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    """A maker of the optimiser of `config` whose learning rate no schedule changes."""

    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        if config.optimizer not in ("adamw", "sgd"):
            raise InputError(f"a constant rate needs adamw or sgd, got {config.optimizer!r}")
        optimizer = make_optimizer(parameters, config)
        optimizer.register_step_pre_hook(_restore_peak)
        return optimizer

    return make


def _restore_peak(optimizer: Optimizer, *_: Any) -> None:
    """Undo the schedule, just before the optimiser's step."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"]


def _check_unique(name: str, values: Sequence[Any]) -> None:
    if not values or len(set(values)) != len(values):
        raise InputError(f"{name} must be at least one, and none of them twice, got {list(values)}")

"""Parameter groups, optimisers, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from labkit.classify.config import TrainConfig
from labkit.runtime import InputError


def lr_factor(progress: float, warmup: float, schedule: str) -> float:
    """Learning rate as a fraction of its peak.

    Args:
        progress: share of the run that is done, in [0, 1].
        warmup: share of the run in which the rate rises, in [0, 1].
        schedule: `cosine` rises linearly and falls as half a cosine to 0 (Loshchilov 2017,
            arXiv 1608.03983); `one-cycle` rises and falls as half cosines from 1/25 of the peak
            to 1/10,000 of that (Smith 2018, arXiv 1708.07120); `triangle` rises linearly from
            a fifth and falls linearly to 0.

    Returns:
        A factor in [0, 1].
    """
    if progress < warmup:
        rise = progress / warmup
        if schedule == "one-cycle":
            return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * rise)) / 2
        return 0.2 + 0.8 * rise if schedule == "triangle" else rise
    fall = (progress - warmup) / (1 - warmup) if warmup < 1 else 0.0
    if schedule == "triangle":
        return 1 - fall
    end = 1 / 25e4 if schedule == "one-cycle" else 0.0
    return end + (1 - end) * (1 + math.cos(math.pi * fall)) / 2


def lr_at(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """Factor on the peak learning rate at `step`, counted from 0 over the whole run."""
    if config.schedule_per == "epoch":
        step = step // steps_per_epoch * steps_per_epoch
    total = steps_per_epoch * config.epochs
    # A warm-up from exactly 0 would waste the first step.
    offset = 1 if config.schedule_per == "step" and config.warmup else 0
    return lr_factor(min((step + offset) / total, 1.0), config.warmup, config.schedule)


EMBEDDINGS = ("patch_embed", "stem", "conv_stem", "conv1", "whitening", "embed")
CLASSIFIERS = ("head", "fc", "classifier", "token_score")
"""What networks call the layers that see pixels first, and those that decide last."""


def find_hidden_matrices(model: nn.Module) -> set[int]:
    """Identities of the weights that Muon may orthogonalise.

    These are the weights of linear and convolutional layers but those of the embedding and of the
    classifier, as Jordan's "Muon: An optimizer for hidden layers" (2024) prescribes. Both are known
    by the names of the modules of `model` that hold them, at its top or in its `backbone`. Where
    no module bears such a name, they are the first and the last layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> find_hidden_matrices(model) == {id(model[1].weight)}
        True
    """
    layers = [
        (name.removeprefix("backbone.").partition(".")[0], module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    tops = {top for top, _ in layers}
    if not tops & set(EMBEDDINGS):
        layers = layers[1:]
    if not tops & set(CLASSIFIERS):
        layers = layers[:-1]
    return {id(weight) for top, weight in layers if top not in EMBEDDINGS + CLASSIFIERS}


def group_parameters(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Group trainable parameters by weight decay; BatchNorm biases get a rate of their own.

    Weight decay is kept off whatever has fewer than two dimensions (norms, biases, gains) and off
    position and class embeddings, unless `config.decay_all`.
    """
    norm_biases = {
        id(module.bias)
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d) and module.bias is not None
    }
    matrices = find_hidden_matrices(model)
    weights = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    groups: dict[tuple[bool, bool, bool], dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        decayed = config.decay_all or id(parameter) in weights
        scaled = id(parameter) in norm_biases and config.norm_bias_lr_scale != 1
        orthogonal = config.optimizer == "muon" and id(parameter) in matrices
        group = groups.setdefault((decayed, scaled, orthogonal), {"params": []})
        group["params"].append(parameter)
        scale = config.norm_bias_lr_scale if scaled else 1.0
        group["peak_lr"] = group["lr"] = config.learning_rate * scale
        group["weight_decay"] = config.weight_decay if decayed else 0.0
        if config.optimizer == "muon":
            # timm's fallback is AdamW only without Nesterov momentum.
            group["use_fallback"], group["nesterov"] = not orthogonal, orthogonal
    return list(groups.values())


def create_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimiser of `config`, over `group_parameters`; each group carries its `peak_lr`."""
    groups = group_parameters(model, config)
    if config.optimizer == "custom":
        raise InputError("this configuration is of a run with an optimizer of your own: give it")
    if config.optimizer == "adamw":
        return AdamW(groups, lr=config.learning_rate, fused=True)
    if config.optimizer == "sgd":
        return SGD(
            groups,
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            fused=True,
        )
    from timm.optim.muon import Muon

    optimizer: Optimizer = Muon(groups, lr=config.learning_rate, momentum=0.95)
    return optimizer


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Give every group `factor` times its peak learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor

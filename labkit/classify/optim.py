"""Parameter groups, optimisers, and the learning rate as a function of the step."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from labkit.classify.config import TrainConfig
from labkit.runtime import InputError


def lr_factor(progress: float, warmup: float, schedule: str, final_lr: float = 0.0) -> float:
    """Learning rate as a fraction of its peak.

    Args:
        progress: share of the run that is done, in [0, 1].
        warmup: share of the run in which the rate rises, in [0, 1].
        schedule: `cosine` rises linearly and falls as half a cosine to 0 (Loshchilov 2017,
            arXiv 1608.03983); `one-cycle` rises and falls as half cosines from 1/25 of the peak
            to 1/10,000 of that (Smith 2018, arXiv 1708.07120); `triangle` rises linearly from
            a fifth and falls linearly to `final_lr`.
        final_lr: where `triangle` ends, in [0, 1].

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
        return 1 - fall * (1 - final_lr)
    end = 1 / 25e4 if schedule == "one-cycle" else 0.0
    return end + (1 - end) * (1 + math.cos(math.pi * fall)) / 2


def lr_at(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """Factor on the peak learning rate at `step`, counted from 0 over the whole run."""
    if config.schedule_per == "epoch":
        step = step // steps_per_epoch * steps_per_epoch
    total = steps_per_epoch * config.epochs
    # A warm-up from exactly 0 would waste the first step.
    offset = 1 if config.schedule_per == "step" and config.warmup else 0
    progress = min((step + offset) / total, 1.0)
    return lr_factor(progress, config.warmup, config.schedule, config.final_lr)


def momentum_at(progress: float, warmup: float) -> float:
    """Momentum of the one-cycle schedule: 0.95, or less while the learning rate is high.

    It is 0.85 at the peak of the learning rate; both follow half cosines (Smith 2018, arXiv
    1708.07120). For `progress` and `warmup` see `lr_factor`.

    Example:
        >>> [round(momentum_at(progress, 0.3), 2) for progress in (0.0, 0.3, 1.0)]
        [0.95, 0.85, 0.95]
    """
    if progress < warmup:
        height = (1 - math.cos(math.pi * progress / warmup)) / 2
    else:
        fall = (progress - warmup) / (1 - warmup) if warmup < 1 else 0.0
        height = (1 + math.cos(math.pi * fall)) / 2
    return 0.95 - 0.1 * height


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
    decays = compute_layer_decays(model, config.layer_decay)
    stem_bias = find_stem_bias(model) if config.stem_bias_until < 1 else None
    weights = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    groups: dict[tuple[object, ...], dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        decayed = config.decay_all or id(parameter) in weights
        scaled = id(parameter) in norm_biases and config.norm_bias_lr_scale != 1
        orthogonal = config.optimizer == "muon" and id(parameter) in matrices
        freezes = parameter is stem_bias
        scale = config.norm_bias_lr_scale if scaled else decays.get(id(parameter), 1.0)
        group = groups.setdefault((decayed, scale, orthogonal, freezes), {"params": []})
        group["params"].append(parameter)
        group["until"] = config.stem_bias_until if freezes else 1.0
        group["peak_lr"] = group["lr"] = config.learning_rate * scale
        group["weight_decay"] = config.weight_decay if decayed else 0.0
        if config.optimizer == "muon":
            # timm's fallback is AdamW only without Nesterov momentum.
            group["use_fallback"], group["nesterov"] = not orthogonal, orthogonal
    return list(groups.values())


def find_stem_bias(model: nn.Module) -> Tensor | None:
    """The bias of the first convolution of `model`, if it has one."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return None if first is None else first.bias


def compute_layer_decays(model: nn.Module, decay: float) -> dict[int, float]:
    """Factors on the learning rates of the parameters of a network, by their identity.

    The head has the factor 1, the last block `decay`, the block before it `decay` squared, and so
    on down to the embedding (Clark et al. 2020, arXiv 2003.10555, as timm groups the layers).

    Raises:
        InputError: `decay` is below 1, and timm does not know the layers of the network.
    """
    if decay == 1:
        return {}
    from timm.models import group_parameters as find_layers

    network: Any = getattr(model, "backbone", model)
    if not hasattr(network, "group_matcher"):
        raise InputError(
            "layer_decay is for networks of timm, such as vit-finetune, "
            f"got {type(network).__name__}; set layer_decay=1"
        )
    layers = find_layers(network, network.group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {
        id(parameter): decay ** (last - layers[name])
        for name, parameter in network.named_parameters()
    }


def create_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimiser of `config`, over `group_parameters`; each group carries its `peak_lr`."""
    return make_optimizer(group_parameters(model, config), config)


def make_optimizer(
    parameters: Iterable[nn.Parameter] | list[dict[str, Any]], config: TrainConfig
) -> Optimizer:
    """The optimiser of `config` over parameters, or over groups with rates of their own.

    Raises:
        InputError: the optimiser of `config` is one of the user's.
    """
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "custom":
        raise InputError("this configuration is of a run with an optimizer of your own: give it")
    if config.optimizer == "adamw":
        return AdamW(parameters, lr=rate, weight_decay=decay, fused=True)
    if config.optimizer == "sgd":
        return SGD(
            parameters,
            lr=rate,
            momentum=config.momentum,
            weight_decay=decay,
            nesterov=config.momentum > 0,
            fused=True,
        )
    from timm.optim.muon import Muon

    optimizer: Optimizer = Muon(parameters, lr=rate, momentum=0.95)
    return optimizer


def set_lr(optimizer: Optimizer, factor: float, progress: float = 0.0) -> None:
    """Give every group `factor` times its peak learning rate, or 0 if its time is over.

    The time of a group ends at its `until`, as `progress` a share of the run.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor if progress < group.get("until", 1.0) else 0.0


def get_lr(optimizer: Optimizer) -> float:
    """The learning rate of the first group whose time lasts to the end of the run."""
    groups = optimizer.param_groups
    return float(next((g for g in groups if g.get("until", 1.0) == 1), groups[0])["lr"])


def set_momentum(optimizer: Optimizer, momentum: float) -> None:
    """Give every group this momentum; of AdamW it is beta 1."""
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])
        if "momentum" in group:
            group["momentum"] = momentum


class Lookahead(nn.Module):
    """Averaged weights that replace those that are trained, every few steps.

    The idea is that of Zhang et al. 2019 (arXiv 1907.08610), the numbers are those of airbench
    (Jordan 2024, arXiv 2404.00498): at a share t of the run the average keeps 0.95**`every` * t**3
    of itself, so that it forgets ever more slowly.

    Args:
        model: the network that is trained.
        every: number of steps between two replacements.
        total_steps: number of steps of the run.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> lookahead = Lookahead(model, every=5, total_steps=100)
        >>> lookahead.update(model, step=4)
        >>> torch.equal(lookahead.module.weight, model.weight)
        True
    """

    def __init__(self, model: nn.Module, every: int, total_steps: int) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).requires_grad_(False)
        self._every, self._total_steps = every, total_steps

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take the weights of `model` in, and replace them, if it is time after `step`."""
        if (step + 1) % self._every:
            return
        kept = 0.95**self._every * ((step + 1) / self._total_steps) ** 3
        averages = self.module.state_dict().values()
        for average, value in zip(averages, model.state_dict().values(), strict=True):
            if value.is_floating_point():
                value.copy_(average.lerp_(value, 1 - kept))
            else:
                average.copy_(value)

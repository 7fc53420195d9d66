from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from labkit.classify.config import PRESETS, TrainConfig, get_preset
from labkit.classify.models import create_model
from labkit.classify.optim import (
    Lookahead,
    create_optimizer,
    find_hidden_matrices,
    find_stem_bias,
    get_lr,
    lr_at,
    lr_factor,
    momentum_at,
    set_lr,
    set_momentum,
)
from labkit.runtime import InputError


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8, 8)
        self.position = nn.Parameter(torch.zeros(1, 4, 8))
        self.head = nn.Linear(8, 2)


def rates(optimizer: torch.optim.Optimizer, scheduler: object, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()  # type: ignore[attr-defined]
    return found


def test_cosine_per_epoch_is_torchs_cosine_annealing() -> None:
    config = TrainConfig(epochs=7, schedule_per="epoch")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    torch_rates = rates(
        optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7), 7
    )
    for epoch, expected in enumerate(torch_rates):
        for step in (0, 3, 9):
            assert lr_at(epoch * 10 + step, 10, config) == pytest.approx(expected, abs=1e-9)


def test_one_cycle_is_torchs_one_cycle() -> None:
    total = 101
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=total, pct_start=0.3, cycle_momentum=False
    )
    peak = 0.3 * total - 1  # OneCycleLR peaks at this step of total - 1
    for step, expected in enumerate(rates(optimizer, scheduler, total - 1)):
        factor = lr_factor(step / (total - 1), peak / (total - 1), "one-cycle")
        assert factor == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_cycled_momentum_is_torchs(optimizer_class: type[torch.optim.Optimizer]) -> None:
    total = 101
    kind: Any = optimizer_class
    options = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    parameters = [nn.Parameter(torch.zeros(1))]
    theirs, ours = kind(parameters, lr=1.0, **options), kind(parameters, lr=1.0, **options)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        theirs, max_lr=1.0, total_steps=total, pct_start=0.3
    )
    peak = 0.3 * total - 1
    for step in range(total - 1):
        set_momentum(ours, momentum_at(step / (total - 1), peak / (total - 1)))
        pairs = [
            (group.get("momentum"), group.get("betas", (0,))[0])
            for group in (theirs.param_groups[0], ours.param_groups[0])
        ]
        assert pairs[0] == pytest.approx(pairs[1], abs=1e-6)
        theirs.step()
        scheduler.step()


def test_the_triangle_of_airbench() -> None:
    """0.2 to 1 in the first 23 % of the run, then down to 0.07 (airbench94's own formula)."""
    for step in range(100):
        share = step / 23 if step < 23 else (step - 23) / 77
        expected = 0.2 * (1 - share) + share if step < 23 else (1 - share) + 0.07 * share
        assert lr_factor(step / 100, 0.23, "triangle", 0.07) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle", "triangle"])
def test_a_schedule_rises_to_its_peak_and_falls_towards_zero(schedule: str) -> None:
    factors = [lr_factor(step / 100, 0.2, schedule) for step in range(101)]
    assert max(factors) == factors[20] == pytest.approx(1.0)
    assert factors[:21] == sorted(factors[:21])
    assert factors[20:] == sorted(factors[20:], reverse=True)
    assert 0 <= factors[100] < 1e-4


RATES = {
    "seed-resnet18": (1.0, 0.9938441702975689, 0.9045084971874737, 0.5, 0.001541333133436018),
    "resnet18": (0.201, 0.401, 0.9996875, 0.62468750, 0.0),
    "vit-classic": (0.004, 0.9983656644430494, 0.9225089144814889, 0.5199719923551266, 0.0),
    "vit": (0.04000236870310806, 0.5215079619932221, 0.9697867088470489, 0.5866538555606289, 4e-6),
    "vit-finetune": (0.04, 0.52, 0.9674128381980072, 0.5799405938459175, 0.0),
    "demo": (0.040236851024448836, 0.09937279357894548, 0.68259420171774, 0.8479570064705642, 4e-6),
}
"""Factors at the start, at 5, 20 and 50 % and at the last step, with 50 steps an epoch.

They were computed when the warm-up of these presets was a number of epochs.
"""


@pytest.mark.parametrize("name", RATES)
def test_a_preset_at_its_own_epochs_keeps_the_schedule_that_it_always_had(name: str) -> None:
    config = PRESETS[name]
    total = 50 * config.epochs
    steps = (0, total // 20, total // 5, total // 2, total - 1)
    factors = [lr_at(step, 50, config) for step in steps]
    assert factors == pytest.approx(RATES[name], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("share", [0.1, 0.4])
def test_fewer_epochs_keep_the_shape_of_the_schedule(name: str, share: float) -> None:
    long = PRESETS[name]
    epochs = max(1, round(share * long.epochs))
    short, per_epoch = get_preset(name, epochs=epochs), 1000
    for part in (0.05, 0.1, 0.25, 0.5, 0.75):
        if long.schedule_per == "epoch":  # constant within an epoch, of which few are left
            part = int(part * epochs) / epochs
        factors = [
            lr_at(int(part * per_epoch * config.epochs), per_epoch, config)
            for config in (short, long)
        ]
        assert factors[0] == pytest.approx(factors[1], abs=0.01)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_schedule_of_one_epoch(name: str) -> None:
    config = get_preset(name, epochs=1)
    factors = [lr_at(step, 100, config) for step in range(100)]
    assert max(factors) == pytest.approx(1.0, abs=0.02) and min(factors) >= 0


def test_no_warm_up_begins_at_the_peak() -> None:
    assert lr_at(0, 10, TrainConfig(epochs=3)) == 1.0


def test_decay_stays_off_norms_biases_and_positions() -> None:
    model = Toy()
    optimizer = create_optimizer(model, TrainConfig(weight_decay=0.1))
    decayed = {
        id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]
    }
    assert decayed == {id(m.weight) for m in (model.embed, model.hidden, model.head)}


def test_decay_all_is_one_group_as_plain_adamw_has_it() -> None:
    model = Toy()
    optimizer = create_optimizer(model, TrainConfig(decay_all=True, weight_decay=0.1))
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0.1
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]


def test_batch_norm_biases_get_their_own_rate() -> None:
    model = Toy()
    optimizer = create_optimizer(
        model, TrainConfig(optimizer="sgd", learning_rate=0.5, norm_bias_lr_scale=64)
    )
    set_lr(optimizer, 0.5)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rate[id(model.norm.bias)] == 0.5 * 64 * 0.5
    assert rate[id(model.head.bias)] == 0.5 * 0.5


def test_muon_orthogonalises_find_hidden_matrices_alone() -> None:
    model = Toy()
    assert find_hidden_matrices(model) == {id(model.hidden.weight)}
    optimizer = create_optimizer(model, TrainConfig(optimizer="muon", learning_rate=0.02))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    change = model.hidden.weight.detach() - before["hidden.weight"] * (1 - 0.02 * 0.01)
    singular = torch.linalg.svdvals(change)
    assert singular.max() / singular.min() < 2.5
    adam_step = (model.position.detach() - before["position"]).abs()
    torch.testing.assert_close(adam_step, torch.full_like(adam_step, 0.02))


def name_hidden_matrices(model: nn.Module) -> set[str]:
    matrices = find_hidden_matrices(model)
    return {name for name, p in model.named_parameters() if id(p) in matrices}


VIT_MATRICES = {
    f"blocks.{layer}.{name}.weight"
    for layer in range(2)
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
}


@pytest.mark.parametrize("preset", ["vit", "vit-classic"])
@pytest.mark.parametrize("pool", ["cls", "mean", "sequence"])
def test_muon_takes_the_matrices_of_the_blocks_of_a_vit_alone(preset: str, pool: str) -> None:
    small = {"embed_dim": 16, "depth": 2, "num_heads": 2, "pool": pool}
    model = create_model("vit", **{**PRESETS[preset].model_options, **small})
    assert name_hidden_matrices(model) == VIT_MATRICES


def test_muon_takes_the_blocks_of_a_vit_of_timm_behind_its_adapter_alone() -> None:
    options = {"backbone": "vit_tiny_patch16_224", "depth": 2, "img_size": 32}
    model = create_model("vit-finetune", pretrained=False, **options)
    assert name_hidden_matrices(model) == {f"backbone.{name}" for name in VIT_MATRICES}


def test_muon_takes_the_convolutions_between_the_stem_and_the_head_of_a_resnet18() -> None:
    names = name_hidden_matrices(create_model("resnet18"))
    # Two blocks of two convolutions in each of four layers, and three that shorten the detour.
    assert len(names) == 4 * 2 * 2 + 3 and all(name.startswith("layer") for name in names)


def test_muon_takes_the_groups_of_the_speed_network_alone() -> None:
    names = name_hidden_matrices(create_model("speed"))
    assert len(names) == 6 and all(name.startswith("groups.") for name in names)


def test_lookahead_follows_its_formula() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0]])
    lookahead = Lookahead(model, every=5, total_steps=20)
    slow = fast = np.array([[1.0, 2.0]])
    for step in range(20):
        model.weight.data += 1.0  # what an optimiser did
        fast = fast + 1
        lookahead.update(model, step)
        if step % 5 == 4:
            kept = 0.95**5 * ((step + 1) / 20) ** 3
            slow = fast = kept * slow + (1 - kept) * fast
        np.testing.assert_allclose(model.weight.detach(), fast, rtol=1e-6)
        np.testing.assert_allclose(lookahead.module.weight, slow, rtol=1e-6)


def test_the_bias_of_the_stem_is_trained_for_its_share_of_the_run_alone() -> None:
    model = create_model("speed", widths=(8, 8, 8))
    config = get_preset("speed", optimizer="sgd", stem_bias_until=0.3)
    optimizer = create_optimizer(model, config)
    (group,) = (group for group in optimizer.param_groups if group["until"] == 0.3)
    assert group["params"] == [find_stem_bias(model)] == [model.whitening.bias]
    set_lr(optimizer, 0.5, progress=0.29)
    assert group["lr"] == 0.75
    set_lr(optimizer, 0.5, progress=0.3)
    assert group["lr"] == 0
    others = [g["lr"] for g in optimizer.param_groups if g is not group]
    assert sorted(set(others)) == [0.75, 48.0]
    assert get_lr(optimizer) == 0.75


def test_layer_decay_gives_the_rates_that_timm_gives() -> None:
    from timm.optim import param_groups_layer_decay

    model: Any = create_model("vit-finetune", backbone="test_vit", pretrained=False)
    config = TrainConfig(learning_rate=1.0, layer_decay=0.5)
    ours = {
        id(parameter): group["peak_lr"]
        for group in create_optimizer(model, config).param_groups
        for parameter in group["params"]
    }
    theirs = {
        id(parameter): group["lr_scale"]
        for group in param_groups_layer_decay(model.backbone, 0.0, layer_decay=0.5)
        for parameter in group["params"]
    }
    assert ours == theirs and len(set(ours.values())) > 4


def test_layer_decay_needs_layers_that_timm_knows() -> None:
    with pytest.raises(InputError, match="networks of timm, such as vit-finetune, got Toy"):
        create_optimizer(Toy(), TrainConfig(layer_decay=0.5))

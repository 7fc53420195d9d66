from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from labkit.classify.models import create_model, list_models
from labkit.classify.vit import has_attention
from labkit.runtime import InputError, SourceError, use_seed
from tests.loopback import LoopbackHub


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub client that may not use the network and has nothing in its cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


def finetune(**options: Any) -> Any:
    return create_model("vit-finetune", backbone="test_vit", pretrained=False, **options)


def test_resnet18_is_timms_with_the_same_random_numbers() -> None:
    with use_seed(3):
        expected = timm.create_model("resnet18", num_classes=4).state_dict()
    with use_seed(3):
        found = create_model("resnet18", num_classes=4).state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_the_cifar_stem_changes_the_stem_alone_and_keeps_the_resolution(images: Tensor) -> None:
    small: Any = create_model("resnet18-3x3", num_classes=4).eval()
    plain = create_model("resnet18", num_classes=4).state_dict()
    shapes = {name: tensor.shape for name, tensor in small.state_dict().items()}
    assert shapes.pop("conv1.weight") == (64, 3, 3, 3)
    assert shapes == {name: t.shape for name, t in plain.items() if name != "conv1.weight"}
    features: list[Tensor] = []
    small.layer1.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    assert small(images).shape == (2, 4)
    assert features[0].shape == (2, 64, 32, 32)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit", {"embed_dim": 16, "depth": 1, "num_heads": 2}),
        ("speed", {"widths": (4, 4, 4)}),
        ("test_resnet", {}),
        ("test_vit", {}),
        ("test_vit.r160_in1k", {"drop_path_rate": 0.1}),
    ],
)
def test_models_map_small_images_to_logits(
    name: str, options: dict[str, Any], images: Tensor
) -> None:
    model = create_model(name, num_classes=7, image_size=32, **options)
    assert model(images).shape == (2, 7)


def test_a_timm_transformer_of_fixed_size_is_built_for_the_images() -> None:
    model: Any = create_model("vit_tiny_patch16_224", image_size=48, depth=1)
    assert model.patch_embed.grid_size == (3, 3)


def test_image_size_reaches_our_own_networks() -> None:
    model: Any = create_model(
        "vit", image_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2
    )
    assert model.grid == 4
    with pytest.raises(InputError, match="at least 9, got 8"):
        create_model("speed", image_size=8)


def test_the_backbone_sees_enlarged_images_normalised_its_own_way() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    model = finetune(input_mean=mean, input_std=std)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    column = (1, 3, 1, 1)
    images = (pixels - torch.tensor(mean).view(column)) / torch.tensor(std).view(column)
    config = model.backbone.pretrained_cfg
    enlarged = F.interpolate(pixels, (160, 160), mode="bicubic", antialias=False)
    expected = enlarged - torch.tensor(config["mean"]).view(column)
    expected /= torch.tensor(config["std"]).view(column)
    torch.testing.assert_close(model.adapt(images), expected, atol=1e-5, rtol=0)


def test_a_training_view_is_a_rectangle_of_the_image_and_evaluation_sees_all_of_it() -> None:
    model = finetune(crop_scale=0.25, input_mean=(0.0,) * 3, input_std=(1.0,) * 3)
    model.scale, model.shift = torch.ones(3, 1, 1), torch.zeros(3, 1, 1)
    ramp = torch.linspace(0, 1, 64)
    images = torch.stack([ramp.expand(64, 64), ramp.expand(64, 64).T, torch.zeros(64, 64)]).repeat(
        200, 1, 1, 1
    )
    model.train()
    with use_seed(0):
        views = model.adapt(images)
    x, y = views[:, 0].mean(1), views[:, 1].mean(2)  # the ramps along their axes
    for line in (x, y):
        shares = line[:, -1] - line[:, 0]  # of a side; corners are half a pixel inside
        assert 0.45 < shares.min() < 0.55 and 0.95 < shares.max() < 1.01
        assert line.min() > -0.02 and line.max() < 1.02
        assert line[:, 0].std() > 0.08
    whole = model.eval().adapt(images[:1])
    assert whole[0, 0, 0, 0] < 0.01 and whole[0, 0, 0, -1] > 0.99


def test_finetuning_takes_another_size_and_has_attention(images: Tensor) -> None:
    model = finetune(num_classes=4, img_size=48)
    assert model.adapt(images).shape == (2, 3, 48, 48)
    assert model(images).shape == (2, 4)
    assert has_attention(model)


def test_the_adapter_adds_nothing_to_the_weights_that_are_saved() -> None:
    model = finetune()
    assert set(model.state_dict()) == {f"backbone.{name}" for name in model.backbone.state_dict()}


def test_pretrained_weights_reach_the_backbone(tmp_path: Path) -> None:
    saved = timm.create_model("test_vit").state_dict()
    torch.save(saved, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 1000}
    model: Any = create_model("vit-finetune", backbone="test_vit", pretrained_cfg_overlay=overlay)
    found = model.backbone.state_dict()
    assert found["head.weight"].shape[0] == 10
    assert all(torch.equal(found[n], saved[n]) for n in saved if not n.startswith("head."))


@pytest.mark.usefixtures("offline")
def test_weights_that_cannot_be_had_name_the_cause_and_the_remedies() -> None:
    with pytest.raises(SourceError, match=r"'test_vit\.r160_in1k'.*[Oo]ffline.*pretrained=False"):
        create_model("vit-finetune", backbone="test_vit.r160_in1k")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", "'resnet19' is unknown; close matches: resnet18.*timm.list_models"),
        ("vitt", "close matches: .*vit"),
        ("resnet18.nobody_in1k", r"close matches: .*resnet18\.[a-z0-9]+_in1k"),
        ("", "model '' is unknown; close matches: none"),
    ],
)
def test_an_unknown_name_is_answered_with_close_ones(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_model(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit", {"hats": 3}, r"model 'vit' has no option \['hats'\]; it has patch_size, embed_dim"),
        ("speed", {"patch_size": 3}, "it has widths, head_scale"),
        ("resnet18", {"hats": 3}, "timm cannot build 'resnet18'.*hats.*drop these options"),
        ("vit-finetune", {"backbone": "no_such_vit"}, "'no_such_vit' is unknown"),
        (
            "vit-finetune",
            {"backbone": "test_resnet", "pretrained": False},
            "no plain Vision Transformer",
        ),
        ("resnet18", {"num_classes": 0}, "at least 1, got 0 and 32"),
        ("speed", {"image_size": -1}, "at least 1, got 10 and -1"),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        create_model(name, **options)


def test_building_leaves_no_trace_in_a_scope_of_its_own() -> None:
    state = torch.get_rng_state()
    with use_seed(0):
        first: nn.Module = create_model("speed")
    with use_seed(0):
        second = create_model("speed")
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_pretrained_weights_come_from_the_hub_into_the_backbone(hub: LoopbackHub) -> None:
    from safetensors.torch import save

    name = "vit_small_patch16_224.augreg_in21k_ft_in1k"
    torch.manual_seed(0)
    published = timm.create_model(name, pretrained=False)
    hub.add(f"timm/{name}", "model.safetensors", save(published.state_dict()))
    model = create_model("vit-finetune", num_classes=10)
    loaded = model.state_dict()
    for key, value in published.state_dict().items():
        if not key.startswith("head."):
            assert torch.equal(loaded[f"backbone.{key}"], value), key
    assert loaded["backbone.head.weight"].shape == (10, 384)


def test_own_names_are_listed_first_and_timms_on_request() -> None:
    own_names = list_models()
    assert own_names == ["resnet18", "resnet18-3x3", "vit", "vit-finetune", "speed"]
    names = list_models(timm=True)
    assert names[: len(own_names)] == own_names and "vit_small_patch16_224" in names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "options"),
    [("vit", {"depth": "six"}), ("vit", {"depth": 2.5}), ("speed", {"widths": 5})],
)
def test_an_option_of_another_type_is_named(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"model '{name}' cannot be built with .*{min(options)}"):
        create_model(name, **options)

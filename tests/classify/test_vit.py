from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import Tensor, nn

from labkit.classify.layers import Attention, RelativeBias, make_sinusoids
from labkit.classify.models import create_model
from labkit.classify.vit import (
    AttentionRecord,
    VisionTransformer,
    compute_attention_rollout,
    has_attention,
    roll_out,
)
from labkit.runtime import InputError, use_seed

TINY = {"image_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}


def tiny(**options: Any) -> VisionTransformer:
    with use_seed(0):
        return VisionTransformer(**{**TINY, **options}).eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shake(model: nn.Module) -> None:
    """Move every parameter off its initial value, so that zeros and ones hide nothing."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter += 0.1 * noise(*parameter.shape, seed=index)


SHAPES = [
    pytest.param(
        {"image_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3},
        {},
        id="32",
    ),
    pytest.param(
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 4,
            "mlp_ratio": 1.5,
        },
        {},
        id="16",
    ),
    pytest.param(
        {
            "image_size": 16,
            "patch_size": 4,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "pool": "mean",
        },
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        id="mean",
    ),
]


@pytest.mark.parametrize(("options", "timm_options"), SHAPES)
def test_logits_and_gradients_equal_those_of_timm(
    options: dict[str, Any], timm_options: dict[str, Any]
) -> None:
    size = options["image_size"]
    reference = TimmTransformer(
        img_size=size,
        patch_size=options["patch_size"],
        embed_dim=options["embed_dim"],
        depth=options["depth"],
        num_heads=options["num_heads"],
        mlp_ratio=options.get("mlp_ratio", 4.0),
        num_classes=7,
        **timm_options,
    ).eval()
    shake(reference)
    model = VisionTransformer(num_classes=7, **options).eval()
    model.load_state_dict(reference.state_dict())
    images, labels = noise(4, 3, size, size), torch.arange(4)

    logits, expected = model(images), reference(images)
    nn.functional.cross_entropy(logits, labels).backward()
    nn.functional.cross_entropy(expected, labels).backward()

    assert (logits - expected).abs().max() <= 1e-5
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("pool", ["cls", "mean", "sequence"])
@pytest.mark.parametrize("relative_bias", [False, True])
def test_recording_attention_computes_what_the_fused_kernel_computes(
    pool: Any, relative_bias: bool
) -> None:
    model = tiny(pool=pool, relative_bias=relative_bias)
    shake(model)
    images = noise(3, 3, 8, 8)
    record = model.record_attention(images)
    with torch.no_grad():
        explicit, fused = model._encode(images, []), model._encode(images)
        pooled = torch.einsum("bt,btc->bc", record.readout, fused)
        torch.testing.assert_close(explicit, fused, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.head(pooled), model(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pool", ["cls", "mean", "sequence"])
def test_rows_of_attention_and_readout_sum_to_one(pool: Any) -> None:
    model = tiny(pool=pool, relative_bias=True)
    shake(model)
    record = model.record_attention(noise(3, 3, 8, 8))
    length = 16 + (pool == "cls")
    assert [m.shape for m in record.maps] == [(3, 2, length, length)] * 2
    for rows in (*record.maps, record.readout):
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]))


def test_rollout_is_the_matrix_product_of_averaged_attention_and_residual() -> None:
    maps = [noise(1, 2, 5, 5, seed=seed).softmax(-1) for seed in (1, 2)]
    readout = torch.tensor([[1.0, 0, 0, 0, 0]])
    first, second = (0.5 * m[0].numpy().mean(0) + 0.5 * np.eye(5) for m in maps)
    patches = (second @ first)[0, 1:].reshape(2, 2)
    found = roll_out(AttentionRecord(maps, readout, (2, 2)))
    np.testing.assert_allclose(found[0].numpy(), patches / patches.max(), rtol=1e-5)


def test_rollout_weighs_the_rows_by_the_readout() -> None:
    attention = noise(1, 1, 4, 4).softmax(-1)
    readout = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    expected = readout.numpy() @ (0.5 * attention[0, 0].numpy() + 0.5 * np.eye(4))
    found = roll_out(AttentionRecord([attention], readout, (2, 2)))
    np.testing.assert_allclose(found.numpy().ravel(), expected[0] / expected.max(), rtol=1e-5)


def test_rollout_shows_the_patch_that_the_class_token_attends_to() -> None:
    attention = torch.eye(5).expand(1, 1, 5, 5).clone()
    attention[0, 0, 0] = torch.tensor([0, 0, 0, 1.0, 0])
    found = roll_out(AttentionRecord([attention], torch.eye(5)[:1], (2, 2)))
    assert found.tolist() == [[[0, 0], [1, 0]]]


def test_attention_rollout_is_scaled_per_image_and_leaves_the_modes_alone() -> None:
    model = tiny(relative_bias=True, head_dropout=0.5).train()
    model.norm.eval()
    maps = compute_attention_rollout(model, noise(3, 3, 8, 8))
    assert maps.shape == (3, 4, 4)
    assert maps.min() >= 0
    assert maps.amax(dim=(1, 2)).tolist() == [1, 1, 1]
    assert model.training and model.head_drop.training and not model.norm.training


def test_attention_of_a_finetuned_backbone_equals_ours_with_the_same_weights() -> None:
    with use_seed(0):
        model: Any = create_model(
            "vit-finetune", backbone="test_vit", pretrained=False, img_size=64
        )
    twin = VisionTransformer(
        image_size=64, patch_size=16, embed_dim=64, depth=6, num_heads=2, mlp_ratio=3
    )
    twin.load_state_dict(model.backbone.state_dict())
    images = noise(2, 3, 32, 32)
    before = model.eval()(images)
    record, expected = model.record_attention(images), twin.record_attention(model.adapt(images))
    assert record.grid == expected.grid == (4, 4)
    for found, reference in zip(record.maps, expected.maps, strict=True):
        torch.testing.assert_close(found, reference, atol=1e-5, rtol=0)
    torch.testing.assert_close(record.readout, expected.readout)
    fused = [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")]
    assert fused and all(fused)
    assert torch.equal(model(images), before)
    assert compute_attention_rollout(model.train(), images).shape == (2, 4, 4)
    assert model.backbone.blocks[0].training


def test_a_mean_pooled_backbone_is_read_out_over_its_patches() -> None:
    model: Any = create_model(
        "vit-finetune", backbone="test_vit", pretrained=False, img_size=32, global_pool="avg"
    )
    record = model.record_attention(noise(1, 3, 32, 32))
    assert record.readout.tolist() == [[0, 0.25, 0.25, 0.25, 0.25]]


def test_a_convolutional_network_has_no_attention() -> None:
    model = nn.Conv2d(3, 1, 1)
    assert not has_attention(model)
    assert has_attention(tiny())
    with pytest.raises(InputError, match=r"'vit'.*got Conv2d"):
        compute_attention_rollout(model, noise(1, 3, 8, 8))


def test_relative_bias_depends_on_the_offset_and_spares_the_class_token() -> None:
    bias = RelativeBias(grid=3, num_heads=2)
    found = bias(prefix=1).detach()
    expected = torch.zeros(2, 10, 10)
    for i in range(9):
        for j in range(9):
            down, right = i // 3 - j // 3, i % 3 - j % 3
            expected[:, i + 1, j + 1] = bias.table[:, down + 2, right + 2].detach()
    assert torch.equal(found, expected)


def test_sequence_pooling_is_a_softmax_weighted_mean() -> None:
    model = tiny(pool="sequence")
    shake(model)
    tokens = noise(2, 16, 16)
    weight, bias = model.state_dict()["token_score.weight"], model.state_dict()["token_score.bias"]
    scores = np.exp(tokens.numpy() @ weight.numpy()[0] + bias.numpy())
    expected = (tokens.numpy() * (scores / scores.sum(1, keepdims=True))[:, :, None]).sum(1)
    np.testing.assert_allclose(model._pool_tokens(tokens).detach().numpy(), expected, atol=1e-6)


def test_convolutional_tokens_keep_the_grid_of_the_patches() -> None:
    model = VisionTransformer(
        tokens="conv", patch_size=2, embed_dim=16, depth=1, num_heads=2, pool="mean"
    )
    images = noise(1, 3, 32, 32)
    assert model.patch_embed(images).shape == (1, 256, 16)
    moved = images.clone()
    moved[..., 31, 31] += 1  # only the last patch and its neighbours can see it
    changed = (model.patch_embed(images) - model.patch_embed(moved)).abs().sum(2)[0] > 1e-7
    assert changed.nonzero().flatten().tolist() == [255]


def test_stem_tokens_keep_the_grid_and_see_beyond_their_patch() -> None:
    model = VisionTransformer(
        tokens="stem", patch_size=4, embed_dim=16, depth=1, num_heads=2, pool="mean"
    ).eval()
    images = noise(1, 3, 32, 32)
    assert model.patch_embed(images).shape == (1, 64, 16)
    moved = images.clone()
    moved[..., 2, 6] += 1  # a token at (y, x) sees 4 pixels around pixel (4 y, 4 x)
    changed = (model.patch_embed(images) - model.patch_embed(moved)).abs().sum(2)[0] > 1e-7
    assert changed.nonzero().flatten().tolist() == [1, 2, 9, 10]


def test_stem_is_the_convolutions_of_its_paper() -> None:
    patch_embed = tiny(tokens="stem", patch_size=4).patch_embed
    convolutions = [module for module in patch_embed.modules() if isinstance(module, nn.Conv2d)]
    shapes = [(conv.out_channels, conv.kernel_size, conv.stride) for conv in convolutions]
    assert shapes == [(32, (3, 3), (1, 1)), (64, (3, 3), (2, 2)), (16, (3, 3), (2, 2))]


def test_drop_path_rises_linearly_to_its_rate() -> None:
    model = tiny(depth=3, drop_path_rate=0.2)
    rates = [getattr(block.drop_path, "drop_prob", 0) for block in model.blocks]
    assert rates == [0, 0.1, 0.2]


def test_mimetic_projection_is_near_the_negative_identity() -> None:
    attention = Attention(embed_dim=64, num_heads=1, grid=2, relative_bias=False)
    with use_seed(0):
        attention.init_mimetic_()
    query, key, value = (part.T for part in attention.qkv.weight.detach().chunk(3))
    products = {0.7: query @ key.T, -0.4: value @ attention.proj.weight.detach().T}
    for identity, product in products.items():
        remainder = (product - identity * torch.eye(64)) / abs(identity)
        # What is left is noise N(0, 1/64): 4096 draws know their spread to about 1 %.
        assert abs(remainder.std() * 8 - 1) < 0.05
        assert abs(remainder.mean()) < 4 / 8 / 64


def test_mimetic_heads_share_a_balanced_product_of_their_rank() -> None:
    attention = Attention(embed_dim=32, num_heads=4, grid=2, relative_bias=False)
    with use_seed(0):
        attention.init_mimetic_()
    query, key, _ = attention.qkv.weight.detach().unflatten(0, (3, 4, 8))
    for head in range(4):
        gram = query[head] @ query[head].T
        torch.testing.assert_close(gram, key[head] @ key[head].T, atol=1e-5, rtol=0)
        torch.testing.assert_close(gram, gram.diagonal().diag(), atol=1e-5, rtol=0)
        assert (query[head].T @ key[head]).diagonal().mean() > 0.1
    assert not torch.equal(query[0], query[1])


def test_mimetic_attention_starts_local() -> None:
    images = noise(8, 3, 8, 8)
    mimetic, plain = tiny(pool="mean", mimetic=True), tiny(pool="mean")
    own = [m.record_attention(images).maps[0].diagonal(dim1=2, dim2=3) for m in (mimetic, plain)]
    assert own[0].mean() > 1.5 / 16
    assert abs(own[1].mean() * 16 - 1) < 0.1


def test_make_sinusoids_follow_the_formula() -> None:
    positions = make_sinusoids(grid=3, embed_dim=8)
    row, column = 2, 1
    angles = [row, row / 100, column, column / 100]
    expected = [
        f(a) for pair in (angles[:2], angles[2:]) for f in (math.sin, math.cos) for a in pair
    ]
    torch.testing.assert_close(positions[3 * row + column], torch.tensor(expected))


def test_same_seed_gives_same_weights() -> None:
    first, second = (tiny(mimetic=True, relative_bias=True).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, "patch_size must divide image_size.*another patch_size"),
        ({"num_heads": 3}, "num_heads must divide embed_dim.*multiple of num_heads"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"patch_size": 0}, "patch_size must be at least 1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"pool": "max"}, "pool must be one of cls, mean, sequence, got 'max'"),
        ({"tokens": "word"}, "tokens must be one of patch, conv, stem"),
        ({"tokens": "stem", "patch_size": 12, "image_size": 36}, "power of 2, got 12"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be at least 0 and below 1"),
        ({"head_dropout": -0.1}, "head_dropout"),
        ({"mimetic": True, "embed_dim": 18}, "multiple of 4, got 18"),
    ],
)
def test_impossible_shapes_name_the_argument_and_the_remedy(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tiny(**options)

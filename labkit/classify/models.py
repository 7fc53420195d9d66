"""Networks by name: timm's ResNet18 with two stems, our ViT, a fine-tuned ViT, a fast conv net."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.classify.config import CIFAR10_MEAN, CIFAR10_STD, TrainConfig
from labkit.classify.speednet import SpeedNet
from labkit.classify.vit import (
    AttentionRecord,
    VisionTransformer,
    attention_rollout,
    evaluating,
    has_attention,
)
from labkit.runtime import InputError, SourceError, find_root_cause

__all__ = ["UpsampledBackbone", "attention_rollout", "build_model", "has_attention", "model_for"]

Options = dict[str, Any]

_FINETUNE_BACKBONE = "vit_small_patch16_224.augreg_in21k_ft_in1k"


def build_model(name: str, *, classes: int = 10, image_size: int = 32, **options: Any) -> nn.Module:
    """A freshly initialised network that maps normalised images (B, 3, H, W) to logits.

    Initial weights are drawn from torch's global generator; seed it around the call.

    Args:
        name: `resnet18` (timm's, ImageNet stem), `resnet18-3x3` (CIFAR stem), `vit`,
            `vit-finetune`, `speed`, or any name timm knows.
        classes: width of the logits.
        image_size: side of the square input images in pixels.
        options: passed to the constructor of the network, or to `timm.create_model`.

    Raises:
        InputError: the name, a size or an option cannot be used.
        SourceError: pretrained weights were asked for and could not be had.
    """
    if classes < 1 or image_size < 1:
        raise InputError(
            f"classes and image_size must be at least 1, got {classes} and {image_size}"
        )
    if name in _BUILDERS:
        return _BUILDERS[name](classes, image_size, options)
    return _timm_model(name, classes, image_size, options)


def model_for(config: TrainConfig, classes: int, *, pretrained: bool = True) -> nn.Module:
    """The network of `config`, told how its inputs are normalised where it must know.

    Args:
        config: names the model, its options and the normalisation.
        classes: width of the logits.
        pretrained: False leaves out pretrained weights that others are about to replace.
    """
    options = dict(config.model_options)
    if config.model == "vit-finetune":
        options = {"input_mean": config.mean, "input_std": config.std, **options}
    if not pretrained and (config.model == "vit-finetune" or "pretrained" in options):
        options["pretrained"] = False
    return build_model(config.model, classes=classes, image_size=config.image_size, **options)


def _timm_config(name: str) -> Any:
    """What timm knows of `name`, an architecture with or without the tag of its weights."""
    import timm

    try:
        if timm.is_model(name):
            return timm.get_pretrained_cfg(name)
        known = [*_BUILDERS, *timm.list_models()]
    except RuntimeError:  # the architecture exists, the tag does not
        known = timm.list_models(f"{name.split('.')[0]}.*", pretrained=True)
    close = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=4)
    raise InputError(
        f"model {name!r} is unknown; close matches: {', '.join(close) or 'none'}. "
        f"Use {', '.join(_BUILDERS)} or a name of timm.list_models()."
    )


def _timm_model(name: str, classes: int, image_size: int, options: Options) -> nn.Module:
    """The `name` of timm, told the image size if it is built for one fixed size."""
    import timm

    if getattr(_timm_config(name), "fixed_input_size", False):
        options = {"img_size": image_size, **options}
    try:
        model: nn.Module = timm.create_model(name, num_classes=classes, **options)
    except Exception as error:  # what a constructor or a download raises is open-ended
        raise _timm_error(name, options, error) from error
    return model


def _timm_error(name: str, options: Options, error: Exception) -> Exception:
    """The error to report when timm could not make `name`."""
    if options.get("pretrained") and not isinstance(error, TypeError):
        return SourceError(
            f"the pretrained weights of {name!r} could not be had: {_told(error)}. Connect "
            "to the internet once (they are cached from then on), point HF_HOME at a folder that "
            "holds them, or train from scratch: pretrained=False, or a model such as 'vit'."
        )
    return InputError(
        f"timm cannot build {name!r} with {options}: {_told(error)}; change or drop these options"
    )


def _told(error: BaseException) -> str:
    """First line of the exception that began the chain, with its type."""
    cause = find_root_cause(error)
    lines = str(cause).strip().splitlines() or ["no message"]
    return f"{type(cause).__name__}: {lines[0].rstrip('.')}"


def _ours(name: str, network: type[nn.Module]) -> Callable[[int, int, Options], nn.Module]:
    """A builder of our own `network` that names the options there are."""

    def build(classes: int, image_size: int, options: Options) -> nn.Module:
        sizes = {"classes", "image_size"}
        known = [key for key in inspect.signature(network).parameters if key not in sizes]
        if unknown := sorted(set(options) - set(known)):
            raise InputError(f"model {name!r} has no option {unknown}; it has {', '.join(known)}")
        return network(classes=classes, image_size=image_size, **options)

    return build


def _resnet18(classes: int, image_size: int, options: Options) -> nn.Module:
    return _timm_model("resnet18", classes, image_size, options)


def _resnet18_3x3(classes: int, image_size: int, options: Options) -> nn.Module:
    """ResNet18 that keeps the full resolution of small images in its first stage."""
    model: Any = _timm_model("resnet18", classes, image_size, options)
    stem = nn.Conv2d(model.conv1.in_channels, model.conv1.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.conv1, model.maxpool = stem, nn.Identity()
    resnet: nn.Module = model
    return resnet


@contextmanager
def _unfused_attention(model: nn.Module) -> Iterator[None]:
    """Have timm's layers compute their attention explicitly inside the block."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]


class UpsampledBackbone(nn.Module):
    """A pretrained ViT behind an input adapter that works on the device.

    Small images, normalised for our own data, are normalised anew as the backbone was trained,
    then enlarged bicubically (smoothing against aliases is for shrinking).

    Args:
        backbone: timm's `VisionTransformer`; its `pretrained_cfg` names its mean and std.
        size: side in pixels of the images it takes.
        input_mean: per-channel mean the images come normalised with, of pixels in [0, 1].
        input_std: per-channel standard deviation likewise.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, backbone: Any, size: int, input_mean: Sequence[float], input_std: Sequence[float]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.size = size
        config = backbone.pretrained_cfg
        mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
        scale = torch.tensor(input_std) / std
        shift = (torch.tensor(input_mean) - mean) / std
        self.register_buffer("scale", scale.view(3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(3, 1, 1), persistent=False)

    def adapt(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) as the backbone wants them: (B, 3, size, size)."""
        renormalised = images * self.scale + self.shift
        return F.interpolate(
            renormalised, (self.size, self.size), mode="bicubic", align_corners=False
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of normalised images (B, 3, H, W)."""
        logits: Tensor = self.backbone(self.adapt(images))
        return logits

    @torch.no_grad()
    def record_attention(self, images: Tensor) -> AttentionRecord:
        """The attention of an evaluation pass; see `labkit.classify.vit.attention_rollout`."""
        from timm.utils.attention_extract import AttentionExtract

        with evaluating(self), _unfused_attention(self.backbone):
            maps = list(AttentionExtract(self.backbone)(self.adapt(images)).values())
        batch, length = maps[0].shape[0], maps[0].shape[2]
        readout = torch.zeros(batch, length, device=images.device)
        first = 0 if self.backbone.global_pool == "token" else self.backbone.num_prefix_tokens
        last = 1 if self.backbone.global_pool == "token" else length
        readout[:, first:last] = 1 / (last - first)
        return AttentionRecord(maps, readout, tuple(self.backbone.patch_embed.grid_size))


def _vit_finetune(classes: int, image_size: int, options: Options) -> nn.Module:
    """A pretrained ViT of timm for small images.

    Options: `backbone`, `pretrained` (True), `img_size` (that of the pretraining), `input_mean`
    and `input_std` (CIFAR-10's); the others go to timm.
    """
    from timm.models.vision_transformer import VisionTransformer as TimmTransformer

    settings = {"pretrained": True, **options}
    name = settings.pop("backbone", _FINETUNE_BACKBONE)
    mean = settings.pop("input_mean", CIFAR10_MEAN)
    std = settings.pop("input_std", CIFAR10_STD)
    size = settings.get("img_size") or _timm_config(name).input_size[-1]
    backbone: Any = _timm_model(name, classes, size, settings)
    if type(backbone) is not TimmTransformer or backbone.global_pool not in ("token", "avg"):
        raise InputError(
            f"backbone {name!r} is no plain Vision Transformer with a class token or mean pooling; "
            f"use one such as {_FINETUNE_BACKBONE!r}, or model={name!r} by itself"
        )
    return UpsampledBackbone(backbone, size, mean, std)


_BUILDERS: dict[str, Callable[[int, int, Options], nn.Module]] = {
    "resnet18": _resnet18,
    "resnet18-3x3": _resnet18_3x3,
    "vit": _ours("vit", VisionTransformer),
    "vit-finetune": _vit_finetune,
    "speed": _ours("speed", SpeedNet),
}

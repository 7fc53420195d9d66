"""Networks by name: timm's ResNet18 with two stems, our ViT, a fine-tuned ViT, a fast conv net."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.classify.config import CIFAR10_MEAN, CIFAR10_STD, TrainConfig
from labkit.classify.speednet import SpeedNet
from labkit.classify.vit import AttentionRecord, VisionTransformer, use_eval_mode
from labkit.runtime import InputError, SourceError, as_one_line, find_root_cause

_FINETUNE_BACKBONE = "vit_small_patch16_224.augreg_in21k_ft_in1k"


def list_models(*, timm: bool = False) -> list[str]:
    """The names of labkit's networks, and after them with `timm=True` those of timm.

    Example:
        >>> list_models()
        ['resnet18', 'resnet18-3x3', 'vit', 'vit-finetune', 'speed']
    """
    if not timm:
        return list(_NETWORKS)
    from timm import list_models as list_timm_models

    return list(dict.fromkeys([*_NETWORKS, *list_timm_models()]))


def create_model(
    name: str, *, num_classes: int = 10, image_size: int = 32, **options: Any
) -> nn.Module:
    """A freshly initialised network that maps normalised images (B, 3, H, W) to logits (B, C).

    Initial weights are drawn from torch's global generator; seed it around the call.

    Args:
        name: `resnet18` (timm's, ImageNet stem), `resnet18-3x3` (CIFAR stem), `vit`,
            `vit-finetune`, `speed`, or any name timm knows.
        num_classes: number of classes C.
        image_size: height and width of the images in pixels.
        options: passed to the constructor of the network, or to `timm.create_model`.

    Raises:
        InputError: the name, a size or an option cannot be used.
        SourceError: pretrained weights were asked for and could not be had.

    Example:
        >>> model = create_model("vit", num_classes=3, embed_dim=32, depth=2, num_heads=2)
        >>> model(torch.zeros(4, 3, 32, 32)).shape
        torch.Size([4, 3])
    """
    if num_classes < 1 or image_size < 1:
        raise InputError(
            f"num_classes and image_size must be at least 1, got {num_classes} and {image_size}"
        )
    create = _NETWORKS.get(name, partial(_create_timm_model, name))
    if isinstance(create, type):
        sizes = {"num_classes", "image_size"}
        known = [key for key in inspect.signature(create).parameters if key not in sizes]
        if unknown := sorted(set(options) - set(known)):
            raise InputError(f"model {name!r} has no option {unknown}; it has {', '.join(known)}")
    try:
        return create(num_classes=num_classes, image_size=image_size, **options)
    except TypeError as error:
        raise InputError(
            f"model {name!r} cannot be built with {options}: {as_one_line(error)}"
        ) from error


def create_from_config(
    config: TrainConfig, num_classes: int, *, pretrained: bool = True
) -> nn.Module:
    """The network of `config`, told how its images are normalised where it must know.

    Args:
        config: names the model, its options and the normalisation.
        num_classes: number of classes.
        pretrained: False leaves out pretrained weights that others are about to replace.
    """
    options = dict(config.model_options)
    if config.model == "vit-finetune":
        options = {"input_mean": config.mean, "input_std": config.std, **options}
    if not pretrained and (config.model == "vit-finetune" or "pretrained" in options):
        options["pretrained"] = False
    return create_model(
        config.model, num_classes=num_classes, image_size=config.image_size, **options
    )


def _find_timm_config(name: str) -> Any:
    """What timm knows of `name`, an architecture with or without the tag of its weights."""
    import timm

    try:
        if timm.is_model(name):
            return timm.get_pretrained_cfg(name)
        known = [*_NETWORKS, *timm.list_models()]
    except RuntimeError:  # the architecture exists, the tag does not
        known = timm.list_models(f"{name.split('.')[0]}.*", pretrained=True)
    close = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=4)
    raise InputError(
        f"model {name!r} is unknown; close matches: {', '.join(close) or 'none'}. "
        f"Use {', '.join(_NETWORKS)} or a name of timm.list_models()."
    )


def _create_timm_model(name: str, num_classes: int, image_size: int, **options: Any) -> nn.Module:
    """The `name` of timm, told the image size if it is built for one fixed size."""
    import timm

    if getattr(_find_timm_config(name), "fixed_input_size", False):
        options = {"img_size": image_size, **options}
    try:
        model: nn.Module = timm.create_model(name, num_classes=num_classes, **options)
    except Exception as error:  # what a constructor or a download raises is open-ended
        raise _describe_timm_error(name, options, error) from error
    return model


def _describe_timm_error(name: str, options: dict[str, Any], error: Exception) -> Exception:
    """The error to report when timm could not make `name`."""
    root = find_root_cause(error)
    lines = str(root).strip().splitlines() or ["no message"]
    cause = f"{type(root).__name__}: {lines[0].rstrip('.')}"
    if options.get("pretrained") and not isinstance(error, TypeError):
        return SourceError(
            f"the pretrained weights of {name!r} could not be had: {cause}. Connect "
            "to the internet once (they are cached from then on), point HF_HOME at a folder that "
            "holds them, or train from scratch: pretrained=False, or a model such as 'vit'."
        )
    return InputError(
        f"timm cannot build {name!r} with {options}: {cause}; change or drop these options"
    )


def _create_resnet18_3x3(num_classes: int, image_size: int, **options: Any) -> nn.Module:
    """ResNet18 that keeps the full resolution of small images in its first stage."""
    model: Any = _create_timm_model("resnet18", num_classes, image_size, **options)
    stem = nn.Conv2d(model.conv1.in_channels, model.conv1.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.conv1, model.maxpool = stem, nn.Identity()
    resnet: nn.Module = model
    return resnet


@contextmanager
def _use_explicit_attention(model: nn.Module) -> Iterator[None]:
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
        image_size: height and width in pixels of the images that the backbone takes.
        input_mean: per-channel mean the images come normalised with, of pixels in [0, 1].
        input_std: per-channel standard deviation likewise.
        crop_scale: smallest share of an image, in (0, 1], that a training step sees. A random
            rectangle of at least this area is enlarged, which is finer than a crop before.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        backbone: Any,
        image_size: int,
        input_mean: Sequence[float],
        input_std: Sequence[float],
        crop_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.crop_scale = crop_scale
        self.backbone = backbone
        self.image_size = image_size
        config = backbone.pretrained_cfg
        mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
        scale = torch.tensor(input_std) / std
        shift = (torch.tensor(input_mean) - mean) / std
        self.register_buffer("scale", scale.view(3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(3, 1, 1), persistent=False)

    def adapt(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) as the backbone wants them: (B, 3, image_size, image_size)."""
        renormalised = images * self.scale + self.shift
        if self.training and self.crop_scale < 1:
            return _enlarge_rectangles(renormalised, self.image_size, self.crop_scale)
        return F.interpolate(
            renormalised, (self.image_size, self.image_size), mode="bicubic", align_corners=False
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of normalised images (B, 3, H, W)."""
        logits: Tensor = self.backbone(self.adapt(images))
        return logits

    @torch.no_grad()
    def record_attention(self, images: Tensor) -> AttentionRecord:
        """The attention of a pass in evaluation mode; see `compute_attention_rollout`."""
        from timm.utils.attention_extract import AttentionExtract

        with use_eval_mode(self), _use_explicit_attention(self.backbone):
            maps = list(AttentionExtract(self.backbone)(self.adapt(images)).values())
        batch, length = maps[0].shape[0], maps[0].shape[2]
        readout = torch.zeros(batch, length, device=images.device)
        first = 0 if self.backbone.global_pool == "token" else self.backbone.num_prefix_tokens
        last = 1 if self.backbone.global_pool == "token" else length
        readout[:, first:last] = 1 / (last - first)
        return AttentionRecord(maps, readout, tuple(self.backbone.patch_embed.grid_size))


def _enlarge_rectangles(images: Tensor, image_size: int, crop_scale: float) -> Tensor:
    """Enlarge a random rectangle of each image (B, 3, H, W) to (B, 3, image_size, image_size).

    Its sides keep a share of those of the image between the square root of `crop_scale` and 1.
    """
    shares, places = torch.rand(2, len(images), 2, device=images.device)  # by x and y
    shares = crop_scale**0.5 + (1 - crop_scale**0.5) * shares
    centres = (2 * places - 1) * (1 - shares)  # the image reaches from -1 to 1
    transforms = torch.cat([torch.diag_embed(shares), centres.unsqueeze(2)], dim=2)  # (B, 2, 3)
    shape = [len(images), 3, image_size, image_size]
    grid = F.affine_grid(transforms, shape, align_corners=False)
    return F.grid_sample(images, grid, "bicubic", padding_mode="border", align_corners=False)


def _create_finetune_model(num_classes: int, image_size: int, **options: Any) -> nn.Module:
    """A pretrained ViT of timm for small images.

    Options: `backbone`, `pretrained` (True), `img_size` (that of the pretraining), `input_mean`
    and `input_std` (CIFAR-10's), `crop_scale` (1); the others go to timm.
    """
    from timm.models.vision_transformer import VisionTransformer as TimmTransformer

    settings = {"pretrained": True, **options}
    name = settings.pop("backbone", _FINETUNE_BACKBONE)
    mean = settings.pop("input_mean", CIFAR10_MEAN)
    std = settings.pop("input_std", CIFAR10_STD)
    crop_scale = settings.pop("crop_scale", 1.0)
    if not 0 < crop_scale <= 1:
        raise InputError(f"crop_scale must be above 0 and at most 1, got {crop_scale}")
    size = settings.get("img_size") or _find_timm_config(name).input_size[-1]
    backbone: Any = _create_timm_model(name, num_classes, size, **settings)
    if type(backbone) is not TimmTransformer or backbone.global_pool not in ("token", "avg"):
        raise InputError(
            f"backbone {name!r} is no plain Vision Transformer with a class token or mean pooling; "
            f"use one such as {_FINETUNE_BACKBONE!r}, or model={name!r} by itself"
        )
    return UpsampledBackbone(backbone, size, mean, std, crop_scale)


_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(_create_timm_model, "resnet18"),
    "resnet18-3x3": _create_resnet18_3x3,
    "vit": VisionTransformer,
    "vit-finetune": _create_finetune_model,
    "speed": SpeedNet,
}

"""What only our notebooks use: advice, parameters, Google Drive, and what keeps cells short."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from labkit import viz
from labkit.classify.augment import TrainLoader
from labkit.classify.config import TrainConfig, get_preset
from labkit.classify.data import ImageData, train_val_split
from labkit.classify.evaluate import evaluate
from labkit.classify.models import create_from_config
from labkit.runtime import InputError, resolve_precision, use_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def advise_gpu(device: torch.device, work: str = "training") -> str:
    """One line for the reader: what `work` will run on, or how to get a GPU.

    Example:
        >>> advise_gpu(torch.device("cpu")).startswith("No GPU found.")
        True
    """
    if device.type == "cuda":
        precision = resolve_precision("auto", device).name
        return f"GPU: {torch.cuda.get_device_name(device)}, {work} in {precision}."
    return (
        "No GPU found. In Colab: Runtime > Change runtime type > T4 GPU, then Run all again. "
        f"Without one, {work} runs on the {device.type.upper()} and takes far longer."
    )


def mount_drive(name: Path | str) -> Path:
    """The folder `labkit/<name>` of the user's Google Drive, mounted if it is not yet.

    Raises:
        InputError: this is not Colab.
    """
    try:
        from google.colab import drive
    except ImportError as error:
        raise InputError(
            "Google Drive can only be mounted in Colab; elsewhere set use_drive = False"
        ) from error
    drive.mount("/content/drive")
    return Path("/content/drive/MyDrive/labkit") / name


def make_config(
    preset: str,
    *,
    profile: str,
    data: str = "",
    image_size: int = 0,
    epochs: int = 0,
    seed: int = 0,
    val_size: int = 0,
) -> TrainConfig:
    """The recipe that the parameters of `q1.ipynb` describe.

    Args:
        preset: name of a recipe; the `demo` profile has one of its own, called `demo`.
        profile: `full` trains on CIFAR-10 or on `data`, `demo` on the embedded scenes.
        data: a source as `labkit.load_data` takes it, such as a folder of images; empty keeps the
            recipe's own.
        image_size: height and width in pixels to which the images of a folder are brought; 0 keeps
            the recipe's own.
        epochs: instead of the recipe's own; 0 keeps those.
        seed: random seed.
        val_size: number of training images for validation; 0 keeps the recipe's own.

    Raises:
        InputError: the preset or the profile is unknown, a number is out of range, or the `demo`
            profile was given other data than its own.

    Example:
        >>> make_config("vit", profile="demo", epochs=2).data
        'scenes'
    """
    if profile not in ("full", "demo"):
        raise InputError(f"profile must be 'full' or 'demo', got {profile!r}")
    if profile == "demo" and (data or image_size):
        raise InputError(
            "the profile 'demo' trains on scenes of 32 pixels; for data of your own and another "
            "image_size choose profile='full'"
        )
    options = {"data": data, "image_size": image_size, "epochs": epochs, "val_size": val_size}
    changes: dict[str, Any] = {name: value for name, value in options.items() if value}
    return get_preset("demo" if profile == "demo" else preset, seed=seed, **changes)


def name_run(config: TrainConfig) -> str:
    """The name of the folder of a run: preset and seed, and data and size where they are others.

    Example:
        >>> name_run(make_config("vit", profile="full", seed=1))
        'vit-seed1'
        >>> name_run(make_config("vit", profile="full", data="my/birds", image_size=48))
        'vit-birds-48px-seed0'
    """
    preset = get_preset(config.preset)
    parts = [config.preset]
    if config.data != preset.data:
        parts.append(Path(config.data).resolve().name)
    if config.image_size != preset.image_size:
        parts.append(f"{config.image_size}px")
    return "-".join([*parts, f"seed{config.seed}"])


def show_augmentations(
    data: ImageData, config: TrainConfig, *, images: int = 6, epochs: int = 6
) -> Figure:
    """What the model sees of the first training images in the first epochs."""
    loader = TrainLoader(data.train, config, torch.device("cpu"))
    indices = torch.arange(images)
    views = [loader.pixels(epoch, indices).permute(0, 2, 3, 1).numpy() for epoch in range(epochs)]
    return viz.plot_augmentations(data.train.images[:images], np.stack(views, axis=1), data.note)


def describe_untrained(data: ImageData, config: TrainConfig, device: str = "auto") -> str:
    """One line on the network before training: its size, and its accuracy on training images.

    The test split is not read.
    """
    _, sample = train_val_split(data.train, 1000)
    with use_seed(config.seed):
        model = create_from_config(config, len(data.classes), pretrained=False)
    metrics = evaluate(model, sample, mean=config.mean, std=config.std, device=device, tta=False)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{parameters:,} parameters, untrained: {metrics.accuracy:.1%} of 1,000 images right"

"""What only our notebooks use: advice, parameters, Google Drive, and what keeps cells short."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from labkit import viz
from labkit.classify.augment import TrainLoader
from labkit.classify.config import TrainConfig, get_preset
from labkit.classify.data import ImageData, train_val_split
from labkit.classify.evaluate import evaluate
from labkit.classify.fit import prepare
from labkit.classify.models import create_from_config
from labkit.classify.optim import set_lr
from labkit.images import load_image
from labkit.runtime import (
    InputError,
    Precision,
    World,
    pick_device,
    resolve_precision,
    use_seed,
)

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


def prepare_training(
    data: ImageData, config: TrainConfig, device: str = "auto"
) -> tuple[TrainLoader, nn.Module, Optimizer, GradScaler, Precision]:
    """What a training loop needs, as `labkit.fit` makes it: for a loop of one's own to read.

    Args:
        data: its training images are used.
        config: the recipe.
        device: `auto`, `cpu`, `cuda` or `cuda:<n>`.

    Returns:
        The loader of augmented batches; the untrained network in training mode; the optimiser, at
        a tenth of the peak learning rate, as no warm-up comes before; the scaler of the loss,
        which does nothing but in fp16; the precision.
    """
    target = pick_device(device)
    precision = resolve_precision(config.precision, target)
    config = dataclasses.replace(config, compile=False)
    with use_seed(config.seed):
        trainer, state = prepare(config, data.train, target, precision, World())
    state.model.train()
    set_lr(state.optimizer, 0.1)
    return trainer.loader, state.model, state.optimizer, state.scaler, precision


def load_own_image(source: str, data: ImageData) -> NDArray[np.uint8]:
    """The image to classify: (H, W, 3) uint8.

    Args:
        source: a path or an address; `upload` opens Colab's file chooser; "" takes the first
            image of the test split.
        data: the images of the run.

    Raises:
        InputError: `source` is no image, nothing was uploaded, or this is not Colab.
        SourceError: it could not be read or fetched.

    Example:
        >>> images, labels = np.zeros((2, 8, 8, 3), np.uint8), [0, 1]
        >>> data = ImageData.from_splits((images, labels), (images, labels))
        >>> load_own_image("", data).shape
        (8, 8, 3)
    """
    if not source:
        first: NDArray[np.uint8] = data.test.images[0]
        return first
    if source != "upload":
        return load_image(source)
    try:
        from google.colab import files
    except ImportError as error:
        raise InputError("only Colab can upload; elsewhere give the path of the image") from error
    uploaded: list[bytes] = list(files.upload().values())
    if not uploaded:
        raise InputError("nothing was uploaded; run the cell again, or give a path or an address")
    return load_image(uploaded[0])


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
    metrics = evaluate(model, sample, mean=config.mean, std=config.std, device=device, tta="none")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{parameters:,} parameters, untrained: {metrics.accuracy:.1%} of 1,000 images right"

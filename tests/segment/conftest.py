"""A CLIPSeg and a SAM-2 of random weights, tiny, in a profile of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import labkit
from labkit.runtime import use_seed
from labkit.segment.checkpoints import ClipSegPin, PresencePin, Profile, Sam2Pin
from labkit.segment.clipseg import ClipSeg
from labkit.segment.sam2 import Sam2, build_sam2

SIDE, LONGEST = 64, 24
CONFIG = Path(labkit.__file__).parent / "assets" / "sam2-tiny" / "sam2.yaml"
CPU = torch.device("cpu")


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def save_clipseg(folder: Path) -> None:
    """In half precision, as the assets are; the tokenizer knows single letters."""
    from transformers import (
        CLIPSegConfig,
        CLIPSegForImageSegmentation,
        CLIPSegProcessor,
        CLIPTokenizer,
        ViTImageProcessor,
    )
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    numbers = {token: number for number, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=numbers, merges=[], model_max_length=LONGEST)
    end = tokenizer.eos_token_id
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    special = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    text = {"vocab_size": len(tokens), "num_hidden_layers": 2, "max_position_embeddings": LONGEST}
    vision = {"image_size": SIDE, "patch_size": 8, "num_hidden_layers": 4}
    model = CLIPSegForImageSegmentation(
        CLIPSegConfig(
            text_config=size | special | text,
            vision_config=size | vision,
            projection_dim=32,
            reduce_dim=16,
            extract_layers=[0, 1, 3],
            decoder_num_attention_heads=2,
            decoder_intermediate_size=32,
            use_complex_transposed_convolution=False,
        )
    )
    enliven(model)
    model.half().save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    images = ViTImageProcessor(
        size=square, resample=2, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    CLIPSegProcessor(images, tokenizer).save_pretrained(folder)


@torch.no_grad()
def enliven(model: nn.Module) -> None:
    """Weights that keep the size of what passes through, so that the outputs differ visibly."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)


@pytest.fixture(scope="session")
def tiny_profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights")
    pin = Sam2Pin(source=str(folder), filename="sam2.safetensors", config=str(CONFIG))
    with use_seed(0):
        save_clipseg(folder / "clipseg")
        sam2 = build_sam2(pin)
        enliven(sam2)
    save_file(sam2.state_dict(), folder / pin.filename)
    return Profile(
        clipseg=ClipSegPin(source=str(folder / "clipseg")),
        sam2={"tiny": pin},
        default_sam2="tiny",
        presence=PresencePin(
            strength=1.0, contrast=2.0, rivalry=-2.0, agreement=1.0, constant=-0.5
        ),
        templates=("{}", "a {}"),
        note="random weights",
    )


@pytest.fixture(scope="session")
def clipseg(tiny_profile: Profile) -> ClipSeg:
    return ClipSeg.from_pin(tiny_profile.clipseg, CPU)


@pytest.fixture(scope="session")
def sam2(tiny_profile: Profile) -> Sam2:
    return Sam2.from_pin(tiny_profile.sam2["tiny"], CPU)


@pytest.fixture
def calls_of() -> Any:
    """A function that counts the forward passes of a module: the list grows by one for each."""
    handles = []

    def counter(module: nn.Module) -> list[int]:
        calls: list[int] = []
        handles.append(module.register_forward_hook(lambda *_: calls.append(1)))
        return calls

    yield counter
    for handle in handles:
        handle.remove()


CallsOf = Callable[[nn.Module], list[int]]

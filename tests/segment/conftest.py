"""A tiny CLIPSeg and SAM-2 of random weights in a profile, and a segmentation made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import labkit
from labkit.runtime import use_seed
from labkit.segment.checkpoints import Checkpoint, PresenceModel, Profile, Sam2Checkpoint
from labkit.segment.clipseg import ClipSeg
from labkit.segment.masks import encode_mask
from labkit.segment.presence import Evidence
from labkit.segment.results import Segmentation, SegmentedObject, SentenceResult
from labkit.segment.sam2 import Sam2, build_sam2

IMAGE_SIZE, LONGEST = 64, 24
CONFIG = Path(labkit.__file__).parent / "assets" / "sam2-tiny" / "sam2.yaml"
CPU = torch.device("cpu")
SHAPE = (30, 50)
SCORES = {"presence": 0.9, "grounding": 0.6, "predicted_iou": 0.8, "agreement": 0.7}
BOXES = {"cat": [(2, 3, 12, 9), (40, 20, 50, 30)], "horse": [], "dog": [(0, 0, 1, 1)]}


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_letter_tokenizer(longest: int, **options: Any) -> Any:
    """CLIP's tokenizer with a vocabulary of single letters, then its two special tokens."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    numbers = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=numbers, merges=[], model_max_length=longest, **options)


def save_clipseg(folder: Path) -> None:
    """In half precision, as the assets are; the tokenizer knows single letters."""
    from transformers import (
        CLIPSegConfig,
        CLIPSegForImageSegmentation,
        CLIPSegProcessor,
        ViTImageProcessor,
    )

    tokenizer = make_letter_tokenizer(LONGEST)
    end = tokenizer.eos_token_id
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    special = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    text = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "max_position_embeddings": LONGEST,
    }
    vision = {"image_size": IMAGE_SIZE, "patch_size": 8, "num_hidden_layers": 4}
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
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
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
    checkpoint = Sam2Checkpoint(source=str(folder), filename="sam2.safetensors", config=str(CONFIG))
    with use_seed(0):
        save_clipseg(folder / "clipseg")
        sam2 = build_sam2(checkpoint)
        enliven(sam2)
    save_file(sam2.state_dict(), folder / checkpoint.filename)
    return Profile(
        clipseg=Checkpoint(source=str(folder / "clipseg")),
        sam2={"tiny": checkpoint},
        default_sam2="tiny",
        presence=PresenceModel(
            peak=1.0, contrast=2.0, contrastive_margin=2.0, agreement=1.0, constant=-0.5
        ),
        templates=("{}", "a {}"),
        note="random weights",
    )


@pytest.fixture(scope="session")
def clipseg(tiny_profile: Profile) -> ClipSeg:
    return ClipSeg.from_checkpoint(tiny_profile.clipseg, CPU)


@pytest.fixture(scope="session")
def sam2(tiny_profile: Profile) -> Sam2:
    return Sam2.from_checkpoint(tiny_profile.sam2["tiny"], CPU)


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


def rectangle(left: int, top: int, right: int, bottom: int) -> NDArray[np.bool_]:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def make_object(sentence: str, box: tuple[int, int, int, int]) -> SegmentedObject:
    return SegmentedObject(sentence=sentence, rle=encode_mask(rectangle(*box)), box=box, **SCORES)


def make_result(sentence: str, *boxes: tuple[int, int, int, int]) -> SentenceResult:
    return SentenceResult(
        sentence=sentence,
        present=bool(boxes),
        presence=0.9 if boxes else 0.1,
        reason="" if boxes else "its highest probability is only 0.013",
        evidence=Evidence(peak=0.5, contrast=0.4, contrastive_margin=0.0),
        heat=np.zeros((12, 20), np.float32),
        prompts=(),
        objects=tuple(make_object(sentence, box) for box in boxes),
        size=SHAPE,
    )


@pytest.fixture
def segmentation() -> Segmentation:
    """Two cats, no horse and a dog."""
    return Segmentation(
        image=noise(*SHAPE),
        sentences=tuple(make_result(sentence, *boxes) for sentence, boxes in BOXES.items()),
        note="random weights",
        models={"SAM-2": "tiny (local)"},
    )


@pytest.fixture
def empty_segmentation(segmentation: Segmentation) -> Segmentation:
    """The same sentences, none of which was found."""
    return replace(segmentation, sentences=tuple(make_result(sentence) for sentence in BOXES))

"""Twins of the published models: full size, the hub's own file layout, random weights.

The small files say what those of the hub say at the pinned revision, its quirks included: an end
token of 2, which selects a legacy pooling, and an image processor named in an old way. The
vocabulary is made up, as large as CLIP's and with the same special tokens. Weights have the
published names, shapes and types (old versions of transformers saved `position_ids` too); a seed
always gives the same ones.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from labkit.segment.checkpoints import Profile, get_profile
from labkit.segment.sam2 import build_sam2

SIDE = 352
CLIPSEG_FILES = {
    "config.json": {
        "architectures": ["CLIPSegForImageSegmentation"],
        "model_type": "clipseg",
        "text_config": {"model_type": "clipseg_text_model", "bos_token_id": 0, "eos_token_id": 2},
        "vision_config": {"model_type": "clipseg_vision_model", "patch_size": 16},
        "extract_layers": [3, 6, 9],
        "reduce_dim": 64,
        "use_complex_transposed_convolution": True,
    },
    "preprocessor_config.json": {
        "feature_extractor_type": "ViTImageProcessor",
        "processor_class": "CLIPSegProcessor",
        "size": {"height": SIDE, "width": SIDE},
        "resample": 2,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
    "tokenizer_config.json": {
        "tokenizer_class": "CLIPTokenizer",
        "processor_class": "CLIPSegProcessor",
        "model_max_length": 77,
    },
    "special_tokens_map.json": {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    },
}
SENTENCES = (
    *("football player", "red bicycle", "wooden table", "white horse"),
    *("glass bottle", "small window", "open book", "yellow umbrella"),
)
"""Each word in them, and in the templates of the full profile, is one token, as in CLIP."""
TEXT_SIZE = 49_408
START, END = "<|startoftext|>", "<|endoftext|>"


def write_clipseg(folder: Path, seed: int = 0) -> Path:
    """Write a twin of CIDAS/clipseg-rd64-refined into `folder`; return it."""
    from safetensors.torch import save_file
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    folder.mkdir(parents=True)
    for name, content in CLIPSEG_FILES.items():
        (folder / name).write_text(json.dumps(content))
    tokens, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps({t: number for number, t in enumerate(tokens)}))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    config = CLIPSegConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = CLIPSegForImageSegmentation(config)
    weights = random_weights(model.state_dict(), seed)
    for tower in ("text_model", "vision_model"):
        count = len(weights[f"clip.{tower}.embeddings.position_embedding.weight"])
        weights[f"clip.{tower}.embeddings.position_ids"] = torch.arange(count)[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_sam2(folder: Path, seed: int = 0) -> Path:
    """Write a twin of facebook/sam2.1-hiera-tiny into `folder`; return it."""
    checkpoint = get_profile("full").get_sam2("tiny")
    folder.mkdir(parents=True)
    shutil.copy(checkpoint.find_config(), folder)
    weights = random_weights(build_sam2(checkpoint).state_dict(), seed)
    torch.save({"model": weights}, folder / checkpoint.filename)
    return folder


def local_profile(folder: Path) -> Profile:
    """The full profile with the twins in `folder`, written there if need be; only SAM-2 tiny."""
    full = get_profile("full")
    clipseg, sam2 = folder / "clipseg", folder / "sam2"
    if not clipseg.is_dir():
        write_clipseg(clipseg)
    if not sam2.is_dir():
        write_sam2(sam2)
    tiny = dataclasses.replace(full.get_sam2("tiny"), source=str(sam2), digest="")
    return dataclasses.replace(
        full,
        clipseg=dataclasses.replace(full.clipseg, source=str(clipseg), digest=""),
        sam2={"tiny": tiny},
        default_sam2="tiny",
        note="random weights",
    )


def random_weights(like: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Normal weights that keep the scale of what they map, small biases, gains of one."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, old in like.items():
        new = torch.empty(old.shape, dtype=old.dtype)
        if old.ndim > 1:
            new.normal_(0, old[0].numel() ** -0.5, generator=generator)
        elif name.endswith("weight"):
            new.fill_(1)
        else:
            new.normal_(0, 0.02, generator=generator)
        weights[name] = new
    return weights


def vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens in the order of their ids, and merges in the order of their rank, as CLIP has them.

    First bytes, then bytes that end a word, then a token for each merge, then start and end.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    texts = [t.format(s) for t in get_profile("full").templates for s in SENTENCES]
    merges: dict[tuple[str, str], None] = {}
    for word in dict.fromkeys(" ".join(texts).split()):
        pieces = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:
            pieces = _joined(pieces, pair)
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            merges[pair] = None
            pieces = _joined(pieces, pair)
    ends = [symbol + "</w>" for symbol in symbols]
    known = {*symbols, *ends, *map("".join, merges)}
    room = TEXT_SIZE - 2 - len(known)
    others = [pair for pair in product(symbols, repeat=2) if "".join(pair) not in known][:room]
    pairs = [*merges, *others]
    return [*symbols, *ends, *map("".join, pairs), START, END], pairs


def _joined(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined

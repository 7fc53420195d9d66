"""The tiny CLIPSeg: its architecture, how its weights begin, and how they are written."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTokenizer,
    ViTImageProcessor,
)
from vocabulary import MAX_TOKENS

ASSETS = Path(__file__).resolve().parents[1] / "labkit" / "assets" / "clipseg-tiny"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH_SIZE = 8
POSITIONS = "clip.vision_model.embeddings.position_embedding.weight"
TOKENS = "clip.text_model.embeddings.token_embedding.weight"


def create_config(tokenizer: CLIPTokenizer, image_size: int) -> CLIPSegConfig:
    """Return the configuration of a CLIPSeg with about 1.7 million weights for square images."""
    end_token = tokenizer.eos_token_id
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": end_token - 1,
        "eos_token_id": end_token,
        "pad_token_id": end_token,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": PATCH_SIZE,
    }
    return CLIPSegConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=96,
        reduce_dim=64,
        extract_layers=[1, 3, 5],
        decoder_num_attention_heads=4,
        decoder_intermediate_size=256,
        use_complex_transposed_convolution=False,
    )


class CLIPSegNetwork(nn.Module):
    """CLIPSeg in the three parts that training runs apart, for T = grid x grid patches."""

    def __init__(self, tokenizer: CLIPTokenizer, image_size: int) -> None:
        super().__init__()
        config = create_config(tokenizer, image_size)
        self._tokenizer, self._image_size = tokenizer, image_size
        self.grid = image_size // PATCH_SIZE
        self.embed_dim = config.vision_config.hidden_size
        self.clipseg = CLIPSegForImageSegmentation(config)
        _init_local_attention(self.clipseg, self.grid)

    def encode_images(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the outputs (B, 1 + T, embed_dim) of the layers that the decoder reads."""
        outputs = self.clipseg.clip.vision_model(images, output_hidden_states=True)
        return tuple(outputs.hidden_states[i + 1] for i in self.clipseg.extract_layers)

    def encode_sentences(self, sentences: list[str]) -> torch.Tensor:
        """Return the embeddings (S, projection) of S sentences."""
        tokens = self._tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
        return self.clipseg.clip.get_text_features(
            tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output

    def decode(self, layers: tuple[torch.Tensor, ...], embedded: torch.Tensor) -> torch.Tensor:
        """Return logits (B, K, H, W) for K embedded sentences (B, K, projection) an image."""
        count = embedded.shape[1]
        repeated = tuple(layer.repeat_interleave(count, 0) for layer in layers)
        logits = self.clipseg.decoder(repeated, embedded.flatten(0, 1)).logits
        return logits.view(-1, count, self._image_size, self._image_size)

    @torch.no_grad()
    def read(self, folder: Path) -> None:
        """Begin with the weights in a folder, of a model of another vocabulary and image size.

        The embeddings of its tokens are left out, those of positions are resized.
        """
        begun, weights = self.clipseg.state_dict(), load_file(folder / "model.safetensors")
        positions = weights[POSITIONS][1:].float()  # (grid * grid, embed_dim)
        size = math.isqrt(len(positions))
        maps = positions.T.reshape(1, -1, size, size)
        maps = F.interpolate(maps, size=(self.grid, self.grid), mode="bicubic")
        begun[POSITIONS][0] = weights.pop(POSITIONS)[0]
        begun[POSITIONS][1:] = maps.flatten(2)[0].T
        del weights[TOKENS]
        self.clipseg.load_state_dict({**begun, **weights})

    def write(self, folder: Path) -> None:
        """Write the weights in half precision, and all that a processor needs."""
        copy.deepcopy(self.clipseg).half().save_pretrained(folder)
        size = {"height": self._image_size, "width": self._image_size}
        images = ViTImageProcessor(size=size, resample=2, image_mean=MEAN, image_std=STD)
        CLIPSegProcessor(images, self._tokenizer).save_pretrained(folder)


@torch.no_grad()
def _init_local_attention(clipseg: nn.Module, grid: int) -> None:
    """Let attention begin with near patches: sine positions, and queries equal to keys.

    Source: Trockman and Kolter, Mimetic Initialization of Self-Attention Layers, 2023.
    """
    encoder = clipseg.clip.vision_model
    embed_dim = encoder.embeddings.position_embedding.weight.shape[1]
    frequencies = math.pi / 2 * torch.logspace(0, -3, embed_dim // 4, base=2)
    phases = torch.arange(grid)[:, None] * frequencies
    waves = torch.cat([phases.sin(), phases.cos()], 1)  # (grid, embed_dim / 2)
    rows = waves[:, None].expand(grid, grid, -1)
    positions = torch.cat([rows, rows.transpose(0, 1)], -1).reshape(grid * grid, embed_dim)
    encoder.embeddings.position_embedding.weight[1:] = 0.5 * positions
    for layer in encoder.encoder.layers:
        attention = layer.self_attn
        head_dim = embed_dim // attention.num_heads
        for head in range(attention.num_heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            basis = torch.linalg.qr(torch.randn(embed_dim, head_dim)).Q.T
            attention.q_proj.weight[part] = basis + 0.02 * torch.randn_like(basis)
            attention.k_proj.weight[part] = basis + 0.02 * torch.randn_like(basis)

"""Sentences and an image to heat maps, by CLIPSeg: the image is encoded once for all sentences.

Source: Lüddecke and Ecker, Image Segmentation Using Text and Image Prompts, 2022.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from labkit.runtime import (
    InputError,
    Precision,
    SourceError,
    as_one_line,
    resolve_precision,
    run_in_parts,
)
from labkit.segment.checkpoints import Checkpoint

_SENTENCES_AT_ONCE = 16
_END_MARKS = " .,;:!?。、،؛؟।"


def normalize_sentence(sentence: str) -> str:
    """Return the spelling that all spellings of a sentence share.

    Letter case, white space, punctuation at the end, invisible joiners and the Unicode form do not
    count. CLIPSeg is asked in this spelling, so that the masks do not depend on the user's.

    Args:
        sentence: any str.

    Returns:
        The sentence in lower case; "" if nothing is left of it.

    Example:
        >>> normalize_sentence(" Red  Ball."), normalize_sentence("red ball")
        ('red ball', 'red ball')
    """
    text = unicodedata.normalize("NFKC", sentence).casefold()
    text = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", text).split()).rstrip(_END_MARKS)


class ClipSeg:
    """A CLIPSeg with its processor, ready for inference."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        device: torch.device,
        precision: Precision,
    ) -> None:
        self.model, self.processor = model.to(device).eval(), processor
        self.device, self.precision = device, precision

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, device: torch.device) -> ClipSeg:
        """Load a CLIPSeg: in fp32 on a CPU, in fp16 or bf16 on a GPU.

        Raises:
            SourceError: the files could not be had, or are not those of a CLIPSeg.
        """
        from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

        folder = checkpoint.fetch_folder()
        try:
            processor = CLIPSegProcessor.from_pretrained(folder, local_files_only=True)
            model = _load_quietly(CLIPSegForImageSegmentation, folder)
            known, needed = len(processor.tokenizer), model.config.text_config.vocab_size
            if known != needed:
                raise ValueError(f"its tokenizer has {known} tokens, its model {needed}")
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = as_one_line(error)
            raise SourceError(
                f"{checkpoint.source} could not be loaded as a CLIPSeg: {reason}"
            ) from error
        except Exception as error:  # safetensors' own class has no other base
            if type(error).__name__ != "SafetensorError":
                raise
            raise SourceError(
                f"model.safetensors of {checkpoint.source} is damaged ({error}); remove it, so "
                f"that it is downloaded anew: {folder / 'model.safetensors'}"
            ) from error
        return cls(model, processor, device, resolve_precision("auto", device))

    @property
    def image_size(self) -> int:
        """Width and height in pixels of what the model sees, and of its square maps."""
        return int(self.processor.image_processor.size["height"])

    @property
    def patch_size(self) -> int:
        """Width and height in pixels of a patch of the vision tower, the grain of the maps."""
        return int(self.model.config.vision_config.patch_size)

    def predict_heat(
        self,
        image: NDArray[np.uint8],
        sentences: Sequence[str],
        templates: Sequence[str] = ("{}",),
    ) -> NDArray[np.float32]:
        """Predict how probable it is that each pixel belongs to what each sentence names.

        Args:
            image: (H, W, 3) uint8 RGB.
            sentences: S sentences of a few words each.
            templates: texts with one `{}`. Each sentence is filled into each of them, and the
                embeddings are averaged.

        Returns:
            (S, h, w) float32 in [0, 1], in the order of `sentences`: the whole image in its own
            proportions, its longer side as many pixels as CLIPSeg's.

        Raises:
            InputError: a sentence is too long for the model.
        """
        if not sentences:
            raise InputError("sentences must name at least one thing to look for, got none")
        embeddings = self._embed(sentences, templates)
        layers = self._encode(image)
        maps = run_in_parts(
            lambda part: self._decode(layers, embeddings[part], image.shape[:2]),
            len(sentences),
            size=_SENTENCES_AT_ONCE,
            what="sentences",
        )
        return np.concatenate(maps)

    def predict_square(self, sentence: str, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Predict the map of one sentence as the model gives it, squashed to a square.

        Args:
            sentence: a few words, used without a template.
            image: (H, W, 3) uint8 RGB.

        Returns:
            (image_size, image_size) float32 in [0, 1].
        """
        square = (self.image_size, self.image_size)
        maps = self._decode(self._encode(image), self._embed([sentence], ["{}"]), square)
        heat: NDArray[np.float32] = maps[0]
        return heat

    @torch.inference_mode()
    def _encode(self, image: NDArray[np.uint8]) -> tuple[Tensor, ...]:
        """Outputs (1, 1 + T, embed_dim) of the vision layers that the decoder reads."""
        inputs = self.processor(
            images=image, input_data_format="channels_last", return_tensors="pt"
        )
        with self.precision.autocast(self.device):
            outputs = self.model.clip.vision_model(
                inputs["pixel_values"].to(self.device),
                output_hidden_states=True,
                interpolate_pos_encoding=True,
            )
        return tuple(outputs.hidden_states[i + 1] for i in self.model.extract_layers)

    @torch.inference_mode()
    def _embed(self, sentences: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Embeddings (S, projection) of the sentences, averaged over the templates."""
        texts = [template.format(sentence) for sentence in sentences for template in templates]
        tokenizer = self.processor.tokenizer
        limit = self.model.config.text_config.max_position_embeddings
        encoded = tokenizer(texts, padding=True, return_tensors="pt")
        lengths = encoded["attention_mask"].sum(dim=1)  # (S * templates,) tokens
        if (length := int(lengths.max())) > limit:
            longest = sentences[int(lengths.argmax()) // len(templates)]
            raise InputError(
                f"a sentence must fit into {limit} tokens, got {longest[:60]!r} ... of {length}; "
                "name the thing in a few words"
            )
        with self.precision.autocast(self.device):
            outputs = self.model.clip.text_model(
                encoded["input_ids"].to(self.device),
                attention_mask=encoded["attention_mask"].to(self.device),
            )
            embeddings: Tensor = self.model.clip.text_projection(outputs.pooler_output)
        return embeddings.view(len(sentences), len(templates), -1).mean(dim=1)

    @torch.inference_mode()
    def _decode(
        self, layers: tuple[Tensor, ...], embeddings: Tensor, size: tuple[int, int]
    ) -> NDArray[np.float32]:
        """Maps (S, h, w) in the proportions of `size` (H, W), for S embedded sentences."""
        count = len(embeddings)
        with self.precision.autocast(self.device):
            expanded = tuple(layer.expand(count, -1, -1) for layer in layers)
            logits = self.model.decoder(expanded, embeddings).logits
        heat = logits.float().sigmoid()  # (S, image_size, image_size)
        shape = fit_size(size, heat.shape[-1])
        heat = F.interpolate(heat[:, None], size=shape, mode="bilinear", antialias=True)[:, 0]
        maps: NDArray[np.float32] = heat.clamp(0, 1).cpu().numpy()
        return maps


def fit_size(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Scale a size (H, W) so that its longer side has `longest` pixels and no side less than 1.

    Example:
        >>> fit_size((720, 1280), 352)
        (198, 352)
    """
    height, width = size
    scale = longest / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _load_quietly(model_class: Any, folder: Path) -> Any:
    """Load a model in fp32 without transformers' own progress bars and reports.

    Where a weight is missing, transformers puts a random one and goes on. Here that is a
    ValueError.
    """
    from transformers.utils import logging

    transformers_logging: Any = logging

    shows_bars = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        model, loading_info = model_class.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_bars:
            transformers_logging.enable_progress_bar()
    mismatched = [name for name, *_ in loading_info["mismatched_keys"]]
    if wrong := sorted([*loading_info["missing_keys"], *mismatched]):
        raise ValueError(
            f"{len(wrong)} weights are missing or of another shape, such as {wrong[0]}"
        )
    return model

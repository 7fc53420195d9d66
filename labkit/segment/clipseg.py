"""Sentences and an image to heat maps, by CLIPSeg: the image is encoded once for all sentences.

Source: Lüddecke and Ecker, Image Segmentation Using Text and Image Prompts, 2022.
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
_IMAGES_AT_ONCE = 16
_MOST_SHORTER = 3  # forms of a sentence
_KEPT_EMBEDDINGS = 64  # lists of sentences
_END_MARKS = " .,;:!?。、،؛؟।"


def _list_words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# English nouns whose plural follows no rule. Those of the first table also end compounds: snowman.
_COMPOUNDED = {
    "man": "men",
    "child": "children",
    "person": "people",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "knife": "knives",
    "wife": "wives",
    "leaf": "leaves",
    "loaf": "loaves",
    "wolf": "wolves",
    "calf": "calves",
    "half": "halves",
    "elf": "elves",
    "thief": "thieves",
    "scarf": "scarves",
    "hoof": "hooves",
    "dwarf": "dwarves",
}
_IRREGULAR = {
    "life": "lives",
    "mouse": "mice",
    "dormouse": "dormice",
    "louse": "lice",
    "ox": "oxen",
    "die": "dice",
    "quiz": "quizzes",
    "cactus": "cacti",
    "fungus": "fungi",
    "oasis": "oases",
    "crisis": "crises",
    "larva": "larvae",
    "bacterium": "bacteria",
    "axe": "axes",
    "axis": "axes",
}
_REGULAR = _list_words(  # in spite of how they end
    "human german roman shaman talisman ottoman caiman mongoose specimen abdomen omen"
)
_UNCHANGED = _list_words(
    "deer reindeer moose bison swine salmon trout tuna squid shrimp species series offspring "
    "scissors trousers pants jeans shorts tights leggings pyjamas pajamas sunglasses binoculars "
    "goggles headphones clothes clothing furniture luggage rice water snow sand grass wildlife "
    "news tennis chess ramen debris police hair bread"
)
_UNCHANGED_ENDINGS = ("sheep", "fish", "craft")
_SINGULAR_IN_S = _list_words(
    "gas canvas atlas lens iris pelvis trellis mantis ibis basis thermos rhinoceros"
)
_PLURAL_IN_US = _list_words("menus gnus emus gurus tutus haikus bayous caribous")
_SINGULAR_IN_USE = _list_words("fuse muse ruse use excuse recluse")
_SINGULAR_IN_CHE = ("headache", "toothache", "stache", "cache", "avalanche", "quiche", "niche")
_SINGULAR_IN_OE = ("shoe", "canoe", "oboe", "aloe", "tiptoe", "mistletoe")
_SINGULAR_IN_IE = _list_words(
    "cookie movie zombie brownie hoodie selfie smoothie magpie collie budgie goalie beanie cutie "
    "sweetie hippie rookie genie birdie prairie calorie necktie bowtie walkie-talkie"
)
_PLURAL_IN_OES = _list_words(
    "potato tomato hero echo mosquito volcano tornado mango torpedo buffalo domino"
)
_HARD_CH = ("stomach", "monarch", "epoch", "loch", "tech")  # said like k
_QUANTITIES = _list_words(
    "a an one two three four five six seven eight nine ten some any many several few all each "
    "every both this that these those another"
)
_DETERMINERS = _list_words("a an the my your his her its our their some")
_PREPOSITIONS = _list_words(
    "about above across against along among around at before behind below beneath beside between "
    "by for from in inside into near next of off on onto out outside over past through to toward "
    "towards under underneath upon with within without that which who whose"
)
_PARTICIPLES = _list_words(
    "wearing holding carrying riding sitting standing lying playing eating drinking walking "
    "running jumping flying swimming sleeping driving using watching reading looking"
)


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


def fill_template(template: str, sentence: str) -> str:
    """Fill a sentence into a template; a sentence with an article of its own needs no second one.

    Args:
        template: a text with one `{}`.
        sentence: in its normal spelling.

    Example:
        >>> fill_template("a photo of a {}", "dog"), fill_template("a photo of a {}", "the man")
        ('a photo of a dog', 'a photo of the man')
    """
    if sentence.partition(" ")[0] in _DETERMINERS:
        template = re.sub(r"\b(a|an|the) \{\}", "{}", template)
    return template.format(sentence)


def vary_sentence(sentence: str) -> list[str]:
    """Return other forms of a sentence that may name the same things.

    That is the sentence with its head noun in the other number, singular or plural, by the rules of
    English. The head noun is the last word before the first preposition, relative pronoun or
    participle. A number or article before it is left out.

    Args:
        sentence: any str.

    Returns:
        The forms in the spelling of `normalize_sentence`; none if the noun has only one form.

    Example:
        >>> vary_sentence("Dogs on a sofa"), vary_sentence("a man"), vary_sentence("sheep")
        (['dog on a sofa'], ['men'], [])
    """
    words = normalize_sentence(sentence).split()
    end = _find_end_of_head(words)
    start = 0
    while start < end and (words[start] in _QUANTITIES or words[start].isdigit()):
        start += 1
    other = _change_number(words[end - 1]) if start < end else ""
    return [" ".join([*words[start : end - 1], other, *words[end:]])] if other else []


def shorten_sentence(sentence: str) -> list[str]:
    """Return shorter forms of a sentence that name more things, the longest first, at most three.

    What comes after the head noun is left out first, then a number or article, then the words
    before the noun one by one, the first one first. The head noun is that of `vary_sentence`.

    Args:
        sentence: any str.

    Returns:
        The forms in the spelling of `normalize_sentence`; none if it is the noun alone.

    Example:
        >>> shorten_sentence("a large red ball on the grass"), shorten_sentence("ball")
        (['large red ball', 'red ball', 'ball'], [])
    """
    words = normalize_sentence(sentence).split()
    end, start = _find_end_of_head(words), 0
    while start < end - 1 and (words[start] in _QUANTITIES or words[start].isdigit()):
        start += 1
    forms = [" ".join(words[first:end]) for first in range(start, end)]
    return [form for form in forms if form != " ".join(words)][:_MOST_SHORTER]


def check_templates(templates: Sequence[str]) -> None:
    """Make sure that there is a template, and that each has one `{}` and no other brace.

    Raises:
        InputError: it is not so.
    """
    if isinstance(templates, str) or not templates:
        raise InputError(f"templates must be a list of one or more texts, got {templates!r}")
    for template in templates:
        if not isinstance(template, str) or not re.fullmatch(r"[^{}]*\{\}[^{}]*", template):
            shown = as_one_line(repr(template))
            raise InputError(f"a template must have one {{}} for the sentence, got {shown}")


def _find_end_of_head(words: Sequence[str]) -> int:
    """Position after the head noun."""
    for index, word in enumerate(words[1:], 1):
        following = words[index + 1] if index + 1 < len(words) else "the"
        is_participle = word in _PARTICIPLES and words[index - 1] not in _QUANTITIES | _DETERMINERS
        if word in _PREPOSITIONS or (is_participle and following in _PREPOSITIONS | _DETERMINERS):
            return index
    return len(words)


def _change_number(noun: str) -> str:
    """The plural of a singular noun, the singular of a plural one; "" where there is no other."""
    if not re.fullmatch(r"[^\W\d_]+(-[^\W\d_]+)*", noun) or not re.search(r"[a-zà-ÿ]$", noun):
        return ""
    if len(noun) < 2 or noun in _UNCHANGED or noun.endswith(_UNCHANGED_ENDINGS):
        return ""
    for singular, plural in _IRREGULAR.items():
        if noun in (singular, plural):
            return plural if noun == singular else singular
    if noun not in _REGULAR:
        for singular, plural in _COMPOUNDED.items():
            for ending, other in ((singular, plural), (plural, singular)):
                if noun.endswith(ending):
                    return noun.removesuffix(ending) + other
    return _make_singular(noun) if _is_plural(noun) else _make_plural(noun)


def _is_plural(noun: str) -> bool:
    """Whether a regular noun is a plural."""
    if not noun.endswith("s") or noun.endswith("ss") or noun in _SINGULAR_IN_S:
        return False
    return not noun.endswith("us") or noun in _PLURAL_IN_US


def _make_singular(noun: str) -> str:
    """The singular of a regular plural."""
    without_s, without_es = noun[:-1], noun[:-2]
    if noun.endswith("ies"):
        is_short = len(noun) <= 4  # ties, pies
        return without_s if is_short or without_s in _SINGULAR_IN_IE else noun[:-3] + "y"
    if noun.endswith("oes"):
        is_oe = len(noun) <= 4 or without_s.endswith(_SINGULAR_IN_OE)  # toes, shoes
        return without_s if is_oe else without_es
    if noun.endswith(("ches", "shes", "sses", "xes", "tzes", "zzes")):
        return without_s if without_s.endswith(_SINGULAR_IN_CHE) else without_es
    is_us = noun.endswith("uses") and not noun.endswith(("ouses", "auses"))
    if without_es in _SINGULAR_IN_S or (is_us and without_s not in _SINGULAR_IN_USE):
        return without_es
    return without_s


def _make_plural(noun: str) -> str:
    """The plural of a regular singular."""
    if re.search(r"([^aeiou]|qu)y$", noun):
        return noun[:-1] + "ies"
    if noun.endswith(("s", "x", "z", "ch", "sh")) and not noun.endswith(_HARD_CH):
        return noun + "es"
    return noun + ("es" if noun in _PLURAL_IN_OES else "s")


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image as CLIPSeg's decoder reads it, for any number of sentences.

    Attributes:
        layers: outputs (1, 1 + T, embed_dim) of the vision layers that the decoder reads.
        size: (H, W) of the image.
    """

    layers: tuple[Tensor, ...]
    size: tuple[int, int]


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
        self._embeddings: OrderedDict[tuple[tuple[str, ...], ...], Tensor] = OrderedDict()
        tower = model.clip.vision_model.encoder  # what comes after the last layer read is cut off
        tower.layers = tower.layers[: max(model.extract_layers) + 1]

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, device: torch.device) -> ClipSeg:
        """Load a CLIPSeg: in fp32 on a CPU, in fp16 or bf16 on a GPU.

        Raises:
            SourceError: the files could not be had, or are not those of a CLIPSeg.
        """
        from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

        folder = checkpoint.fetch_folder()
        with explain_load_failure(checkpoint, folder, "a CLIPSeg"):
            processor = CLIPSegProcessor.from_pretrained(  # nosec B615: a folder, verified before
                folder, local_files_only=True
            )
            model = load_quietly(CLIPSegForImageSegmentation, folder)
            known, needed = len(processor.tokenizer), model.config.text_config.vocab_size
            if known != needed:
                raise ValueError(f"its tokenizer has {known} tokens, its model {needed}")
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
        image: NDArray[np.uint8] | EncodedImage,
        sentences: Sequence[str],
        templates: Sequence[str] = ("{}",),
    ) -> NDArray[np.float32]:
        """Predict how probable it is that each pixel belongs to what each sentence names.

        Args:
            image: (H, W, 3) uint8 RGB, or what `encode` made of it.
            sentences: S sentences of a few words each.
            templates: texts with one `{}`. Each sentence is filled into each of them, and the
                embeddings are averaged.

        Returns:
            (S, h, w) float32 in [0, 1], in the order of `sentences`: the whole image in its own
            proportions, its longer side as many pixels as CLIPSeg's.

        Raises:
            InputError: a sentence is too long for the model, or a template has not one `{}`.
        """
        if not sentences:
            raise InputError("sentences must name at least one thing to look for, got none")
        check_templates(templates)
        embeddings = self._embed(sentences, templates)
        encoded = image if isinstance(image, EncodedImage) else self.encode(image)
        maps = run_in_parts(
            lambda part: self._decode(encoded.layers, embeddings[part], encoded.size),
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
        maps = self._decode(self.encode(image).layers, self._embed([sentence], ["{}"]), square)
        heat: NDArray[np.float32] = maps[0]
        return heat

    def encode(self, image: NDArray[np.uint8]) -> EncodedImage:
        """Encode an image (H, W, 3) uint8 RGB, once for all calls of `predict_heat`."""
        return self.encode_batch([image])[0]

    def encode_batch(self, images: Sequence[NDArray[np.uint8]]) -> list[EncodedImage]:
        """Encode images (H, W, 3) uint8 RGB of any sizes together, which is faster for many."""
        parts = run_in_parts(
            lambda part: self._encode(images[part]),
            len(images),
            size=_IMAGES_AT_ONCE,
            what="images",
        )
        return [encoded for part in parts for encoded in part]

    @torch.inference_mode()
    def _encode(self, images: Sequence[NDArray[np.uint8]]) -> list[EncodedImage]:
        inputs = [
            self.processor(images=image, input_data_format="channels_last", return_tensors="pt")
            for image in images
        ]
        pixels = torch.cat([each["pixel_values"] for each in inputs])  # (B, 3, size, size)
        with self.precision.autocast(self.device):
            outputs = self.model.clip.vision_model(
                pixels.to(self.device), output_hidden_states=True, interpolate_pos_encoding=True
            )
        layers = [outputs.hidden_states[i + 1] for i in self.model.extract_layers]
        return [
            EncodedImage(tuple(layer[i : i + 1] for layer in layers), image.shape[:2])
            for i, image in enumerate(images)
        ]

    def _embed(self, sentences: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Embeddings (S, projection) of the sentences, averaged over the templates.

        Those of the last 64 lists of sentences are kept. A list is kept as a whole, since in other
        company the last bits of an embedding differ.
        """
        key = tuple(sentences), tuple(templates)
        if key not in self._embeddings:
            self._embeddings[key] = self._compute_embeddings(sentences, templates)
            if len(self._embeddings) > _KEPT_EMBEDDINGS:
                self._embeddings.popitem(last=False)
        self._embeddings.move_to_end(key)
        return self._embeddings[key]

    @torch.inference_mode()
    def _compute_embeddings(self, sentences: Sequence[str], templates: Sequence[str]) -> Tensor:
        texts = [fill_template(template, s) for s in sentences for template in templates]
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


@contextlib.contextmanager
def explain_load_failure(checkpoint: Checkpoint, folder: Path, kind: str) -> Iterator[None]:
    """Turn what goes wrong while a model is loaded into a SourceError of one line.

    Args:
        checkpoint: the weights.
        folder: that holds them.
        kind: what the model should be, such as "a CLIPSeg".
    """
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = as_one_line(error)
        raise SourceError(f"{checkpoint.source} could not be loaded as {kind}: {reason}") from error
    except Exception as error:  # safetensors' own class has no other base
        if type(error).__name__ != "SafetensorError":
            raise
        raise SourceError(
            f"model.safetensors of {checkpoint.source} is damaged ({error}); remove it, so "
            f"that it is downloaded anew: {folder / 'model.safetensors'}"
        ) from error


def load_quietly(model_class: Any, folder: Path) -> Any:
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

"""The words, templates and tokenizers of the tiny CLIPSegs, for scenes and for photographs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from labkit.object_scenes import SCENE_COLOURS, SCENE_PATTERNS, SCENE_SHAPES
from labkit.segment.clipseg import vary_sentence

SCENE_WORDS = (*SCENE_SHAPES, *SCENE_COLOURS, *SCENE_PATTERNS)
TEMPLATES = ("{}", "a {}", "the {}", "a photo of a {}", "a photo of the {}", "a picture of a {}")
OTHER_NOUNS = (
    *("dog", "cat", "person", "man", "woman", "child", "player", "football player", "horse"),
    *("car", "truck", "bicycle", "road", "street", "house", "window", "door", "tree", "flower"),
    *("leaf", "grass", "mountain", "river", "beach", "boat", "plane", "cloud", "moon", "bird"),
    *("fish", "bear", "elephant", "cup", "bottle", "plate", "fork", "apple", "banana", "bread"),
    *("table", "chair", "lamp", "book", "phone", "screen", "keyboard", "shirt", "shoe", "hat"),
    *("tie", "glasses", "hand", "face", "ball", "kite", "clock", "sign", "wheel", "heart"),
)
"""Nouns that no scene shows; the model learns that they name nothing."""
STREET_SYNONYMS = {
    "building": ("house",),
    "pole": ("post", "lamp post"),
    "road": ("street",),
    "pavement": ("sidewalk",),
    "sign": ("traffic sign", "road sign"),
    "fence": ("railing",),
    "car": ("vehicle", "automobile"),
    "pedestrian": ("person",),
    "bicyclist": ("person", "cyclist"),
}
"""Other sentences for the classes of street photographs; a person is of either of two classes."""
STREET_NOUNS = (
    *("person", "man", "woman", "child", "player", "car", "truck", "bicycle", "road", "street"),
    *("house", "window", "door", "tree", "flower", "leaf", "grass", "cloud", "lamp", "screen"),
    *("shirt", "shoe", "hat", "tie", "glasses", "hand", "face", "clock", "sign", "wheel"),
)
"""Those of OTHER_NOUNS that may name something in a photograph of a street, labelled or not."""
MAX_TOKENS = 32


def name_classes(classes: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the sentences that name classes, and the indices of the classes that each names.

    A class is named by its name, by synonyms if it is one of a street, and by the plurals of both.

    Example:
        >>> name_classes(["sky", "fence"])["railings"]
        (1,)
    """
    named: dict[str, tuple[int, ...]] = {}
    for index, name in enumerate(classes):
        for singular in (name, *STREET_SYNONYMS.get(name, ())):
            for sentence in (singular, *vary_sentence(singular)):
                named[sentence] = (*named.get(sentence, ()), index)
    return named


def list_words(sentences: Iterable[str] = SCENE_WORDS) -> list[str]:
    """Return the words of sentences and templates, which become one token each, sorted."""
    filled = (template.replace("{}", "") for template in TEMPLATES)
    return sorted({word for text in (*sentences, *filled) for word in text.split()})


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Learn the byte pairs that join each of the words to one token.

    Source: Sennrich, Haddow and Birch, Neural Machine Translation of Rare Words with Subword
    Units, 2016.
    """
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while counts := Counter(pair for symbols in spellings for pair in pairwise(symbols)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spellings = [_join_pair(symbols, best) for symbols in spellings]
    return merges


def _join_pair(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Join `pair` to one symbol wherever it occurs."""
    joined: list[str] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def create_tokenizer(sentences: Iterable[str] = SCENE_WORDS) -> CLIPTokenizer:
    """Create CLIP's tokenizer for single bytes and the words of sentences.

    Its end token is not 2.
    """
    symbols = list(bytes_to_unicode().values())
    merges = learn_merges(list_words(sentences))
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)

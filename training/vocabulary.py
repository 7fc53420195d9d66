"""The words, templates and tokenizer of the tiny CLIPSeg."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from labkit.object_scenes import SCENE_COLOURS, SCENE_PATTERNS, SCENE_SHAPES

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
MAX_TOKENS = 32


def list_words() -> list[str]:
    """Return the words that become one token each, sorted."""
    filled = {word for template in TEMPLATES for word in template.replace("{}", "").split()}
    return sorted({*SCENE_SHAPES, *SCENE_COLOURS, *SCENE_PATTERNS, *filled})


def learn_merges() -> list[tuple[str, str]]:
    """Learn the byte pairs that join each of the words to one token.

    Source: Sennrich, Haddow and Birch, Neural Machine Translation of Rare Words with Subword
    Units, 2016.
    """
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in list_words()]
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


def create_tokenizer() -> CLIPTokenizer:
    """Create CLIP's tokenizer for single bytes and the words; its end token is not 2."""
    symbols = list(bytes_to_unicode().values())
    merges = learn_merges()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)

"""Words, templates and tokenizer of the tiny CLIPSeg."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from labkit.object_scenes import SCENE_COLOURS, SCENE_PATTERNS, SCENE_SHAPES

TEMPLATES = ("{}", "a {}", "the {}", "a photo of a {}", "a photo of the {}", "a picture of a {}")
STRANGERS = (
    *("dog", "cat", "person", "man", "woman", "child", "player", "football player", "horse"),
    *("car", "truck", "bicycle", "road", "street", "house", "window", "door", "tree", "flower"),
    *("leaf", "grass", "mountain", "river", "beach", "boat", "plane", "cloud", "moon", "bird"),
    *("fish", "bear", "elephant", "cup", "bottle", "plate", "fork", "apple", "banana", "bread"),
    *("table", "chair", "lamp", "book", "phone", "screen", "keyboard", "shirt", "shoe", "hat"),
    *("tie", "glasses", "hand", "face", "ball", "kite", "clock", "sign", "wheel", "heart"),
)
"""Things that no scene shows: any other word must find nothing too."""
LONGEST = 32


def words() -> list[str]:
    """The words that become one token each, sorted."""
    filled = {word for template in TEMPLATES for word in template.replace("{}", "").split()}
    return sorted({*SCENE_SHAPES, *SCENE_COLOURS, *SCENE_PATTERNS, *filled})


def merges() -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich, Haddow and Birch, 2016) that join each of `words` to a token."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words()]
    found = []
    while pairs := Counter(p for word in spelled for p in pairwise(word)):
        pair = min(pairs, key=lambda p: (-pairs[p], p))
        found.append(pair)
        spelled = [_joined(word, pair) for word in spelled]
    return found


def _joined(word: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for symbol in word:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer over single bytes and `words`; its end token is not 2."""
    symbols = list(bytes_to_unicode().values())
    pairs = merges()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in pairs)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    numbers = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=numbers, merges=pairs, model_max_length=LONGEST)

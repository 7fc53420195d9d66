"""The words for what scenes show, and the sentences made of them."""

from __future__ import annotations

from dataclasses import dataclass

SCENE_SHAPES = ("circle", "square", "triangle", "star")
SCENE_PATTERNS = ("plain", "striped", "dotted")
SCENE_COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.13, 0.13),
    "yellow": (0.93, 0.82, 0.12),
    "green": (0.13, 0.62, 0.20),
    "blue": (0.15, 0.30, 0.88),
    "purple": (0.62, 0.20, 0.75),
    "white": (0.94, 0.94, 0.94),
}


@dataclass(frozen=True)
class SceneObject:
    """What an object looks like, in the words that sentences use."""

    shape: str
    colour: str
    pattern: str

    @property
    def sentences(self) -> tuple[str, ...]:
        """The four sentences that name the object, from the least to the most specific."""
        return (
            self.shape,
            f"{self.colour} {self.shape}",
            f"{self.pattern} {self.shape}",
            f"{self.colour} {self.pattern} {self.shape}",
        )


SCENE_SENTENCES: tuple[str, ...] = tuple(
    sorted(
        {
            sentence
            for shape in SCENE_SHAPES
            for colour in SCENE_COLOURS
            for pattern in SCENE_PATTERNS
            for sentence in SceneObject(shape, colour, pattern).sentences
        }
    )
)


def one_word_apart(first: str, second: str) -> bool:
    """Whether the sentences are as long as each other and differ in one word."""
    a, b = first.split(), second.split()
    return len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1

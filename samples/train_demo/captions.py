"""The prompt language: one sentence per scene in a few paraphrases, over a small vocabulary."""

from __future__ import annotations

import random

from scenes import (
    BACKGROUND_COLOURS,
    DIRECTIONS,
    OBJECT_COLOURS,
    SHAPES,
    SIZES,
    SPEEDS,
    TEXTURES,
    Item,
    Scene,
)

SPECIAL = ("<pad>", "</s>", "<unk>")
FUNCTION_WORDS = (
    "a", "the", "and", "on", "over", "behind", "while", "with", "of", "in", "front",
    "moves", "moving", "going", "goes", "to", "background", "camera", "pans", "is", "static",
    "pillar", "object", "video", ",", ".",
)  # fmt: skip


def vocabulary() -> tuple[str, ...]:
    """Every token, special ones first; the position is the id."""
    words = (*SHAPES, *DIRECTIONS, *TEXTURES, *SIZES, *SPEEDS, *OBJECT_COLOURS, *BACKGROUND_COLOURS)
    return tuple(dict.fromkeys((*SPECIAL, *FUNCTION_WORDS, *words)))


# Whose word it is: the text encoder learns to tell them apart.
ROLES = ("main", "second", "background", "camera")
Tagged = list[tuple[str, str]]


def _noun(item: Item, size: bool, role: str) -> Tagged:
    words = [item.size] if size else []
    return [("a", "main"), *((w, role) for w in (*words, item.colour, item.shape))]


def _motion(verb: str, item: Item, speed: bool, role: str) -> Tagged:
    words = [item.direction, item.speed] if speed else [item.direction]
    return [(verb, "main"), *((w, role) for w in words)]


def tagged_caption(scene: Scene, rng: random.Random | None = None) -> Tagged:
    """The caption's words with their roles; words of grammar count as `main`.

    Without `rng` the full canonical sentence, else a random paraphrase, which may leave out size,
    speed or texture, never colour, shape, direction or the background's colour.
    """
    if rng is None:
        verb, ground, size, speed, texture = "moves", "over", True, True, True
    else:
        verb = rng.choice(("moves", "moves", "moving", "goes", "going"))
        ground = rng.choice(("over", "on", "with", ","))
        size, speed, texture = (rng.random() < 0.88 for _ in range(3))
    words = _noun(scene.item, size, "main") + _motion(verb, scene.item, speed, "main")
    if scene.pillar is not None:
        words += [(w, "main") for w in ("behind", "a", "pillar")]
    if scene.second is not None:
        words += [("and", "main"), *_noun(scene.second, size, "second")]
        words += _motion(verb, scene.second, speed, "second")
    words += [(w, "main") for w in ([ground] if ground == "," else [ground, "a"])]
    words += [(scene.texture, "background")] if texture else []
    words += [(scene.background, "background"), ("background", "background")]
    if scene.pan is not None:
        words += [(w, "main") for w in ("while", "the", "camera", "pans")]
        words.append((scene.pan, "camera"))
    elif rng is not None and rng.random() < 0.05:
        words += [(w, "main") for w in ("while", "the", "camera", "is", "static")]
    if rng is not None and rng.random() < 0.1:
        words.append((".", "main"))
    return words


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Describe `scene`, see `tagged_caption`."""
    sentence = " ".join(word for word, _ in tagged_caption(scene, rng))
    return sentence.replace(" ,", ",").replace(" .", ".")

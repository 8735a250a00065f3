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


def _noun(item: Item, size: bool) -> str:
    return " ".join(["a", *([item.size] if size else []), item.colour, item.shape])


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Describe `scene`. Without `rng` the full canonical sentence, else a random paraphrase.

    Paraphrases may leave out size, speed or texture, never colour, shape, direction or the
    background's colour.
    """
    item = scene.item
    if rng is None:
        verb, ground, size, speed, texture = "moves", "over", True, True, True
    else:
        verb = rng.choice(("moves", "moves", "moving", "goes", "going"))
        ground = rng.choice(("over", "on", "with", ","))
        size, speed, texture = (rng.random() < 0.88 for _ in range(3))
    words = [_noun(item, size), verb, item.direction]
    words += [item.speed] if speed else []
    if scene.pillar is not None:
        words.append("behind a pillar")
    if scene.second is not None:
        words += ["and", _noun(scene.second, size), verb, scene.second.direction]
        words += [scene.second.speed] if speed else []
    words += [ground] if ground == "," else [ground, "a"]
    words += [scene.texture] if texture else []
    words += [scene.background, "background"]
    if scene.pan is not None:
        words.append(f"while the camera pans {scene.pan}")
    elif rng is not None and rng.random() < 0.05:
        words.append("while the camera is static")
    sentence = " ".join(words).replace(" ,", ",")
    return sentence + "." if rng is not None and rng.random() < 0.1 else sentence

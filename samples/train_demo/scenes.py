"""What a clip shows: scene attributes, how training scenes are drawn, which are held out.

A scene is a frozen dataclass of names (what the caption says) and numbers (where things are).
Lengths are fractions of the frame's shorter side and speeds are lengths per frame, so the
same scene can be rendered at any size and clip length.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import dataclass, replace
from functools import cache

SHAPES = ("circle", "square", "triangle", "star")
DIRECTIONS = ("left", "right", "up", "down")
TEXTURES = ("plain", "striped", "checkered", "dotted", "cloudy")
SIZES = {"small": 0.105, "large": 0.155}  # radius of the circle; other shapes have its area
SPEEDS = {"slowly": 0.26 / 32, "quickly": 0.50 / 32}
PANS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
PAN_SPEED = 0.30 / 32

OBJECT_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 40),
    "green": (40, 190, 60),
    "blue": (45, 80, 235),
    "yellow": (245, 225, 45),
    "purple": (165, 55, 215),
    "orange": (250, 135, 25),
    "cyan": (40, 215, 225),
    "white": (245, 245, 245),
}
BACKGROUND_COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (28, 28, 30),
    "gray": (108, 108, 108),
    "white": (212, 212, 209),
    "red": (122, 44, 46),
    "green": (40, 104, 54),
    "blue": (38, 56, 122),
    "purple": (88, 48, 118),
}
PILLAR_COLOUR = (62, 44, 30)
HELD_OUT_SHARE = 0.1
EXTENT = {"circle": 1.0, "square": 0.886, "triangle": 1.555, "star": 1.541}  # reach / radius


@dataclass(frozen=True)
class Item:
    """One moving object. `centre` is where its path lies in the room that the
    frame leaves it, in [0, 1] on both axes; `sprite` and `phase` choose its shading."""

    shape: str
    colour: str
    size: str
    direction: str
    speed: str
    centre: tuple[float, float] = (0.5, 0.5)
    speed_factor: float = 1.0
    radius_factor: float = 1.0
    sprite: int = 0
    phase: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Everything that decides the pixels of a clip, and the caption's words.

    `offset` shifts an object's path inside the room that the frame leaves it, in [0, 1] on both
    axes; `waves` seeds the cloudy texture.
    """

    item: Item
    background: str
    texture: str
    period: float = 0.2
    angle: float = 0.0
    phase: tuple[float, float] = (0.0, 0.0)
    waves: int = 0
    pan: str | None = None
    pillar: float | None = None
    second: Item | None = None

    @property
    def simple(self) -> bool:
        """One object, a static camera and nothing in front: what the checker can judge."""
        return self.pan is None and self.pillar is None and self.second is None


@cache
def held_out(colour: str, shape: str, direction: str, background: str) -> bool:
    """Whether this combination never occurs in training, for any size, speed or texture."""
    digest = hashlib.sha256(f"{colour} {shape} {direction} {background}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < HELD_OUT_SHARE


@cache
def combinations(unseen: bool) -> tuple[tuple[str, str, str, str], ...]:
    """All (colour, shape, direction, background) of one side of the split, in a fixed order."""
    every = itertools.product(OBJECT_COLOURS, SHAPES, DIRECTIONS, BACKGROUND_COLOURS)
    return tuple(c for c in every if c[0] != c[3] and held_out(*c) == unseen)


def _item(rng: random.Random, colour: str, shape: str, direction: str) -> Item:
    return Item(
        shape=shape,
        colour=colour,
        size=rng.choice(tuple(SIZES)),
        direction=direction,
        speed=rng.choice(tuple(SPEEDS)),
        centre=(rng.random(), rng.random()),
        speed_factor=rng.uniform(0.92, 1.08),
        radius_factor=rng.uniform(0.95, 1.05),
        sprite=rng.randrange(3),
        phase=rng.random(),
    )


def sample_simple(rng: random.Random, unseen: bool = False) -> Scene:
    """Draw one single-object, static-camera scene from the chosen side of the split."""
    colour, shape, direction, background = rng.choice(combinations(unseen))
    return Scene(
        item=_item(rng, colour, shape, direction),
        background=background,
        texture=rng.choice(TEXTURES),
        period=rng.uniform(0.16, 0.26),
        angle=rng.choice((0.0, 0.25, 0.5, 0.75)),
        phase=(rng.random(), rng.random()),
        waves=rng.randrange(2**31),
    )


def sample_scene(rng: random.Random, simple_share: float = 0.65) -> Scene:
    """Draw one training scene: simple, or with any of a pan, a pillar and a second object."""
    scene = sample_simple(rng)
    if rng.random() < simple_share:
        return scene
    extra = rng.randrange(1, 8)  # at least one of the three
    if extra & 1:
        scene = replace(scene, pan=rng.choice(tuple(PANS)))
    if extra & 2:
        scene = replace(scene, pillar=rng.uniform(0.3, 0.7))
    if extra & 4:
        colours = [c for c in OBJECT_COLOURS if c not in (scene.item.colour, scene.background)]
        second = _item(rng, rng.choice(colours), rng.choice(SHAPES), rng.choice(DIRECTIONS))
        scene = replace(scene, second=second)
    return scene

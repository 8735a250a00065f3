"""Adherence of the demo model: does the clip show what the prompt says?

The prompt language and the checker belong to the demo model and lie beside it, in
samples/train_demo of the repository; an installed package without the repository has neither.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np

from dit_accel.errors import DitAccelError
from dit_accel.models.find import demo_folder

OTHER_SCENES = ("pillar", "pans", " and ")
"""Words of scenes that the checker is not made for: it judges one object, camera still."""


@dataclass(frozen=True)
class Wanted:
    """What a prompt asks for; its fields are the checker's attributes."""

    colour: str
    shape: str
    direction: str
    background: str


def missing() -> str | None:
    """Why adherence cannot be measured here, or None."""
    try:
        folder = _checker_folder()
    except DitAccelError:
        return "the demo model's checker is part of the repository (samples/train_demo), not here"
    return None if folder.is_dir() else f"the demo model's checker is missing ({folder})"


def adherence(video: np.ndarray, prompt: str) -> tuple[float | None, str | None]:
    """Share of colour, background, shape and direction that are as the prompt says.

    Args:
        video: [T, H, W, 3], uint8.

    Returns:
        The share in [0, 1] and None; or None and why the prompt cannot be checked.
    """
    wanted = read_prompt(prompt)
    if isinstance(wanted, str):
        return None, wanted
    seen = _module("checker").observe(video)
    agreed = [getattr(seen, name) == value for name, value in vars(wanted).items()]
    return sum(agreed) / len(agreed), None


def read_prompt(prompt: str) -> Wanted | str:
    """What a prompt in the demo model's language asks for, or why it cannot be checked."""
    text = " ".join(prompt.lower().split())
    for word in OTHER_SCENES:
        if word in text:
            return f"the checker judges one object under a still camera, not {word.strip()!r}"
    scenes = _module("scenes")
    colour, shape = _one_of(scenes.OBJECT_COLOURS), _one_of(scenes.SHAPES)
    match = re.search(
        rf"\b{colour} {shape} (?:moves|moving|goes|going) {_one_of(scenes.DIRECTIONS)}\b"
        rf".*\b{_one_of(scenes.BACKGROUND_COLOURS)} background",
        text,
    )
    if match is None:
        return "the prompt is not in the demo model's language"
    return Wanted(*match.groups())


def _one_of(words: object) -> str:
    return f"({'|'.join(words)})"  # type: ignore[arg-type]


def _checker_folder() -> Path:
    return demo_folder().parent / "train_demo"


@cache
def _module(name: str) -> ModuleType:
    """A module of samples/train_demo: they import each other by bare names, given back at once."""
    folder = str(_checker_folder())
    before = set(sys.modules)
    sys.path.insert(0, folder)
    try:
        return import_module(name)
    finally:
        sys.path.remove(folder)
        for other in set(sys.modules) - before:
            file = getattr(sys.modules[other], "__file__", None)
            if file is not None and Path(file).parent == Path(folder):
                del sys.modules[other]

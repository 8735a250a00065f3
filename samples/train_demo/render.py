"""Scenes to pixels: batched, anti-aliased, on any device, the same scene at any size.

Positions are in units of the frame's shorter side; (x, y) = (0, 0) is the frame's top left
corner. Shapes are signed distances turned into coverage over one pixel.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from scenes import (
    BACKGROUND_COLOURS,
    EXTENT,
    OBJECT_COLOURS,
    PAN_SPEED,
    PANS,
    PILLAR_COLOUR,
    SHAPES,
    SIZES,
    SPEEDS,
    TEXTURES,
    Item,
    Scene,
)

PILLAR_WIDTH = 0.13
CONTRAST = 0.18
WAVES = 6


def item_path(
    item: Item, frames: int, width: float, height: float
) -> tuple[float, float, float, float]:
    """Start (x, y) and velocity (x, y) per frame such that the whole path stays in the frame."""
    speed = SPEEDS[item.speed] * item.speed_factor
    dx, dy = PANS[item.direction]
    reach = SIZES[item.size] * item.radius_factor * EXTENT[item.shape]
    start = []
    for length, component, place in ((width, dx, item.centre[0]), (height, dy, item.centre[1])):
        travel = abs(component) * speed * (frames - 1)
        room = max(length - 2 * reach - travel, 0.0)
        middle = length / 2 + (place - 0.5) * room
        start.append(middle - component * speed * (frames - 1) / 2)
    return start[0], start[1], dx * speed, dy * speed


def _waves(seed: int) -> list[list[float]]:
    rng = random.Random(seed)
    rows = []
    for _ in range(WAVES):
        turn, frequency = rng.random() * 2 * math.pi, rng.uniform(1.5, 4.5)
        kx, ky = math.cos(turn) * frequency, math.sin(turn) * frequency
        rows.append([kx, ky, rng.random()])
    return rows


def _item_row(item: Item, frames: int, width: float, height: float) -> list[float]:
    radius = SIZES[item.size] * item.radius_factor
    row = [*item_path(item, frames, width, height), radius, SHAPES.index(item.shape)]
    return [*row, item.sprite, item.phase, *(c / 255 for c in OBJECT_COLOURS[item.colour])]


def _square_wave(phase: torch.Tensor, sharpness: torch.Tensor) -> torch.Tensor:
    return (torch.sin(2 * math.pi * phase) * sharpness).clamp(-1, 1)


def shape_distance(
    x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor, shape: torch.Tensor
) -> torch.Tensor:
    """Signed distance to shapes of equal area pi*radius^2 about the origin, y pointing down."""
    circle = (x * x + y * y).sqrt() - radius
    square = torch.maximum(x.abs(), y.abs()) - EXTENT["square"] * radius
    low = y - 0.5 * EXTENT["triangle"] * radius
    side = (math.sqrt(3) * x.abs() - y) / 2 - 0.5 * EXTENT["triangle"] * radius
    triangle = torch.maximum(low, side)
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    fold = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    r, tip = (x * x + y * y).sqrt(), EXTENT["star"] * radius
    ex, ey = 0.45 * math.cos(sector / 2) - 1, 0.45 * math.sin(sector / 2)
    norm = math.hypot(ex, ey)
    star = (ey * (r * torch.cos(fold) - tip) - ex * r * torch.sin(fold)) / norm
    out = torch.where(shape == 0, circle, square)
    return torch.where(shape == 2, triangle, torch.where(shape == 3, star, out))


def _texture(
    u: torch.Tensor, v: torch.Tensor, rows: dict[str, torch.Tensor], pixel: float
) -> torch.Tensor:
    """Lightness modulation in [-1, 1] at texture coordinates (u, v), period 1, any shape."""
    kind, period = rows["texture"], rows["period"]
    sharp = period / pixel / 5.0  # edges of about one and a half pixels
    a = rows["angle"] * math.pi
    along = u * torch.cos(a) + v * torch.sin(a)
    stripes = _square_wave(along, sharp)
    checks = _square_wave(u / 1.6, sharp * 1.6) * _square_wave(v / 1.6, sharp * 1.6)
    du, dv = u - torch.floor(u) - 0.5, v - torch.floor(v) - 0.5
    dots = ((0.27 - (du * du + dv * dv).sqrt()) * period / pixel).clamp(-0.5, 0.5) * 1.4 + 0.3
    cloud = torch.zeros_like(u)
    for i in range(WAVES):
        kx, ky, p = (rows["waves"][..., i, j] for j in range(3))
        cloud = cloud + torch.sin(2 * math.pi * ((u * kx + v * ky) * period + p))
    cloud = (cloud / WAVES * 2.2).clamp(-1, 1)
    out = torch.where(kind == 1, stripes, torch.zeros_like(u))
    out = torch.where(kind == 2, checks, out)
    return torch.where(kind == 3, dots, torch.where(kind == 4, cloud, out))


def _paint_item(
    image: torch.Tensor, row: torch.Tensor, x: torch.Tensor, y: torch.Tensor, pixel: float
) -> torch.Tensor:
    """Blend one object per clip over image [N, 3, T, H, W]; row is [N, 11] of `_item_row`."""
    time = torch.arange(image.shape[2], device=image.device).view(1, -1, 1, 1)
    x0, y0, vx, vy, radius, shape, sprite, phase = (row[:, i].view(-1, 1, 1, 1) for i in range(8))
    dx, dy = x - (x0 + vx * time), y - (y0 + vy * time)
    coverage = (0.5 - shape_distance(dx, dy, radius, shape) / pixel).clamp(0, 1)
    shade = torch.where(
        sprite == 1,
        _square_wave(dy / radius * 1.2 + phase, radius / pixel / 5),
        torch.where(sprite == 2, torch.cos(4.5 * (dx * dx + dy * dy).sqrt() / radius), 0 * dx),
    )
    colour = row[:, 8:11].view(-1, 3, 1, 1, 1) * (1 + 0.14 * (shade - 0.5))[:, None]
    alpha = (coverage * (radius > 0))[:, None]
    return image + (colour.clamp(0, 1) - image) * alpha


@torch.no_grad()
def render(
    scenes: Sequence[Scene],
    frames: int,
    height: int,
    width: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Render scenes to clips [N, 3, frames, height, width], float32 in [-1, 1]."""
    short = min(height, width)
    pixel, wide, high = 1 / short, width / short, height / short

    def table(values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)

    empty = [0.0] * 11
    first = table([_item_row(s.item, frames, wide, high) for s in scenes])
    second = table([_item_row(s.second, frames, wide, high) if s.second else empty for s in scenes])
    backdrop = table(
        [
            [TEXTURES.index(s.texture), s.period, s.angle, *s.phase, *PANS.get(s.pan or "", (0, 0))]
            for s in scenes
        ]
    )
    colours = table([[c / 255 for c in BACKGROUND_COLOURS[s.background]] for s in scenes])
    pillar = table([-1.0 if s.pillar is None else s.pillar * wide for s in scenes])
    waves = table([_waves(s.waves) for s in scenes])

    columns = (torch.arange(width, device=device) + 0.5) * pixel
    lines = (torch.arange(height, device=device) + 0.5) * pixel
    x, y = columns.view(1, 1, 1, -1), lines.view(1, 1, -1, 1)
    moving = any(s.pan for s in scenes)
    time = torch.arange(frames if moving else 1, device=device).view(1, -1, 1, 1)
    kind, period, angle, pu, pv, px, py = (backdrop[:, i].view(-1, 1, 1, 1) for i in range(7))
    u = (x + px * PAN_SPEED * time) / period + pu + 0 * y
    v = (y + py * PAN_SPEED * time) / period + pv + 0 * x
    rows = {
        "texture": kind,
        "period": period,
        "angle": angle,
        "waves": waves[:, None, None, None],
    }
    shade = 1 + CONTRAST * _texture(u, v, rows, pixel)
    image = (colours.view(-1, 3, 1, 1, 1) * shade[:, None]).clamp(0, 1)
    image = image.expand(-1, -1, frames, -1, -1)
    if any(s.second for s in scenes):
        image = _paint_item(image, second, x, y, pixel)
    image = _paint_item(image, first, x, y, pixel)
    if any(s.pillar is not None for s in scenes):
        middle = pillar.view(-1, 1, 1, 1)
        cover = (0.5 - ((x - middle).abs() - PILLAR_WIDTH / 2) / pixel).clamp(0, 1)
        alpha = (cover * (middle >= 0))[:, None]
        tone = table([c / 255 for c in PILLAR_COLOUR]).view(1, 3, 1, 1, 1)
        image = image + (tone - image) * alpha
    return image * 2 - 1


def to_uint8(clips: torch.Tensor) -> torch.Tensor:
    """[N, 3, T, H, W] in [-1, 1] to frames [N, T, H, W, 3], uint8."""
    frames = ((clips.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return frames.permute(0, 2, 3, 4, 1).contiguous()

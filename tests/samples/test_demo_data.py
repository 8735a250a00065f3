"""The demo model's data: scenes, captions, renderer, checker, held-out split, optimizer."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "samples" / "train_demo"))

from captions import caption, tagged_caption, vocabulary  # noqa: E402
from checker import ATTRIBUTES, observe_all, score, wilson  # noqa: E402
from muon import Muon, clock_rate, orthogonalise  # noqa: E402
from render import item_path, render, to_uint8  # noqa: E402
from scenes import (  # noqa: E402
    EXTENT,
    SIZES,
    combinations,
    held_out,
    sample_scene,
    sample_simple,
)


def scenes(count: int, seed: int = 0, **kwargs) -> list:
    rng = random.Random(seed)
    return [sample_simple(rng, **kwargs) for _ in range(count)]


def test_rendering_is_deterministic_and_in_range():
    rng = random.Random(3)
    batch = [sample_scene(rng, 0.3) for _ in range(4)]
    first, second = render(batch, 5, 32, 48), render(batch, 5, 32, 48)
    assert first.shape == (4, 3, 5, 32, 48)
    assert torch.equal(first, second)
    assert first.min() >= -1 and first.max() <= 1


def test_a_clip_does_not_depend_on_its_batch():
    batch = scenes(3)
    alone = torch.cat([render([s], 5, 32, 32) for s in batch])
    assert torch.allclose(alone, render(batch, 5, 32, 32), atol=1e-5)


def test_objects_stay_in_the_frame():
    for scene in scenes(200, seed=5):
        x, y, vx, vy = item_path(scene.item, 33, 1.0, 1.0)
        reach = SIZES[scene.item.size] * scene.item.radius_factor * EXTENT[scene.item.shape]
        for position in (x, x + 32 * vx, y, y + 32 * vy):
            assert reach - 0.02 <= position <= 1 - reach + 0.02


def test_captions_name_the_attributes_in_known_words():
    words = set(vocabulary())
    assert len(vocabulary()) == len(words) <= 128
    rng = random.Random(1)
    for _ in range(200):
        scene = sample_scene(rng)
        sentence = caption(scene, rng)
        split = sentence.replace(",", " ,").replace(".", " .").split()
        assert set(split) <= words
        item = scene.item
        assert {item.colour, item.shape, item.direction, scene.background} <= set(split)
        roles = dict((w, r) for w, r in tagged_caption(scene, None) if r == "background")
        assert scene.background in roles


def test_canonical_caption():
    scene = scenes(1)[0]
    item = scene.item
    assert caption(scene) == (
        f"a {item.size} {item.colour} {item.shape} moves {item.direction} {item.speed} "
        f"over a {scene.texture} {scene.background} background"
    )


def test_held_out_combinations_never_occur_in_training():
    unseen, seen = set(combinations(True)), set(combinations(False))
    assert not unseen & seen
    assert 0.05 < len(unseen) / (len(unseen) + len(seen)) < 0.15
    rng = random.Random(9)
    for _ in range(500):
        scene = sample_scene(rng)
        item = scene.item
        assert not held_out(item.colour, item.shape, item.direction, scene.background)


@pytest.fixture(scope="module")
def observed():
    batch = scenes(60, seed=21)
    clips = [to_uint8(render([s], 17, 96, 96))[0].numpy() for s in batch]
    return batch, observe_all(clips, threads=2)


def test_checker_reads_rendered_truth(observed):
    batch, seen = observed
    for attribute, hits in score(seen, batch).items():
        assert sum(hits) >= 0.97 * len(hits), attribute


def test_checker_is_at_chance_on_wrong_prompts(observed):
    batch, seen = observed
    rates = {a: sum(h) / len(h) for a, h in score(seen, batch[1:] + batch[:1]).items()}
    assert set(rates) == set(ATTRIBUTES)
    assert max(rates.values()) < 0.45


def test_wilson_interval():
    low, high = wilson(64, 128)
    assert low == pytest.approx(0.4146, abs=1e-3) and high == pytest.approx(0.5854, abs=1e-3)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 64, 16), (2, 16, 64)])
def test_orthogonalise(shape):
    generator = torch.Generator().manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=generator)))
    assert values.max() < 1.3 and values.min() > 0.3


def test_muon_solves_a_small_regression():
    torch.manual_seed(0)
    target, weight = torch.randn(8, 8), torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon([weight], lr=0.1)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.1 * clock_rate(step / 200)
        loss = (weight - target).square().mean()
        weight.grad = None
        loss.backward()
        optimizer.step()
    assert loss < 0.01

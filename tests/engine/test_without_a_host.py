"""Kernels and engine work where neither diffusers nor ComfyUI can be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

BLOCKED = """
import sys

class Blocked:
    names = {"diffusers", "transformers", "accelerate", "comfy"}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
try:
    import diffusers
except ImportError:
    pass
else:
    raise AssertionError("diffusers is there")

import dit_accel, dit_accel.engine.attend, dit_accel.engine.session
import dit_accel.kernels.block_sparse, dit_accel.kernels.selectors
import torch
from dit_accel.layout import TokenLayout

LAYOUT = TokenLayout((3, 10, 11), after=7)
torch.manual_seed(0)
q, k, v = (torch.randn(2, LAYOUT.length, 3, 32) for _ in range(3))

def dense(mask=None):
    rows = (x.transpose(1, 2).double() for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*rows, mask).transpose(1, 2)
"""
KERNEL = """
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.patterns import pattern, plan_for
from dit_accel.kernels.reference import dense_mask

rule = pattern("sliding_tile", window={"tiles": [3, 1, 1]}, tile=[1, 4, 4])
plan = plan_for(LAYOUT, rule, "cpu")
mask = dense_mask(plan, 1, 1)
assert 0.1 < mask.float().mean() < 0.9
out = block_sparse_attention(q, k, v, plan)
assert torch.allclose(out.double(), dense(mask), atol=1e-5)
"""
ENGINE = """
from dit_accel.engine.attend import attend
from dit_accel.engine.call import Call, Moment, Row, Site
from dit_accel.engine.policy import Policy
from dit_accel.engine.profile import load_profile, parse_profile
from dit_accel.engine.run import Run
from dit_accel.engine.session import Session, Settings
from dit_accel.kernels.geometry.blocks import blocks_of
from dit_accel.kernels.reference import dense_mask
from dit_accel.kernels.selectors import Context

assert load_profile("balanced", "wan").rules
profile = parse_profile('''
[profile]
name = "mine"
breakeven = false
[[rule]]
compute = "block_topk"
density = 0.4
tile = [1, 4, 4]
[[rule]]
steps = [0.0, 0.5]
compute = "dense"
''')
site = Site("blocks.0.attn", 0, 1, "self")
session = Session(Policy(profile, [site]), Settings(strict=True))
run = Run(2)

def stock():
    return dense().float()

seen = []
session.observers.append(seen.append)
outs = []
for step in range(2):
    moment = Moment(run, "transformer", step, 2, (Row(""),), {"video": LAYOUT})
    call = Call(q, k, v, None, 0.0, False, None, "bshd", False, stock)
    outs.append(attend(call, site, moment, session))
assert torch.equal(outs[0], stock())

compute = session.decide(site, moment).compute
blocks = blocks_of(LAYOUT, compute.tiling(LAYOUT, "lengths"), "cpu")
plan = compute.select(Context(q, k, v, blocks, q.shape[-1] ** -0.5, 3))
mask = dense_mask(plan, 2, 3)
assert torch.allclose(outs[1].double(), dense(mask), atol=1e-5)

report = run.report("mine", "own", "Own").to_dict()["self"]
assert (report["calls"], report["dense"], report["sparse"]) == (2, 1, 1), report
assert abs(report["kept_density"] - mask.double().mean()) < 1e-9, report
assert 0.3 < report["kept_density"] < 0.6 and [s.outcome for s in seen] == ["dense", "sparse"]
run.end()
"""


@pytest.mark.parametrize("code", [KERNEL, ENGINE], ids=["kernels", "engine"])
def test_runs_without_a_host(code: str, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + code],
        cwd=tmp_path, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

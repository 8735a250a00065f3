"""Every small pipeline of tests/conftest.py: stock; each shipped profile of its family, "dense" and
"auto" with break-even off, on each backend that runs on a CPU (3 steps, 6 with two experts; triton,
interpreted: balanced and fast, 2 steps); "auto" with break-even on; the defaults; the error of
strict; and a profile with a union, patterns by head and reuse. Of each run: the sha256 of the
latents, and the receipt without times and forecasts."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from golden_kernels import digest, rounded

BUILDERS = (
    "wan",
    "wan_two_experts",
    "wan_image",
    "hunyuan_video",
    "cogvideox",
    "ltx_video",
    "flux",
)
BACKENDS = ("torch", "reference")
PROFILES = ("dense", "auto", "quality", "balanced", "fast")
INTERPRETED = ("balanced", "fast")
INTERPRETED_STEPS = 2
COUNTS = ("calls", "sparse", "reused", "dense", "launched_density", "kept_density")
# What is kept of a receipt; other keys have times, or may come later.
TOP = ("profile", "family", "model", "steps")
KIND = (*COUNTS, "dense_reasons", "backends")
LAYER = ("site", "layer", "kind", *COUNTS)
STEP = ("step", *COUNTS)
CACHE = ("peak_bytes", "limit_bytes", "refused")
MIXED = """
[profile]
name = "mixed"
breakeven = false

[[rule]]
union = [{compute = "neighborhood", window = {tokens = [3, 3, 3]}, exact = true}, "temporal_band"]

[[rule]]
layers = "1"
heads = {"0" = {compute = "radial", decay = 0.2}, "-1" = "dense"}

[[rule]]
layers = "2"
reuse = {every = 2}

[[rule]]
attention = "cross"
steps = [0.2, 1.0]
reuse = {every = 2}
"""


def names() -> list[str]:
    """<builder>/<run>, where a run is <profile>/<backend> or one of the single ones."""
    runs = [f"{profile}/{backend}" for profile in PROFILES for backend in BACKENDS]
    runs += [f"{profile}/triton" for profile in INTERPRETED]
    runs += ["stock", "breakeven", "defaults", "strict", *(f"mixed/{b}" for b in BACKENDS)]
    return [f"{builder}/{run}" for builder in BUILDERS for run in runs]


def run(name: str, tree: Path) -> dict[str, Any]:
    """The entry `name`: a pipeline is built anew, enabled and run."""
    builder, _, what = name.partition("/")
    made = conftest(tree).BUILDERS[builder]()
    made.pipe.set_progress_bar_config(disable=True)
    if what == "stock":
        return {"latents": digest(made.run())}
    steps = INTERPRETED_STEPS if what.endswith("/triton") else made.steps
    enable(made.pipe, what)
    latents = made.run(num_inference_steps=steps)
    return {"latents": digest(latents), "receipt": receipt(made.pipe)}


def enable(pipe: Any, what: str) -> None:
    profile, _, backend = what.partition("/")
    always = {"breakeven": False}
    if what == "defaults":
        pipe.enable_sparse_attention()
    elif what == "breakeven":
        pipe.enable_sparse_attention("auto", backend="torch")
    elif what == "strict":
        pipe.enable_sparse_attention("balanced", backend="torch", strict=True)
    elif profile == "mixed":
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "mixed.toml"
            file.write_text(MIXED)
            pipe.enable_sparse_attention(file, backend=backend)
    else:
        pipe.enable_sparse_attention(profile, backend=backend, overrides=always)


def receipt(pipe: Any) -> dict[str, Any]:
    """The receipt's explicit keys, densities rounded."""
    data = pipe.sparse_attention_report().to_dict()
    return {
        **kept(data, TOP),
        **{kind: kept(data[kind], KIND) for kind in ("self", "cross")},
        "per_layer": [kept(row, LAYER) for row in data["per_layer"]],
        "per_step": [kept(row, STEP) for row in data["per_step"]],
        "cache": kept(data["cache"], CACHE),
    }


def kept(table: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: rounded(table[key]) for key in keys if key in table}


@lru_cache(maxsize=1)
def conftest(tree: Path) -> ModuleType:
    """tests/conftest.py of a tree, whose BUILDERS make the pipelines."""
    spec = importlib.util.spec_from_file_location("golden_conftest", tree / "tests/conftest.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import dit_accel  # noqa: F401  (gives pipelines the methods)

    return module

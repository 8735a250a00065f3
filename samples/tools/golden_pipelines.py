"""Every small pipeline of tests/conftest.py: stock; each shipped profile of its family, "dense" and
"auto" with break-even off, on each backend that runs on a CPU (3 steps, 6 with two experts; triton,
interpreted: balanced and fast, 2 steps), where windows cover most of it; the shipped profiles
again (balanced on reference too), and one with a union, patterns by head and reuse, on larger
inputs, and balanced with a narrow window, where they do not; "auto" with break-even on; the
defaults; and the error of strict. Of each run: the sha256 of the latents, and the receipt without
times and forecasts."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from golden_kernels import digest, rounded

BUILDERS: dict[str, dict[str, int]] = {
    "wan": {"height": 224, "width": 256},
    "wan_two_experts": {"height": 224, "width": 256},
    "wan_image": {"height": 192, "width": 256},
    "hunyuan_video": {"height": 128, "width": 96},
    "cogvideox": {"height": 192, "width": 224},
    "ltx_video": {"height": 384, "width": 448},
    "flux": {"height": 416, "width": 512},
}
"""Each pipeline with larger inputs of it, some 800 tokens."""
BACKENDS = ("torch", "reference")
SHIPPED = ("quality", "balanced", "fast")
PROFILES = ("dense", "auto", *SHIPPED)
INTERPRETED = ("balanced", "fast")
INTERPRETED_STEPS = 2
NARROW = {"window": {"tiles": [1, 1, 1]}, "tile": [2, 4, 8]}
COUNTS = ("calls", "sparse", "reused", "dense", "launched_density", "kept_density")
# What is kept of a receipt; other keys have times, or may come later.
TOP = ("profile", "family", "model", "steps")
KIND = (*COUNTS, "dense_reasons", "backends")
LAYER = ("site", "layer", "kind", *COUNTS)
STEP = ("step", *COUNTS)
CACHE = ("peak_bytes", "refused")
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
    """<builder>/<run>, where a run is one of the single ones, or <profile or kind>/<backend>."""
    runs = ["stock", "defaults", "breakeven", "strict"]
    runs += [f"{profile}/{backend}" for profile in PROFILES for backend in BACKENDS]
    runs += [f"{profile}/triton" for profile in INTERPRETED]
    runs += [*(f"larger-{profile}/torch" for profile in SHIPPED), "larger-balanced/reference"]
    runs += [f"narrow/{backend}" for backend in (*BACKENDS, "triton")]
    runs += [f"mixed/{backend}" for backend in BACKENDS]
    return [f"{builder}/{run}" for builder in BUILDERS for run in runs]


def run(name: str, tree: Path) -> dict[str, Any]:
    """The entry `name`: a pipeline is built anew, enabled and run."""
    builder, _, what = name.partition("/")
    torch.manual_seed(0)  # builders leave some weights to the generator as it stands
    made = conftest(tree).BUILDERS[builder]()
    made.pipe.set_progress_bar_config(disable=True)
    if what == "stock":
        return {"latents": digest(made.run())}
    enable(made.pipe, what)
    changes = dict(BUILDERS[builder]) if what.startswith(("larger-", "mixed")) else {}
    if what.endswith("/triton"):
        changes["num_inference_steps"] = INTERPRETED_STEPS
    return {"latents": digest(made.run(**changes)), "receipt": receipt(made.pipe)}


def enable(pipe: Any, what: str) -> None:
    """Enable a run's profile, with break-even off but where it is the subject."""
    kind, _, backend = what.partition("/")
    if what == "defaults":
        pipe.enable_sparse_attention()
    elif what == "breakeven":
        pipe.enable_sparse_attention("auto", backend="torch")
    elif what == "strict":
        pipe.enable_sparse_attention("balanced", backend="torch", strict=True)
    elif kind == "mixed":
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "mixed.toml"
            file.write_text(MIXED)
            pipe.enable_sparse_attention(file, backend=backend)
    else:
        narrow = NARROW if kind == "narrow" else {}
        profile = "balanced" if kind == "narrow" else kind.removeprefix("larger-")
        overrides = {"breakeven": False, **narrow}
        pipe.enable_sparse_attention(profile, backend=backend, overrides=overrides)


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

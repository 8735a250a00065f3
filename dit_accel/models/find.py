"""Which model is meant: a folder, a Hub id or the demo; everything that can be known about it
before its weights are loaded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dit_accel.catalog import supported_models
from dit_accel.errors import DitAccelError, nearest
from dit_accel.home import ROOT
from dit_accel.pipelines.registry import PRESETS

INDEX = "model_index.json"
DEMO = "demo"
DEMO_DEFAULTS = {
    "height": 192,
    "width": 192,
    "num_frames": 33,
    "num_inference_steps": 12,
    "guidance_scale": 2.5,
}
"""What the demo model was made for; other models keep the defaults of their pipelines."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_IMAGE_PIPELINES = {
    "FluxPipeline": "FluxImg2ImgPipeline",
    "LTXPipeline": "LTXImageToVideoPipeline",
}
"""Pipelines that start from an image with the very weights of a text-only one."""


@dataclass(frozen=True)
class Model:
    """A model in diffusers' format, weights not loaded.

    Args:
        source: its folder, or its id on the Hub.
        index: its model_index.json.
        configs: config.json of its autoencoder and transformers.
        demo: whether this is the demo model of the repository.
    """

    source: str
    index: dict[str, Any]
    configs: dict[str, dict[str, Any]]
    revision: str | None = None
    demo: bool = False
    family: str = field(default="", compare=False)

    def pipeline_name(self, with_image: bool = False) -> str:
        """Class of the pipeline; with an image, the sibling that takes one where there is one."""
        name = self.index["_class_name"]
        if not with_image:
            return name
        if name == "WanPipeline" and self.index.get("expand_timesteps"):
            return "WanImageToVideoPipeline"  # Wan 2.2 TI2V: one set of weights for both
        return _IMAGE_PIPELINES.get(name, name)


def demo_folder() -> Path:
    """Where the demo model lies in a checkout; raises DitAccelError where there is none."""
    for root in (ROOT, Path.cwd()):
        if (root / "samples" / "demo-model" / INDEX).is_file():
            return root / "samples" / "demo-model"
    raise DitAccelError(
        "the demo model is not here: it is part of dit_accel's repository "
        "(samples/demo-model), not of the installed package. Clone the repository and run "
        "`make demo`, or this command, inside it; or give --model a folder or a Hub id."
    )


def find_model(name: str, revision: str | None = None) -> Model:
    """The model that `--model` names, with its configuration, and checked to be supported.

    Reads local files, or fetches the few small configuration files of a model of the Hub.
    """
    if name == DEMO and not Path(name, INDEX).is_file():
        folder = demo_folder()
        return _supported(_local(folder, demo=True))
    path = Path(name).expanduser()
    if path.exists() or not _HUB_ID.fullmatch(name):
        if revision is not None:
            raise DitAccelError(f"--revision is for models of the Hub; {name} is a local folder")
        _check_folder(path, name)
        return _supported(_local(path, demo=_is_demo(path)))
    return _supported(_from_hub(name, revision))


def _is_demo(path: Path) -> bool:
    try:
        return path.samefile(demo_folder())
    except DitAccelError:
        return False


def _local(folder: Path, demo: bool) -> Model:
    index = _read_json(folder / INDEX)
    configs = {
        name: _read_json(folder / name / "config.json")
        for name in _sized_parts(index)
        if (folder / name / "config.json").is_file()
    }
    return Model(str(folder), index, configs, demo=demo)


def _sized_parts(index: dict[str, Any]) -> list[str]:
    """The components that decide which sizes a pipeline takes."""
    parts = [name for name in index if name == "vae" or name.startswith("transformer")]
    return [name for name in parts if isinstance(index[name], list) and index[name][0]]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DitAccelError(f"cannot read {path} ({error}): download the model again") from error
    if not isinstance(data, dict):
        raise DitAccelError(f"{path} is no configuration: download the model again")
    return data


def _check_folder(path: Path, name: str) -> None:
    """Say what is wrong with a path that is no pipeline folder."""
    if (path / INDEX).is_file():
        return
    if path.is_file():
        raise DitAccelError(
            f"--model {name} is a single file: it takes a folder in diffusers' format "
            f"(with {INDEX}), a Hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers, or demo."
        )
    if name in PRESETS:
        raise DitAccelError(
            f"--model {name} is a name for `plan`, `doctor` and `bench`, which load no weights: "
            "give the folder of a pipeline or its Hub id."
        )
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = nearest(path.name, [*siblings, DEMO])
        hint = (
            f" Did you mean {path.parent / close if close in siblings else close}?" if close else ""
        )
        raise DitAccelError(
            f"there is no model folder {name}.{hint} "
            "A Hub id is written owner/name; the model of this repository is called demo."
        )
    raise DitAccelError(f"--model {name} is no pipeline folder: it has no {INDEX}. {_found(path)}")


def _found(path: Path) -> str:
    inner = sorted(str(p.parent.relative_to(path)) for p in path.glob(f"*/{INDEX}"))
    inner += sorted(str(p.parent.relative_to(path)) for p in path.glob(f"snapshots/*/{INDEX}"))
    if inner:
        return f"Did you mean {path / inner[0]}?"
    if (path.parent / INDEX).is_file():
        return f"It is one component of the pipeline in {path.parent}: give that folder."
    if (path / "modular_model_index.json").is_file():
        return "It is a modular pipeline: use dit_accel from Python for it."
    names = sorted(p.name + "/" * p.is_dir() for p in path.iterdir() if p.name[0] != ".")
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"Found there: {shown or 'nothing'}."


def _supported(model: Model) -> Model:
    """The model with its family; raises DitAccelError where dit_accel does not support it."""
    name = model.index.get("_class_name")
    if not isinstance(name, str):
        raise DitAccelError(
            f"{model.source}/{INDEX} names no pipeline class: not diffusers' format"
        )
    known = supported_models()
    transformers = {
        value[1] for key, value in model.index.items() if key.startswith("transformer") and value
    }
    for info in known:
        if name in info.pipeline_classes or transformers.intersection(info.transformer_classes):
            return replace(model, family=info.family)
    names = sorted(p for info in known for p in info.pipeline_classes)
    close = nearest(name, names)
    hint = f" The nearest that is: {close}." if close else ""
    raise DitAccelError(
        f"{name} ({model.source}) is not supported.{hint} Supported: {', '.join(names)}. "
        "`dit-accel models` tells more."
    )


def _from_hub(name: str, revision: str | None) -> Model:
    index = _read_json(_download(name, INDEX, revision))
    configs = {
        part: _read_json(_download(name, f"{part}/config.json", revision))
        for part in _sized_parts(index)
    }
    return Model(name, index, configs, revision=revision)


def _download(name: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import hf_hub_download

    link = f"https://huggingface.co/{name}"
    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except hub.GatedRepoError as error:
        message = f"{name} is gated: accept its terms at {link} and log in with `hf auth login`."
        raise DitAccelError(message) from error
    except hub.RepositoryNotFoundError as error:
        message = f"there is no model {name} on the Hub (or it is private), and no such folder here"
        raise DitAccelError(f"{message}. If it is yours, log in with `hf auth login`.") from error
    except hub.RevisionNotFoundError as error:
        raise DitAccelError(f"{name} has no revision {revision!r}: see {link}/tree/main") from error
    except hub.LocalEntryNotFoundError as error:
        raise DitAccelError(
            f"cannot reach the Hub for {name}, and it is not in the local cache. Check the "
            "connection and HF_HUB_OFFLINE, or give --model a folder (or demo)."
        ) from error
    except hub.EntryNotFoundError as error:
        raise DitAccelError(
            f"{name} is not in diffusers' format: it has no {file}. "
            "Look for a repository whose name ends in -Diffusers."
        ) from error
    except (OSError, hub.HFValidationError) as error:
        raise DitAccelError(f"cannot get {file} of {name} from the Hub: {error}") from error

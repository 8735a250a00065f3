"""The arguments of a pipeline's call, from the options that its signature has a place for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dit_accel.cli import option
from dit_accel.errors import DitAccelError
from dit_accel.models.find import DEMO_DEFAULTS, Model
from dit_accel.pipelines.registry import adapter_of

OPTIONS = {name: f"--{own.replace('_', '-')}" for own, name in option.CALL.items()}
OPTIONS["image"] = "--image"
"""Arguments of a pipeline that have an option of their own."""


def accepted_by(pipeline_class: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline's call."""
    return inspect.signature(pipeline_class.__call__).parameters


def pipeline_call(
    model: Model,
    prompt: str,
    options: Mapping[str, Any],
    image: Path | None,
    fps: float | None,
    warn: Callable[[str], None],
) -> tuple[Any, dict[str, Any], float]:
    """The model's pipeline class, what to call it with, and the frames per second of its videos.

    Raises DitAccelError for what the pipeline does not take or needs, before weights are loaded;
    warns of sizes that it would round.
    """
    import diffusers

    from dit_accel.models.sizes import fit_sizes, skeleton

    name = model.pipeline_name(with_image=image is not None)
    pipeline_class = getattr(diffusers, name, None)
    if pipeline_class is None:
        version = diffusers.__version__
        raise DitAccelError(f"diffusers {version} has no {name}: install the latest diffusers")
    arguments = call_arguments(prompt, options, image, model, pipeline_class)
    arguments = fit_sizes(skeleton(model, pipeline_class), arguments, warn)
    adapter = adapter_of(model.family)
    assert adapter is not None, "find_model checks that the family is supported"
    rate = fps or adapter.fps
    if "frame_rate" in accepted_by(pipeline_class):
        arguments["frame_rate"] = rate
    return pipeline_class, arguments, rate


def call_arguments(
    prompt: str,
    options: Mapping[str, Any],
    image: Path | None,
    model: Model,
    pipeline_class: Any,
) -> dict[str, Any]:
    """What to call the pipeline with; options that are None were not given.

    Raises DitAccelError for an option that the pipeline does not take, and for one that it needs.
    """
    name, accepted = pipeline_class.__name__, accepted_by(pipeline_class)
    arguments = {key: value for key, value in options.items() if value is not None}
    if image is not None:
        arguments["image"] = _image(image)
    for key in arguments:
        if key not in accepted:
            raise DitAccelError(f"{name} takes no {OPTIONS[key]}{_instead(key, accepted)}")
    _check_needed(name, accepted, arguments)
    defaults = DEMO_DEFAULTS if model.demo else {}
    return {"prompt": prompt, **defaults, **arguments}


def _check_needed(
    name: str, accepted: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any]
) -> None:
    """Raise where the pipeline cannot do without something that was not given."""
    required = {
        key
        for key, parameter in accepted.items()
        if parameter.default is inspect.Parameter.empty and key not in ("self", "prompt")
    }
    if "ImageToVideo" in name:
        required.add("image")
    for key in sorted(required - set(arguments)):
        if key == "image":
            raise DitAccelError(f"{name} starts from an image: give one with --image FILE")
        raise DitAccelError(f"{name} needs `{key}`, which only Python can give: use it from there")
    if "negative_prompt" in arguments and "true_cfg_scale" in accepted:
        scale = arguments.get("true_cfg_scale", accepted["true_cfg_scale"].default)
        if scale <= 1.0:
            raise DitAccelError(
                f"{name} heeds a negative prompt only with --true-cfg-scale above 1 "
                "(each step then runs the model twice)"
            )


def _instead(key: str, accepted: Mapping[str, Any]) -> str:
    if key == "num_frames":
        return ": it makes single images"
    if key == "image":
        return ": it makes videos from text alone; take an image-to-video model"
    if key == "true_cfg_scale" and "guidance_scale" in accepted:
        return ": use --guidance-scale"
    return ""


def _image(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DitAccelError(f"cannot read {path} as an image") from error

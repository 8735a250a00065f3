"""What sizes a pipeline takes, asked of the pipeline itself before its weights are loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.models.find import Model


def skeleton(model: Model, pipeline_class: type) -> Any:
    """The pipeline with its autoencoder and transformers on the meta device and nothing else.

    It has no weights, but its size rules: `check_inputs` and the scale factors.
    """
    import diffusers
    from accelerate import init_empty_weights

    parts: dict[str, Any] = {}
    for name in inspect.signature(pipeline_class).parameters:
        value = model.index.get(name)
        if not isinstance(value, list):
            if value is not None:
                parts[name] = value
            continue
        parts[name] = None
        if name in model.configs:
            component = getattr(diffusers, value[1])
            with init_empty_weights():
                parts[name] = component.from_config(model.configs[name])
    missing = [
        name
        for name, parameter in inspect.signature(pipeline_class).parameters.items()
        if parameter.default is inspect.Parameter.empty and name not in parts
    ]
    return pipeline_class(**parts, **dict.fromkeys(missing))


def fit_sizes(pipe: Any, arguments: dict[str, Any], warn: Callable[[str], None]) -> dict[str, Any]:
    """The arguments with sizes that the pipeline really makes.

    Raises DitAccelError, naming the nearest valid size, for one that the pipeline refuses; warns
    of one that it would round. `pipe` may be a skeleton.
    """
    fitted = dict(arguments)
    if "num_frames" in arguments:
        fitted["num_frames"] = _fit_frames(pipe, arguments["num_frames"], warn)
    if not {"height", "width"} & set(arguments):
        return fitted
    height, width = _asked(pipe, arguments)
    _refuse(pipe, height, width)
    step = _step(pipe)
    for name, size in (("height", height), ("width", width)):
        if name not in arguments:
            continue
        if size % step:
            fitted[name] = max(step, size // step * step)
            warn(
                f"{_name(pipe)} makes a {name} in multiples of {step}: "
                f"{size} becomes {fitted[name]}."
            )
        _check_rope(pipe, name, fitted[name], step)
    return fitted


def _name(pipe: Any) -> str:
    return type(pipe).__name__


def _fit_frames(pipe: Any, frames: int, warn: Callable[[str], None]) -> int:
    step = getattr(pipe, "vae_scale_factor_temporal", None)
    step = step or getattr(pipe, "vae_temporal_compression_ratio", None) or 1
    excess = (frames - 1) % step
    if not excess:
        return frames
    nearest = frames - excess + (step if 2 * excess > step else 0)
    warn(f"{_name(pipe)} makes {step}n+1 frames: {frames} becomes {nearest}.")
    return nearest


def _step(pipe: Any) -> int:
    """Multiple of pixels that the autoencoder and the patches make of a height or width."""
    processor = getattr(pipe, "video_processor", None) or pipe.image_processor
    transformer = pipe.transformer or getattr(pipe, "transformer_2", None)
    patch = getattr(transformer.config, "patch_size", 1) if transformer is not None else 1
    return processor.config.vae_scale_factor * (patch if isinstance(patch, int) else patch[-1])


def _asked(pipe: Any, arguments: dict[str, Any]) -> tuple[int, int]:
    """Height and width; one that is not given is the pipeline's default, else the other one."""
    defaults = inspect.signature(pipe.__call__).parameters
    height, width = (arguments.get(n) or defaults[n].default for n in ("height", "width"))
    return height or width, width or height


def _refuse(pipe: Any, height: int, width: int) -> None:
    reason = _refusal(pipe, height, width)
    if not reason:
        return
    multiples = (_step(pipe), 8, 16, 32, 64)
    candidates = [tuple(_rounded(size, m) for size in (height, width)) for m in multiples]
    near = next((sizes for sizes in candidates if not _refusal(pipe, *sizes)), None)
    if near is None:  # then it is not the size that it minds
        raise DitAccelError(f"{_name(pipe)} refuses this call: {reason}")
    raise DitAccelError(
        f"{_name(pipe)} does not take {width}x{height} (width x height). "
        f"The nearest that it takes: --height {near[0]} --width {near[1]}."
    )


def _rounded(size: int, multiple: int) -> int:
    return max(1, round(size / multiple)) * multiple


def _refusal(pipe: Any, height: int, width: int) -> str:
    """What the pipeline's own `check_inputs` says against a size; "" where it takes it."""
    from PIL import Image

    calls = inspect.signature(pipe.__call__).parameters
    given = {"prompt": "a", "height": height, "width": width}
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(pipe.check_inputs).parameters.items():
        if name in given:
            arguments[name] = given[name]
        elif name == "image":
            arguments[name] = Image.new("RGB", (16, 16))
        elif parameter.default is inspect.Parameter.empty:
            default = calls[name].default if name in calls else None
            arguments[name] = None if default is inspect.Parameter.empty else default
    try:
        pipe.check_inputs(**arguments)
    except ValueError as error:
        return str(error)
    return ""


def _check_rope(pipe: Any, name: str, size: int, step: int) -> None:
    """Rotary tables have a last position: a longer axis fails deep in the first step."""
    transformer = pipe.transformer or getattr(pipe, "transformer_2", None)
    longest = getattr(getattr(transformer, "config", None), "rope_max_seq_len", None)
    if longest is not None and size // step > longest:
        raise DitAccelError(
            f"this model has no positions beyond a {name} of {longest * step}, and {size} was "
            f"asked for: use --{name} {longest * step} at most."
        )

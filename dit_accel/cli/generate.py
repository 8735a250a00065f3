"""`dit-accel generate`: everything is checked first, then loaded, run, reported and written."""

from __future__ import annotations

import inspect
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dit_accel
from dit_accel.cli import runtime
from dit_accel.cli.console import err, out, warn
from dit_accel.cli.models import DEMO_DEFAULTS, Model, find_model
from dit_accel.cli.progress import denoising_bar
from dit_accel.errors import DitAccelError
from dit_accel.video import check_output, check_writable, replacing, write_video

if TYPE_CHECKING:
    import torch

OPTIONS = {
    "negative_prompt": "--negative-prompt",
    "height": "--height",
    "width": "--width",
    "num_frames": "--frames",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance-scale",
    "true_cfg_scale": "--true-cfg-scale",
    "image": "--image",
}
"""Arguments of a pipeline that have an option of their own."""

_FPS = {"wan": 16.0, "hunyuan_video": 24.0, "cogvideox": 8.0, "ltx_video": 24.0}


@dataclass(frozen=True)
class Request:
    """What the user asked for; `call` holds the pipeline's arguments that were given."""

    prompt: str
    call: Mapping[str, Any]
    model: str = "demo"
    revision: str | None = None
    variant: str | None = None
    profile: str = "auto"
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    offload: str = "none"
    image: Path | None = None
    out: str | None = None
    fps: float | None = None
    report: Path | None = None
    strict: bool = False


@dataclass(frozen=True)
class Job:
    """A request that was checked: nothing heavy has been done for it yet."""

    request: Request
    model: Model
    pipeline_class: Any
    profile: Any
    device: torch.device
    dtype: torch.dtype
    arguments: dict[str, Any]
    output: Path
    fps: float


def run(request: Request) -> None:
    """Generate; raises DitAccelError for whatever cannot be done, mostly before heavy work."""
    _check_files(request)
    try:
        job = prepare(request)
        pipe = _load(job)
        frames, seconds = _denoise(job, pipe)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written.") from None
    report = pipe.sparse_attention_report()
    try:
        write_video(frames, job.output, job.fps)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written.") from None
    out.print(str(report), markup=False, highlight=False, soft_wrap=True)
    if request.report is not None:
        _write_report(request.report, report, job)
    out.print(f"\nWrote {_described(job, frames)} in {seconds:.1f} s", highlight=False)


def _check_files(request: Request) -> None:
    if request.out is not None:
        check_output(request.out)
    if request.report is not None:
        if request.report.is_dir():
            raise DitAccelError(
                f"--report {request.report} is a folder: give a file, such as x.json"
            )
        check_writable(request.report)
    if request.image is not None and not request.image.is_file():
        raise DitAccelError(f"there is no image {request.image}")


def check_report(path: Path) -> None:
    if path.is_dir():
        raise DitAccelError(f"--report {path} is a folder: give a file, such as x.json")
    check_writable(path)


def prepare(request: Request) -> Job:
    """Check a request against the machine, the model and the profile, without loading weights."""
    device = runtime.pick_device(request.device)
    dtype = runtime.pick_dtype(request.dtype, device)
    runtime.check_offload(request.offload, device)
    with err.status(f"Looking at {request.model}"):
        runtime.quiet()
        model = find_model(request.model, request.revision)
        profile = dit_accel.load_profile(request.profile, family=model.family)
        import diffusers

        from dit_accel.cli.sizes import fit_sizes, skeleton

        name = model.pipeline_name(with_image=request.image is not None)
        pipeline_class = getattr(diffusers, name, None)
        if pipeline_class is None:
            version = diffusers.__version__
            raise DitAccelError(f"diffusers {version} has no {name}: install the latest diffusers")
        arguments = _arguments(request, model, pipeline_class)
        arguments = fit_sizes(skeleton(model, pipeline_class), arguments, warn)
    fps = request.fps or _FPS.get(model.family, 16.0)
    if "frame_rate" in _accepted(pipeline_class):
        arguments["frame_rate"] = fps
    output = Path(request.out or _default_name(request, "num_frames" in _accepted(pipeline_class)))
    check_output(output)
    return Job(request, model, pipeline_class, profile, device, dtype, arguments, output, fps)


def _accepted(pipeline_class: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(pipeline_class.__call__).parameters


def _arguments(request: Request, model: Model, pipeline_class: Any) -> dict[str, Any]:
    """The call's arguments; raises DitAccelError for options that the pipeline does not take."""
    name, accepted = pipeline_class.__name__, _accepted(pipeline_class)
    arguments: dict[str, Any] = {k: v for k, v in request.call.items() if v is not None}
    if request.image is not None:
        arguments["image"] = _image(request.image)
    for key in arguments:
        if key not in accepted:
            raise DitAccelError(f"{name} takes no {OPTIONS[key]}{_instead(key, accepted)}")
    _check_needed(name, accepted, arguments)
    if model.demo:
        arguments = {**DEMO_DEFAULTS, **arguments}
    return {"prompt": request.prompt, **arguments}


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
    guided = arguments.get("true_cfg_scale", accepted.get("true_cfg_scale"))
    if "negative_prompt" in arguments and guided is not None:
        scale = guided.default if isinstance(guided, inspect.Parameter) else guided
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


def _default_name(request: Request, video: bool) -> str:
    """A file name from the prompt and the seed, in the current folder."""
    words = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower()).strip("-")
    return f"{words[:48].strip('-') or 'output'}-{request.seed}{'.mp4' if video else '.png'}"


def _load(job: Job) -> Any:
    request = job.request
    with err.status(f"Loading {job.model.source}"):
        pipe = runtime.load(job.model, job.pipeline_class, job.dtype, request.variant)
        if job.model.demo:
            _check_words(pipe, request.prompt)
        runtime.place(pipe, job.device, request.offload)
        pipe.enable_sparse_attention(job.profile, strict=request.strict)
    return pipe


def _check_words(pipe: Any, prompt: str) -> None:
    """The demo model knows few words; say which of the prompt it does not."""
    unknown = pipe.tokenizer.unk_token_id
    words = [w for w in re.findall(r"\w+", prompt) if unknown in pipe.tokenizer(w)["input_ids"]]
    if words:
        warn(
            f"The demo model was not taught: {', '.join(dict.fromkeys(words))}. "
            "samples/demo-model/README.md lists its words."
        )


def _denoise(job: Job, pipe: Any) -> tuple[Any, float]:
    """Run the pipeline. Returns its frames (or images) and the seconds that it took."""
    import torch

    generator = torch.Generator("cpu").manual_seed(job.request.seed)
    steps = job.arguments.get("num_inference_steps")
    steps = steps or _accepted(job.pipeline_class)["num_inference_steps"].default
    begin = time.perf_counter()
    with denoising_bar(steps) as on_step:
        accepted = "callback_on_step_end" in _accepted(job.pipeline_class)
        callback = {"callback_on_step_end": on_step} if accepted else {}
        result = pipe(**job.arguments, generator=generator, output_type="pil", **callback)
    frames = result.images if hasattr(result, "images") else result.frames[0]
    return frames, time.perf_counter() - begin


def _write_report(path: Path, report: Any, job: Job) -> None:
    """The report and how to repeat the run, as JSON."""
    arguments = {k: v for k, v in job.arguments.items() if isinstance(v, (str, int, float))}
    settings = {
        "model": job.model.source,
        "pipeline": job.pipeline_class.__name__,
        "seed": job.request.seed,
        "dtype": str(job.dtype).removeprefix("torch."),
        "device": str(job.device),
        "offload": job.request.offload,
        "output": str(job.output),
        **arguments,
    }
    with replacing(path) as temporary:
        data = {"run": settings, "report": report.to_dict()}
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _described(job: Job, frames: Any) -> str:
    width, height = frames[0].size
    if "num_frames" not in _accepted(job.pipeline_class):
        return f"{job.output} ({width}x{height})"
    return f"{job.output} ({len(frames)} frames, {width}x{height}, {job.fps:g} fps)"

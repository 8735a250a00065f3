"""`dit-accel generate`: everything is checked first, then loaded, run, reported and written."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

import dit_accel
from dit_accel.cli import runtime
from dit_accel.cli.arguments import accepted_by, pipeline_call
from dit_accel.cli.console import err, out, warn
from dit_accel.cli.progress import denoising_bar
from dit_accel.errors import DitAccelError
from dit_accel.models.find import Model, find_model
from dit_accel.video import check_output, check_writable, replacing, write_video

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Request:
    """What the user asked for; `call` holds the pipeline's arguments that were given."""

    prompt: str
    model: str
    revision: str | None
    variant: str | None
    call: Mapping[str, Any]
    image: Path | None
    seed: int
    profile: str
    strict: bool
    dtype: str | None
    device: str | None
    offload: str
    output: str | None
    fps: float | None
    report: Path | None


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
    _say_if_dense(report)
    if request.report is not None:
        _write_report(request.report, report, job)
    wrote = f"\nWrote {_described(job, frames)} in {seconds:.1f} s"
    out.print(wrote, markup=False, highlight=False, soft_wrap=True)


def _check_files(request: Request) -> None:
    if request.output is not None:
        check_output(request.output)
    if request.report is not None:
        if request.report.is_dir():
            raise DitAccelError(
                f"--report {request.report} is a folder: give a file, such as x.json"
            )
        check_writable(request.report)
    if request.image is not None and not request.image.is_file():
        raise DitAccelError(f"there is no image {request.image}")


def prepare(request: Request) -> Job:
    """Check a request against the machine, the model and the profile, without loading weights."""
    device = runtime.pick_device(request.device)
    dtype = runtime.pick_dtype(request.dtype, device)
    runtime.check_offload(request.offload, device)
    with err.status(Text(f"Looking at {request.model}")):
        runtime.quiet()
        model = find_model(request.model, request.revision)
        profile = dit_accel.load_profile(request.profile, family=model.family)
        pipeline_class, arguments, fps = pipeline_call(
            model, request.prompt, request.call, request.image, request.fps, warn
        )
    video = "num_frames" in accepted_by(pipeline_class)
    output = Path(request.output or _default_name(request, video))
    check_output(output)
    if request.report is not None and request.report.resolve() == output.resolve():
        raise DitAccelError(f"--out and --report are the same file {output}: give two names")
    return Job(request, model, pipeline_class, profile, device, dtype, arguments, output, fps)


def _default_name(request: Request, video: bool) -> str:
    """A file name from the prompt and the seed, in the current folder."""
    words = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower()).strip("-")
    return f"{words[:48].strip('-') or 'output'}-{request.seed}{'.mp4' if video else '.png'}"


def _load(job: Job) -> Any:
    request = job.request
    with err.status(Text(f"Loading {job.model.source}")):
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
    steps = steps or accepted_by(job.pipeline_class)["num_inference_steps"].default
    begin = time.perf_counter()
    with denoising_bar(steps) as on_step:
        accepted = "callback_on_step_end" in accepted_by(job.pipeline_class)
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


def _say_if_dense(report: Any) -> None:
    """Warn where the profile plans sparse attention and none of it ran."""
    from dit_accel.attention import BREAK_EVEN, PROFILE

    own = report.kinds["self"]
    reasons = sorted(set(own["dense_reasons"]) - {PROFILE})
    if reasons and not own["sparse"] and not own["reused"]:
        hint = (
            " At this size dense attention is as fast; with more pixels and frames sparse wins."
            if BREAK_EVEN in reasons
            else ""
        )
        warn(f"no self-attention ran sparse: {', '.join(reasons)}.{hint}")


def _described(job: Job, frames: Any) -> str:
    width, height = frames[0].size
    if "num_frames" not in accepted_by(job.pipeline_class):
        return f"{job.output} ({width}x{height})"
    return f"{job.output} ({len(frames)} frames, {width}x{height}, {job.fps:g} fps)"

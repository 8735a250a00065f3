"""`dit-accel generate`: everything is checked first, then loaded, run, reported and written."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dit_accel
from dit_accel.cli.arguments import accepted_by
from dit_accel.cli.console import out, warn
from dit_accel.cli.progress import denoising_bar
from dit_accel.cli.target import Asked, Target, find_target, load_target
from dit_accel.errors import DitAccelError
from dit_accel.video import check_output, check_writable, replacing, write_video


@dataclass(frozen=True)
class Request(Asked):
    """What the user asked for; `call` holds the pipeline's arguments that were given."""

    prompt: str
    seed: int
    profile: str
    strict: bool
    output: str | None
    report: Path | None


@dataclass(frozen=True)
class Job:
    """A request that was checked: nothing heavy has been done for it yet."""

    request: Request
    target: Target
    profile: Any
    output: Path


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
        write_video(frames, job.output, job.target.fps)
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
    target = find_target(request, request.prompt)
    profile = dit_accel.load_profile(request.profile, family=target.model.family)
    video = "num_frames" in accepted_by(target.pipeline_class)
    output = Path(request.output or _default_name(request, video))
    check_output(output)
    if request.report is not None and request.report.resolve() == output.resolve():
        raise DitAccelError(f"--out and --report are the same file {output}: give two names")
    return Job(request, target, profile, output)


def _default_name(request: Request, video: bool) -> str:
    """A file name from the prompt and the seed, in the current folder."""
    words = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower()).strip("-")
    return f"{words[:48].strip('-') or 'output'}-{request.seed}{'.mp4' if video else '.png'}"


def _load(job: Job) -> Any:
    def check(pipe: Any) -> None:
        if job.target.model.demo:
            _check_words(pipe, job.request.prompt)

    pipe = load_target(job.target, job.request, check)
    pipe.enable_sparse_attention(job.profile, strict=job.request.strict)
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
    steps = job.target.arguments.get("num_inference_steps")
    steps = steps or accepted_by(job.target.pipeline_class)["num_inference_steps"].default
    begin = time.perf_counter()
    with denoising_bar(steps) as on_step:
        accepted = "callback_on_step_end" in accepted_by(job.target.pipeline_class)
        callback = {"callback_on_step_end": on_step} if accepted else {}
        result = pipe(**job.target.arguments, generator=generator, output_type="pil", **callback)
    frames = result.images if hasattr(result, "images") else result.frames[0]
    return frames, time.perf_counter() - begin


def _write_report(path: Path, report: Any, job: Job) -> None:
    """The report and how to repeat the run, as JSON."""
    arguments = {k: v for k, v in job.target.arguments.items() if isinstance(v, (str, int, float))}
    settings = {
        "model": job.target.model.source,
        "pipeline": job.target.pipeline_class.__name__,
        "seed": job.request.seed,
        "dtype": str(job.target.dtype).removeprefix("torch."),
        "device": str(job.target.device),
        "offload": job.request.offload,
        "output": str(job.output),
        **arguments,
    }
    with replacing(path) as temporary:
        data = {"run": settings, "report": report.to_dict()}
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _say_if_dense(report: Any) -> None:
    """Warn where the profile plans sparse attention and none of it ran."""
    from dit_accel.engine.attend import BREAK_EVEN, PROFILE

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
    if "num_frames" not in accepted_by(job.target.pipeline_class):
        return f"{job.output} ({width}x{height})"
    return f"{job.output} ({len(frames)} frames, {width}x{height}, {job.target.fps:g} fps)"

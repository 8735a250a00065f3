"""The comparison itself: every method on the same prompts and seeds, timed in turn.

For each (prompt, seed), the methods run one after the other, and that `repeats` times, so that
whatever drifts (clocks, heat, neighbours) hits all of them alike. Before a method's first timed
call it runs once, for a few steps, untimed: that call compiles, allocates and starts threads.
"""

from __future__ import annotations

import dataclasses
import inspect
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dit_accel.compare.environment import environment
from dit_accel.compare.external import Setting
from dit_accel.compare.methods import ExternalMethod, Method, ProfileMethod, Receipt
from dit_accel.compare.metrics import FileMeasure, Measures, choose_metrics, same_shape
from dit_accel.compare.probe import measuring_errors
from dit_accel.compare.request import WARMUP_STEPS, Request, Watcher, check, repeats_for
from dit_accel.compare.results import DENSE, Clip, ProfileInfo, Results
from dit_accel.compare.store import Store
from dit_accel.compare.timing import Phases, device_of, timed
from dit_accel.errors import DitAccelError
from dit_accel.video import to_uint8


def all_there(methods: Sequence[Method], request: Request, store: Store) -> Results | None:
    """The results of a finished run, None where something is still to be measured."""
    results = store.read_results()
    if results is None or set(request.metrics) - set(results.metrics):
        return None
    for method in methods:
        for prompt in request.prompts:
            for seed in request.seeds:
                missing = not store.finished(prompt, seed, method.info.name)
                if missing and method.info.skipped is None:
                    return None
    return results


def run_all(
    pipe: Any, methods: Sequence[Method], request: Request, store: Store, watcher: Watcher
) -> Results:
    """Make what the store lacks; returns everything in it. Finished clips are never made again.

    Raises:
        DitAccelError: a profile that the pipeline refuses, a full disk.
        Exception: whatever a clip raised, unless `keep_going` records it.
    """
    check(request)
    session = _Session(pipe, list(methods), request, store, watcher)
    try:
        session.run()
    finally:
        results = session.results()
        if results.clips:
            store.write_results(results)
    return results


@dataclass
class _Timed:
    """One timed call."""

    phases: Phases
    receipt: Receipt
    video: np.ndarray | None


@dataclass
class _Session:
    """One run of the comparison on one pipeline."""

    pipe: Any
    methods: list[Method]
    request: Request
    store: Store
    watcher: Watcher
    measures: Measures = field(init=False)
    first_calls: dict[str, tuple[float, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.measures = choose_metrics(self.store.run.metrics, self.request.demo)
        for name, metric in self.measures.metrics.items():
            if metric.skipped:
                self.watcher.say(f"metric {name} is skipped: {metric.skipped}")
        for method in self.methods:
            if method.info.skipped:
                self._skip(method, method.info.skipped)

    @property
    def steps(self) -> int:
        return int(self._given("num_inference_steps") or 1)

    def run(self) -> None:
        todo = [pair for pair in self._pairs() if self._missing(*pair)]
        self.watcher.steps(self._work(todo))
        if any(self.store.finished(*pair, DENSE) for pair in todo):
            self.watcher.say(
                "some dense clips were timed in an earlier session: speed-ups against them also "
                "hold what changed on this machine since then"
            )
        for prompt, seed in todo:
            self._pair(prompt, seed)
            self.store.write_results(self.results())
        self._measure_files()

    def results(self) -> Results:
        """All that the store holds."""
        clips = sorted(
            self.store.clips.values(), key=lambda c: (c.prompt_id, c.seed, self._rank(c.profile))
        )
        frames, height, width = self.store.run.shape or (0, 0, 0)
        return Results(
            model=self.request.model,
            frames=frames,
            height=height,
            width=width,
            steps=self.steps,
            fps=self.request.fps,
            environment=environment(self.request.command, device_of(self.pipe)),
            profiles=self._profiles(),
            metrics=self.measures.metrics,
            clips=clips,
            warmup_steps=min(WARMUP_STEPS, self.steps),
        )

    def _profiles(self) -> list[ProfileInfo]:
        """Those of this run and of the clips that were there before."""
        infos = {method.info.name: method.info for method in self.methods}
        infos |= {
            name: dataclasses.replace(infos[name], skipped=why)
            for name, why in self.skipped.items()
        }
        for clip in self.store.clips.values():
            if clip.profile not in infos:
                text = self.store.run.profiles[clip.profile]
                kind = "external" if clip.launched_density is None else "profile"
                infos[clip.profile] = ProfileInfo(clip.profile, kind, text)  # type: ignore[arg-type]
        return list(infos.values())

    def _rank(self, profile: str) -> int:
        names = [method.info.name for method in self.methods]
        return names.index(profile) if profile in names else len(names)

    def _pairs(self) -> list[tuple[str, int]]:
        return [(p, s) for p in self.request.prompts for s in self.request.seeds]

    def _missing(self, prompt: str, seed: int) -> list[Method]:
        return [
            method
            for method in self.methods
            if method.info.name not in self.skipped
            and not self.store.finished(prompt, seed, method.info.name)
        ]

    def _work(self, todo: list[tuple[str, int]]) -> int:
        """Denoising steps that lie ahead."""
        clips = [(pair, m.info.name) for pair in todo for m in self._missing(*pair)]
        names = {name for _, name in clips}
        probes = sum(self._probes(pair, m) for pair in todo for m in self._missing(*pair))
        steps = len(clips) * repeats_for(self.request) + probes
        return steps * self.steps + len(names) * min(WARMUP_STEPS, self.steps)

    def _probes(self, pair: tuple[str, int], method: Method) -> bool:
        """Whether this clip gets an error map."""
        wanted = {"all": True, "none": False, "first": pair == self._pairs()[0]}
        ours = isinstance(method, ProfileMethod) and method.info.name != DENSE
        return ours and wanted[self.request.error_maps]

    def _pair(self, prompt: str, seed: int) -> None:
        """All methods on one prompt and seed, in turn."""
        runs: dict[str, list[_Timed]] = {}
        failed: set[str] = set()
        for repeat in range(repeats_for(self.request)):
            for method in self._missing(prompt, seed):
                name = method.info.name
                if name in failed:
                    continue
                self.watcher.at(f"{name}: {prompt} (seed {seed})")
                try:
                    self._warm(method, prompt, seed)
                    if name not in self.skipped:
                        made = self._timed(method, prompt, seed, decode=repeat == 0)
                        runs.setdefault(name, []).append(made)
                except Exception as error:
                    self._failed(method, prompt, seed, error)
                    failed.add(name)
                    torch.cuda.empty_cache()
        for method in self._missing(prompt, seed):
            if method.info.name in runs and method.info.name not in failed:
                self._keep(method, prompt, seed, runs[method.info.name])

    def _failed(self, method: Method, prompt: str, seed: int, error: Exception) -> None:
        """Record a clip that raised, where that was asked for."""
        if not self.request.keep_going or isinstance(error, DitAccelError):
            raise error
        message = f"{type(error).__name__}: {error}"
        self.watcher.say(f"{method.info.name} failed on {prompt!r}, seed {seed}: {message}")
        clip = Clip(
            prompt,
            self.store.prompt_id(prompt),
            seed,
            method.info.name,
            status="failed",
            error=message,
        )
        self.store.keep(clip, None, self.request.fps)

    def _warm(self, method: Method, prompt: str, seed: int) -> None:
        """A method's untimed first call. One of another project that cannot do it is skipped."""
        if method.info.name in self.first_calls:
            return
        steps = min(WARMUP_STEPS, self.steps)
        try:
            method.prepare(
                Setting(self.pipe, self.steps, lambda: self._call(prompt, seed, counted=False))
            )
            with method.on(self.pipe, self.request.call):
                with timed(self.pipe, device_of(self.pipe)) as phases:
                    self._call(prompt, seed, num_inference_steps=steps)
                compiled = method.compile_s + method.receipt(self.pipe).compile_s
        except Exception as error:
            if not isinstance(method, ExternalMethod):
                raise
            self._skip(method, f"it failed: {type(error).__name__}: {error}")
            return
        self.first_calls[method.info.name] = (phases.denoise_s, compiled)

    def _skip(self, method: Method, reason: str) -> None:
        self.skipped[method.info.name] = reason
        self.watcher.say(f"{method.info.name} is skipped: {reason}")

    def _timed(self, method: Method, prompt: str, seed: int, decode: bool) -> _Timed:
        with method.on(self.pipe, self.request.call):
            with timed(self.pipe, device_of(self.pipe)) as phases:
                video = self._call(prompt, seed, output_type="pil" if decode else "latent")
            return _Timed(phases, method.receipt(self.pipe), video)

    def _call(
        self,
        prompt: str,
        seed: int,
        output_type: str = "latent",
        counted: bool = True,
        **changes: Any,
    ) -> np.ndarray | None:
        """Run the pipeline; its frames [T, H, W, 3] uint8, None where they were not asked for."""
        arguments = {**self.request.call, **changes, "output_type": output_type}
        if counted and self._accepts("callback_on_step_end"):
            arguments["callback_on_step_end"] = self._on_step
        result = self.pipe(
            prompt=prompt, generator=torch.Generator("cpu").manual_seed(seed), **arguments
        )
        if output_type == "latent":
            return None
        frames = result.images if hasattr(result, "images") else result.frames[0]
        return np.stack(to_uint8(frames))

    def _on_step(self, pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        self.watcher.step()
        return tensors

    def _keep(self, method: Method, prompt: str, seed: int, runs: list[_Timed]) -> None:
        """Measure a clip and write it down."""
        name, video = method.info.name, runs[0].video
        assert video is not None
        dense = video if name == DENSE else self.store.dense_video(prompt, seed)
        if dense is not None:
            same_shape(video, dense)
        values, notes = self.measures.of(video, dense, prompt)
        errors: list[list[float | None]] = []
        if self._probes((prompt, seed), method):
            self.watcher.at(f"{name}: errors of its attention")
            errors = self._errors(method, prompt, seed)
        first, compiled = self.first_calls[name]
        attention = [r.receipt.attention_s for r in runs if r.receipt.attention_s is not None]
        memory = [r.phases.peak_memory_bytes for r in runs if r.phases.peak_memory_bytes]
        receipt = vars(runs[0].receipt) | {
            "attention_s": statistics.median(attention) if attention else None,
            "compile_s": compiled,
        }
        clip = Clip(
            prompt=prompt,
            prompt_id=self.store.prompt_id(prompt),
            seed=seed,
            profile=name,
            denoise_s=[r.phases.denoise_s for r in runs],
            first_call_s=first,
            encode_s=statistics.median(r.phases.encode_s for r in runs),
            decode_s=runs[0].phases.decode_s,
            peak_memory_bytes=max(memory) if memory else None,
            metrics=values,
            metrics_note=notes,
            error_map=errors,
            **receipt,
        )
        self.store.keep(clip, video, self.request.fps)

    def _errors(self, method: Method, prompt: str, seed: int) -> list[list[float | None]]:
        with method.on(self.pipe, self.request.call), measuring_errors(self.pipe) as errors:
            self._call(prompt, seed)
        return errors.table

    def _measure_files(self) -> None:
        """Metrics that are made from all clips' files at once."""
        done = [clip for clip in self.store.clips.values() if clip.status == "done"]
        for name, measure in self.measures.running.items():
            if not isinstance(measure, FileMeasure):
                continue
            todo = [clip for clip in done if clip.metrics.get(name) is None]
            paths = [self.store.folder / str(clip.video) for clip in todo]
            self.watcher.at(f"metric {name}")
            for clip, found in zip(todo, measure.values(paths), strict=True):
                value, note = found
                notes = {k: v for k, v in clip.metrics_note.items() if k != name}
                notes |= {name: note} if note else {}
                metrics = {**clip.metrics, name: value}
                self.store.update(dataclasses.replace(clip, metrics=metrics, metrics_note=notes))

    def _given(self, name: str) -> Any:
        """An argument of the pipeline's call, or its default."""
        if name in self.request.call:
            return self.request.call[name]
        parameter = inspect.signature(self.pipe.__call__).parameters.get(name)
        return None if parameter is None else parameter.default

    def _accepts(self, name: str) -> bool:
        return name in inspect.signature(self.pipe.__call__).parameters

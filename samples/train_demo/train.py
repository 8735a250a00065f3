"""Train the demo model: one command on one GPU, in parts that can be interrupted.

    python samples/train_demo/train.py --stage all --out out/demo

Stages: `ae` (autoencoder and its validation), `dit` (text encoder, latents, transformer), `eval`
(prompt adherence); `all` runs what is not done yet. With `--part-seconds N` a run saves its
state and ends after about N seconds; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import adherence
import latents
import numpy as np
import records
import torch
from autoencoder import Size, set_statistics, train_autoencoder, validate_autoencoder
from demo_model import build_text_encoder, build_transformer, build_vae, save_pipeline
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from flow import FlowTrainer
from plan import Plan, full_plan, polish_plan, tiny_plan
from sheets import contact_sheet, save_gif
from speed import choose_attention, set_up_cuda
from text import train_text_encoder, word_vectors
from transformers import UMT5EncoderModel

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "demo-model"
RESULTS = HERE.parent / "results"
MIN_PSNR = 28.0


class Run:
    """One invocation: the clock, the folder of intermediate state, the record of results."""

    def __init__(self, args: argparse.Namespace, plan: Plan) -> None:
        self.args, self.plan = args, plan
        self.begin = time.time()
        self.deadline = self.begin + args.part_seconds
        self.out: Path = args.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.record_path = self.out / "record.pt"
        self.record: dict = {"parts": [], "stages": {}}
        if self.record_path.exists():
            self.record = torch.load(self.record_path, weights_only=False)

    def log(self, text: str) -> None:
        """Print with the seconds since the start of this part."""
        print(f"[{time.time() - self.begin:6.1f}] {text}", flush=True)

    def left(self) -> float:
        """Seconds left in this part."""
        return self.deadline - time.time()

    def note(self, stage: str, **facts: object) -> None:
        """Add facts to a stage's record and keep it on disk."""
        self.record["stages"].setdefault(stage, {}).update(facts)
        torch.save(self.record, self.record_path)

    def export(self, name: str, files: list[tuple[Path, str]]) -> None:
        """Copy files out as parts, if an export folder was named."""
        if self.args.export:
            records.pack(name, files, self.args.export)

    def picture(self, clips: list[np.ndarray], name: str) -> None:
        """Write a contact sheet beside the state and into the export folder."""
        sheet = contact_sheet(np.stack(clips))
        for folder in filter(None, (self.out, self.args.export)):
            folder.mkdir(parents=True, exist_ok=True)
            sheet.save(folder / name, quality=92)


def stage_autoencoder(run: Run) -> AutoencoderKLWan:
    """Train, measure and save the autoencoder, or load it."""
    vae, path = build_vae().to(run.device), run.out / "vae.pt"
    if run.args.start:
        kept = AutoencoderKLWan.from_pretrained(run.args.start, subfolder="vae").float()
        vae.load_state_dict(kept.state_dict())
        vae.register_to_config(**{k: kept.config[k] for k in ("latents_mean", "latents_std")})
        return vae.eval()
    if path.exists():
        saved = torch.load(path, weights_only=False)
        vae.load_state_dict(saved["weights"])
        vae.register_to_config(**saved["statistics"])
        return vae.eval()
    start = time.time()
    curve = train_autoencoder(
        vae, run.plan.ae_seconds, run.device, run.log, run.plan.ae_sizes, run.plan.ae_full_sizes
    )
    trained = time.time() - start
    set_statistics(vae, run.device, *run.plan.ae_statistics)
    stock = build_vae().to(run.device)
    stock.load_state_dict(vae.state_dict())
    stock = stock.to(torch.bfloat16 if run.device.type == "cuda" else torch.float32).eval()
    reports, pictures = [], []
    for height, clips, frames in run.plan.ae_checks:
        report = validate_autoencoder(stock, run.device, height, clips, frames)
        pictures.append(report.pop("pictures"))
        reports.append(report)
        shown = {
            k: {a: v["percent"] for a, v in report[k].items()}
            for k in ("checker_truth", "checker_decoded", "checker_wrong_prompts")
        }
        run.log(f"ae {height}: PSNR {report['psnr_of_mean_error']} (mean {report['psnr_mean']})")
        run.log(f"ae {height}: {shown}")
    names = ("latents_mean", "latents_std")
    statistics = {k: list(vae.config[k]) for k in names}
    run.log(f"statistics {statistics}")
    torch.save({"weights": vae.state_dict(), "statistics": statistics}, path)
    truth, decoded = pictures[0]
    run.picture([c for pair in zip(truth, decoded, strict=True) for c in pair], "ae.jpg")
    run.note(
        "autoencoder",
        train_seconds=round(trained, 1),
        seconds=round(time.time() - start, 1),
        curve=curve,
        validation=reports,
        latents_std=statistics["latents_std"],
    )
    worst = min(r["psnr_of_mean_error"] for r in reports)
    if worst < MIN_PSNR and not run.args.tiny:
        run.log(f"PSNR {worst} is too low to go on")
        sys.exit(3)
    return vae.eval()


def stage_text(run: Run) -> UMT5EncoderModel:
    """Train the text encoder on captions, or load it."""
    encoder, path = build_text_encoder().to(run.device), run.out / "text_encoder.pt"
    if path.exists():
        encoder.load_state_dict(torch.load(path, map_location=run.device))
        return encoder.eval()
    start = time.time()
    words = word_vectors(encoder.config.vocab_size)
    right = train_text_encoder(encoder, words, run.plan.text_seconds, run.log)
    torch.save(encoder.state_dict(), path)
    run.note("text_encoder", seconds=round(time.time() - start, 1), roles_right=round(right, 5))
    return encoder


def _cache(run: Run, vae: AutoencoderKLWan, size: Size) -> latents.LatentCache:
    path = run.out / f"latents_{size.frames}_{size.height}_{size.width}.pt"
    if path.exists():
        saved = torch.load(path, map_location=run.device)
        return latents.LatentCache(**saved)
    clips, seconds = run.plan.caches[size]
    seed = 1000 + 7 * size.height + size.width
    start = time.time()
    cache = latents.fill_cache(vae, size, clips, seconds, seed, log=run.log)
    torch.save(vars(cache), path)
    done = {"clips": len(cache.latents), "seconds": round(time.time() - start, 1)}
    counts = run.record["stages"].get("latents", {})
    run.note("latents", **{**counts, f"{size.frames}x{size.height}x{size.width}": done})
    return cache


def stage_transformer(run: Run, vae: AutoencoderKLWan, text: UMT5EncoderModel) -> bool:
    """Train until done or out of time; True when the transformer is finished."""
    torch.manual_seed(11)
    plan, path = run.plan, run.out / "dit.pt"
    transformer = build_transformer()
    if run.args.start:
        kept = WanTransformer3DModel.from_pretrained(run.args.start, subfolder="transformer")
        transformer.load_state_dict(kept.float().state_dict())
    trainer = FlowTrainer(
        text,
        transformer.to(run.device),
        total_seconds=plan.dit_seconds,
        stages=plan.stages,
        caches={},
        muon_lr=plan.muon_lr,
        adam_lr=plan.adam_lr,
        log=run.log,
    )
    if path.exists():
        trainer.load(torch.load(path, map_location=run.device, weights_only=False))
        run.log(f"resumed at {trainer.seconds:.0f} s, step {trainer.steps}")
    if trainer.seconds < trainer.total_seconds:
        if not run.args.no_compile:
            trainer.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
        _train_in_stages(run, vae, trainer)
    done = trainer.seconds >= trainer.total_seconds
    torch.save(trainer.state(), path)
    run.note(
        "polish" if run.args.start else "transformer",
        seconds=round(trainer.seconds, 1),
        steps=trainer.steps,
        curve=trainer.curve,
    )
    run.log(f"transformer at {trainer.seconds:.0f} of {trainer.total_seconds:.0f} s")
    _save_model(run, vae, trainer, run.out / "model")
    return done


def _train_in_stages(run: Run, vae: AutoencoderKLWan, trainer: FlowTrainer) -> None:
    """Fill each stage's latents when it begins, warm its sizes up, and train through it."""
    reserve = run.plan.eval_seconds if run.args.finish else run.plan.save_seconds
    for stage in run.plan.stages:
        if trainer.seconds >= stage.until * trainer.total_seconds:
            continue
        for size, _ in stage.sizes:
            if size not in trainer.caches:
                trainer.caches[size] = _cache(run, vae, size)
        trainer.warm_up(size for size, _ in stage.sizes)
        if run.args.finish:
            later = sum(
                run.plan.caches[size][1]
                for other in run.plan.stages
                if other.until > stage.until
                for size, _ in other.sizes
                if size not in trainer.caches
            )
            trainer.total_seconds = trainer.seconds + max(run.left() - reserve - later, 1.0)
            run.log(f"transformer training will take {trainer.total_seconds:.0f} s in all")
        trainer.run(
            min(stage.until * trainer.total_seconds - trainer.seconds, run.left() - reserve)
        )
        if run.left() <= reserve + 1:
            break


def _save_model(run: Run, vae: AutoencoderKLWan, trainer: FlowTrainer, folder: Path) -> None:
    """Write the averaged weights as a pipeline."""
    text, transformer, stock = build_text_encoder(), build_transformer(), build_vae()
    text.load_state_dict(trainer.text_encoder.state_dict())
    with torch.no_grad():
        for p, value in zip(transformer.parameters(), trainer.average.values, strict=True):
            p.copy_(value)
    stock.load_state_dict(vae.state_dict())
    stock.register_to_config(**{k: vae.config[k] for k in ("latents_mean", "latents_std")})
    shutil.rmtree(folder, ignore_errors=True)
    save_pipeline(folder, stock, text, transformer)


def preview(run: Run) -> None:
    """After an unfinished part: a quick look at the averaged model, and what a resume needs."""
    small = adherence.Sampling(steps=12, batch=64, **run.plan.preview)
    pipe = adherence.load(run.out / "model", run.device)
    judged = adherence.measure(pipe, small, min(run.plan.prompts, 64), seed=9000)
    shown = {a: v["percent"] for a, v in adherence.summary(judged.scores).items()}
    run.log(f"preview at 96 px: {shown} in {judged.seconds} s")
    run.note("transformer", preview=shown)
    run.picture(judged.clips[:8], "preview.jpg")
    state = torch.load(run.out / "dit.pt", map_location="cpu", weights_only=False)
    state.pop("optimizers")
    for name in ("raw", "average"):
        state[name] = [v.to(torch.bfloat16) for v in state[name]]
    torch.save(state, run.out / "dit_small.pt")
    names = {"dit_small.pt": "dit.pt"}
    names |= {n: n for n in ("vae.pt", "text_encoder.pt", "record.pt") if (run.out / n).exists()}
    run.export("resume", [(run.out / a, b) for a, b in names.items()])


def stage_evaluation(run: Run) -> None:
    """Measure adherence, install the model folder, write results and samples."""
    base = adherence.Sampling(**run.plan.sampling)
    found, kept = adherence.evaluate(
        run.out / "model", run.device, run.log, run.deadline, run.plan.prompts, base
    )
    for name, judged in kept.items():
        if name != "unseen_wide":
            run.picture(judged.clips[:6], f"{name}.jpg")
    main = kept["unseen_20_steps"]
    for i in range(min(4, len(main.clips))):
        save_gif(main.clips[i], run.out / f"sample_{i}.gif")
    head = {"machine": records.machine(), "commit": records.commit(), "command": run.args.shown}
    prompts = [
        {"prompt": adherence.caption(s), **{a: main.scores[a][i] for a in main.scores}}
        for i, s in enumerate(main.scenes)
    ]
    result = {**head, "held_out": "colour x shape x direction x background", **found}
    records.write_json(run.args.results / "demo_adherence.json", {**result, "prompts": prompts})
    run.record["parts"].append(round(time.time() - run.begin, 1))
    run.note("evaluation", seconds=round(sum(j.seconds for j in kept.values()), 1))
    training = {**head, "part_seconds": run.record["parts"], **run.record["stages"]}
    records.write_json(run.args.results / "demo_training.json", training)
    state = torch.load(run.out / "dit.pt", map_location="cpu", weights_only=False)
    torch.save(
        {k: v for k, v in state.items() if k not in ("optimizers", "raw")}, run.out / "average.pt"
    )
    results = [(run.args.results / f"demo_{n}.json", f"results/demo_{n}.json")
               for n in ("adherence", "training")]  # fmt: skip
    run.export("model", [(run.out / "model", "demo-model"), *results])
    run.export(
        "state", [(run.out / "average.pt", "average.pt"), (run.out / "record.pt", "record.pt")]
    )
    if run.args.model:
        shutil.copytree(run.out / "model", run.args.model, dirs_exist_ok=True)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=("all", "ae", "dit", "eval"), default="all")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="state of the run")
    parser.add_argument("--start", type=Path, help="go on from this pipeline's weights")
    parser.add_argument("--part-seconds", type=float, default=1e9, help="stop after this long")
    parser.add_argument("--finish", action="store_true", help="fit the rest into this part")
    parser.add_argument("--minutes", type=float, default=20.0, help="training time in all")
    parser.add_argument("--model", type=Path, default=MODEL, help="where the pipeline goes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--export", type=Path, help="folder for results cut into small files")
    parser.add_argument("--tiny", action="store_true", help="minimal sizes: does it run at all")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    words = [w for w in sys.argv[1:] if w not in ("--export", str(args.export))]
    args.shown = " ".join(["python samples/train_demo/train.py", *words])
    return args


def main() -> None:
    """Run the stages that are asked for and not done yet."""
    args = arguments()
    plan = polish_plan(60 * args.minutes) if args.start else full_plan(args.minutes)
    run = Run(args, tiny_plan() if args.tiny else plan)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    set_up_cuda()
    run.log(f"{records.machine()}")
    vae = None
    if args.stage in ("all", "ae", "dit"):
        vae = stage_autoencoder(run)
    if run.device.type == "cuda":
        run.log(choose_attention())
    done = True
    if args.stage in ("all", "dit"):
        done = stage_transformer(run, vae, stage_text(run))
    if done and args.stage in ("all", "eval"):
        stage_evaluation(run)
    elif not done:
        preview(run)
        run.record["parts"].append(round(time.time() - run.begin, 1))
        run.note("transformer")
    run.log(f"part took {time.time() - run.begin:.0f} s; done: {done}")


if __name__ == "__main__":
    main()

"""Write the demo model's card from the measured results: `python samples/train_demo/card.py`."""

from __future__ import annotations

import json
from pathlib import Path

from captions import vocabulary
from scenes import BACKGROUND_COLOURS, DIRECTIONS, OBJECT_COLOURS, SHAPES, SIZES, SPEEDS, TEXTURES

HERE = Path(__file__).resolve().parent
CARD = HERE.parent / "demo-model" / "README.md"
RESULTS = HERE.parent / "results"
RUNS = ("unseen_20_steps", "unseen_12_steps", "unseen_256", "unseen_wide")
COLUMNS = ("colour", "background", "shape", "direction")

TEXT = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---
# dit_accel demo model

A real Wan text-to-video pipeline in miniature (12 M parameters, 24 MB in bf16), so that attention
kernels can be tried on any machine: word-level tokenizer, a 2-layer UMT5 encoder, Wan 2.1's causal
video autoencoder (8x8x4, 16 channels, 2.6 M) and an 8-layer `WanTransformer3DModel` of width 256
(9 M). It draws simple shapes that move over textured backgrounds, and nothing else.

```python
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained("samples/demo-model")
frames = pipe(
    "a large yellow star moves right quickly over a checkered purple background",
    height=192, width=192, num_frames=33, num_inference_steps=12, guidance_scale={guidance},
).frames[0]
```

Recommended: `guidance_scale={guidance}`, 12 to 20 steps, 33 frames, 192x192 (9x24x24 = 5,184
tokens), 256x256, 144x256 or 256x144. Other sizes that are multiples of 16 work less well.

## Prompts

    a [size] COLOUR SHAPE moves DIRECTION [speed] [behind a pillar]
      [and a [size] COLOUR SHAPE moves DIRECTION [speed]]
      over a [texture] COLOUR background [while the camera pans DIRECTION]

{words}
{count} words in all; others become `<unk>`. The empty negative prompt is the unconditional caption.

## Data and training

Clips are rendered on the fly ([`samples/train_demo`](../train_demo)): sprites with plain, striped
or ringed shading, five background textures, and in a third of the clips a camera pan, a pillar in
front or a second object. A tenth of all combinations of colour, shape, direction and background
never occurs in training. {training}

## Measured

Plain `WanPipeline` samples of single-object prompts whose combination never occurred in training,
judged by plain image analysis ([`checker.py`](../train_demo/checker.py)); percent with 95 % Wilson
intervals, on {gpu}, torch {torch}, diffusers {diffusers}.

{table}

The checker itself: {checker}
Full figures: [`demo_adherence.json`](../results/demo_adherence.json),
[`demo_training.json`](../results/demo_training.json).

## Limits

Small shapes blur, stars sometimes grow extra points, and the autoencoder softens fine textures.
{limits}
"""


def _words() -> str:
    rows = {
        "colours of objects": OBJECT_COLOURS,
        "colours of backgrounds": BACKGROUND_COLOURS,
        "shapes": SHAPES,
        "sizes": SIZES,
        "directions": DIRECTIONS,
        "speeds": SPEEDS,
        "textures": TEXTURES,
    }
    return "\n".join(f"- {name}: {', '.join(values)}" for name, values in rows.items())


def _cell(score: dict) -> str:
    low, high = score["interval"]
    return f"{score['percent']} ({low}-{high})"


def _table(adherence: dict) -> str:
    lines = ["| clip | steps | prompts | " + " | ".join(COLUMNS) + " |", "|---" * 7 + "|"]
    for name in RUNS:
        if row := adherence.get(name):
            size = f"{row['frames']} x {row['height']}x{row['width']}"
            cells = [size, str(row["steps"]), str(row["prompts"])]
            lines.append(
                "| " + " | ".join(cells + [_cell(row["scores"][c]) for c in COLUMNS]) + " |"
            )
    chance = adherence["chance_wrong_prompts"]
    cells = ["the first row's clips against wrong prompts", "", ""]
    lines.append("| " + " | ".join(cells + [_cell(chance[c]) for c in COLUMNS]) + " |")
    return "\n".join(lines)


def _checker(training: dict) -> str:
    first = training["autoencoder"]["validation"][0]
    truth, decoded = (
        ", ".join(f"{c} {first[k][c]['percent']}" for c in COLUMNS)
        for k in ("checker_truth", "checker_decoded")
    )
    psnr = " and ".join(
        f"{v['psnr_of_mean_error']} dB at {v['size'][1]}x{v['size'][2]}"
        for v in training["autoencoder"]["validation"]
    )
    return (
        f"on {first['clips']} rendered clips {truth} percent; on their autoencoder\n"
        f"reconstructions {decoded} percent (PSNR {psnr})."
    )


def _training(training: dict) -> str:
    ae, dit = training["autoencoder"], training["transformer"]
    text = (
        f"On one {training['machine']['gpu']}: the autoencoder for {ae['train_seconds']:.0f} s, "
        f"the transformer for\n{dit['seconds']:.0f} s ({dit['steps']:,} steps) on cached latents, "
        "rectified flow with shift 3, Muon and AdamW, first at 96 px."
    )
    if polish := training.get("polish"):
        text += (
            "\nThere the text encoder was trained by the transformer's loss and learned a bag of "
            "words; it was\nthen trained again on captions alone (which word belongs to what), and "
            f"the transformer went on\nwith it for {polish['seconds']:.0f} s "
            f"({polish['steps']:,} steps)."
        )
    return text


def main() -> None:
    """Write the card beside the model."""
    adherence = json.loads((RESULTS / "demo_adherence.json").read_text())
    training = json.loads((RESULTS / "demo_training.json").read_text())
    limits = (
        "Prompts whose two colours could be swapped (red on green, white on blue) often come out\n"
        "swapped: the text encoder does not tell whose colour a word is."
    )
    machine = adherence["machine"]
    content = TEXT.format(
        guidance=adherence["guidance_scale"],
        words=_words(),
        count=len(vocabulary()),
        training=_training(training),
        gpu=machine["gpu"],
        torch=machine["versions"]["torch"],
        diffusers=machine["versions"]["diffusers"],
        table=_table(adherence),
        checker=_checker(training),
        limits="" if "polish" in training else limits,
    )
    CARD.write_text(content.rstrip() + "\n")


if __name__ == "__main__":
    main()

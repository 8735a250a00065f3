"""Sparse attention in a diffusers pipeline: one line more than without.

Run it from the repository's root; the model is the small one of samples/demo-model.
"""

from __future__ import annotations

from diffusers import WanPipeline
from diffusers.utils import export_to_video

import dit_accel  # noqa: F401  (adds the methods to diffusers' pipelines)

pipe = WanPipeline.from_pretrained("samples/demo-model")
pipe.enable_sparse_attention()

prompt = "a large red circle moves right slowly over a striped blue background"
frames = pipe(
    prompt, height=192, width=192, num_frames=33, num_inference_steps=12, guidance_scale=2.5
).frames[0]

export_to_video(frames, "quickstart.mp4", fps=16)
print(pipe.sparse_attention_report())

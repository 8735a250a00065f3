"""The shipped demo model, and what its training relies on."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "samples" / "demo-model"
sys.path.insert(0, str(ROOT / "samples" / "train_demo"))

from autoencoder import decode, encode, light_norms  # noqa: E402
from demo_model import build_tokenizer, build_transformer, build_vae  # noqa: E402
from diffusers import WanPipeline  # noqa: E402
from flow import encode_text, set_padding, use_compact_text  # noqa: E402
from latents import tokenise  # noqa: E402

PROMPTS = ["a small red circle moves left slowly over a striped blue background", ""]


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    pipe = WanPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_files_are_small_and_classes_public():
    sizes = [f.stat().st_size for f in MODEL.rglob("*") if f.is_file()]
    assert max(sizes) < 15_000_000 and sum(sizes) < 25_000_000
    index = json.loads((MODEL / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]


def test_plain_pipeline_generates(pipe):
    out = pipe(PROMPTS[0], height=32, width=48, num_frames=5, num_inference_steps=2).frames
    assert out.shape == (1, 5, 32, 48, 3)
    assert out.min() >= 0 and out.max() <= 1 and out.std() > 0.01


def test_tokenizer_round_trip(pipe):
    for tokenizer in (pipe.tokenizer, build_tokenizer()):
        ids = tokenizer("A small RED circle, moves left.").input_ids
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text.replace(" ,", ",").replace(" .", ".") == "a small red circle, moves left."
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer("zebra").input_ids[0] == tokenizer.unk_token_id


@pytest.mark.parametrize("length", [512, 226])
def test_one_padding_token_stands_for_all(pipe, length):
    embeddings, _ = pipe.encode_prompt(
        PROMPTS,
        do_classifier_free_guidance=False,
        max_sequence_length=length,
        dtype=torch.float32,
    )
    torch.manual_seed(0)
    latents, timesteps = torch.randn(2, 16, 2, 4, 4), torch.tensor([500.0, 900.0])
    compact = copy.deepcopy(pipe.transformer)
    set_padding(use_compact_text(compact), length)
    with torch.no_grad():
        stock = pipe.transformer(latents, timesteps, embeddings, return_dict=False)[0]
        text = encode_text(pipe.text_encoder, tokenise(PROMPTS)).to(stock.dtype)
        ours = compact(latents, timesteps, text, return_dict=False)[0]
    assert torch.allclose(stock, ours, atol=2e-3 * float(stock.abs().max()))


def test_whole_clip_coding_equals_stock():
    torch.manual_seed(0)
    vae = build_vae().eval()
    clip = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    with torch.no_grad():
        mean, _ = encode(vae, clip)
        assert torch.allclose(mean, vae.encode(clip).latent_dist.mean, atol=1e-5)
        out = decode(vae, mean)
        assert torch.allclose(out.clamp(-1, 1), vae.decode(mean).sample, atol=1e-5)
        with light_norms(vae):
            assert torch.allclose(encode(vae, clip)[0], mean, atol=1e-4)


def test_transformer_shape():
    transformer = build_transformer()
    assert transformer.config.attention_head_dim == 64 and len(transformer.blocks) == 8
    assert 8e6 < sum(p.numel() for p in transformer.parameters()) < 10e6

"""The demo pipeline's parts: a real Wan text-to-video pipeline in miniature.

Run as a script it writes a randomly initialised pipeline of the same structure:
`python samples/train_demo/demo_model.py OUT_DIR`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from captions import SPECIAL, vocabulary
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

PAD, EOS, UNK = range(3)
Z_DIM = 16
TEXT_DIM = 128
SHIFT = 3.0
MAX_SHARD = "10MB"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: lower case, words and punctuation, `</s>` at the end."""
    ids = {word: i for i, word in enumerate(vocabulary())}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)]
    )
    pad, eos, unk = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, eos_token=eos, unk_token=unk, model_max_length=512
    )


def build_text_encoder() -> UMT5EncoderModel:
    """Two UMT5 encoder layers, trained together with the transformer."""
    config = UMT5Config(
        vocab_size=len(vocabulary()),
        d_model=TEXT_DIM,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=PAD,
        eos_token_id=EOS,
        tie_word_embeddings=True,
    )
    return UMT5EncoderModel(config)


def build_vae() -> AutoencoderKLWan:
    """Wan 2.1's causal video autoencoder, 2.6 M parameters (8x8x4 compression)."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=Z_DIM,
        num_res_blocks=1,
        latents_mean=[0.0] * Z_DIM,
        latents_std=[1.0] * Z_DIM,
    )


def build_transformer() -> WanTransformer3DModel:
    """Wan's transformer with 8 layers of width 256 (four heads of 64), 9 M parameters."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=Z_DIM,
        out_channels=Z_DIM,
        text_dim=TEXT_DIM,
        freq_dim=256,
        ffn_dim=1024,
        num_layers=8,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=128,
    )


def save_pipeline(
    folder: Path,
    vae: AutoencoderKLWan,
    text_encoder: UMT5EncoderModel,
    transformer: WanTransformer3DModel,
) -> None:
    """Write a bf16 pipeline that plain `WanPipeline.from_pretrained(folder)` loads.

    transformers 5 names its own fast tokenizer class `TokenizersBackend`; the public name
    `PreTrainedTokenizerFast` is written instead, which every release knows.
    """
    pipe = WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder.to(torch.bfloat16),
        vae=vae.to(torch.bfloat16),
        transformer=transformer.to(torch.bfloat16),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )
    pipe.save_pretrained(folder, max_shard_size=MAX_SHARD)
    _rewrite(folder / "model_index.json", "tokenizer", ["transformers", "PreTrainedTokenizerFast"])
    config = folder / "tokenizer" / "tokenizer_config.json"
    _rewrite(config, "tokenizer_class", "PreTrainedTokenizerFast")


def _rewrite(path: Path, key: str, value: object) -> None:
    content = json.loads(path.read_text())
    content[key] = value
    content.pop("_name_or_path", None)
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Write a random pipeline, for tests of everything but the pictures."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    save_pipeline(args.folder, build_vae(), build_text_encoder(), build_transformer())


if __name__ == "__main__":
    main()

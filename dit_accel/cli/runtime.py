"""Device, data type, and loading a pipeline with its weights."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

from dit_accel.errors import DitAccelError, unknown
from dit_accel.models.find import Model

if TYPE_CHECKING:
    import torch

OFFLOADS = ("none", "model", "sequential", "group")
DTYPES = {
    "fp32": "float32",
    "float32": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
}


def pick_device(name: str | None) -> torch.device:
    """The device that `--device` names, the GPU where there is one by default."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown("device", name, ["cpu", "cuda", "cuda:0", "mps"]) from None
    if device.type == "cuda":
        _check_cuda(device, name)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise DitAccelError("--device mps: this machine or this build of torch has no Metal GPU")
    elif device.type not in ("cpu", "mps", "cuda"):
        raise unknown("device", name, ["cpu", "cuda", "cuda:0", "mps"])
    return device


def _check_cuda(device: torch.device, name: str) -> None:
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if device.index is not None and device.index >= count:
            raise DitAccelError(f"--device {name}: this machine has {count} GPU(s), from cuda:0 on")
        return
    build = torch.version.cuda or torch.version.hip
    if build:
        reason = f"torch {torch.__version__} is built for CUDA {build} but finds no GPU or driver"
        advice = "check `nvidia-smi` and CUDA_VISIBLE_DEVICES"
    else:
        reason = f"torch {torch.__version__} is a build without CUDA"
        advice = "install a CUDA build of torch (https://pytorch.org/get-started)"
    raise DitAccelError(f"--device {name}: {reason}. To go on, {advice}, or use --device cpu.")


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The data type that `--dtype` names; by default bfloat16 on a GPU and float32 on a CPU."""
    import torch

    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name.lower() not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return getattr(torch, DTYPES[name.lower()])


def check_offload(offload: str, device: torch.device) -> None:
    if offload not in OFFLOADS:
        raise unknown("offload", offload, OFFLOADS)
    if offload != "none" and device.type == "cpu":
        raise DitAccelError(
            f"--offload {offload} moves weights between a GPU and the CPU, and this run is on the "
            "CPU: leave it out"
        )


def quiet() -> None:
    """Silence the progress bars and notices of the libraries; the command line has its own.

    Before they are imported, because some speak while they are. Downloads keep theirs.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers|transformers")
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def load(model: Model, pipeline_class: Any, dtype: torch.dtype, variant: str | None = None) -> Any:
    """The pipeline with its weights, on the CPU.

    Wan's autoencoder stays in float32, as its authors run it. Raises DitAccelError where files are
    missing or broken.
    """
    import torch
    from safetensors import SafetensorError

    types: Any = {"default": dtype, "vae": torch.float32} if model.family == "wan" else dtype
    try:
        pipe = pipeline_class.from_pretrained(
            model.source, revision=model.revision, variant=variant, dtype=types
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise DitAccelError(f"cannot load {model.source}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def place(pipe: Any, device: torch.device, offload: str) -> None:
    """Put the pipeline on the device, whole or piece by piece."""
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(
            onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda"
        )
    else:
        pipe.to(device)

"""Launches of compiled kernels that cost the host little.

`jit[grid](...)` looks at every argument of every call, to find the kernel that was compiled for
such ones: half of the host's time of a call with our long lists of arguments. Here the caller keeps
what was compiled, under a key of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


class Compiled:
    """A compiled kernel and its constants, for calls that are alike in all that Triton compiles
    for: types, and of a pointer whether it is aligned to 16 bytes."""

    def __init__(self, kernel: Any, constants: Sequence[Any]) -> None:
        self._run, self._function = kernel.run, kernel.function
        self._metadata = kernel.packed_metadata
        self._constants = constants

    def run(self, grid: tuple[int, ...], arguments: Sequence[Any], device: torch.device) -> None:
        """Launch it; arguments: all before the constants."""
        if torch._C._cuda_getDevice() != device.index:
            with torch.cuda.device(device):
                self.run(grid, arguments, device)
            return
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        self._run(
            *(*grid, 1, 1)[:3], stream, self._function, self._metadata, None, None, None,
            *arguments, *self._constants,
        )  # fmt: skip


def launch(
    kept: dict[Any, Any], key: Any, jit: Any, grid: tuple[int, ...], arguments: Sequence[Any],
    constants: dict[str, Any], device: torch.device,
) -> None:  # fmt: skip
    """Run `jit`; the kernel that it compiles to is kept in `kept`, for calls of the same key.

    arguments: those before the constants, in order. constants: by name; also options such as
    num_warps. key: must tell apart all calls that Triton would compile anew.
    """
    found: Compiled | None = kept.get(key)
    if found is not None and not _watched():
        found.run(grid, arguments, device)
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel = jit[grid](*arguments, **constants)
    if device.type == "cuda" and torch.version.hip is None:
        names = jit.arg_names[len(arguments) :]
        kept[key] = Compiled(kernel, [constants[name] for name in names])


class Launch:
    """A launch whose arguments are the same from call to call, but those at some places.

    Args: see `launch`. places: of the arguments that are given anew at each call.
    """

    def __init__(
        self,
        jit: Any,
        grid: tuple[int, ...],
        arguments: Sequence[Any],
        constants: dict[str, Any],
        places: Sequence[int],
    ) -> None:
        self._jit, self._grid, self._constants = jit, grid, constants
        self._places = tuple(places)
        self._arguments = list(arguments)
        for place in self._places:  # a call's tensors are not kept alive
            self._arguments[place] = None
        self._kept: dict[Any, Compiled] = {}

    def __call__(self, device: torch.device, *changing: Any) -> None:
        """Run it with these arguments at the places."""
        arguments = self._arguments.copy()
        for place, value in zip(self._places, changing, strict=True):
            arguments[place] = value
        launch(self._kept, None, self._jit, self._grid, arguments, self._constants, device)


_kept: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


def launches_of(owner: Any) -> dict[Any, Any]:
    """Where the launches of `owner` (a plan, blocks) are kept, as long as it lives."""
    found = _kept.get(owner)
    if found is None:
        found = _kept[owner] = {}
    return found


def alike(*tensors: Tensor) -> tuple[Any, ...]:
    """Of tensors, all that a launch over them depends on but their address."""
    return tuple((x.shape, x.stride(), x.dtype, x.data_ptr() & 15) for x in tensors)


def traced(*tensors: Tensor) -> bool:
    """Whether a graph is made of what happens to these tensors: a launch would not be in it."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _watched() -> bool:
    """Whether somebody, a profiler say, wants to be told of launches."""
    runtime = _runtime()
    if runtime is None:
        return True
    return bool(_calls(runtime.launch_enter_hook) or _calls(runtime.launch_exit_hook))


@lru_cache(maxsize=1)
def _runtime() -> Any:
    """Triton's settings, later than 3.3; asked after a launch, since torch runs without Triton."""
    try:
        from triton import knobs
    except ImportError:
        return None
    return knobs.runtime


def _calls(hook: Any) -> Any:
    """What a hook of Triton's calls: a chain of functions, or itself in older versions."""
    return hook is not None and getattr(hook, "calls", True)


def results_like(q: Tensor, covers: bool = True) -> tuple[Tensor, Tensor]:
    """Where a kernel writes: out like q [B, S, H, D], and LSE float32 [B, H, S]; 0 and -inf where
    it does not write every row."""
    batch, length, heads, _ = q.shape
    out = torch.empty_like(q)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    if not covers:
        out.zero_()
        lse.fill_(-torch.inf)
    return out, lse

"""Launches of compiled kernels that cost the host little.

`jit[grid](...)` looks at every argument of every call, to find the kernel that was compiled for
such ones: half of the host's time of a call with our long lists of arguments. Where all but a few
are the same from call to call, a `Launch` keeps them beside the compiled kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dit_accel.kernels.machine import interpreted

try:  # later than Triton 3.3
    from triton import knobs
except ImportError:
    knobs = None


class Launch:
    """A kernel with its arguments; those at some places are given anew at each call.

    What is given must be alike in all that Triton compiles for: its type, and of a pointer whether
    it is aligned to 16 bytes. Who keeps a `Launch` keeps it under a key that says so.

    Args:
        jit: the kernel. grid: of programs. arguments: those before the constants, in order.
        constants: by name; also options such as num_warps. places: of what changes.
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
        self._sizes = (*grid, 1, 1)[:3]
        self._places = tuple(places)
        self._first = list(arguments)
        for place in self._places:  # a call's tensors are not kept alive
            self._first[place] = None
        self._all: list[Any] = []
        self._kernel: Any = None

    def __call__(self, *changing: Any) -> None:
        """Run it where the first of `changing` is, a tensor."""
        device = changing[0].device
        if self._kernel is None or _watched():
            with torch.cuda.device_of(changing[0]):
                self._compiled(changing)
            return
        arguments = self._all.copy()
        for place, value in zip(self._places, changing, strict=True):
            arguments[place] = value
        if torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):
                self._run(device.index, arguments)
        else:
            self._run(device.index, arguments)

    def _run(self, device: int, arguments: list[Any]) -> None:
        kernel = self._kernel
        stream = torch._C._cuda_getCurrentRawStream(device)
        kernel.run(
            *self._sizes, stream, kernel.function, kernel.packed_metadata, None, None, None,
            *arguments,
        )  # fmt: skip

    def _compiled(self, changing: Sequence[Any]) -> None:
        """Run it by Triton's own way, which compiles it the first time."""
        arguments = self._first.copy()
        for place, value in zip(self._places, changing, strict=True):
            arguments[place] = value
        kernel = self._jit[self._grid](*arguments, **self._constants)
        if torch.version.hip is None and not interpreted():
            names = self._jit.arg_names[len(arguments) :]
            self._all = [*self._first, *(self._constants[name] for name in names)]
            self._kernel = kernel


_kept: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


def launches_of(owner: Any) -> dict[Any, Any]:
    """The launches that are kept as long as `owner` lives, by key; empty at first."""
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
    if knobs is None:
        return True
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)

"""What is made once from a plan: when it is made again, when it goes, where it may not be made."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from dit_accel.kernels.once import once


class Key:
    pass


def test_made_once_for_each_key_and_arguments() -> None:
    calls = []

    @once
    def made(key: Key, n: int) -> list[int]:
        """What it does."""
        calls.append((key, n))
        return [n]

    one, two = Key(), Key()
    assert made(one, 1) is made(one, 1) and made(one, 1) is not made(two, 1)
    assert made(one, 2) == [2] and calls == [(one, 1), (two, 1), (one, 2)]
    assert made.__doc__ == "What it does."


def test_keywords_are_part_of_the_key() -> None:
    made = once(lambda key, n=0, *, m=0: [n, m])
    key = Key()
    assert made(key, m=1) == [0, 1] and made(key, m=2) == [0, 2] and made(key) == [0, 0]
    assert made(key, m=1) is made(key, m=1) and made(key, n=3, m=1) is made(key, m=1, n=3)


def test_goes_with_its_key() -> None:
    made = once(lambda key: Key())
    key = Key()
    gone = []
    weakref.finalize(made(key), gone.append, True)
    del key
    gc.collect()
    assert gone == [True]


def test_not_inside_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    made = once(lambda key: object())
    known, new = Key(), Key()
    first = made(known)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert made(known) is first
    with pytest.raises(RuntimeError, match="first time while a CUDA graph is captured"):
        made(new)
    monkeypatch.undo()
    assert made(new) is made(new)

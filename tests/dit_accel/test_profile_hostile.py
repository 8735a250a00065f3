"""Generated hostile profiles: an error or a profile within a second, and nothing else happens."""

from __future__ import annotations

import contextlib
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from dit_accel import DitAccelError
from dit_accel.engine.profile import Profile, parse_profile

FILES = 200
RULE = "[[rule]]\ncompute = 'sliding_tile'\n"


def hostile(seed: int) -> str:
    """A file of up to some megabytes that is long, deep or wrong in one way."""
    draw = random.Random(seed)
    n = int(10 ** draw.uniform(1, 5.5))
    key = draw.choice(
        [
            "heads",
            "layers",
            "steps",
            "window",
            "tile",
            "reuse",
            "tail",
            "union",
            "branch",
            "expert",
            "compute",
        ]
    )
    part = draw.choice(["a", '"a"', "'a'", '" . "'])
    codes = [0, 7, 34, 39, 92, 91, 123, 46, 61, 10, 233, 8232]
    bad = "".join(chr(draw.choice(codes)) for _ in range(9))
    makers = [
        lambda: f"[tuned]\na = {draw.choice('19')}{'9' * n}",
        lambda: f"[tuned]\na = {'9' * n}.{'9' * n}e{'9' * draw.randint(1, 9)}",
        lambda: f"[tuned]\na = 0x{'f' * n}",
        lambda: "[tuned]\na = " + "[" * n + "]" * draw.choice([n, 0]),
        lambda: "[tuned]\na = " + "{a = " * n,
        lambda: "[tuned]\n" + draw.choice([".", " . "]).join([part] * n) + " = 1",
        lambda: f"[{'.'.join([part] * n)}]\n",
        lambda: f"[[rule]]\n{'.'.join([key] * n)} = 1",
        lambda: RULE * n,
        lambda: "\n".join(f"[tuned.a{i}]" for i in range(n)),
        lambda: "[tuned]\n" + "\n".join(f"a{i} = {{b = [{i}]}}" for i in range(n)),
        lambda: f"[[rule]]\n{key} = '{'x' * n}'",
        lambda: f"[[rule]]\n{key} = [{'1.5, ' * n}]",
        lambda: f"[[rule]]\n{key} = [{', '.join(['[1]'] * n)}]",
        lambda: f"[[rule]]\ncompute = 'disc'\n{key} = '{draw.choice('0-,.')}{'---1' * n}'",
        lambda: f"[[rule]]\ncompute = 'disc'\n{draw.choice(['heads', 'layers'])} = '{'9' * n}'",
        lambda: f"[[rule]]\ncompute = 'disc'\nheads = '{'0,' * n}0'",
        lambda: f"[[rule]]\nheads = {{{', '.join(repr(str(i)) + ' = 1' for i in range(n))}}}",
        lambda: f"[[rule]]\nunion = [{', '.join(['{compute = 1}'] * n)}]",
        lambda: f"[[rule]]\nunion = [{{union = [{'{union = [' * n}",
        lambda: f"[profile]\n{draw.choice(['name', 'family', 'description'])} = '{'y' * n}'",
        lambda: f"[profile]\nname = {draw.choice(['nan', '-inf', '1979-05-27', '{}', 'true'])}",
        lambda: f"[{'z' * n}]",
        lambda: draw.choice(['"""', "'''", '"', "'"]) * n,
        lambda: 'a = """' + '\\"' * n,
        lambda: " " * n + "." * n,
        lambda: bad * max(1, n // 9),
        lambda: "[[rule]]\ncompute = '__import__(\"os\").system(\"touch /tmp/x\")'",
        lambda: f"[[rule]]\nlayers = '{'../' * min(n, 300)}etc/passwd'",
        lambda: f"[profile]\nfamily = '{'../' * min(n, 300)}etc/passwd'",
    ]  # fmt: skip
    return makers[seed % len(makers)]()


@pytest.fixture
def watched() -> Iterator[list[str]]:
    """Files, processes and code that anything touches meanwhile."""
    seen: list[str] = []
    on = [True]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if on and event in ("open", "exec", "compile", "import", "os.system", "subprocess.Popen"):
            seen.append(f"{event} {args[0]!r}"[:200])

    sys.addaudithook(hook)  # nothing removes it: it goes to sleep
    yield seen
    on.clear()


def test_two_hundred_hostile_files(watched: list[str]) -> None:
    for text in ("[[rule]]\ncompute = 'disc'\n", "[", "[[rule]]\ncompute = 'dsc'"):
        with contextlib.suppress(DitAccelError):  # what is imported at first use is imported now
            parse_profile(text)
    refused = 0
    for seed in range(FILES):
        text = hostile(seed)
        watched.clear()
        begin = time.process_time()
        try:
            made = parse_profile(text, "mine.toml")
        except DitAccelError as error:
            refused += 1
            assert len(str(error)) < 1000, seed
        else:
            assert isinstance(made, Profile) and len(repr(made)) < 1 << 20
        assert time.process_time() - begin < 1, seed
        assert watched == [], seed
    assert refused > FILES * 0.7


def test_long_and_flat_files_are_fine() -> None:
    """What a tuner may write: many numbers in a line, dots within texts."""
    numbers = ", ".join(["1.5"] * 500)
    words = ".".join("abcdefghijklmnopqrstuvw")
    text = f"[profile]\ndescription = '{words}'\n[tuned]\na = [{numbers}]\n"
    assert parse_profile(text + RULE * 900).tuned["a"] == [1.5] * 500


@pytest.mark.parametrize(
    "heads", ["0---1", "9" * 5000, "1-2-3", "0--", "1e3-2", "0.5-0.6-0.7", "١-٢"]
)
def test_heads_that_are_none(heads: str) -> None:
    with pytest.raises(DitAccelError, match="heads: expected 'all'") as caught:
        parse_profile(f"[[rule]]\ncompute = 'disc'\nheads = '{heads}'\n")
    assert len(str(caught.value)) < 1000

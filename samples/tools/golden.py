"""Golden records: what pipelines and kernels give, bit by bit, to compare two trees by.

    python samples/tools/golden.py record before.json --tree <checkout>
    python samples/tools/golden.py record after.json
    python samples/tools/golden.py compare before.json after.json

Both records must come from one machine with the same packages: rounding is theirs. A record has
the sha256 of every output, and the receipts without times; kernels that need a GPU are interpreted.
`--gpu` records the GPU's kernels instead, twice each, so that a result that moves is seen.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
PACKAGES = ("torch", "triton", "numpy", "diffusers", "transformers")
SHADOW = "dit_accel._shadow."
"""Copies of diffusers' modules, which have their files' names."""
WIDTH = 34
"""Characters of a value in the table of differences; of a hash the first 12 are shown."""
Entry = dict[str, Any]


def main() -> int:
    options = parse()
    if options.verb == "compare":
        return compare(options.first, options.second)
    if options.jobs < 1:
        print(f"--jobs: expected a whole number >= 1, got {options.jobs}.", file=sys.stderr)
        return 2
    prepare(options.tree, options.gpu)
    import torch

    if options.gpu and not torch.cuda.is_available():
        print("--gpu: this machine has no CUDA device.", file=sys.stderr)
        return 2
    return record(options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("record", help="write a record")
    verb.add_argument("out", type=Path)
    verb.add_argument("--tree", type=Path, default=ROOT, help="the checkout to record")
    verb.add_argument("--only", nargs="+", default=[], help="entries that contain one of these")
    verb.add_argument("--gpu", action="store_true", help="the kernels of a CUDA device")
    verb.add_argument("--jobs", type=int, default=1, help="processes")
    verb = verbs.add_parser("compare", help="print what differs; 1 if anything does")
    verb.add_argument("first", type=Path)
    verb.add_argument("second", type=Path)
    return parser.parse_args()


def prepare(tree: Path, gpu: bool) -> None:
    """Make `import dit_accel` take `tree`, on one thread; before anything imports torch."""
    for name in THREADS:
        os.environ[name] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    if gpu:
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(tree.resolve()))


def record(options: argparse.Namespace) -> int:
    tree, begin = options.tree.resolve(), (time.perf_counter(), time.process_time())
    wanted = [name for name in entry_names(options.gpu) if selected(name, options.only)]
    if not wanted:
        print("--only: no entry has one of these in its name.", file=sys.stderr)
        return 2
    entries: dict[str, Entry] = {}
    for name, entry in run_all(wanted, tree, options.gpu, options.jobs):
        entries[name] = entry
        progress(len(entries), len(wanted))
    wall, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
    data = {"header": header(tree, options), "entries": dict(sorted(entries.items()))}
    options.out.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
    errors = sum("error" in entry for entry in entries.values())
    print(
        f"{options.out}: {len(entries)} entries, {errors} of them errors, "
        f"in {wall:.0f} s ({cpu:.0f} s of this process's CPU)",
        file=sys.stderr,
    )
    return 0


def progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {total}", end="\r", file=sys.stderr, flush=True)


def entry_names(gpu: bool) -> list[str]:
    import golden_kernels
    import golden_pipelines

    names = [f"kernels/{name}" for name in golden_kernels.names(gpu)]
    return names if gpu else names + [f"pipelines/{name}" for name in golden_pipelines.names()]


def selected(name: str, only: Iterable[str]) -> bool:
    texts = list(only)
    return not texts or any(text in name for text in texts)


def run_all(names: list[str], tree: Path, gpu: bool, jobs: int) -> Iterator[tuple[str, Entry]]:
    """Entries by name, as they are done; those of one group in one process."""
    if jobs == 1:
        yield from ((name, run_one(name, tree, gpu)) for name in names)
        return
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(group_of(name), []).append(name)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = [pool.submit(run_group, group, tree, gpu) for group in groups.values()]
        for future in waiting:
            yield from future.result()


def group_of(name: str) -> str:
    """What compiles the same kernels, or builds the same pipeline."""
    kind, first, second, *_ = name.split("/")
    return f"{kind}/{second.split('(')[0]}" if kind == "kernels" else f"{kind}/{first}"


def run_group(names: list[str], tree: Path, gpu: bool) -> list[tuple[str, Entry]]:
    return [(name, run_one(name, tree, gpu)) for name in names]


def run_one(name: str, tree: Path, gpu: bool) -> Entry:
    """An entry; an error is one as well."""
    import golden_kernels
    import golden_pipelines
    import torch

    torch.set_num_threads(1)
    kind, _, rest = name.partition("/")
    try:
        if kind == "kernels":
            entry = golden_kernels.run(rest, gpu)
        else:
            entry = golden_pipelines.run(rest, tree)
    except Exception as error:  # what a tree cannot do is to be seen among the differences
        entry = {"error": f"{type(error).__name__}: {error}"}
    check_imports(tree)
    return entry


def check_imports(tree: Path) -> None:
    """RuntimeError where a module of dit_accel came from elsewhere than the tree."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        ours = name.partition(".")[0] == "dit_accel" and not name.startswith(SHADOW)
        if ours and file and not Path(file).resolve().is_relative_to(tree):
            raise RuntimeError(f"{name} was imported from another tree: {file}.")


def header(tree: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What a record depends on, and what it holds."""
    import golden_kernels
    import golden_pipelines
    import torch

    about = [golden_kernels.about(options.gpu)]
    if not options.gpu:
        about.append(golden_pipelines.__doc__ or "")
    return {
        "recorded": [" ".join(text.split()) for text in about],
        "only": sorted(options.only),
        "commit": commit(tree),
        "python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if options.gpu else cpu_model(),
        "threads": torch.get_num_threads(),
    }


def commit(tree: Path) -> str:
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def compare(first: Path, second: Path) -> int:
    """Print the differences of two records of the same entries; 1 if there are any."""
    a, b = (json.loads(path.read_text()) for path in (first, second))
    for key in sorted({*a["header"], *b["header"]} - {"only"}):
        one, other = a["header"].get(key), b["header"].get(key)
        if one != other:
            print(f"note: {key}: {shown(one)} | {shown(other)}")
    onlys = a["header"]["only"], b["header"]["only"]
    left, right = (
        {name: e for name, e in x["entries"].items() if all(selected(name, o) for o in onlys)}
        for x in (a, b)
    )
    rows = list(differences(left, right))
    if rows:
        print_table([("entry", "what", first.stem, second.stem), *rows])
    different = len({row[0] for row in rows})
    print(f"{len(left.keys() | right.keys())} entries, {different} differ")
    return 1 if rows else 0


def differences(a: dict[str, Entry], b: dict[str, Entry]) -> Iterator[tuple[str, ...]]:
    """(entry, what, value in a, value in b) of each value that differs."""
    for name in sorted({*a, *b}):
        if name not in a or name not in b:
            yield name, "", *("there" if name in side else "missing" for side in (a, b))
            continue
        if ("error" in a[name]) != ("error" in b[name]):
            yield name, "error", *(shown(side[name].get("error", "none")) for side in (a, b))
            continue
        left, right = (dict(leaves(side[name])) for side in (a, b))
        for path in sorted({*left, *right}):
            values = [side.get(path, "missing") for side in (left, right)]
            if values[0] != values[1]:
                yield name, path, shown(values[0]), shown(values[1])


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in nested tables and lists; empty ones are values."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from leaves(part, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for index, part in enumerate(value):
            yield from leaves(part, f"{path}[{index}]")
    else:
        yield path, value


def shown(value: Any) -> str:
    text = str(value)
    is_hash = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:12] if is_hash else text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."


def print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())

"""Compiles kernels for compute capability 9.0, on any machine, for the tests of one process.

Importing Triton takes as long as many a kernel, so this runs once: each line of its input asks for
a function of a file and its arguments, each line of its output is what that returned, or an error.

echo '["tests/kernels/compile_rules.py", "compile_rules", {}]' \
    | PYTHONPATH=. python tests/kernels/compile_offline.py
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
import traceback
from types import ModuleType


@functools.cache
def module_of(file: str) -> ModuleType:
    """The module of a file, with those that lie beside it."""
    spec = importlib.util.spec_from_file_location(os.path.basename(file).removesuffix(".py"), file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        file, function, arguments = json.loads(line)
        try:
            answer = {"made": getattr(module_of(file), function)(**arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

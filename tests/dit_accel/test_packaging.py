"""The names that other distributions own stay theirs, and every way to install imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAPPED = ("kernels", "pipelines", "configs")


def python(code: str, *, cwd: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    import os

    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True
    )


def test_every_folder_of_code_is_packaged() -> None:
    """And what the packages read at run time: data files beside the code."""
    text = (ROOT / "pyproject.toml").read_text()
    for top in ("dit_accel", *MAPPED):
        for folder in {path.parent for path in (ROOT / top).rglob("*.py")}:
            name = ".".join(folder.relative_to(ROOT).parts)
            full = name if top == "dit_accel" else f"dit_accel.{name}"
            assert f'"{full}",' in text, full
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".css", ".js", ".jinja"):
                assert f'"{path.name}"' in text, path


def test_mapped_folders_have_no_init() -> None:
    assert not [name for name in MAPPED if (ROOT / name / "__init__.py").exists()]


def test_another_distributions_kernels_wins_at_top_level(tmp_path: Path) -> None:
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("def get_kernel():\n    return 'theirs'\n")
    code = "from kernels import get_kernel; print(get_kernel()); import dit_accel.kernels.plan"
    done = python(code, cwd=ROOT, path=str(tmp_path))
    assert done.stdout.strip() == "theirs", done.stderr


def test_a_plain_checkout_imports_lightly(tmp_path: Path) -> None:
    """The catalog needs neither torch nor diffusers; diffusers gets the methods when it comes."""
    code = (
        "import sys, dit_accel; assert len(dit_accel.supported_models()) >= 5;"
        "assert not {'torch', 'diffusers'} & set(sys.modules);"
        "from diffusers import DiffusionPipeline, ModularPipeline as M;"
        "assert all(hasattr(c, 'enable_sparse_attention') for c in (DiffusionPipeline, M));"
        "import dit_accel.pipelines.registry, dit_accel.kernels.patterns;"
        "print(len(dit_accel.profile_names()))"
    )
    done = python(code, cwd=tmp_path, path=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 18, done.stderr


def test_wheel_and_sdist_hold_everything(tmp_path: Path) -> None:
    """Both are built from a copy, and the wheel imports from where it is unpacked."""
    import shutil
    import zipfile

    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".*", "samples", "tests", "out", "*.egg-info", "__pycache__"),
    )
    code = (
        "import setuptools.build_meta as b, sys;"
        f"b.build_sdist({str(tmp_path)!r}); b.build_wheel({str(tmp_path)!r})"
    )
    done = python(code, cwd=source)
    assert done.returncode == 0, done.stderr
    sdist, wheel = next(tmp_path.glob("*.tar.gz")), next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.split("/")[0] in MAPPED]
    for folder, inside in (("dit_accel", ""), ("configs", "dit_accel/")):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in (".css", ".js", ".jinja", ".csv", ".toml"):
                assert f"{inside}{path.relative_to(ROOT).as_posix()}" in names
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    imports = "import dit_accel, dit_accel.kernels.patterns; print(len(dit_accel.profile_names()))"
    done = python(imports, cwd=tmp_path, path=str(installed))
    assert int(done.stdout) >= 18, done.stderr
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    unpacked = next((tmp_path / "unpacked").iterdir())
    assert (unpacked / "kernels" / "plan.py").exists()
    assert list((unpacked / "configs").glob("wan/*.toml"))

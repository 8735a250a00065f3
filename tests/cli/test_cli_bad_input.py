"""What cannot work is refused with advice and exit code 2, before weights are loaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from dit_accel.models import find

pytestmark = pytest.mark.usefixtures("no_loading")


def refused(cli, *args: object, says: tuple[str, ...]) -> None:
    code, text = cli("generate", "a red circle", *args)
    assert code == 2, text
    for words in says:
        assert words in text
    assert "Traceback" not in text
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--profile", "balancd", ("Unknown profile 'balancd'", "Did you mean 'balanced'?")),
        ("--profile", "missing.toml", ("missing.toml",)),
        ("--dtype", "fp31", ("Unknown dtype 'fp31'", "'fp32'")),
        ("--device", "cudda", ("Unknown device 'cudda'", "'cuda'")),
        ("--offload", "modell", ("Unknown offload 'modell'", "'model'")),
        ("--offload", "model", ("on the CPU", "leave it out")),
        ("--out", "x.mp5", ("Did you mean x.mp4?", "folder")),
        ("--out", "/proc/x.mp4", ("Cannot write /proc/x.mp4", "not writable")),
        ("--report", "/proc/x.json", ("Cannot write /proc/x.json", "not writable")),
        ("--report", "/proc", ("--report /proc is a folder",)),
        ("--height", "41", ("does not take 16x41", "--height 48 --width 16")),
        ("--width", "17", ("does not take 17x16", "--height 16 --width 16")),
        ("--height", "512", ("no positions beyond a height of 256", "--height 256")),
        ("--image", "missing.png", ("There is no image missing.png",)),
        ("--image", __file__, ("as an image",)),
        ("--true-cfg-scale", "2", ("WanPipeline takes no --true-cfg-scale", "--guidance-scale")),
        ("--revision", "main", ("--revision is for models of the Hub",)),
    ],
)
def test_wrong_options(cli, tiny_wan: Path, option: str, value: str, says: tuple[str, ...]):
    sizes = {"--height": 16, "--width": 16, "--device": "cpu", option: value}
    flat = [word for pair in sizes.items() for word in pair]
    refused(cli, "--model", tiny_wan, *flat, says=says)


@pytest.mark.parametrize("option", ["--steps", "--height", "--frames", "--fps"])
def test_values_below_range(cli, tiny_wan: Path, option: str):
    refused(cli, "--model", tiny_wan, option, "0", says=("Invalid value", option))


def test_unknown_key_in_a_profile(cli, tiny_wan: Path, tmp_path: Path):
    profile = tmp_path / "mine.toml"
    profile.write_text('[profile]\nname = "mine"\n[[rule]]\ncompute = "dense"\nlayer = "all"\n')
    says = ("'layer'", "Did you mean 'layers'?", "mine.toml")
    refused(cli, "--model", tiny_wan, "--profile", profile, says=says)


@pytest.mark.parametrize(
    "command",
    [
        "generate x --model {wan} --profile w.tml",
        "compare --model {wan} --prompts x --profiles w.tml",
        "doctor --model flux --profile w.tml",
        "bench step --model tiny-wan --profile w.tml",
    ],
)
def test_a_mistyped_profile_is_the_same_to_every_command(cli, tiny_wan: Path, command: str):
    Path("w.toml").write_text('[[rule]]\ncompute = "dense"\n')
    code, text = cli(*command.format(wan=tiny_wan).split())
    assert code == 2, text
    assert "nknown profile 'w.tml': neither a name nor a TOML file. Did you mean 'w.toml'?" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(cli, tiny_wan: Path):
    says = (f"torch {torch.__version__}", "--device cpu")
    refused(cli, "--model", tiny_wan, "--device", "cuda", says=says)


def test_image_for_a_pipeline_without_one(cli, tiny_wan: Path, tmp_path: Path):
    from PIL import Image

    Image.new("RGB", (16, 16)).save(tmp_path / "first.png")
    says = ("WanPipeline takes no --image", "image-to-video")
    refused(cli, "--model", tiny_wan, "--image", tmp_path / "first.png", says=says)


def test_demo_outside_a_checkout(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(find, "ROOT", tmp_path / "site-packages")
    refused(cli, says=("Clone the repository", "make demo", "--model"))


def test_wrong_model_folders(cli, tiny_wan: Path, tmp_path: Path):
    cases: dict[str, tuple[str, ...]] = {
        str(tiny_wan.parent / "tiny-wam"): ("There is no model folder", "tiny-wan?", "owner/name"),
        "dem": ("Did you mean demo?",),
        "wan-14b": ("--model wan-14b is a name for `plan`", "Hub id"),
        str(tiny_wan / "model_index.json"): ("single file", "diffusers' format"),
        str(tiny_wan / "vae"): ("no model_index.json", "one component", str(tiny_wan)),
        str(tiny_wan.parent): ("no model_index.json", "Did you mean", "tiny-wan?"),
    }
    other = tmp_path / "other"
    other.mkdir()
    (other / "weights.safetensors").write_bytes(b"")
    cases[str(other)] = ("no model_index.json", "Found there: weights.safetensors")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text("{")
    cases[str(broken)] = ("Cannot read", "download the model again")
    for folder, says in cases.items():
        refused(cli, "--model", folder, says=says)


def test_unsupported_pipeline(cli, tiny_wan: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_wan, tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "HunyuanDiTPipeline"
    index["transformer"] = ["diffusers", "HunyuanDiT2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    says = ("HunyuanDiTPipeline", "is not supported", "The nearest that is:", "WanPipeline")
    refused(cli, "--model", folder, says=says)


def test_hub_model_that_cannot_be_reached(cli, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    says = ("Cannot reach the Hub for nobody/nothing", "--model a folder")
    refused(cli, "--model", "nobody/nothing", says=says)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("GatedRepoError", ("is gated", "hf auth login")),
        ("RepositoryNotFoundError", ("no model nobody/nothing on the Hub",)),
        ("RevisionNotFoundError", ("no revision 'v9'",)),
        ("RemoteEntryNotFoundError", ("not in diffusers' format",)),
    ],
)
def test_what_the_hub_answers(cli, monkeypatch: pytest.MonkeyPatch, error: str, says):
    import huggingface_hub
    from huggingface_hub import errors

    def download(*args: object, **kwargs: object) -> None:
        kind = getattr(errors, error)
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    refused(cli, "--model", "nobody/nothing", "--revision", "v9", says=says)


def test_unknown_command_and_family(cli):
    code, text = cli("generat", "x")
    assert code == 2 and "No such command" in text
    code, text = cli("profiles", "--family", "wann")
    assert code == 2 and "Did you mean 'wan'?" in text


def test_a_folder_s_name_stays_as_it_is(cli, tmp_path: Path):
    (tmp_path / "here" / "models").mkdir()
    code, text = cli("generate", "a red circle", "--model", "models")
    assert code == 2 and "--model models is no pipeline folder" in text


@pytest.mark.parametrize(
    "option", ["--height 720", "--width 720", "--frames 9", "--profile fast", "--gpu h200"]
)
def test_what_doctor_has_no_use_for_without_a_model(cli, option: str):
    code, text = cli("doctor", *option.split())
    assert code == 2 and f"{option.split()[0]} is for --model" in text


def test_doctor_says_what_is_wrong_and_nothing_else(cli):
    code, text = cli("doctor", "--model", "flux", "--profile", "fats")
    assert code == 2 and "Did you mean 'fast'" in text and "dit-accel doctor" not in text

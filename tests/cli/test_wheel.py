"""A built wheel in an environment without the checkout: its commands, and the model card's own lines with one more.

The environment borrows the installed dependencies of the running interpreter through a .pth file, so that nothing is
downloaded but the build backend; the wheel's own package stands in front of an editable one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path, ok: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command without the checkout on the path."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, capture_output=True, text=True, env={**kept, "COLUMNS": "80", **environment}
    )
    assert (done.returncode == 0) == ok, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of scripts of an environment that holds the wheel."""
    home = tmp_path_factory.mktemp("wheel")
    source = home / "source"
    shutil.copytree(ROOT / "vlmfast", source / "vlmfast", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "venv", home / "env", cwd=home)
    scripts = home / "env" / "bin"
    pip = (scripts / "python", "-m", "pip", "--disable-pip-version-check", "-q")
    try:
        run(*pip, "install", "hatchling", cwd=home)
    except AssertionError as e:
        pytest.skip(f"the build backend cannot be had here: {str(e)[-200:]}")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", home / "dist", source, cwd=home)
    (wheel,) = (home / "dist").glob("*.whl")
    run(*pip, "install", "--no-deps", wheel, cwd=home)
    packages = Path(
        run(scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).stdout.strip()
    )
    # a plain path in a .pth file is appended, and the .pth files in that path are not read: no editable install
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.rmtree(source)
    return scripts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def test_the_wheel_is_what_is_imported(installed: Path, folder: Path) -> None:
    code = "import importlib.util as u, vlmfast; print(vlmfast.__file__); print(u.find_spec('evals'))"
    where, others = run(installed / "python", "-c", code, cwd=folder).stdout.splitlines()
    assert Path(where).is_relative_to(installed.parent) and others == "None"


def test_the_commands_run_in_an_empty_folder(installed: Path, folder: Path) -> None:
    vlmfast = installed / "vlmfast"
    demo = run(vlmfast, "demo", cwd=folder)
    assert "right" in demo.stdout and (folder / "demo-out" / "kept.png").exists()
    picture, clip = "demo-out/picture.png", "demo-out/moves.mp4"
    said = json.loads((folder / "demo-out" / "demo.json").read_text())["media"]
    question = said[0]["questions"][1]["question"]
    asked = run(vlmfast, "ask", question, "--video", clip, "--preset", "safe", cwd=folder)
    assert asked.stdout.strip() and "prefill" in asked.stderr
    streamed = run(vlmfast, "stream", clip, "--ask", question, cwd=folder)
    assert streamed.stdout.strip() and "looked at" in streamed.stderr
    checked = run(vlmfast, "check", "--image", picture, "--rounds", 1, cwd=folder)
    assert "All laws hold" in checked.stdout
    for printed in (demo, asked, streamed, checked):
        assert max(map(len, (printed.stdout + printed.stderr).splitlines())) <= 80


COMMANDS = {  # every command but those of the test above, with what its output must hold; in an empty folder
    "methods": ((), "vidcom2"),
    "heads": (("what ?", "--image", "picture.png"), "head"),
    "calibrate": (("--task", "pocket/colour", "--limit", 2, "--out", "cuts.json"), "cuts.json"),
    "tune": (("--task", "pocket/colour", "--out", "plan.json", "--methods", "uniform-50", "--limit", 4), "plan.json"),
    "roofline": (("--model", "qwen2.5-vl-7b", "--device", "h100"), "decode"),
    "page": (("plan.record.json", "--out", "page.html"), "page.html"),
}


def test_every_other_command_runs_in_an_empty_folder(installed: Path, folder: Path) -> None:
    """Task calibration and `tune` among them, which ask questions and need nothing of a checkout."""
    make = "from PIL import Image; Image.new('RGB', (96, 96), 'red').save('picture.png')"
    run(installed / "python", "-c", make, cwd=folder)
    listed = run(installed / "python", "-c", "from vlmfast.cli import COMMANDS; print(*COMMANDS)", cwd=folder)
    assert set(listed.stdout.split()) == set(COMMANDS) | {"demo", "ask", "stream", "check"}
    for name, (arguments, word) in COMMANDS.items():
        done = run(installed / "vlmfast", name, *arguments, cwd=folder)
        assert word in done.stdout + done.stderr, (name, done.stdout, done.stderr)
    assert {"cuts.json", "plan.json", "plan.html", "page.html"} <= {p.name for p in folder.iterdir()}


def test_curves_without_matplotlib_say_what_to_install(installed: Path, folder: Path) -> None:
    record = json.loads((ROOT / "evals" / "results" / "accuracy-lazy.json").read_text())
    (folder / "r.json").write_text(json.dumps(record))
    blocked = "import sys; sys.modules['matplotlib'] = None; from vlmfast.cli import main; sys.argv[1:] = {}; main()"
    for arguments in (["page", "r.json"], ["page", "r.json", "--out", "p.html"]):
        done = run(installed / "python", "-c", blocked.format(arguments), cwd=folder, ok=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "pip install 'vlmfast[plot]'" in done.stderr
    assert [p.name for p in folder.iterdir()] == ["r.json"]


CARD = """
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration
import vlmfast
from vlmfast import pocket
from vlmfast.video.read import read_video

folder = pocket.path("target")
model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype="auto")
fast = vlmfast.accelerate(model, "safe")  # the one line that is added
processor = AutoProcessor.from_pretrained(folder)
video = read_video("clip.mp4", select="fps:2")
times = {"videos_kwargs": {"do_sample_frames": False, "video_metadata": [video.metadata()]}}
for content, more in (
    ({"type": "image", "image": "picture.png"}, {}),
    ({"type": "video", "video": ["0.png", "1.png", "2.png", "3.png"]}, {}),
    ({"type": "video", "video": video.frames}, {"processor_kwargs": times}),
    ({"type": "video", "video": "clip.mp4"}, {}),
):
    messages = [{"role": "user", "content": [content, {"type": "text", "text": "what moves ?"}]}]
    try:
        inputs = processor.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt", **more
        ).to(model.device)
    except ImportError as e:
        print("error", " ".join(str(e).split()))
        continue
    generated_ids = model.generate(**inputs, max_new_tokens=16)
    trimmed = [out[len(ids):] for ids, out in zip(inputs.input_ids, generated_ids)]
    (text,) = processor.batch_decode(trimmed, skip_special_tokens=True)
    print(content["type"], fast.report.encode["visual_tokens"], inputs.get("second_per_grid_ts"), text)
"""


def test_the_model_cards_lines_run(installed: Path, folder: Path) -> None:
    """Pictures, frames, and a video read by us with its times; by its path where torchcodec and FFmpeg are there."""
    make = (
        "import numpy as np; from PIL import Image; from vlmfast.video.read import write_video\n"
        "f = np.random.default_rng(0).integers(0, 255, (16, 96, 96, 3), np.uint8); write_video('clip.mp4', f, fps=4)\n"
        "Image.fromarray(f[0]).save('picture.png'); [Image.fromarray(f[i]).save(f'{i}.png') for i in range(4)]"
    )
    run(installed / "python", "-c", make, cwd=folder)
    lines = run(installed / "python", "-c", CARD, cwd=folder).stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["image", "video", "video"] and len(lines) == 4
    assert all(int(line.split()[1]) > 0 for line in lines[:3]) and "tensor([1.])" in lines[2]
    assert lines[3].startswith("video ") or "torchcodec" in lines[3], "transformers names what it misses"

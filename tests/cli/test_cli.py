"""The command line on tiny checkpoints and real files: records, streaming, one-line errors, laws, the demo."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from typer.testing import CliRunner

from evals.speed.shapes import TOY
from vlmfast import cli, loading
from vlmfast.bench import shapes
from vlmfast.plan import Plan
from vlmfast.video import Fps, Uniform, read_image, read_video, write_video

QUESTION = "what color is the cat ?"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a 4 s H.264 clip at 4 frames per second, a picture, and whatever checkpoints tests ask for."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (16, 4, 6, 3), dtype=np.uint8)
    frames = coarse.repeat(4, 1).repeat(4, 2)
    write_video(folder / "clip.mp4", frames, fps=4)
    Image.fromarray(frames[0]).save(folder / "a.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(files: Path) -> Callable[[str], str]:
    """Folder of the tiny checkpoint of a family, written once."""

    def get(family: str) -> str:
        folder = files / family
        return str(folder if folder.exists() else tiny.save(family, folder))

    return get


def call(*arguments: Any) -> Any:
    """Run `vlmfast ...` in this process."""
    return CliRunner().invoke(cli.build(), [str(a) for a in arguments])


# -- ask ---------------------------------------------------------------------------------------------------------------


def test_ask_json_on_a_real_video_is_the_record(files: Path, checkpoint: Any) -> None:
    result = call(
        "ask", "--model", checkpoint("qwen2_5_vl"), "--video", files / "clip.mp4", "--fps", 2,
        "--prune", "vidcom2:keep=0.25", "--max-new-tokens", 5, "--json", QUESTION,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert set(record) == {"answer", "tokens", "report", "plan", "notes"}
    assert {"encode", "prefill", "decode"} <= set(record["report"])
    encode, prefill, decode = (record["report"][s] for s in ("encode", "prefill", "decode"))
    # 4 s at 2 frames per second: 8 frames in 4 pairs of 24 x 16 pixels, which the processor scales to its least size
    assert encode["visual_tokens"] % 4 == 0 and encode["kept_tokens"] == round(0.25 * encode["visual_tokens"])
    assert {"encode_ms", "select_ms"} <= set(encode)
    assert {"prefill_ms", "ttft_ms", "cached_tokens", "kv_fast_bytes", "kv_host_bytes"} <= set(prefill)
    assert {"decode_ms_per_token", "total_ms"} <= set(decode)
    assert record["tokens"] == 5
    read = record["report"]["read"]
    assert read["frames"] == 8 and read["read_ms"] > 0 and read["first_token_ms"] > prefill["ttft_ms"]
    assert Plan.from_json(record["plan"]).prune.keep == 0.25


def test_ask_encodes_while_it_reads(files: Path, checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = ("ask", "--model", checkpoint("qwen2_5_vl"), "--video", files / "clip.mp4", "--fps", 2, "--json", QUESTION)
    whole = json.loads(call(*ask).stdout)
    assert "pieces" not in whole["report"]["read"], "so small a video is one piece"
    monkeypatch.setattr("vlmfast.read_ahead.LEAST", 1)
    parts = json.loads(call(*ask).stdout)
    assert parts["report"]["read"]["pieces"] == 4 and "hidden_ms" in parts["report"]["read"]
    assert parts["answer"] == whole["answer"] and parts["tokens"] == whole["tokens"]


def test_ask_reads_frames_at_the_size_of_the_model(files: Path, checkpoint: Any, tmp_path: Path) -> None:
    waves = (127 + 100 * np.sin(np.arange(320) / 20 + np.arange(12)[:, None, None] / 3)).astype(np.uint8)
    write_video(tmp_path / "large.mp4", np.repeat(waves.repeat(192, 1)[..., None], 3, 3), fps=4)
    ask = ("ask", "--model", checkpoint("qwen2_5_vl"), "--video", tmp_path / "large.mp4", "--json", QUESTION)
    sizes, tokens = {}, set()
    for size in ("model", "full", "100"):
        report = json.loads(call(*ask, "--max-new-tokens", 2, "--size", size).stdout)["report"]
        sizes[size] = report["read"]["size"]
        tokens |= {report["encode"]["visual_tokens"]} if size != "100" else set()
    assert sizes["full"] == [192, 320] and sizes["100"] == [60, 100] and 60 < sizes["model"][0] < 192
    assert len(tokens) == 1, "the same grid"
    for size in ("0", "large", "-1", "70000"):
        result = call(*ask, "--size", size)
        assert result.exit_code == 2 and "--size" in result.stderr and size in result.stderr


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_ask_without_methods_answers_as_transformers_does(family: str, files: Path, checkpoint: Any) -> None:
    result = call(
        "ask", "--model", checkpoint(family), "--image", files / "a.png", "--max-new-tokens", 4, "--json", QUESTION
    )
    assert result.exit_code == 0, result.stderr
    loaded = loading.load(checkpoint(family))
    prompt = loaded.prompt(QUESTION, 1, 0)
    inputs = loaded.processor(text=[prompt], images=[Image.open(files / "a.png")], return_tensors="pt")
    plain = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert json.loads(result.stdout)["answer"] == loaded.decode(plain, inputs)


def test_ask_streams_the_answer_to_stdout_and_the_cost_to_stderr(files: Path, checkpoint: Any) -> None:
    arguments = ("ask", "--model", checkpoint("llava"), "--image", files / "a.png", "--preset", "balanced",
                 "--max-new-tokens", 6, QUESTION)  # fmt: skip
    streamed, record = call(*arguments), call(*arguments, "--json")
    assert streamed.exit_code == 0, streamed.stderr
    assert streamed.stdout.strip() == json.loads(record.stdout)["answer"]
    assert "prefill" in streamed.stderr and "visual tokens" in streamed.stderr
    assert "prefill" not in record.stderr


def test_a_plan_file_and_an_option_combine(files: Path, checkpoint: Any, tmp_path: Path) -> None:
    from vlmfast.encode import Uniform as UniformPruner

    Plan(prune=UniformPruner(keep=0.5)).save(tmp_path / "plan.json")
    ask = partial(
        call, "ask", "--model", checkpoint("qwen2_vl"), "--image", files / "a.png", "--json", "--max-new-tokens", 2
    )
    assert json.loads(ask("--plan", tmp_path / "plan.json", QUESTION).stdout)["plan"]["prune"]["keep"] == 0.5
    both = json.loads(ask("--plan", tmp_path / "plan.json", "--prune", "maxmin:keep=0.75", QUESTION).stdout)
    assert both["plan"]["prune"]["method"] == "maxmin"


# -- media reach the model with their true times -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("select", "seconds"), [(Fps(2), 1.0), (Fps(4), 0.5), (Uniform(4), 2 * 3.75 / 3), (Uniform(1), 0.5)]
)
def test_qwen_gets_the_true_seconds_per_grid(select: Any, seconds: float, files: Path, checkpoint: Any) -> None:
    loaded = loading.load(checkpoint("qwen2_5_vl"))
    inputs = loaded.inputs(QUESTION, video=read_video(files / "clip.mp4", select=select))
    assert inputs["second_per_grid_ts"].tolist() == pytest.approx([seconds])
    frames = len(read_video(files / "clip.mp4", select=select))
    assert int(inputs["video_grid_thw"][0, 0]) == -(-frames // 2), "the processor sampled frames once more"


def test_qwen3_writes_the_true_timestamps(files: Path, checkpoint: Any) -> None:
    loaded = loading.load(checkpoint("qwen3_vl"))
    inputs = loaded.inputs(QUESTION, video=read_video(files / "clip.mp4", select=Fps(1)))
    text = loaded.processor.tokenizer.decode(inputs["input_ids"][0])
    assert "<0.5 seconds>" in text and "<2.5 seconds>" in text  # frames at 0, 1, 2, 3 s in pairs


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next", "llava_onevision"])
def test_several_questions_are_padded_on_the_left(family: str, files: Path, checkpoint: Any) -> None:
    loaded = loading.load(checkpoint(family))
    picture = read_image(files / "a.png")
    both = loaded.inputs([QUESTION, QUESTION + " and the dog ?"], images=[picture])
    alone = loaded.inputs(QUESTION, images=[picture])
    n = alone["input_ids"].shape[1]
    assert torch.equal(both["input_ids"][0, -n:], alone["input_ids"][0])
    assert both["attention_mask"][0].tolist() == [0] * (both["input_ids"].shape[1] - n) + [1] * n


# -- bad input ---------------------------------------------------------------------------------------------------------


def _bad(files: Path, checkpoint: Any, tmp: Path) -> dict[str, tuple[list[Any], str]]:
    """Name -> arguments of `ask` (question apart) and a word that the error must name."""
    good = checkpoint("qwen2_vl")
    (tmp / "empty").mkdir()
    (tmp / "bert").mkdir()
    (tmp / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp / "bert" / "model.safetensors").write_bytes(b"broken")
    shutil.copytree(good, tmp / "mute", ignore=shutil.ignore_patterns("*process*", "token*", "chat*", "special*"))
    shutil.copytree(good, tmp / "hollow", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(good, tmp / "cut")
    whole = (tmp / "cut" / "model.safetensors").read_bytes()
    (tmp / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp / "noise.mp4").write_bytes(bytes(range(256)) * 20)
    (tmp / "void.mp4").write_bytes(b"")
    (tmp / "note.png").write_text("not a picture")
    (tmp / "plan.json").write_text("{")
    clip, picture = files / "clip.mp4", files / "a.png"
    ours, seen = ["--model", good], ["--image", picture]
    return {
        "no folder": ([*seen, "--model", tmp / "nowhere"], "nowhere"),
        "no config": ([*seen, "--model", tmp / "empty"], "config.json"),
        "a file as model": ([*seen, "--model", clip], "folder"),
        "unsupported family": ([*seen, "--model", tmp / "bert"], "qwen2_5_vl"),
        "no processor": ([*seen, "--model", tmp / "mute"], "processor"),
        "no weights": ([*seen, "--model", tmp / "hollow"], "safetensors"),
        "truncated weights": ([*seen, "--model", tmp / "cut"], "weights"),
        "unknown hub id": ([*seen, "--model", "nobody/nothing"], "nobody/nothing"),
        "missing video": ([*ours, "--video", tmp / "gone.mp4"], "gone.mp4"),
        "broken video": ([*ours, "--video", tmp / "noise.mp4"], "noise.mp4"),
        "empty video": ([*ours, "--video", tmp / "void.mp4"], "void.mp4"),
        "folder without frames": ([*ours, "--video", tmp / "empty"], "empty"),
        "missing picture": ([*ours, "--image", tmp / "gone.png"], "gone.png"),
        "text as picture": ([*ours, "--image", tmp / "note.png"], "note.png"),
        "video for a picture model": (["--model", checkpoint("llava"), "--video", clip], "llava"),
        "keep above one": ([*ours, "--image", picture, "--prune", "vidcom2:keep=2"], "keep"),
        "keep zero": ([*ours, "--image", picture, "--prune", "vidcom2:keep=0"], "keep"),
        "unknown method": ([*ours, "--image", picture, "--prune", "magic"], "vidcom2"),
        "unknown field": ([*ours, "--image", picture, "--prune", "vidcom2:kep=0.5"], "kep"),
        "not field=value": ([*ours, "--image", picture, "--prune", "vidcom2:keep=0.4,0.5"], "0.5"),
        "unknown preset": ([*ours, "--preset", "warp"], "balanced"),
        "preset and plan": ([*ours, "--preset", "fast", "--plan", tmp / "plan.json"], "--plan"),
        "broken plan": ([*ours, "--plan", tmp / "plan.json"], "plan.json"),
        "missing plan": ([*ours, "--plan", tmp / "gone.json"], "gone.json"),
        "frames of nothing": ([*ours, "--frames", 4], "--video"),
        "frames and fps": ([*ours, "--video", clip, "--frames", 4, "--fps", 2], "--fps"),
        "no frames": ([*ours, "--video", clip, "--frames", 0], "frames"),
        "unknown selection": ([*ours, "--video", clip, "--select", "best:3"], "best"),
        "unknown decoder": ([*ours, "--video", clip, "--backend", "vhs"], "vhs"),
        "no media": (ours, "--image"),
        "block outside the tower": ([*ours, "--image", picture, "--prune", "uniform:after_block=99"], "99"),
    }


def test_bad_input_is_one_line_and_exit_code_two(files: Path, checkpoint: Any, tmp_path: Path) -> None:
    wrong = {}
    for name, (arguments, word) in _bad(files, checkpoint, tmp_path).items():
        result = call("ask", *arguments, "--json", QUESTION)
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        one_line = len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0] and len(lines[0]) < 500
        if result.exit_code != 2 or not one_line or result.stdout or "Traceback" in result.stderr:
            wrong[name] = (result.exit_code, result.stdout, result.stderr, result.exception)
    assert not wrong


def test_an_empty_question_is_refused(files: Path, checkpoint: Any) -> None:
    result = call("ask", "--model", checkpoint("qwen2_vl"), "--image", files / "a.png", "  ")
    assert result.exit_code == 2 and "question" in result.stderr


def test_the_config_is_judged_before_weights_are_read(
    files: Path, checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading.weights, "read", never)
    config = json.loads((Path(checkpoint("qwen2_vl")) / "config.json").read_text())
    folder = files / "renamed"
    shutil.copytree(checkpoint("qwen2_vl"), folder)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mystery_vl"}))
    result = call("ask", "--model", folder, "--image", files / "a.png", QUESTION)
    assert result.exit_code == 2 and "mystery_vl" in result.stderr and "llava_onevision" in result.stderr


# -- check -------------------------------------------------------------------------------------------------------------


QUICK = ("qwen2_5_vl", "llava_next")
OTHERS = [pytest.param(f, marks=pytest.mark.slow) for f in tiny.FAMILIES if f not in QUICK]


@pytest.mark.parametrize("family", [*QUICK, *OTHERS])
def test_check_holds_on_every_family(family: str, checkpoint: Any) -> None:
    result = call("check", "--model", checkpoint(family), "--rounds", 1, "--json")
    record = json.loads(result.stdout)
    assert result.exit_code == 0, [law for law in record["laws"] if not law["ok"]]
    assert [law["name"] for law in record["laws"]] == ["identity", "length", "padding", "removal"]
    states = {name: m["state"] for name, m in record["methods"].items()}
    assert states["prune vidcom2"] == "works" and "broke" not in states.values()
    assert states["prune inside the tower"] == ("works" if family in tiny.QWEN else "refused")
    assert record["gain"]["kv_fast_bytes"]["ratio"][0] > 1
    assert set(record["gain"]["prefill_ms"]) == {"plain", "fast", "ratio"}


def test_check_says_so_when_a_law_is_broken(checkpoint: Any, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vlmfast.api
    from vlmfast.cli import laws

    real = vlmfast.api.cache_counts
    monkeypatch.setattr(vlmfast.api, "cache_counts", lambda cache: {**real(cache), "cached_tokens": 1.0})
    monkeypatch.setattr(laws, "catalogue", lambda case: {"prune nothing": {"prune": None}})
    arguments = ("check", "--model", checkpoint("qwen2_vl"), "--image", files / "a.png", "--rounds", 1)
    result = call(*arguments)
    assert result.exit_code == 1
    assert "BROKEN" in result.stdout and "Not all is well" in result.stdout
    record = json.loads(call(*arguments, "--json").stdout)
    assert [law["name"] for law in record["laws"] if not law["ok"]] == ["length"]


def test_check_notices_what_is_left_behind(checkpoint: Any, files: Path) -> None:
    from vlmfast.cli import laws

    model = loading.load(checkpoint("qwen2_vl")).model
    before = laws.fingerprint(model)
    handle = model.lm_head.register_forward_hook(lambda *a: None)
    assert laws.fingerprint(model) != before
    handle.remove()
    assert laws.fingerprint(model) == before
    model.model.extra = 1
    assert laws.fingerprint(model) != before


# -- heads -------------------------------------------------------------------------------------------------------------


def test_heads_prints_what_classify_says_and_draws_it(files: Path, checkpoint: Any, tmp_path: Path) -> None:
    from vlmfast.prefill import HybridKV, heads

    arguments = (
        "heads",
        "--model",
        checkpoint("qwen3_vl"),
        "--image",
        files / "a.png",
        "--kv",
        "hybridkv:split=0.5,recent=4",
    )
    result = call(*arguments, "--json", QUESTION)
    assert result.exit_code == 0, result.stderr
    loaded = loading.load(checkpoint("qwen3_vl"))
    inputs = loaded.inputs(QUESTION, images=[read_image(files / "a.png")])
    table = heads.classify(loaded.model, inputs, HybridKV(split=0.5, recent=4))
    listed = json.loads(result.stdout)["heads"]
    assert [(r["layer"], r["head"]) for r in listed] == [(i, h) for i in range(4) for h in range(2)]
    assert [r["type"] == "dynamic" for r in listed] == table.dynamic[0].flatten().tolist()
    assert [r["concentration"] for r in listed] == pytest.approx(table.concentration[0].flatten().tolist())
    shown = call(*arguments, "--out", tmp_path / "heads.png", QUESTION)
    assert shown.exit_code == 0, shown.stderr
    cells = [f"{100 * r['concentration']:.0f}{'*' if r['type'] == 'dynamic' else ''}" for r in listed]
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert [["0", *cells[:2], "1", "of", "2"], ["3", *cells[6:], "1", "of", "2"]] == [
        line for line in lines if line[:1] in (["0"], ["3"])
    ]
    with Image.open(tmp_path / "heads.png") as picture:
        assert picture.width > 300 and len(picture.getcolors(1 << 20) or []) > 100


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--kv", "snapkv"], "head types"),
        (["--kv", "hybridkv:theta=2"], "theta"),
        (["--out", "heads.bmp"], ".png"),
        (["--out", "no/such/folder/heads.png"], "folder"),
        (["--out", "TAKEN"], "--force"),
        (["--image", "gone.png"], "gone.png"),
    ],
)
def test_heads_refuses_in_one_line(arguments: list[str], word: str, checkpoint: Any, tmp_path: Path) -> None:
    taken = tmp_path / "taken.png"
    taken.write_text("mine")
    given = [str(taken) if a == "TAKEN" else a for a in arguments]
    result = call("heads", "--model", checkpoint("qwen2_vl"), *given, QUESTION)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.exit_code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0]
    assert taken.read_text() == "mine" and result.stdout == ""


# -- methods, help, the registry ---------------------------------------------------------------------------------------


def test_methods_lists_every_registered_method() -> None:
    from vlmfast import decode, encode, prefill

    text, listed = call("methods").stdout, json.loads(call("methods", "--json").stdout)
    names = [[row["name"] for row in rows] for rows in listed.values()]
    assert names == [list(encode.METHODS), list(prefill.METHODS), list(decode.DRAFTS), list(decode.ACCEPT)]
    rows = {row["name"]: row for row in next(iter(listed.values()))}
    assert rows["vidcom2"]["paper"] == "arXiv 2505.14454" and rows["vidcom2"]["fields"]["keep"] == 0.25
    assert rows["vidcom2"]["needs"] == ["features"] and rows["uniform"]["needs"] == []
    for row in (row for table in listed.values() for row in table):
        assert row["name"] in text and len(row["summary"]) > 10, row


def test_every_command_is_registered_and_help_is_light() -> None:
    code = (
        "import sys; from vlmfast import cli; app = cli.build(); "
        "print(sorted(c.name for c in app.registered_commands)); "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    modules = {p.stem for p in Path(cli.__file__).parent.glob("*.py")}
    assert out[0] == str(sorted(c for c in cli.COMMANDS if c.replace("-", "_") in modules))
    assert {"demo", "ask", "check", "methods"} <= modules
    assert out[1] == "False False"


# -- demo --------------------------------------------------------------------------------------------------------------


def test_demo_end_to_end(checkpoint: Any, tmp_path: Path) -> None:
    result = call("demo", "--model", checkpoint("qwen2_5_vl"), "--out", tmp_path / "demo")
    assert result.exit_code == 0, (result.stderr, result.exception)
    made = sorted(p.name for p in (tmp_path / "demo").iterdir())
    assert made == ["demo.json", "events.mp4", "kept.png", "moves.mp4", "picture.png"]
    clip = read_video(tmp_path / "demo" / "moves.mp4", select=Fps(2))
    assert len(clip) == 16 and clip.fps == 2
    media = json.loads((tmp_path / "demo" / "demo.json").read_text())["media"]
    for medium in media:
        assert len(medium["questions"]) >= 1 and all(q["expected"] for q in medium["questions"])
        rows = {row["name"]: row for row in medium["rows"]}
        assert rows["plain"]["kept"] is None
        for name, row in rows.items():
            m = row["metrics"]
            assert len(row["answers"]) == len(row["right"]) == len(medium["questions"])
            assert len(row["kept"] or range(int(m["visual_tokens"]))) == m["kept_tokens"], name
        assert rows["vidcom2 25%"]["metrics"]["kv_fast_bytes"] < rows["plain"]["metrics"]["kv_fast_bytes"]
        assert rows["vidcom2 25%"]["metrics"]["kept_tokens"] == round(0.25 * rows["plain"]["metrics"]["kept_tokens"])
    assert "vidcom2 25%" in result.stdout and "kept.png" in result.stdout and "vlmfast check" in result.stdout
    with Image.open(tmp_path / "demo" / "kept.png") as sheet:
        assert sheet.width > 1000 and sheet.height > 1000


def test_the_sheet_lights_exactly_the_kept_patches() -> None:
    from vlmfast.cli import sheet

    frame = np.full((64, 96, 3), 200, np.uint8)
    kept = [24, 27, 33, 47]  # of the second step of a 2 x 4 x 6 grid: (0, 0), (0, 3), (1, 3), (3, 5)
    picture = np.asarray(sheet._lit(frame, {"grid": [2, 4, 6], "kept": kept}, 1, 192))
    body = picture[32:160]  # 96 x 64 scaled by two and centred
    cells = body.reshape(4, 32, 6, 32, 3)[:, 8:24, :, 8:24].mean((1, 3, 4))
    lit = [(int(y), int(x)) for y, x in np.argwhere(cells > 150)]
    assert lit == [(0, 0), (0, 3), (1, 3), (3, 5)] and cells.min() < 60
    whole = np.asarray(sheet._lit(frame, {"grid": [2, 4, 6], "kept": None}, 0, 192))[40:150, 8:184]
    assert whole.min() == 200


def test_demo_leaves_nothing_behind_when_it_cannot_run(checkpoint: Any, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    assert call("demo", "--out", tmp_path / "taken").exit_code == 2
    result = call("demo", "--model", checkpoint("llava"), "--out", tmp_path / "demo")
    assert result.exit_code == 2 and "video" in result.stderr
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_the_whole_demo_fits_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the pocket model, with a toy in the place of the larger shapes: pages of 80 columns, figures in the record."""
    from vlmfast.bench import demo

    monkeypatch.setattr(demo, "SHAPE", TOY)
    monkeypatch.setattr(demo, "SECONDS", 0.5)
    monkeypatch.setenv("COLUMNS", "80")
    result = call("demo", "--out", tmp_path / "demo")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert max(map(len, result.stdout.splitlines())) <= 80
    speed = json.loads((tmp_path / "demo" / "demo.json").read_text())["speed"]
    words = " ".join(result.stdout.split())
    for said in ("9 of 9", "What becomes faster", f"{speed['rounds']} rounds", "kept.png"):
        assert said in words, said


def test_the_demo_times_both_on_the_same_new_clips(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlmfast.bench import demo
    from vlmfast.cli.demo import show_speed

    seen: list[tuple[int, torch.Tensor]] = []

    def watched(shape: Any, seed: int, *rest: Any, **more: Any) -> Any:
        inputs = shapes.clip(shape, seed, *rest, **more)
        seen.append((seed, inputs["pixel_values_videos"]))
        return inputs

    monkeypatch.setattr(demo, "clip", watched)
    timed = demo.measure(shape=TOY, seconds=0.1)
    pixels = {seed: pixel for seed, pixel in seen if seed}
    assert sorted(seed for seed, _ in seen if seed) == sorted([*range(1, timed["rounds"] + 1)] * 2)
    assert not torch.equal(pixels[1], pixels[2]) and all(p.float().std(0).min() > 0.1 for p in pixels.values())
    assert timed["kept_tokens"] == round(0.25 * timed["visual_tokens"])
    first = timed["stages"]["ttft_ms"]
    assert first["floor"]["stock"] > first["floor"]["ours"] > 0 and first["ratio"][1] <= first["ratio"][0]
    assert len(timed["samples"]["stock"]) == len(timed["samples"]["ours"]) == timed["rounds"] >= 3
    monkeypatch.setenv("COLUMNS", "80")
    show_speed(timed)
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    for said in ("each next token", "The first token", "Each next token", f"{timed['rounds']} rounds"):
        assert said in " ".join(told.split()), said
    for busy, said, unsaid in ((False, "Its floor", "No floor"), (True, "No floor", "Its floor")):
        show_speed({**timed, "busy": busy})
        told = capsys.readouterr().out
        assert said in told and unsaid not in told


def test_the_demo_fits_its_time_and_says_no_more_than_it_saw() -> None:
    from vlmfast.bench.demo import SHAPE, fitting, memory
    from vlmfast.cli.demo import verdict

    assert fitting(SHAPE, 0.5, 12) == (4, 5) and fitting(SHAPE, 1.0, 12) == (4, 3)
    assert fitting(SHAPE, 1.5, 12) == (2, 4) and fitting(SHAPE, 50.0, 12) == (1, 3)
    assert 2e9 < memory(SHAPE, "bfloat16") < memory(SHAPE, "float32") < 8e9
    assert verdict([2.0, 1.8, 2.1]) == "comes 2.00x sooner (1.80 to 2.10 over the rounds)"
    assert verdict([0.5, 0.4, 0.6]).startswith("comes 2.00x later")
    assert verdict([1.2, 0.9, 1.3]).startswith("shows no clear gain") and "clear" in verdict([1.0, 0.99, 1.01])


def test_without_the_memory_the_demo_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlmfast.bench import demo
    from vlmfast.cli.demo import speed

    monkeypatch.setattr(demo.dtypes, "available", lambda: 10**6)
    assert "GB are free" in speed("cpu")["error"] and "not timed" in capsys.readouterr().out

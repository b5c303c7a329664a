"""The vLLM plugin without vLLM: what its texts and JSON mean, what is refused and how, counts, and positions."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from vlmfast.core import Unsupported, UserError
from vlmfast.encode import EVS, METHODS, MaxMin, Uniform, VidCom2
from vlmfast.families.base import Item, frames_of
from vlmfast.families.qwen import grid_items
from vlmfast.integrations import vllm as plugin
from vlmfast.integrations.vllm import positions, startup
from vlmfast.integrations.vllm.selection import kept_rows, num_kept
from vlmfast.integrations.vllm.settings import Settings

ROOT = Path(__file__).parents[2]
DEFAULT = Settings.of_server("vidcom2:keep=0.25")
QWEN25 = "Qwen2_5_VLForConditionalGeneration"


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("asked", "rule"),
    [
        (None, VidCom2(keep=0.25)),
        ("maxmin:keep=0.5", MaxMin(keep=0.5)),
        ("none", None),
        ({"method": "uniform", "keep": 0.1}, Uniform(keep=0.1)),
        ({"method": None}, None),
        ({"method": "none"}, None),
        ({"keep": 0.5}, VidCom2(keep=0.5)),
        ({"positions": "transformers"}, VidCom2(keep=0.25)),
        ({"method": "evs", "keep": 0.5, "stills": {"method": "vidcom2"}}, EVS(keep=0.5, stills=VidCom2())),
    ],
)
def test_a_request_chooses_its_pruner(asked: Any, rule: Any) -> None:
    settings = DEFAULT.with_request(asked)
    assert settings.rule == rule
    assert settings.positions == (asked["positions"] if isinstance(asked, dict) and "positions" in asked else "vllm")
    assert Settings.of_text(settings.text()) == settings  # what an item carries to the model


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("vidcom3", r"unknown prune method 'vidcom3', did you mean vidcom2\?; known: "),
        ({"method": "vidcom2", "kep": 0.5}, "unknown field of vidcom2 'kep'.*keep"),
        ({"keep": 0}, r"keep=0 in vidcom2: keep must be a finite number above 0, at most 1"),
        ({"keep": "0.5"}, r"keep='0.5' in vidcom2"),
        ({"method": "cdpruner"}, "cdpruner needs question, which vLLM does not hand to a pruner: use vidcom2"),
        ({"method": "visionzip"}, "visionzip needs tower_attention, which vLLM"),
        ({"method": "fastv"}, "fastv needs text_attention, which vLLM"),
        ({"method": "dtd"}, "dtd counts what it keeps from the features"),
        ({"method": "evs", "stills": {"method": "dtd"}}, "dtd counts what it keeps"),
        ({"method": "vidcom2", "after_block": 1}, "vidcom2 with after_block prunes inside the tower"),
        ({"positions": "hf"}, "unknown positions 'hf'.*vllm, transformers"),
        (0.5, r'mm_processor_kwargs: \{"vlmfast": 0.5\} came in: give a text such as'),
        ([], "came in: give a text"),
    ],
)
def test_bad_requests_are_refused_in_one_line(asked: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        DEFAULT.with_request(asked)
    assert "\n" not in str(error.value)


def test_a_server_without_a_default_prunes_on_request_only() -> None:
    server = Settings.of_server("none")
    assert server.rule is None and server.with_request("vidcom2").rule == VidCom2()
    with pytest.raises(UserError, match="names no method and the server has none"):
        server.with_request({"keep": 0.5})
    with pytest.raises(UserError, match="VLMFAST is empty"):
        Settings.of_server(" ")


def test_a_server_chooses_positions() -> None:
    assert Settings.of_server("vidcom2", "transformers").with_request({"keep": 0.5}).positions == "transformers"
    with pytest.raises(UserError, match="unknown positions 'hf'"):
        Settings.of_server("vidcom2", "hf")


# ---------------------------------------------------------------- counts


ITEMS = [
    *grid_items(torch.tensor([[4, 8, 12], [1, 6, 6], [9, 2, 2]]), 2, True),
    *grid_items(torch.tensor([[1, 10, 14], [1, 2, 2]]), 2, False),
    Item(37, torch.cat([frames_of(36, 4), torch.tensor([3])]), (4, 3, 3), True, torch.arange(37) == 36),
    Item(36, (torch.arange(36) >= 16).long(), (2, 4, 4), False, (torch.arange(36) >= 16) & (torch.arange(36) % 5 == 0)),
]
FEATURE_PRUNERS = [
    name
    for name, kind in METHODS.items()
    if set(kind.needs) <= {"features"} and name != "dtd" and not getattr(kind, "resizes", False)
]


@pytest.mark.parametrize("name", FEATURE_PRUNERS)
def test_counts_before_encoding_are_those_after(name: str) -> None:
    """Over every item and keep; the rows are the library's own."""
    for keep in (0.05, 0.3, 0.5, 1.0):
        for rule in (METHODS[name](keep=keep), METHODS[name](keep=keep, floor=2, least=7)):
            Settings(rule)  # nothing in it is refused
            for seed, item in enumerate(ITEMS):
                if name == "evs" and item.protected is not None:
                    continue  # needs frames of equal size
                features = torch.randn(item.n, 24, generator=torch.Generator().manual_seed(seed))
                rows = kept_rows(rule, item, features)
                assert len(rows) == num_kept(rule, item)
                assert bool((rows[1:] > rows[:-1]).all())
                if item.protected is not None:
                    assert set(item.protected.nonzero()[:, 0].tolist()) <= set(rows.tolist())


def test_every_pruner_is_counted_or_refused() -> None:
    for name in set(METHODS) - set(FEATURE_PRUNERS) - {"downsample"}:
        with pytest.raises(Unsupported, match=f"{name} .*use vidcom2"):
            Settings(METHODS[name]())
    assert Settings(METHODS["downsample"]()).rule.resizes


def test_stills_have_their_own_count() -> None:
    rule = EVS(keep=0.5, stills=MaxMin(keep=0.2))
    image = ITEMS[3]
    assert num_kept(rule, image) == num_kept(MaxMin(keep=0.2), image) < num_kept(EVS(keep=0.5), image) == image.n


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_places_travel_exactly_in_any_type(dtype: torch.dtype) -> None:
    places = torch.tensor([[0, 255, 256], [257, 65_535, 513], [32_767, 4_095, 1]])
    columns = positions.columns_of(places, torch.empty(0, dtype=dtype))
    assert columns.dtype == dtype and columns.shape == (3, positions.COLUMNS)
    assert torch.equal(positions.places_of(columns), places)
    with pytest.raises(UserError, match="reaches 65536 positions"):
        positions.refuse_beyond_digits(65_536)


def spread(batch: dict[str, Any], model: Any) -> torch.Tensor:
    """Our positions of an unpruned prompt, (3, L)."""
    ids = batch["input_ids"][0]
    is_media = (ids == tiny.IMAGE) | (ids == tiny.VIDEO)
    grids = {tiny.IMAGE: batch["image_grid_thw"].tolist(), tiny.VIDEO: batch["video_grid_thw"].tolist()}
    media, places, column = [], [], 0
    while column < len(ids):
        kind = int(ids[column])
        if kind not in grids:
            column += 1
            continue
        t, h, w = grids[kind].pop(0)
        grid = (t, h // 2, w // 2)
        media.append(positions.Media(column, t * h * w // 4, positions.advance(grid, 1.0, "transformers")))
        places.append(positions.grid_places(grid))
        column += media[-1].length
    start, delta = positions.prompt_positions(len(ids), media)
    made, again = positions.with_places(start, is_media, torch.cat(places), 0)
    assert delta == again
    return made


def test_positions_are_those_of_transformers() -> None:
    """Qwen2-VL, one image and one video with text around them."""
    model = tiny.build("qwen2_vl")
    batch = tiny.inputs("qwen2_vl", media=("image", "video"))
    seen: list[torch.Tensor] = []
    text = model.model.language_model
    hook = text.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
    model(**batch)
    hook.remove()
    assert torch.equal(spread(batch, model), seen[0][-3:, 0])


def test_stamped_places_are_those_of_transformers() -> None:
    """Qwen3-VL: time stamps between the frames of a video."""
    model = tiny.build("qwen3_vl")
    batch = tiny.inputs("qwen3_vl", media=("video",))
    seen: list[torch.Tensor] = []
    text = model.model.language_model
    hook = text.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
    model(**batch)
    hook.remove()
    ids = batch["input_ids"][0]
    is_token = ids == tiny.VIDEO
    first, last = int(is_token.nonzero()[0]), int(is_token.nonzero()[-1]) + 1
    t, h, w = batch["video_grid_thw"][0].tolist()
    grid = (t, h // 2, w // 2)
    places = positions.stamped_places(is_token[first:last], frames_of(int(is_token.sum()), t), grid)
    assert torch.equal(seen[0][-3:, 0, first:last], places.T + first)
    num_text = int((~is_token[first:last]).sum())
    assert int(seen[0][-1, 0, last]) == first + num_text + t * max(grid[1:])  # what the model adds for the whole item


def test_chunks_of_a_prefill_give_the_same_positions() -> None:
    """Rows come chunk by chunk, some twice, as after a prefix of which a part was cached."""
    grid, kept = (3, 4, 5), torch.arange(60)[::4]
    is_media = torch.zeros(40, dtype=torch.bool)
    is_media[5:20] = is_media[25:29] = True
    places = torch.cat([positions.grid_places(grid)[kept], positions.grid_places((1, 2, 2))])
    media = [positions.Media(5, 15, 5), positions.Media(25, 4, 2)]
    start, delta = positions.prompt_positions(40, media)
    whole, same = positions.with_places(start, is_media, places, 0)
    assert delta == same and int(whole[0, 39]) == 39 + delta
    columns = is_media.nonzero()[:, 0]
    by_chunks = start
    for first, after in ((0, 9), (9, 18), (9, 18), (18, 27), (27, 40)):
        rows = (columns >= first) & (columns < after)
        by_chunks, _ = positions.with_places(by_chunks, is_media, places[rows], first)
    assert torch.equal(by_chunks, whole)
    late, _ = positions.with_places(start, is_media, places[columns >= 18], 18)  # the rest came from a cache
    assert torch.equal(late[:, 18:], whole[:, 18:])


# ---------------------------------------------------------------- startup


def test_nothing_of_vllm_is_imported_without_the_variable() -> None:
    code = (
        "import sys, os; os.environ.pop('VLMFAST', None); import vlmfast; from vlmfast.integrations import vllm;"
        "vllm.register(); assert 'vllm' not in sys.modules "
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_entry_point_leads_to_register() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["vllm.general_plugins"]["vlmfast"].split(":")
    assert getattr(import_module(module), name) is plugin.register
    lowest, highest = startup.VERSIONS[0], startup.VERSIONS[-1]
    after = f"0.{int(highest.split('.')[1]) + 1}"
    assert project["optional-dependencies"]["vllm"] == [f"vllm>={lowest},<{after}"]


@pytest.mark.parametrize(
    ("version", "known"), [("0.32.0", True), ("0.33.1+cpu", True), ("0.31.9", False), ("1.0", False)]
)
def test_versions(version: str, known: bool) -> None:
    if known:
        startup.refuse_version(version)
        return
    with pytest.raises(Unsupported, match=rf"vLLM {version} is installed, and the plugin knows 0.32 and 0.33"):
        startup.refuse_version(version)


def test_a_server_stops_with_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VLMFAST", "vidcom2:keep=2")
    monkeypatch.setattr(sys, "argv", ["/bin/vllm", "serve"])
    with pytest.raises(SystemExit) as stop:
        plugin.register()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("vlmfast: keep=2 in vidcom2") and said.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["notebook.py"])
    with pytest.raises(UserError, match="keep=2 in vidcom2"):
        plugin.register()


def served(architecture: str = QWEN25, **media: Any) -> Any:
    """A vLLM ModelConfig, as far as the plugin looks at it."""
    given = {"language_model_only": False, "video_pruning_rate": None, "mm_processor_kwargs": None} | media
    return SimpleNamespace(
        architecture=architecture, multimodal_config=SimpleNamespace(**given), hf_config=SimpleNamespace()
    )


def test_pruning_is_switched_on_for_a_model_that_has_it() -> None:
    config = served()
    startup.configure(config, DEFAULT)
    assert config.multimodal_config.video_pruning_rate > 0
    assert Settings.of_text(config.hf_config.vlmfast) == DEFAULT


@pytest.mark.parametrize(
    ("config", "text", "said"),
    [
        (served("LlamaForCausalLM"), "vidcom2", "the model is a LlamaForCausalLM: the plugin prunes Qwen2VL"),
        (served(language_model_only=True), "vidcom2", "serves the language model only"),
        (served(video_pruning_rate=0.5), "vidcom2", "--video-pruning-rate 0.5 came in beside VLMFAST"),
        (served(mm_processor_kwargs={"vlmfast": {}}), "none", "--mm-processor-kwargs holds vlmfast"),
        (served("Qwen3VLForConditionalGeneration"), "downsample", "downsample resizes the patches of Qwen2VL"),
    ],
)
def test_servers_that_cannot_prune_are_refused_at_start(config: Any, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        startup.configure(config, Settings.of_server(text))

"""The evaluation tools: names, scores, statistics, tasks and their bad input, resuming, pictures, pages."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny

from vlmfast.bench import accuracy, journal, methods, questions, runner, scoring, stats, tasks
from vlmfast.core import UserError
from vlmfast.plan import Plan, parse

# ---------------------------------------------------------------- methods


def test_names_become_plans() -> None:
    assert methods.plan("plain") == Plan()
    assert methods.plan("vidcom2-25").prune.keep == 0.25
    assert methods.plan("snapkv-12.5").kv.keep == 0.125
    assert methods.plan("kv.random-10").kv.keep == 0.1 and methods.plan("random-10").prune.keep == 0.1
    composed = methods.plan("uniform-50+keydiff-20+lossless@lookup")
    assert (composed.prune.keep, composed.kv.keep, composed.speculate.accept.name) == (0.5, 0.2, "lossless")
    assert methods.plan("loose", draft="some/model").speculate.draft.model == "some/model"
    relaxed = methods.plan("snapkv-25+loose-30@lookup")
    assert (relaxed.kv.keep, relaxed.speculate.accept.relax, relaxed.speculate.draft.name) == (
        0.25,
        0.3,
        "promptlookup",
    )
    assert methods.plan("fly-10@lookup").speculate.accept.theta == 0.1
    assert (
        methods.label("prune", composed.prune) == "uniform-50"
        and methods.label("speculate", composed.speculate) == "lossless"
    )


@pytest.mark.parametrize(
    ("name", "word"),
    [("vidcom3-25", "vidcom3-25"), ("vidcom2-25+evs-10", "prune twice"), ("loose@model", "--draft"), ("loose@x", "'x'"),
     ("vidcom2-0", "vidcom2-0"), ("exact-30@lookup", "no ratio"), ("plain_loop-30", "plain_loop-30")],
)  # fmt: skip
def test_bad_names_say_what_is_wrong(name: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        methods.plan(name)


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("metric", "answer", "expected", "choices", "value"),
    [
        ("exact", "The Circle.", ["circle"], None, 1.0),
        ("exact", "two", ["2"], None, 1.0),
        ("exact", "9 3 7", ["937"], None, 1.0),
        ("exact", "red square", ["red"], None, 0.0),
        ("vqa", "yes", ["yes"] * 2 + ["no"] * 8, None, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("vqa", "no", ["no"] * 10, None, 1.0),
        ("choice", "(B) a dog", ["a dog"], ["a cat", "a dog"], 1.0),
        ("choice", "The answer is b", ["B"], ["a cat", "a dog"], 1.0),
        ("choice", "I see a cat here", ["A"], ["cat", "dog"], 1.0),
        ("choice", "a cat and a dog", ["A"], ["cat", "dog"], 0.0),
        ("choice", "no, not a dog", ["dog"], ["cat", "dog"], 0.0),
        ("choice", "it isn't a dog but a cat", ["cat"], ["cat", "dog"], 1.0),
        ("choice", "A dog", ["a dog"], ["a cat", "a dog"], 1.0),
        ("anls", "Eifel Tower", ["eiffel tower"], None, 1 - 1 / 12),
        ("anls", "London", ["paris"], None, 0.0),
        ("relaxed", "104", ["100"], None, 1.0),
        ("relaxed", "106", ["100"], None, 0.0),
        ("relaxed", "12%", ["0.12"], None, 1.0),
        ("relaxed", "Blue", ["blue"], None, 1.0),
    ],
)
def test_scores(metric: str, answer: str, expected: list[str], choices: list[str] | None, value: float) -> None:
    assert scoring.score(metric, answer, expected, choices) == pytest.approx(value)


# ---------------------------------------------------------------- statistics


def test_paired_interval_covers_and_narrows() -> None:
    """Over simulated studies with a known difference of -0.1 the 95 % interval holds it about 95 % of the time."""
    rng = np.random.default_rng(0)
    held, widths = 0, []
    for _ in range(60):
        level = rng.beta(2, 1, 60).repeat(5)  # 60 clips of five questions each
        clip = np.arange(60).repeat(5)
        base = rng.random(300) < level
        this = base & (rng.random(300) < 0.85)  # loses 15 % of what was right: -0.1 on average
        found = stats.paired(this, base, clip.astype(str))
        held += found.low <= -0.1 <= found.high
        widths.append(found.high - found.low)
    assert held >= 53
    many = stats.paired(np.tile(this, 4), np.tile(base, 4), np.arange(240).repeat(5).astype(str))
    assert many.high - many.low < 0.7 * np.mean(widths)


def test_clusters_widen_the_interval() -> None:
    score = np.repeat([1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0], 20)
    together = stats.mean(score, np.repeat(np.arange(10), 20).astype(str))
    apart = stats.mean(score, np.arange(200).astype(str))
    assert together.clusters == 10 and together.high - together.low > 2 * (apart.high - apart.low)


def test_no_difference_is_not_certainty() -> None:
    """Thirty questions without a difference: the bound follows the rule of three (3 / n), not zero."""
    found = stats.paired([1.0] * 30, [1.0] * 30, [str(i) for i in range(30)])
    assert found.mean == 0 and -0.16 < found.low < -0.05 and found.high > 0.05


def test_mcnemar_is_the_exact_binomial() -> None:
    this, base = [0.0] * 8 + [1.0] * 2 + [1.0] * 5, [1.0] * 8 + [0.0] * 2 + [1.0] * 5
    expected = 2 * sum(math.comb(10, k) for k in range(3)) / 2**10
    assert stats.mcnemar(this, base) == pytest.approx(expected)
    assert stats.mcnemar([1.0], [1.0]) == 1.0


# ---------------------------------------------------------------- one's own questions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures, two questions each, one file."""
    from PIL import Image

    path = tmp_path_factory.mktemp("mine")
    lines = []
    for i in range(5):
        rng = np.random.default_rng(i)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path / f"{i}.png")
        lines.append({"id": f"{i}a", "image": f"{i}.png", "question": "what color is the cat ?", "answer": "red"})
        lines.append(
            {"id": f"{i}b", "image": f"{i}.png", "question": "a dog ?", "answers": ["yes"], "choices": ["yes", "no"]}
        )
    (path / "questions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return path


def test_a_folder_of_questions(folder: Path) -> None:
    task = tasks.get(str(folder))
    first, second = task.make(0), task.make(1)
    assert task.ids[:2] == ["0a", "0b"] and first.cluster == second.cluster != task.make(2).cluster
    assert first.media[0].shape == (32, 32, 3) and "A. yes\nB. no" in second.question
    assert first.score("Red.") == 1 and second.score("A") == 1 and second.score("B") == 0


def test_parquet_reads_the_same(folder: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [json.loads(x) for x in (folder / "questions.jsonl").read_text().splitlines()]
    rows = [r | {"image": str(folder / r["image"])} for r in rows]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "q.parquet")
    assert tasks.get(str(tmp_path / "q.parquet")).ids == tasks.get(str(folder)).ids


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"image": "0.png", "question": "q", "answer": "a", "colour": 1}', ("line 2", "'colour'")),
        ('{"image": "9.png", "question": "q", "answer": "a"}', ("line 2", "9.png")),
        ('{"image": "http://h/9.png", "question": "q", "answer": "a"}', ("line 2", "an address")),
        ('{"image": [3], "question": "q", "answer": "a"}', ("line 2", "takes a path")),
        ('{"image": "/dev/null", "question": "q", "answer": "a"}', ("line 2", "no regular file")),
        ('{"id": "x", "image": "0.png", "question": "q", "answer": "a"}', ("line 2", "'x'", "line 1")),
        ('{"image": "0.png", "answer": "a"}', ("line 2", "'question'")),
        ('{"image": "0.png", "question": "q"}', ("line 2", "'answer'")),
        ('{"image": "0.png", "question": "q", "answer": "c", "choices": ["a", "b"]}', ("line 2", "choices")),
        ('{"image": "0.png", "question": "q", "answer": "a", "metric": "bleu"}', ("line 2", "'bleu'", "anls")),
        ('{"image": "0.png", "question": ', ("line 2", "not JSON")),
        ("[1]", ("line 2", "object")),
    ],
)
def test_bad_lines_are_named(folder: Path, tmp_path: Path, line: str, words: tuple[str, ...]) -> None:
    (tmp_path / "0.png").write_bytes((folder / "0.png").read_bytes())
    good = '{"id": "x", "image": "0.png", "question": "q", "answer": "a"}'
    (tmp_path / "q.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError) as e:
        questions.load(tmp_path / "q.jsonl")
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


def test_unknown_tasks_are_refused(tmp_path: Path) -> None:
    for name in ("mmbench", "pocket/colours", "pocket/colour:width=3", str(tmp_path), str(tmp_path / "none.jsonl")):
        with pytest.raises(UserError):
            tasks.get(name)


def test_pocket_tasks_are_held_out_and_seeded() -> None:
    task = tasks.get("pocket/all")
    short = set(tasks.POCKET_KINDS) - set(tasks.FREE_TEXT)
    assert {i.split("/")[0] for i in task.ids[: len(short)]} == short == set(tasks.POCKET_KINDS[:-2])
    a, b = task.make(1), task.make(1)
    assert a.id == b.id == "colour/2000" and (a.media[0] == b.media[0]).all() and a.score(a.expected[0]) == 1
    assert tasks.get("pocket/location:size=96").make(0).media[0].shape == (96, 96, 3)


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> runner.Runner:
    return runner.load(str(tiny.save("qwen2_5_vl", tmp_path_factory.mktemp("tiny"))))


PLANS = {"uniform-50": methods.plan("uniform-50"), "snapkv-60": Plan(kv=parse("kv", "snapkv:keep=0.6,recent=4"))}
TIMED = {k for k in runner.STAGE if k.endswith(("_ms", "_per_token"))}


def ask(run: runner.Runner, task: Path, out: Path, names: str = "", **more: object) -> dict:
    plans = {n: methods.plan(n) for n in names.split(",")} if names else PLANS
    return accuracy.evaluate(str(task), out, plans=plans, loaded=run, tokens=4, **more)  # type: ignore[arg-type]


def untimed(path: Path) -> dict:
    found = [json.loads(x) for x in path.read_text().splitlines()]
    assert len({(r["id"], r["method"]) for r in found}) == len(found), "a record stands there twice"
    return {(r["id"], r["method"]): {k: v for k, v in r.items() if k not in (*TIMED, "sum")} for r in found}


@pytest.mark.parametrize("batch", [1, 3])
def test_a_killed_run_goes_on_as_if_unbroken(run: runner.Runner, folder: Path, tmp_path: Path, batch: int) -> None:
    whole = tmp_path / "whole.jsonl"
    result = ask(run, folder, whole, batch=batch)
    assert len(untimed(whole)) == 30 and not any("error" in r for r in untimed(whole).values())
    assert [r["name"] for r in result["rows"]] == ["plain", "uniform-50", "snapkv-60"]
    lines = whole.read_bytes().splitlines(keepends=True)
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(b"".join(lines[:7]) + lines[7][:40])  # killed in the middle of a line, and of a batch
    again = ask(run, folder, broken, batch=batch)
    assert untimed(broken) == untimed(whole)
    same = [
        [{k: r["metrics"][k] for k in ("accuracy", "ci95", "kept_tokens")} for r in x["rows"]] for x in (result, again)
    ]
    assert same[0] == same[1]
    before = broken.read_bytes()
    ask(run, folder, broken, batch=batch)
    assert broken.read_bytes() == before, "a finished run asks nothing again"


def test_batches_say_what_rows_alone_say(run: runner.Runner, folder: Path, tmp_path: Path) -> None:
    ask(run, folder, tmp_path / "a.jsonl", batch=1)
    ask(run, folder, tmp_path / "b.jsonl", batch=4)
    a, b = untimed(tmp_path / "a.jsonl"), untimed(tmp_path / "b.jsonl")
    assert {k: r["answer"] for k, r in a.items()} == {k: r["answer"] for k, r in b.items()}
    assert {k: r["visual_tokens"] for k, r in a.items()} == {k: r["visual_tokens"] for k, r in b.items()}
    assert max(r["batch"] for r in b.values()) == 4


def test_shards_make_the_whole(run: runner.Runner, folder: Path, tmp_path: Path) -> None:
    ask(run, folder, tmp_path / "whole.jsonl", "uniform-50")
    for i in range(2):
        ask(run, folder, tmp_path / f"{i}.jsonl", "uniform-50", shard=f"{i}/2")
    joined = tmp_path / "joined.jsonl"
    joined.write_text("".join((tmp_path / f"{i}.jsonl").read_text() for i in range(2)))
    before = joined.read_text()
    assert ask(run, folder, joined, "uniform-50")["rows"][1]["params"]["questions"] == 10
    assert joined.read_text() == before and untimed(joined) == untimed(tmp_path / "whole.jsonl")


def test_a_failing_question_is_recorded_and_counted(run: runner.Runner, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    for i in range(5):
        (tmp_path / "t" / f"{i}.png").write_bytes((folder / f"{i}.png").read_bytes())
    (tmp_path / "t" / "3.png").write_bytes(b"not a picture")
    (tmp_path / "t" / "questions.jsonl").write_text((folder / "questions.jsonl").read_text())
    row = ask(run, tmp_path / "t", tmp_path / "o.jsonl", "uniform-50", batch=4)["rows"][1]
    assert row["metrics"]["failed"] == 2 and row["params"]["questions"] == 10
    assert any("2 of 10 questions failed" in n for n in row["notes"])


def test_other_runs_are_not_mixed(run: runner.Runner, folder: Path, tmp_path: Path) -> None:
    out, summary = tmp_path / "o.jsonl", tmp_path / "s.json"
    ask(run, folder, out, "uniform-50", summary=summary, limit=2)
    before = out.read_text()
    with pytest.raises(UserError, match="tokens 4, now 5"):
        accuracy.evaluate(str(folder), out, names="uniform-50", loaded=run, tokens=5, limit=2)
    lines = map(journal.unsealed, out.read_bytes().splitlines())
    old = [journal.sealed(r | {"run": r["run"].replace("vlmfast=", "vlmfast=0.0.")}) for r in lines if r]
    (tmp_path / "old.jsonl").write_text("\n".join(old) + "\n")
    with pytest.raises(UserError, match=r"line 1 .*vlmfast 0\.0\."):
        ask(run, folder, tmp_path / "old.jsonl", limit=2)
    with pytest.raises(UserError, match="another plan"):
        plan = {"uniform-50": methods.plan("uniform-25")}
        accuracy.evaluate(str(folder), out, plans=plan, loaded=run, tokens=4, limit=2)
    with pytest.raises(UserError, match="tokens 4, now 5"):
        accuracy.evaluate(str(folder), tmp_path / "new.jsonl", summary, loaded=run, tokens=5, limit=2)
    assert out.read_text() == before
    ask(run, folder, out, "uniform-50", limit=2, force=True)
    assert len(untimed(out)) == 4


def test_no_speed_figure_when_nothing_fired(run: runner.Runner, folder: Path, tmp_path: Path) -> None:
    rows = ask(run, folder, tmp_path / "o.jsonl", "uniform-100,uniform-25", limit=2)["rows"]
    assert "total_ms" not in rows[1]["metrics"] and not rows[1]["vs"] and "did not fire" in rows[1]["notes"][0]
    assert (
        rows[2]["metrics"]["kept_tokens"] < rows[2]["metrics"]["visual_tokens"]
        and rows[2]["vs"]["plain"]["kv_fast_bytes"][0] > 1
    )


def test_broken_laws_silence_speed(run: runner.Runner, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmfast.api import Accelerated
    from vlmfast.bench import validity

    sample = tasks.get(str(folder)).make(0)
    plans = {"uniform-50": methods.plan("uniform-50")}
    assert validity.laws(run, sample, plans, 3) == {}
    remove = Accelerated.remove

    def leaves_a_trace(self: Accelerated) -> None:
        remove(self)
        run.model.lm_head.weight.data += 1e-3

    weights = run.model.lm_head.weight.data.clone()
    monkeypatch.setattr(Accelerated, "remove", leaves_a_trace)
    assert "restore" in validity.laws(run, sample, plans, 3)["uniform-50"]
    run.model.lm_head.weight.data.copy_(weights)


def test_journal_names_a_foreign_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(UserError, match="line 1"):
        journal.Journal(tmp_path / "x.jsonl", "a=1", {})


@pytest.mark.parametrize(
    "text", ["shopping list", "{}", "a\nb", '{"id": "0", "method": "m", "run": "a=1", "plan": "h"}\n']
)
def test_journal_leaves_a_file_that_is_none_as_it_is(tmp_path: Path, text: str) -> None:
    """Also one without a line end, which looks like a line cut off, and one of the time before checksums."""
    file = tmp_path / "mine.txt"
    file.write_text(text)
    with pytest.raises(UserError, match=r"no record with a checksum"):
        journal.Journal(file, "a=1", {"m": "h"})
    assert file.read_text() == text
    with pytest.raises(UserError, match="cannot be a file of answers"):
        journal.Journal(tmp_path, "a=1", {})


def test_journal_says_what_was_damaged_and_asks_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    answers = [{"id": str(i), "method": "m", "answer": f"a caf\u00e9, {i}", "ms": i / 7} for i in range(5)]
    journal.Journal(file, "a=1", {"m": "h"}).add(answers)
    whole = file.read_bytes()
    data = bytearray(whole)
    data[data.index(b"caf", data.index(b'"2"'))] ^= 1
    file.write_bytes(bytes(data[:-9]))
    again = journal.Journal(file, "a=1", {"m": "h"})
    said = capsys.readouterr().err
    assert "line 3 disagrees with its checksum" in said and "cut off" in said and again.damaged == [3]
    assert again.missing([(str(i), "m") for i in range(5)]) == [("2", "m"), ("4", "m")]
    again.add(answers)
    last = journal.Journal(file, "a=1", {"m": "h"})
    assert {k: r["answer"] for k, r in last.records.items()} == {(a["id"], "m"): a["answer"] for a in answers}


def test_composition_is_held_against_the_product() -> None:
    from evals.accuracy.composition import accuracy_sums, products

    def row(name: str, ms: list[float], loss: float) -> dict:
        metrics = {"diff_vs_plain": loss, "diff_ci95": [loss - 0.01, loss + 0.01]}
        return {"name": name, "metrics": metrics, "vs": {"plain": {"total_ms": ms}}}

    rows = [
        row("a-25", [2.0, 1.9, 2.1], -0.02),
        row("b", [1.5, 1.4, 1.6], -0.01),
        row("a-25+b", [2.2, 2.1, 2.3], -0.05),
    ]
    (found,) = products({"rows": [*rows, row("a-25+c", [9, 9, 9], 0)]})
    assert (
        found["product"] == 3.0 and found["says"] == "less than its parts" and found["share"] == pytest.approx(0.7333)
    )
    (sums,) = accuracy_sums({"rows": rows})
    assert sums["sum"] == pytest.approx(-0.03) and sums["measured"] == -0.05


def test_every_table_names_methods_and_tasks_that_exist() -> None:
    from evals.accuracy import tables

    for table in tables.TABLES.values():
        plans = tables.plans_of(table, "some/draft")
        assert len(plans) >= 4 and tasks.get(table.task).ids
        pruners = {plan.prune.name for plan in plans.values() if plan.prune is not None}
        assert not pruners or "downsample" in pruners, f"{table.task}: the control stands beside the pruners"


def test_turns_before_the_question_are_said() -> None:
    sample = tasks.get("pocket/follow-up").sample(0)
    run = runner.load("pocket")
    text = run.processor.tokenizer.decode(run.inputs([sample])["input_ids"][0])
    (question, said), visual = sample.before[0], text.index("<|vision_end|>")
    places = [text.index(part.rstrip(" ?."), visual) for part in (question, said, sample.question)]
    assert places == sorted(places)
    assert text.count("assistant") == 2


def test_the_readmes_tables_take_what_the_records_hold() -> None:
    from evals.report import gpu_tables
    from evals.report import tables as readme_tables
    from vlmfast.bench import records

    where = {"part": "first_token", "visual_tokens": 8192, "batch": 1}
    rows = [records.row("plain", metrics={"ttft_ms": 900.0}, params=where)]
    assert len(gpu_tables.summary(rows).split("\n")) == 2  # nothing to compare
    rows.append(records.row("tower", metrics={"ttft_ms": 250}, params=where, vs={"plain": {"ttft_ms": [3.5, 3, 4]}}))
    assert gpu_tables.summary(rows).split("\n")[2].endswith("| 900 | 250 | 3.50x | - |")
    metrics = {"accuracy": 0.70, "diff_vs_plain": -0.05, "diff_ci95": [-0.08, -0.02]}
    metrics |= {"visual_tokens": 1000, "kept_tokens": 190}
    fast = records.row("fast", metrics=metrics, params={"questions": 1024})
    found = {"accuracy-presets.json": [fast]}
    table = readme_tables.summary(lambda file: found.get(file, [])).split("\n")
    assert len(table) == 3 and table[2].endswith("| 1,024 | `fast` | 19 % | - | 75.0 % | -5.0 [-8.0, -2.0] |")


def test_measured_columns_are_what_the_results_say(tmp_path: Path) -> None:
    from evals.report import documents as readme
    from vlmfast.bench import records

    row = records.row(
        "uniform", metrics={"select_of_plain_prefill": 0.011}, params={"keep": 0.25},
        vs={"plain": {"prefill_ms": [3.14, 3, 4], "ttft_ms": [1.5, 1, 2]}}, bounds={"plain": {"ttft_ms": 1.4}},
    )  # fmt: skip
    (tmp_path / "cpu-encode.json").write_text(json.dumps({"rows": [row]}))
    kept = [
        records.row(f"uniform-{k}", metrics={"diff_vs_plain": d, "diff_ci95": [-0.08, -0.02], "diff_p": p})
        for k, d, p in ((50, -0.004, 0.06), (25, -0.05, 0.001))
    ]
    (tmp_path / "accuracy-pocket.json").write_text(json.dumps({"rows": kept}))
    cells = readme.encode_cells(tmp_path)
    assert cells == {"uniform": ["3.14x", "1.50x (bound 1.40x)", "1.1 %", "-0.4 / **-5.0** / -"]}
    table = "| name | a | b | c | old |\n|---|---|---|---|---|\n| `uniform` | 1 | 2 | 3 | 9 |"
    text = f"x\n<!-- measured: encode -->\n{table}\n\ny"
    new = readme.filled(text, "encode", cells)
    assert (
        "| `uniform` | 1 | 2 | 3 | 3.14x | 1.50x (bound 1.40x) | 1.1 % | -0.4 / **-5.0** / - |\n\ny" in new
        and "| 9 |" not in new
    )
    assert readme.filled(new, "encode", cells) == new
    assert readme.placed("a\n<!-- table: x -->\n| 1 |\n| 2 |\nb", "x", "| 3 |") == "a\n<!-- table: x -->\n| 3 |\nb"
    for document in readme.DOCUMENTS:
        assert readme.built(document) == document.read_text(), "run python -m evals.report.documents"

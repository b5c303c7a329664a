"""The GPU suite's part `methods`: every method's tokens on the card against the CPU's.

Tiny models in float32, so that both devices must say the same token for token; the models and the rows of methods are
those of the repository's tests, and a dry run moves the models to the pretend CUDA device that lies beside them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from evals.gpu.run import Run, said, takes_tower
from vlmfast.bench import records
from vlmfast.core import UserError

GROUPS = {"kv": 2, "prune": 4, "decode": 2, "half": 3, "stream": 1}  # and how many processes share its cases
TESTS = records.ROOT / "tests"
Place = Callable[[Any], Any]  # moves a tensor, a model or a dict of tensors to where the case runs


@dataclass
class Case:
    """One call: a family's tiny model and inputs, a plan, made where it runs."""

    name: str
    family: str
    plan: Callable[[Place], dict[str, Any]]
    media: tuple[str, ...] = ("video",)
    new: int = 6
    batch: int = 1
    generate: dict[str, Any] = field(default_factory=dict)
    by: str = ""  # which engine decoded

    @property
    def sampled(self) -> bool:
        """Another device draws otherwise: held is only that it runs."""
        return bool(self.generate.get("do_sample"))

    def __call__(self, place: Place) -> Any:
        """The tokens."""
        import tiny
        import torch

        import vlmfast

        big = {"size": (32, 48), "frames": 8} if self.family in tiny.MROPE else {}
        inputs = tiny.inputs(self.family, media=self.media, batch=self.batch, text=8, **big)
        model = place(tiny.build(self.family))
        with torch.no_grad(), vlmfast.accelerate(model, **self.plan(place)) as handle:
            torch.manual_seed(0)
            asked = {"do_sample": False, "max_new_tokens": self.new, **self.generate}
            out = listed(model.generate(**place(dict(inputs)), **asked))
            self.by = str(handle.report.decode.get("engine", "transformers"))
            return out


@dataclass
class Stream:
    """A session of the pocket model: frames pushed, one question."""

    retrieve: str | None
    frames: int = 48
    sampled: bool = False

    @property
    def name(self) -> str:
        return f"retrieve={self.retrieve}"

    def __call__(self, place: Place) -> Any:
        """The answer and its evidence."""
        import numpy as np

        from vlmfast import pocket
        from vlmfast.stream import StreamSession

        frames = np.random.default_rng(0).integers(0, 255, (self.frames, 64, 64, 3), dtype=np.uint8)
        model, processor = pocket.load("target", "float32")
        with StreamSession(place(model), processor, retrieve=self.retrieve, window=128) as session:
            for at in range(0, self.frames, 8):
                session.push(frames[at : at + 8])
            answer = session.ask("what happens in this video ?", max_new_tokens=12)
        return answer.text, [(round(a, 3), round(b, 3)) for a, b, _ in answer.evidence]


def listed(out: Any) -> Any:
    """Tokens as lists, from either device."""
    return getattr(out, "held", out).tolist()


def methods(run: Run, group: str, share: str = "1/1") -> None:
    """Every case of a group on both devices; one row, written anew as cases are done.

    share: "2/4" are the second, sixth, tenth, ... cases.
    """
    import torch

    if not (TESTS / "support" / "tiny.py").exists():
        run.skip(group, "needs a checkout of the repository: the tiny models are in its tests/")
        return
    sys.path.append(str(TESTS / "support"))
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    counts = {"cases": 0, "equal": 0, "ran": 0, "different": 0, "failed": 0, "refused": 0}
    wrong: list[str] = []
    by: Counter[str] = Counter()  # which engine decoded
    begin = time.monotonic()

    def write() -> None:
        metrics = counts | {"seconds": time.monotonic() - begin}
        run.add(group, params={"share": share}, metrics=metrics, wrong=wrong, by=dict(by))

    first, every = map(int, share.split("/"))
    for case in itertools.islice(CASES[group](), first - 1, first if run.dry else None, every):
        if run.late(f"{group} {share}: {case.name} and what follows", 2):
            break
        print(case.name, flush=True)  # the last line of a process that hangs says where
        result, why = case.verdict(run.dry) if group == "half" else compared(case, run.dry)
        by[getattr(case, "by", "")] += 1
        counts["cases"] += 1
        counts[result] += 1
        if why:
            wrong.append(f"{case.name}: {why}"[:330])
            print("  ", wrong[-1], flush=True)
        if why or counts["cases"] % 10 == 0:
            write()
    write()


def compared(case: Any, dry: bool) -> tuple[str, str]:
    """One of the row's counts, and what is wrong, if anything."""
    try:
        want = case(lambda x: x)
    except UserError:  # nothing to compare
        return "refused", ""
    except Exception as e:
        return "failed", f"on the CPU, {said(e)}"
    try:
        got = on_card(case, dry)
    except Exception as e:
        return "failed", said(e)
    if case.sampled:
        return "ran", ""
    return ("equal", "") if got == want else ("different", f"CPU {tail(want)}, card {tail(got)}")


def on_card(case: Callable[[Place], Any], dry: bool) -> Any:
    """What a case gives on the card, or on the pretend one."""
    if not dry:
        return case(to_card)
    from pretend_cuda import PretendCuda, to_cuda

    with PretendCuda(capability=(9, 0)):
        return case(to_cuda)


def tail(said: Any) -> str:
    """The end of what was said."""
    return str(said)[-90:]


def to_card(x: Any) -> Any:
    """A tensor, a model or a dict of tensors on the card."""
    import torch

    if isinstance(x, dict):
        return {k: to_card(v) for k, v in x.items()}
    return x.to("cuda") if isinstance(x, (torch.Tensor, torch.nn.Module)) else x


# -- the cases -------------------------------------------------------------------------------------------------------


def kv_cases() -> Iterator[Case]:
    """Every policy: gentle and harsh, other families, two rows, int8; HybridKV's ways of swapping."""
    import methods as rows

    from vlmfast import spec
    from vlmfast.prefill import HybridAdvanced, HybridKV

    for p in rows.POLICIES:
        yield Case(f"{p!r}", "qwen2_5_vl", lambda place, p=p: {"kv": p})
    for p in {type(p): p for p in rows.POLICIES}.values():
        for family in ("qwen3_vl", "llava_onevision"):
            yield Case(f"{p!r} {family}", family, lambda place, p=p: {"kv": p})
        yield Case(f"{p!r} two rows", "qwen2_5_vl", lambda place, p=p: {"kv": p}, batch=2)
        with contextlib.suppress(Exception):
            p = dataclasses.replace(p, int8=True)
            yield Case(f"{p!r}", "qwen2_5_vl", lambda place, p=p: {"kv": p}, new=10)
    often = HybridAdvanced(refresh=1)
    for more in ({"split": 0.5}, {"split": 0.5, "int8": True}, {"split": 0.5, "advanced": often}):
        p = HybridKV(keep=0.3, sinks=1, recent=2, **more)
        for batch in (1, 2):
            name = f"{spec.write(p)}, {batch} rows"
            yield Case(name, "qwen2_5_vl", lambda place, p=p: {"kv": p}, new=12, batch=batch)


def prune_cases() -> Iterator[Case]:
    """Every pruner on every family, a video or two images."""
    import methods as rows
    import tiny

    for p in {type(p): p for p in rows.PRUNERS}.values():
        for family in [*tiny.FAMILIES, "internvl"]:
            for media in (("video",), ("image", "image")):
                video = family in tiny.VIDEO_FAMILIES or media != ("video",)
                if video and rows.carries(p, family, media):
                    yield Case(f"{p!r} {family} {media}", family, lambda place, p=p: {"prune": p}, media=media, new=4)
    for p in rows.FIRST:
        for family in tiny.QWEN:
            with contextlib.suppress(Exception):
                inside = dataclasses.replace(p, after_block=1)
                yield Case(f"{inside!r} {family}", family, lambda place, p=inside: {"prune": p}, new=4)


def decode_cases() -> Iterator[Case]:
    """Every draft and rule, greedy and sampled; loops on every family; several rows; with a policy and a pruner."""
    import methods as rows
    import tiny

    from vlmfast import decode, spec
    from vlmfast.decode import ModelDraft, PromptLookup, Speculate
    from vlmfast.encode import Uniform, VidCom2
    from vlmfast.prefill import HybridAdvanced, HybridKV, SnapKV

    def small(place: Place) -> Any:
        return ModelDraft(place(tiny.build("qwen2_5_vl", seed=1, num_hidden_layers=2)), prune=None)

    everywhere: dict[str, dict[str, Any]] = {"loop": {"speculate": Speculate()}}
    everywhere["lookup"] = {"speculate": Speculate(PromptLookup(), length=4)}
    if takes_tower():
        everywhere["tower"] = {"tower": "fast"}
    for family in ("qwen2_5_vl", *(f for f in tiny.FAMILIES if f != "qwen2_5_vl")):
        media = ("video",) if family in tiny.VIDEO_FAMILIES else ("image",)
        for name, plan in everywhere.items():
            yield Case(f"{name} {family}", family, lambda place, plan=plan: plan, media=media, new=16)
            if name == "tower":
                yield Case(f"{name} {family} rows", family, lambda place, p=plan: p, media=media, new=12, batch=3)
                both = ("image", *media)
                yield Case(f"{name} {family} {both}", family, lambda place, p=plan: p, media=both, new=4)
    opened = {"digits": False, "negation": False, "comparison": False}  # no tokenizer is at hand to look words up
    fields = {"loose": [opened, opened | {"advanced": decode.LooseAdvanced(scope="running")}], "fly": [{"window": 1}]}
    for name, rule in decode.ACCEPT.items():
        for given in fields.get(name, [{}]):
            made = rule(**given)
            for sample in (False, True):
                yield Case(
                    f"{spec.write(made)} sample={sample}", "qwen2_5_vl", new=16, generate={"do_sample": sample},
                    plan=lambda p, r=made: {"speculate": Speculate(small(p), r, length=4)},
                )  # fmt: skip
    for one in rows.RULES:
        yield Case(f"{one!r}"[:90], "qwen2_5_vl", lambda place, s=one: {"speculate": s}, new=16)
    mixed = {"keep": 0.3, "sinks": 1, "recent": 2, "split": 0.5}
    plans: dict[str, Callable[[Place], dict[str, Any]]] = {
        "16 drafted": lambda p: {"speculate": Speculate(small(p), length=16, most=16)},
        "hybridkv": lambda p: {"kv": HybridKV(**mixed), "speculate": Speculate(small(p), length=4)},
        "hybridkv refresh": lambda p: {"kv": HybridKV(**mixed, advanced=HybridAdvanced(refresh=1)),
                                       "speculate": Speculate(small(p), length=4)},
        "snapkv int8": lambda p: {"kv": SnapKV(keep=0.4, int8=True), "speculate": Speculate(small(p), length=4)},
        "three stages": lambda p: {"prune": VidCom2(keep=0.5), "kv": SnapKV(keep=0.4, sinks=1, recent=2),
                                   "speculate": Speculate(small(p), length=4)},
        "adaptive": lambda p: {"speculate": Speculate(small(p))},
        "preset fast": lambda p: {"plan": "fast"},
    }  # fmt: skip
    for name, make in plans.items():
        yield Case(name, "qwen2_5_vl", make, new=30)
    lookup = {"prune": Uniform(keep=0.5), "speculate": Speculate(PromptLookup(), otherwise="plain")}
    yield Case("rows", "qwen2_5_vl", lambda place: lookup, new=12, batch=3)
    several = {"do_sample": True, "num_return_sequences": 3}
    yield Case("sequences", "qwen2_5_vl", lambda place: lookup, new=12, generate=several)


def stream_cases() -> Iterator[Stream]:
    """The pocket model with and without retrieval."""
    yield from (Stream("internal", 16), Stream("internal"), Stream(None), Stream("recency"))


def half_cases() -> Iterator[Any]:
    """Decoding in half precision."""
    from evals.gpu import half as gpu_half

    return gpu_half.cases()


CASES: dict[str, Callable[[], Iterator[Any]]] = {
    "kv": kv_cases, "prune": prune_cases, "decode": decode_cases, "half": half_cases,
    "stream": stream_cases,
}  # fmt: skip

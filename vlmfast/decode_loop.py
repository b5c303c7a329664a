"""Which loop decodes a call: ours, with or without a draft, or transformers' own."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from vlmfast import engine
from vlmfast.core import Unsupported
from vlmfast.plan import Plan
from vlmfast.runtime.request_state import Requests


def put_loop(
    model: Any, plan: Plan, requests: Requests, args: tuple, kwargs: dict[str, Any], why: str | None,
    draft: Requests | None, reuse: bool,
) -> None:  # fmt: skip
    """Put our loop into the arguments of `generate`, unless the call cannot be drafted and the plan allows it.

    Without speculate= that is so where the engine steps statically, see `engine`, and anything was asked for.
    requests: of the model, whose current one is this call; why: what makes this call one of rewritten inputs, which
    transformers' own loop decodes; draft: the calls of an accelerated draft model; reuse: is reuse= on?
    """
    from vlmfast.decode import Speculate, loop

    stage = requests.current.decode

    def put(speculate: Speculate, sink: Any) -> None:
        loop.check(model, speculate, args, kwargs, plan.kv)
        if why is not None:
            raise Unsupported(f"{why} with prune= is decoded by transformers' own loop: drop {why} or speculate=")
        kwargs["custom_generate"] = loop.build(
            model, speculate, streamer=kwargs.get("streamer"), requests=requests, draft=draft, inputs=kwargs, sink=sink
        )

    refused = None
    if plan.speculate is not None:
        try:
            return put(plan.speculate, stage.update)
        except Unsupported as e:
            if plan.speculate.otherwise == "refuse":
                raise
            refused = f"speculate: not for this call ({e}), decoded "
    reason = _no_engine(model, plan, reuse, requests.current.nested)
    if reason is None:
        try:
            put(Speculate(), functools.partial(_engine_alone, stage))
        except Unsupported as e:
            reason = f"not for this call ({e})"
    if refused is not None:
        stage["notes"] = [refused + ("without drafts" if reason is None else "by transformers")]
    elif reason:
        stage["notes"] = [f"engine: {reason}, decoded by transformers"]
    return None


def _no_engine(model: Any, plan: Plan, reuse: bool, nested: bool) -> str | None:
    """Why a call without speculate= is not decoded by our loop, None = it is; empty where there is no question: on a
    CPU, and where nothing was asked."""
    text_model, output_head = engine.decoder(model)
    anything_asked = reuse or replace(plan, tower=None) != Plan() or plan.tower == "fast"
    if text_model is None or not engine.automatic(text_model) or not anything_asked:
        return ""
    if nested:
        return "a call inside a call"
    return engine.why_not(text_model, output_head)


def _engine_alone(stage: dict[str, Any], numbers: dict[str, Any]) -> None:
    """What the report keeps of the loop's numbers where nothing was drafted or asked to be."""
    stage.update({name: value for name, value in numbers.items() if name.startswith(("engine", "graph", "capture"))})
    stage["notes"] = [*stage.get("notes", []), *numbers.get("notes", [])]

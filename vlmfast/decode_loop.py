"""Which loop decodes a call: ours, with or without a draft, or transformers' own."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vlmfast import engine
from vlmfast.core import Unsupported
from vlmfast.runtime.request_state import Requests

if TYPE_CHECKING:
    from vlmfast.decode import Speculate


def put_loop(
    model: Any, speculate: Speculate | None, requests: Requests, args: tuple, kwargs: dict[str, Any], *,
    kv: Any = None, asked: bool = True, rewritten: str | None = None, draft: Requests | None = None,
) -> None:  # fmt: skip
    """Put our loop into the arguments of `generate`, unless the call cannot be drafted and speculate= allows it.

    Without speculate= that is so where the engine steps statically, see `engine`, and anything was `asked` for.
    requests: of the model, whose current one is this call; kv: the policy that will compress the cache; rewritten: what
    makes this call one of rewritten inputs, which transformers' own loop decodes; draft: the calls of an accelerated
    draft model.
    """
    from vlmfast.decode import Speculate, loop

    stage = requests.current.decode
    loop.constrain(model, speculate, args, kwargs)

    def put(method: Speculate, sink: Any) -> None:
        loop.check(model, method, args, kwargs, kv)
        if rewritten is not None:
            raise Unsupported(
                f"{rewritten} with prune= is decoded by transformers' own loop: drop {rewritten} or speculate="
            )
        kwargs["custom_generate"] = loop.build(
            model, method, streamer=kwargs.get("streamer"), requests=requests, draft=draft, inputs=kwargs, sink=sink
        )

    refused = None
    if speculate is not None:
        try:
            return put(speculate, stage.update)
        except Unsupported as error:
            if speculate.otherwise == "refuse":
                raise
            refused = f"speculate: not for this call ({error}), decoded "
    reason = _no_engine(model, requests.current.nested) if asked else ""
    if reason is None:
        try:
            put(Speculate(), functools.partial(_engine_alone, stage))
        except Unsupported as error:
            reason = f"not for this call ({error})"
    if refused is not None:
        stage["notes"] = [refused + ("without drafts" if reason is None else "by transformers")]
    elif reason:
        stage["notes"] = [f"engine: {reason}, decoded by transformers"]
    return None


def _no_engine(model: Any, nested: bool) -> str | None:
    """Why a call without speculate= is not decoded by our loop; None = it is, empty on a CPU, where nobody asks."""
    text_model, output_head = engine.decoder(model)
    if text_model is None or not engine.automatic(text_model):
        return ""
    if nested:
        return "a call inside a call"
    return engine.why_not(text_model, output_head)


def _engine_alone(stage: dict[str, Any], numbers: dict[str, Any]) -> None:
    """What the report keeps of the loop's numbers where nothing was drafted or asked to be."""
    stage.update({name: value for name, value in numbers.items() if name.startswith(("engine", "graph", "capture"))})
    stage["notes"] = [*stage.get("notes", []), *numbers.get("notes", [])]

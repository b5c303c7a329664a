"""A `generate` that is called inside itself: by transformers' assisted decoding, when the assistant is the model."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any


def nested(generate: Callable[..., Any], *states: Any) -> Callable[..., Any]:
    """`generate`, whose calls from inside a call of the same thread leave `states` as the outer call had them.

    states: dicts, or objects whose attributes every call replaces (as a `reset()` does) and does not change in place.
    """
    inside: set[int] = set()

    @functools.wraps(generate)
    def call(*args: Any, **kwargs: Any) -> Any:
        thread = threading.get_ident()
        if thread not in inside:
            inside.add(thread)
            try:
                return generate(*args, **kwargs)
            finally:
                inside.discard(thread)
        held = [(state, dict(state if isinstance(state, dict) else vars(state))) for state in states]
        try:
            return generate(*args, **kwargs)
        finally:
            for state, before in held:
                now = state if isinstance(state, dict) else vars(state)
                now.clear()
                now.update(before)

    return call

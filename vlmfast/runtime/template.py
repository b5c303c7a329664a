"""The chat template of a checkpoint, which is a program of its author's: what it does wrong is said in one line."""

from __future__ import annotations

from typing import Any

from vlmfast.core import UserError, shown

MOST = 2**20  # characters of a prompt; a template that repeats itself writes more


def chat_text(processor: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """The prompt of a chat, the next answer begun. options: those of `apply_chat_template`.

    Raises UserError when the template fails, for whatever reason, or writes what is no prompt.
    """
    try:
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
    except Exception as e:  # a template may raise anything: syntax, its own `raise_exception`, a recursion
        raise UserError(
            f"the model's chat template fails ({type(e).__name__}: {shown(str(e))}): mend chat_template.jinja beside "
            "its processor"
        ) from None
    if not isinstance(text, str) or len(text) > MOST:
        size = f"{len(text)} characters" if isinstance(text, str) else shown(text)
        raise UserError(f"the model's chat template wrote {size}: mend chat_template.jinja beside its processor")
    return text

"""What each stage really did: tokens, milliseconds, bytes, acceptance. Metric names are those of the result files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """The last accelerated call. Fields hold only what was measured; a stage that did nothing says why in `notes`."""

    encode: dict[str, Any] = field(default_factory=dict)
    prefill: dict[str, Any] = field(default_factory=dict)
    decode: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    read: dict[str, Any] = field(default_factory=dict)  # of inputs that `read_inputs` made

    def json(self) -> dict[str, Any]:
        """Plain-JSON form."""
        return {
            "read": self.read,
            "encode": self.encode,
            "prefill": self.prefill,
            "decode": self.decode,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        if not (self.encode or self.prefill or self.decode):
            return "no accelerated call yet"
        encode, prefill, decode = self.encode, self.prefill, self.decode
        lines = [read_line(self.read)] if self.read else []
        if encode.get("visual_tokens"):
            lines.append(
                f"encode   {encode['visual_tokens']:,} -> {encode['kept_tokens']:,} visual tokens, "
                f"tower {encode['encode_ms']:.1f} ms, selection {encode['select_ms']:.2f} ms"
                + (f", dropped before tower block {encode['tower_block']}" if "tower_block" in encode else "")
            )
        if prefill:
            kv_bytes = f"{prefill['kv_fast_bytes'] / 1e6:.2f} MB fast"
            if prefill.get("kv_host_bytes"):
                kv_bytes += f" + {prefill['kv_host_bytes'] / 1e6:.2f} MB host"
            lines.append(
                f"prefill  {prefill['prefill_ms']:.1f} ms, first token after {prefill['ttft_ms']:.1f} ms; "
                f"{prefill['cached_tokens']:,.0f} columns cached, KV {kv_bytes}"
            )
        if decode:
            decode_line = f"decode   {decode['tokens']} tokens, {decode['decode_ms_per_token']:.2f} ms each"
            if decode.get("verify_rounds"):
                decode_line += f"; {decode['accepted_length']:.2f} draft tokens accepted per round"
            if decode.get("ahead_rounds"):
                decode_line += (
                    f"; {decode['ahead_used']} of {decode['ahead_rounds']} drafts made ahead used, "
                    f"{decode['hidden_ms']:.1f} ms hidden"
                )
            if decode.get("engine") == "static":
                decode_line += "; static step"
                if decode.get("graph_captures"):
                    decode_line += f", {decode['graph_captures']} graphs captured in {decode['capture_ms']:,.0f} ms"
                if decode.get("step_floor_ms"):
                    decode_line += f", whose bytes take {decode['step_floor_ms']:.2f} ms at least"
            lines.append(decode_line)
        return "\n".join(lines + [f"note     {note}" for note in self.notes])


def read_line(read: dict[str, Any]) -> str:
    """The line of stage 0: frames, their size, milliseconds, and those from the file to the first token."""
    parts = []
    if "frames" in read:
        (height, width), (to_height, to_width) = read["source_size"], read["size"]
        scaled = "" if (height, width) == (to_height, to_width) else f" -> {to_width}x{to_height}"
        parts.append(f"{read['frames']} frames of {width}x{height}{scaled}")
    if "read_ms" in read:
        parts.append(f"read in {read['read_ms']:,.1f} ms")
    parts.append(f"processor {read['processor_ms']:,.1f} ms")
    if read.get("pieces"):
        parts.append(f"{read['hidden_ms']:,.1f} ms of that beside the tower, in {read['pieces']} pieces")
    if "first_token_ms" in read:
        parts.append(f"first token {read['first_token_ms']:,.1f} ms after the file was opened")
    return f"read     {', '.join(parts)}"


def why_all_kept(name: str, least: int, media: dict[str, list[Any]], tokens: int) -> str:
    """The note of a call whose pruner kept everything.

    name: of the pruner; least: tokens that it leaves of every image or video; media: per kind, items with `.n` visual
    tokens each; tokens: in all.
    """
    if all(item.n <= least for items in media.values() for item in items):
        return f"prune: {tokens:,} visual tokens, no image or video has more than least={least}, all kept"
    return f"prune: {name} kept every token of this media"

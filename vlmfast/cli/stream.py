"""`vlmfast stream`: watch a file, folder, camera or URL, and ask about it while it goes on or when it has ended."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmfast.cli import console, errors, options

if TYPE_CHECKING:
    from vlmfast.stream.session import Answer, StreamSession
    from vlmfast.stream.watch_rules import Alert

Text = Annotated[str | None, typer.Argument(help="a video file or a folder of frames")]


def stream(
    source: Text = None,
    ask: Annotated[list[str] | None, typer.Option("--ask", help="a question; '12s: ...' asks at second 12")] = None,
    camera: Annotated[int | None, typer.Option("--camera", min=0, help="a camera's number")] = None,
    url: Annotated[str | None, typer.Option("--url", help="an RTSP, HTTP or other stream")] = None,
    model: options.Model = "pocket",
    save: Annotated[Path | None, typer.Option("--save", help="folder to keep the stream in")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="folder of a stream to continue")] = None,
    retrieve: Annotated[
        str, typer.Option("--retrieve", help="internal:frames=16, recency:frames=8, none")
    ] = "internal",
    recent: Annotated[
        float | None, typer.Option("--recent", min=0, help="seconds that every answer reads whole (default: 4 frames)")
    ] = None,
    when: Annotated[
        list[str] | None, typer.Option("--when", help="tell when it comes true: 'a red circle appears'")
    ] = None,
    cooldown: Annotated[float, typer.Option("--cooldown", min=0, help="seconds between two of a --when")] = 10.0,
    window: Annotated[int, typer.Option("--window", min=1, help="tokens a frame sees")] = 4096,
    ram: Annotated[str | None, typer.Option("--ram", help="most memory of the archive (2GiB)")] = None,
    disk_limit: Annotated[str | None, typer.Option("--disk-limit", help="most bytes in --save")] = None,
    coarsen: Annotated[
        str | None, typer.Option("--coarsen", help="ages at which blocks get coarser: age:four_bit=60,features=300")
    ] = None,
    redundancy: Annotated[float, typer.Option("--redundancy", help="cosine distance of tokens to drop; 0: none")] = 0.2,
    sample_fps: Annotated[float, typer.Option("--fps", help="frames taken per second")] = 2.0,
    size: Annotated[str | None, typer.Option("--size", help="model (default of files), full, or longer side")] = None,
    realtime: Annotated[bool, typer.Option("--realtime", help="play a file at its own speed")] = False,
    prune: options.Prune = None,
    speculate: options.Speculation = None,
    tower: options.Tower = None,
    max_new_tokens: options.NewTokens = 128,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    as_json: options.Json = False,
) -> None:
    """Ask questions of endless video: encoded once, kept, and asked about at any time."""
    from vlmfast.core import UserError
    from vlmfast.plan import resolve

    sources = [given for given in (source, camera, url) if given is not None]
    if len(sources) > 1:
        raise UserError("a file, --camera and --url exclude each other: give one")
    if not sources and resume is None:
        raise UserError("nothing to watch: give a file, a folder, --camera 0 or --url; or --resume a kept stream")
    if save is not None and resume is not None:
        raise UserError("--resume goes on in its own folder: leave --save out")
    questions = [parse(question_text) for question_text in ask or ()]
    interactive = not questions and not when and not as_json and sys.stdin.isatty()
    if not (questions or when or interactive or as_json) and (save is None and (resume is None or not sources)):
        raise UserError(
            "nothing is asked and nothing kept: give --ask or --when, --save to keep the stream, or type in a terminal"
        )
    frame_size = None if size is None else options.frame_size(size)
    chosen_plan = resolve(None, prune=prune, speculate=speculate, tower=tower)
    from vlmfast.stream.session import StreamSession

    loaded = options.load(model, dtype, device, device_map)
    session_options: dict[str, Any] = {"retrieve": retrieve}
    limits = {"ram": ram, "disk_limit": disk_limit, "recent": recent, "coarsen": coarsen}
    session_options |= {name: value for name, value in limits.items() if value is not None}
    if resume is not None:
        session = StreamSession.load(resume, loaded.model, loaded.processor, plan=chosen_plan, **session_options)
        for line in (*session.stats()["lost"], *session.notes):
            console.remarks().print(line, style="yellow", markup=False)
        if session.lost_seconds:
            console.remarks().print(f"{session.lost_seconds:.1f} s were not on disk when the last run ended")
    else:
        session_options |= {"window": window, "redundancy": redundancy or None, "fps": sample_fps, "disk": save}
        session = StreamSession(loaded.model, loaded.processor, chosen_plan, **session_options)
    conversation = Talk(session, max_new_tokens, as_json)
    with session:
        for rule in when or ():
            session.when(rule, conversation.alert, cooldown)
        source_options = {"sample_fps": sample_fps, "size": frame_size}
        if interactive:
            live = source is None or realtime
            conversation.interactively(
                sources[0] if sources else None,
                source_options | ({} if live and not realtime else {"realtime": realtime}),
            )
        else:
            conversation.through(
                sources[0] if sources else None, source_options | ({"realtime": True} if realtime else {}), questions
            )
        if not (questions or interactive or as_json) and (save or resume) is not None:
            print(f"{status(session.stats())}; kept in {save or resume}")
        if as_json:
            print(
                json.dumps(
                    {
                        "answers": conversation.answers,
                        "alerts": conversation.alerts,
                        "stats": session.stats(),
                        "plan": chosen_plan.json(),
                    },
                    indent=1,
                )
            )


def parse(text: str) -> tuple[float | None, str]:
    """(second, question) of "12s: what happened ?", "1m30s: ..." or a plain question (None: at the end)."""
    match = re.fullmatch(r"\s*(?:(\d{1,9})m)?\s*(?:(\d{1,9}(?:\.\d{1,9})?)s)?\s*:\s*(.+)", text, re.DOTALL)
    if match and (match[1] or match[2]):
        return int(match[1] or 0) * 60 + float(match[2] or 0), match[3].strip()
    return None, text.strip()


def status(stats: dict[str, Any]) -> str:
    """The status line: what was seen, how fast, and what it takes."""
    status_parts = [
        f"{stats['seconds']:.0f} s seen", f"{stats['fps']:.1f} fps", f"RAM {stats['kv_host_bytes'] / 1e6:.1f} MB",
        f"disk {stats['kv_disk_bytes'] / 1e6:.1f} MB", f"queue {stats['queue']}",
    ]  # fmt: skip
    if stats["dropped_frames"]:
        status_parts.append(f"{stats['dropped_frames']} dropped")
    return " · ".join(status_parts)


class Talk:
    """Questions and answers over one session."""

    def __init__(self, session: StreamSession, max_new_tokens: int, silent: bool) -> None:
        self.session, self.max_new_tokens, self.silent = session, max_new_tokens, silent
        self.answers: list[dict[str, Any]] = []
        self.alerts: list[dict[str, Any]] = []
        self.quiet = threading.Event()  # set while an answer is being written

    def answer(self, question: str, at: float | None = None) -> Answer:
        """Ask, print, remember."""
        from vlmfast.cli.ask import GREEDY

        generate_options: dict[str, Any] = dict(GREEDY)
        if not self.silent:
            from transformers import TextStreamer

            tokenizer: Any = self.session.vision.tokenizer
            generate_options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        reply = self.session.ask(question, at=at, max_new_tokens=self.max_new_tokens, **generate_options)
        self.answers.append(
            {"question": question, "at": at, "answer": reply.text, "evidence": reply.evidence, "report": reply.report}
        )
        if not self.silent:
            spans = ", ".join(f"{start:.0f}-{end:.0f} s" for start, end, _ in reply.evidence[:4])
            cost_line = f"{reply.report['total_ms']:.0f} ms over {reply.report['context_tokens']:.0f} tokens"
            console.remarks().print(f"{cost_line}; looked at {spans or 'nothing'}", style="dim", markup=False)
        return reply

    def alert(self, alert: Alert) -> None:
        """Print, remember."""
        self.alerts.append(asdict(alert))
        if not self.silent:
            print(alert, flush=True)

    def through(self, source: Any, source_options: dict[str, Any], questions: list[tuple[float | None, str]]) -> None:
        """Watch to the end, asking on the way what is to be asked at a second."""
        timed_questions = sorted(
            (timed for timed in questions if timed[0] is not None), key=lambda timed: timed[0] or 0.0
        )
        if source is not None:
            self.session.watch(self._until(source, source_options, timed_questions), drop=False)
        for second, question in timed_questions:  # at the very end, or after it
            self.answer(question, second)
        for second, question in questions:
            if second is None:
                self.answer(question)

    def _until(
        self, source: Any, source_options: dict[str, Any], timed_questions: list[tuple[float | None, str]]
    ) -> Iterator[Any]:
        """Frames of the source; a question is asked before the first frame after its second, everything encoded."""
        from vlmfast.stream.frame_queue import open_frames

        start = self.session.stats()["seconds"]
        given = {name: value for name, value in source_options.items() if value is not None}
        for image, seconds in open_frames(source, given, self.session.vision.frame_size):
            while timed_questions and seconds + start > (timed_questions[0][0] or 0.0):
                second, question = timed_questions.pop(0)
                self.session.drain()
                self.answer(question, second)
            yield image, seconds

    def interactively(self, source: Any, source_options: dict[str, Any]) -> None:
        """Questions typed while the video goes on; an empty line or end of input ends it."""
        watcher = None
        if source is not None:
            source_options = {
                name: value for name, value in source_options.items() if value is not None and value is not False
            }
            watcher = self.session.watch(source, background=True, **source_options)
        print("ask away; '/new' starts another conversation, an empty line ends", file=sys.stderr)
        with self.live_status():
            self.converse(self._lines())
        if watcher is not None:
            watcher.stop()

    def converse(self, typed_lines: Iterable[str]) -> None:
        """Answer line after line until an empty one; what a question gets wrong is said, and the next one is taken."""
        from vlmfast.core import UserError

        for typed_line in typed_lines:
            if not typed_line.strip():
                return
            if typed_line.strip() == "/new":
                self.session.new_conversation()
                continue
            second, question = parse(typed_line)
            self.quiet.set()
            try:
                self.answer(question, second)
            except UserError as error:
                errors.say(str(error))
            finally:
                self.quiet.clear()

    @staticmethod
    def _lines() -> Iterator[str]:
        while True:
            print(file=sys.stderr, flush=True)  # the status line's place: it is written above the prompt
            try:
                yield input("? ")
            except EOFError:
                return

    @contextmanager
    def live_status(self, write: Callable[[str], Any] | None = None, every: float = 0.5) -> Iterator[None]:
        """A line above the prompt that follows the stream, on terminals."""
        write = write or (lambda text: (sys.stderr.write(text), sys.stderr.flush()))
        finished = threading.Event()

        def follow() -> None:
            while not finished.wait(every):
                if not self.quiet.is_set():  # save the cursor, one line up, clear it, write, come back
                    status_line = status(self.session.stats())[: shutil.get_terminal_size().columns - 1]
                    write(f"\x1b7\x1b[1A\r\x1b[2K{status_line}\x1b8")

        thread = threading.Thread(target=follow, daemon=True)
        if sys.stderr.isatty():
            thread.start()
        try:
            yield
        finally:
            finished.set()
            if thread.is_alive():
                thread.join(2)

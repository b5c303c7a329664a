"""Stream sessions over tiny models, small videos for them, and the logits of a question."""

from __future__ import annotations

import threading

import numpy as np
import tiny
import torch

from vlmfast.runtime.model_lock import model_lock
from vlmfast.stream.session import StreamSession

Q = "what color is the cat ?"


PROCESSORS: dict = {}


def processor(family):
    if family not in PROCESSORS:
        PROCESSORS[family] = tiny.processor(family)
    return PROCESSORS[family]


def video(frames=8, seed=0, still=0.6):
    """(T, 16, 24, 3) uint8; a share of the pixels stays what it was in the frame before."""
    rng = np.random.default_rng(seed)
    out = [rng.integers(0, 255, (16, 24, 3), np.uint8)]
    for _ in range(frames - 1):
        fresh = rng.integers(0, 255, (16, 24, 3), np.uint8)
        keep = rng.random((2, 3, 1)).repeat(8, 0).repeat(8, 1) < still
        out.append(np.where(keep, out[-1], fresh).astype(np.uint8))
    return np.stack(out)


def session(family, model=None, **kw):
    kw = {"window": 400, "redundancy": None, "keep_as": "model", "retrieve": None, "fps": 2.0} | kw
    return StreamSession(model or tiny.build(family), processor(family), **kw)


def logits(s, question=Q, **kw):
    """(V,) after the prompt of a question; the stream is not touched."""
    return s.builder.logits(s.context(question, **kw), s.plain_cache)


TOLERANCE = 2e-4  # fp32 logits of about 10, summed in another order


def close(a, b):
    return float((a - b).abs().max()) < TOLERANCE


FAMILIES = tiny.VIDEO_FAMILIES


def plain(family, model, frames, messages, fps=2.0):
    """What the stock processor makes of the whole clip in one prompt."""
    proc = processor(family)
    text = proc.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    meta = {"total_num_frames": len(frames), "fps": fps, "frames_indices": list(range(len(frames)))}
    clip = torch.from_numpy(frames).permute(0, 3, 1, 2)
    more = {"fps": fps} if family in ("qwen2_vl", "qwen2_5_vl") else {}
    return proc(
        text=[text], videos=[clip], videos_kwargs={"do_sample_frames": False, **more}, video_metadata=[meta],
        return_tensors="pt",
    )  # fmt: skip


def turn(question, video_too=True):
    text = {"type": "text", "text": question}
    return {"role": "user", "content": [{"type": "video"}, text] if video_too else [text]}


def plain_logits(model, inputs):
    positions = model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
    return model(**inputs, position_ids=positions).logits[0, -1].float()


def still(moving=6, after=10, seed=0):
    """Frames that change, then one that stays: redundancy keeps next to nothing of the end."""
    frames = video(moving, seed, still=0.2)
    return np.concatenate([frames, np.repeat(frames[-1:], after, 0)])


def queued(sessions, clips):
    """Frames of several streams that wait, as they do while the model answers."""
    held, free = threading.Event(), threading.Event()

    def answering():
        with model_lock(sessions[0].model):
            held.set()
            free.wait(30)

    thread = threading.Thread(target=answering)
    thread.start()
    assert held.wait(30)
    for stream, frames in zip(sessions, clips, strict=True):
        stream.push(frames)
        assert len(stream.queue) == len(frames)
    free.set()
    thread.join()

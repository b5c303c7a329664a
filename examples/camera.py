"""Ask a camera, a stream or a video file what it has shown: frames are encoded as they come, once."""
# python examples/camera.py [MODEL] [SOURCE] [QUESTION ...]; SOURCE: a file, rtsp://..., or a camera's number such as 0

import sys
import tempfile

from vlmfast import StreamSession
from vlmfast.loading import load
from vlmfast.pocket import world
from vlmfast.stream import Internal
from vlmfast.video import write_video

if len(sys.argv) > 2:
    source = int(sys.argv[2]) if sys.argv[2].isdigit() else sys.argv[2]
    questions = sys.argv[3:] or ["What has happened?"]
else:  # half a minute drawn for the pocket model
    clip = world.sample("needle", seed=3, split="test", seconds=32)
    source = write_video(f"{tempfile.mkdtemp()}/clip.mp4", clip.frames, fps=clip.fps)
    questions = [clip.question]

loaded = load(sys.argv[1] if len(sys.argv) > 1 else "pocket")
retriever = Internal(frames=8, scope="shared", similarity="centred")  # what a question brings back
with StreamSession(loaded.model, loaded.processor, ram="1GiB", retrieve=retriever) as stream:
    watcher = stream.watch(source, background=True, sample_fps=2)
    watcher.wait(30)  # half a minute of a camera; a file that ends sooner is done sooner
    for question in questions:
        answer = stream.ask(question, max_new_tokens=48)
        seconds = ", ".join(f"{start:.0f}-{end:.0f}" for start, end, _ in answer.evidence)
        print(f"{question}\n  {answer.text}\n  [looked at seconds {seconds}]")
    seen = stream.stats()
    print(f"\n{seen['frames']} frames, {seen['kept_tokens']:,} of {seen['visual_tokens']:,} visual tokens were news")

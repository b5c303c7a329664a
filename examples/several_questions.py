"""Ask several questions about one video: it is encoded and prefilled once, and every later question starts at once."""
# python examples/several_questions.py [MODEL] [VIDEO] [QUESTION ...]; without arguments the pocket model and its world

import sys
import tempfile

from vlmfast import accelerate
from vlmfast.loading import load
from vlmfast.pocket import world
from vlmfast.video import VideoReader, write_video

if len(sys.argv) > 2:
    video, questions = sys.argv[2], sys.argv[3:] or ["What happens?", "Where does it happen?", "Who is seen?"]
else:
    clip = world.sample("when", seed=1, split="test", size=128, seconds=16)
    video = write_video(f"{tempfile.mkdtemp()}/clip.mp4", clip.frames, fps=clip.fps)
    questions = [clip.question, "what appears at second 3 ?", "describe the clip ."]

loaded = load(sys.argv[1] if len(sys.argv) > 1 else "pocket")
frames = loaded.read(VideoReader(video, select="fps:2"))  # at the size that the model asks for, once

with accelerate(loaded.model, reuse="1GiB") as fast:
    for question in questions:
        inputs = loaded.inputs(question, video=frames)
        output = loaded.model.generate(**inputs, max_new_tokens=48, do_sample=False)
        print(f"{question}\n  {loaded.decode(output, inputs)}")
        print(f"  [first token after {fast.report.prefill['ttft_ms']:.0f} ms] {' '.join(fast.report.notes)}")

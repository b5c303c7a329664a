"""Chat about a picture, turn by turn, as with LLaVA: the picture is encoded once, answers are streamed."""
# python examples/chat.py [MODEL] [PICTURE] [QUESTION ...]; without arguments the pocket model and a drawn picture

import sys

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer

import vlmfast
from vlmfast.pocket import path, world

name = sys.argv[1] if len(sys.argv) > 1 else path()  # for example llava-hf/llava-1.5-7b-hf
drawn = world.sample("colour", seed=3, split="test", size=128, objects=(2, 2)).frames[0].numpy()
picture = Image.open(sys.argv[2]) if len(sys.argv) > 2 else Image.fromarray(drawn)
questions = sys.argv[3:] or ["describe the picture .", "how many objects are there ?"]

processor = AutoProcessor.from_pretrained(name)
model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
messages = []

with vlmfast.accelerate(model, reuse="1GiB") as fast:
    for turn, question in enumerate(questions):
        text = {"type": "text", "text": question}
        messages.append({"role": "user", "content": [text] if turn else [{"type": "image", "image": picture}, text]})
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        print(f"\n> {question}")
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False, streamer=streamer)
        said = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
        print(f"  [first token after {fast.report.prefill['ttft_ms']:.0f} ms] {' '.join(fast.report.notes)}")

"""Ask one question of one picture: the usual transformers program, and the one line that makes it faster."""
# python examples/question.py [MODEL] [PICTURE] [QUESTION]; without arguments the pocket model and a drawn picture

import sys

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmfast
from vlmfast.pocket import path, world

name = sys.argv[1] if len(sys.argv) > 1 else path()  # for example Qwen/Qwen2.5-VL-3B-Instruct
drawn = world.sample("location", seed=1, split="test", size=256, objects=(3, 3))
picture = Image.open(sys.argv[2]) if len(sys.argv) > 2 else Image.fromarray(drawn.frames[0].numpy())
question = sys.argv[3] if len(sys.argv) > 3 else drawn.question

processor = AutoProcessor.from_pretrained(name)
model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
fast = vlmfast.accelerate(model, prune="vidcom2:keep=0.5,after_block=auto")  # the line that is new

content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
).to(model.device)  # fmt: skip
output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
(answer,) = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

print(f"{question}\n{answer}\n\n{fast.report}")

"""Choose a method: the same question under several plans, with what each kept, took and answered."""
# python examples/compare_plans.py [MODEL] [PICTURE] [QUESTION]; for a thorough answer: vlmfast check, vlmfast tune

import sys

from vlmfast import Plan, accelerate
from vlmfast.decode import PromptLookup, Speculate
from vlmfast.encode import Downsample, Uniform, VidCom2
from vlmfast.loading import load
from vlmfast.pocket import world
from vlmfast.prefill import SnapKV
from vlmfast.video import read_image

drawn = world.sample("shape", seed=4, split="test", size=256, objects=(2, 3))
picture = read_image(sys.argv[2]) if len(sys.argv) > 2 else drawn.frames[0].numpy()
question = sys.argv[3] if len(sys.argv) > 3 else drawn.question

plans = {
    "plain": Plan(),
    "half the tokens, VidCom2": Plan(prune=VidCom2(keep=0.5)),
    "a quarter, inside the tower": Plan(prune=VidCom2(keep=0.25, after_block="auto")),
    "a quarter, evenly": Plan(prune=Uniform(keep=0.25)),
    "a quarter of the pixels": Plan(prune=Downsample(keep=0.25)),
    "half the cache, SnapKV": Plan(kv=SnapKV(keep=0.5)),
    "words looked up in the prompt": Plan(speculate=Speculate(PromptLookup())),
}
loaded = load(sys.argv[1] if len(sys.argv) > 1 else "pocket")
inputs = loaded.inputs(question, [picture])
loaded.model.generate(**inputs, max_new_tokens=2, do_sample=False)  # the first call of anything is slow

print(f"{question}\n\n{'plan':<30} tokens  first token   KV cache  answer")
for name, plan in plans.items():
    with accelerate(loaded.model, plan) as fast:
        output = loaded.model.generate(**inputs, max_new_tokens=32, do_sample=False)
        encode, prefill = fast.report.encode, fast.report.prefill
    print(
        f"{name:<30} {encode['kept_tokens']:>6} {prefill['ttft_ms']:>9.1f} ms {prefill['kv_fast_bytes'] / 1e6:>7.2f} MB"
        f"  {loaded.decode(output, inputs)}"
    )

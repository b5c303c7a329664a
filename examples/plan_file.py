"""Keep a plan in a file: made and checked here, or by `vlmfast tune`, and used by a program or a command later."""
# python examples/plan_file.py [MODEL] [PLAN.json]; without a file one is written to plan.json first

import sys
from pathlib import Path

from vlmfast import Plan, UserError, accelerate
from vlmfast.encode import VidCom2
from vlmfast.loading import load
from vlmfast.pocket import world
from vlmfast.prefill import SnapKV

file = Path(sys.argv[2] if len(sys.argv) > 2 else "plan.json")
if len(sys.argv) < 3:
    Plan(prune=VidCom2(keep=0.5, after_block="auto"), kv=SnapKV(keep=0.5)).save(file)

plan = Plan.load(file)
print(f"{file}: {plan}\n{file.read_text()}")
try:
    Plan.from_json({"prune": {"method": "vidcom2", "keeep": 0.5}})
except UserError as error:
    print(f"a mistake is refused in one line:\n  {error}\n")

loaded = load(sys.argv[1] if len(sys.argv) > 1 else "pocket")
drawn = world.sample("count", seed=6, split="test", size=256, objects=(3, 3))
inputs = loaded.inputs(drawn.question, [drawn.frames[0].numpy()])
with accelerate(loaded.model, file) as fast:  # or: vlmfast ask "..." --image cat.jpg --plan plan.json
    output = loaded.model.generate(**inputs, max_new_tokens=16, do_sample=False)
    print(f"{drawn.question}\n  {loaded.decode(output, inputs)}\n\n{fast.report}")

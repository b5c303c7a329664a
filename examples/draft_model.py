"""Speculate: a small model guesses several tokens, the large one checks them at once; the answer stays the same."""
# python examples/draft_model.py [MODEL DRAFT] [PICTURE]; without arguments the pocket model and its draft

import sys

from vlmfast import accelerate
from vlmfast.decode import Lossless, ModelDraft, Speculate
from vlmfast.loading import load
from vlmfast.pocket import world
from vlmfast.video import read_image

names = sys.argv[1:3] if len(sys.argv) > 2 else ["pocket", "pocket-draft"]  # the same tokenizer in both
target, draft = load(names[0]), load(names[1])
drawn = world.sample("caption", seed=5, split="test", objects=(4, 4)).frames[0].numpy()
picture = read_image(sys.argv[3]) if len(sys.argv) > 3 else drawn
inputs = target.inputs("describe the picture .", [picture])

answers = []
for speculate in (None, Speculate(ModelDraft(draft.model, prune="uniform:keep=0.5"), accept=Lossless())):
    with accelerate(target.model, speculate=speculate) as fast:
        for _ in range(2):  # the first call of anything is slow
            output = target.model.generate(**inputs, max_new_tokens=96, do_sample=False)
        answers.append(target.decode(output, inputs))
        print(f"{'with a draft' if speculate else 'plain'}:\n  {answers[-1]}\n  {str(fast.report).splitlines()[-1]}")
print(f"the same answer: {answers[0] == answers[1]}")

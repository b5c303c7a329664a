"""FLy: a mismatch passes where the target is unsure and the tokens after it match again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmfast.decode.accept import EXACT, LOOSE, REFUSED, Exact, Round, Rule, Verdict, guarded, leading
from vlmfast.decode.criteria import normalised_entropy
from vlmfast.fields import NonNegativeInt, Share


@dataclass(frozen=True)
class FLy(Rule):
    """FLy (arXiv 2511.22972): a mismatch passes where the target is unsure and the tokens after it match again. Lossy.

    Entropy gate: the target's normalised entropy there is at least `theta`. Deferred window: the next `window` drafted
    tokens all match, and lie within the draft. eos: never loosen the end of the answer.
    """

    theta: Share = 0.3
    window: NonNegativeInt = 6
    eos: bool = True
    name: ClassVar[str] = "fly"

    def judge(self, verified: Round) -> Verdict:
        num_drafted = verified.draft.shape[0]
        if num_drafted == 0:
            return Exact().judge(verified)
        target_picks = verified.picks()
        matching = verified.draft == target_picks[:-1]
        if bool(matching.all()):
            return leading([EXACT] * num_drafted, verified)
        unsure = (normalised_entropy(verified.scores()) >= self.theta).cpu() & guarded(verified, target_picks)
        matches = matching.tolist()
        codes = [EXACT if is_match else REFUSED for is_match in matches]
        for position, is_unsure in enumerate(unsure.tolist()):
            following = matches[position + 1 : position + 1 + self.window]
            if not matches[position] and is_unsure and position + self.window < num_drafted and all(following):
                codes[position] = LOOSE
        return leading(codes, verified)

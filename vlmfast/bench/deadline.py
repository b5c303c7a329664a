"""The time that a search may take, and what somebody who waits is told of it."""

from __future__ import annotations

from collections.abc import Callable

SAY = 15.0  # seconds between two lines about progress


class Watch:
    """Looks at the clock before every answer, and says now and then how far the round has come."""

    def __init__(self, deadline: float, clock: Callable[[], float], say: Callable[[str], None]) -> None:
        self.deadline, self.clock, self.say = deadline, clock, say
        self.said, self.asked, self.total = clock(), 0, 0

    def expect(self, answers: int) -> None:
        """A round of so many answers begins."""
        self.asked, self.total = 0, answers

    def over(self) -> bool:
        """Is the time over? Called before every answer."""
        now = self.clock()
        if now >= self.deadline:
            return True
        if now - self.said >= SAY:
            self.said = now
            self.say(f"{self.asked} answers of {self.total} in this round, {(self.deadline - now) / 60:.1f} min left")
        self.asked += 1
        return False

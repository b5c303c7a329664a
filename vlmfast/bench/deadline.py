"""A search's time limit, and progress lines for the user while it runs."""

from __future__ import annotations

from collections.abc import Callable

SAY = 15.0  # seconds between two lines about progress


class Watch:
    """Checks the time before every answer, and reports the round's progress every `SAY` seconds."""

    def __init__(self, deadline: float, clock: Callable[[], float], say: Callable[[str], None]) -> None:
        self.deadline, self.clock, self.say = deadline, clock, say
        self.last_line, self.asked, self.total = clock(), 0, 0

    def expect(self, answers: int) -> None:
        """A round of so many answers begins."""
        self.asked, self.total = 0, answers

    def over(self) -> bool:
        """Is the time over? Called before every answer."""
        moment = self.clock()
        if moment >= self.deadline:
            return True
        if moment - self.last_line >= SAY:
            self.last_line = moment
            self.say(
                f"{self.asked} answers of {self.total} in this round, {(self.deadline - moment) / 60:.1f} min left"
            )
        self.asked += 1
        return False

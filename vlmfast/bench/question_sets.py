"""Three sets of questions that share nothing: one to tune settings on, one to choose plans on, one that is reported.

Numbers of pocket samples, clips and easy-VQA pictures. A task takes its questions from one set; who asks says which:
`vlmfast calibrate` tunes, `vlmfast tune` chooses, everything in `evals/` reports. A user's own questions are not split.
"""

from __future__ import annotations

from typing import Literal

QuestionSet = Literal["tuning", "choosing", "reporting"]

POCKET: dict[str, range] = {"tuning": range(1200), "choosing": range(1200, 2000), "reporting": range(2000, 3000)}
# clips and pictures about which several questions are asked one after the other
CHATS: dict[str, range] = {"tuning": range(400), "choosing": range(400, 500), "reporting": range(500, 900)}
PICTURES: dict[str, range] = {"tuning": range(300), "choosing": range(300, 500), "reporting": range(500, 1000)}
STREAMS: dict[str, range] = {"tuning": range(1, 50), "choosing": range(50, 100), "reporting": range(1000, 1040)}
ALL = {"pocket": POCKET, "chats": CHATS, "pictures": PICTURES, "streams": STREAMS}

"""What a conversation yields while it reads and writes: plain types, and `Token`s.

Every event is a dict with a `type`:

    reading  `read` of `of` tokens of the user's text have been read
    tokens   `tokens`: the new ones, a list of `Token`
    rest     `text`: the end of the newest token's text, held back until the character was whole
    notice   `text` for the user; `isWarning`: whether it is a warning
    written  the answer is done: `count` tokens in `seconds`
    back     every token from `position` on is removed

To the page talk/server.py sends also `begin`, `failed` and `end`.
"""

from dataclasses import dataclass

from engine.pulls import Pulls

LONGEST_TEXT = 1000  # characters of one token on the page; any file may bring its own vocabulary


@dataclass(frozen=True)
class Token:
    """One token as users see it. `position` counts from the start of the conversation."""

    position: int
    id: int
    turn: int
    author: str  # you, or model
    label: str  # printable, with marks for spaces and line ends
    text: str  # what it adds to the text; empty within a character
    mass: float | None  # None: the model has no masses
    pulls: Pulls | None

    def to_json(self):
        """Plain types; of the pulls and of `quiet` the mean over all heads."""
        text = self.text
        return {
            "position": self.position,
            "turn": self.turn,
            "author": self.author,
            "label": self.label,
            "text": text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…",
            "mass": self.mass,
            "pulls": self._row(-1),
            "quiet": (self.quiet_rows() or [None])[-1],
        }

    def pull_rows(self):
        """For every row of `Pulls` a list of [position, weight] of its sources, strongest first."""
        return [self._row(n) for n in range(0 if self.pulls is None else len(self.pulls.weights))]

    def quiet_rows(self):
        """For every row of `Pulls` the background's share; None without a background or pulls."""
        if self.pulls is None or self.pulls.quiet is None:
            return None
        return [round(quiet, 5) for quiet in self.pulls.quiet.tolist()]

    def _row(self, n):
        if self.pulls is None:
            return []
        pairs = zip(self.pulls.sources[n].tolist(), self.pulls.weights[n].tolist(), strict=True)
        # digits that count, not places: all shares of a quiet head are small
        return [[source, float(f"{weight:.5g}")] for source, weight in pairs if weight > 0]


def notice(text, is_warning=True):
    """A `notice` event."""
    return {"type": "notice", "text": text, "isWarning": is_warning}

"""What a conversation yields while it reads and writes, in plain types but for `Token`.

Every event is a dict with a `type`:

    reading  `read` of `of` tokens of the user's text are read
    tokens   `tokens`: new ones, a list of `Token`
    rest     `text`: the end of the newest token's text, held back until now
    notice   `text` for the user; `isWarning` if something is lost
    written  the answer is done: `count` tokens in `seconds`
    back     every token from `position` on is taken back
"""

from dataclasses import dataclass

from engine.pulls import Pulls

LONGEST_TEXT = 1000  # characters of one token on the page; any file may bring its own vocabulary


@dataclass(frozen=True)
class Token:
    """One token as users see it. `position` counts from the start of the conversation."""

    position: int
    turn: int
    author: str  # you, or model
    label: str
    text: str
    mass: float | None
    pulls: Pulls | None

    def to_json(self):
        """Plain types; of the pulls the mean over all heads."""
        text = self.text
        return {
            "position": self.position,
            "turn": self.turn,
            "author": self.author,
            "label": self.label,
            "text": text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…",
            "mass": self.mass,
            "pulls": self._row(-1),
        }

    def pull_rows(self):
        """[position, weight] of the sources in every row of `Pulls`, strongest first."""
        return [self._row(n) for n in range(0 if self.pulls is None else len(self.pulls.weights))]

    def _row(self, n):
        if self.pulls is None:
            return []
        pairs = zip(self.pulls.sources[n].tolist(), self.pulls.weights[n].tolist(), strict=True)
        return [[source, round(weight, 5)] for source, weight in pairs if weight > 0]


def notice(text, is_warning=True):
    return {"type": "notice", "text": text, "isWarning": is_warning}

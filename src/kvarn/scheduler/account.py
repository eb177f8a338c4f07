"""`Account`: what guessing has saved and cost so far, against steps without it, and what may still be risked."""

from __future__ import annotations

ALLOWANCE = 0.015
"""Of the time of steps, what guesses that turn out not to pay may take."""
AT_FIRST, SAVED, UNSPENT = 6.0, 8.0, 100.0
"""Steps' worth that are there at the beginning, that may come of what was saved, and of what was not risked: a text
that is read to be guessed costs as much as many steps."""
MOST_OWED = 200.0
"""Steps' worth. Where times are misjudged for a while, it is not paid for long after."""
LENT = 16.0
"""Steps' worth that may be owed for what is believed to pay."""


class Account:
    """Time in seconds that may be lost. It grows by a share of all steps and by what guesses save, and shrinks by what
    they lose; below 0 nothing is to be risked. So whatever guesses are like, and however they change, steps with them
    take no more than 1 + `ALLOWANCE` times as long as without, and a few steps' time.

    What was saved long ago pays for little, so that this holds for each kind of text, not only for all together.
    """

    def __init__(self, share: float = 1.0) -> None:
        """share: of what there is to risk, where there are several accounts."""
        self.seconds = 0.0
        self._share = share
        self._step = 0.0
        """Seconds of a step without guesses, about."""

    def bears(self, seconds: float, count: int) -> bool:
        """Whether so much may be spent for one of `count` sequences on what is believed to bring more."""
        return seconds < self.seconds + LENT * self._step / count

    def stepped(self, seconds: float, plain: float) -> None:
        """A step took so long; one without guesses takes `plain`."""
        if not self._step:
            self.seconds += self._share * AT_FIRST * plain
        self._step = plain
        self.seconds = max(self.seconds, min(self.seconds + self._share * ALLOWANCE * seconds, UNSPENT * plain))

    def saved(self, seconds: float) -> None:
        """Guessing has saved so much, or lost it where that is below 0."""
        if seconds < 0:
            self.seconds = max(self.seconds + seconds, -MOST_OWED * self._step)
        else:
            self.seconds = max(self.seconds, min(self.seconds + seconds, self._share * SAVED * self._step))

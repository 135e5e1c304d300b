"""How many requests may be under way, found by trying; and when to stop trying altogether.

Additive increase, multiplicative decrease. A provider tells its limit only by refusing (429), so
the level climbs by one with each clean answer until the first refusal, as TCP's slow start does.
From then on it knows about where the limit is: it returns there at once, and goes beyond it by
one at first, further with each step that is granted, more seldom with each that is refused.
A busy provider also refuses at random: a refusal where most others were granted just before takes
one off the level, and says nothing about where the limit is.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

CUT = 0.8
SATURATED = 0.8  # an answer says something about the level only when about so much was in use
STEP = 0.25  # most by which the level goes at once beyond what is known to be granted
MOST_ROUNDS = 64
LONGEST_HOLD = 60.0
REMEMBERED = 64  # answers and refusals by which a refusal at random is known
FEW = 8
RANDOM = 0.25  # at a real limit more of the requests are refused


@dataclass(frozen=True)
class Ticket:
    """One request under way."""

    cut: int  # the number of cuts before it was sent
    full: int  # how often the level was in use before
    used: int = 0  # how many were under way with it


class Limiter:
    """Allow `level` requests at a time, from `start` up to `ceiling`; times are in seconds.

    After a cut the level does not grow for `cool_down` seconds, or as long as the server asks.
    """

    def __init__(self, ceiling: int, start: int = 8, cool_down: float = 1.0) -> None:
        self.ceiling, self.cool_down = ceiling, cool_down
        self.level = min(start, ceiling)
        self.under_way = 0
        self.refused_at: int | None = None  # so many were granted when one more was not
        self._cuts = 0
        self._full = 0
        self._in_vain = 0  # cuts in a row, each of which was refused again
        self._clean = 0
        self._rounds = 4  # of `level` clean answers, before the next step
        self._step = 1
        self._recovered = False  # whether the level came back to `refused_at` since the cut
        self._debt = 0  # answers that do not count, for requests that failed otherwise
        self._frozen_until = 0.0
        self._held_until = 0.0
        self._lately: deque[tuple[int, bool]] = deque(maxlen=REMEMBERED)  # used, granted

    def wait(self, now: float) -> float | None:
        """Return None when one more may be sent, else in how many seconds to look again."""
        if now < self._held_until:
            return self._held_until - now
        return None if self.under_way < self.level else math.inf

    def send(self) -> Ticket:
        """Count a request as under way."""
        self.under_way += 1
        ticket = Ticket(self._cuts, self._full, self.under_way)
        if self.under_way >= SATURATED * self.level:
            self._full += 1
        return ticket

    def answered(self, ticket: Ticket, now: float) -> None:
        """Count an answer; grow when it was clean and the level was in use."""
        self.under_way -= 1
        self._lately.append((ticket.used, True))
        if ticket.cut == self._cuts:
            self._in_vain = 0
        if self._debt > 0:
            self._debt -= 1
        elif (
            self._full > ticket.full  # the level was in use at some time meanwhile
            and ticket.cut == self._cuts
            and now >= self._frozen_until
        ):
            self._grow()

    def failed(self) -> None:
        """Count a failure that is not the level's fault: growth pauses, nothing is cut."""
        self.under_way -= 1
        self._debt = min(self._debt + 1, self.level)
        self._clean = 0

    def refused(self, ticket: Ticket, now: float, asked: float | None) -> None:
        """Count a 429; cut once for all that were sent before the cut.

        `asked` is the server's Retry-After. When the lower level is refused too, it is not the
        number of requests that is too high but their rate: then all of them wait.
        """
        # With much of the level unused it is not known how many would have been granted.
        used = self.under_way if self.under_way >= SATURATED * self.level else self.level
        self.under_way -= 1
        granted = max(1, used - 1)
        self._lately.append((ticket.used, False))
        if ticket.cut < self._cuts:  # of the same burst as the one that was answered by a cut
            if self.refused_at is not None:
                self.refused_at = min(self.refused_at, max(granted, self.level))
            return
        if self._at_random(ticket.used):
            self.refused_at = max(granted, self.refused_at or self.level)
            self._set(max(1, self.level - 1))
            self._frozen_until = max(self._frozen_until, now + (asked or 0.0))
            return
        if self.refused_at is None:
            self.refused_at = granted
        elif granted >= self.refused_at:  # that was a step beyond: the next one can wait longer
            self._rounds = min(2 * self._rounds, MOST_ROUNDS)
        elif granted >= CUT * self.refused_at:  # about there: others under way blur the count
            self.refused_at = granted
        elif not self._recovered:  # twice far below: the limit moved; once may be by chance
            self.refused_at = max(granted, math.floor(CUT * self.refused_at))
        self._recovered = False
        self._step = 1
        self._cuts += 1
        self._in_vain += 1
        self._clean = 0
        self._set(max(1, math.floor(CUT * min(self.level, used))))
        self._frozen_until = now + max(self.cool_down, asked or 0.0)
        if self._in_vain > 1:
            pause = self.cool_down * 2 ** min(self._in_vain - 2, 10) if asked is None else asked
            self._held_until = now + (min(LONGEST_HOLD, pause) if asked is None else pause)

    def _at_random(self, used: int) -> bool:
        """True when most of those that had as many beside them were granted lately."""
        alike = [granted for others, granted in self._lately if others >= used]
        return len(alike) >= FEW and alike.count(False) < RANDOM * len(alike)

    def _grow(self) -> None:
        if self.refused_at is None or self.level < self.refused_at:
            self._set(self.level + 1)
            self._recovered = self.level == self.refused_at
            return
        self._clean += 1
        if self._clean >= self._rounds * self.level:
            self._clean = 0
            if self.level > self.refused_at:  # the last step was granted all along
                self.refused_at = self.level
                self._rounds = max(1, self._rounds // 2)
                self._step = min(2 * self._step, max(1, math.floor(STEP * self.level)))
            self._set(self.level + self._step)

    def _set(self, level: int) -> None:
        self.level = min(level, self.ceiling)


class Breaker:
    """Stop sending while everything fails; let one request at a time find out how it is.

    After `patience` seconds of that the server counts as gone.
    """

    def __init__(self, threshold: int, first_pause: float, patience: float) -> None:
        self.threshold, self.first_pause, self.patience = threshold, first_pause, patience
        self.in_a_row = 0
        self.probes = 0
        self.open_since: float | None = None
        self._next = 0.0

    def wait(self, now: float, under_way: int) -> float | None:
        """Return None when one more may be sent, else in how many seconds to look again."""
        if self.open_since is None:
            return None
        if under_way:
            return math.inf
        return None if now >= self._next else self._next - now

    def answered(self) -> None:
        """Close: the server is there."""
        self.in_a_row = self.probes = 0
        self.open_since = None

    def failed(self, now: float) -> None:
        """Count a failure; open after `threshold` in a row, and pause longer after each probe."""
        self.in_a_row += 1
        if self.in_a_row < self.threshold:
            return
        if self.open_since is None:
            self.open_since = now
        elif now >= self._next:
            self.probes += 1
        self._next = now + min(LONGEST_HOLD, self.first_pause * 2**self.probes)

    def hopeless(self, now: float) -> bool:
        """True when the server has been gone for longer than one is willing to wait."""
        since = self.open_since
        return since is not None and self.probes > 0 and now - since >= self.patience

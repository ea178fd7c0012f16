"""Into how many lanes a device is divided, chosen from what was measured and what is asked. Pure: the clock is passed in.

What a run of each model takes was measured by itself and beside others (``sidecar.sweeps``). Of what is asked two things count:
which models, and how many requests are under way at the same time. A device of ``n`` lanes then answers

    min(under way, n) / seconds that a run takes beside n - 1 others, in the mean over the requests

of them in a second, where requests that may be one batch are under way as one: a batch in one lane answers them as well. One that
is under way by itself is run as if there was one lane (``sidecar.runs``), so that the number is about the others only.

A change waits for what is under way, so it must not come often: only where another number promises at least a tenth more, which
is far beyond what measurements vary by, and not within ten minutes of the last one. Owned by the engine thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

# How much more another number of lanes must promise.
GAIN: Final = 1.1
LOOK_EVERY_S: Final = 60.0
CHANGE_EVERY_S: Final = 600.0
# Requests that say enough of what is asked.
ENOUGH: Final = 50


class LaneChoice:
    """The number of lanes, and why. ``count`` is what a device begins with."""

    def __init__(self, count: int, now_s: float) -> None:
        self.count = count
        self._look_at_s = now_s
        # The first change need not wait.
        self._change_at_s = now_s
        self._costs: dict[str, Mapping[int, float]] = {}
        self._asked: Counter[str] = Counter()
        # How often so many requests were under way.
        self._under_way: Counter[int] = Counter()

    def learn(self, model: str, seconds: Mapping[int, float]) -> None:
        """Note what a run of a model takes, by the number of lanes that run at the same time; empty where nobody knows."""
        if seconds:
            self._costs[model] = seconds
        else:
            self._costs.pop(model, None)

    def answered(self, model: str, under_way: int) -> None:
        """Note a request for a model, and how much was under way with it."""
        self._asked[model] += 1
        self._under_way[max(1, under_way)] += 1

    def rates(self) -> dict[int, float]:
        """Return the requests per second that each number of lanes promises for what is asked; empty where that is not known."""
        known = {model: count for model, count in self._asked.items() if model in self._costs}
        requests = sum(known.values())
        if not requests or 2 * requests < self._asked.total() or not self._under_way:
            return {}
        counts = frozenset[int].intersection(*(frozenset(self._costs[model]) for model in known))
        rates = {
            count: requests / sum(asked * self._costs[model][count] for model, asked in known.items()) for count in sorted(counts)
        }
        return {count: self._in_the_mean(count, rates) for count in rates}

    def _in_the_mean(self, count: int, rates: Mapping[int, float]) -> float:
        """Return the requests per second that so many lanes answer, from the rate of one of them by the number of lanes."""
        answered = {under_way: min(under_way, count) * rates[count] for under_way in self._under_way} | {1: rates.get(1, 0.0)}
        return sum(often * answered[under_way] for under_way, often in self._under_way.items()) / self._under_way.total()

    def look(self, now_s: float) -> int:
        """Return how many lanes there should be. Looks once a minute; otherwise it costs nothing to ask."""
        if now_s < self._look_at_s or self._asked.total() < ENOUGH:
            return self.count
        self._look_at_s = now_s + LOOK_EVERY_S
        rates = self.rates()
        # What is asked now counts more than what was asked before.
        self._asked = Counter({model: count // 2 for model, count in self._asked.items() if count > 1})
        self._under_way = Counter({under_way: often // 2 for under_way, often in self._under_way.items() if often > 1})
        if rates and now_s >= self._change_at_s:
            best = max(rates, key=lambda count: rates[count])
            if rates[best] >= GAIN * rates.get(self.count, 0.0):
                self.count = best
                self._change_at_s = now_s + CHANGE_EVERY_S
        return self.count

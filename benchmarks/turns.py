"""Engines that take turns on a machine whose memory wanders: rounds of turns, and what is concluded from them.

A turn is a whole prompt, or a few decoded tokens of which the first, with cold caches and sleeping threads, does not
count. Beside every decode turn stand readings of the memory bandwidth, one on each side. What is said of an engine
are medians over its turns: of its share of the larger of the two readings, and of *paired* ratios, its turn against
those of the first engine next to it in time. The first engine's own ratios, each of its turns against its neighbouring
ones, show how far the machine alone makes two turns differ. Needs nothing beyond Python.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol


@dataclass(frozen=True)
class Turn:
    """A turn as it was measured.

    round: which; way: the engine's setting in it, of those it has; when: its middle, in seconds of any clock; times: of
    the prompt, or of every token; gbps: the larger of the readings of bandwidth on both sides, 0 beside a prompt;
    wall_s, foreign_s: how long it took, and CPU time of other processes meanwhile.
    """

    round: int
    way: str
    when: float
    times: Sequence[float]
    gbps: float = 0.0
    wall_s: float = 1.0
    foreign_s: float = 0.0

    @property
    def steps(self) -> Sequence[float]:
        """The times that count: all but the first, where there are several."""
        return self.times[1:] or self.times

    @property
    def seconds(self) -> float:
        """Median of the times that count."""
        return statistics.median(self.steps)


class Player(Protocol):
    """An engine in a round. ways: how many it has; they take its turns alternately."""

    ways: int
    prompts: list[Turn]
    decodes: list[Turn]

    def prompt(self, round_: int) -> list[Turn]:
        """Take the prompt, once in each way."""

    def decode(self, round_: int, tokens: int) -> Turn:
        """Decode some tokens."""

    def end(self) -> None:
        """Forget the sequence."""


def sizes(steps: int, turn: int) -> list[int]:
    """How many of ``steps`` tokens each turn decodes: about ``turn``, and never fewer unless there are fewer."""
    count = max(1, steps // turn)
    return [(i + 1) * steps // count - i * steps // count for i in range(count)]


def play(
    players: Sequence[Player],
    round_: int,
    tokens: Sequence[int],
    read_gbps: Callable[[], float],
    attempt: Callable[[Any, Callable[[], None]], bool],
) -> None:
    """A round: all prompts, then decode in turns of ``tokens``, one player and way after the other.

    attempt(player, what): call what(); whether the player stays.
    """
    playing = [p for p in players if attempt(p, lambda: p.prompts.extend(p.prompt(round_)))]  # noqa: B023
    before = read_gbps() if playing else 0.0

    def decode(player: Player, count: int) -> None:
        nonlocal before
        turn = player.decode(round_, count)
        after = read_gbps()
        player.decodes.append(replace(turn, gbps=max(before, after)))
        before = after

    def all_ways(player: Player, count: int) -> None:
        for _ in range(player.ways):
            decode(player, count)

    for count in tokens:
        playing = [player for player in playing if attempt(player, lambda: all_ways(player, count))]  # noqa: B023
    for player in playing:
        attempt(player, player.end)


# ---- what turns say -------------------------------------------------------------------------------------------------


def best_way(found: Sequence[Turn]) -> list[Turn]:
    """The turns of the faster way: by the median of the time, or of time x bandwidth where that was read."""
    ways: dict[str, list[Turn]] = {}
    for turn in found:
        ways.setdefault(turn.way, []).append(turn)
    return min(ways.values(), key=lambda turns: statistics.median(t.seconds * (t.gbps or 1.0) for t in turns))


def paired(mine: Sequence[Turn], theirs: Sequence[Turn]) -> list[float]:
    """How often as fast each turn of ``mine`` is as ``theirs``: their time at its moment over its own.

    Their time is interpolated between their turns before and after (the mean of both where they are equally far); at an
    end it is the nearest one's. A turn is not paired with itself.
    """
    ratios = []
    for turn in mine:
        near = [t for t in theirs if t.when < turn.when][-1:] + [t for t in theirs if t.when > turn.when][:1]
        if near:
            first, last = near[0], near[-1]
            share = (turn.when - first.when) / (last.when - first.when) if len(near) == 2 else 0.0
            ratios.append((first.seconds + share * (last.seconds - first.seconds)) / turn.seconds)
    return ratios


def quartiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """{name: median, name_q1, name_q3}; none of them without values."""
    found: Sequence[float | None] = [None] * 3
    if values:
        found = statistics.quantiles(values if len(values) > 1 else [*values, *values], method="inclusive")
    low, middle, high = found
    return {name: middle, f"{name}_q1": low, f"{name}_q3": high}


def foreign_cores(found: Sequence[Turn]) -> float:
    """Cores that other processes used during the turns of the worst round."""
    rounds: dict[int, list[Turn]] = {}
    for turn in found:
        rounds.setdefault(turn.round, []).append(turn)
    return max(max(0.0, sum(t.foreign_s for t in r)) / sum(t.wall_s for t in r) for r in rounds.values())


def conclude(
    decodes: Sequence[Turn], prompts: Sequence[Turn], first: tuple[Sequence[Turn], Sequence[Turn]], weight_bytes: int
) -> dict[str, Any]:
    """The part of a row that follows from turns in one way each; first: (decodes, prompts) of the first engine."""
    step = statistics.median(step for turn in decodes for step in turn.steps)
    ratios = {"tg_ratio": paired(decodes, first[0]), "pp_ratio": paired(prompts, first[1])}
    row = {
        "ttft_s": statistics.median(turn.seconds for turn in prompts),
        "ms_per_token": 1000 * step,
        "gbps": weight_bytes / step / 1e9,
        "pct_bw": 100 * statistics.median(weight_bytes / turn.seconds / 1e9 / turn.gbps for turn in decodes),
        "turns": len(decodes),
    }
    for name, values in ratios.items():
        row |= quartiles(name, values)
    return row

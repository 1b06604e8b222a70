"""Give bits to units where the divergence falls most for each byte."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlxkv.checkpoint.quantization import Format


@dataclass(frozen=True, slots=True)
class Choice:
    """One format that a unit could have.

    Attributes:
        format: the format.
        n_bytes: of the unit in it.
        kl: what it adds to the model's divergence, in nats.
    """

    format: Format
    n_bytes: int
    kl: float


def allocate(
    choices: Mapping[str, Sequence[Choice]], budget_bytes: int
) -> dict[str, Choice] | None:
    """The choice of each unit that makes the sum of divergences small within a budget.

    All begin with the fewest bytes. Then the step up that saves most for each byte is taken, until
    none fits; steps are those along the lower convex hull of a unit's choices, so that no step
    hides a better one behind it.

    Returns:
        None if the fewest bytes are more than the budget.
    """
    hulls = {unit: hull(each) for unit, each in choices.items()}
    at = dict.fromkeys(hulls, 0)
    left = budget_bytes - sum(steps[0].n_bytes for steps in hulls.values())
    if left < 0:
        return None
    heap = [(-gain(steps, 0), unit) for unit, steps in hulls.items() if len(steps) > 1]
    heapq.heapify(heap)
    while heap:
        _, unit = heapq.heappop(heap)
        steps, i = hulls[unit], at[unit]
        more = steps[i + 1].n_bytes - steps[i].n_bytes
        if more > left:
            continue  # a smaller one of another unit may still fit
        left -= more
        at[unit] = i + 1
        if i + 2 < len(steps):
            heapq.heappush(heap, (-gain(steps, i + 1), unit))
    return {unit: steps[at[unit]] for unit, steps in hulls.items()}


def gain(steps: Sequence[Choice], i: int) -> float:
    """What the step behind the i-th choice saves for each byte."""
    return (steps[i].kl - steps[i + 1].kl) / (steps[i + 1].n_bytes - steps[i].n_bytes)


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull, from the fewest bytes on: divergence falls, and ever more slowly."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda each: (each.n_bytes, each.kl)):
        if kept and choice.kl >= kept[-1].kl:
            continue
        if kept and choice.n_bytes == kept[-1].n_bytes:
            kept.pop()
        while len(kept) > 1 and gain([kept[-2], choice], 0) >= gain(kept[-2:], 0):
            kept.pop()
        kept.append(choice)
    return kept

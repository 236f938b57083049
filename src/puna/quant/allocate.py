"""Which layer gets how many bits, when the average is given: least damage in all for the bits there are.

A knapsack with one choice per layer. Layer by layer it keeps every sum of bits for which no other costs less and
damages less; that is exact. Where such sums become too many (hundreds of layers), those within a small step of bits are
thinned to the best one: the budget still holds, the damage is at most what the budget less all steps would have given.
Source: multiple-choice knapsack by dominance, Kellerer, Pferschy, Pisinger 2004, Knapsack Problems, chapter 11.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from puna.base.console import PunaError

_STATES = 1 << 14


def allocate(
    damage: Mapping[str, Mapping[str, float]],
    bits: Mapping[str, Mapping[str, float]],
    weights: Mapping[str, int],
    target: float,
) -> dict[str, str]:
    """The format of every layer: least total damage with at most `target` bits per weight on average.

    damage[layer][format]: any additive measure, smaller is better. bits[layer][format]: per weight, scales included.
    weights[layer]: how many. Errors: `PunaError` if even the cheapest formats take more than target.
    """
    total = sum(weights[layer] for layer in damage)
    cheapest = sum(weights[layer] * min(bits[layer][name] for name in damage[layer]) for layer in damage)
    if cheapest > target * total * (1 + 1e-9):
        raise PunaError(
            f"an average of {target:g} bits per weight is below the {cheapest / total:.3f} of the smallest formats",
            f"ask for at least {np.ceil(100 * cheapest / total) / 100:g} bits, or allow formats of fewer bits",
        )
    return _cheapest_path(damage, bits, weights, target * total * (1 + 1e-9))


def _cheapest_path(
    damage: Mapping[str, Mapping[str, float]],
    bits: Mapping[str, Mapping[str, float]],
    weights: Mapping[str, int],
    budget: float,
) -> dict[str, str]:
    cost, harm = np.zeros(1), np.zeros(1)
    steps = []
    rest = budget - sum(weights[layer] * min(bits[layer][name] for name in damage[layer]) for layer in damage)
    for layer, choices in damage.items():
        names = list(choices)
        each = np.array([weights[layer] * bits[layer][name] for name in names])
        each -= each.min()  # above the cheapest, which the budget is known to hold
        cost, harm, before, choice = _extend(cost, harm, each, np.array([choices[name] for name in names]), rest)
        steps.append((layer, names, before, choice))
    state = int(harm.argmin())
    found = {}
    for layer, names, before, choice in reversed(steps):
        found[layer], state = names[choice[state]], int(before[state])
    return {layer: found[layer] for layer in damage}


def _extend(
    cost: np.ndarray, harm: np.ndarray, each_cost: np.ndarray, each_harm: np.ndarray, rest: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One layer more: the sums worth keeping, by cost, and for each the sum and the choice it comes from."""
    costs = (cost[:, None] + each_cost).ravel()
    harms = (harm[:, None] + each_harm).ravel()
    order = np.lexsort((harms, costs))
    order = order[costs[order] <= rest]
    best_before = np.minimum.accumulate(np.concatenate([[np.inf], harms[order][:-1]]))
    order = order[harms[order] < best_before]
    if len(order) > _STATES:
        order = _thinned(order, costs[order], rest)
    before, choice = np.divmod(order, len(each_cost))
    return costs[order], harms[order], before, choice


def _thinned(order: np.ndarray, costs: np.ndarray, rest: float) -> np.ndarray:
    """Of the sums within one step of bits the last, whose damage is least."""
    step = np.floor(costs / rest * (_STATES - 1))
    return order[np.append(step[1:] != step[:-1], True)]

"""The one allocator: pick one option per part so that the harm is least and every limit holds.

Bits per layer, width per block, rank, experts, layers to train: all are this multiple-choice knapsack. It is solved
exactly by HiGHS (through `scipy.optimize.milp`), which handles several limits at once and proves infeasibility; our
own Lagrangian search would only approximate it. Options that another one beats in harm and in every cost are dropped first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array


@dataclass(frozen=True)
class Option:
    """One way to treat one part: what it costs (any units, by resource name) and how much quality it is thought to lose."""

    value: Any
    harm: float
    costs: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Allocation:
    """The picked option of every part; `feasible` is False when no set meets the limits, and then this is the set that
    exceeds them least (its largest ratio of cost to limit is minimal), with `binding` naming that limit."""

    picks: tuple[Option, ...]
    harm: float
    costs: dict[str, float]
    feasible: bool = True
    binding: str | None = None


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """HiGHS prints stray lines past Python, whatever its options say; they would spoil a command's JSON."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def undominated(options: Sequence[Option], names: Iterable[str] | None = None) -> list[Option]:
    """Options that no other one equals or beats in harm and in every cost (the first of equals stays).

    `names` are the costs that count, by default all.
    """
    names = sorted({n for o in options for n in o.costs} if names is None else names)
    table = np.array([[o.harm, *(o.costs.get(n, 0.0) for n in names)] for o in options])
    keep = []
    for i, row in enumerate(table):
        no_worse = (table <= row).all(axis=1)
        better = no_worse & (table < row).any(axis=1)
        earlier_equal = no_worse & (table == row).all(axis=1) & (np.arange(len(table)) < i)
        if not (better | earlier_equal).any():
            keep.append(options[i])
    return keep


def allocate(parts: Sequence[Sequence[Option]], limits: dict[str, float], minimise: str = "harm") -> Allocation:
    """Least total `minimise` ("harm" or a resource) over one option per part, within `limits` (resource or "harm" -> limit).

    Raises ValueError when a part has no option.
    """
    if any(not part for part in parts):
        raise ValueError("a part has no option")
    # what is neither limited nor minimised decides nothing, and would keep every option alive
    counted = {*limits, minimise} - {"harm"}
    kept = [undominated(part, counted) for part in parts]
    flat = [o for part in kept for o in part]
    owner = np.repeat(np.arange(len(kept)), [len(p) for p in kept])
    one_each = csr_array((np.ones(len(flat)), (owner, np.arange(len(flat)))), shape=(len(kept), len(flat)))

    def column(name: str) -> np.ndarray:
        return np.array([o.harm if name == "harm" else o.costs.get(name, 0.0) for o in flat], dtype=np.float64)

    def solve(objective: np.ndarray, rows: list[np.ndarray], upper: list[float], slack: bool) -> np.ndarray | None:
        """With `slack`, one more variable t scales all limits: rows·x ≤ t."""
        n = len(flat) + slack
        pad = np.zeros(1) if slack else np.zeros(0)
        equal = csr_array(np.hstack([one_each.toarray(), np.zeros((len(kept), int(slack)))]))
        constraints = [LinearConstraint(equal, 1, 1)]
        for row, top in zip(rows, upper):
            tail = -np.ones(1) if slack else pad
            constraints.append(LinearConstraint(np.concatenate([row, tail])[None], -np.inf, 0.0 if slack else top))
        integer = np.concatenate([np.ones(len(flat)), np.zeros(int(slack))])
        goal = np.concatenate([objective * (0 if slack else 1), np.ones(int(slack))])
        box = Bounds(np.zeros(n), np.concatenate([np.ones(len(flat)), np.full(int(slack), np.inf)]))
        options = {"time_limit": 30.0, "mip_rel_gap": 1e-4}
        with quiet_stdout():
            found = milp(goal, constraints=constraints, integrality=integer, bounds=box, options=options)
        return None if found.x is None else found.x[: len(flat)]

    names = list(limits)
    hopeless = _hopeless(kept, limits)
    if hopeless is not None:
        return hopeless
    scaled = [column(n) / max(limits[n], 1e-30) for n in names]
    goal = column(minimise)
    goal = goal / max(np.abs(goal).max(), 1e-30)
    x = solve(goal, scaled, [1.0] * len(names), slack=False)
    feasible = x is not None
    if not feasible:
        x = solve(goal, scaled, [1.0] * len(names), slack=True)
    picks = tuple(flat[int(np.flatnonzero(owner == i)[np.argmax(x[owner == i])])] for i in range(len(kept)))
    costs, harm = _totals(picks)
    totals = {**costs, "harm": harm}
    binding = max(names, key=lambda n: totals[n] / max(limits[n], 1e-30)) if names else None
    return Allocation(picks, harm, costs, feasible, binding)


def _totals(picks: Sequence[Option]) -> tuple[dict[str, float], float]:
    names = sorted({n for o in picks for n in o.costs})
    costs = {n: float(sum(o.costs.get(n, 0.0) for o in picks)) for n in names}
    return costs, float(sum(o.harm for o in picks))


def _hopeless(kept: Sequence[Sequence[Option]], limits: dict[str, float]) -> Allocation | None:
    """When a single limit lies below the least possible total: the set of that total. The solver is spared such limits,
    which may be next to nothing and would ruin its scaling."""

    def cost(option: Option, name: str) -> float:
        return option.harm if name == "harm" else option.costs.get(name, 0.0)

    least = {n: sum(min(cost(o, n) for o in part) for part in kept) for n in limits}
    below = [n for n in limits if least[n] > limits[n]]
    if not below:
        return None
    worst = max(below, key=lambda n: least[n] / max(limits[n], 1e-30))
    picks = tuple(min(part, key=lambda o: (cost(o, worst), o.harm)) for part in kept)
    costs, harm = _totals(picks)
    return Allocation(picks, harm, costs, False, worst)


def frontier(parts: Sequence[Sequence[Option]], resource: str, points: int = 12) -> list[Allocation]:
    """Allocations of least harm at `points` limits of one resource, from the smallest possible to the largest useful."""
    low = sum(min(o.costs[resource] for o in part) for part in parts)
    high = sum(min(part, key=lambda o: (o.harm, o.costs[resource])).costs[resource] for part in parts)
    out = []
    for limit in np.geomspace(low * 1.0001, max(high, low) * 1.0001, points):
        found = allocate(parts, {resource: float(limit)})
        if not out or found.costs != out[-1].costs:
            out.append(found)
    return out

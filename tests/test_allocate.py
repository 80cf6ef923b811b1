"""The allocator against brute force, with several limits, and what it says when nothing fits."""

import itertools

import numpy as np
import pytest

from netsuke.allocate import Option, allocate, frontier, undominated


def random_parts(seed: int, parts: int = 5, options: int = 4) -> list[list[Option]]:
    rng = np.random.default_rng(seed)
    return [
        [
            Option((p, o), float(h), {"storage": float(s), "latency": float(t)})
            for o, (h, s, t) in enumerate(rng.random((options, 3)))
        ]
        for p in range(parts)
    ]


def brute_force(parts, limits):
    best = None
    for picks in itertools.product(*parts):
        if all(sum(o.costs[n] for o in picks) <= top for n, top in limits.items()):
            harm = sum(o.harm for o in picks)
            best = harm if best is None else min(best, harm)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_equals_brute_force_under_two_limits(seed):
    parts = random_parts(seed)
    limits = {"storage": 1.0 + 0.2 * seed, "latency": 2.4}
    best, found = brute_force(parts, limits), allocate(parts, limits)
    assert found.feasible == (best is not None)
    if best is not None:
        assert found.harm == pytest.approx(best, abs=1e-3 * max(best, 1))
        assert all(found.costs[n] <= top + 1e-9 for n, top in limits.items())


def test_infeasible_names_the_binding_limit_and_the_nearest_set():
    parts = [[Option("a", 0.1, {"ram": 5.0, "storage": 1.0}), Option("b", 0.5, {"ram": 4.0, "storage": 1.0})]] * 3
    found = allocate(parts, {"ram": 10.0, "storage": 100.0})
    assert not found.feasible
    assert found.binding == "ram"
    assert found.costs["ram"] == 12.0


def test_a_limit_of_next_to_nothing_is_answered():
    parts = [[Option("a", 0.1, {"ram": 5e6}), Option("b", 0.5, {"ram": 4e6})]] * 3
    found = allocate(parts, {"ram": 1e-12})
    assert (found.feasible, found.binding, found.costs["ram"]) == (False, "ram", 12e6)


def test_limits_that_clash_only_together_are_answered():
    parts = [[Option("a", 0.1, {"ram": 5.0, "storage": 1.0}), Option("b", 0.5, {"ram": 1.0, "storage": 5.0})]] * 2
    found = allocate(parts, {"ram": 4.0, "storage": 4.0})
    assert not found.feasible
    assert found.costs == {"ram": 6.0, "storage": 6.0}


def test_minimises_a_resource_under_a_harm_limit():
    parts = [
        [Option(16, 0.0, {"storage": 16.0}), Option(4, 0.1, {"storage": 4.0}), Option(2, 0.9, {"storage": 2.0})]
    ] * 4
    found = allocate(parts, {"harm": 0.25}, minimise="storage")
    assert found.costs["storage"] == 16 + 16 + 4 + 4
    assert found.harm == pytest.approx(0.2)


def test_dominated_options_are_dropped_and_equals_kept_once():
    good, worse, twin = Option(1, 0.1, {"s": 1.0}), Option(2, 0.2, {"s": 1.0}), Option(3, 0.1, {"s": 1.0})
    assert undominated([good, worse, twin]) == [good]


def test_frontier_is_monotone():
    curve = frontier(random_parts(3), "storage", points=8)
    sizes, harms = [a.costs["storage"] for a in curve], [a.harm for a in curve]
    assert sizes == sorted(sizes)
    assert harms == sorted(harms, reverse=True)
    assert len(curve) >= 4


def test_a_part_without_options_is_an_error():
    with pytest.raises(ValueError, match="no option"):
        allocate([[]], {"storage": 1.0})

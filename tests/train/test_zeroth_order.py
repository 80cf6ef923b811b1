"""Zeroth-order steps: the estimate tends to the gradient, perturbations come back bit for bit, memory is a block's."""

import math
import tracemalloc

import pytest
import torch

from netsuke.errors import NetsukeError
from netsuke.train.zeroth_order import Perturbation, ZerothOrderKnobs, descend, in_micro_batches, replay, slopes
from tests.tiny import tiny_llama, tiny_task


def curved(size: int, seed: int = 0):
    """A smooth loss of `size` weights in two parameters, and its exact gradient."""
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.randn(64, size // 2, generator=rng).double(), torch.randn(64, generator=rng).double()
    parameters = {n: torch.randn(size // 2, generator=rng).double() / size**0.5 for n in ("a", "b")}

    def loss() -> torch.Tensor:
        hidden = torch.tanh(x @ parameters["a"]) + (x.flip(1) @ parameters["b"]).square() / 4
        return (hidden - y).square().mean()

    for p in parameters.values():
        p.requires_grad_(True)
    exact = dict(zip(parameters, torch.autograd.grad(loss(), list(parameters.values()))))
    for p in parameters.values():
        p.requires_grad_(False)
    return parameters, loss, exact


def estimate(parameters, loss, knobs, step=0):
    """(1/q) Σ g u as a dict, by descending from zero with rate −1."""

    def at(p):
        with p.standing(parameters):
            return float(loss())

    found, _ = slopes(at, step, knobs)
    out = {n: torch.zeros_like(p) for n, p in parameters.items()}
    descend(out, found, step, -1.0, knobs)
    return out


def flat(parts):
    return torch.cat([parts[n] for n in sorted(parts)])


def test_cosine_grows_with_the_root_of_the_directions():
    parameters, loss, exact = curved(512)
    for q, trials in ((1, 200), (16, 40), (256, 6)):
        knobs = ZerothOrderKnobs(eps=1e-4, directions=q, clip=1e6)
        got = [estimate(parameters, loss, knobs, step) for step in range(trials)]
        cosines = [float(torch.cosine_similarity(flat(g), flat(exact), dim=0).abs()) for g in got]
        # sqrt(q / d) while q is much smaller than d; exactly E = sqrt(q / (q + d)), and sqrt(2 / π) of it for one direction
        expected = math.sqrt(q / (q + 512)) * (math.sqrt(2 / math.pi) if q == 1 else 1)
        assert sum(cosines) / trials == pytest.approx(expected, rel=0.15), q


def test_mean_of_many_directions_is_the_gradient():
    parameters, loss, exact = curved(64)
    got = estimate(parameters, loss, ZerothOrderKnobs(eps=1e-4, directions=4096, clip=1e6))
    error = float((flat(got) - flat(exact)).norm() / flat(exact).norm())
    assert error < 0.15  # expected: sqrt((d + 1) / n) = 0.126
    shuffled = flat(got)[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    assert float((shuffled - flat(exact)).norm() / flat(exact).norm()) > 0.5


def test_in_place_comes_back_within_rounding_and_standing_bit_for_bit():
    model = tiny_llama()
    parameters = dict(model.named_parameters())
    before = {n: p.clone() for n, p in parameters.items()}
    with Perturbation(0, 3, 1, 1e-3).standing(parameters):
        moved = {n: p.clone() for n, p in parameters.items()}
    assert all(torch.equal(p, before[n]) for n, p in parameters.items())
    assert all(not torch.equal(p, before[n]) for n, p in moved.items())
    Perturbation(0, 3, 1, 1e-3).shift_(parameters)
    assert all(torch.equal(p, moved[n]) for n, p in parameters.items()), "in place and copies agree"
    for scale in (-2e-3, 1e-3):
        Perturbation(0, 3, 1, scale).shift_(parameters)
    for n, p in parameters.items():
        assert float((p - before[n]).norm() / before[n].norm()) < 1e-6, n


def test_standing_restores_after_an_error():
    parameters = {"w": torch.ones(3, 5)}
    kept = parameters["w"].data_ptr()
    with pytest.raises(KeyError), Perturbation(0, 0, 0, 1.0).standing(parameters):
        raise KeyError
    assert parameters["w"].data_ptr() == kept and bool((parameters["w"] == 1).all())


def test_rows_are_those_of_the_whole_and_keys_are_independent():
    p, w = Perturbation(7, 2, 0, 0.5), torch.zeros(700, 513)
    whole = p.rows("w", w, 0, 700)
    for start, stop in ((0, 1), (254, 258), (255, 511), (699, 700), (300, 300)):
        assert torch.equal(p.rows("w", w, start, stop), whole[start:stop])
    assert float(whole.mean()) == pytest.approx(0, abs=0.005) and float(whole.std()) == pytest.approx(0.5, rel=0.01)
    for other in (Perturbation(8, 2, 0, 0.5), Perturbation(7, 3, 0, 0.5), Perturbation(7, 2, 1, 0.5)):
        assert (
            abs(float(torch.corrcoef(torch.stack((other.rows("w", w, 0, 9).flatten(), whole[:9].flatten())))[0, 1]))
            < 0.06
        )
    assert not torch.equal(p.rows("v", w, 0, 9), whole[:9])
    assert not torch.equal(whole[:255], whole[255:510]), "blocks of rows must not repeat each other"


def test_a_run_is_its_seed_and_its_slopes():
    parameters, loss, _ = curved(40)
    start, knobs, log = (
        {n: p.clone() for n, p in parameters.items()},
        ZerothOrderKnobs(rate=0.02, directions=2, clip=9),
        [],
    )
    first = float(loss())
    for step in range(60):

        def at(p):
            with p.standing(parameters):
                return float(loss())

        found, _ = slopes(at, step, knobs)
        rate = knobs.rate_at(step / 60)
        descend(parameters, found, step, rate, knobs)
        log.append((rate, found))
    assert float(loss()) < 0.8 * first
    replay(start, log, knobs)
    assert all(torch.equal(start[n], p) for n, p in parameters.items())


def test_slopes_are_clipped_and_a_flat_loss_is_refused():
    knobs = ZerothOrderKnobs(eps=1e-2, clip=0.2)
    assert slopes(lambda p: 1e3 * p.scale, 0, knobs)[0] == [20.0]
    assert slopes(lambda p: -3 * p.scale, 0, knobs)[0] == [-3.0]
    with pytest.raises(NetsukeError, match=r"below weight resolution.*raise eps"):
        slopes(lambda p: 2.5, 0, knobs)
    with pytest.raises(FloatingPointError, match="step 4"):
        slopes(lambda p: math.nan, 4, knobs)


@pytest.mark.parametrize("knobs", [{"eps": 0}, {"rate": -1}, {"directions": 0}, {"final": 2}, {"eps": math.nan}])
def test_knobs_are_refused_by_name(knobs):
    with pytest.raises(NetsukeError, match=next(iter(knobs))):
        ZerothOrderKnobs(**knobs)


def test_rate_falls_linearly_to_its_final_share():
    knobs = ZerothOrderKnobs(rate=2.0, final=0.5)
    assert [knobs.rate_at(p) for p in (0, 0.5, 1, 7)] == [2.0, 1.5, 1.0, 1.0]


def test_micro_batches_give_the_loss_of_the_batch():
    model, task = tiny_llama(), tiny_task()
    rows = task.windows("train")[:7]
    with torch.no_grad():
        want = float(task.loss(model, rows))
        for micro in (1, 3, 7, 50):
            assert in_micro_batches(lambda part: task.loss(model, part), rows, micro) == pytest.approx(want, rel=1e-6)


def test_shifting_draws_a_block_at_a_time():
    """torch's memory is not tracemalloc's, so the largest draw is watched at its source."""
    sizes, real = [], torch.randn

    def watched(*shape, **rest):
        sizes.append(math.prod(shape))
        return real(*shape, **rest)

    tracemalloc.start()
    try:
        torch.randn = watched
        Perturbation(0, 0, 0, 1e-3).shift_({"w": torch.zeros(4096, 256)})
        python_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        torch.randn = real
        tracemalloc.stop()
    assert sum(sizes) == 4096 * 256 and max(sizes) <= 1 << 17 and python_bytes < 1 << 16

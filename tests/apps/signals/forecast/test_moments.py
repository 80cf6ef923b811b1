"""Moments are those of every window, in any portions; the paths fitted from them are the best of their form."""

import numpy as np
import pytest

from netsuke.apps.signals.forecast import fold
from netsuke.apps.signals.forecast.moments import (
    Moments,
    fit_both,
    fit_frequency,
    fit_time,
    least_squares,
    loss,
    ridged,
    sweep,
)  # fmt: skip
from tests.apps.signals.forecast.data import EXACT, SMALL, meters


def by_windows(x: np.ndarray, shape: fold.Shape, forget: float = 1.0) -> tuple[np.ndarray, np.ndarray, float, float]:
    """The definition: window after window, phase after phase."""
    n, m, w = shape.n, shape.m, shape.period
    sxx, sxy, syy, weight = np.zeros((n, n)), np.zeros((n, m)), 0.0, 0.0
    count = len(x) - shape.window + 1
    for start in range(count):
        fade = forget ** (count - 1 - start)
        for channel in x.T:
            part = channel[start : start + shape.window] - channel[start : start + shape.lookback].mean()
            a, b = part[: shape.lookback].reshape(n, w), part[shape.lookback :].reshape(m, w)
            sxx, sxy, syy = sxx + fade * a @ a.T, sxy + fade * a @ b.T, syy + fade * np.sum(b * b)
            weight += fade * w * m
    return sxx, sxy, syy, weight


@pytest.mark.parametrize("forget", [1.0, 0.99])
@pytest.mark.parametrize("portions", [[110], [70, 1, 2, 37], [1] * 110])
def test_moments_are_the_definition_in_any_portions(forget, portions):
    x = meters(110, 2, period=6) / [1, 10] + 5
    got, at = Moments(SMALL, 2, forget), 0
    for size in portions:
        got.update(x[at : at + size])
        at += size
    sxx, sxy, syy, weight = by_windows(x, SMALL, forget)
    assert np.allclose(got.sxx, sxx, rtol=1e-9) and np.allclose(got.sxy, sxy, rtol=1e-9)
    assert got.syy == pytest.approx(syy) and got.weight == pytest.approx(weight)


def test_the_loss_is_the_error_of_all_windows():
    x = meters(150, 1, period=4) + 2
    shape = EXACT
    got = Moments(shape, 1)
    assert got.update(x) == 150 - shape.window + 1
    matrix = np.random.default_rng(0).normal(size=(shape.m, shape.n)) / 9
    seen = np.lib.stride_tricks.sliding_window_view(x[:, 0], shape.window)
    error = fold.forecast(seen[:, : shape.lookback], matrix, None, shape) - seen[:, shape.lookback :]
    assert got.mse(matrix) == pytest.approx(np.mean(error**2))


def problem(shape: fold.Shape, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(400, shape.n)) @ rng.normal(size=(shape.n, shape.n))
    y = x @ rng.normal(size=(shape.n, shape.m)) + rng.normal(size=(400, shape.m))
    return x.T @ x, x.T @ y


@pytest.mark.parametrize("shape", [SMALL, EXACT], ids=["padded", "squares"])
def test_a_sweep_never_makes_it_worse_and_ends_at_a_stationary_point(shape):
    sxx, sxy = problem(shape)
    a1, a2 = np.random.default_rng(1).normal(size=(2, shape.q, shape.p))
    values = []
    for _ in range(400):
        a1, a2 = sweep(a1, a2, sxx, sxy, shape)
        values.append(loss(fold.time_matrix(a1, a2, shape), sxx, sxy))
    assert all(b <= a + 1e-6 * abs(a) for a, b in zip(values, values[1:]))  # noqa: RUF007
    for factor in (a1, a2):
        for index in np.ndindex(factor.shape):
            step = 1e-4 * max(1.0, abs(factor[index]))
            around = []
            for sign in (1, -1):
                factor[index] += sign * step
                around.append(loss(fold.time_matrix(a1, a2, shape), sxx, sxy))
                factor[index] -= sign * step
            assert abs(around[0] - around[1]) / (2 * step) < 2e-3 * abs(values[-1])


def test_a_series_that_is_bilinear_is_found_exactly():
    shape = EXACT
    rng = np.random.default_rng(3)
    a1, a2 = rng.normal(size=(2, shape.q, shape.p))
    sxx, _ = problem(shape)
    truth = fold.time_matrix(a1, a2, shape)
    b1, b2 = fit_time(sxx, sxx @ truth.T, shape)
    assert np.abs(fold.time_matrix(b1, b2, shape) - truth).max() < 1e-3 * np.abs(truth).max()


def test_frequency_weights_give_the_reduced_rank_regression():
    """With all bins and rank m nothing is left out; with rank 2 it is the textbook's closed form."""
    shape = fold.Shape(7 * 6, 12, 6)  # m 2: rank 2 is everything
    sxx, sxy = problem(shape)
    w1, w2 = fit_frequency(sxx, sxy, shape, shape.n)
    least = np.linalg.solve(ridged(sxx), sxy)
    assert np.allclose(fold.frequency_matrix(w1, w2, shape), least.T, atol=1e-9)
    sxx, sxy = problem(EXACT)
    root = np.linalg.cholesky(ridged(sxx))
    u, s, v = np.linalg.svd(np.linalg.solve(root, sxy))
    wanted = (np.linalg.solve(root.T, u[:, :2] * s[:2]) @ v[:2]).T
    got = fold.frequency_matrix(*fit_frequency(sxx, sxy, EXACT, EXACT.n), EXACT)
    assert np.allclose(got, wanted, atol=1e-9)


@pytest.mark.parametrize("lpf", [1, 2, 4, 9])
def test_only_the_first_bins_are_seen(lpf):
    sxx, sxy = problem(EXACT)
    matrix = fold.frequency_matrix(*fit_frequency(sxx, sxy, EXACT, lpf), EXACT)
    bins = np.abs(np.fft.fft(matrix, axis=1))
    hidden = [k for k in range(lpf, EXACT.n) if EXACT.n - k >= lpf]
    assert bins[:, hidden].max(initial=0.0) < 1e-9 * bins.max()
    assert np.linalg.matrix_rank(matrix, tol=1e-9) == min(2, 2 * lpf - 1)


def test_structure_costs_little_and_shuffled_targets_do_worse():
    shape = fold.Shape(9 * 24, 4 * 24, 24)
    x = meters(2400, 3)
    x = x / x.std(0)
    seen, later = Moments(shape, 3), Moments(shape, 3)
    seen.update(x[:1600])
    later.update(x[1400:])
    a1, a2, w1, w2 = fit_both(seen, 0.5, 3)
    mixed = 0.5 * fold.time_matrix(a1, a2, shape) + 0.5 * fold.frequency_matrix(w1, w2, shape)
    assert later.mse(mixed) < 1.1 * later.mse(least_squares(seen))
    wrong = np.random.default_rng(0).permuted(mixed, axis=1)
    assert later.mse(wrong) > 1.3 * later.mse(mixed)


def test_state_fits_a_chip():
    assert [Moments(fold.Shape(720, h, 24), 7).bytes for h in (96, 720)] == [4080, 7200]

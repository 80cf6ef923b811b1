"""Mass, spring and damper: physics, windows, the learned model, the PID and its tuning, overshoot."""

import numpy as np
import pytest

from netsuke.apps.control import oscillator
from netsuke.apps.control.loop import Trace
from netsuke.apps.control.oscillator import MassSpringDamper
from netsuke.apps.control.pid import PID, tune


def test_a_free_oscillation_is_the_known_one():
    plant = MassSpringDamper(mass=2.0, damping=0.4, stiffness=3.0)
    plant.position = np.array([1.0])
    decay, frequency = 0.1, np.sqrt(1.5 - 0.01)
    for n in range(1, 60):
        t = n * plant.tick
        want = np.exp(-decay * t) * (np.cos(frequency * t) + decay / frequency * np.sin(frequency * t))
        assert plant.step(np.zeros(1))[0] == pytest.approx(want, abs=1e-6)


def test_rest_under_a_force_and_the_limit():
    plant = MassSpringDamper(stiffness=2.0, cubic=1.0)
    for _ in range(300):
        plant.step(np.array([100.0]))  # the force is limited to 2: 2 x + x³ = 2
    assert plant.output[0] == pytest.approx(0.7709169970592481, abs=1e-6)


def test_windows_are_causal_and_newest_first():
    u, y = np.arange(5.0), 10 + np.arange(5.0)
    x, target = oscillator.windows(u, y, 2)
    assert x[0].tolist() == [1, 0, 11, 10] and target[0, 0] == 12  # y(2) from u(1), u(0), y(1), y(0)
    assert len(x) == 3


def test_the_model_is_learned_and_speed_needs_two_positions():
    plant, error = MassSpringDamper(damping=1.0), {}
    for past in (1, 2):
        model = oscillator.learn(plant, past, ticks=600)
        x, target = oscillator.windows(*oscillator.excite(plant, 300, seed=7), past)
        error[past] = float(np.std(model.network.forward(x)[-1] - target) / np.std(target))
    assert error[2] < 0.01 < error[1] < 0.2


def test_loops_side_by_side_are_the_single_ones_and_tuning_finds_the_best():
    plant, paths = MassSpringDamper(), oscillator.references(1, 60)[:2]
    gains = np.array([[1.0, 0.5, 0.1], [5.0, 1.0, 1.0], [0.1, 0.0, 0.0]])
    scores = oscillator.pid_score(plant, paths, PID(*gains.T, plant.tick, -2, 2))
    for one, score in zip(gains, scores):
        assert oscillator.pid_score(plant, paths, PID(*one[:, None], plant.tick, -2, 2))[0] == pytest.approx(score)
    tuned = tune(lambda pid: oscillator.pid_score(plant, paths, pid), plant.tick, -2, 2)
    best = oscillator.pid_score(plant, paths, PID(*np.array([[tuned.kp], [tuned.ki], [tuned.kd]]), plant.tick, -2, 2))
    assert best[0] < scores.min()


def test_the_pid_removes_the_offset_and_its_integral_stands_at_the_limit():
    plant, pid = MassSpringDamper(), PID(4.0, 2.0, 1.0, 0.1, -2.0, 2.0)
    hold = np.full((150, 1), 0.8)
    assert oscillator.run(plant, pid, [hold])[0].errors[-1] < 1e-3
    pid.reset(np.zeros(1))
    for _ in range(50):
        pid.step(np.zeros(1), np.full((1, 1), 100.0))
    assert pid.integral[0] == 0


def test_the_pid_follows_the_row_its_tuning_chose():
    plant, paths = MassSpringDamper(), oscillator.references(1, 100)
    near, far = PID(4.0, 2.0, 1.0, 0.1, -2.0, 2.0), PID(4.0, 2.0, 1.0, 0.1, -2.0, 2.0, advance=3)
    wanted = np.linspace(0.0, 0.4, 6)[:, None]
    for pid, rows in ((near, wanted[3:]), (far, wanted), (far, wanted[:4])):
        pid.reset(np.zeros(1))
        assert pid.step(np.zeros(1), rows)[0] == pytest.approx(4.2 * 0.24)

    def score(pid: PID) -> np.ndarray:
        return oscillator.pid_score(plant, paths, pid)

    blind, sees = (tune(score, plant.tick, -2.0, 2.0, advances) for advances in (range(1), (0, 6)))
    assert (blind.advance, sees.advance) == (0, 6)
    assert oscillator.rms(oscillator.run(plant, sees, paths, 7)) < 0.9 * oscillator.rms(
        oscillator.run(plant, blind, paths)
    )


def test_least_squares_knows_a_linear_plant():
    plant = MassSpringDamper()
    x, target = oscillator.windows(*oscillator.excite(plant, 300, seed=7), 2)
    found = oscillator.least_squares(plant, ticks=600).network.forward(x)[-1]
    assert np.abs(found - target).max() < 1e-9


def test_overshoot_is_a_share_of_the_step():
    wanted = np.repeat([0.5, -0.5], 50)[:, None]
    outputs = wanted.copy()
    outputs[60] = -0.7
    assert oscillator.overshoot(Trace(outputs, wanted, outputs)) == pytest.approx(0.2)


def test_references_differ_by_seed_and_repeat():
    a, b, c = oscillator.references(1), oscillator.references(1), oscillator.references(2)
    assert all(np.array_equal(x, y) for x, y in zip(a, b)) and not any(np.allclose(x, y) for x, y in zip(a, c))
    assert all(x.shape == (300, 1) and np.abs(x).max() <= 1.6 for x in a)

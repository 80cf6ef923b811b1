"""The controller: derivatives of the whole cost, the solve, what steps do, refusals, bits of C and Python."""

import ctypes
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from netsuke.apps.control import firmware, simulate
from netsuke.apps.control.loop import NetworkPlant, Perturbed, WithoutPreview, track
from netsuke.apps.control.newton import NewtonMPC, solve
from netsuke.devices.board import missing_tools
from netsuke.errors import NetsukeError
from tests.apps.control.cases import model, network, path

KNOBS = NewtonMPC(q=(1.0, 2.0), change=(1e-3, 2e-3), last=5, starts=3)
VARIED = {
    "plain": {},
    "moves and barrier": {"moves": 3, "first": 2, "sharpness": 1e-3, "range": 1.2},
    "differences": {"derivatives": "differences"},
    "enough": {"enough": 0.02, "starts": 4, "correction": 0.3},
}
rng = np.random.default_rng


def reachable(plant: NetworkPlant, ticks: int) -> np.ndarray:
    """Where the plant goes under smooth controls: a path that some plan can follow."""
    plant.reset()
    return np.array([plant.step(u) for u in 1.3 * path(ticks)])


class Still:
    """No control at all; remembers what it was shown."""

    def reset(self, y):
        self.seen = []

    def step(self, y, reference):
        self.seen.append(reference)
        return np.zeros(2)


def prepared(knobs: NewtonMPC):
    controller = knobs.controller(model(np.float64))
    controller.step(np.array([0.1, -0.1]), path(5), np.array([0.2, 0.1, -0.3]))
    return controller


@pytest.mark.parametrize("moves", [1, 3])
def test_gradient_and_hessian_of_the_cost(moves):
    controller = prepared(replace(KNOBS, moves=moves, derivatives="hessian", sharpness=1e-3, range=1.3))
    plan, eps = rng(1).uniform(-0.4, 0.4, (1, moves, 2)), 1e-6
    _, gradient, hessian = controller.derivatives_at(plan)
    for a in range(plan.size):
        nudge = eps * np.eye(plan.size)[a].reshape(plan.shape)
        costs = [controller.cost_of(p, controller.foresee(p, 5).outputs)[0] for p in (plan + nudge, plan - nudge)]
        assert gradient[0, a] == pytest.approx((costs[0] - costs[1]) / (4 * eps), rel=1e-5, abs=1e-7)
        sides = [controller.derivatives_at(p)[1][0] for p in (plan + nudge, plan - nudge)]
        assert np.allclose(hessian[0, a], (sides[0] - sides[1]) / (2 * eps), rtol=1e-4, atol=1e-6)


def test_differences_come_close_and_gauss_newton_is_positive():
    exact, rough = prepared(KNOBS), prepared(replace(KNOBS, derivatives="differences", epsilon=1e-4))
    plan = rng(2).uniform(-0.4, 0.4, (2, 1, 2))
    assert np.allclose(exact.derivatives_at(plan)[1], rough.derivatives_at(plan)[1], atol=1e-5)
    assert np.linalg.eigvalsh(exact.derivatives_at(plan)[2]).min() > 0


def test_the_solve_is_the_inverse_and_survives_what_is_singular():
    a = rng(0).normal(size=(4, 6, 6))
    h, g, free = a @ a.transpose(0, 2, 1) + np.eye(6), rng(1).normal(size=(4, 6)), np.zeros((4, 6), bool)
    assert np.allclose(solve(h, g, free), np.linalg.solve(h, g[..., None])[..., 0], atol=1e-9)
    held = free.copy()
    held[:, 2] = True
    rest = [0, 1, 3, 4, 5]
    part = np.linalg.solve(h[:, rest][:, :, rest], g[:, rest, None])[..., 0]
    assert np.allclose(solve(h, g, held)[:, rest], part, atol=1e-9) and not solve(h, g, held)[:, 2].any()
    h[:, 3], h[:, :, 3], g[:, 3] = 0, 0, 0  # no effect
    assert np.all(np.isfinite(solve(h, g, free))) and not solve(h, g, free)[:, 3].any()
    assert not solve(np.zeros((1, 2, 2)), np.zeros((1, 2)), np.zeros((1, 2), bool)).any()


def test_steps_never_raise_the_cost_and_stay_inside():
    controller = prepared(KNOBS)
    plans = rng(3).uniform(-0.5, 0.5, (20, 1, 2))
    before = controller.cost_of(plans, controller.foresee(plans, 5).outputs)
    better, costs, _ = controller.descend(plans)
    assert np.all(costs <= before) and np.mean(costs < before) > 0.8
    assert np.abs(better).max() <= 0.5
    assert np.allclose(costs, controller.cost_of(better, controller.foresee(better, 5).outputs))


def test_the_loop_tracks_what_can_be_reached():
    predictor = model(np.float64)
    plant = NetworkPlant(predictor, np.zeros(2))
    wanted = reachable(plant, 40)
    trace = track(plant, KNOBS.controller(predictor), wanted, KNOBS.last)
    idle = track(plant, Still(), wanted, KNOBS.last)
    assert trace.rms < 0.25 * idle.rms and np.abs(trace.controls).max() <= 0.5
    assert trace.within(idle.rms) > 0.9 and 0 < trace.effort < 1


def test_lost_measurements_are_bridged():
    controller, wanted = KNOBS.controller(model()), path(40)
    for n in range(6):
        u = controller.step(np.float32([np.nan, 0.1]) if n == 3 else np.float32([0.2, 0.1]), wanted[n : n + 5])
        assert np.all(np.isfinite(u))
    assert controller.past.outputs[0, 0] == np.float32(0.2)


def test_the_correction_removes_an_offset():
    predictor = model(np.float64)
    last = predictor.network.layers[-1]
    shifted = replace(predictor.network, layers=(*predictor.network.layers[:-1], replace(last, bias=last.bias + 0.15)))
    plant = NetworkPlant(predictor.with_network(shifted), np.zeros(2))
    hold = np.tile(np.float64([0.05, -0.05]), (40, 1))
    errors = {}
    for share in (0.0, 0.5):
        knobs = replace(KNOBS, correction=share, change=(1e-5, 1e-5))
        controller = knobs.controller(predictor)
        track(plant, controller, hold, knobs.last)
        errors[share] = np.abs(plant.output - controller.foreseen).max()
    assert errors[0.5] < 0.1 * errors[0.0]


def test_delay_noise_and_preview():
    predictor = model(np.float64)
    plant = NetworkPlant(predictor, np.zeros(2))
    wanted, late = reachable(plant, 40), Perturbed(plant, 2, delay=1, noise=1e-3)
    a, b = (track(late, KNOBS.controller(predictor), wanted, 5) for _ in range(2))
    assert np.array_equal(a.outputs, b.outputs) and a.rms > track(plant, KNOBS.controller(predictor), wanted, 5).rms
    still = Still()
    track(plant, WithoutPreview(still), wanted, 5)
    assert all(np.ptp(r, axis=0).max() == 0 for r in still.seen) and np.array_equal(still.seen[7][0], wanted[7])
    track(plant, still, wanted, 5)
    assert np.array_equal(still.seen[7], wanted[7:12]) and np.array_equal(still.seen[-1], wanted[[-1] * 5])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"last": 0}, "N2 0"), ({"moves": 9}, "Nu 9"), ({"starts": 0}, "starts is 0"), ({"low": 1.0}, "limits"),
        ({"q": (1.0, -1.0)}, "negative"), ({"q": (np.nan, 1.0)}, "q is .*not a number"), ({"seed": 0}, "seed"),
        ({"correction": np.nan}, "correction is nan"), ({"correction": 1.5}, "a share"), ({"enough": np.inf}, "enough is inf"),
        ({"enough": -1.0}, "negative"), ({"centre": np.nan}, "centre is nan"), ({"range": 0.0}, "range 0"),
        ({"epsilon": 1e-50}, "epsilon 1e-50"), ({"high": 1e39}, "high is 1e\\+39"), ({"last": 10**9}, "N2 1000000000"),
        ({"starts": 10**9}, "1 to 1000"),
        ({"factor": 1.0}, "factor"), ({"sharpness": 1.0, "range": 0.5}, "barrier"), ({"derivatives": "x"}, "'x'"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(change, named):
    with pytest.raises(NetsukeError, match=named):
        replace(KNOBS, **change)


def test_a_control_without_effect_is_named():
    predictor = model()
    predictor.network.layers[0].weight[:, [1, 3]] = 0  # control 1 of both ticks
    KNOBS.controller(predictor)
    with pytest.raises(NetsukeError, match=r"singular: control 1"):
        replace(KNOBS, change=(1e-3, 0.0)).controller(predictor)
    with pytest.raises(NetsukeError, match="3 weights of errors"):
        replace(KNOBS, q=(1.0, 1.0, 1.0)).controller(predictor)


needs_c = pytest.mark.skipif(simulate.compiler() is None, reason="no C compiler")
needs_board = pytest.mark.skipif(bool(missing_tools()), reason=f"needs {missing_tools()}")


@needs_c
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("kind", VARIED)
def test_c_and_python_give_the_same_bits(kind, int8):
    predictor, knobs = model(), replace(KNOBS, **VARIED[kind])
    plant, wanted = predictor, reachable(NetworkPlant(predictor, np.zeros(2)), 15)
    if int8:
        predictor = predictor.quantized(0.5, np.ones(2), 0.3)
    c = simulate.on_host(predictor, knobs, wanted, np.zeros(2), plant)
    python = track(NetworkPlant(plant, np.zeros(2)), knobs.controller(predictor), wanted, knobs.last)
    assert np.array_equal(c.controls, python.controls) and np.array_equal(c.outputs, python.outputs)
    assert np.ptp(c.controls, axis=0).min() > 0.01


@needs_c
@pytest.mark.parametrize("activations", [("sigmoid", "linear"), ("elu", "tanh")])
def test_every_activation_and_odd_sizes_have_the_same_bits(activations):
    net = network(3, 5, 1, activations=activations, seed=2)
    predictor = simulate.Predictor(net, 1, 1, 2, 1)
    knobs = NewtonMPC(q=(1.0,), change=(1e-3,), last=4, moves=2, first=2)
    wanted = path(15)[:, :1].astype(np.float32)
    c = simulate.on_host(predictor, knobs, wanted, np.zeros(1))
    python = track(NetworkPlant(predictor, np.zeros(1)), knobs.controller(predictor), wanted, 4)
    assert np.array_equal(c.outputs, python.outputs)


@needs_c
def test_an_exported_folder_tests_itself(tmp_path):
    predictor = model()
    out = tmp_path / "fw"
    facts = firmware.write_controller(predictor, KNOBS, out, name="arm", path=path(10), start=np.zeros(2))
    again = firmware.write_controller(predictor, KNOBS, out, name="arm", path=path(10), start=np.zeros(2))
    assert facts == again and facts["workspace"] == 4 * firmware.floats(predictor, KNOBS)
    strict = "-O2 -Werror -Wpedantic -Wdouble-promotion -Wshadow"
    made = subprocess.run(["make", "-s", "-C", out, "test", f"CFLAGS={strict}"], capture_output=True, text=True)
    assert made.returncode == 0 and "PASS" in made.stdout and " 0 in 10 ticks" in made.stdout, made.stderr
    (out / "control.json").write_text("{}")
    with pytest.raises(NetsukeError, match="something else is there"):
        firmware.write_controller(predictor, KNOBS, out, name="arm", path=path(10), start=np.zeros(2))
    with pytest.raises(NetsukeError, match="no prefix"):
        firmware.write_controller(predictor, KNOBS, out, name="9", path=path(10), start=np.zeros(2))
    with pytest.raises(NetsukeError, match="hessian"):
        firmware.controller_c(predictor, replace(KNOBS, derivatives="hessian"), "arm")


@needs_c
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_sensors_lost_measurements_and_the_workspace_in_c(tmp_path, int8):
    predictor, knobs, wanted = model(), replace(KNOBS, moves=3, correction=0.2), path(20).astype(np.float32)
    predictor = predictor.quantized(0.5, np.ones(2), 0.3) if int8 else predictor
    for name, text in firmware.controller_c(predictor, knobs, "arm").items():
        (tmp_path / name).write_text(text)
    with (tmp_path / "arm.c").open("a") as f:
        f.write("int asked(void) { return ns_mpc_floats(&config); }\n")
    sources = [tmp_path / n for n in ("arm.c", "ns_mpc.c", "ns_dense.c")]
    flags = [*simulate.FLAGS, "-shared", "-fPIC", "-o", tmp_path / "a.so"]
    subprocess.run([simulate.compiler(), *sources, *flags], check=True)
    library = ctypes.CDLL(str(tmp_path / "a.so"))
    assert library.asked() == firmware.floats(predictor, knobs)

    def address(a: np.ndarray) -> ctypes.c_void_p:
        return a.ctypes.data_as(ctypes.c_void_p)

    y, u = np.zeros(2, np.float32), np.empty(2, np.float32)
    controller = knobs.controller(predictor, y)
    library.arm_reset(address(y))
    for n, sensors in enumerate(rng(5).uniform(-0.3, 0.3, (8, 3)).astype(np.float32)):
        y = np.float32([0.1 * np.sin(n), np.nan if n == 4 else 0.05])
        ahead = np.ascontiguousarray(wanted[n : n + 5])
        library.arm_step(address(y), address(sensors), address(ahead), address(u))
        assert np.array_equal(u, controller.step(y, ahead, sensors))


@needs_board
def test_the_board_gives_the_hosts_bits_within_its_memory():
    predictor, wanted = model(), path(12)
    run = simulate.on_board(predictor, KNOBS, wanted, np.zeros(2))
    host = simulate.on_host(predictor, KNOBS, wanted, np.zeros(2))
    assert np.array_equal(run.trace.controls, host.controls) and np.array_equal(run.trace.outputs, host.outputs)
    assert len(run.instructions) == 12 and run.instructions.min() > 1000
    again = simulate.on_board(predictor, KNOBS, wanted, np.zeros(2))
    assert np.array_equal(run.instructions, again.instructions)
    assert 0 < run.parts["ns_mpc"].text < 16000 and run.stack < 4096
    few = simulate.on_board(predictor, replace(KNOBS, starts=1), wanted, np.zeros(2))
    assert few.instructions.sum() < 0.6 * run.instructions.sum()

"""do-mpc on a learned mass-spring-damper, for benchmarks/control.py: reads a job in JSON, prints {rms, seconds, version}.

The model is the network y(n+1) = W1 tanh(W0 [u(n), u(n-1), y(n), y(n-1)] + b0) + b1 as a discrete model of CasADi; its state
is (y, y before, u before). The controls after `moves` ticks are tied to the last one by constraints, as in the other controller.
"""

import json
import sys
import time
import warnings

warnings.filterwarnings("ignore")

import casadi  # noqa: E402
import do_mpc  # noqa: E402
import numpy as np  # noqa: E402


def controller(job):
    model = do_mpc.model.Model("discrete")
    y, y1, u1 = (model.set_variable("_x", name) for name in ("y", "y1", "u1"))
    u, wanted, free = (
        model.set_variable("_u", "u"),
        model.set_variable("_tvp", "wanted"),
        model.set_variable("_tvp", "free"),
    )
    w0, w1 = (casadi.DM(w) for w in job["weights"])
    b0, b1 = (casadi.DM(b) for b in job["biases"])
    model.set_rhs("y", w1 @ casadi.tanh(w0 @ casadi.vertcat(u, u1, y, y1) + b0) + b1)
    model.set_rhs("y1", y)
    model.set_rhs("u1", u)
    model.setup()
    mpc = do_mpc.controller.MPC(model)
    mpc.set_param(
        n_horizon=job["last"], t_step=1.0, state_discretization="discrete", store_full_solution=False,
        nlpsol_opts={"ipopt.print_level": 0, "ipopt.sb": "yes", "print_time": 0},
    )  # fmt: skip
    error = (y - wanted) ** 2
    mpc.set_objective(mterm=error, lterm=error)
    mpc.set_rterm(u=job["change"])
    mpc.bounds["lower", "_u", "u"], mpc.bounds["upper", "_u", "u"] = -job["limit"], job["limit"]
    mpc.set_nl_cons("held", (1 - free) * (u - u1), ub=1e-9)
    mpc.set_nl_cons("held_too", -(1 - free) * (u - u1), ub=1e-9)
    template, state = mpc.get_tvp_template(), {"ahead": np.zeros(job["last"] + 1)}

    def time_varying(now):
        for k in range(job["last"] + 1):
            template["_tvp", k, "wanted"] = state["ahead"][k]
            template["_tvp", k, "free"] = float(k < job["moves"])
        return template

    mpc.set_tvp_fun(time_varying)
    mpc.setup()
    return mpc, state


def step(job, position, speed, u):
    mass, damping, stiffness, cubic, tick, substeps = job["plant"]
    h, s = tick / substeps, np.array([position, speed])

    def rate(z):
        return np.array([z[1], (u - damping * z[1] - stiffness * z[0] - cubic * z[0] ** 3) / mass])

    for _ in range(substeps):
        a = rate(s)
        b = rate(s + h / 2 * a)
        c = rate(s + h / 2 * b)
        s = s + h / 6 * (a + 2 * b + 2 * c + rate(s + h * c))
    return s


def main():
    with open(sys.argv[1]) as file:
        job = json.load(file)
    squares, count, spent = 0.0, 0, 0.0
    for path in job["paths"]:
        mpc, state = controller(job)
        position = speed = before = last = 0.0
        mpc.x0 = np.zeros(3)
        mpc.set_initial_guess()
        for n in range(len(path)):
            # stage k of the horizon is the state k ticks ahead: stage 1 should be at path[n]
            state["ahead"] = np.array([position, *(path[min(n + k, len(path) - 1)] for k in range(job["last"]))])
            begin = time.perf_counter()
            u = float(mpc.make_step(np.array([[position], [before], [last]]))[0, 0])
            spent += time.perf_counter() - begin
            before, last = position, u
            position, speed = step(job, position, speed, u)
            squares, count = squares + (position - path[n]) ** 2, count + 1
    print(json.dumps({"rms": (squares / count) ** 0.5, "seconds": spent, "version": do_mpc.__version__}))


if __name__ == "__main__":
    main()

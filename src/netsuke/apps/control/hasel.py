"""The soft actuator of Aguasvivas Manzano et al. (2022): its published networks, its recorded path, our settings.

Six HASEL actuators, each in -0.5…0.5, move a tip whose position is predicted in metres from two past controls, two past
positions and 18 magnetometers (zeros in the authors' own simulation, and here). The path is held for `held` ticks a sample.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from netsuke.apps.control.arithmetic import Array
from netsuke.apps.control.loop import NetworkPlant, Trace, track
from netsuke.apps.control.network import DenseNetwork
from netsuke.apps.control.newton import NewtonMPC
from netsuke.apps.control.predictor import Predictor
from netsuke.data.catalogue import find

NETWORK = "nn4mc/hasel_fk_mar_18_2022.hdf5"  # 36 -> 10 relu -> 10 relu -> 3 tanh; jan_10 and jun_6 track worse
PATH = "nn4mc/hasel_reference_path.mat"
FILES = (NETWORK, PATH)
HELD = 5  # ticks a sample
# Chosen by error and instructions over this very path with seeds 1 to 4; see docs/control.svg.
SETTINGS = NewtonMPC(q=(3e4, 5e4, 5e4), change=(3e-3,) * 6)


def predictor(network: str = NETWORK, dtype: type = np.float64) -> Predictor:
    """The model of a published HASEL network. Raises NetsukeError when the data are absent."""
    from netsuke.graph.read.keras import read_keras

    dense = DenseNetwork.from_graph(read_keras(find(network)), dtype)
    return Predictor(dense, controls=6, outputs=3, control_past=2, output_past=2, sensors=18)


@cache
def samples() -> Array:
    """The recorded path (1130, 3), metres."""
    from scipy.io import loadmat

    return loadmat(str(find(PATH)))["ref_data"].astype(np.float64)


def whole(held: int = HELD) -> Array:
    """What is wanted after every tick of the whole path, (1130 * held - 1, 3)."""
    return np.repeat(samples(), held, axis=0)[1:]


def follow(model: Predictor, knobs: NewtonMPC = SETTINGS, path: Array | None = None) -> Trace:
    """The published simulation, in Python: the plant is the network itself. From rest at the path's beginning."""
    start = samples()[0] if path is None else path[0]
    wanted = whole() if path is None else path
    controller = knobs.controller(model)
    trace = track(NetworkPlant(model, start), controller, wanted, knobs.last)
    trace.facts["halved"] = controller.halved
    return trace

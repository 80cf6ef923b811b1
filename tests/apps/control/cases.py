"""Small random models for the controller's tests."""

from itertools import pairwise

import numpy as np

from netsuke.apps.control.network import DenseNetwork, Layer
from netsuke.apps.control.predictor import Predictor


def network(*widths: int, activations=("relu", "tanh"), dtype=np.float32, seed=0) -> DenseNetwork:
    rng, layers = np.random.default_rng(seed), []
    for k, (i, o) in enumerate(pairwise(widths)):
        weight = rng.normal(0, 0.9 / np.sqrt(i), (o, i))
        layers.append(Layer(f"layer{k}", weight, rng.normal(0, 0.1, o), activations[k % len(activations)]))
    return DenseNetwork(tuple(layers)).as_type(dtype)


def model(dtype=np.float32, seed=0, **kw) -> Predictor:
    """Two controls, two outputs, two of each in the history, three sensors."""
    return Predictor(network(11, 8, 7, 2, activations=("relu", "tanh", "tanh"), dtype=dtype, seed=seed), 2, 2, 2, 2, 3)


def path(ticks: int) -> np.ndarray:
    t = np.arange(ticks)[:, None]
    return 0.3 * np.sin(t / 9.0 + np.array([0.0, 1.0]))

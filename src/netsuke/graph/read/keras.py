"""Reads Keras models: HDF5 files (`model_config` and `model_weights`) and `.keras` archives, Sequential or functional.

Images stay (N, H, W, C). Sequences (N, T, C) are convolved and pooled as images (N, 1, T, C), which costs reshapes that move
nothing. A norm is folded into the linear layer before it, else it stays as a 1 x 1 depthwise convolution. The names of
layers are kept: tensor "dense.weight" belongs to layer "dense". Nothing in the file is executed: Lambda layers are refused.

Keras 2's hard_sigmoid is clip(0.2 x + 0.5, 0, 1), Keras 3's clip(x / 6 + 0.5, 0, 1); the file's version decides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from netsuke.errors import NetsukeError
from netsuke.graph.ir import QGraph
from netsuke.graph.read.keras_file import KerasFile, read_file
from netsuke.graph.read.keras_layers import LAYERS, RECURRENT, Weights
from netsuke.graph.read.layout import Builder, Value

FUNCTIONS = {
    "linear": "linear", "relu": "relu", "relu6": "relu6", "sigmoid": "sigmoid", "tanh": "tanh", "softplus": "softplus",
    "softsign": "softsign", "elu": "elu", "selu": "selu", "exponential": "exponential", "swish": "swish",
    "silu": "swish", "hard_swish": "hard_swish", "hard_silu": "hard_swish",
}  # fmt: skip
IGNORED = (
    "Dropout", "SpatialDropout1D", "SpatialDropout2D", "GaussianNoise", "GaussianDropout", "AlphaDropout",
    "ActivityRegularization",
)  # fmt: skip


def read_keras(path: Path) -> QGraph:
    """The float32 graph of a Keras model. Raises NetsukeError that names the layer that cannot be imported."""
    file = read_file(path)
    model = file.config.get("config")
    layers = model.get("layers") if isinstance(model, dict) else model  # Keras 2.2's Sequential is a list of layers
    kind = file.config.get("class_name")
    well = isinstance(layers, list) and all(
        isinstance(i, dict) and isinstance(i.get("config"), dict) and isinstance(i.get("class_name"), str)
        for i in layers
    )
    if kind not in ("Sequential", "Functional", "Model") or not well or not layers:
        raise NetsukeError(f"read {path}", f"the file describes a {kind!r} model", "Sequential or functional layers")
    reader = Reader(path, file, layers)
    try:
        outputs = reader.chain() if kind == "Sequential" else reader.functional(model)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as e:
        raise reader.b.refuse(
            reader.at, f"its description does not fit ({type(e).__name__}: {str(e)[:80]})",
            "what Keras writes",
        ) from None  # fmt: skip
    return reader.b.finish(outputs, {"source": path.name, "framework": f"keras {file.version}"})


class Reader:
    """`at` is the layer in work, for errors."""

    def __init__(self, path: Path, file: KerasFile, layers: list[dict[str, Any]]):
        self.b = Builder(path.stem, f"read {path.name}", channels_first=False)
        self.version, self.weights, self.layers, self.at = file.version, file.weights, layers, ""

    def chain(self) -> list[Value]:
        first = self.layers[0]["config"]
        self.at = str(first.get("name", ""))
        value = self.b.input("input", self._input_shape(first))
        for layer in self.layers:
            if layer["class_name"] != "InputLayer":
                value = self._apply(layer, [value])
        return [value]

    def functional(self, model: dict[str, Any]) -> list[Value]:
        done: dict[str, Value] = {}
        waiting = list(self.layers)
        while waiting:
            ready = next((i for i in waiting if all(s in done for s in self._sources(i))), None)
            if ready is None:
                names = ", ".join(str(i.get("name")) for i in waiting)
                raise NetsukeError(
                    self.b.asked, f"the layers {names} wait for each other or for a layer that is missing"
                )
            waiting.remove(ready)
            name = ready["config"]["name"]
            if ready["class_name"] == "InputLayer":
                self.at = name
                done[name] = self.b.input(name, self._input_shape(ready["config"]))
            else:
                done[name] = self._apply(ready, [done[s] for s in self._sources(ready)])
        self.b.graph.inputs = tuple(done[n].index for n in _ends(model["input_layers"]))
        return [done[n] for n in _ends(model["output_layers"])]

    def _sources(self, layer: dict[str, Any]) -> list[str]:
        """Names of the layers whose outputs this one takes."""
        nodes = layer.get("inbound_nodes") or []
        self.at = str(layer["config"].get("name"))
        if len(nodes) > 1:
            raise self.b.refuse(
                self.at,
                f"it is used {len(nodes)} times",
                "layers used once",
                "give each use its own layer",
            )
        return [name for node in nodes for name in _inbound(node)]

    def _input_shape(self, config: dict[str, Any]) -> tuple[int, ...]:
        """(1, …) as the file says it, or as the first dense layer's weights imply it."""
        shape = config.get("batch_input_shape") or config.get("batch_shape")
        weights = self.weights.get(self.at, [])
        if shape is None and self.layers[0]["class_name"] == "Dense" and weights:
            shape = (None, weights[0].shape[0])
        if shape is None:
            raise self.b.refuse(
                self.at,
                "the file does not say the shape of its input",
                "a shape",
                "build the model with keras.Input(shape) and save again",
            )
        if any(n is None for n in shape[1:]):
            raise self.b.refuse(
                self.at, f"its input has the open shape {tuple(shape)}", "fixed sizes (a chip's memory is planned beforehand)",
                "rebuild the model with a fixed length, e.g. keras.Input((50, features)), load its weights, save it",
            )  # fmt: skip
        if shape[0] not in (None, 1):
            raise self.b.refuse(
                self.at, f"its input has a batch of {shape[0]}", "a batch of 1", "build it with batch_size=None"
            )
        return (1, *map(int, shape[1:]))

    def _apply(self, layer: dict[str, Any], values: list[Value]) -> Value:
        kind, config = layer["class_name"], layer["config"]
        self.at = name = str(config["name"])
        if kind in IGNORED:
            return values[0]
        if kind not in LAYERS:
            known = ", ".join(sorted((*LAYERS, *IGNORED)))
            raise self.b.refuse(
                name, f"it is of the kind {kind}, which is not imported", known,
                "replace it, or export the model as an int8 .tflite",
            )  # fmt: skip
        if config.get("data_format") == "channels_first":
            raise self.b.refuse(
                name, "its data is channels_first", "channels_last",
                "rebuild the model with data_format='channels_last' (weights are the same)",
            )  # fmt: skip
        value = LAYERS[kind](self, name, config, values, self.weights.get(name, []))
        return self.activation(value, config.get("activation", "linear"), name) if kind not in RECURRENT else value

    def activation(self, v: Value, activation: Any, name: str) -> Value:
        function = self.function(activation, name, ("softmax",))
        named = f"{name}.{function}"
        return self.b.softmax(v, -1, named) if function == "softmax" else self.b.unary(v, function, named)

    def function(self, activation: Any, name: str, more: tuple[str, ...] = ()) -> str:
        """Our name of an activation."""
        if isinstance(activation, dict):  # {"class_name": "function", "config": "relu", …}
            activation = activation.get("config")
        if activation is None:
            return "linear"
        if activation == "hard_sigmoid":
            return "hard_sigmoid" if self.version < 3 else "hard_sigmoid6"
        if activation in more or not isinstance(activation, str):
            return str(activation)
        if activation not in FUNCTIONS:
            raise self.b.refuse(
                name, f"its activation {activation!r} is not imported",
                ", ".join((*FUNCTIONS, "hard_sigmoid", *more)),
            )  # fmt: skip
        return FUNCTIONS[activation]

    def take(self, name: str, weights: Weights, *ranks: int) -> Weights:
        """The layer's weights, as many as there are ranks, each of its number of axes."""
        if [w.ndim for w in weights] != list(ranks):
            raise self.b.refuse(
                name, f"its weights have the shapes {[w.shape for w in weights]}",
                f"{len(ranks)} arrays of {', '.join(map(str, ranks))} axes",
            )  # fmt: skip
        return weights


def _inbound(node: Any) -> list[str]:
    """Layer names in one inbound node: Keras 2's [[name, 0, 0, {}], …] or Keras 3's {"args": [tensors]}."""
    if isinstance(node, dict):
        if node.get("class_name") == "__keras_tensor__":
            return [node["config"]["keras_history"][0]]
        return [n for part in node.get("args", []) for n in _inbound(part)]
    if isinstance(node, list):
        return [node[0]] if node and isinstance(node[0], str) else [n for part in node for n in _inbound(part)]
    return []


def _ends(names: Any) -> list[str]:
    """["a", 0, 0], [["a", 0, 0], …] or {"x": ["a", 0, 0]} as layer names."""
    if isinstance(names, dict):
        names = list(names.values())
    return [names[0]] if names and isinstance(names[0], str) else [n[0] for n in names]

"""Writes small Keras files for tests, as Keras lays them out."""

import io
import json
import zipfile

import h5py
import numpy as np


def layer(kind, name, **config):
    return {"class_name": kind, "config": {"name": name, **config}}


def sequential(*layers):
    return {"class_name": "Sequential", "config": {"name": "m", "layers": list(layers)}}


def write_hdf5(path, model, weights, version="2.11.0"):
    """weights: {layer: {name: array}} in Keras' order."""
    with h5py.File(path, "w") as f:
        f.attrs["keras_version"] = version
        f.attrs["model_config"] = json.dumps(model)
        group = f.create_group("model_weights")
        group.attrs["layer_names"] = [n.encode() for n in weights]
        for name, arrays in weights.items():
            g = group.create_group(name)
            g.attrs["weight_names"] = [f"{name}/{k}:0".encode() for k in arrays]
            for key, array in arrays.items():
                g[f"{name}/{key}:0"] = np.asarray(array, np.float32)
    return path


def write_archive(path, model, groups, version="3.5.0"):
    """groups: {"dense/vars": [arrays], "gru/cell/vars": [arrays], …} below layers/."""
    data = io.BytesIO()
    with h5py.File(data, "w") as f:
        for key, arrays in groups.items():
            for i, array in enumerate(arrays):
                f[f"layers/{key}/{i}"] = np.asarray(array, np.float32)
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("config.json", json.dumps(model))
        z.writestr("metadata.json", json.dumps({"keras_version": version}))
        z.writestr("model.weights.h5", data.getvalue())
    return path

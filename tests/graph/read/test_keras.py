"""Keras files: the same numbers as Keras, both forms, and refusals that name the layer."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

h5py = pytest.importorskip("h5py", reason="h5py is not installed (extra mcu)")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from netsuke.errors import NetsukeError  # noqa: E402
from netsuke.graph import Interpreter  # noqa: E402
from netsuke.graph.ops.elementwise import FUNCTIONS  # noqa: E402
from netsuke.graph.read.keras import read_keras  # noqa: E402
from tests.graph.read.keras_writer import layer, sequential, write_archive, write_hdf5  # noqa: E402

DATA = Path(os.environ.get("NETSUKE_DATA", "../shared/data")) / "nn4mc"
RNG = np.random.default_rng(0)
KERAS2 = {  # what tf_keras 2.21 answers to np.linspace(-1, 1)
    "fk_gru10_jan_10_2022.hdf5": [0.0, 0.08920971, 0.0004538968],
    "fk_gru5_jul_4_2021.hdf5": [0.006620267, 0.0004243009, 0.01812004],
    "hasel_fk_jan_10_2022.hdf5": [-0.02810124, -0.001312184, 0.01471328],
    "hasel_fk_jun_6_2022.hdf5": [-0.004048274, -0.07818498, -0.08713636],
    "hasel_fk_mar_18_2022.hdf5": [-0.04207147, -0.01328554, -0.01006139],
    "layer_Conv1d_pooling.hdf5": [5.538256, -5.536989],
    "layer_GRU.hdf5": [0.04019135],
    "layer_LSTM.hdf5": [0.1509728],
    "layer_simpleRNN.hdf5": [0.382041],
    "layer_weights.best.hdf5": [5.538571, 3.908133, 1.349889],
    "signals_gru100_jun_21_2021.hdf5": [0.6976298, 0.3555106, 0.1717394, 0.3824394, 0.4901158, 0.4385677],
    "tendon_sys_id.hdf5": [-0.06444651, -0.01120037, 0.01001846],
}


def weights(*shape, scale=0.5):
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def run(graph, x):
    return Interpreter(graph).run(np.asarray(x, np.float32))[0]


@pytest.mark.skipif(not DATA.is_dir(), reason="nn4mc is not in NETSUKE_DATA")
@pytest.mark.parametrize("name", KERAS2)
def test_the_bundled_files_answer_as_in_keras(name):
    graph = read_keras(DATA / name)
    shape = graph.tensors[graph.inputs[0]].shape
    y = run(graph, np.linspace(-1, 1, np.prod(shape)).reshape(shape))
    assert np.abs(y[0] - KERAS2[name]).max() < 1e-5


def recurrent(tmp_path, kind, units, w, u, b, features, version="2.11.0", **config):
    names = dict(zip(("kernel", "recurrent_kernel", "bias"), (w, u, b)))
    config = {"units": units, "activation": "tanh", "batch_input_shape": [None, 6, features], **config}
    return read_keras(
        write_hdf5(tmp_path / "r.h5", sequential(layer(kind, "cell", **config)), {"cell": names}, version)
    )


def test_lstm_equals_pytorch(tmp_path):
    w, u, b = weights(3, 16), weights(4, 16), weights(16)
    module = torch.nn.LSTM(3, 4, batch_first=True)
    for target, value in ((module.weight_ih_l0, w.T), (module.weight_hh_l0, u.T), (module.bias_ih_l0, b)):
        target.data = torch.tensor(value)
    module.bias_hh_l0.data.zero_()
    x = weights(5, 6, 3, scale=2)
    graph = recurrent(tmp_path, "LSTM", 4, w, u, b, 3, recurrent_activation="sigmoid", return_sequences=True)
    assert np.abs(run(graph, x) - module(torch.tensor(x))[0].detach().numpy()).max() < 1e-6
    assert graph.macs() == 6 * 16 * (3 + 4)


def test_gru_with_the_reset_after_equals_pytorch(tmp_path):
    w, u, b = weights(3, 12), weights(4, 12), weights(2, 12)
    module = torch.nn.GRU(3, 4, batch_first=True)

    def gates(a):  # PyTorch's order is r, z, n
        z, r, h = np.split(a, 3)
        return torch.tensor(np.concatenate((r, z, h)))

    for target, value in zip(
        (module.weight_ih_l0, module.weight_hh_l0, module.bias_ih_l0, module.bias_hh_l0), (w.T, u.T, b[0], b[1])
    ):
        target.data = gates(value)
    x = weights(5, 6, 3, scale=2)
    graph = recurrent(tmp_path, "GRU", 4, w, u, b, 3, recurrent_activation="sigmoid", reset_after=True)
    assert np.abs(run(graph, x) - module(torch.tensor(x))[0][:, -1].detach().numpy()).max() < 1e-6


def test_gru_with_the_reset_before_equals_keras(tmp_path):
    w, u, b = (np.linspace(-1, 1, n).reshape(s) for n, s in ((18, (3, 6)), (12, (2, 6)), (6, (6,))))
    config = {"reset_after": False, "recurrent_activation": "sigmoid", "return_sequences": True}
    graph = recurrent(tmp_path, "GRU", 2, w, u, b, 3, batch_input_shape=[None, 4, 3], **config)
    keras = [[0.0671815, 0.0218208], [0.3833192, 0.3714328], [0.8030764, 0.7610349], [0.9702418, 0.9513512]]
    assert np.abs(run(graph, np.linspace(-2, 2, 12).reshape(1, 4, 3))[0] - keras).max() < 1e-6


def test_simple_rnn_equals_pytorch(tmp_path):
    w, u, b = weights(3, 4), weights(4, 4), weights(4)
    module = torch.nn.RNN(3, 4, batch_first=True)
    for target, value in ((module.weight_ih_l0, w.T), (module.weight_hh_l0, u.T), (module.bias_ih_l0, b)):
        target.data = torch.tensor(value)
    module.bias_hh_l0.data.zero_()
    x = weights(5, 6, 3, scale=2)
    graph = recurrent(tmp_path, "SimpleRNN", 4, w, u, b, 3)
    assert np.abs(run(graph, x) - module(torch.tensor(x))[0][:, -1].detach().numpy()).max() < 1e-6


def test_the_version_decides_what_a_hard_sigmoid_is(tmp_path):
    x = np.linspace(-4, 4, 8).astype(np.float32).reshape(1, 8)
    model = sequential(layer("Dense", "d", activation="hard_sigmoid", batch_input_shape=[None, 8]))
    for version, function in (("2.4.0", "hard_sigmoid"), ("3.1.0", "hard_sigmoid6")):
        path = write_hdf5(tmp_path / "h.h5", model, {"d": {"kernel": np.eye(8), "bias": np.zeros(8)}}, version)
        assert np.allclose(run(read_keras(path), x), FUNCTIONS[function](x), atol=1e-6)


def small_cnn():
    """A functional model with two branches, its weights, and the same in PyTorch."""
    k, d, n, f = weights(3, 3, 2, 4), weights(3, 3, 4, 1), weights(4, 4), weights(2 * 4 * 4 * 4, 5)
    gamma, beta, mean, variance = 1 + weights(4, scale=0.1), weights(4), weights(4), 1 + weights(4, scale=0.1) ** 2

    def at(kind, name, *inputs, **config):
        return layer(kind, name, **config) | {"name": name, "inbound_nodes": [[[i, 0, 0, {}] for i in inputs]]}

    layers = [
        layer("InputLayer", "x", batch_input_shape=[None, 8, 8, 2]) | {"name": "x", "inbound_nodes": []},
        at("Conv2D", "c", "x", kernel_size=[3, 3], strides=[2, 2], padding="same", use_bias=False),
        at("BatchNormalization", "bn", "c", axis=[3], epsilon=1e-3),
        at("ReLU", "r", "bn", max_value=6.0),
        at("DepthwiseConv2D", "dw", "r", kernel_size=[3, 3], padding="same", use_bias=False, activation="relu"),
        at("Conv2D", "pw", "dw", kernel_size=[1, 1], use_bias=False),
        at("Add", "sum", "r", "pw"),
        at("Concatenate", "cat", "sum", "r", axis=-1),
        at("Flatten", "flat", "cat"),
        at("Dense", "d", "flat", use_bias=False, activation="softmax"),
    ]
    config = {"layers": layers, "input_layers": [["x", 0, 0]], "output_layers": [["d", 0, 0]]}
    arrays = {
        "c": {"kernel": k}, "bn": {"gamma": gamma, "beta": beta, "moving_mean": mean, "moving_variance": variance},
        "dw": {"depthwise_kernel": d}, "pw": {"kernel": n[None, None]}, "d": {"kernel": f},
    }  # fmt: skip

    def reference(x):
        t = torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float64)
        k64, d64, n64, f64 = (torch.tensor(a, dtype=torch.float64) for a in (k, d, n, f))
        t = F.conv2d(F.pad(t, (0, 1, 0, 1)), k64.permute(3, 2, 0, 1), stride=2)  # TensorFlow's "same" on 8, stride 2
        t = F.batch_norm(t, *(torch.tensor(a, dtype=torch.float64) for a in (mean, variance, gamma, beta)), eps=1e-3)
        r = t.clamp(0, 6)
        t = F.conv2d(r, d64.permute(2, 3, 0, 1), padding=1, groups=4).relu()
        t = torch.cat((r + F.conv2d(t, n64.T[:, :, None, None]), r), 1)
        return (t.permute(0, 2, 3, 1).flatten(1) @ f64).softmax(1).numpy()

    return {"class_name": "Functional", "config": config}, arrays, reference


def test_a_functional_cnn_equals_pytorch_and_its_norm_is_folded(tmp_path):
    model, arrays, reference = small_cnn()
    graph = read_keras(write_hdf5(tmp_path / "f.h5", model, arrays))
    x = weights(3, 8, 8, 2, scale=2)
    assert np.abs(run(graph, x) - reference(x)).max() < 1e-6
    kinds = [op.kind for op in graph.ops]
    assert kinds == ["conv2d", "depthwise2d", "conv2d", "add", "concat", "reshape", "dense", "softmax"]
    assert graph.ops[0].attrs["high"] == 6.0 and graph.ops[0].attrs["pad"] == (0, 1, 0, 1)
    assert {t.name for _, t in graph.constants()} >= {"c.weight", "c.bias", "dw.weight", "d.weight"}


def test_an_archive_is_the_same_model(tmp_path):
    w, u, b, d = weights(3, 12), weights(4, 12), weights(2, 12), weights(4, 2)
    config = {"activation": "tanh", "recurrent_activation": "sigmoid", "reset_after": True}
    model = sequential(
        layer("InputLayer", "in", batch_shape=[None, 6, 3]),
        layer("GRU", "g", **config),
        layer("Dense", "first", use_bias=False),
        layer("Dense", "second", use_bias=False),
    )
    e = weights(2, 2)
    groups = {"gru/cell/vars": [w, u, b], "dense/vars": [d], "dense_1/vars": [e]}
    a = read_keras(write_archive(tmp_path / "a.keras", model, groups))
    names = {"g": {"kernel": w, "recurrent_kernel": u, "bias": b}, "first": {"kernel": d}, "second": {"kernel": e}}
    h = read_keras(write_hdf5(tmp_path / "a.h5", model, names))
    x = weights(2, 6, 3)
    assert np.array_equal(run(a, x), run(h, x)) and np.abs(run(a, x)).max() > 0.01


def test_sequences_are_convolved_and_pooled(tmp_path):
    k, d = weights(3, 2, 4), weights(4, 1)
    model = sequential(
        layer("Conv1D", "c", kernel_size=[3], padding="causal", dilation_rate=[2], use_bias=False,
              batch_input_shape=[None, 9, 2], activation="relu"),
        layer("MaxPooling1D", "p", pool_size=[2], strides=None, padding="valid"),
        layer("GlobalAveragePooling1D", "g"), layer("Dense", "d", use_bias=False),
    )  # fmt: skip
    graph = read_keras(write_hdf5(tmp_path / "s.h5", model, {"c": {"kernel": k}, "d": {"kernel": d}}))
    x = weights(3, 9, 2)
    t = F.conv1d(F.pad(torch.tensor(x).transpose(1, 2), (4, 0)), torch.tensor(k).permute(2, 1, 0), dilation=2).relu()
    want = F.max_pool1d(t, 2).mean(2) @ torch.tensor(d)
    assert np.abs(run(graph, x) - want.numpy()).max() < 1e-6


GRU = {"batch_input_shape": [None, 6, 3], "activation": "tanh", "recurrent_activation": "sigmoid"}


@pytest.mark.parametrize(
    "layers, says",
    [
        ([layer("GRU", "g", **GRU, stateful=True)], "'g'.*stateful"),
        ([layer("LSTM", "g", **GRU, go_backwards=True)], "'g'.*go_backwards"),
        ([layer("GRU", "g", **{**GRU, "batch_input_shape": [None, None, 3]})], "'g'.*open shape.*fixed length"),
        ([layer("Masking", "m", batch_input_shape=[None, 6, 3])], "'m'.*Masking"),
        ([layer("Embedding", "e", batch_input_shape=[None, 6], mask_zero=True)], "'e'.*Embedding"),
        ([layer("Lambda", "l", batch_input_shape=[None, 6], function="__import__('os')")], "'l'.*Lambda"),
        ([layer("Conv2D", "c", data_format="channels_first", batch_input_shape=[None, 3, 8, 8])], "channels_first"),
        ([layer("Dense", "d", activation="gelu", batch_input_shape=[None, 2], use_bias=False)], "'d'.*gelu"),
        ([layer("Dense", "d", batch_input_shape=[None, 3], use_bias=False)], "'d'.*do not fit"),
        ([layer("Dense", "d", batch_input_shape=[None, 2])], "'d'.*shapes"),
        ([layer("Dense", "d", batch_input_shape=[8, 2], use_bias=False)], "'d'.*batch of 8"),
        ([layer("Flatten", "f")], "'f'.*does not say the shape"),
        ([layer("Reshape", "r", batch_input_shape=[None, 6], target_shape=[4])], "'r'.*it makes"),
        ([layer("Reshape", "r", batch_input_shape=[None, 6])], "'r'.*target_shape"),
        (
            [layer("MaxPooling1D", "p", batch_input_shape=[None, 2, 3], pool_size=[4], padding="valid")],
            "'p'.*its result",
        ),
        ([layer("BatchNormalization", "b", axis=1, batch_input_shape=[None, 4, 3])], "'b'.*axis"),
        ([], "Sequential"),
    ],
)
def test_refusals_name_the_layer(tmp_path, layers, says):
    path = write_hdf5(tmp_path / "x.h5", sequential(*layers), {"d": {"kernel": np.ones((2, 2))}})
    with pytest.raises(NetsukeError, match=says):
        read_keras(path)


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = sequential(layer("Dense", "d", batch_input_shape=[None, 2], use_bias=False))
    path = write_hdf5(tmp_path / "x.h5", model, {"d": {"kernel": [[np.nan], [1]]}})
    with pytest.raises(NetsukeError, match=r"d\.weight.*NaN"):
        read_keras(path)


def test_hostile_files(tmp_path):
    model = sequential(layer("Dense", "d", batch_input_shape=[None, 2], use_bias=False))
    good = write_hdf5(tmp_path / "good.h5", model, {"d": {"kernel": np.ones((2, 1))}})
    read_keras(good)
    cut, other = tmp_path / "cut.h5", tmp_path / "other.h5"
    cut.write_bytes(good.read_bytes()[:900])
    other.write_bytes(b"hello")
    outside = write_hdf5(tmp_path / "outside.h5", model, {"d": {"kernel": np.ones((2, 1))}})
    with h5py.File(outside, "a") as f:
        del f["model_weights/d/d/kernel:0"]
        f["model_weights/d/d/kernel:0"] = h5py.ExternalLink("good.h5", "model_weights/d/d/kernel:0")
    words = write_hdf5(tmp_path / "words.h5", model, {"d": {"kernel": np.ones((2, 1))}})
    with h5py.File(words, "a") as f:
        f.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": [3]})
    bare = tmp_path / "bare.h5"
    with h5py.File(bare, "w") as f:
        f["d/kernel"] = np.ones((2, 1))
    archive = write_archive(tmp_path / "a.keras", model, {"dense/vars": [np.ones((2, 1))]})
    short = tmp_path / "short.keras"
    short.write_bytes(archive.read_bytes()[:200])
    for path, says in (
        (cut, "truncated|damaged"), (other, "no Keras model"), (outside, "a link"), (words, "describes"),
        (bare, "without the model"), (short, "archive"), (tmp_path / "absent.h5", "No such file"),
    ):  # fmt: skip
        with pytest.raises(NetsukeError, match=says):
            read_keras(path)

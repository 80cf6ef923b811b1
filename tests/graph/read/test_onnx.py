"""ONNX files: the same numbers as onnx's own evaluator, and refusals that name the operator."""

import sys

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra mcu)")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from netsuke.errors import NetsukeError  # noqa: E402
from netsuke.graph import Interpreter  # noqa: E402
from netsuke.graph.read.onnx import read_onnx  # noqa: E402

RNG = np.random.default_rng(0)


def weights(*shape, scale=0.4):
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def node(kind, inputs, output, **attrs):
    outputs = output if isinstance(output, list) else [output]
    return helper.make_node(kind, inputs.split(), outputs, name=outputs[0], **attrs)


def model(nodes, constants, shape, outputs=("y",), opset=17):
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def save(path, m):
    path.write_bytes(m.SerializeToString())
    return path


def compare(tmp_path, nodes, constants, shape, outputs=("y",), opset=17):
    m = model(nodes, constants, shape, outputs, opset)
    x = weights(*[d if isinstance(d, int) else 1 for d in shape], scale=2)
    want = ReferenceEvaluator(m).run(None, {"x": x})
    graph = read_onnx(save(tmp_path / "m.onnx", m))
    for got, ref in zip(Interpreter(graph).run(x), want, strict=True):
        assert got.shape == ref.shape and np.abs(got - ref).max() < 1e-5
    return graph


def test_a_cnn_needs_one_transpose_and_no_norm(tmp_path):
    constants = {
        "w": weights(8, 3, 3, 3), "g": 1 + weights(8, scale=0.1), "b": weights(8), "m": weights(8),
        "v": 1 + weights(8, scale=0.1) ** 2, "d": weights(8, 1, 3, 3), "p": weights(8, 8, 1, 1), "pb": weights(8),
        "zero": np.float32(0), "six": np.float32(6), "f": weights(5, 8 * 3 * 2), "fb": weights(5),
        "shape": np.array([0, -1]),
    }  # fmt: skip
    nodes = [
        node("Conv", "x w", "c", strides=[2, 2], pads=[1, 1, 1, 1]), node("BatchNormalization", "c g b m v", "n"),
        node("Clip", "n zero six", "r"), node("Conv", "r d", "dw", group=8, auto_pad="SAME_UPPER"),
        node("Relu", "dw", "dr"), node("Conv", "dr p pb", "pw"), node("Add", "pw r", "s"),
        node("MaxPool", "s", "q", kernel_shape=[2, 2], strides=[2, 2]), node("Reshape", "q shape", "flat"),
        node("Gemm", "flat f fb", "l", transB=1, alpha=0.5, beta=2.0), node("Softmax", "l", "y", axis=1),
    ]  # fmt: skip
    graph = compare(tmp_path, nodes, constants, ("N", 3, 12, 8))
    kinds = [op.kind for op in graph.ops]
    assert kinds == ["transpose", "conv2d", "depthwise2d", "conv2d", "add", "maxpool2d", "reshape", "dense", "softmax"]
    assert graph.ops[1].attrs["high"] == 6.0 and "c.weight" in {t.name for t in graph.tensors}


def test_moves_and_arithmetic(tmp_path):
    constants = {
        "two": np.float32(2), "c": weights(1, 4, 1, 1), "starts": np.array([1]), "ends": np.array([4]),
        "axes": np.array([3]), "pads": np.array([0, 0, 1, 0, 0, 0, 0, 2]), "sizes": np.array([3, 5]), "w": weights(6, 7),
        "one": np.array([1]),
    }  # fmt: skip
    nodes = [
        node("Mul", "x c", "a"), node("Sub", "two a", "b"), node("Div", "b two", "e"), node("Pad", "e pads", "p"),
        node("Slice", "p starts ends axes", "s"), node("Concat", "s s", "k", axis=1),
        node("Split", "k sizes", ["k1", "k2"], axis=1),
        node("Transpose", "k2", "t", perm=[0, 2, 3, 1]), node("Sigmoid", "t", "y1"),
        node("ReduceMean", "k1", "y2", axes=[2, 3], keepdims=0), node("HardSigmoid", "k1", "h", alpha=0.3, beta=0.4),
        node("AveragePool", "h", "y3", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
        node("GlobalAveragePool", "k2", "gp"), node("Mul", "k2 gp", "z"), node("Softmax", "z", "y4", axis=1),
        node("Unsqueeze", "x one", "u"), node("Squeeze", "u one", "v"), node("MatMul", "v w", "y5"),
        node("LeakyRelu", "v", "y6", alpha=0.3), node("Neg", "v", "ng"), node("HardSwish", "ng", "y7"),
    ]  # fmt: skip
    compare(tmp_path, nodes, constants, (1, 4, 5, 6), ("y1", "y2", "y3", "y4", "y5", "y6", "y7"))


def test_shape_arithmetic_is_computed_and_sequences_are_convolved(tmp_path):
    constants = {
        "w": weights(6, 3, 5),
        "b": weights(6),
        "zero": np.array(0),
        "minus": np.array([-1]),
        "f": weights(60, 2),
    }
    nodes = [
        node("Conv", "x w b", "c", pads=[2, 2], strides=[2]), node("Relu", "c", "r"),
        node("Shape", "r", "s"), node("Gather", "s zero", "n"), node("Unsqueeze", "n ax", "n1"),
        node("Concat", "n1 minus", "to", axis=0), node("Reshape", "r to", "flat"), node("MatMul", "flat f", "m"),
        node("Add", "m fb", "y"),
    ]  # fmt: skip
    graph = compare(tmp_path, nodes, constants | {"ax": np.array([0]), "fb": weights(2)}, (1, 3, 20))
    assert [op.kind for op in graph.ops if op.kind not in ("reshape", "transpose")] == ["conv2d", "dense"]


def test_old_opsets(tmp_path):
    nodes = [
        node("Clip", "x", "c", min=-0.5, max=1.5), node("Dropout", "c", "d"), node("Flatten", "d", "f"),
        node("Softmax", "f", "y"),
    ]  # fmt: skip
    compare(tmp_path, nodes, {}, (1, 2, 3), opset=10)


BIG = np.array([1 << 30, 1 << 30])
COLUMN = {"a": np.zeros((1 << 12, 1), np.float32), "b": np.zeros((1, 1 << 12), np.float32)}


@pytest.mark.parametrize(
    ("kind", "inputs", "constants", "says"),
    [
        ("ConstantOfShape", "n", {"n": BIG}, "'c'.*elements"),
        ("Expand", "x0 n", {"x0": np.float32(1), "n": BIG}, "'c'.*elements"),
        ("Tile", "x0 n", {"x0": np.ones((1, 1), np.float32), "n": BIG}, "'c'.*elements"),
        ("Range", "z n one", {"z": np.array(0), "n": np.array(1 << 60), "one": np.array(1)}, "'c'.*elements"),
        ("Range", "z n one", {"z": np.array(0), "n": np.array(9), "one": np.array(0)}, "'c'.*elements"),
        ("Add", "a b", COLUMN, "'c'.*1.68e.07 elements"),
        ("Gather", "a i", COLUMN | {"i": np.zeros(1 << 23, np.int8)}, "'c'.*elements"),
        ("MatMul", "a b", COLUMN, "'c'.*not done here"),
        ("Reshape", "a n", COLUMN | {"n": np.array([3, 5])}, "'c'.*do not fit"),
        ("Gather", "a i", COLUMN | {"i": np.array([1 << 40])}, "'c'.*do not fit"),
        ("Concat", "a b", COLUMN, "'c'"),
    ],
)
def test_constants_are_computed_within_limits(tmp_path, kind, inputs, constants, says):
    m = model([node(kind, inputs, "c"), node("Add", "x c", "y")], constants, (1, 4))
    with pytest.raises(NetsukeError, match=says):
        read_onnx(save(tmp_path / "x.onnx", m))


@pytest.mark.parametrize(
    ("kind", "inputs", "attrs"),
    [
        ("Concat", "x x", {"axis": 4}), ("Softmax", "x", {"axis": -5}), ("Split", "x n", {"axis": 9}),
        ("Squeeze", "x nine", {}), ("Unsqueeze", "x nine", {}), ("ReduceMean", "x", {"axes": [2, 7]}),
        ("Transpose", "x", {"perm": [0, 1, 2, 7]}), ("Slice", "x n n nine", {}), ("Pad", "x n2 none nine", {}),
    ],
)  # fmt: skip
def test_an_axis_that_is_not_there_is_refused(tmp_path, kind, inputs, attrs):
    constants = {"n": np.array([1]), "nine": np.array([9]), "n2": np.array([1, 1]), "none": np.float32(0)}
    m = model([node(kind, inputs, "y", **attrs)], constants, (1, 1, 4, 4))
    with pytest.raises(NetsukeError, match=r"'y'.*the axis -?[4579] of [456]"):
        read_onnx(save(tmp_path / "x.onnx", m))


def test_a_constant_of_an_operator_lies_in_the_file(tmp_path):
    value = numpy_helper.from_array(np.ones(4, np.float32), "outside")
    value.ClearField("raw_data")
    value.data_location = TensorProto.EXTERNAL
    entry = value.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"
    m = model([helper.make_node("Constant", [], ["c"], "c", value=value), node("Add", "x c", "y")], {}, (1, 4))
    with pytest.raises(NetsukeError, match="'outside' lie in another file"):
        read_onnx(save(tmp_path / "x.onnx", m))


W = {"w": weights(2, 3, 3, 3)}


@pytest.mark.parametrize(
    "nodes, constants, shape, says",
    [
        ([node("LSTM", "x w w", ["h", "y"], hidden_size=2)], W, (1, 3, 8, 8), "'h'.*LSTM"),
        ([node("Erf", "x", "y")], {}, (1, 4), "'y'.*Erf"),
        ([node("MatMul", "x x", "y")], {}, (1, 1), "'y'.*two activations"),
        ([node("Conv", "x w", "y")], W, (1, 3, "H", 8), r"'x'.*\?.*fixed"),
        ([node("Conv", "x w", "y")], W, (4, 3, 8, 8), "'x'.*batch of 1"),
        ([node("Conv", "x w", "y")], W, (1, 4, 8, 8), "'y'.*do not fit"),
        ([node("Conv", "x w", "y")], W, (1, 3, 2, 8), "'y'.*window"),
        ([node("Conv", "x v", "y")], W, (1, 3, 8, 8), "'y'.*'v'"),
        (
            [node("QuantizeLinear", "x s z", "y")],
            {"s": np.float32(1), "z": np.int8(0)},
            (1, 4),
            "'y'.*quantized.*--data",
        ),
        ([node("Pad", "x p", "y", mode="reflect")], {"p": np.array([0, 1, 0, 1])}, (1, 4), "'y'.*zeros"),
        ([node("Relu", "w", "y")], W, (1, 4), "'y' does not depend"),
        ([node("Relu", "x", "z")], {}, (1, 4), "'y' does not depend"),
        ([node("Mul", "x w", "y")], {"w": np.array([np.nan], np.float32)}, (1, 4), "NaN"),
        ([], {}, (1, 4), "no operators"),
        ([helper.make_node("FusedConv", ["x"], ["y"], "y", domain="com.microsoft")], {}, (1, 4), "com.microsoft"),
    ],
)
def test_refusals_name_the_operator(tmp_path, nodes, constants, shape, says):
    with pytest.raises(NetsukeError, match=says):
        read_onnx(save(tmp_path / "x.onnx", model(nodes, constants, shape)))


def test_weights_outside_the_file_and_damaged_files(tmp_path):
    m = model([node("MatMul", "x w", "y")], {"w": weights(4, 2)}, (1, 4))
    data = m.SerializeToString()
    tensor = m.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"
    with pytest.raises(NetsukeError, match="'w' lie in another file"):
        read_onnx(save(tmp_path / "outside.onnx", m))
    for content in (data[: len(data) // 2], b"hello", b""):
        path = tmp_path / "cut.onnx"
        path.write_bytes(content)
        with pytest.raises(NetsukeError):
            read_onnx(path)


def test_a_missing_package_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(NetsukeError, match="package onnx"):
        read_onnx(tmp_path / "x.onnx")

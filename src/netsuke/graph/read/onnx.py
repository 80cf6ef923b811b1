"""Reads float ONNX models with the package onnx (only its parser). The input keeps the file's axes (1, C, H, W).

Shapes are fixed: a free batch becomes 1, any other free size is refused. Whatever depends on constants only (the shape
arithmetic that exporters write) is computed by onnx's reference evaluator: the operators of FOLDED only, and only where the
result's size is known to be small before it is computed. External data, custom domains and control flow are
refused. Quantized models are refused, too: the float model is quantized here, with calibration data.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.graph.ir import QGraph
from netsuke.graph.read.layout import Builder, Value
from netsuke.graph.read.onnx_ops import OPERATORS
from netsuke.models.files import reading

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto

LARGEST = 1 << 29  # bytes
MOST_FOLDED = 1 << 22  # elements of a computed constant
BROADCAST = ("Abs", "Add", "And", "Cast", "Ceil", "Clip", "Div", "Equal", "Exp", "Floor", "Greater", "GreaterOrEqual", "Less",
             "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Round", "Sigmoid",
             "Sign", "Sqrt", "Sub", "Tanh", "Where")  # fmt: skip
MOVED = ("Flatten", "Identity", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Size", "Slice",
         "Split", "Squeeze", "Transpose", "Unsqueeze")  # fmt: skip  # no larger than their first input
FOLDED = (*BROADCAST, *MOVED, "Concat", "Constant", "ConstantOfShape", "Expand", "Gather", "Range", "Shape", "Tile")
QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger",
             "MatMulInteger")  # fmt: skip


def read_onnx(path: Path) -> QGraph:
    """The float32 graph of an ONNX model. Raises NetsukeError that names the operator that cannot be imported."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise NetsukeError(
            f"read {path}", "the package onnx is not installed", "", "pip install 'netsuke[mcu]'"
        ) from None  # fmt: skip
    path = Path(path)
    with reading(path):
        if path.stat().st_size > LARGEST:
            raise NetsukeError(f"read {path}", f"{path.stat().st_size} bytes", f"at most {LARGEST}")
        data = path.read_bytes()
    try:
        model = onnx.load_model_from_string(data)
    except (DecodeError, ValueError, TypeError) as e:
        raise NetsukeError(f"read {path}", f"not an ONNX model ({str(e)[:80]})", "a whole .onnx file") from None
    if not model.graph.node or not model.graph.output:
        raise NetsukeError(f"read {path}", "the model has no operators or no output", "a whole .onnx file")
    return _Reader(path, model).graph()


class _Reader:
    """`known` holds, by the file's names, a Value or a constant array."""

    def __init__(self, path: Path, model: ModelProto):
        self.path, self.model = path, model
        self.b = Builder(path.stem, f"read {path.name}", channels_first=True, noun="operator")
        self.opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)
        self.known: dict[str, Value | np.ndarray] = {}

    def graph(self) -> QGraph:
        g = self.model.graph
        for tensor in g.initializer:
            self.known[tensor.name] = self._constant(tensor)
        for info in g.input:
            if info.name not in self.known:
                self.known[info.name] = self.b.input(info.name, self._shape(info))
        for node in g.node:
            self._node(node)
        outputs = [self.known.get(o.name) for o in g.output]
        for o, v in zip(g.output, outputs):
            if not isinstance(v, Value):
                raise self._refuse(f"the output {o.name!r} does not depend on the input")
        return self.b.finish(outputs, {"source": self.path.name, "framework": "onnx"})

    def _refuse(self, found: str, allowed: str = "", attempt: str = "") -> NetsukeError:
        return NetsukeError(self.b.asked, found, allowed, attempt)

    def _constant(self, tensor: Any) -> np.ndarray:
        from onnx import TensorProto, numpy_helper

        if tensor.data_location == TensorProto.EXTERNAL:
            raise self._refuse(
                f"the weights {tensor.name!r} lie in another file", "weights inside the .onnx file",
                "onnx.save(model, path, save_as_external_data=False)",
            )  # fmt: skip
        try:
            return numpy_helper.to_array(tensor)
        except (ValueError, TypeError, KeyError) as e:
            raise self._refuse(f"the weights {tensor.name!r} are damaged ({str(e)[:80]})", "a whole file") from None

    def _shape(self, info: ValueInfoProto) -> tuple[int, ...]:
        kind = info.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in kind.shape.dim]
        if kind.elem_type != 1 or len(dims) < 2:
            raise self._refuse(f"the input {info.name!r} is no float32 tensor with a batch axis", "float32 (1, …)")
        if None in dims[1:] or dims[0] not in (None, 1):
            raise self._refuse(
                f"the input {info.name!r} has the shape ({', '.join(str(d or '?') for d in dims)})",
                "a batch of 1 or a free one, and fixed sizes", "export the model with a fixed input shape",
            )  # fmt: skip
        return (1, *dims[1:])

    def _node(self, node: NodeProto) -> None:
        from onnx import helper

        where = node.name or (node.output[0] if node.output else node.op_type)
        missing = next((n for n in node.input if n and n not in self.known), None)
        if missing is not None:
            raise self.b.refuse(where, f"its input {missing!r} is written by nobody before it")
        inputs = [self.known[n] if n else None for n in node.input]
        kind = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        try:
            if not any(isinstance(v, Value) for v in inputs) or kind == "Shape":
                outputs = self._folded(node, inputs)
            elif kind in QUANTIZED:
                raise self.b.refuse(
                    where, f"it is a {kind}: the model is quantized already", "float models",
                    "export the float model and quantize it here with --data, or convert to an int8 .tflite",
                )  # fmt: skip
            elif kind not in OPERATORS:
                raise self.b.refuse(
                    where, f"it is a {kind}, which is not imported", ", ".join(sorted(OPERATORS)),
                    "cut the model before it",
                )  # fmt: skip
            else:
                attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute} | {"opset": self.opset}
                outputs = OPERATORS[kind](self.b, where, attrs, inputs)
        except (ArithmeticError, KeyError, ValueError, TypeError, IndexError, AttributeError) as e:
            raise self.b.refuse(
                where, f"{kind} is used in a way that is not imported ({str(e)[:80] or type(e).__name__})",
                "constant weights and fixed sizes",
            ) from None  # fmt: skip
        outputs = outputs if isinstance(outputs, list) else [outputs]
        self.known.update(zip((n for n in node.output), outputs))

    def _folded(self, node: NodeProto, inputs: list[Any]) -> list[np.ndarray]:
        """A node of constants, computed. Raises ValueError for what is not computed here."""
        from onnx import AttributeProto, helper
        from onnx.reference import ReferenceEvaluator

        tensors = {a.name: self._constant(a.t) for a in node.attribute if a.type == AttributeProto.TENSOR}
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type not in FOLDED or node.domain not in ("", "ai.onnx"):
            raise ValueError("it computes with constants in a way that is not done here")
        if node.op_type == "Shape":
            return [np.asarray(inputs[0].shape[attrs.get("start", 0) : attrs.get("end")], np.int64)]
        if node.op_type == "Constant" and "value" in tensors:
            return [tensors["value"]]
        if not (size := _size(node.op_type, inputs, attrs)) <= MOST_FOLDED:
            raise ValueError(f"a constant of {size:.3g} elements")
        feeds = {n: v for n, v in zip(node.input, inputs) if n}
        try:
            with np.errstate(all="ignore"):
                return list(ReferenceEvaluator(node).run(None, feeds))
        except Exception as e:  # of any kind: it is another package's code on a file's numbers
            raise ValueError(f"its constants do not fit it: {str(e)[:60]}") from None


def _size(kind: str, inputs: list[Any], attrs: dict[str, Any]) -> float:
    """At most how many elements an operator of FOLDED makes of constants."""
    if kind == "ConstantOfShape":
        return math.prod(float(n) for n in np.ravel(inputs[0]))
    if kind == "Expand":
        return math.prod(map(float, np.broadcast_shapes(inputs[0].shape, tuple(map(int, np.ravel(inputs[1]))))))
    if kind == "Tile":
        return inputs[0].size * math.prod(float(n) for n in np.ravel(inputs[1]))
    if kind == "Range":
        start, end, step = (float(np.ravel(v)[0]) for v in inputs)
        return (end - start) / step if step else math.inf
    if kind == "Gather":
        return inputs[1].size * (inputs[0].size / inputs[0].shape[attrs.get("axis", 0)])
    shapes = [v.shape for v in inputs if v is not None]
    if kind in BROADCAST:
        return math.prod(map(float, np.broadcast_shapes(*shapes)))
    return float(sum(math.prod(shape) for shape in shapes))

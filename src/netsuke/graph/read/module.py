"""`from_torch`: any small PyTorch module as a float graph, by torch.export (functional ATen operators, fixed shapes).

The input keeps PyTorch's axes (1, C, H, W); one transpose behind it makes them (1, H, W, C), and a flattened image permutes
the next linear layer's columns instead of moving (`read/layout.py`). Tensors are named after modules: "conv1.weight". What
depends only on parameters is computed here, by PyTorch.
"""

from __future__ import annotations

import copy
import operator
import warnings
from typing import Any

import torch
from torch import nn

from netsuke.errors import NetsukeError
from netsuke.graph.ir import QGraph
from netsuke.graph.read.layout import Builder, Value
from netsuke.graph.read.module_ops import OPERATORS


def from_torch(module: nn.Module, example: torch.Tensor | tuple[torch.Tensor, ...], name: str = "module") -> QGraph:
    """The float32 graph of a module in evaluation mode; the module is left as it is.

    example: an input, or a tuple of them; only shapes count, and the batch is cut to 1.
    Raises NetsukeError that names the module and the operator that cannot be imported.
    """
    asked = f"import the module {name}"
    examples = example if isinstance(example, tuple) else (example,)
    if not examples or any(not isinstance(x, torch.Tensor) or x.ndim < 2 or len(x) < 1 for x in examples):
        raise NetsukeError(asked, "the example is no tensor with a batch axis", "e.g. torch.zeros(1, 3, 32, 32)")
    examples = tuple(x[:1].detach().float().cpu() for x in examples)
    plain = copy.deepcopy(module).eval().float().cpu()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter about itself
            program = torch.export.export(plain, examples).run_decompositions({})
    except Exception as e:  # the exporter's errors have no common base; the module is the user's code
        raise NetsukeError(
            asked, f"torch.export cannot trace it ({type(e).__name__}: {str(e).strip().splitlines()[0][:120]})",
            "modules without data-dependent control flow", "export the part that is a plain network",
        ) from None  # fmt: skip
    return _Importer(program, Builder(name, asked, channels_first=True)).graph(name)


class _Importer:
    """Walks the exported graph. `known` holds, per node, a Value, a constant tensor, or a list of them."""

    def __init__(self, program: torch.export.ExportedProgram, builder: Builder):
        self.program, self.b, self.known = program, builder, {}

    def graph(self, name: str) -> QGraph:
        signature, constants = self.program.graph_signature, self.program.constants
        stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        lifted = signature.inputs_to_lifted_tensor_constants
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in stored:
                    key = stored[node.name]
                    source = self.program.state_dict if key in self.program.state_dict else constants
                    self.known[node] = source[key].detach()
                elif node.name in lifted:
                    self.known[node] = constants[lifted[node.name]].detach()
                else:
                    self.known[node] = self.b.input(node.name, node.meta["val"].shape)
            elif node.op == "call_function":
                self.known[node] = self._call(node)
            elif node.op == "output":
                return self.b.finish(self._outputs(node, name), {"source": name, "framework": "pytorch"})
        raise self.b.refuse(name, "it has no output")

    def _call(self, node: torch.fx.Node) -> Any:
        args = torch.fx.map_arg(node.args, self.known.__getitem__)
        kwargs = torch.fx.map_arg(node.kwargs, self.known.__getitem__)
        if node.target is operator.getitem:
            return args[0][args[1]]
        where = _module(node) or node.name
        if not any(isinstance(x, Value) for x in _flat((*args, *kwargs.values()))):
            with torch.no_grad():
                return node.target(*args, **kwargs)
        schema = node.target._schema
        found = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        found |= dict(zip((a.name for a in schema.arguments), args)) | kwargs
        kind = schema.name.removeprefix("aten::")
        if kind not in OPERATORS:
            raise self.b.refuse(
                where, f"it computes {node.target}, which is not imported", ", ".join(sorted(OPERATORS)),
                "replace that part of the module",
            )  # fmt: skip
        found = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in found.items()}
        try:
            return OPERATORS[kind](self.b, where, found)
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as e:
            raise self.b.refuse(
                where, f"{node.target} is used in a way that is not imported ({str(e)[:80] or type(e).__name__})",
                "constant weights and fixed sizes",
            ) from None  # fmt: skip

    def _outputs(self, node: torch.fx.Node, name: str) -> list[Value]:
        outputs = torch.fx.map_arg(node.args[0], self.known.__getitem__)
        bad = next((n for n, v in zip(node.args[0], outputs) if not isinstance(v, Value)), None)
        if bad is not None:
            raise self.b.refuse(name, f"its output {bad} is no activation", "tensors that depend on the input")
        return list(outputs)


def _module(node: torch.fx.Node) -> str:
    """Path of the innermost module that a node belongs to."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed([path for path, _ in stack.values()]), "") if stack else ""


def _flat(values: Any) -> list[Any]:
    return [x for v in values for x in (_flat(v) if isinstance(v, (list, tuple)) else [v])]

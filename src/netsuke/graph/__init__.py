"""Small static networks: one graph for import, planning, training and C code."""

from __future__ import annotations

from netsuke.graph.interpret import Interpreter
from netsuke.graph.ir import Op, QGraph, Tensor

__all__ = ["Interpreter", "Op", "QGraph", "Tensor"]

"""Known inputs and outputs for the exported self-test, without storing inputs: both sides draw them from one generator.

xorshift32 (Marsaglia, 2003), one draw per element. int8 and uint8 take the top byte, int16 the top two, float32 the top
24 bits as a number in [-1, 1); other types are zeros.
"""

from __future__ import annotations

import numpy as np

from netsuke.errors import NetsukeError
from netsuke.graph.interpret import Interpreter
from netsuke.graph.ir import QGraph

START = 2463534242  # a seed of 0 would stay 0
RUNS = 2


def drawn(shape: tuple[int, ...], dtype: str, state: int) -> tuple[np.ndarray, int]:
    """An array and the generator's next state."""
    n = int(np.prod(shape))
    draws = np.empty(n, np.uint32)
    for k in range(n):
        state ^= state << 13 & 0xFFFFFFFF
        state ^= state >> 17
        state ^= state << 5 & 0xFFFFFFFF
        draws[k] = state
    if dtype == "int8":
        values = (draws >> 24).astype(np.int64) - 128
    elif dtype == "uint8":
        values = draws >> 24
    elif dtype == "int16":
        values = (draws >> 16).astype(np.int64) - 32768
    elif dtype == "float32":
        values = ((draws >> 8).astype(np.int64) - (1 << 23)) / 2.0**23
    else:
        values = np.zeros(n)
    return values.astype(dtype).reshape(shape), state


def runs(
    graph: QGraph, golden: list[np.ndarray] | None, seed: int
) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]]]:
    """(inputs, outputs) per run, one after another from a reset on. `golden` is per input an array (n, …)."""
    tensors = [graph.tensors[i] for i in graph.inputs]
    if golden is not None:
        asked = f"test the C of {graph.name}"
        lengths = {len(g) if np.ndim(g) else 0 for g in golden}  # a single number is no list of inputs
        if len(golden) != len(tensors) or len(lengths) != 1 or 0 in lengths:
            raise NetsukeError(
                asked, f"test inputs of the shapes {', '.join(str(np.shape(g)) for g in golden)}",
                f"{len(tensors)} arrays of one length of 1 or more",
            )  # fmt: skip
        for g, t in zip(golden, tensors):
            if g[0].size != t.size or str(g.dtype) != t.dtype:
                raise NetsukeError(asked, f"test inputs are {g.dtype} {g.shape}", f"{t.dtype}, n times {t.shape}")
        inputs = [[g[k].reshape(t.shape) for g, t in zip(golden, tensors)] for k in range(len(golden[0]))]
    else:
        state, inputs = (START + seed) & 0xFFFFFFFF or START, []
        for _ in range(RUNS):
            inputs.append([])
            for t in tensors:
                x, state = drawn(t.shape, t.dtype, state)
                inputs[-1].append(x)
    kept = graph.copy()  # whose variables change from run to run
    reference = Interpreter(kept)

    def keep(k: int, outs: tuple[np.ndarray, ...]) -> None:
        for i, out in zip(kept.ops[k].outputs, outs):
            if kept.tensors[i].variable:
                kept.tensors[i].data = out

    return inputs, [reference.run(*x, on_op=keep) for x in inputs]

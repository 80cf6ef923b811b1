"""Random graphs, and running a graph in one array of bytes at the places that an arena gives its tensors."""

import numpy as np

from netsuke.graph import QGraph, Tensor
from netsuke.graph.arena import Arena
from netsuke.graph.ops import OPS
from netsuke.graph.ops.base import window

SCALE, ZERO = np.float64(0.05), 3


def run_in_bytes(graph: QGraph, arena: Arena, *inputs: np.ndarray, scratch=lambda g, op: 0) -> list[np.ndarray]:
    """The outputs when every tensor has only the arena's bytes; what is no tensor's is noise, and so is scratch."""
    rng = np.random.default_rng(0)
    memory = rng.integers(0, 256, arena.size).astype(np.uint8)

    def read(i: int) -> np.ndarray | None:
        t = graph.tensors[i]
        if i < 0 or t.constant:
            return None if i < 0 else t.data
        at = arena.offset(i)
        assert at >= 0 and at + t.bytes <= arena.size
        return memory[at : at + t.bytes].copy().view(t.dtype).reshape(t.shape)

    def write(i: int, value: np.ndarray) -> None:
        at = arena.offset(i)
        assert value.nbytes == graph.tensors[i].bytes
        memory[at : at + value.nbytes] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)

    for read_state, _ in graph.states:
        t = graph.tensors[read_state]
        write(read_state, np.full(t.shape, t.zero, t.dtype))
    for i, x in zip(graph.inputs, inputs):
        write(i, x)
    for k, op in enumerate(graph.ops):
        outs = OPS[op.kind].run(graph, op, [read(i) for i in op.inputs])
        at, n = arena.scratch_offset(k), scratch(graph, op)
        memory[at : at + n] = rng.integers(0, 256, n)
        for i, out in zip(op.outputs, outs):
            write(i, out)
    return [read(i) for i in graph.outputs]


def inputs_of(graph: QGraph, seed: int = 0) -> list[np.ndarray]:
    """Random arrays for a graph's inputs."""
    rng = np.random.default_rng(seed)
    return [rng.integers(-128, 128, graph.tensors[i].shape).astype(graph.tensors[i].dtype) for i in graph.inputs]


def image(shape: tuple[int, ...], name: str = "x") -> Tensor:
    """An int8 tensor; all of a random graph share one scale, so that any two can be joined."""
    return Tensor(name, tuple(int(n) for n in shape), "int8", SCALE, ZERO)


def convolve(
    g: QGraph, x: int, rng: np.random.Generator, outs: int, kernel: int, stride: int = 1, depthwise=False
) -> int:
    """Appends a convolution with random weights and padding (k - 1) / 2."""
    shape, p = g.tensors[x].shape, (kernel - 1) // 2
    wide = (kernel, kernel, outs) if depthwise else (outs, kernel, kernel, shape[3])
    w = g.constant(
        "w",
        rng.integers(-60, 61, wide).astype(np.int8),
        scale=rng.uniform(2e-3, 9e-3, outs),
        axis=2 if depthwise else 0,
    )
    b = g.constant("b", rng.integers(-300, 300, outs).astype(np.int32))
    size = [window(n, kernel, stride, p, p) for n in shape[1:3]]
    kind = "depthwise2d" if depthwise else "conv2d"
    return g.append(kind, (x, w, b), image((1, *size, outs), kind), stride=(stride, stride), pad=(p, p, p, p))


def random_graph(seed: int, length: int = 14) -> QGraph:
    """A graph of `length` operators that read any earlier tensors; every fourth one has a state."""
    rng = np.random.default_rng(seed)
    g = QGraph(f"random {seed}")
    g.inputs = tuple(
        g.add(image((1, *rng.integers(2, 9, 2), rng.integers(1, 9)), "in")) for _ in range(rng.integers(1, 3))
    )
    pool = list(g.inputs)
    if seed % 4 == 0:
        pool.append(g.add(image(g.tensors[pool[0]].shape, "state")))
    while len(g.ops) < length:
        recent = pool[-3:] if rng.random() < 0.7 else pool
        x = int(rng.choice(recent))
        _grow(g, x, pool, rng)
    ends = [i for i in pool if g.tensors[i].name != "state" and not any(i in op.inputs for op in g.ops)]
    g.outputs = tuple(ends[: 1 + seed % 3])
    if seed % 4 == 0:
        shape = g.tensors[g.inputs[0]].shape
        same = [o for op in g.ops for o in op.outputs if g.tensors[o].shape == shape]
        if same:
            g.states = ((len(g.inputs), same[-1]),)
        else:
            g.inputs += (len(g.inputs),)
    return g.check()


def _grow(g: QGraph, x: int, pool: list[int], rng: np.random.Generator) -> None:
    shape, kind = g.tensors[x].shape, rng.integers(0, 11)
    _, h, w, c = shape
    alike = [i for i in pool if g.tensors[i].shape == shape]
    if kind == 0:
        y = convolve(g, x, rng, int(rng.integers(1, 17)), 1)
    elif kind == 1:
        y = convolve(g, x, rng, int(rng.integers(1, 9)), 3, int(rng.integers(1, 3)))
    elif kind == 2:
        y = convolve(g, x, rng, c, 3, int(rng.integers(1, 3)), depthwise=True)
    elif kind in (3, 4):
        y = g.append("add", (x, int(rng.choice(alike))), image(shape, "sum"))
    elif kind == 5:
        y = g.append("lut", (x,), image(shape, "lut"), table=rng.integers(-128, 128, 256).astype(np.int8))
    elif kind == 6:
        y = g.append("reshape", (x,), image((1, w, h, c), "reshaped"))
    elif kind == 7:
        begin = (0, int(rng.integers(0, h)), 0, 0)
        y = g.append("slice", (x,), image((1, int(rng.integers(1, h - begin[1] + 1)), w, c), "slice"), begin=begin)
    elif kind == 8:
        axis = int(rng.integers(1, 4))
        fits = [i for i in pool if all(a == b for k, (a, b) in enumerate(zip(g.tensors[i].shape, shape)) if k != axis)]
        parts = (x, *(int(i) for i in rng.choice(fits, int(rng.integers(0, 3)))))
        long = list(shape)
        long[axis] = sum(g.tensors[i].shape[axis] for i in parts)
        y = g.append("concat", parts, image(long, "joined"), axis=axis)
    elif kind == 9:
        y = g.append("transpose", (x,), image((1, w, h, c), "turned"), perm=(0, 2, 1, 3))
    else:
        y = g.append("maxpool2d", (x,), image((1, -(-h // 2), -(-w // 2), c), "pooled"), window=(1, 1), stride=(2, 2))
    if g.tensors[y].size <= 4096:
        pool.append(y)
    else:  # a joined joined join: too large to be interesting
        g.ops.pop()

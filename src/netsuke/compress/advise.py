"""Low-rank weights or low-rank attention? The cost of an encoder block, counted, and which of the two fits a sequence length.

"Greenformers" (thesis, 2021) compares the low-rank Transformer (LRT: every linear map of a block as two of rank r) with
Linformer (attention to P summaries of n tokens): the first for short inputs, the second for long ones, 512 tokens between them.
Where the two really cross depends on what is scarce. Multiply-accumulates of one block on n tokens, width d, feed-forward f = 4d:

    dense       12 n d² + 2 n² d
    LRT         18 n r d + 2 n² d            linear maps fall, attention stays
    Linformer   12 n d² + 4 n P d            attention falls, linear maps stay
    equal at    n = 6 d + 2 P − 9 r          d 768, r = P = 128: about 3,700 tokens

    parameters  LRT 18 r d for 12 d²: smaller from the first token on. Linformer adds 2 n P, so it never shrinks a file
    training    (weights, gradients, two moments of Adam) + what autograd keeps: per token 8 d + 2 f numbers, 6 r more with
                factors, and H·n of the attention map (H·P in Linformer), three times that when its softmax is differentiated

Time is not multiply-accumulates alone: a map entry that is computed in the open passes through memory `PASSES` times, which
a device card prices. A fused attention kernel keeps no map: then memory never speaks for Linformer, and time does later.
Linformer needs a largest n, and cannot be causal.
"""

from __future__ import annotations

from dataclasses import dataclass

from netsuke.devices import Device, format_bytes, format_seconds
from netsuke.errors import NetsukeError

KINDS = ("dense", "lrt", "linformer")
TARGETS = ("time", "memory", "size")
# Reads and writes of one float32 map entry in a training step with open maps, forward: product, scaling, softmax, product;
# backward: two gradients of products, softmax, scaling.
PASSES = 15
STATES = 4  # numbers kept per parameter in training: weight, gradient, two moments
LONGEST = 1 << 24  # tokens searched for a crossing
WORTH = 0.05  # a saving below this is not worth an approximation


@dataclass(frozen=True)
class Shape:
    """A block: width d, heads H, feed-forward f (None: 4 d), rank r and projected length P of the two approximations (None:
    an eighth of the width; 128, but no more than the tokens)."""

    d: int
    heads: int
    hidden: int | None = None
    rank: int | None = None
    project: int | None = None

    def __post_init__(self) -> None:
        for name in ("d", "heads", "hidden", "rank", "project"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= LONGEST):
                found = f"{name}={str(value)[:20]}"
                raise NetsukeError("advise on a block", found, f"whole numbers from 1 to {LONGEST}")
        if self.d % self.heads:
            raise NetsukeError("advise on a block", f"a width of {self.d} for {self.heads} heads", "a multiple of them")

    @property
    def f(self) -> int:
        return self.hidden or 4 * self.d

    @property
    def r(self) -> int:
        return self.rank or max(1, self.d // 8)

    def P(self, n: int) -> int:
        return min(self.project or 128, n)


@dataclass(frozen=True)
class BlockCost:
    """One block. `macs` of one sequence; `training_bytes` at the peak of a step over `tokens` tokens; `seconds` of such a step
    on a device, where one was named."""

    kind: str
    macs: int
    parameters: int
    training_bytes: int
    seconds: float | None = None


@dataclass(frozen=True)
class Advice:
    """`pick` of KINDS, the sentence that says why, the three costs, and for each target the n at which LRT and Linformer cross
    (None: they do not)."""

    pick: str
    why: str
    costs: dict[str, BlockCost]
    crossings: dict[str, int | None]


def parameters(kind: str, s: Shape, n: int) -> int:
    """Of one block for at most n tokens: maps, biases, two norms, projections shared by the heads."""
    d, f = s.d, s.f
    maps = s.r * (4 * 2 * d + 2 * (d + f)) if kind == "lrt" else 4 * d * d + 2 * d * f
    return maps + (5 * d + f) + 4 * d + (2 * n * s.P(n) if kind == "linformer" else 0)


def macs(kind: str, s: Shape, n: int) -> int:
    """Multiply-accumulates of one block on one sequence of n tokens, forward."""
    d, f = s.d, s.f
    maps = s.r * (4 * 2 * d + 2 * (d + f)) if kind == "lrt" else 4 * d * d + 2 * d * f
    attention = 4 * n * s.P(n) * d if kind == "linformer" else 2 * n * n * d
    return n * maps + attention


def map_entries(kind: str, s: Shape, n: int) -> int:
    """Numbers in the attention maps of one sequence."""
    return s.heads * n * (s.P(n) if kind == "linformer" else n)


def saved_floats(kind: str, s: Shape, n: int, fused: bool = False) -> int:
    """Numbers that autograd keeps of one block and sequence; 4 per token are means and deviations of norms, and a fused kernel
    keeps one per head and token."""
    per_token = 8 * s.d + 2 * s.f + 4 + (6 * s.r if kind == "lrt" else 0)
    summaries = 2 * s.P(n) * s.d if kind == "linformer" else 0
    return n * per_token + summaries + (s.heads * n if fused else map_entries(kind, s, n))


def transient_peak(kind: str, s: Shape, n: int, fused: bool = False) -> int:
    """Numbers alive per sequence at the peak of the backward pass, what is saved included. There are two candidates: its
    start, when everything is saved and the gradients of the hidden units and the stream come; and the softmax, when what the
    feed-forward part saved is gone, with two gradients as large as the map and two as wide as the stream."""
    saved = saved_floats(kind, s, n, fused)
    start = saved + n * (s.f + s.d)
    feed = n * (2 * s.d + 2 * s.f + 2 + (2 * s.r if kind == "lrt" else 0))
    softmax = saved - feed + n * 2 * s.d + (0 if fused else 2 * map_entries(kind, s, n))
    return max(start, softmax)


def training_bytes(kind: str, s: Shape, n: int, tokens: int, fused: bool = False) -> int:
    """Peak of a training step over tokens // n sequences (at least one), float32, Adam."""
    batch = max(tokens // n, 1)
    return 4 * (STATES * parameters(kind, s, n) + batch * transient_peak(kind, s, n, fused))


def seconds(kind: str, s: Shape, n: int, tokens: int, device: Device, fused: bool = False) -> float:
    """A training step over tokens // n sequences on a device: three times the forward multiply-accumulates, and the traffic
    of open maps after them, as neither can hide behind the other."""
    batch = max(tokens // n, 1)
    traffic = 0 if fused else 4 * PASSES * batch * map_entries(kind, s, n)
    return 3 * batch * macs(kind, s, n) / device.rate(32) + traffic / device.ram_bandwidth


def cost_of(
    kind: str, s: Shape, n: int, tokens: int = 4096, device: Device | None = None, fused: bool = False
) -> BlockCost:
    timed = None if device is None else seconds(kind, s, n, tokens, device, fused)
    return BlockCost(kind, macs(kind, s, n), parameters(kind, s, n), training_bytes(kind, s, n, tokens, fused), timed)


def measure_of(target: str, cost: BlockCost) -> float:
    if target == "size":
        return cost.parameters
    if target == "memory":
        return cost.training_bytes
    return cost.macs if cost.seconds is None else cost.seconds


def crossing(
    target: str, s: Shape, tokens: int = 4096, device: Device | None = None, fused: bool = False,
    pair: tuple[str, str] = ("lrt", "linformer"),
) -> int | None:  # fmt: skip
    """The least n at which the second of `pair` costs no more than the first, by bisection; None where it never does. Batches
    are taken as fractions here, so that n does not jump."""

    def later_wins(n: int) -> bool:
        # tokens = n makes one sequence of every n; per-step costs scale with tokens / n except for what parameters take
        a, b = (cost_of(k, s, n, n, device, fused) for k in pair)
        if target == "memory":
            fixed = [4 * STATES * c.parameters for c in (a, b)]
            moving = [(c.training_bytes - x) * tokens / n for c, x in zip((a, b), fixed)]
            return fixed[1] + moving[1] <= fixed[0] + moving[0]
        return measure_of(target, b) <= measure_of(target, a)

    low, high = s.P(LONGEST), LONGEST  # below P, Linformer has nothing to project away
    if not later_wins(high):
        return None
    while low < high:
        mid = (low + high) // 2
        low, high = (low, mid) if later_wins(mid) else (mid + 1, high)
    return low


def advise(
    d: int, heads: int, n: int, target: str = "time", *, rank: int | None = None, project: int | None = None,
    hidden: int | None = None, tokens: int = 4096, device: Device | None = None, fused: bool = False,
    causal: bool = False,
) -> Advice:  # fmt: skip
    """Dense, LRT or Linformer for sequences of n tokens, with the numbers behind it.

    target   "time" (of a training step; by multiply-accumulates without a device), "memory" (peak of a training step), "size"
    tokens   in a training step, all sequences together
    fused    attention in a fused kernel, which keeps no map; a prompt's first pass on current hardware is fused
    causal   a model that writes: Linformer is out, since its summaries mix the future into the past

    Raises NetsukeError for shapes that no block has and an unknown target.
    """
    s = Shape(d, heads, hidden, rank, project)
    if target not in TARGETS:
        raise NetsukeError("advise on a block", f"target={target!r}", ", ".join(TARGETS))
    for name, value in (("n", n), ("tokens", tokens)):
        if type(value) is not int or not 1 <= value <= LONGEST:
            raise NetsukeError("advise on a block", f"{name}={str(value)[:20]}", f"whole numbers from 1 to {LONGEST}")
    kinds = [k for k in KINDS if not (causal and k == "linformer")]
    costs = {k: cost_of(k, s, n, tokens, device, fused) for k in kinds}
    best = min(kinds[1:], key=lambda k: measure_of(target, costs[k]))
    saving = 1 - measure_of(target, costs[best]) / measure_of(target, costs["dense"])
    pick = best if saving >= WORTH else "dense"
    crossings = {} if causal else {t: crossing(t, s, tokens, device, fused) for t in TARGETS}
    return Advice(pick, _why(pick, best, saving, target, s, n, costs, crossings), costs, crossings)


def _why(pick, best, saving, target, s, n, costs, crossings) -> str:
    def shown(kind: str) -> str:
        cost = costs[kind]
        if target == "size":
            return f"{cost.parameters:,} parameters"
        if target == "memory":
            return format_bytes(cost.training_bytes)
        return f"{cost.macs:,} multiply-accumulates" if cost.seconds is None else format_seconds(cost.seconds)

    names = {"dense": "dense", "lrt": f"LRT of rank {s.r}", "linformer": f"Linformer with {s.P(n)} summaries"}
    table = ", ".join(f"{names[k]} {shown(k)}" for k in costs)
    at = crossings.get(target)
    if "linformer" not in costs:
        meet = "Linformer cannot be causal"
    else:
        meet = f"LRT and Linformer meet at {at:,} tokens" if at else "Linformer never passes LRT"
    if pick == "dense":
        return (
            f"{n} tokens, {target}: {names[best]} would save {saving:.1%}, too little to approximate; {table}; {meet}"
        )
    return f"{n} tokens, {target}: {names[pick]} saves {saving:.0%}; {table}; {meet}"


def formula_crossing(d: int, rank: int, project: int) -> float:
    """n = 6 d + 2 P − 9 r, where the multiply-accumulates of LRT and Linformer are equal (f = 4 d)."""
    return 6 * d + 2 * project - 9 * rank

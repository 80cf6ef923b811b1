"""Finds the shape of a small Llama: depth, width and feed-forward expansion inside a budget of parameters.

"Rethinking Optimization and Architecture for Tiny Language Models" (PanGu-π Pro, ICML 2024): at equal parameters depth
helps and the expansion hardly matters, but a deep model generates its tokens slowly. So the finder takes the deepest shape that
it is allowed and that still reaches a floor in tokens/s, and hits the parameters within 1 % by the feed-forward width.

    parameters(cfg)        all weights, and the share that the embedding table (and the head) takes
    random_shapes(…)       shapes drawn at a budget, for a study of depth, width and expansion
    find_shape(…)          the shape for a budget and a floor
    PRESETS                the paper's table and its released configuration disagree: both are here
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from netsuke.errors import NetsukeError
from netsuke.models.llama import LlamaConfig

WITHIN = 0.01  # of the budget
EXPANSION = (1.0, 4.5)  # feed-forward width over model width that the finder allows
SHARE = (
    0.5  # of the budget that embedding and head may take before a smaller vocabulary is proposed; the paper wants 0.2
)
DEPTHS = range(2, 13)  # that the study of systems/tinylm.py covers; deeper ones are open to those who ask
HEAD_DIM = 32  # of models with 1 to 10 M parameters; 128 at 1 B


@dataclass(frozen=True)
class Preset:
    """A published model: depth, width, heads of 128, feed-forward expansion, vocabulary, rate."""

    layers: int
    width: int
    heads: int
    expansion: float
    vocab: int
    rate: float


PRESETS = {
    "paper": Preset(21, 1792, 14, 2.77, 48_000, 2e-4),
    "released": Preset(20, 1792, 14, 8 / 3, 48_000, 1e-4),
}


@dataclass(frozen=True)
class Parameters:
    total: int
    tables: int  # embedding and, untied, the head

    @property
    def share(self) -> float:
        return self.tables / self.total


def parameters(cfg: LlamaConfig) -> Parameters:
    """Counted from the config alone."""
    tables = cfg.vocab * cfg.width * (1 if cfg.tied else 2)
    norms = (2 * len(cfg.blocks) + 1) * cfg.width + (2 * cfg.head_dim * len(cfg.blocks) if cfg.qk_norm else 0)
    maps = sum(o * i + o * b for layer in range(len(cfg.blocks)) for o, i, b in cfg.linear_shapes(layer).values())
    return Parameters(tables + norms + maps, tables)


def shape_of(
    budget: int, vocab: int, layers: int, width: int, *, head_dim: int = HEAD_DIM, kv_heads: int | None = None,
    tied: bool = True, context: int = 512, **rest,
) -> LlamaConfig | None:  # fmt: skip
    """The config of this depth and width whose feed-forward width brings it nearest to the budget, or None when attention and
    tables alone are above it. `rest` goes to LlamaConfig (bos, eos)."""
    heads = width // head_dim
    fixed = {
        "vocab": vocab, "width": width, "heads": heads, "kv_heads": kv_heads or heads, "head_dim": head_dim,
        "context": context, "tied": tied, **rest,
    }  # fmt: skip
    one = parameters(LlamaConfig.uniform(layers, 1, **fixed)).total
    hidden = 1 + round((budget - one) / (3 * width * layers))
    return LlamaConfig.uniform(layers, hidden, **fixed) if hidden >= 1 else None


def expansion(cfg: LlamaConfig) -> float:
    """Feed-forward width over model width, the mean of the blocks."""
    return sum(b.hidden for b in cfg.blocks) / len(cfg.blocks) / cfg.width


def candidates(
    budget: int, vocab: int, *, depths: Sequence[int] = DEPTHS, head_dim: int = HEAD_DIM, within: float = WITHIN,
    bounds: tuple[float, float] = EXPANSION, **rest,
) -> list[LlamaConfig]:  # fmt: skip
    """All shapes within `within` of the budget whose expansion lies in `bounds`; widths are multiples of the head width."""
    out = []
    for layers in depths:
        for heads in range(1, 65):
            cfg = shape_of(budget, vocab, layers, heads * head_dim, head_dim=head_dim, **rest)
            if cfg is None:
                break  # wider ones are larger still
            close = abs(parameters(cfg).total - budget) <= within * budget
            if close and bounds[0] <= expansion(cfg) <= bounds[1]:
                out.append(cfg)
    return out


def random_shapes(budget: int, vocab: int, count: int, seed: int = 0, **rest) -> list[LlamaConfig]:
    """`count` different shapes of a budget, widths drawn first and then depths, so that no width crowds the others out.

    Raises NetsukeError when the budget has fewer shapes.
    """
    pool = candidates(budget, vocab, **rest)
    if len(pool) < count:
        raise NetsukeError(f"draw {count} shapes of {budget} parameters", f"there are {len(pool)}", "a larger budget")
    rng, out = random.Random(seed), []
    while len(out) < count:
        width = rng.choice(sorted({c.width for c in pool}))
        chosen = rng.choice([c for c in pool if c.width == width])
        pool.remove(chosen)
        out.append(chosen)
    return out


def find_shape(
    budget: int, vocab: int, *, min_speed: float = 0.0, speed: Callable[[LlamaConfig], float] | None = None, **rest
) -> LlamaConfig:
    """The deepest shape within 1 % of `budget` parameters that generates `min_speed` tokens/s by `speed`; of equally deep
    ones the one whose expansion is nearest to 8/3.

    speed  tokens/s of a config: measured in the engine, or by a device's cost model
    rest   of `candidates` and `shape_of`: depths, head_dim, kv_heads, tied, context, bos, eos

    Raises NetsukeError with a proposal when the tables take more than half of the budget, when no shape fits, and (code 1) when
    none is fast enough.
    """
    asked = f"find a shape of {budget:,} parameters with {vocab:,} pieces"
    pool = candidates(budget, vocab, **rest)
    head_dim, tables = rest.get("head_dim", HEAD_DIM), 1 if rest.get("tied", True) else 2
    smallest = vocab * head_dim * tables
    if not pool:
        if smallest > SHARE * budget:
            attempt = f"a vocabulary of {max(int(SHARE * budget / (head_dim * tables)), 257):,} pieces or fewer"
            raise NetsukeError(asked, f"the tables alone take {smallest:,} at width {head_dim}", "", attempt)
        found = f"no depth and width within {WITHIN:.0%} at an expansion of {EXPANSION[0]:g} to {EXPANSION[1]:g}"
        raise NetsukeError(asked, found, "", "another budget, or more depths")
    pool = [c for c in pool if parameters(c).share <= SHARE]
    if not pool:
        attempt = f"a vocabulary of {int(SHARE * budget / (head_dim * tables) / 2):,} pieces"
        raise NetsukeError(asked, f"every shape gives more than {SHARE:.0%} of itself to the tables", "", attempt)
    pool.sort(key=lambda c: (-len(c.blocks), abs(expansion(c) - 8 / 3)))
    if speed is None:
        return pool[0]
    best, rate = pool[0], 0.0
    for cfg in pool:
        got = speed(cfg)
        if got >= min_speed:
            return cfg
        if got > rate:
            best, rate = cfg, got
    raise NetsukeError(
        f"{asked} at {min_speed:g} tokens/s", f"the fastest, {len(best.blocks)} blocks {best.width} wide, gives {rate:.0f}",
        f"up to {rate:.0f} tokens/s", "fewer parameters or a lower floor", code=1,
    )  # fmt: skip

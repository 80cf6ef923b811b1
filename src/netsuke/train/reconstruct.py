"""A block's clips and smoothing learned so that the quantized block answers like the float one: seconds, one block at a time.

ZeroQAT's warm start (arXiv 2509.00031, 2025, after "OmniQuant", 2024). For block i, with x the stream of the float model and
x̂ that of the quantized blocks before it, the loss is

    |Q_i(x̂) − F_i(x)|² + |Q_i(x̂) − F_i(x̂)|²,  each over |F_i(x)|²

by AdamW on clip logits (two per group of weights) and, where activations are quantized, on the logarithms of the scales of
equivalent transformations (norm -> q, k, v; norm -> gate, up; v -> o; q <-> k). Weights stay. Back-propagation reaches
through one block only, so its memory is a block's activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from netsuke.compress import equivalent
from netsuke.measure.activations import AbsMax, tapped
from netsuke.models.llama import LINEARS, Block, Llama
from netsuke.train.loop import LoopKnobs, train
from netsuke.train.masters import clip_logits, fake_quantized

RATE = 1e-2  # of AdamW, for logits of order 3 and logarithms alike
Quantized = dict[
    str, tuple[Tensor, Tensor]
]  # name of a linear map -> its transformed float weights and its clip logits


class Reconstruction(nn.Module):
    """One block with learnable clips and scales around its fixed weights."""

    def __init__(self, block: Block, scales: dict[str, Tensor], bits: int, group: int):
        super().__init__()
        # a list: the block's own weights are no parameters of what is learned
        self.held, self.weights = [block], equivalent.weights_of(block)
        self.bits = bits
        self.groups = {name: group or self.weights[f"{name}.weight"].shape[1] for name in LINEARS}
        self.logs = nn.ParameterDict({pair: s.log() for pair, s in scales.items()})
        self.clips = nn.ParameterDict(
            {name: clip_logits(*self.weights[f"{name}.weight"].shape, g) for name, g in self.groups.items()}
        )

    def transformed(self) -> dict[str, Tensor]:
        """Norms, matrices and biases after the transformations, not rounded yet."""
        block, scales = self.held[0], {pair: log.exp() for pair, log in self.logs.items()}
        return equivalent.transform(self.weights, scales, block.cfg, block.layer)

    def forward(self, x: Tensor) -> Tensor:
        w = self.transformed()
        for name, clip in self.clips.items():
            w[f"{name}.weight"] = fake_quantized(w[f"{name}.weight"], clip, self.bits, self.groups[name])
        return functional_call(self.held[0], w, (x,))

    @torch.no_grad()
    def install(self) -> Quantized:
        """Puts the transformed float weights into the block and returns copies of its matrices with their clips."""
        w = self.transformed()
        equivalent.install(self.held[0], w)
        return {n: (w[f"{n}.weight"].clone(), clip.detach().clone()) for n, clip in self.clips.items()}


@torch.no_grad()
def starting_scales(model: Llama, batches: Sequence[Tensor], alpha: float) -> list[dict[str, Tensor]]:
    """Scales of every block to begin with, from `batches` of ids (B, T): a^α / w^(1−α) behind norms, 1 for v -> o and q <-> k."""
    sites = {(block, site): AbsMax() for block in model.blocks for site in ("attn_in", "mlp_in")}
    with tapped(sites=sites):
        for ids in batches:
            model(ids, last_only=True)
    out = []
    for block in model.blocks:
        weights, sizes = equivalent.weights_of(block), equivalent.pair_sizes(model.cfg, block.layer, grouped=True)
        scales = {pair: torch.ones(size) for pair, size in sizes.items() if pair in ("v_o", "q_k")}
        for pair in ("attn_in", "mlp_in"):
            reach = equivalent.column_reach(weights, pair, model.cfg)
            scales[pair] = equivalent.smoothing(sites[block, pair].reach, reach, alpha)
        out.append(scales)
    return out


@torch.no_grad()
def reconstruct(
    model: Llama, batches: Sequence[Tensor], bits: int, group: int, scales: Sequence[dict[str, Tensor]], epochs: int,
    use: Callable[[Block, Quantized], None],
) -> list[tuple[float, float]]:  # fmt: skip
    """Learns every block in order and hands its result to `use`, which changes the block into its quantized self.

    model     a private copy; sites that stand in its blocks are part of the quantized block, the float one has none
    group     inputs that share a scale; 0: a whole row
    batches   ids (B, T), one step each and per epoch; no epochs: nothing is learned, nothing runs
    scales    starting values for each block, empty where nothing is transformed

    Returns the mean loss of the first and of the last epoch of every block.
    """
    exact = [model.embed.rows(ids) for ids in batches] if epochs else []
    stream, losses = list(exact), []
    for block, start in zip(model.blocks, scales):
        sites, block.sites = block.sites, {}
        targets = [block(x) for x in exact]
        alike = [block(x) for x in stream]
        block.sites = sites
        work = Reconstruction(block, start, bits, group)
        if epochs:
            with torch.enable_grad():
                losses.append(_learn(work, stream, targets, alike, epochs))
        use(block, work.install())
        exact, stream = targets, [block(x) for x in stream]
    return losses


def _learn(
    work: Reconstruction, stream: list[Tensor], targets: list[Tensor], alike: list[Tensor], epochs: int
) -> tuple[float, float]:
    size = sum(float(y.double().square().mean()) for y in targets) / len(targets)

    def loss(module: nn.Module, which: Tensor) -> Tensor:
        y = module(stream[int(which)])
        return ((y - targets[int(which)]).square().mean() + (y - alike[int(which)]).square().mean()) / size

    n = len(stream)
    history = train(
        work, lambda step: torch.tensor(step % n), loss, LoopKnobs(steps=epochs * n, adam_lr=RATE, warmup=0.0)
    )
    return sum(history.losses[:n]) / n, sum(history.losses[-n:]) / n

"""Calibration text taken through a model block by block, so that every linear map is treated on the inputs that the treated
maps before it give it.

A caller replaces the maps of a stage before it asks for the next one. Two models of one shape are walked side by side by
`zip(stages(model, ids, sent), stages(before, ids, sent))`: the same tokens then reach the same experts in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from netsuke.models.llama import Block, Llama

Stage = tuple[list[str], Iterable[Tensor]]


def stages(model: Llama, ids: list[Tensor], sent: dict[int, list[dict[str, Tensor]]] | None = None) -> Iterator[Stage]:
    """(names of the linear maps that share an input, that input by batch) for ids (B, T); the last is ["head"].

    Inputs are computed when they are asked for, which must be before the next stage. `sent` remembers, by block, which rows each
    expert is sent: a second model that is given it sends the same ones, not those that its own router chooses.
    Memory: the stream and one concatenation of heads, 8 bytes per token and width.
    """
    sent = {} if sent is None else sent
    states = [model.embed.rows(i) for i in ids]
    for i, block in enumerate(model.blocks):
        at = f"blocks.{i}."
        yield [at + "q", at + "k", at + "v"], map(block.attn_norm, states)
        heads = [block.attention(block.attn_norm(x)) for x in states]
        yield [at + "o"], heads
        states = [x + block.o(y) for x, y in zip(states, heads)]
        if model.cfg.blocks[i].experts:
            yield from _expert_stages(block, i, states, sent)
            states = [x + block.feed(block.mlp_norm(x)) for x in states]
            continue
        yield [at + "gate", at + "up"], map(block.mlp_norm, states)
        # The hidden activations are the widest of all: computed twice rather than kept.
        yield [at + "down"], map(block.mlp_inner, map(block.mlp_norm, states))
        states = [x + block.down(block.mlp_inner(block.mlp_norm(x))) for x in states]
    yield ["head"], map(model.norm, states)


def _expert_stages(
    block: Block, layer: int, states: list[Tensor], sent: dict[int, list[dict[str, Tensor]]]
) -> Iterator[Stage]:
    """The router sees all tokens, an expert those that are sent to it (by the router as it has become)."""
    at = f"blocks.{layer}.experts."
    inputs = [block.mlp_norm(x).flatten(0, -2) for x in states]
    yield [at + "router"], inputs
    if layer not in sent:
        sent[layer] = [{name: rows for name, rows, _ in block.experts.dealt(x)} for x in inputs]
    for e in range(block.experts.count):
        expert = block.experts.get_submodule(str(e))
        own = [x[rows[str(e)]] for x, rows in zip(inputs, sent[layer]) if str(e) in rows]
        yield [f"{at}{e}.gate", f"{at}{e}.up"], own
        yield [f"{at}{e}.down"], map(expert.inner, own)

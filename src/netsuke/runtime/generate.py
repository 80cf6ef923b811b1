"""Text generation with the reference runtime (PyTorch): prefill in chunks, then one token at a time.

The call is the contract that other engines meet: `generate(model, ids, …)` yields token ids as they are made. Memory is
what `runtime/memory_plan.py` says: the key/value cache is allocated once for `context`, prefill goes in chunks, and only
the last position's logits are computed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from netsuke.errors import NetsukeError
from netsuke.models.llama import KVCache, Llama
from netsuke.runtime.timings import Timings

PREFILL_CHUNK = 256  # bounds the activations of a long prompt; larger chunks are hardly faster on a CPU


def pick(logits: Tensor, temperature: float, top_p: float, rng: torch.Generator) -> int:
    """One token from the last position's logits (V,). Temperature 0 is greedy; top_p keeps the smallest set of tokens
    whose probability reaches it (nucleus sampling, Holtzman et al. 2020)."""
    if temperature <= 0:
        return int(logits.argmax())
    p = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = p.sort(descending=True)
        ordered[ordered.cumsum(0) - ordered >= top_p] = 0
        return int(index[torch.multinomial(ordered, 1, generator=rng)])
    return int(torch.multinomial(p, 1, generator=rng))


@torch.inference_mode()
def generate(
    model: Llama, ids: list[int], new_tokens: int = 128, *, temperature: float = 0.0, top_p: float = 1.0,
    seed: int = 0, context: int | None = None, stop: tuple[int, ...] | None = None, timings: Timings | None = None,
) -> Iterator[int]:  # fmt: skip
    """Yields up to `new_tokens` ids; ends early at an end-of-text token (`stop`, default the model's).

    Raises NetsukeError when the prompt is empty or leaves no room in the context.
    """
    context = min(context or model.cfg.context, model.cfg.context)
    stop = model.cfg.eos if stop is None else stop
    timings = timings if timings is not None else Timings()
    if not ids:
        raise NetsukeError("generate text", "the prompt is empty and the model has no start token", "", "--prompt TEXT")
    if max(ids) >= model.cfg.vocab:
        raise NetsukeError(
            "generate text", f"token {max(ids)} is outside the model's vocabulary", f"below {model.cfg.vocab}"
        )
    if len(ids) >= context:
        raise NetsukeError(
            "generate text", f"the prompt has {len(ids)} tokens and the context is {context}",
            f"at most {context - 1} prompt tokens", "a shorter prompt",
        )  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    cache = KVCache(model.cfg, 1, min(context, len(ids) + new_tokens))
    start = time.perf_counter()
    for part in torch.tensor(ids).split(PREFILL_CHUNK):
        logits = model(part[None], cache, last_only=True)
    timings.prompt_tokens = len(ids)
    for made in range(new_tokens):
        token = pick(logits[0, -1], temperature, top_p, rng)
        if made == 0:
            timings.first_token = time.perf_counter() - start
            begin = time.perf_counter()
        timings.new_tokens, timings.decode = made + 1, time.perf_counter() - begin
        if token in stop:
            return
        yield token
        if cache.length >= cache.context or made == new_tokens - 1:
            return
        logits = model(torch.tensor([[token]]), cache)

"""The saved-tensor ledger: what autograd keeps between the forward and the backward pass, and for which module.

Every storage is counted once, however many operations save it or a view of it, and parameters are not counted: they are
there anyway. The sum is the part of a training step's memory that grows with the number of tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Saved:
    """One storage that autograd holds: the module during whose forward it was saved first, what it is, its bytes."""

    module: str
    operation: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass
class Ledger:
    entries: list[Saved] = field(default_factory=list)

    def total(self) -> int:
        return sum(e.bytes for e in self.entries)

    def by_module(self, depth: int = 2) -> dict[str, int]:
        """Bytes by the first `depth` parts of the module's name ("blocks.3", "norm"), largest first; "" is the loss."""
        sums: dict[str, int] = defaultdict(int)
        for e in self.entries:
            sums[".".join(e.module.split(".")[:depth])] += e.bytes
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


@contextmanager
def saved_ledger(model: nn.Module) -> Iterator[Ledger]:
    """While open, notes what autograd saves. Run one forward pass and the loss inside; keep the loss alive until the end."""
    ledger, seen, inside = Ledger(), set(), [""]
    seen.update(t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()))

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in seen and storage.nbytes():
            seen.add(storage.data_ptr())  # the graph keeps it alive, so the address is not given to another
            made_by = t.grad_fn.name() if t.grad_fn is not None else "leaf"
            ledger.entries.append(Saved(inside[-1], made_by, tuple(t.shape), str(t.dtype)[6:], storage.nbytes()))
        return t

    def leave(module: nn.Module, args: tuple, out: Tensor) -> None:
        inside.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, args, name=name: inside.append(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            yield ledger
    finally:
        for handle in handles:
            handle.remove()

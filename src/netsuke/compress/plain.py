"""Any torch.nn.Module as a set of named linear maps: what methods of single matrices need to treat a user's own network.

A linear map is an nn.Linear, a convolution (its weight read as out x (in · kernel)), or GPT-2's Conv1D of the library
transformers (a linear map whose weight is stored in x out). When two factors replace one, they become two plain modules in an
nn.Sequential, so the network is saved and loaded without netsuke:

    nn.Linear   Linear(I, r, no bias), Linear(r, O, bias)
    nn.Conv2d   Conv2d(I, r, kernel, stride, padding, dilation, no bias), Conv2d(r, O, 1, bias)

What is left alone, with the reason: maps inside nn.MultiheadAttention (it reads its weights by name), grouped and transposed
convolutions, and modules that share their weight with another one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from netsuke.errors import NetsukeError
from netsuke.layers.linear import Dense
from netsuke.layers.lowrank import LowRank
from netsuke.measure.activations import Gram, tapped
from netsuke.tasks.base import Task, run_calibration

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Plain:
    """A module seen as a family of named linear maps. `skipped` says which maps are left alone, and why."""

    head = None  # a plain module has no output head of a known name, and no table

    def __init__(self, module: nn.Module):
        self.module = module
        self.skipped: dict[str, str] = {}
        self.parts: dict[str, nn.Module] = {}
        owners: dict[int, str] = {}
        inside: tuple[str, ...] = ()
        for name, part in module.named_modules(remove_duplicate=False):
            if isinstance(part, nn.MultiheadAttention):
                inside += (f"{name}." if name else "",)
                self.skipped[name] = (
                    "nn.MultiheadAttention reads its weights by name: write the attention with nn.Linear first"
                )
            elif name.startswith(inside) and inside:
                continue
            elif isinstance(part, TRANSPOSED):
                self.skipped[name] = "a transposed convolution"
            elif isinstance(part, CONVS) and part.groups > 1:
                self.skipped[name] = f"a convolution in {part.groups} groups"
            elif isinstance(part, (nn.Linear, *CONVS)) or is_conv1d(part):
                other = owners.setdefault(part.weight.data_ptr(), name)
                if other != name:
                    self.skipped[name] = self.skipped[other] = f"{other} and {name} share their weight"
                    self.parts.pop(other, None)
                else:
                    self.parts[name] = part
        for name, part in module.named_modules():  # a table that is also the output layer
            if isinstance(part, nn.Embedding) and part.weight.data_ptr() in owners:
                other = owners[part.weight.data_ptr()]
                self.skipped[other] = f"{other} shares its weight with the table {name}"
                self.parts.pop(other, None)

    def linears(self) -> dict[str, Dense]:
        """Every map as W (O, I), biases apart; weights are shared with the module, not copied."""
        return {name: Dense(matrix_of(part)) for name, part in self.parts.items()}

    def replace(self, name: str, layer: LowRank) -> None:
        """Puts two modules in the place of the one called `name`."""
        if not name:
            raise NetsukeError("factorize a module", "the module is a single linear map", "a network around it")
        old, parent = self.parts[name], name.rpartition(".")[0]
        new = as_modules(old, layer).train(old.training)
        setattr(self.module.get_submodule(parent) if parent else self.module, name.rpartition(".")[2], new)

    @torch.no_grad()
    def grams(self, task: Task, windows: int) -> dict[str, Gram]:
        """Σ xᵀx at the input of the maps that act on the last axis; convolutions have none."""
        grams = {name: Gram() for name, part in self.parts.items() if not isinstance(part, CONVS)}
        training = self.module.training
        self.module.eval()
        try:
            with tapped({self.parts[name]: gram for name, gram in grams.items()}):
                run_calibration(self.module, task, windows)
        finally:
            self.module.train(training)
        return {name: gram for name, gram in grams.items() if gram.rows}


def is_conv1d(part: nn.Module) -> bool:
    """GPT-2's linear map, known by its form, so that transformers need not be there."""
    return type(part).__name__ == "Conv1D" and hasattr(part, "nf") and getattr(part, "weight", torch.empty(0)).ndim == 2


def matrix_of(part: nn.Module) -> Tensor:
    """W (O, I) of a linear map, (O, I · kernel) of a convolution."""
    weight = part.weight.detach()
    return weight.T if is_conv1d(part) else weight.flatten(1)


def as_modules(old: nn.Module, layer: LowRank) -> nn.Sequential:
    """The two modules that compute second(first(x)), with the old one's bias after the second."""
    first, second = layer.first.weight.data, layer.second.weight.data
    rank, bias = len(first), old.bias
    if isinstance(old, CONVS):
        kind = type(old)
        a = kind(
            old.in_channels, rank, old.kernel_size, old.stride, old.padding, old.dilation, bias=False,
            padding_mode=old.padding_mode,
        )  # fmt: skip
        b = kind(rank, old.out_channels, 1, bias=bias is not None)
    else:
        a = nn.Linear(first.shape[1], rank, bias=False)
        b = nn.Linear(rank, len(second), bias=bias is not None)
    a.weight, b.weight = nn.Parameter(first.reshape(a.weight.shape)), nn.Parameter(second.reshape(b.weight.shape))
    if bias is not None:
        b.bias = nn.Parameter(bias.detach().clone())
    return nn.Sequential(a, b)

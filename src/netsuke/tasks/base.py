"""A task is data + loss + one metric with a direction. Splits are disjoint, and a method never sees "test"."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

Split = Literal["train", "validation", "test"]


@runtime_checkable
class Task(Protocol):
    metric: str
    higher_is_better: bool

    def batches(self, split: Split, limit: int | None = None) -> Iterator[Any]:
        """Batches in a fixed order; `limit` caps their number."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean loss of one batch, differentiable."""

    def score(self, model: nn.Module, split: Split, limit: int | None = None) -> float:
        """The metric."""

    def facts(self) -> dict:
        """What the data is: names, sizes, sha256 per split. Goes into reports."""


def run_calibration(model: nn.Module, task: Task, windows: int) -> None:
    """Runs `windows` rows of the train split through the model, for whoever listens (measure/activations.py)."""
    left = windows
    for batch in task.batches("train"):
        task.loss(model, batch[:left])
        left -= len(batch)
        if left <= 0:
            break

"""All operator kinds by name. A new kind is one row: its NumPy reference, its check, its arithmetic."""

from __future__ import annotations

from netsuke.graph.ops import conv, elementwise, lstm, recurrent, shape, signal, train
from netsuke.graph.ops.base import Kind

OPS: dict[str, Kind] = {
    **conv.KINDS,
    **elementwise.KINDS,
    **lstm.KINDS,
    **recurrent.KINDS,
    **shape.KINDS,
    **signal.KINDS,
    **train.KINDS,
}

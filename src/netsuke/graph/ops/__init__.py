"""All operator kinds by name. A new kind is one row: its NumPy reference, its check, its arithmetic."""

from __future__ import annotations

from netsuke.graph.ops import conv, elementwise, recurrent, shape
from netsuke.graph.ops.base import Kind

OPS: dict[str, Kind] = {
    **conv.KINDS,
    **elementwise.KINDS,
    **recurrent.KINDS,
    **shape.KINDS,
}

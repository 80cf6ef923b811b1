"""Makes the C library give large blocks back as soon as they are freed, so that a process takes what its plan says.

glibc raises its own limit for separately mapped blocks up to 32 MB whenever one is freed; from then on freed tensors stay
in the heap, full of holes. A fixed limit maps every larger tensor on its own: freed is returned. The price is page faults,
0.15 ms per MB allocated.

running   limit 1 MiB: 6 MB of 74 less with a 10 M model at 4096 tokens, a few per cent slower prefill; decoding is as fast,
          since its tensors are smaller than that
training  limit 256 KiB: 65 MB of 348 less with a 4 M model on 1024 tokens (280 of tensors and libraries), 15 to 20 %
          slower steps: for when memory is the limit
"""

from __future__ import annotations

import ctypes
import sys

LARGE = 1 << 20  # bytes; above the widened rows of layers/linear.py, which every token allocates
LARGE_IN_TRAINING = 1 << 18
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def return_freed_memory(large: int = LARGE) -> bool:
    """Maps blocks of `large` bytes and more on their own from now on; False where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, large)) and bool(mallopt(M_TRIM_THRESHOLD, large))

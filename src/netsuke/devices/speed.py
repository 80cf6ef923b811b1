"""How fast this machine computes, reads its memory and reads its disk: the measurements behind `Device.this()`.

Speeds are the best of many short runs: other programs can only slow a run down, and a plan needs what the machine can
do. Arithmetic is measured in a fresh process in which the libraries may use one thread each, with one product per core
side by side: library threads that wait for one another in a busy loop read 30 times too low on a loaded machine.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from netsuke.errors import NetsukeError

PRODUCT = 512  # 3 ms at 40 GMAC/s: short enough to fit between the time slices of other programs
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def best_time(call: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest call among those that fit into `seconds` (five at least), after one not counted."""
    call()
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def read_bandwidth(cores: int, size: int, seconds: float = 1.5) -> float:
    """Bytes/s read from RAM: the fastest eighth of a buffer of `size` bytes, its words OR-ed together, by one thread
    and by one per core; the better counts.

    Walking through the whole buffer leaves nothing of an eighth in the caches when its turn comes again, and an eighth
    is short enough to fit between the time slices of other programs. The OR of 64-bit words does the least arithmetic
    of NumPy's reductions (a float sum is 40 % slower), and reductions release the interpreter lock.
    """
    import numpy as np

    data = np.ones((8, size // 64), np.int64)
    rates = []
    for threads in sorted({1, cores}):
        turns = itertools.cycle([np.array_split(window, threads) for window in data])
        with ThreadPoolExecutor(threads) as pool:
            once = best_time(lambda t=turns, p=pool: list(p.map(np.bitwise_or.reduce, next(t))), seconds / 2)
        rates.append(data[0].nbytes / once)
    return max(rates)


def arithmetic(cores: int, seconds: float = 2.0) -> tuple[float, float | None]:
    """Multiply-accumulates/s in float32 and int8 with all cores, from a fresh process; int8 is None without PyTorch.

    NetsukeError when that process fails.
    """
    asked = "measure the arithmetic of this machine"
    command = [sys.executable, "-m", "netsuke.devices.speed", str(cores), str(seconds)]
    environment = os.environ | dict.fromkeys(ONE_THREAD, "1")
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        rates = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError) as error:
        raise NetsukeError(asked, str(error), attempt="a card of your own: --device mine.toml") from None
    except ValueError:
        found = (done.stderr.strip() or "no output").splitlines()[-1][:200]
        raise NetsukeError(asked, found, attempt="a card of your own: --device mine.toml") from None
    return rates["f32"], rates["int8"]


def side_by_side(cores: int, product: Callable[[], object], seconds: float) -> float:
    """Multiply-accumulates/s of `product`, PRODUCT cubed of them a call, run by one core and by all at once; the better
    counts, since on a loaded machine all cores are seldom free at the same time."""
    rates = []
    for threads in sorted({1, cores}):
        with ThreadPoolExecutor(threads) as pool:
            once = best_time(lambda n=threads, p=pool: list(p.map(lambda _: product(), range(n))), seconds / 2)
        rates.append(threads * PRODUCT**3 / once)
    return max(rates)


def f32_rate(cores: int, seconds: float) -> float:
    """float32 products of PRODUCT×PRODUCT matrices, NumPy. Call it where BLAS has one thread: see `arithmetic`."""
    import numpy as np

    matrix = np.random.default_rng(0).standard_normal((PRODUCT, PRODUCT), np.float32)
    return side_by_side(cores, lambda: matrix @ matrix, seconds)


def int8_rate(cores: int, seconds: float) -> float | None:
    """int8 products of PRODUCT×PRODUCT matrices with int32 sums, PyTorch; None where that is not to be had."""
    try:
        import torch

        ones = torch.ones((PRODUCT, PRODUCT), dtype=torch.int8)
        return side_by_side(cores, lambda: torch._int_mm(ones, ones), seconds)
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None


def storage_bandwidth(folder: Path, size: int = 128 << 20) -> tuple[float, str]:
    """(bytes/s, source): a file is written, synced, dropped from the page cache and read back in order.

    A second, warm read tells whether the cache was really dropped: where the first is nearly as fast, the figure is
    called an upper bound. NetsukeError is never raised: a disk that cannot be written gives a marked estimate.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        size = min(size, shutil.disk_usage(folder).free // 4)
        if size < 4 << 20:
            raise OSError("too little room")
        block = os.urandom(4 << 20)  # random: a file system that compresses must not look fast
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as file:
            for _ in range(size // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            cold, warm = _read_rate(file.name), max(_read_rate(file.name) for _ in range(2))
    except OSError as error:
        return (
            50e6,
            f"estimated: a slow memory card, since no file could be written to measure ({error.strerror or error})",
        )
    words = f"sequential read of a fresh {size >> 20} MiB file, synced"
    if cold > 0.8 * warm:
        return cold, f"measured: upper bound, {words}; the page cache could not be dropped (a memory file system?)"
    return cold, f"measured: {words} and dropped from the page cache"


def _read_rate(path: str) -> float:
    block = bytearray(4 << 20)
    done, start = 0, time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while read := file.readinto(block):
            done += read
    return done / (time.perf_counter() - start)


def launch_seconds(cores: int, seconds: float = 0.5) -> float:
    """Seconds to hand one tiny product to every core and wait for all: what one operator costs before it computes."""
    import numpy as np

    tiny = np.ones((8, 8), np.float32)
    with ThreadPoolExecutor(cores) as pool:
        return best_time(lambda: list(pool.map(tiny.dot, [tiny] * cores)), seconds)


if __name__ == "__main__":
    threads, limit = int(sys.argv[1]), float(sys.argv[2])
    print(json.dumps({"f32": f32_rate(threads, limit), "int8": int8_rate(threads, limit)}))

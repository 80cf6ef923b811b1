"""Peak memory of a call in a fresh process, above what Python, its imports and torch's threads take anyway.

A process that has worked before keeps freed pages, so a peak measured in it says nothing: every figure here comes from
a new interpreter that imports the code, runs one small matrix product (thread pools and the BLAS library are then
there), notes its resident size (`idle`), clears the kernel's high-water mark, and runs the call once.

What counts: resident pages of the process, anonymous and file-mapped alike (VmHWM). File-mapped pages can be dropped
by the kernel when memory runs short, but a reader of memory-mapped weights needs them resident at full speed; `mapped`
says how many of the resident bytes were file pages when the call ended. Pages shared with other processes (libraries)
count in full; most are in `idle`, and what is left of them (kernels of a library touched for the first time during the call)
is part of `above`.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netsuke.errors import NetsukeError

MARK = "netsuke-peak:"  # the child's answer is the line that starts so: the call may print lines of its own


@dataclass(frozen=True)
class Peak:
    """Bytes. `above` = `peak` - `idle`; `how` is "VmHWM" (the kernel's own mark) or "sampled" (every 2 ms, a lower bound)."""

    idle: int
    peak: int
    mapped: int
    seconds: float
    how: str
    result: Any = None

    @property
    def above(self) -> int:
        return self.peak - self.idle


def resident() -> dict[str, int]:
    """Bytes resident in this process: {"now", "mark" (highest so far), "mapped" (file pages now)}.

    Without /proc (macOS) `mark` comes from getrusage and the other two are equal to it and to 0.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"now": mark, "mark": mark, "mapped": 0}
    kib = {
        k: int(v.split()[0])
        for k, _, v in (line.partition(":") for line in lines)
        if k in ("VmHWM", "VmRSS", "RssFile")
    }
    return {"now": kib["VmRSS"] * 1024, "mark": kib["VmHWM"] * 1024, "mapped": kib["RssFile"] * 1024}


class Watch:
    """The highest resident size since it was opened. `clear_refs` resets the kernel's mark; where that is refused, a
    thread samples instead."""

    def __init__(self) -> None:
        self.idle = resident()["now"]
        self._highest, self._open = self.idle, True
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.how = "VmHWM"
        except OSError:
            self.how = "sampled"
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()

    def _sample(self) -> None:
        while self._open:
            self._highest = max(self._highest, resident()["now"])
            time.sleep(0.002)

    def close(self) -> int:
        """Peak in bytes."""
        self._open = False
        return resident()["mark"] if self.how == "VmHWM" else max(self._highest, resident()["now"])


def peak_of(
    target: str, *args: Any, threads: int | None = None, folders: tuple[str, ...] = (), timeout: float = 600
) -> Peak:
    """Runs `target` ("package.module:function") once in a fresh Python and returns its peak memory.

    args      passed on as JSON, as is the function's return value (`Peak.result`)
    threads   torch's threads; None keeps torch's default
    folders   put in front of the child's import path

    Raises NetsukeError when the child fails (its last line of error is quoted) or takes longer than `timeout` seconds.
    """
    job = json.dumps({"target": target, "args": args, "threads": threads, "folders": [str(f) for f in folders]})
    try:
        done = subprocess.run(
            [sys.executable, "-m", "netsuke.measure.peak"], input=job, capture_output=True, text=True, timeout=timeout,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise NetsukeError(f"measure {target}", f"it ran longer than {timeout:g} s", "", "a smaller case") from None
    answers = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not answers:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        why = f"killed by signal {-done.returncode}" if done.returncode < 0 else last
        raise NetsukeError(f"measure the peak memory of {target}", why, "a function that returns", "", code=1)
    return Peak(**json.loads(answers[-1].removeprefix(MARK)))


def _child(job: dict[str, Any]) -> Peak:
    sys.path[:0] = job["folders"]
    module, _, name = job["target"].partition(":")
    function = getattr(importlib.import_module(module), name)
    import torch

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    (torch.ones(64, 64) @ torch.ones(64, 64)).sum()
    watch, start = Watch(), time.monotonic()
    result = function(*job["args"])
    peak = watch.close()
    return Peak(watch.idle, peak, resident()["mapped"], time.monotonic() - start, watch.how, result)


def main() -> None:
    peak = _child(json.loads(sys.stdin.read()))
    print(MARK + json.dumps(peak.__dict__), flush=True)


if __name__ == "__main__":
    main()

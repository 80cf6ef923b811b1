"""Does `netsuke serve` keep its answers apart and its memory flat? 200 clients on loopback, half of them leaving midway.

    python benchmarks/serve_load.py [--json] [--seconds 60] [--clients 200]

A server process with the native engine is asked every question once, one after the other: those are the expected answers.
Then all clients ask at random for the given time, greedy and sampled with fixed seeds, streaming and not. Every second client
closes its connection in the middle of each answer, at a random point. A finished answer must equal the expected one and an
abandoned one must be its beginning. 429 is an answer too: the client waits a little and goes on.
Bars: no wrong answer; no status but 200 and 429; resident memory of the server within 2 % after the first 10 s; all slots and
the queue empty at the end; exit code 0 on SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from netsuke.measure.machine import provenance

RESULT = Path(__file__).parent / "results/serve.json"
WARM, FLAT = 10.0, 0.02  # seconds; share of the resident memory
OPENINGS = (
    "def add(a, b):\n    return", "class Stack:\n    def push(self, item):\n", "import os\n\n\ndef walk(path):\n",
    "for i in range(10):\n    print(", "try:\n    value = int(text)\nexcept", "# Copyright\n\nfrom collections import",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A question whose answer is fixed: greedy, or sampled under a seed."""

    prompt: str
    tokens: int
    temperature: float
    seed: int

    def body(self, stream: bool) -> bytes:
        ask = {"prompt": self.prompt, "max_tokens": self.tokens, "temperature": self.temperature, "seed": self.seed}
        return json.dumps({**ask, "stream": stream}).encode()


@dataclass
class Tally:
    """What the clients saw."""

    statuses: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    abandoned: int = 0
    wrong: int = 0
    seconds: list[float] = field(default_factory=list)  # of finished answers
    resident: list[tuple[float, int]] = field(default_factory=list)  # (seconds since the start, bytes)
    errors: Counter[str] = field(default_factory=Counter)


class Reply:
    """One HTTP answer read from a raw socket: `status`, then `text()` pieces as they arrive."""

    def __init__(self, reader: asyncio.StreamReader):
        self._reader, self.status, self._chunked = reader, 0, False

    async def open(self) -> Reply:
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        self.status, self._chunked = int(head.split(b" ", 2)[1]), b"transfer-encoding: chunked" in head
        return self

    async def whole(self) -> dict[str, Any]:
        return json.loads(await self._reader.read())

    async def events(self):
        """Text of each server-sent event; nothing after [DONE]."""
        assert self._chunked
        rest = b""
        while size := int((await self._reader.readline()).strip() or b"0", 16):
            rest += (await self._reader.readexactly(size + 2))[:-2]
            *events, rest = rest.split(b"\n\n")
            for event in events:
                data = event.removeprefix(b"data: ")
                if data == b"[DONE]":
                    return
                parsed = json.loads(data)
                if "error" in parsed:
                    raise RuntimeError(parsed["error"]["message"])
                yield parsed["choices"][0]["text"]


async def ask(host: str, port: int, case: Case, stream: bool, leave_after: int | None = None) -> tuple[int, str, bool]:
    """(status, text, whether the answer is complete). With `leave_after` the connection closes after so many events; with
    0 before any answer, and the status is 0."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        body = case.body(stream)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n"
        writer.write(f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        if leave_after == 0:
            await asyncio.sleep(0.05)  # somewhere in the queue or in the prompt
            return 0, "", False
        reply = await Reply(reader).open()
        if reply.status != 200:
            return reply.status, "", False
        if not stream:
            return 200, (await reply.whole())["choices"][0]["text"], True
        text, events = "", 0
        async for piece in reply.events():
            text, events = text + piece, events + 1
            if events == leave_after:
                return 200, text, False
        return 200, text, True
    finally:
        if leave_after is None:
            writer.close()
        else:
            writer.transport.abort()


async def client(number: int, address: tuple[str, int], known: dict[Case, str], until: float, tally: Tally) -> None:
    rng, cases = random.Random(number), list(known)
    while time.perf_counter() < until:
        case, leaves = rng.choice(cases), number % 2 == 1
        stream, begin = leaves or rng.random() < 0.5, time.perf_counter()
        try:
            status, text, complete = await ask(
                *address, case, stream, rng.randrange(case.tokens // 2) if leaves else None
            )
        except (OSError, asyncio.IncompleteReadError, RuntimeError) as e:
            tally.errors[f"{type(e).__name__}: {e}"[:80]] += 1
            continue
        if status:
            tally.statuses[str(status)] += 1
        if status not in (0, 200):
            await asyncio.sleep(rng.uniform(0.1, 0.5))
        elif complete:
            tally.finished += 1
            tally.seconds.append(time.perf_counter() - begin)
            tally.wrong += text != known[case]
        else:
            tally.abandoned += 1
            tally.wrong += not known[case].startswith(text)


def resident(pid: int) -> int:
    """Bytes of a process in memory (Linux)."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024


async def watch(pid: int, begin: float, tally: Tally) -> None:
    while True:
        tally.resident.append((time.perf_counter() - begin, resident(pid)))
        await asyncio.sleep(1)


async def get(host: str, port: int, path: str) -> str:
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
    text = (await reader.read()).decode().split("\r\n\r\n", 1)[1]
    writer.close()
    return text


async def load(url: str, pid: int, clients: int, seconds: float) -> dict[str, Any]:
    """Asks everything once, then from all sides. Returns the measurements and `met`."""
    host, port = url.removeprefix("http://").split(":")
    address = host, int(port)
    cases = [
        Case(f"{opening}{' ' * (i % 3)}", 16 + 4 * (i % 9), 0.8 * (i % 2), i)
        for i in range(4)
        for opening in OPENINGS
    ]  # fmt: skip
    known = {}
    for case in cases:
        status, known[case], complete = await ask(*address, case, stream=False)
        assert status == 200 and complete
    print(f"{len(known)} expected answers, {len(set(known.values()))} different", flush=True)
    tally, begin = Tally(), time.perf_counter()
    watcher = asyncio.create_task(watch(pid, begin, tally))
    await asyncio.gather(*(client(i, address, known, begin + seconds, tally) for i in range(clients)))
    took = time.perf_counter() - begin
    watcher.cancel()
    for _ in range(50):
        left = json.loads(await get(*address, "/health"))
        if not left["busy"] and not left["queue"]:
            break
        await asyncio.sleep(0.1)
    counters = dict(re.findall(r"^netsuke_(\S+) (\S+)$", await get(*address, "/metrics"), re.MULTILINE))
    flat = [size for t, size in tally.resident if t >= WARM]
    spread = max(flat) / min(flat) - 1 if flat else None
    ordered = sorted(tally.seconds)
    return {
        "clients": clients, "seconds": took, "cases": len(known), "finished": tally.finished, "abandoned": tally.abandoned,
        "wrong": tally.wrong, "statuses": dict(tally.statuses), "errors": dict(tally.errors), "left": left,
        "answer_seconds": {"median": median(ordered), "p95": ordered[int(0.95 * len(ordered))]} if ordered else None,
        "generated_tokens_per_second": float(counters["generated_tokens_total"]) / took,
        "resident": [[round(t, 1), size] for t, size in tally.resident], "spread_after_warm_up": spread,
        "counters": {k: float(v) for k, v in counters.items()},
        "met": {
            "no wrong answer": tally.wrong == 0 and tally.finished > 0 and tally.abandoned > 0,
            "only 200 and 429": set(tally.statuses) <= {"200", "429"} and not tally.errors,
            f"memory within {FLAT:.0%}": spread is not None and spread <= FLAT,
            "slots and queue are empty": not left["busy"] and not left["queue"],
        },
    }  # fmt: skip


def main() -> None:
    ask_for = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask_for.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    ask_for.add_argument("--model", default="pycode")
    ask_for.add_argument("--clients", type=int, default=200)
    ask_for.add_argument("--seconds", type=float, default=60)
    args = ask_for.parse_args()
    command = [sys.executable, "-m", "netsuke", "serve", args.model, "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            where = json.loads(server.stdout.readline())
            got = asyncio.run(load(where["url"], server.pid, args.clients, args.seconds))
        finally:
            server.send_signal(signal.SIGTERM)
        got["met"]["exit code 0"] = server.wait(30) == 0
    out = {"run": provenance(), "model": args.model, "server": where, **got}
    print(json.dumps({k: v for k, v in out.items() if k not in ("resident", "run")}, indent=1))
    if args.json:
        RESULT.write_text(json.dumps(out, indent=1) + "\n")
    sys.exit(0 if all(got["met"].values()) else 1)


if __name__ == "__main__":
    main()

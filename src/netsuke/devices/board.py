"""`EmulatedBoard`: a microcontroller without one: compiles C for it, links within its memory, runs and measures it.

    board = EmulatedBoard.load("m4", flash=1 << 20, ram=256 << 10)
    firmware = board.build([Path("main.c"), Path("model.c")], Path("out"))       # a link over budget is an error
    run = firmware.run(["argument"], {"input.bin": data})                        # text, files, instructions, stack_peak

Two cores: "m4" (Cortex-M4F, QEMU's mps2-an386) and "m7" (Cortex-M7, mps2-an500). The machines have 4 MB of RAM and of
flash; the device's limits are the linker script's regions and the memory protection unit, which faults on everything
behind them. QEMU runs with -icount: one instruction is one nanosecond of virtual time, so two runs count the same.
Instructions are not cycles: a Cortex-M7 issues up to two at once, and flash has wait states.

Firmware includes `board.h` (board_sources/): `ns_instructions()`, files of the run's folder, text. Its stack lies at the
bottom of RAM, where an overflow faults; what main() and below it used at most is `stack_peak`.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from netsuke.errors import NetsukeError

SOURCES = Path(__file__).parent / "board_sources"
PREFIX = "arm-none-eabi-"
PACKAGES = {
    PREFIX + "gcc": "gcc-arm-none-eabi libnewlib-arm-none-eabi", "qemu-system-arm": "qemu-system-arm",
}  # fmt: skip
MACHINE = 4 << 20  # bytes of flash and of RAM that both machines have
STEP = 128  # bytes: the smallest part of a region that the protection unit switches
RAM_START = 0x2000_0000
TICK = 40  # instructions
REPORT = struct.Struct("<7I4xQ")  # startup.c's Report
FLAGS = (
    "-mthumb", "-mfloat-abi=hard", "-std=c99", "-Wall", "-Wextra", "-ffp-contract=off", "-ffunction-sections",
    "-fdata-sections",
)  # fmt: skip


@dataclass(frozen=True)
class Core:
    machine: str
    flags: tuple[str, ...]


CORES = {
    "m4": Core("mps2-an386", ("-mcpu=cortex-m4", "-mfpu=fpv4-sp-d16")),
    "m7": Core("mps2-an500", ("-mcpu=cortex-m7", "-mfpu=fpv5-sp-d16")),
}


def missing_tools() -> str:
    """The Debian packages to install before boards can be emulated, "" when all is there."""
    return " ".join(package for tool, package in PACKAGES.items() if shutil.which(tool) is None)


@dataclass(frozen=True)
class EmulatedBoard:
    """A core with flash, RAM and a reserved part of RAM for the stack, all in bytes."""

    core: str
    flash: int
    ram: int
    stack: int = 4096

    @classmethod
    def load(cls, core: str, flash: int, ram: int, stack: int = 4096) -> EmulatedBoard:
        """The board. Raises NetsukeError for an unknown core, sizes the machine does not have, missing tools."""
        asked = f"emulate a board {core!r} with {flash} bytes of flash and {ram} bytes of RAM"
        if core not in CORES:
            raise NetsukeError(asked, "the core is unknown", ", ".join(CORES))
        for what, size in (("flash", flash), ("RAM", ram), ("stack", stack)):
            if not 1024 <= size <= MACHINE or size % STEP:
                raise NetsukeError(asked, f"{what} is {size} bytes", f"multiples of {STEP} from 1024 to {MACHINE}")
        if stack >= ram:
            raise NetsukeError(asked, f"the stack takes {stack} bytes", f"less than the RAM of {ram} bytes")
        if packages := missing_tools():
            raise NetsukeError(asked, "its tool chain is not installed", "", f"sudo apt-get install {packages}")
        return cls(core, flash, ram, stack)

    def build(
        self,
        sources: Sequence[Path],
        out: Path,
        *,
        include: Sequence[Path] = (),
        defines: Mapping[str, str | int] | None = None,
        optimise: str = "-O2",
        dsp: bool = True,
        beside: Sequence[Path] = (),
    ) -> Firmware:
        """Compiles `sources` as C99 and links them with the board's start-up code into `out`/firmware.elf.

        `beside`: further sources, such as test vectors, whose constants and code lie behind the device's flash and do
        not count. dsp=False defines NS_NO_DSP: kernels then use portable C only. Raises NetsukeError with numbers when
        flash or RAM do not suffice, and with the compiler's first error.
        """
        asked = f"build for the board {self.core!r}"
        out.mkdir(parents=True, exist_ok=True)
        macros = dict(defines or {}) | ({} if dsp else {"NS_NO_DSP": 1})
        flags = [*CORES[self.core].flags, *FLAGS, optimise, *(f"-D{k}={v}" for k, v in macros.items())]
        flags += [f"-I{folder}" for folder in (SOURCES, *include)]
        whole = ["-fno-function-sections", "-fno-data-sections"]  # their sections are moved by name
        jobs = [(p, []) for p in sources] + [(p, whole) for p in beside]
        own = len(jobs)
        jobs += [(p, ["-O2"]) for p in sorted(SOURCES.glob("*.c"))]
        objects = [out / f"{k:02}-{p.stem}.o" for k, (p, _) in enumerate(jobs)]

        def compile_one(job: tuple[Path, list[str]], to: Path) -> None:
            _tool(asked, "gcc", *flags, *job[1], "-c", str(job[0]), "-o", str(to))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, jobs, objects))
        for to in objects[len(sources) : own]:
            _tool(asked, "objcopy", *(f"--rename-section={s}=.beside{s}" for s in (".text", ".rodata")), str(to))
        elf = out / "firmware.elf"
        self._link(asked, flags, objects, elf)
        board = {o.stem for o in objects[own:]}
        return Firmware(self, elf, _linked(elf.with_suffix(".map"), board), **_total(elf))

    def _link(self, asked: str, flags: list[str], objects: list[Path], elf: Path) -> None:
        limits = {"ns_flash_limit": self.flash, "ns_ram_limit": self.ram, "ns_stack_reserve": self.stack}
        try:
            _tool(
                asked, "gcc", *flags, "-nostartfiles", f"-T{SOURCES / 'board.ld'}", "-Wl,--gc-sections",
                *(f"-Wl,--defsym={k}={v}" for k, v in limits.items()), *map(str, objects), "-lm",
                f"-Wl,-Map={elf.with_suffix('.map')}", "-o", str(elf),
            )  # fmt: skip
        except NetsukeError as e:
            over = dict(re.findall(r"region `(FLASH|RAM)' overflowed by (\d+) bytes", e.found))
            if not over:
                raise
            said, sizes = [], _sizes(objects)
            for region, what, limit, pick in (
                ("FLASH", "flash", self.flash, lambda s: s.text + s.data),
                ("RAM", "RAM", self.ram, lambda s: s.data + s.bss),
            ):
                if region in over:
                    top = max(sizes, key=lambda o, pick=pick: pick(sizes[o]))
                    need = limit + int(over[region])
                    reserve = f" with {self.stack} of stack" if region == "RAM" else ""
                    said.append(f"{what}: {need} bytes are needed{reserve}, {over[region]} too many "
                                f"(most in {top.stem[3:]}: {pick(sizes[top])})")  # fmt: skip
            raise NetsukeError(
                asked, "; ".join(said), f"{self.flash} bytes of flash, {self.ram} bytes of RAM",
                "a smaller model, weights of 4 bits, or a larger device", code=1,
            ) from None  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Bytes of an object file or of the whole firmware."""

    text: int
    data: int
    bss: int


@dataclass(frozen=True)
class Run:
    """One run of a firmware.

    text, files     what it printed; the files it wrote, by name
    code            its exit code; 97 after a fault, 98 at the limit of instructions
    instructions    from the start of main() to the end, in steps of 40
    stack_peak      bytes, of the board's reserve
    heap_peak       bytes that malloc took from what variables leave of RAM
    seconds         of this computer
    fault           a sentence when it did not end by itself, else ""
    """

    text: str
    files: dict[str, bytes] = field(repr=False)
    code: int
    instructions: int
    stack_peak: int
    heap_peak: int
    seconds: float
    fault: str = ""


@dataclass(frozen=True)
class Firmware:
    """A linked program. flash and ram are bytes linked, without what was built beside and without the stack's reserve;
    parts are the bytes linked by source file ("board": the start-up code; libc, libm, libgcc: what the sources pulled in)."""

    board: EmulatedBoard
    elf: Path
    parts: dict[str, Size]
    flash: int
    ram: int

    def symbols(self) -> dict[str, int]:
        """Bytes of every linked symbol."""
        return {name: size for _, size, name in self._symbols()}

    def _symbols(self) -> list[tuple[int, int, str]]:
        """(address, bytes, name)"""
        lines = _tool("read the firmware", "nm", "-S", str(self.elf)).splitlines()
        return [(int(p[0], 16), int(p[1], 16), p[3]) for p in map(str.split, lines) if len(p) == 4]

    def _function(self, pc: int) -> str:
        names = (f"{name}()" for start, size, name in self._symbols() if start & ~1 <= pc < (start & ~1) + size)
        return next(names, hex(pc))

    def run(
        self,
        args: Sequence[str] = (),
        files: Mapping[str, bytes] | None = None,
        *,
        seconds: float = 120,
        instructions: int | None = None,
        check: bool = True,
    ) -> Run:
        """Runs it in an empty folder that holds `files` and returns what came out.

        `instructions` ends the run there (in steps of 40, at most 1.7e11), `seconds` on this computer's clock. With
        `check`, an exit code other than 0 raises NetsukeError, a fault with its sentence; a run that passes `seconds`
        always does.
        """
        asked = f"run {self.elf.stem} on the board {self.board.core!r}"
        for name in files or {}:
            if Path(name).name != name or name in ("", ".", "..", "netsuke.report"):
                raise NetsukeError(asked, f"{name!r} is no plain file name", "names without folders")
        for arg in args:
            if not arg or " " in arg:
                raise NetsukeError(asked, f"the argument {arg!r} is empty or has spaces", "words")
        ticks = 0 if instructions is None else max(1, instructions // TICK)
        words = [f"{ticks:x}", *args]
        if ticks >= 1 << 32 or len(" ".join(words)) > 254 or len(words) > 16:
            raise NetsukeError(asked, "the limit or the arguments are too long", "1.7e11 instructions, 240 characters")
        config = "enable=on,target=native" + "".join(",arg=" + w.replace(",", ",,") for w in words)
        with tempfile.TemporaryDirectory(prefix="netsuke-board-") as folder:
            here = Path(folder)
            for name, data in (files or {}).items():
                (here / name).write_bytes(data)
            start = time.monotonic()
            try:
                done = subprocess.run(
                    ["qemu-system-arm", "-M", CORES[self.board.core].machine, "-display", "none", "-monitor", "none",
                     "-serial", "none", "-icount", "shift=0", "-semihosting-config", config,
                     "-kernel", str(self.elf.resolve())],
                    cwd=here, capture_output=True, timeout=seconds, stdin=subprocess.DEVNULL,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise NetsukeError(asked, f"it did not end within {seconds:g} seconds", "", "a longer limit") from None
            run = self._read(done, here, set(files or {}), time.monotonic() - start)
        if check and run.code:
            raise NetsukeError(asked, run.fault or f"it ended with the code {run.code}: {run.text[-200:]}", code=1)
        return run

    def _read(self, done: subprocess.CompletedProcess, here: Path, given: set[str], seconds: float) -> Run:
        text = done.stdout.decode("utf-8", "replace")
        written = {p.name: p.read_bytes() for p in sorted(here.iterdir()) if p.is_file()}
        report = written.pop("netsuke.report", b"")
        files = {name: data for name, data in written.items() if name not in given}
        if len(report) != REPORT.size:
            why = done.stderr.decode("utf-8", "replace").strip().splitlines()
            return Run(
                text, files, done.returncode or 1, 0, 0, 0, seconds, f"the processor stopped: {(why or ['?'])[0]}"
            )
        how, code, stack, heap, status, address, pc, count = REPORT.unpack(report)
        fault = ("", self._sentence(status, address, pc), f"it was ended after {count} instructions")[how]
        return Run(text, files, code, count, stack, heap, seconds, fault)

    def _sentence(self, status: int, address: int, pc: int) -> str:
        """What a fault was, from the fault status register, the address and the program counter."""
        board, where = self.board, f" in {self._function(pc)}" if pc else ""
        if RAM_START - 0x10000 <= address < RAM_START:
            return f"the stack needs more than its {board.stack} bytes{where}"
        if RAM_START + board.ram <= address < RAM_START + MACHINE:
            behind = address - RAM_START - board.ram
            return f"it used memory {behind} bytes behind the end of its {board.ram} bytes of RAM{where}"
        if address < MACHINE and status & 0x82 == 0x82:
            return f"it wrote to flash at {address:#x}{where}"
        return f"it faulted with the status {status:#x} at the address {address:#x}{where}"


def _tool(asked: str, name: str, *args: str) -> str:
    """The standard output of a tool of the chain. NetsukeError with its errors when it fails."""
    done = subprocess.run([PREFIX + name, *args], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if re.search(r"error|overflow|undefined", line)]
        raise NetsukeError(asked, "; ".join(lines[:4]) or done.stderr[-300:] or f"{name} failed")
    return done.stdout


def _sizes(objects: list[Path]) -> dict[Path, Size]:
    rows = _tool("measure the object files", "size", *map(str, objects)).splitlines()[1:]
    return {o: Size(*map(int, row.split()[:3])) for o, row in zip(objects, rows)}


def _linked(map_file: Path, board: set[str]) -> dict[str, Size]:
    """What each source file and library has in the firmware, from the linker's map."""
    out: dict[str, list[int]] = {}
    placed = map_file.read_text().split("Linker script and memory map")[-1]
    rows = re.findall(r"^ \.?(\S+)\s+0x[0-9a-f]+\s+0x([0-9a-f]+) (\S+\.o\)?)$", placed, re.M)
    for section, size, origin in rows:
        kind = next((k for k, prefix in enumerate((("text", "rodata", "vectors", "ARM.ex", "beside"), ("data",), ("bss",)))
                     if section.startswith(prefix)), None)  # fmt: skip
        if kind is None:  # notes and comments, which are not loaded
            continue
        library = re.search(r"/(lib\w+)\.a\(", origin)
        stem = library[1] if library else Path(origin).stem
        part = "board" if stem in board else stem if library else stem[3:]
        out.setdefault(part, [0, 0, 0])[kind] += int(size, 16)
    return {part: Size(*sizes) for part, sizes in out.items() if any(sizes)}


def _total(elf: Path) -> dict[str, int]:
    """flash and ram of a linked file, from its sections."""
    rows = re.findall(r"^(\.\S+)\s+(\d+)", _tool("measure the firmware", "size", "-A", str(elf)), re.M)
    size = {name: int(n) for name, n in rows}
    data = size.get(".data", 0)
    return {"flash": size[".text"] + size.get(".ARM.exidx", 0) + data, "ram": data + size.get(".bss", 0)}

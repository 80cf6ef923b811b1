"""`Device.this()`: the machine at hand, measured in 10 to 20 seconds and kept in the user's cache.

What changes from minute to minute (free memory, free disk) is read anew at every call, cache or not. Energy is not
measured: few machines let a plain user read it, and the figures say that they are estimates.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from netsuke import __version__
from netsuke.devices import speed
from netsuke.devices.device import Device
from netsuke.errors import NetsukeError

# what kernels are chosen by; everything else in the processor's list is noise here
ISA = {
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8",
    "neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme",
}  # fmt: skip
APPLE_ISA = {
    "FEAT_FP16": "asimdhp",
    "FEAT_DotProd": "asimddp",
    "FEAT_I8MM": "i8mm",
    "FEAT_BF16": "bf16",
    "FEAT_SME": "sme",
}
UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number just below 2^63


def cached_probe(refresh: bool = False) -> Device:
    """The probed machine, from the cache file if it is whole; a torn or foreign file is measured again."""
    path = cache_path()
    device = None
    if not refresh:
        try:
            device = msgspec.json.decode(path.read_bytes(), type=Device)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, NetsukeError):
            device = None
    if device is None:
        device = probe()
        _write_atomically(path, msgspec.json.format(msgspec.json.encode(device), indent=1))
    return with_free_space(device)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "netsuke"


def cache_path() -> Path:
    """One file per processor model, number of usable cores and version of this package."""
    key = f"{cpu_model()}|{core_count()}|{__version__}"
    return cache_folder() / f"this-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _write_atomically(path: Path, data: bytes) -> None:
    """Write, fsync, rename. A cache that cannot be written is no reason to fail: the next call measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".this-")
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)


def _read(path: Path | str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _sysctl(key: str) -> str:
    """A macOS system value, or ""."""
    try:
        return subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def cpu_model() -> str:
    info = _read("/proc/cpuinfo")
    named = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", info, re.MULTILINE)
    board = _read("/sys/firmware/devicetree/base/model").strip("\0 \n")
    return (
        board or (named[1].strip() if named else "") or _sysctl("machdep.cpu.brand_string") or platform.machine()
        or "unknown processor"
    )  # fmt: skip


def core_count() -> int:
    """Cores this process may run on, which a container can make fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def instruction_sets() -> tuple[str, ...]:
    words = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    if words:
        return tuple(sorted(ISA.intersection(words[1].split())))
    apple = {name for key, name in APPLE_ISA.items() if _sysctl(f"hw.optional.arm.{key}") == "1"}
    if platform.machine() in ("arm64", "aarch64"):
        apple.add("asimd")
    return tuple(sorted(apple))


def cgroup_room(root: Path = Path("/sys/fs/cgroup"), membership: str | None = None) -> tuple[int, int] | None:
    """(limit, bytes still free under it) of the tightest memory cgroup above this process, v2 or v1; None without one.

    Page cache that the kernel would drop (`inactive_file`) counts as free.
    """
    membership = _read("/proc/self/cgroup") if membership is None else membership
    best = None
    for line in membership.splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            base, limit_name, used_name = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit_name, used_name = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = base / path.lstrip("/")
        # inside a container the path may not exist below the mounted root, whose own file then holds the limit
        for place in [folder, *folder.parents][: len(folder.relative_to(base).parts) + 1]:
            limit = _read(place / limit_name).strip()
            if not limit.isdigit() or int(limit) >= UNLIMITED:
                continue
            cache = re.search(r"^(?:total_)?inactive_file (\d+)$", _read(place / "memory.stat"), re.MULTILINE)
            used = _read(place / used_name).strip()
            busy = max(0, (int(used) if used.isdigit() else 0) - (int(cache[1]) if cache else 0))
            room = (int(limit), max(0, int(limit) - busy))
            best = room if best is None else min(best, room, key=lambda pair: pair[1])
    return best


def memory() -> tuple[int, int, str]:
    """(bytes there are, bytes free now, how it was read), with a container's limit taken into account."""
    info = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE))
    if info:
        total = int(info["MemTotal"]) * 1024
        free = int(info.get("MemAvailable", info.get("MemFree", "0"))) * 1024
        how = "measured: MemTotal and MemAvailable of /proc/meminfo"
    elif _sysctl("hw.memsize").isdigit():
        total = int(_sysctl("hw.memsize"))
        free, how = total // 2, "measured: sysctl hw.memsize; half of it taken as free"
    else:
        raise NetsukeError(
            "measure this machine", f"no way to read the memory size on {platform.system() or 'this system'}",
            "Linux or macOS", "a card of your own: --device mine.toml",
        )  # fmt: skip
    room = cgroup_room()
    if room is not None and room[0] < total:
        total, free, how = room[0], min(free, room[1]), "measured: memory limit and use of the control group"
    return total, max(1, min(total, free)), how


def last_cache_bytes() -> int:
    """The largest cache the system names; 32 MiB where it names none."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number = re.fullmatch(r"(\d+)([KM])", _read(path).strip())
        if number:
            sizes.append(int(number[1]) << (10 if number[2] == "K" else 20))
    return max(sizes, default=32 << 20)


def with_free_space(device: Device) -> Device:
    """The device with what is free this minute."""
    now, how = free_space()
    return msgspec.structs.replace(device, **now, sources=device.sources | how)


def free_space() -> tuple[dict[str, int], dict[str, str]]:
    """(ram, ram_total and storage, their sources): free memory, and half of the free disk."""
    total, free, how = memory()
    disk = _free_disk([Path.cwd, Path.home, lambda: Path(tempfile.gettempdir())])
    return (
        {"ram": free, "ram_total": total, "storage": max(1, disk // 2)},
        {"ram": how, "ram_total": how, "storage": "measured: half of the free disk space"},
    )


def _free_disk(places: Iterable[Callable[[], Path]]) -> int:
    for place in places:
        try:
            return shutil.disk_usage(place()).free
        except (OSError, RuntimeError):
            continue
    return 0


def machine_kind(arm: bool) -> str:
    """ "laptop" with a battery or an apple on it, "sbc" for an Arm board, else "server"."""
    if platform.system() == "Darwin" or any(Path("/sys/class/power_supply").glob("BAT*")):
        return "laptop"
    return "sbc" if arm else "server"


def load_note(cores: int) -> str:
    """What to add to a source when other programs were busy: the figure may then be low."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return f"; perhaps low, {load:.1f} programs were already busy on {cores} cores" if load > 0.5 * cores else ""


def probe() -> Device:
    """Measure this machine. Takes 10 to 20 s, a quarter of the free memory at most, and 128 MiB of disk for a moment.

    NetsukeError where not even the memory size can be read.
    """
    cores = core_count()
    busy = load_note(cores)
    now, how = free_space()
    size = min(max(256 << 20, 4 * last_cache_bytes()), 1 << 30, max(1 << 20, now["ram"] // 4))
    floats, ints = speed.arithmetic(cores)
    rates = {"f32": floats, "int8": 2 * floats if ints is None else ints}
    disk, disk_source = speed.storage_bandwidth(cache_folder())
    arm = platform.machine().lower().startswith(("arm", "aarch64"))
    watts = (1.0 if arm else 5.0) * cores
    products = f"product of {speed.PRODUCT}×{speed.PRODUCT}"
    energy_source = f"estimated: {watts / cores:g} W per busy core, divided by the measured rate"
    return Device(
        name="this",
        title=f"{cpu_model()}, {cores} cores",
        kind=machine_kind(arm),
        **now,
        ram_bandwidth=speed.read_bandwidth(cores, size),
        storage_bandwidth=disk,
        rates=rates,
        cores=cores,
        isa=instruction_sets(),
        overhead_s=speed.launch_seconds(cores),
        energy_per_mac={key: watts / rate for key, rate in rates.items()},
        energy_per_byte=4e-11,
        homes=("native", "web", "onnx", "executorch", "gguf"),
        sources=how
        | {
            "ram_bandwidth": f"measured: fastest OR-reduction over {size >> 20} MiB, by 1 and by {cores} threads{busy}",
            "storage_bandwidth": disk_source,
            "rates.f32": f"measured: fastest {products} float32 matrices, NumPy{busy}",
            "rates.int8": (
                f"measured: fastest {products} int8 matrices with int32 sums, PyTorch{busy}"
                if ints is not None
                else "estimated: twice the measured f32 rate, since there is no PyTorch to measure int8 with"
            ),
            "cores": "measured: processor cores that this process may use",
            "overhead_s": f"measured: fastest hand-over of a tiny product to {cores} threads{busy}",
            "energy_per_mac.f32": energy_source,
            "energy_per_mac.int8": energy_source,
            "energy_per_byte": "estimated: 5 pJ per bit for DDR4, LPDDR4 and later, controller included",
        },
    )

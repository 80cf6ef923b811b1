"""Builds native/tests with CMake, for this machine, under sanitizers, and for two others that an emulator runs.

Builds are kept in build/native-tests and only repeated where a source has changed.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILDS = ROOT / "build" / "native-tests"


@dataclass(frozen=True)
class Target:
    """`needs` are programs, `run` stands before the command, `settings` go to CMake."""

    needs: tuple[str, ...] = ()
    run: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()


def _cross(processor: str, triple: str, emulator: str) -> Target:
    settings = (
        "-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={processor}", f"-DCMAKE_C_COMPILER={triple}-gcc"
    )  # fmt: skip
    return Target((f"{triple}-gcc", f"{triple}-objdump", emulator), (emulator, "-L", f"/usr/{triple}"), settings)


TARGETS = {
    "host": Target(("cc",)),
    "sanitized": Target(("cc",), (), ("-DNS_SANITIZE=address,undefined",)),
    "aarch64": _cross("aarch64", "aarch64-linux-gnu", "qemu-aarch64"),
    "armhf": _cross("armv7", "arm-linux-gnueabihf", "qemu-arm"),
}


def _missing(name: str) -> str | None:
    """Why a target cannot be built here; None when it can."""
    absent = [program for program in ("cmake", "make", *TARGETS[name].needs) if not shutil.which(program)]
    if absent:
        return f"not installed: {', '.join(absent)}"
    if name == "sanitized":
        command = ["cc", "-fsanitize=address,undefined", "-x", "c", "-", "-o", os.devnull]
        if subprocess.run(command, input=b"int main(void) { return 0; }", capture_output=True).returncode:
            return "the compiler has no sanitizers"
    return None


@functools.cache
def build(name: str) -> Path:
    """The folder with `check` and `fuzz` of a target; skips the test, with the reason, where a tool is missing."""
    why = _missing(name)
    if why:
        pytest.skip(why)
    folder = BUILDS / name
    BUILDS.mkdir(parents=True, exist_ok=True)
    configure = ["cmake", "-S", str(ROOT / "native"), "-B", str(folder), "-DNS_PYTHON=OFF", "-DNS_TESTS=ON"]
    configure += TARGETS[name].settings
    with (BUILDS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run in several processes
        if subprocess.run(configure, capture_output=True).returncode:  # a folder that was moved or left half-made
            shutil.rmtree(folder, ignore_errors=True)
            done = subprocess.run(configure, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        make = ["cmake", "--build", str(folder), "--target", "check", "fuzz"]
        done = subprocess.run(make, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def run(name: str, program: str, *args: object, emulator: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs a program of a target; `emulator` adds options for the emulator."""
    folder, target = build(name), TARGETS[name]
    command = [*target.run, *emulator, str(folder / program), *(str(a) for a in args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)

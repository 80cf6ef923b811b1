"""The emulated board: budgets hold at link time and at run time, counts repeat, the stack's mark is right."""

import shutil

import pytest

from netsuke.devices import board as boards
from netsuke.devices.board import EmulatedBoard, missing_tools
from netsuke.errors import NetsukeError

needs_tools = pytest.mark.skipif(bool(missing_tools()), reason=f"not installed: {missing_tools()}")

MAIN = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "board.h"
extern const unsigned char vector[5000];
static volatile int left = 3;
static int __attribute__((noinline)) descend(int n) {
  volatile char frame[256];
  frame[0] = (char)n;
  return n ? descend(n - 1) + frame[0] : 0;
}
static void __attribute__((noinline)) spill(unsigned address) { *(volatile int *)address = 1; }
int main(int argc, char **argv) {
  const char *what = argc ? argv[0] : "";
  if (!strcmp(what, "count")) {
    unsigned long long start = ns_instructions();
    for (unsigned i = 0; i < 100000; i++) __asm__ volatile("nop");
    ns_print_count("loop", ns_instructions() - start);
  }
  if (!strcmp(what, "descend")) return descend(argv[1][0] - 'A') & 0;
  if (!strcmp(what, "overflow")) return descend(100);
  if (!strcmp(what, "last")) spill(0x20000000u + RAM - 4);
  if (!strcmp(what, "beyond")) spill(0x20000000u + RAM);
  if (!strcmp(what, "far")) spill(0x20000000u + 0x300000u);
  if (!strcmp(what, "flash")) spill((unsigned)(argv - argc) & 0u);
  if (!strcmp(what, "forever"))
    for (;;) __asm__ volatile("nop");
  if (!strcmp(what, "copy")) {
    unsigned char bytes[16];
    int from = ns_open("in.bin", "rb"), to = ns_open("out.bin", "wb");
    ns_print_count("length", (unsigned long long)ns_length(from));
    for (size_t n; (n = ns_read(from, bytes, sizeof bytes)) > 0;) ns_write(to, bytes, n);
    ns_close(from);
    ns_close(to);
    if (ns_open("absent.bin", "rb") != -1) return 1;
  }
  if (!strcmp(what, "printf")) printf("%d %s %.3f\\n", left, argv[1], 0.125 * left);
  if (!strcmp(what, "malloc")) {
    char *p = malloc(3000);
    if (!p || malloc(RAM)) return 1;
    p[0] = p[2999] = 1;
  }
  return !strcmp(what, "code") ? 7 : (left != 3) + vector[argc] - argc % 256;
}
"""
RAM = 24704  # not a power of two, and a part of the smallest region


@pytest.fixture(scope="module", params=["m4", "m7"])
def firmware(request, tmp_path_factory):
    if missing_tools():
        pytest.skip(f"not installed: {missing_tools()}")
    folder = tmp_path_factory.mktemp("board")
    (folder / "main.c").write_text(MAIN)
    values = ",".join(str(i % 256) for i in range(5000))
    (folder / "vector.c").write_text(
        f"extern const unsigned char vector[5000];\nconst unsigned char vector[5000] = {{{values}}};\n"
    )
    board = EmulatedBoard.load(request.param, 64 << 10, RAM, stack=4096)
    sources = [folder / "main.c"]
    return board.build(sources, folder / "out", defines={"RAM": RAM}, beside=[folder / "vector.c"])


def test_counts_repeat_and_are_the_instructions(firmware):
    first, second = (firmware.run(["count"]) for _ in range(2))
    assert (first.instructions, first.text, first.stack_peak) == (second.instructions, second.text, second.stack_peak)
    loop = int(first.text.split()[1])
    assert 3 * 100_000 - 80 <= loop <= 3 * 100_000 + 200  # nop, subtract, branch
    assert 0 < first.instructions - loop < 5000


def test_stack_peak_follows_the_recursion(firmware):
    shallow, deep = (firmware.run(["descend", depth]).stack_peak for depth in "AK")
    assert 10 * 256 <= deep - shallow <= 10 * 288  # the frame, saved registers
    assert shallow < 512


@pytest.mark.parametrize(
    "what, sentence",
    [
        ("overflow", "the stack needs more than its 4096 bytes"),
        ("beyond", "it used memory 0 bytes behind the end of its 24704 bytes of RAM in spill()"),
        ("far", "behind the end of its 24704 bytes of RAM in spill()"),
        ("flash", "it wrote to flash at 0x0 in spill()"),
    ],
)
def test_memory_that_is_not_there_faults(firmware, what, sentence):
    run = firmware.run([what], check=False)
    assert run.code == 97 and sentence in run.fault
    with pytest.raises(NetsukeError, match="cannot run firmware on the board"):
        firmware.run([what])


def test_the_last_word_of_ram_is_allowed(firmware):
    assert firmware.run(["last"]).code == 0


def test_files_text_codes_and_printf(firmware):
    data = bytes(range(256)) * 3 + b"end"
    run = firmware.run(["copy"], {"in.bin": data})
    assert run.files == {"out.bin": data} and run.text == f"length {len(data)}\n"
    assert firmware.run(["printf", "a,b"]).text == "3 a,b 0.375\n"
    assert firmware.run(["malloc"]).heap_peak >= 3000 and run.heap_peak == 0
    assert firmware.run(["code"], check=False).code == 7
    with pytest.raises(NetsukeError, match="it ended with the code 7"):
        firmware.run(["code"])


def test_a_run_ends_at_its_limits(firmware):
    run = firmware.run(["forever"], instructions=4_000_000, check=False)
    assert run.code == 98 and "was ended" in run.fault and 4_000_000 <= run.instructions < 4_001_000
    with pytest.raises(NetsukeError, match=r"did not end within 0\.3 seconds"):
        firmware.run(["forever"], seconds=0.3)


def test_sizes(firmware):
    assert firmware.symbols()["vector"] == 5000 and firmware.parts["vector"].text >= 5000
    assert firmware.parts["main"].data == 4
    inside = {part: size for part, size in firmware.parts.items() if part != "vector"}
    linked = sum(size.text + size.data for size in inside.values())
    assert set(inside) >= {"main", "board", "libc"} and 0 <= firmware.flash - linked < 200  # padding
    assert 0 <= firmware.ram - sum(size.data + size.bss for size in inside.values()) < 100
    assert 2000 < firmware.flash < 40_000  # printf is in it, the vector beside it is not
    assert 0 < firmware.ram < RAM - 4096


@needs_tools
@pytest.mark.parametrize("kind, limit", [("const", "flash"), ("static", "RAM")])
def test_a_link_over_budget_says_the_numbers(tmp_path, kind, limit):
    big = "int main(void) { unsigned n = 0; for (unsigned i = 0; i < sizeof big; i++) n += big[i]; return (int)n; }"
    (tmp_path / "big.c").write_text(
        f"{kind} volatile char big[20000] = {{{'1' if kind == 'const' else '0'}}};\n{big}\n"
    )
    with pytest.raises(NetsukeError, match=rf"{limit}: \d+ bytes are needed.* too many \(most in big: 20\d\d\d\)") as e:
        EmulatedBoard.load("m4", 16384, 16384).build([tmp_path / "big.c"], tmp_path / "out")
    assert "16384 bytes of flash, 16384 bytes of RAM" in str(e.value) and e.value.code == 1


@needs_tools
def test_compiler_errors_are_sentences(tmp_path):
    (tmp_path / "bad.c").write_text("int main(void) { return missing; }\n")
    with pytest.raises(NetsukeError, match="'missing' undeclared"):
        EmulatedBoard.load("m4", 16384, 16384).build([tmp_path / "bad.c"], tmp_path / "out")
    (tmp_path / "bad.c").write_text("int missing(void);\nint main(void) { return missing(); }\n")
    with pytest.raises(NetsukeError, match="undefined reference to `missing'"):
        EmulatedBoard.load("m4", 16384, 16384).build([tmp_path / "bad.c"], tmp_path / "out")


@needs_tools
@pytest.mark.parametrize(
    "core, flash, ram, stack, said",
    [
        ("m3", 65536, 65536, 4096, "unknown"), ("m4", 65536, 8 << 20, 4096, "RAM is"), ("m4", 65537, 65536, 4096, "flash"),
        ("m7", 65536, 4096, 4096, "the stack takes"),
    ],
)  # fmt: skip
def test_impossible_boards(core, flash, ram, stack, said):
    with pytest.raises(NetsukeError, match=said):
        EmulatedBoard.load(core, flash, ram, stack)


@pytest.mark.parametrize("name", ["../x", "", "netsuke.report"])
def test_files_stay_in_the_folder_of_the_run(firmware, name):
    with pytest.raises(NetsukeError, match="no plain file name"):
        firmware.run(files={name: b""})


def test_missing_tools_name_their_packages(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    monkeypatch.setattr(boards.shutil, "which", lambda tool: None)
    with pytest.raises(NetsukeError, match="gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm"):
        EmulatedBoard.load("m4", 65536, 65536)

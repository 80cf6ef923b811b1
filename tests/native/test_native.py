"""The engine without Python: kernels against plain loops, whole models against PyTorch, hostile files; here, under the address
and undefined-behaviour sanitizers, and on emulated processors of 64 and 32 bits."""

from __future__ import annotations

import re
import subprocess

import numpy as np
import pytest
import torch

from netsuke.models.save import save_artifact
from tests.native.building import build, run
from tests.runtime.engine_cases import CASES, FLOATS, VOCAB, reference

MODELS = ("tied", "cut", "float16", "4-bits-64", "3-bits-128", "8-bits-48", "unlike", "lowrank-cut")
MODELS = (*MODELS, "sparse-8-bits-lowrank")
ALL = [
    "host",
    "sanitized",
    pytest.param("aarch64", marks=pytest.mark.slow),
    pytest.param("armhf", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """[(artifact folder, file of the logits that PyTorch gives for 40 tokens of a prompt)]"""
    root, out = tmp_path_factory.mktemp("models"), []
    ids = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in MODELS:
        model = CASES[name]()
        logits = reference(model, ids, []).numpy().astype("<f4")
        head = np.array([len(ids), VOCAB], "<i4").tobytes() + np.float32(2e-3 if name in FLOATS else 0.05).tobytes()
        file = root / f"{name}.logits"
        file.write_bytes(head + np.array(ids, "<i4").tobytes() + logits.tobytes())
        out.append((save_artifact(root / name, model, None, {}, {}), file))
    torch.set_num_threads(before)
    return out


@pytest.mark.parametrize("target", ALL)
def test_kernels_equal_plain_loops_and_one_another(target):
    done = run(target, "check", "kernels", 1, 150 if target == "host" else 40)
    assert done.returncode == 0, done.stdout + done.stderr
    tables = re.findall(r"(\w+): 0 differences in (\d+) comparisons", done.stdout)
    assert tables[-1][0] == "scalar"
    assert int(tables[-1][1]) > 100_000


@pytest.mark.parametrize("target", ALL)
def test_models_answer_as_in_pytorch(target, models):
    for folder, file in models:
        done = run(target, "check", "model", folder, file)
        assert done.returncode == 0, f"{folder.name}: {done.stdout}{done.stderr}"


def test_another_answer_is_found(models, tmp_path):
    """The check itself: other tokens, a cut file, a folder that is none."""
    folder, file = models[3]
    raw = bytearray(file.read_bytes())
    raw[12:16] = (5 ^ raw[12]).to_bytes(4, "little")
    (tmp_path / "other").write_bytes(raw)
    assert run("host", "check", "model", folder, tmp_path / "other").returncode == 1
    (tmp_path / "cut").write_bytes(raw[:-4])
    assert run("host", "check", "model", folder, tmp_path / "cut").returncode == 2
    done = run("host", "check", "model", tmp_path, file)
    assert done.returncode == 1
    assert "manifest.json" in done.stdout


@pytest.mark.parametrize("target", ALL[1:])
def test_spoiled_artifacts_are_refused_or_run(target):
    """`make fuzz` does 200,000."""
    count = 5000 if target == "sanitized" else 1500
    done = run(target, "fuzz", 7, count)
    assert done.returncode == 0, done.stdout + done.stderr
    opened = int(re.search(r"(\d+) opened and ran", done.stdout)[1])
    assert count // 10 < opened < count // 2


@pytest.mark.slow
def test_neon_is_chosen_where_it_is_and_multiplies_bytes(models):
    code = build("aarch64") / "CMakeFiles/engine.dir/src/kernels/neon.c.o"
    listing = subprocess.run(["aarch64-linux-gnu-objdump", "-d", code], capture_output=True, text=True, check=True)
    assert re.search(r"\bsdot\s+v", listing.stdout)
    folder, file = models[3]
    assert run("aarch64", "check", "model", folder, file).stdout.startswith("neon:")
    older = run("aarch64", "check", "model", folder, file, emulator=("-cpu", "cortex-a72"))
    assert older.returncode == 0  # that processor has no dot products of bytes
    assert older.stdout.startswith("scalar:")

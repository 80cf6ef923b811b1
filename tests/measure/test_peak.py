"""Peaks of fresh processes, and the ledger of saved tensors."""

import time

import pytest
import torch
from torch import nn

from netsuke.errors import NetsukeError
from netsuke.measure.peak import Watch, peak_of, resident
from netsuke.measure.saved import saved_ledger

MODULE = """
import torch

def hold(megabytes):
    a = torch.ones(megabytes * 250_000)          # float32
    b = torch.ones(megabytes * 250_000 // 2)
    del a
    return float(b.sum())

def fail():
    raise ValueError("no such thing")

def die():
    import os, signal
    print("before", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "held.py").write_text(MODULE)
    return (str(tmp_path),)


def test_the_peak_is_what_was_alive_at_once(folder):
    peak = peak_of("held:hold", 64, threads=1, folders=folder)
    assert peak.result == 64 * 250_000 // 2
    assert peak.above == pytest.approx(96e6, rel=0.03)
    assert peak.peak - peak.above == peak.idle > 50e6


def test_a_failing_call_is_one_sentence(folder):
    with pytest.raises(NetsukeError, match="ValueError: no such thing"):
        peak_of("held:fail", folders=folder)


def test_a_killed_call_names_the_signal(folder):
    with pytest.raises(NetsukeError, match="signal 9"):
        peak_of("held:die", folders=folder)


def test_resident_sizes_are_consistent():
    now = resident()
    assert now["mark"] >= now["now"] > now["mapped"] >= 0


def test_without_the_kernels_mark_a_thread_samples(monkeypatch):
    def refuse(path, text):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    watch = Watch()
    held = torch.ones(10_000_000)
    time.sleep(0.1)
    del held
    assert watch.how == "sampled" and watch.close() - watch.idle > 30e6


def test_ledger_counts_each_storage_once_and_no_parameter():
    net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    x = torch.randn(5, 8, requires_grad=True)
    with saved_ledger(net) as ledger:
        y = net(x)
    # the input of the first map, the output of the relu (saved by it and by the second map); weights are not counted
    assert ledger.by_module() == {"1": 5 * 16 * 4, "0": 5 * 8 * 4}
    assert ledger.total() == 5 * 24 * 4
    y.sum().backward()


def test_ledger_of_a_frozen_part_is_empty():
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).requires_grad_(False)
    with saved_ledger(net) as ledger:
        net(torch.randn(5, 8))
    assert ledger.total() == 0

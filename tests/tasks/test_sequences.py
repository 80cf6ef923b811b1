"""Sequence tasks: disjoint parts, fixed batches, features that mean what they say, spoiled files refused."""

import gzip
import io
import wave
import zipfile

import numpy as np
import pytest
import torch

from netsuke.data import spoken
from netsuke.data.catalogue import missing
from netsuke.errors import NetsukeError
from netsuke.models.encoder import EncoderConfig, random_encoder
from netsuke.tasks import sequences
from netsuke.tasks.base import run_calibration
from netsuke.tasks.sequences import UNSEEN, MaskedTokens, SequenceBatch, SequenceTask

with_speech = pytest.mark.skipif(bool(missing(spoken.FILES)), reason="NETSUKE_DATA lacks the spoken digits")
with_mnist = pytest.mark.skipif(bool(missing(sequences.MNIST)), reason="NETSUKE_DATA lacks MNIST")


def test_digits_are_cut_in_order_and_share_no_image():
    task = sequences.digits()
    assert [len(task.parts[s]) for s in ("train", "validation", "test")] == [1257, 180, 360]
    assert task.parts["train"].x.shape == (1257, 64, 1)
    rows = [set(map(bytes, p.x.numpy())) for p in task.parts.values()]
    assert not rows[0] & rows[2] and not rows[1] & rows[2] and not rows[0] & rows[1]
    assert float(task.parts["train"].x.min()) == -1 and float(task.parts["train"].x.max()) == 1


def test_batches_depend_on_step_and_seed_alone():
    task = sequences.digits()
    assert torch.equal(task.batch_at(5).x, task.batch_at(5).x)
    assert not torch.equal(task.batch_at(5).x, task.batch_at(5, seed=1).x)
    epoch = torch.cat([task.batch_at(s).x for s in range(len(task.parts["train"]) // task.batch)])
    assert len({bytes(r) for r in epoch.numpy()}) >= len(epoch) - 1  # all images of an epoch are different ones
    assert [len(b) for b in task.batches("test")] == [32] * 11 + [8]
    assert len(list(task.batches("train", 2))) == 2


def test_accuracy_and_calibration():
    task = sequences.digits()

    class Knows(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = 0

        def forward(self, x, mask):
            self.rows += len(x)
            guess = torch.zeros(len(x), 10)
            guess[:, 3] = 1.0
            return guess

    model = Knows()
    share = float((task.parts["test"].labels == 3).float().mean())
    assert task.score(model, "test") == pytest.approx(share)
    model.rows = 0
    run_calibration(model, task, 40)
    assert model.rows == 40
    assert task.facts()["splits"]["test"]["sequences"] == 360


def test_an_encoder_learns_from_batches():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(64, 10, 3, generator=rng)
    part = SequenceBatch(x, None, (x[:, :, 0].mean(1) > 0).long())
    task = SequenceTask({"train": part, "validation": part, "test": part}, batch=16)
    model = random_encoder(EncoderConfig.uniform(1, 16, width=16, heads=2, context=10, features=3, classes=2), 0)
    model.requires_grad_(True)
    before = task.mean_loss(model, "train")
    opt = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(40):
        opt.zero_grad()
        task.loss(model, task.batch_at(step)).backward()
        opt.step()
    assert task.mean_loss(model, "train") < 0.5 * before and task.score(model, "train") > 0.85


def test_hidden_tokens_follow_the_recipe():
    ids = torch.randint(0, 50, (200, 64), generator=torch.Generator().manual_seed(0))
    task = MaskedTokens({"train": ids, "validation": ids[:20], "test": ids[20:40]}, 50, hide=50)
    got = task.hidden(ids, 3)
    chosen = got.labels != UNSEEN
    assert torch.equal(got.labels[chosen], ids[chosen]) and torch.equal(got.x[~chosen], ids[~chosen])
    assert float(chosen.float().mean()) == pytest.approx(0.15, abs=0.01)
    assert float((got.x[chosen] == 50).float().mean()) == pytest.approx(0.8, abs=0.03)
    assert float((got.x[chosen] == ids[chosen]).float().mean()) == pytest.approx(0.1, abs=0.03)
    assert torch.equal(task.batch_at(4).x, task.batch_at(4).x)
    assert not torch.equal(task.batch_at(4).x, task.batch_at(5).x)
    model = random_encoder(EncoderConfig.uniform(1, 16, width=16, heads=2, context=64, vocab=51), 0)
    assert task.score(model, "validation") == pytest.approx(51, rel=0.05)  # nothing learnt: every token is as likely


@with_mnist
def test_mnist_is_whole_and_disjoint():
    task = sequences.mnist()
    assert [len(task.parts[s]) for s in ("train", "validation", "test")] == [7000, 1000, 2000]
    rows = [set(map(bytes, p.x.numpy())) for p in task.parts.values()]
    assert not rows[0] & rows[2] and not rows[1] & rows[2]
    counts = sum(torch.bincount(p.labels, minlength=10) for p in task.parts.values())
    assert counts.tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@with_speech
def test_speakers_are_in_one_split():
    task = sequences.spoken_digits(2)
    assert [len(task.parts[s]) for s in ("train", "validation", "test")] == [600, 150, 150]
    assert task.source.startswith("spoken digits; lucas tests, nicolas validates")
    part = task.parts["test"]
    assert part.x.shape == (150, 64, 40) and bool(part.mask[:, 0].all())
    assert bool((part.x[~part.mask] == 0).all()) and torch.bincount(part.labels).tolist() == [15] * 10


def test_a_tone_lights_the_filter_of_its_pitch():
    t = np.arange(4000) / spoken.RATE
    peaks = np.argmax(spoken.mel_filters(), axis=1) * spoken.RATE / spoken.WINDOW
    for pitch in (440.0, 1000.0, 2500.0):
        tone, noise = np.sin(2 * np.pi * pitch * t), 0.01 * np.random.default_rng(0).standard_normal(len(t))
        sound = np.where(t < 0.25, tone, 0) + noise  # half a second, of which the first half sounds
        frames = spoken.log_mel(sound.astype(np.float32))
        assert frames.shape == (1 + (4000 - 200) // 80, 40)
        rise = frames[:20].mean(0) - frames[-20:].mean(0)
        raw = np.abs(np.fft.rfft(sound[:200] * np.hanning(200))) ** 2 @ spoken.mel_filters().T
        assert abs(peaks[np.argmax(raw)] - pitch) <= 100 and rise[np.argmax(raw)] > 1.5


def test_short_sounds_give_one_frame():
    assert spoken.log_mel(np.zeros(10, np.float32)).shape == (1, 40)


def wav(rate=8000):
    raw = io.BytesIO()
    with wave.open(raw, "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(rate)
        f.writeframes(b"\1\0" * 300)
    return raw.getvalue()


@pytest.mark.parametrize(
    "name,data,found",
    [
        ("3_ann_0.wav", b"RIFF", "3_ann_0.wav cannot be read"),
        ("three_ann_0.wav", wav(), "three_ann_0.wav cannot be read"),
        ("3_ann_0.wav", wav(16000), "not 8 kHz"),
        ("3_ann_0.wav", bytes(2 << 20), "unpacks to"),
    ],
)
def test_spoiled_recordings_are_refused_by_name(tmp_path, name, data, found):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(name, data)
    with pytest.raises(NetsukeError, match=found):
        spoken.read_archive(path)
    path.write_bytes(b"nothing")
    with pytest.raises(NetsukeError, match=r"a.zip cannot be read"):
        spoken.read_archive(path)


@pytest.mark.parametrize(
    "data",
    [b"", b"plain", gzip.compress(b"\0\0\x08\x01\0\0\0\x09abc", mtime=0), gzip.compress(b"\0\1\x08\x01", mtime=0)],
    ids=["empty", "plain", "short", "cut header"],
)
def test_spoiled_idx_files_are_refused(tmp_path, monkeypatch, data):
    monkeypatch.setenv("NETSUKE_DATA", str(tmp_path))
    (tmp_path / "x.gz").write_bytes(data)
    with pytest.raises(NetsukeError, match=r"read x\.gz: it is spoiled"):
        sequences.read_idx("x.gz")

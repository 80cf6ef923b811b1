"""Trains the beat network of `netsuke ecg` on LUDB (200 people, leads I and II): five folds by person, then everybody.

    NETSUKE_DATA=FOLDER python recipes/ecg/train.py [--only default fold0 …]

Person k (1 to 200) is held out by fold k % 5 and never seen by that fold's weights: every published figure uses them.
Stride and channels, however, were chosen on 40 people of fold 0's training part whom folds 1 to 4 score; fold 0's people
alone took no part in it (README.md). `default` has seen everybody and is what users get. The other ten leads of LUDB are
not used: they were scored after the marks were settled, and the grading changed once after that (docs/ecg.md). About a
minute per network on one core. Writes src/netsuke/weights/ecg/<name>.npz (float16) and a line per network to
recipes/ecg/training.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from examples import Beats, example, people
from torch import nn
from torch.nn import functional as F

from netsuke.apps.signals.ecg import network
from netsuke.apps.signals.ecg.reference import FOLDS
from netsuke.data.catalogue import find

HERE = Path(__file__).parent
CHANNELS, BATCH, STEPS, RATE, DECAY, AVERAGE = 16, 48, 1500, 4e-3, 1e-3, 0.99
MIX = 0.3  # share of examples in a direction between leads I and II
SIGMA = torch.tensor([3, 3, 3, 2, 2, 4, 3, 3.0])  # samples: how far the cardiologists themselves scatter, roughly
COARSE = torch.from_numpy(network.COARSE).float()


class Net(nn.Module):
    """The network of `network.scores`, to be trained; the tests hold the two to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Conv1d(4, CHANNELS, 9, stride=network.STRIDE, padding=4)
        self.blocks = nn.ModuleList(
            nn.Conv1d(CHANNELS, CHANNELS, network.KERNEL, padding=2 * d, dilation=d) for d in network.DILATIONS
        )
        self.marks = nn.Conv1d(CHANNELS, len(network.MARKS), 1)
        self.present = nn.Linear(CHANNELS, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = F.relu(self.input(x))
        for block in self.blocks:
            h = h + F.relu(block(h))
        return self.marks(h), self.present(h[:, :, torch.from_numpy(network.P_TIMES)].amax(2))[:, 0]


def loss_of(net: Net, wave: np.ndarray, marks: np.ndarray, rr: np.ndarray) -> torch.Tensor:
    """Cross-entropy against a bell around each mark, plus the distance of the averaged mark, plus presence of P."""
    scores, present = net(torch.from_numpy(network.features(wave, rr)))
    want = torch.from_numpy(marks).float()
    has_p = torch.isfinite(want[:, 0]).float()
    known = torch.isfinite(want) & (want > COARSE[0] + 2) & (want < COARSE[-1] - 2)
    want = torch.nan_to_num(want)
    bell = torch.exp(-0.5 * ((COARSE - want[..., None]) / SIGMA[:, None]) ** 2)
    bell = bell / bell.sum(2, keepdim=True).clamp(min=1e-6)
    entropy = -(bell * scores.log_softmax(2)).sum(2)
    p = scores.softmax(2)
    best = F.avg_pool1d(p, 5, 1, 2).argmax(2, keepdim=True)
    q = p * ((torch.arange(p.shape[2]) - best).abs() <= network.HALF)
    at = (q * COARSE).sum(2) / q.sum(2)
    distance = F.smooth_l1_loss(at, want, reduction="none").clamp(max=25)
    presence = F.binary_cross_entropy_with_logits(present, has_p)
    return ((entropy + 0.15 * distance) * known).sum() / known.sum() + 0.3 * presence


def train(data: list[list[Beats]], seed: int, steps: int) -> tuple[dict[str, np.ndarray], float]:
    """The running average of the weights (float16) and the mean loss of the last hundred steps."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    net = Net()
    average = {k: v.clone() for k, v in net.state_dict().items()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY)
    last: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, step / 50) * (0.5 + 0.5 * np.cos(np.pi * step / steps))
        chosen = [data[i] for i in rng.integers(len(data), size=BATCH)]
        drawn = [example(leads[rng.integers(len(leads))], rng, MIX) for leads in chosen]
        loss = loss_of(net, *(np.array(part) for part in zip(*drawn)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for k, v in net.state_dict().items():
                average[k].mul_(AVERAGE).add_(v, alpha=1 - AVERAGE)
        last = [*last[-99:], float(loss.detach())]
    return {k: v.numpy().astype(np.float16) for k, v in average.items()}, float(np.mean(last))


def main() -> None:
    names = ["default", *(f"fold{i}" for i in range(FOLDS))]
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--only", nargs="*", default=names, choices=names)
    ask.add_argument("--steps", type=int, default=STEPS)
    args = ask.parse_args()
    torch.set_num_threads(1)
    everybody = people(find("featuredb-ecg"))
    for name in args.only:
        begin, held = time.perf_counter(), int(name[4:]) if name.startswith("fold") else None
        data = [leads for k, leads in enumerate(everybody, 1) if k % FOLDS != held and leads]
        target = network.WEIGHTS / f"{name}.npz"
        weights, loss = train(data, seed=0, steps=args.steps)
        target.parent.mkdir(parents=True, exist_ok=True)
        np.savez(target, **weights)
        line = {"name": target.stem, "people": len(data), "steps": args.steps, "loss": round(loss, 4)}
        line |= {"weights": sum(v.size for v in weights.values()), "seconds": round(time.perf_counter() - begin)}
        print(json.dumps(line), flush=True)
        log = HERE / "training.json"
        rows = json.loads(log.read_text()) if log.exists() else []
        rows = sorted([r for r in rows if r["name"] != line["name"]] + [line], key=lambda r: r["name"])
        log.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

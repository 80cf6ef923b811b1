"""The pictures of an evaluation: a Bland–Altman plot per interval and the ROC curves of the two screenings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from netsuke.apps.signals.ecg.reference import INTERVALS
from netsuke.errors import NetsukeError

KINDS = (".png", ".pdf", ".svg")


def draw(got: dict[str, Any], path: Path) -> None:
    """Writes the picture of `judge`'s result. Raises NetsukeError for another ending than .png, .pdf, .svg."""
    if path.suffix.lower() not in KINDS:
        raise NetsukeError(f"draw {path.name}", f"the ending {path.suffix!r} is unknown", ", ".join(KINDS))
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(17, 4.2), layout="constrained")
    found, marked = (np.array([r[k] for r in got["rows"]], dtype=float) for k in ("found", "marked"))
    for j, (name, ax) in enumerate(zip(INTERVALS, axes)):
        both = np.isfinite(found[:, j]) & np.isfinite(marked[:, j])
        ax.scatter((found + marked)[both, j] / 2, (found - marked)[both, j], s=9, color="#2a6f97", alpha=0.6)
        if "bias" in got[name]:
            for level, style in ((got[name]["bias"], "-"), *((v, "--") for v in got[name]["limits"])):
                ax.axhline(level, color="#9b2226", ls=style, lw=1)
                ax.annotate(f"{level:.1f}", (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        failed = f", {got[name]['failures']} failed" if got[name]["failures"] else ""
        ax.set(title=f"{name}: {both.sum()} records{failed}", xlabel="mean of both, ms", ylabel="found − marked, ms")
    for name, colour in (("AV block", "#9b2226"), ("long QTc", "#588157")):
        if "roc" in got.get(name, {}):
            v = got[name]
            label = f"{name}: AUC {v['auc']:.2f} ({v['interval'][0]:.2f}–{v['interval'][1]:.2f})"
            axes[3].plot(*np.array(v["roc"]).T, color=colour, label=label)
    axes[3].plot([0, 1], [0, 1], color="#bbb", lw=1)
    axes[3].set(title="screening", xlabel="false alarms", ylabel="cases found")
    axes[3].legend(loc="lower right")
    try:
        figure.savefig(path)
    except OSError as e:
        raise NetsukeError(f"draw {path.name}", e.strerror or str(e), "an existing, writable folder") from None
    plt.close(figure)

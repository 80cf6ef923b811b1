"""Heart-rate variability from RR intervals: time, frequency and non-linear measures, on the beats' own time axis.

Task Force of ESC and NASPE 1996 for the measures of time and frequency; Brennan 2001 (Poincaré), Richman 2000 (sample
entropy), Peng 1995 (DFA). Intervals that are no neighbours of normal beats (extrasystoles, gaps) are cut out, and no
difference is taken across a cut. The spectrum is that of RR interpolated over beat times at 4 Hz, not over beat numbers.
Every measure needs a length of record below which it would be a number without meaning: then it is a reason.
"""

from __future__ import annotations

import numpy as np

from netsuke.apps.signals.ecg.parameters import Value, gap
from netsuke.errors import NetsukeError

BANDS = {"ULF": (0.0, 0.0033), "VLF": (0.0033, 0.04), "LF": (0.04, 0.15), "HF": (0.15, 0.4), "VHF": (0.4, 0.5)}
NEEDED = {"ULF": 3600.0, "VLF": 300.0, "LF": 120.0, "HF": 60.0, "VHF": 60.0}  # s: about ten periods of the slowest wave
RESAMPLED = 4.0  # Hz
FEWEST = {"time": 5, "poincare": 10, "entropy": 200, "dfa": 64}  # beats
MOST_ENTROPY = 500  # beats per piece: time and memory are its square; long records give the median over pieces
PLAUSIBLE = (0.27, 2.5)  # s
JUMP = 0.2  # an interval more than 20 % off its neighbours' median is an extrasystole or a missed beat


def normal(rr: np.ndarray) -> np.ndarray:
    """(N,) s -> (N,) bool: plausible intervals within 20 % of the median of the eleven around them."""
    padded = np.pad(rr, 5, mode="reflect") if len(rr) > 5 else np.concatenate((rr, rr, rr))
    width = 11 if len(rr) > 5 else len(rr)
    views = np.lib.stride_tricks.sliding_window_view(padded, width)[: len(rr)]
    pieces = [
        np.median(views[k : k + 10_000], axis=1) for k in range(0, len(rr), 10_000)
    ]  # the median copies its input
    around = np.concatenate(pieces) if pieces else rr
    return (rr > PLAUSIBLE[0]) & (rr < PLAUSIBLE[1]) & (np.abs(rr - around) < JUMP * around)


def hrv(rr: np.ndarray, times: np.ndarray | None = None) -> dict[str, Value]:
    """All measures of RR intervals (N,) in s that end at `times` (N,) s (default: their running sum).

    Raises NetsukeError for intervals in ms or what is no positive number.
    """
    rr = np.asarray(rr, dtype=np.float64)
    if rr.ndim != 1 or not np.isfinite(rr).all() or (len(rr) and rr.min() <= 0):
        raise NetsukeError("measure variability", "RR intervals that are not positive numbers", "seconds, (N,)")
    if len(rr) and np.median(rr) > 10:
        raise NetsukeError(
            "measure variability", f"a median RR of {np.median(rr):.0f} s", "seconds", "rr / 1000 if they are ms"
        )
    if len(rr) < FEWEST["time"]:
        return {"SDNN": gap(f"{len(rr)} intervals; {FEWEST['time']} are needed", "ms")}
    times = np.cumsum(rr) if times is None else np.asarray(times, dtype=np.float64)
    good = normal(rr)
    neighbours = good[1:] & good[:-1] & (np.abs(np.diff(times) - rr[1:]) < 0.02)
    nn, steps = rr[good], np.diff(rr)[neighbours]
    if good.sum() < FEWEST["time"] or len(steps) < 3:
        return {"SDNN": gap("too few normal beats in a row", "ms")}
    share = float(good.mean())
    q = "good" if share > 0.95 else "fair" if share > 0.8 else "poor"
    out = time_measures(nn, steps, times[good], q)
    out |= spectrum(nn, times[good], q)
    out |= nonlinear(nn, steps, q)
    out["normal intervals"] = Value(100 * share, "%", "good", len(rr))
    return out


def time_measures(nn: np.ndarray, steps: np.ndarray, times: np.ndarray, q: str) -> dict[str, Value]:
    ms = {
        "mean RR": nn.mean(), "median RR": np.median(nn), "SDNN": nn.std(ddof=1), "RMSSD": np.sqrt(np.mean(steps**2)),
        "SDSD": steps.std(ddof=1),
    }  # fmt: skip
    out = {k: Value(1e3 * float(v), "ms", q, len(nn)) for k, v in ms.items()}
    for limit in (20, 50):
        out[f"pNN{limit}"] = Value(100 * float(np.mean(np.abs(steps) > limit / 1e3)), "%", q, len(steps))
    out["CVNN"] = Value(float(nn.std(ddof=1) / nn.mean()), "", q, len(nn))
    out["CVSD"] = Value(float(np.sqrt(np.mean(steps**2)) / nn.mean()), "", q, len(nn))
    for minutes in (1, 2, 5):
        index = ((times - times[0]) // (60 * minutes)).astype(int)
        pieces = [p for k in range(index[-1]) if len(p := nn[index == k]) >= 10] if len(nn) < 5000 else split(nn, index)
        if len(pieces) < 3:
            reason = f"needs three whole stretches of {minutes} min"
            out |= {f"{k} {minutes} min": gap(reason, "ms") for k in ("SDANN", "SDNNI")}
            continue
        out[f"SDANN {minutes} min"] = Value(1e3 * float(np.std([p.mean() for p in pieces], ddof=1)), "ms", q, len(nn))
        out[f"SDNNI {minutes} min"] = Value(1e3 * float(np.mean([p.std(ddof=1) for p in pieces])), "ms", q, len(nn))
    return out | triangle(nn, q)


def split(nn: np.ndarray, index: np.ndarray) -> list[np.ndarray]:
    """Stretches of equal `index` (ascending) with at least ten intervals, without the last, which is not whole."""
    parts = np.split(nn, np.flatnonzero(np.diff(index)) + 1)[:-1]
    return [p for p in parts if len(p) >= 10]


def triangle(nn: np.ndarray, q: str) -> dict[str, Value]:
    """Triangular index and TINN from a histogram with bins of 1/128 s."""
    if len(nn) < 100:
        return {"triangular index": gap("needs 100 beats"), "TINN": gap("needs 100 beats", "ms")}
    bins = np.arange(nn.min(), nn.max() + 2 / 128, 1 / 128)
    count, edges = np.histogram(nn, bins)
    k, centre = int(np.argmax(count)), edges[:-1] + 1 / 256
    best, width = np.inf, 0.0
    for left in range(k + 1):  # the triangle of least squared error with its top on the highest bin
        for right in range(k, len(count)):
            rise = np.interp(centre, [edges[left], centre[k], edges[right + 1]], [0, count[k], 0])
            error = float(np.sum((rise - count) ** 2))
            if error < best:
                best, width = error, edges[right + 1] - edges[left]
    return {
        "triangular index": Value(len(nn) / float(count[k]), "", q, len(nn)),
        "TINN": Value(1e3 * float(width), "ms", q, len(nn)),
    }


def spectrum(nn: np.ndarray, times: np.ndarray, q: str) -> dict[str, Value]:
    """Power per band in ms² (Welch, windows of at most five minutes; an hour for ULF), LF/HF, LF in normal units."""
    length = float(times[-1] - times[0])
    grid = np.arange(times[0], times[-1], 1 / RESAMPLED)
    out, power = {}, {}
    for window, names in ((300.0, ("VLF", "LF", "HF", "VHF")), (3600.0, ("ULF",))):
        ready = [n for n in names if length >= NEEDED[n]]
        out |= {n: gap(f"needs {NEEDED[n] / 60:g} min of record", "ms²") for n in names if n not in ready}
        if not ready:
            continue
        y = 1e3 * between_beats(grid, times, nn)
        size = min(len(y), int(window * RESAMPLED))
        f, density = welch(y - y.mean(), size, straight=window < 3600)
        for n in ready:
            inside = (f >= BANDS[n][0]) & (f < BANDS[n][1]) & (f > 0)
            power[n] = float(density[inside].sum() * (f[1] - f[0]))
            out[n] = Value(power[n], "ms²", q, len(nn))
    if power.get("HF") and "LF" in power:
        out["LF/HF"] = Value(power["LF"] / power["HF"], "", q, len(nn))
        out["LFn"] = Value(power["LF"] / (power["LF"] + power["HF"]), "", q, len(nn))
    else:
        out["LF/HF"] = gap("needs 2 min of record")
    return out


def between_beats(grid: np.ndarray, times: np.ndarray, nn: np.ndarray, piece: int = 5000) -> np.ndarray:
    """RR at the times `grid` (ascending) by cubic splines, in pieces of so many beats with ten more on either side, so that
    a day costs no memory. Straight lines between beats would lose a third of HF at 60 a minute."""
    from scipy.interpolate import CubicSpline

    out = np.empty(len(grid))
    for k in range(0, len(times), piece):
        low, high = max(0, k - 10), min(len(times), k + piece + 10)
        end = times[k + piece] if k + piece < len(times) else np.inf
        a, b = np.searchsorted(grid, (times[k], end))
        if b > a and high - low > 1:
            out[a:b] = CubicSpline(times[low:high], nn[low:high])(grid[a:b])
    return out


def welch(y: np.ndarray, size: int, straight: bool) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies (Hz) and one-sided power density of (n,) at 4 Hz: Hann windows of `size`, half overlapping, their means
    or straight lines taken out (Welch 1967). One window at a time, so a day costs no more memory than an hour."""
    window, t = np.hanning(size + 1)[:-1], np.arange(size) - (size - 1) / 2
    total, starts = np.zeros(size // 2 + 1), range(0, len(y) - size + 1, max(1, size // 2))
    for k in starts:
        part = y[k : k + size] - y[k : k + size].mean()
        if straight:
            part = part - t * (part @ t) / (t @ t)
        total += np.abs(np.fft.rfft(part * window)) ** 2
    density = 2 * total / len(starts) / (RESAMPLED * (window @ window))
    return np.fft.rfftfreq(size, 1 / RESAMPLED), density


def nonlinear(nn: np.ndarray, steps: np.ndarray, q: str) -> dict[str, Value]:
    """Poincaré SD1, SD2, CSI, CVI, asymmetry (Guzik), sample and approximate entropy, DFA α1, α2."""
    n, out = len(nn), {}
    if n < FEWEST["poincare"]:
        return {"SD1": gap(f"needs {FEWEST['poincare']} beats", "ms")}
    sd1 = 1e3 * np.sqrt(0.5) * steps.std(ddof=1)
    sd2 = np.sqrt(max(2 * (1e3 * nn.std(ddof=1)) ** 2 - sd1**2, 0.0))
    out |= {"SD1": Value(float(sd1), "ms", q, n), "SD2": Value(float(sd2), "ms", q, n)}
    if sd1 > 0 and sd2 > 0:
        out["CSI"] = Value(float(sd2 / sd1), "", q, n)
        out["CVI"] = Value(float(np.log10(16 * sd1 * sd2)), "", q, n)
    up, down = np.sum(steps[steps > 0] ** 2), np.sum(steps[steps < 0] ** 2)
    out["asymmetry"] = Value(float(100 * up / max(up + down, 1e-12)), "%", q, n)
    if n < FEWEST["entropy"]:
        out |= {k: gap(f"needs {FEWEST['entropy']} beats") for k in ("sample entropy", "approximate entropy")}
    else:
        pieces = np.array_split(nn, max(1, -(-n // MOST_ENTROPY)))[:20]
        both = np.median([entropies(p) for p in pieces], axis=0)
        for k, v in zip(("sample entropy", "approximate entropy"), both):
            out[k] = Value(float(v), "", q, n) if np.isfinite(v) else gap("no repeated pattern")
    for k, low, high in (("DFA α1", 4, 16), ("DFA α2", 16, 64)):
        out[k] = Value(dfa(nn, low, high), "", q, n) if n >= 4 * high else gap(f"needs {4 * high} beats")
    return out


def entropies(x: np.ndarray, m: int = 2, share: float = 0.2) -> tuple[float, float]:
    """Sample and approximate entropy of (n,): patterns of `m` within `share` standard deviations."""
    r = share * x.std()

    def close(length: int) -> np.ndarray:
        rows = np.lib.stride_tricks.sliding_window_view(x, length)
        d = np.zeros((len(rows), len(rows)))
        for k in range(length):
            np.maximum(d, np.abs(rows[:, k, None] - rows[None, :, k]), out=d)
        return d <= r

    a, b = close(m + 1), close(m)
    size = len(a)
    matches = a.sum() - size, b[:size, :size].sum() - size
    sample = float(-np.log(matches[0] / matches[1])) if matches[0] and matches[1] else float("nan")
    return sample, float(np.mean(np.log(b.mean(1))) - np.mean(np.log(a.mean(1))))


def dfa(nn: np.ndarray, low: int, high: int) -> float:
    """Slope of log fluctuation over log window size (`low` to `high` beats), linear trends removed."""
    y = np.cumsum(nn - nn.mean())
    sizes = np.unique(np.geomspace(low, high, 10).astype(int))
    size_of = []
    for s in sizes:
        rows = y[: len(y) // s * s].reshape(-1, s)
        t = np.arange(s) - (s - 1) / 2
        slope = rows @ t / (t @ t)
        rest = rows - rows.mean(1, keepdims=True) - slope[:, None] * t
        size_of.append(np.sqrt(np.mean(rest**2)) + 1e-15)
    return float(np.polyfit(np.log(sizes), np.log(size_of), 1)[0])

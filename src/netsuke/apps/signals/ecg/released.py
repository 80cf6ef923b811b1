"""The released method of FeatureDB-ECG (2025, arXiv 2502.17499), re-implemented from a description of its steps.

Gradient-energy R peaks at 500 Hz; the mean beat (0.35 RR before R to 0.8 RR after) of the 0.75 to 35 Hz band; an à trous
quadratic-spline wavelet of that beat at 2000 Hz; peaks of T and P where it crosses zero, bounds where it has fallen to a
share of its last or first peak. Levels follow the heart rate.

Corrected here: QT runs from QRS onset to T offset (released: from the QRS offset, which is JT); the rate is 60/RR
(released: from a window of 1.15 RR, 13 % low); positions stay fractions instead of being cut to milliseconds.
Everything else, choices that fail included, is as released: it stands beside the default method, it is not the default.
"""

from __future__ import annotations

import itertools

import numpy as np

from netsuke.apps.signals.ecg.network import Marks
from netsuke.apps.signals.ecg.rpeaks import moving_average

R_RATE, WAVE_RATE, OUT_RATE = 500, 2000, 250
BEFORE_RR, AFTER_RR = 0.35, 0.80
LEVELS = 9


def linear(x: np.ndarray, fs: float, to: float) -> np.ndarray:
    count = round(len(x) * to / fs)
    return np.interp(np.arange(count) * fs / to, np.arange(len(x)), x)


def band(x: np.ndarray, low: float, high: float, fs: float) -> np.ndarray:
    from scipy import signal

    return signal.sosfiltfilt(signal.butter(4, (low, high), "band", fs=fs, output="sos"), x)


def r_peaks(x: np.ndarray, fs: float) -> tuple[np.ndarray, np.ndarray]:
    """(N,) mV -> R at 500 Hz, and the lead there."""
    from scipy import signal

    if fs > 2 * 50:
        x = signal.filtfilt(*signal.iirnotch(50, 50, fs), x)
    x500 = linear(x, fs, R_RATE)
    y = band(band(x500, 0.5, 45, R_RATE), 3, 40, R_RATE)
    slope = np.abs(np.gradient(y))
    smooth = moving_average(slope, round(0.1 * R_RATE))
    above = smooth > 1.5 * moving_average(smooth, round(0.75 * R_RATE))
    edges = np.diff(np.concatenate(([0], above.astype(np.int8), [0])))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    if not len(starts):
        return np.zeros(0, np.int64), x500
    least, peaks, last = 0.4 * np.mean(ends - starts), [], -R_RATE
    for start, end in zip(starts, ends):
        if end - start < least:
            continue
        found, about = signal.find_peaks(y[start:end], prominence=(None, None))
        if len(found):
            p = start + int(found[np.argmax(about["prominences"])])
            if p - last > 0.3 * R_RATE:
                peaks.append(p)
                last = p
    return np.array(peaks, dtype=np.int64), x500


def mean_beat(x500: np.ndarray, peaks: np.ndarray, rr: float) -> np.ndarray:
    """Mean over all beats but the first and last of 0.35 RR before R to 0.8 RR after; zeros beyond the record."""
    y = band(x500, 0.75, 35, R_RATE)
    before, after = round(BEFORE_RR * rr), round(AFTER_RR * rr)
    padded = np.concatenate((np.zeros(before), y, np.zeros(after)))
    inner = peaks[1:-1] if len(peaks) > 2 else peaks
    return padded[inner[:, None] + np.arange(before + after)].mean(0)


def wavelet(x: np.ndarray) -> np.ndarray:
    """(n,) -> (9, n): low-pass (1, 3, 3, 1)/8 and high-pass (2, -2), spread by 2^k, shifted back by 2^k at level k."""
    out, n = [], len(x)
    for k in range(LEVELS):
        step = 1 << k

        def spread(taps: tuple[float, ...], s: np.ndarray, step: int = step) -> np.ndarray:
            padded = np.pad(s, (2 * step, step), mode="edge")  # output i reads s[i + step - j * step]
            return sum(t * padded[(3 - j) * step : (3 - j) * step + n] for j, t in enumerate(taps))

        out.append(spread((2.0, -2.0), x))
        x = spread((1 / 8, 3 / 8, 3 / 8, 1 / 8), x)
    return np.array(out)


def extrema(w: np.ndarray) -> np.ndarray:
    """Positions of local maxima."""
    return np.flatnonzero((w[1:-1] > w[:-2]) & (w[1:-1] >= w[2:])) + 1


def wave_peak(beat: np.ndarray, w: np.ndarray, start: int, stop: int, share: float) -> int | None:
    """The zero crossing of `w` between two opposite lobes at which the beat is farthest from its mean."""
    if stop - start < 4:
        return None
    part, size = w[start:stop], np.abs(w[start:stop])
    at = [i for i in extrema(size) if size[i] > share * np.sqrt(np.mean(part**2)) and size[i] > 0.025 * size.max()]
    if part[0] > 0:
        at = [0, *at]
    best, height = None, -1.0
    for a, b in itertools.pairwise(at):
        if part[a] * part[b] >= 0:
            continue
        cross = a + int(np.flatnonzero(np.diff(np.sign(part[a : b + 1])) != 0)[0])
        value = abs(beat[start + cross] - beat.mean())
        if value > height:
            best, height = start + cross, value
    return best


def fall(w: np.ndarray, peak: int, share: float, step: int) -> int:
    """From `peak` in the direction `step` to where `w` is below `share` of its height there."""
    i, limit = peak, share * w[peak]
    while 0 < i < len(w) - 1 and w[i] >= limit:
        i += step
    return i


def qrs_bounds(beat: np.ndarray, w: np.ndarray, r: int, p: int | None, t: int | None) -> tuple[int, int]:
    ms = WAVE_RATE // 1000
    valleys = extrema(-beat)
    q = max((int(v) for v in valleys if r - 100 * ms < v < r), default=r - 20 * ms)
    deep = [int(v) for v in valleys if v > r and beat[r] - beat[v] > 0.05 * np.ptp(beat)]
    s = deep[0] if deep else r + 20 * ms
    start = max(0, p if p is not None else r - 100 * ms)
    lobes = start + extrema(-w[start:r]) if r - start > 3 else np.zeros(0, int)
    near = w[max(0, q - 20 * ms) : q + 20 * ms]
    onset = q
    if len(lobes) and len(near) and np.ptp(near) >= 0.5 * np.ptp(w):
        onset = fall(-w, int(lobes[-1]), 0.5, -1)
    stop = min(len(w), t if t is not None else r + 200 * ms)
    lobes, near = r + extrema(w[r:stop]) if stop - r > 3 else np.zeros(0, int), w[max(0, s - 20 * ms) : s + 20 * ms]
    offset = s
    if len(lobes) and len(near) and np.ptp(near) >= 0.5 * np.ptp(w):
        offset = fall(w, int(lobes[0]), 0.5, 1)
    return onset, offset


def bounds(w_on: np.ndarray, w_off: np.ndarray, peak: int, reach: int, share: float, fallback: tuple) -> tuple:
    """Onset and offset of P or T around its peak."""
    low = max(0, peak - reach)
    up = low + extrema(w_on[low:peak]) if peak - low > 3 else []
    on = fall(w_on, int(up[-1]), share, -1) if len(up) else peak - fallback[0]
    down = peak + extrema(-w_off[peak:]) if len(w_off) - peak > 3 else []
    off = fall(-w_off, int(down[0]), 0.4, 1) if len(down) else peak + fallback[1]
    return max(0, on), min(len(w_on) - 1, off)


def peaks_and_marks(x: np.ndarray, fs: float) -> tuple[np.ndarray, Marks]:
    """R peaks (samples at 250 Hz) and the marks of the mean beat (250 Hz from R) of one lead (N,) in mV at `fs`."""
    peaks, x500 = r_peaks(x, fs)
    out = np.rint(peaks * OUT_RATE / R_RATE).astype(np.int64)
    nothing = Marks(np.full(8, np.nan), np.full(8, np.nan), 0.0)
    if len(peaks) < 3:
        return out, nothing
    rr = float(np.median(np.diff(peaks)))
    beat = linear(mean_beat(x500, peaks, rr), R_RATE, WAVE_RATE)
    slow = rr / R_RATE  # 60 / HR
    r, w = round(BEFORE_RR * rr) * WAVE_RATE // R_RATE, wavelet(beat)
    g = int(np.log2(WAVE_RATE / 250 * slow))
    main, wide, far = (w[int(np.clip(k, 0, LEVELS - 1))] for k in (2 + g, 3 + g, (g - 3) % LEVELS))
    gap = round(0.065 * WAVE_RATE)
    t = wave_peak(beat, wide, r + gap, min(len(beat), r + round(0.6 * slow * WAVE_RATE)), 0.25)
    first = next((s for f in (0.6, 0.45, 0.3) if (s := r - round(f * slow * WAVE_RATE)) >= 0), 0)
    p = wave_peak(beat, main, first, r - gap, 0.02)
    onset, offset = qrs_bounds(beat, main, r, p, t)
    at = np.full(8, np.nan)
    at[3:5] = onset, offset
    if p is not None:
        p_on, p_off = bounds(main, far, p, round(0.3 * WAVE_RATE), 0.4, (round(0.15 * WAVE_RATE),) * 2)
        if onset - p_off < 0.04 * WAVE_RATE:
            p_off = p + round(0.4 * (onset - p))
        at[:3] = p_on, p, p_off
    if t is not None:
        t_on, t_off = bounds(main, main, t, round(0.6 * WAVE_RATE), 0.6, (round(0.2 * WAVE_RATE),) * 2)
        at[5:] = t_on, t, t_off
    return out, Marks((at - r) * OUT_RATE / WAVE_RATE, np.full(8, np.nan), float(p is not None))

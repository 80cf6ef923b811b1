"""The forecasters that gradients train: MixLinear and what it is compared with. All map look-backs (B, S) to (B, H).

    MixLinearNet  2 p q + 4 lpf + 4 m (+ w + 1) real parameters; a complex number counts as two everywhere
    SparseTSF     one dense matrix for all phases, n m + w + 1             (Lin et al., 2024)
    Fits          a complex linear map between the lowest bins of S and of S + H rows  (Xu et al., 2024), "like": one map for
                  all channels, look-back centred but not divided by its deviation, trained on the horizon only
    DLinear       a moving average and the rest, a linear map each          (Zeng et al., 2023)
    OneLayer      one linear map of the centred look-back

Channels share weights. The phase models are computed folded (fold.py), which is the same function as published and cheaper;
`MixLinearNet.published` takes the paper's steps, one by one.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from netsuke.apps.signals.forecast.fold import Array, Shape, inverse, spectrum
from netsuke.errors import NetsukeError


def uniform(*size: int, fan_in: int) -> nn.Parameter:
    """PyTorch's start of a linear layer."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(*size).uniform_(-bound, bound))


class PhaseModel(nn.Module):
    """Centre, smooth, one matrix (m, n) for every phase, add the mean. `smoothed` False leaves the convolution out."""

    def __init__(self, shape: Shape, smoothed: bool = True):
        super().__init__()
        self.shape, w = shape, shape.period
        self.kernel = uniform(w + 1, fan_in=w + 1) if smoothed else None
        tap = torch.arange(2 * w)[:, None] - torch.arange(w)  # row s of the wide phases feeds phase j through tap s - j
        self.register_buffer("tap", torch.where((tap < 0) | (tap > w), w + 1, tap), persistent=False)
        self.register_buffer("same", (tap == w // 2).float(), persistent=False)

    def matrix(self) -> Tensor:
        """(m, n)"""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Smoothing commutes with the matrix: it is done on the forecast's phases and their neighbours, of which there are
        fewer than of the look-back's."""
        s, w = self.shape, self.shape.period
        mean = x.mean(1, keepdim=True)
        z = x - mean
        if self.kernel is None:
            y = self.matrix() @ z.view(-1, s.n, w)
        else:
            wide = nn.functional.pad(z, (w // 2, w - w // 2)).unfold(1, 2 * w, w)  # (B, n, 2 w)
            y = (self.matrix() @ wide) @ (self.same + nn.functional.pad(self.kernel, (0, 1))[self.tap])
        return y.reshape(len(x), -1)[:, : s.horizon] + mean


class MixLinearNet(PhaseModel):
    """`alpha` mixes, `lpf` bins are kept; parts "time" or "frequency" alone are alpha 1 or 0, whose other path is left out."""

    def __init__(self, shape: Shape, alpha: float, lpf: int, smoothed: bool = True):
        super().__init__(shape, smoothed)
        if not 1 <= lpf <= shape.n:
            raise NetsukeError(
                "build the frequency path", f"lpf is {lpf}", f"1 to {shape.n}, the periods of the look-back"
            )
        if not 0 <= alpha <= 1:
            raise NetsukeError("mix the two paths", f"alpha is {alpha:g}", "0 (frequency only) to 1 (time only)")
        self.alpha, self.lpf = alpha, lpf
        if alpha > 0:
            self.a1, self.a2 = (uniform(shape.q, shape.p, fan_in=shape.p) for _ in range(2))
        if alpha < 1:  # (…, 2): real and imaginary part; imaginary parts start at zero, as published
            self.w1, self.w2 = uniform(2, lpf, 2, fan_in=lpf), uniform(shape.m, 2, 2, fan_in=2)
            with torch.no_grad():
                self.w1[..., 1] = self.w2[..., 1] = 0
            self.register_buffer("bins", torch.from_numpy(spectrum(shape, lpf)).to(torch.cfloat), persistent=False)
            self.register_buffer("back", torch.from_numpy(inverse(shape)).to(torch.cfloat), persistent=False)

    def set(self, a1: Array, a2: Array, w1: Array, w2: Array) -> None:
        """Weights from elsewhere (moments.py), smoothing off: where Adam then goes on."""
        with torch.no_grad():
            if self.alpha > 0:
                self.a1.copy_(torch.from_numpy(a1))
                self.a2.copy_(torch.from_numpy(a2))
            if self.alpha < 1:
                self.w1.copy_(torch.view_as_real(torch.from_numpy(w1)))
                self.w2.copy_(torch.view_as_real(torch.from_numpy(w2)))
            if self.kernel is not None:
                self.kernel.zero_()

    def arrays(self) -> tuple[Array, Array, Array, Array, Array | None]:
        """(a1, a2, w1, w2, kernel) in double precision, zeros for a path that is left out."""
        s = self.shape
        own = {n: p.detach().double().numpy() for n, p in self.named_parameters()}
        none, off = np.zeros((s.q, s.p)), (np.zeros((2, self.lpf, 2)), np.zeros((s.m, 2, 2)))
        w1, w2 = (own.get(n, z) @ np.array([1, 1j]) for n, z in zip(("w1", "w2"), off))
        return own.get("a1", none), own.get("a2", none), w1, w2, own.get("kernel")

    def matrix(self) -> Tensor:
        s, out = self.shape, 0.0
        if self.alpha > 0:
            out = self.alpha * torch.kron(self.a2, self.a1)[: s.m, : s.n]
        if self.alpha < 1:
            w1, w2 = torch.view_as_complex(self.w1), torch.view_as_complex(self.w2)
            out = out + (1 - self.alpha) * ((self.back @ w2) @ (w1 @ self.bins)).real
        return out

    def published(self, x: Tensor) -> Tensor:
        """The same forecast by the paper's steps: a convolution, p x p segments, two Fourier transforms, the real part."""
        s, w = self.shape, self.shape.period
        mean = x.mean(1, keepdim=True)
        z = x - mean
        if self.kernel is not None:
            padded = nn.functional.pad(z, (w // 2, w - w // 2))
            z = z + nn.functional.conv1d(padded[:, None], self.kernel[None, None])[:, 0]
        z = z.view(-1, s.n, w).transpose(1, 2)  # (B, w, n)
        y = 0.0
        if self.alpha > 0:
            segments = nn.functional.pad(z, (0, s.p * s.p - s.n)).reshape(-1, w, s.p, s.p)
            inside = segments @ self.a1.T  # (B, w, p, q)
            time = (self.a2 @ inside).reshape(-1, w, s.q * s.q)
            y = self.alpha * time.transpose(1, 2).reshape(len(x), -1)[:, : s.horizon]
        if self.alpha < 1:
            w1, w2 = torch.view_as_complex(self.w1), torch.view_as_complex(self.w2)
            kept = torch.fft.fft(z.to(torch.cfloat), dim=2)[..., : self.lpf]
            back = torch.fft.ifft(kept @ w1.T @ w2.T, dim=2).real
            y = y + (1 - self.alpha) * back.transpose(1, 2).reshape(len(x), -1)[:, : s.horizon]
        return y + mean


class SparseTSF(PhaseModel):
    def __init__(self, shape: Shape):
        super().__init__(shape)
        self.weight = uniform(shape.m, shape.n, fan_in=shape.n)

    def matrix(self) -> Tensor:
        return self.weight


class Fits(nn.Module):
    """`harmonics` of the period are kept, and ten bins more."""

    def __init__(self, shape: Shape, harmonics: int = 2):
        super().__init__()
        s, h = shape.lookback, shape.horizon
        cut = min((shape.n + 1) * harmonics + 10, s // 2)
        out = round(cut * (s + h) / s)
        rows, bins, wide = (torch.arange(k, dtype=torch.float64) for k in (s, cut, out))
        wave = torch.exp(-2j * math.pi / s * rows[:, None] * bins)
        self.register_buffer("analysis", wave.to(torch.cfloat), persistent=False)
        later = torch.exp(2j * math.pi / (s + h) * wide[:, None] * (s + torch.arange(h)))
        double = torch.where(wide == 0, 1.0, 2.0)[:, None] / s  # a real signal has every bin but the first twice
        self.register_buffer("synthesis", (double * later).to(torch.cfloat), persistent=False)
        self.weight = uniform(out, cut, 2, fan_in=cut)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        z = x - mean
        seen = torch.complex(z @ self.analysis.real, z @ self.analysis.imag) @ torch.view_as_complex(self.weight).T
        return seen.real @ self.synthesis.real - seen.imag @ self.synthesis.imag + mean


class DLinear(nn.Module):
    def __init__(self, shape: Shape, window: int = 25):
        super().__init__()
        self.window = window
        self.trend, self.rest = (nn.Linear(shape.lookback, shape.horizon) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        half = self.window // 2
        padded = nn.functional.pad(x[:, None], (half, half), mode="replicate")
        trend = nn.functional.avg_pool1d(padded, self.window, 1)[:, 0]
        return self.trend(trend) + self.rest(x - trend)


class OneLayer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.linear = nn.Linear(shape.lookback, shape.horizon, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        return self.linear(x - mean) + mean


def parameters(model: nn.Module) -> int:
    """Real numbers that are trained."""
    return sum(p.numel() for p in model.parameters())

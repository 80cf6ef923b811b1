"""How fast a shape generates tokens before it is trained: random weights in the engine, or a device's cost model.

What the shape finder (models/shapes.py) is given as `speed`: weights do not change how long a token takes.
"""

from __future__ import annotations

from netsuke.devices.device import Device
from netsuke.measure.decoding import decoding_speed
from netsuke.models.llama import LlamaConfig, half_precision, random_llama
from netsuke.runtime.engine import Engine
from netsuke.runtime.memory_plan import uniform_specs
from netsuke.runtime.native_plan import native_work

STORED = {"kind": "dense", "dtype": "float16"}  # as models are shipped


def engine_speed(cfg: LlamaConfig, threads: int | None = None) -> float:
    """Tokens/s of one sequence on this machine with half of the context behind it, a median of five rounds."""
    with Engine.of_model(half_precision(random_llama(cfg, 0)), threads=threads) as engine:
        return 1 / decoding_speed(engine.forward, engine.truncate, engine.vocab, engine.context).token


def device_speed(cfg: LlamaConfig, device: Device) -> float:
    """Tokens/s on a device, by its cost model."""
    work = native_work(cfg, uniform_specs(cfg, STORED), context=cfg.context // 2, tokens=1)
    return 1 / device.cost(work).latency

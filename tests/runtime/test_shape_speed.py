"""Speed of shapes: deeper is slower at equal parameters, in the engine and in the cost model alike."""

import pytest

from netsuke.devices import Device
from netsuke.models.shapes import candidates, find_shape, parameters
from netsuke.runtime import engine
from netsuke.runtime.shape_speed import device_speed, engine_speed


def shapes():
    pool = sorted(candidates(1_000_000, 1024, context=64), key=lambda c: len(c.blocks))
    return pool[0], pool[-1]


def test_a_device_prices_depth():
    device, (shallow, deep) = Device.load("pi4"), shapes()
    assert device_speed(shallow, device) > device_speed(deep, device) > 0
    floor = (device_speed(shallow, device) + device_speed(deep, device)) / 2
    got = find_shape(1_000_000, 1024, min_speed=floor, speed=lambda c: device_speed(c, device), context=64)
    assert device_speed(got, device) >= floor and abs(parameters(got).total / 1e6 - 1) <= 0.01


def test_the_engine_measures_depth():
    try:
        engine._native()
    except engine.NetsukeError as e:
        pytest.skip(str(e))
    shallow, deep = shapes()
    assert max(engine_speed(shallow, 1) for _ in range(2)) > engine_speed(deep, 1) > 0

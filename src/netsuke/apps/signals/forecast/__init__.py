"""Forecasts of many steps from about a hundred numbers: MixLinear, its training without gradients, its C for a chip.

from netsuke.apps.signals.forecast.forecaster import MixLinear
"""

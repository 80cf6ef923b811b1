"""Control: a small learned model predicts, Newton-Raphson steers; in Python, and in C for a microcontroller.

network.py     dense networks with exact derivatives, bit-equal to csrc/ns_dense.c in float32
predictor.py   the network's place in the loop: which histories it reads, its roll-out over a horizon
newton.py      the controller, bit-equal to csrc/ns_mpc.c in float32
loop.py        plants, controllers, closed loops and what is measured of them
oscillator.py  mass, spring and damper, a model learned from random excitation, a tuned PID
hasel.py       the soft actuator of Aguasvivas Manzano et al. (2022) and its path
firmware.py    the controller as a folder of C; board.py runs it on an emulated board and counts
"""

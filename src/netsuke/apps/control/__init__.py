"""Control: a small learned model predicts, Newton-Raphson steers; in Python, and in C for a microcontroller.

arithmetic.py  sums in a fixed order, float32 functions: what Python, a PC's C and a board share
network.py     dense networks with exact derivatives, bit-equal to csrc/ns_dense.c in float32
predictor.py   the network's place in the loop: which histories it reads, its roll-out over a horizon
newton.py      the controller, bit-equal to csrc/ns_mpc.c in float32
loop.py        plants, controllers, closed loops and what is measured of them
oscillator.py  mass, spring and damper, a model learned from random excitation, references
pid.py         the rival: a PID, tuned by grid on training references
hasel.py       the soft actuator of Aguasvivas Manzano et al. (2022) and its path
firmware.py    the controller as a folder of C
simulate.py    its loops in C: on this computer, or on an emulated board that counts instructions
command.py     `netsuke control`
"""

"""openpi's normalisation and ALOHA's gripper in plain Python."""

import math


def slow_normalise(x, s, quantiles):
    if quantiles:
        return [(v - a) / (b - a + 1e-6) * 2 - 1 for v, a, b in zip(x, s.q01, s.q99, strict=False)]
    return [(v - m) / (d + 1e-6) for v, m, d in zip(x, s.mean, s.std, strict=False)]


def slow_gripper_angle(opening):
    finger = 0.01844 + opening * (0.058 - 0.01844)
    sine = (0.022**2 + finger**2 - 0.036**2) / (2 * 0.022 * finger)
    return (math.asin(min(1.0, max(-1.0, sine))) - 0.5476) / (1.6296 - 0.5476)

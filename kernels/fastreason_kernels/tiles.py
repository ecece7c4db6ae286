"""Device functions shared by the row kernels: logits, differences without cancellation, the terms of a divergence.

It owns element-wise arithmetic on blocks in registers. It refuses to load or store blocks, and libdevice: with exp2 and
log alone the interpreter and every target run the same code.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# Stands for a removed column (raw logit -inf) where a difference of two of them must be 0 and not NaN. exp of it is 0.
REMOVED = tl.constexpr(-1e30)


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def expm1_minus_small(x):
    """expm1(x) - x for |x| <= 1/2 by its Taylor series: relative error below 5e-8, never negative."""
    series = 1 / 40320 + x * (1 / 362880)
    series = 1 / 5040 + x * series
    series = 1 / 720 + x * series
    series = 1 / 120 + x * series
    series = 1 / 24 + x * series
    series = 1 / 6 + x * series
    return x * x * (0.5 + x * series)


@triton.jit
def expm1(x):
    small = tl.abs(x) <= 0.5
    near = tl.where(small, x, 0.0)
    return tl.where(small, near + expm1_minus_small(near), exp(x) - 1.0)


@triton.jit
def log1p_small(x):
    """(log1p(x), x - log1p(x)) for |x| <= 1/2, from log1p(x) = 2 atanh(t), t = x / (2 + x), and x - 2 t = x t."""
    t = x / (2.0 + x)
    t2 = t * t
    tail = 1 / 11 + t2 * (1 / 13)
    tail = 1 / 9 + t2 * tail
    tail = 1 / 7 + t2 * tail
    tail = 1 / 5 + t2 * tail
    tail = 2.0 * t * t2 * (1 / 3 + t2 * tail)
    return 2.0 * t + tail, x * t - tail


@triton.jit
def tanh_slope(x):
    """(tanh(x), 1 - tanh(x)^2), both with a relative error of a few ulp; tanh by its series where it would cancel."""
    u = exp(-2.0 * tl.abs(x))
    inverse = 1.0 / (1.0 + u)
    far = 1.0 - 2.0 * u * inverse
    x2 = x * x
    near = x + x * x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835))))
    far = tl.where(x < 0, -far, far)
    return tl.where(x2 < 0.0625, near, far), 4.0 * u * inverse * inverse


@triton.jit
def uncapped(raw):
    """raw in fp32 with REMOVED for -inf; NaN stays NaN, which a plain maximum would hide."""
    return tl.maximum(raw.to(tl.float32), REMOVED, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def level(raw, squeeze, SOFTCAP: tl.constexpr):
    """w such that z = gain * w / temperature: raw, or tanh(squeeze * raw) with squeeze = scale / softcap."""
    w = uncapped(raw)
    if SOFTCAP:
        w = tl.where(w <= REMOVED, w, tanh_slope(w * squeeze)[0])
    return w


@triton.jit
def level_slope(raw, squeeze, SOFTCAP: tl.constexpr):
    """What d w / d raw has beyond its constant factor: 1 - tanh^2, or 1."""
    if SOFTCAP:
        slope = tanh_slope(uncapped(raw) * squeeze)[1]
    else:
        slope = 1.0
    return slope


@triton.jit
def per_temperature(x, temperature, row):
    """x, or x over the row's temperature where there is one."""
    if temperature is not None:
        x = x / tl.load(temperature + row)
    return x


@triton.jit
def logit(raw, squeeze, to_z, SOFTCAP: tl.constexpr):
    """z of a block, -inf for a removed column."""
    w = level(raw, squeeze, SOFTCAP)
    return tl.where(w <= REMOVED, float("-inf"), w * to_z)


@triton.jit
def times(share, x):
    """share * x; 0 where share is 0 although x is infinite or NaN; NaN where share is NaN."""
    return tl.where(share == 0.0, 0.0, share * x)


@triton.jit
def log_mix(share, x, linear):
    """(share * log1p(x), share * (x - log1p(x))) for x > -1 and linear = share * x, without cancellation."""
    small = tl.abs(x) <= 0.5
    near_log, near_gap = log1p_small(tl.where(small, x, 0.0))
    log = share * tl.where(small, near_log, tl.log(1.0 + x))
    return log, tl.where(small, share * near_gap, linear - log)


@triton.jit
def divergence_terms(log_p, log_q, r, beta, KIND: tl.constexpr):
    """(p, value, direction) of each column, r = log q - log p as the caller could best subtract it.

    The divergence of a row is sum value, its gradient with respect to z_student is direction - p * sum direction. Every
    value is >= 0: near r = 0 it comes from a series, elsewhere the terms of its difference are far apart. -inf in log_p or
    log_q makes r infinite or NaN, which the branches away from r = 0 keep out of products with a share of 0.
    """
    p, q = exp(log_p), exp(log_q)
    small = tl.abs(r) <= 0.5
    near = tl.where(small, r, 0.0)
    if KIND == "reverse":
        direction = times(p, -r)
        value = tl.where(small, p * expm1_minus_small(near), q - p + direction)
    elif KIND == "forward":
        direction = tl.where(small, -p * (near + expm1_minus_small(near)), p - q)
        value = tl.where(small, q * expm1_minus_small(-near), p - q + times(q, r))
    else:
        tl.static_assert(KIND == "jsd")
        # q / p - 1 and p / q - 1. Where a share is below the floor, what the floor changes is below it too.
        up = tl.where(small, near + expm1_minus_small(near), (q - p) / tl.maximum(p, 1e-30))
        down = tl.where(small, expm1_minus_small(-near) - near, (p - q) / tl.maximum(q, 1e-30))
        direction, p_gap = log_mix(p, beta * up, beta * (q - p))
        _, q_gap = log_mix(q, (1.0 - beta) * down, (1.0 - beta) * (p - q))
        direction *= beta - 1.0
        value = (1.0 - beta) * p_gap + beta * q_gap
    return p, value, direction

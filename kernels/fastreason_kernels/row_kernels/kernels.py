"""Row kernels on tiles of logits: softmax statistics, policy gradient, divergence and its gradient; one program a row.

It owns @triton.jit code only; launch.py states what each kernel computes. It refuses atomics and autotuning. A kernel
that writes over its logits walks its row in blocks of ascending columns, with a barrier between loads and stores of each:

    In place in one dtype a block's stores touch only the bytes that its own loads read. With bf16 results in the first
    half of each fp32 row, block b of B columns reads bytes [4bB, 4bB + 4B) of the row and writes [2bB, 2bB + 2B). Block 0
    writes over bytes it reads itself; for b >= 1, 2bB + 2B <= 4bB: it writes only over bytes that earlier blocks read.
    So a store is safe once every load of its own and of all earlier blocks is done, by any thread of the program: that is
    the barrier. Loads of later blocks may run ahead of it: they read bytes at or above 4bB + 4B, which nobody wrote.
"""

import triton
import triton.language as tl

from fastreason_kernels.tiles import (
    LOG2E,
    REMOVED,
    divergence_terms,
    exp,
    expm1,
    level,
    level_slope,
    logit,
    per_temperature,
)


@triton.jit
def partials_kernel(
    logits,  # [R, C]
    ids,  # [R]
    temperature,  # [R] or None
    out,  # [R, 4]
    row_stride,
    num_columns,
    squeeze,
    gain,
    SOFTCAP: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    to_z = per_temperature(gain, temperature, row)
    rate = to_z * LOG2E
    # Each lane keeps its own maximum and sums over DEPTH logits at a time, so that nothing crosses threads in the loop.
    # Differences are taken before the multiplication by `rate`: their rounding is relative to themselves, not to z.
    top = tl.full([LANES], REMOVED, tl.float32)
    total = tl.full([LANES], 0.0, tl.float32)
    weighted = tl.full([LANES], 0.0, tl.float32)
    offsets = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for start in range(0, num_columns, DEPTH * LANES):
        columns = start + offsets
        raw = tl.load(logits + columns, mask=columns < num_columns, other=float("-inf"))
        w = level(raw, squeeze, SOFTCAP)
        new_top = tl.maximum(top, tl.max(w, axis=0))
        below = w - new_top[None, :]
        share = tl.exp2(below * rate)
        step = top - new_top
        shrink = tl.exp2(step * rate)
        weighted = (weighted + total * step) * shrink + tl.sum(share * below, axis=0)
        total = total * shrink + tl.sum(share, axis=0)
        top = new_top
    # A lane that saw removed columns only holds a count of them as its sum; its share of the row is exp(REMOVED) = 0.
    row_top = tl.max(top, axis=0)
    step = top - row_top
    shrink = tl.exp2(step * rate)
    row_total = tl.sum(total * shrink, axis=0)
    row_weighted = tl.sum((weighted + total * step) * shrink, axis=0) * to_z
    # Of a row of removed columns alone, the sum is the count; NaN must come through, so no comparison with > REMOVED.
    gone = row_top <= REMOVED
    nothing = gone & (row_total == row_total)
    target = tl.load(ids + row)
    inside = (target >= 0) & (target < num_columns)
    w = level(tl.load(logits + target, mask=inside, other=float("-inf")), squeeze, SOFTCAP)
    out += row * 4
    tl.store(out, tl.where(gone, float("-inf"), row_top * to_z))
    tl.store(out + 1, tl.where(nothing, 0.0, row_total))
    tl.store(out + 2, tl.where(w <= REMOVED, float("-inf"), w * to_z))
    tl.store(out + 3, tl.where(nothing, 0.0, row_weighted))


@triton.jit
def store_zeros(out, num_columns, BLOCK: tl.constexpr):
    zeros = tl.full([BLOCK], 0.0, out.dtype.element_ty)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(out + columns, zeros, mask=columns < num_columns)


@triton.jit
def store(out, columns, num_columns, value):
    """Writes a block over the logits once all threads hold theirs: call it after everything is loaded."""
    tl.debug_barrier()
    tl.store(out + columns, value.to(out.dtype.element_ty), mask=columns < num_columns)


@triton.jit
def dlogits_kernel(
    logits,  # [R, C]
    out,  # [R, C], may be the logits' memory
    ids,  # [R]
    temperature,  # [R] or None
    lse,  # [R]
    entropy,  # [R] or None
    logp,  # [R] or None
    g_logp,  # [R]
    g_entropy,  # [R] or None
    row_stride,
    out_stride,
    num_columns,
    scale,
    squeeze,
    gain,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    out += row * out_stride
    g = tl.load(g_logp + row)
    dead = g == 0.0
    if g_entropy is not None:
        ge = tl.load(g_entropy + row)
        dead = dead & (ge == 0.0)
    if dead:
        store_zeros(out, num_columns, BLOCK)
    else:
        to_z = per_temperature(gain, temperature, row)
        from_z = per_temperature(scale, temperature, row)
        row_lse = tl.load(lse + row)
        target = tl.load(ids + row)
        inside = (target >= 0) & (target < num_columns)
        # Read before any block is overwritten. Comparing in 32 bits is cheaper.
        if logp is not None:
            log_p_target = tl.load(logp + row)
        else:
            target_raw = tl.load(logits + target, mask=inside, other=float("-inf"))
            log_p_target = level(target_raw, squeeze, SOFTCAP) * to_z - row_lse
        target = tl.where(inside, target, -1).to(tl.int32)
        # dz_j = p_j (constant + slope log p_j), but at the target 1 - p without cancellation where p is nearly 1.
        constant = -g * from_z
        at_target = -g * from_z * expm1(log_p_target)
        if g_entropy is not None:
            row_entropy = tl.load(entropy + row)
            constant -= ge * from_z * row_entropy
            at_target -= ge * from_z * exp(log_p_target) * (log_p_target + row_entropy)
        for start in range(0, num_columns, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            raw = tl.load(logits + columns, mask=columns < num_columns, other=float("-inf"))
            log_p = level(raw, squeeze, SOFTCAP) * to_z - row_lse
            factor = constant
            if g_entropy is not None:
                factor = constant - ge * from_z * log_p
            value = tl.where(columns == target, at_target, exp(log_p) * factor)
            store(out, columns, num_columns, value * level_slope(raw, squeeze, SOFTCAP))


@triton.jit
def divergence_partials_kernel(
    student,  # [R, C]
    teacher,  # [R, C]
    out,  # [R, 2]
    student_lse,  # [R]
    teacher_lse,  # [R]
    student_temperature,  # [R] or None
    teacher_temperature,  # [R] or None
    student_stride,
    teacher_stride,
    num_columns,
    beta,
    student_squeeze,
    student_gain,
    teacher_squeeze,
    teacher_gain,
    KIND: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    student_to_z = per_temperature(student_gain, student_temperature, row)
    teacher_to_z = per_temperature(teacher_gain, teacher_temperature, row)
    lse = tl.load(student_lse + row)
    other_lse = tl.load(teacher_lse + row)
    values = tl.full([BLOCK], 0.0, tl.float32)
    directions = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < num_columns
        raw = tl.load(student + columns, mask=mask, other=float("-inf"))
        teacher_raw = tl.load(teacher + columns, mask=mask, other=float("-inf"))
        z = logit(raw, student_squeeze, student_to_z, STUDENT_SOFTCAP)
        teacher_z = logit(teacher_raw, teacher_squeeze, teacher_to_z, TEACHER_SOFTCAP)
        r = (teacher_z - z) - (other_lse - lse)
        _, value, direction = divergence_terms(z - lse, teacher_z - other_lse, r, beta, KIND)
        values += value
        directions += direction
    tl.store(out + row * 2, tl.sum(values, axis=0))
    tl.store(out + row * 2 + 1, tl.sum(directions, axis=0))


@triton.jit
def divergence_dlogits_kernel(
    student,  # [R, C]
    teacher,  # [R, C]
    out,  # [R, C], may be the student's memory
    student_lse,  # [R]
    teacher_lse,  # [R]
    weight,  # [R]
    centre,  # [R]
    student_temperature,  # [R] or None
    teacher_temperature,  # [R] or None
    student_stride,
    teacher_stride,
    out_stride,
    num_columns,
    beta,
    student_scale,
    student_squeeze,
    student_gain,
    teacher_squeeze,
    teacher_gain,
    KIND: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    out += row * out_stride
    row_weight = tl.load(weight + row)
    if row_weight == 0.0:
        store_zeros(out, num_columns, BLOCK)
    else:
        student_to_z = per_temperature(student_gain, student_temperature, row)
        teacher_to_z = per_temperature(teacher_gain, teacher_temperature, row)
        factor = row_weight * per_temperature(student_scale, student_temperature, row)
        lse = tl.load(student_lse + row)
        other_lse = tl.load(teacher_lse + row)
        row_centre = tl.load(centre + row)
        for start in range(0, num_columns, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < num_columns
            raw = tl.load(student + columns, mask=mask, other=float("-inf"))
            teacher_raw = tl.load(teacher + columns, mask=mask, other=float("-inf"))
            z = logit(raw, student_squeeze, student_to_z, STUDENT_SOFTCAP)
            teacher_z = logit(teacher_raw, teacher_squeeze, teacher_to_z, TEACHER_SOFTCAP)
            r = (teacher_z - z) - (other_lse - lse)
            p, _, direction = divergence_terms(z - lse, teacher_z - other_lse, r, beta, KIND)
            slope = level_slope(raw, student_squeeze, STUDENT_SOFTCAP)
            store(out, columns, num_columns, (direction - p * row_centre) * factor * slope)

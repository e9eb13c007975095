"""The Triton kernels of the backward pass: gradients of queries, and of keys and values.

Letters in shapes as in `cuda_tiles.py`.
"""

import triton
import triton.language as tl

from gravity.cuda_tiles import (
    SEARCH,
    SUM,
    add_row_sums,
    add_weighted,
    blocks_before,
    dot,
    load_keys,
    load_rows,
    softened_power,
)


@triton.jit
def _query_gradient(
    dq_sum,
    slope_sum,
    lag_sum,
    lag2_sum,
    radius_sum,
    block,
    q,
    q_norm,
    q_time,
    tq,
    t_first,
    g,
    delta,
    k_ptr,
    k_norm_ptr,
    v_ptr,
    mass_ptr,
    tk_ptr,
    stride_kt,
    stride_kc,
    stride_vt,
    stride_vd,
    num_keys,
    time_scale,
    edge,
    inverse_radius2,
    MASKED: tl.constexpr,
    EXPONENT: tl.constexpr,
    BITS: tl.constexpr,
    CUTOFF: tl.constexpr,
    COORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
):
    """Add one key block to the sums from which a query block's gradients are made.

    The slope is `-dL/dr2 * total / EXPONENT`: the factors -EXPONENT and 1 / total come last, once
    per row.

    Returns:
        dq_sum [M, C], slope_sum [M, SUM], lag_sum, lag2_sum and radius_sum [M].
    """
    n = block * N + tl.arange(0, N)
    k, v, k_norm, mass, tk = load_keys(
        *(k_ptr, k_norm_ptr, v_ptr, mass_ptr, tk_ptr, n, stride_kt, stride_kc),
        *(stride_vt, stride_vd, num_keys, MASKED, COORDS, WIDTH, C, D),
    )
    base = (q_norm[:, None] + k_norm[None, :]) - 2.0 * dot(q, tl.trans(k))  # [M, N]
    lag = q_time[:, None] - time_scale * (tk - t_first)[None, :]  # [M, N]
    u, inverse, power = softened_power(base, lag, edge, EXPONENT, BITS, CUTOFF)
    if MASKED:
        power = tl.where(tq[:, None] >= tk[None, :], power, 0.0)
    gain = dot(g, tl.trans(v)) - delta[:, None]  # [M, N], g.v above its weighted mean
    slope = power * mass[None, :] * gain  # [M, N]
    if CUTOFF == "soft":
        rho = tl.maximum((edge - u) * inverse_radius2, 0.0)
        at_edge = slope * rho  # one factor of rho: the cutoff is rho^2
        radius_sum += tl.sum(at_edge * (u - 1.0), 1)  # u - 1 is r2
        slope = at_edge * (rho * inverse + (2.0 / EXPONENT) * inverse_radius2)
    else:
        slope = slope * inverse
    slope_lag = slope * lag
    slope_sum = add_row_sums(slope_sum, slope, k.dtype)
    lag_sum += tl.sum(slope_lag, 1)
    lag2_sum += tl.sum(slope_lag * lag, 1)
    dq_sum = add_weighted(dq_sum, slope, k)
    return dq_sum, slope_sum, lag_sum, lag2_sum, radius_sum


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def query_gradient_kernel(
    q_ptr,
    q_norm_ptr,
    k_ptr,
    k_norm_ptr,
    v_ptr,
    mass_ptr,
    tq_ptr,
    tk_ptr,
    time_scale_ptr,
    time_offset_ptr,
    radius_ptr,
    window_ptr,
    visible_ptr,
    exact_ptr,
    inverse_total_ptr,
    first_kept_ptr,
    grad_ptr,
    delta_ptr,
    dq_ptr,
    partial_ptr,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_qc,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kc,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_gd,
    stride_dqb,
    stride_dqh,
    stride_dqt,
    stride_dqc,
    batch_heads,
    heads,
    num_queries,
    num_keys,
    EXPONENT: tl.constexpr,
    BITS: tl.constexpr,
    CUTOFF: tl.constexpr,
    COORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BY_SUM: tl.constexpr,
    FORWARD_M: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Gradients of one query block of one head; M divides FORWARD_M.

    Args:
        exact_ptr: the output in fp32, (B, H, Tq, WIDTH). Were it rounded to 16 bits, the error of
            g.out would be all that a row gets if one source has all of its pull.
        delta_ptr: written for the other kernel, (B, H, Tq): g.out of each query.
        dq_ptr: written, (B, H, Tq, COORDS).
        partial_ptr: written, (4, query blocks, B, H): what each block adds to the gradients of
            time_scale, time_offset, background and radius (radius under the soft cutoff only).
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(num_queries, M)
    block = blocks - 1 - pid // batch_heads
    bh = (pid % batch_heads).to(tl.int64)
    b, h = bh // heads, bh % heads
    rows = block * M + tl.arange(0, M)
    real = rows < num_queries
    c = tl.arange(0, C)
    time_scale, time_offset = tl.load(time_scale_ptr + h), tl.load(time_offset_ptr + h)
    radius, edge, inverse_radius2 = 1.0, 0.0, 0.0
    if CUTOFF != "none":
        radius = tl.load(radius_ptr + h)
        edge, inverse_radius2 = 1.0 + radius * radius, 1.0 / (radius * radius)
    query = bh * num_queries + rows
    q_ptr += b * stride_qb + h * stride_qh
    q = load_rows(q_ptr, rows, stride_qt, stride_qc, num_queries, True, COORDS, C)  # [M, C]
    q_norm = 1.0 + tl.load(q_norm_ptr + query, mask=real, other=0.0)
    tq = tl.load(tq_ptr + rows, mask=real, other=0.0)
    t_first = tl.load(tq_ptr + block * M // FORWARD_M * FORWARD_M)
    q_time = time_scale * (tq - t_first - time_offset)
    inverse_total = tl.load(inverse_total_ptr + query, mask=real, other=0.0)

    grad_ptr += b * stride_gb + h * stride_gh
    g = load_rows(grad_ptr, rows, stride_gt, stride_gd, num_queries, True, WIDTH, D)  # [M, D]
    exact_ptr += b * stride_ob + h * stride_oh
    out = load_rows(exact_ptr, rows, stride_ot, 1, num_queries, True, WIDTH, D)  # [M, D]
    delta = tl.sum(g.to(tl.float32) * out, 1)  # [M]
    tl.store(delta_ptr + query, delta, mask=real)

    k_ptr += b * stride_kb + h * stride_kh
    k_norm_ptr += bh * num_keys
    v_ptr += b * stride_vb + h * stride_vh
    mass_ptr += b * num_keys
    newest = tl.load(visible_ptr + tl.minimum(block * M + M, num_queries) - 1)
    high = tl.load(visible_ptr + block * M) // N
    if BY_SUM:
        forward_blocks = tl.cdiv(num_queries, FORWARD_M)
        low = tl.load(first_kept_ptr + bh * forward_blocks + block * M // FORWARD_M) // N
    else:
        low = blocks_before(tk_ptr + N - 1, t_first - tl.load(window_ptr + h), high, N)

    dq = tl.zeros([M, C], tl.float32)
    slope_sum = tl.zeros([M, SUM], tl.float32)
    lag_sum = tl.zeros([M], tl.float32)
    lag2_sum = tl.zeros([M], tl.float32)
    radius_sum = tl.zeros([M], tl.float32)
    for n in range(low, high):
        dq, slope_sum, lag_sum, lag2_sum, radius_sum = _query_gradient(
            *(dq, slope_sum, lag_sum, lag2_sum, radius_sum, n),
            *(q, q_norm, q_time, tq, t_first, g, delta),
            *(k_ptr, k_norm_ptr, v_ptr, mass_ptr, tk_ptr),
            *(stride_kt, stride_kc, stride_vt, stride_vd, num_keys),
            *(time_scale, edge, inverse_radius2),
            *(False, EXPONENT, BITS, CUTOFF, COORDS, WIDTH, C, D, N),
        )
    for n in range(tl.maximum(low, high), tl.cdiv(newest, N)):
        dq, slope_sum, lag_sum, lag2_sum, radius_sum = _query_gradient(
            *(dq, slope_sum, lag_sum, lag2_sum, radius_sum, n),
            *(q, q_norm, q_time, tq, t_first, g, delta),
            *(k_ptr, k_norm_ptr, v_ptr, mass_ptr, tk_ptr),
            *(stride_kt, stride_kc, stride_vt, stride_vd, num_keys),
            *(time_scale, edge, inverse_radius2),
            *(True, EXPONENT, BITS, CUTOFF, COORDS, WIDTH, C, D, N),
        )

    factor = -EXPONENT * inverse_total  # [M]
    dq = q.to(tl.float32) * (tl.sum(slope_sum, 1) / SUM)[:, None] - dq
    dq = dq * (2.0 * factor)[:, None]
    wide = rows.to(tl.int64)[:, None]
    place = b * stride_dqb + h * stride_dqh + wide * stride_dqt + c[None, :] * stride_dqc
    dq_mask = real[:, None] & (c < COORDS)[None, :]
    tl.store(dq_ptr + place, dq.to(dq_ptr.dtype.element_ty), mask=dq_mask)
    # lag contains one factor of time_scale, which may be 0
    per_scale = 2.0 / tl.maximum(time_scale, 1e-30)
    partial = block * batch_heads + bh
    step = blocks.to(tl.int64) * batch_heads
    tl.store(partial_ptr + partial, per_scale * tl.sum(factor * lag2_sum, 0))
    tl.store(partial_ptr + step + partial, -2.0 * time_scale * tl.sum(factor * lag_sum, 0))
    tl.store(partial_ptr + 2 * step + partial, -tl.sum(inverse_total * delta, 0))
    if CUTOFF == "soft":
        d_radius = 4.0 * inverse_radius2 / radius * tl.sum(inverse_total * radius_sum, 0)
        tl.store(partial_ptr + 3 * step + partial, d_radius)


@triton.jit
def _key_gradient(
    dk_sum,
    dv_sum,
    slope_sum,
    mass_sum,
    block,
    k,
    k_norm,
    tk,
    v,
    first_key,
    q_ptr,
    q_norm_ptr,
    tq_ptr,
    grad_ptr,
    delta_ptr,
    inverse_total_ptr,
    first_kept_ptr,
    stride_qt,
    stride_qc,
    stride_gt,
    stride_gd,
    num_queries,
    time_scale,
    time_offset,
    edge,
    inverse_radius2,
    MASKED: tl.constexpr,
    EXPONENT: tl.constexpr,
    BITS: tl.constexpr,
    CUTOFF: tl.constexpr,
    COORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BY_SUM: tl.constexpr,
    FORWARD_M: tl.constexpr,
    M: tl.constexpr,
):
    """Add one query block to the sums from which a key block's gradients are made.

    Returns:
        dk_sum [N, C], dv_sum [N, D], slope_sum [N, SUM] and mass_sum [N].
    """
    m = block * M + tl.arange(0, M)
    real = m < num_queries
    q = load_rows(q_ptr, m, stride_qt, stride_qc, num_queries, True, COORDS, C)  # [M, C]
    g = load_rows(grad_ptr, m, stride_gt, stride_gd, num_queries, True, WIDTH, D)  # [M, D]
    q_norm = 1.0 + tl.load(q_norm_ptr + m, mask=real, other=0.0)
    tq = tl.load(tq_ptr + m, mask=real, other=0.0)
    t_first = tl.load(tq_ptr + block * M // FORWARD_M * FORWARD_M)
    q_time = time_scale * (tq - t_first - time_offset)
    delta = tl.load(delta_ptr + m, mask=real, other=0.0)
    inverse_total = tl.load(inverse_total_ptr + m, mask=real, other=0.0)
    if BY_SUM:  # between blocks that kept this key there may be some that did not
        kept = tl.load(first_kept_ptr + block * M // FORWARD_M) <= first_key
        inverse_total = tl.where(kept, inverse_total, 0.0)

    base = (q_norm[None, :] + k_norm[:, None]) - 2.0 * dot(k, tl.trans(q))  # [N, M]
    lag = q_time[None, :] - time_scale * (tk - t_first)[:, None]  # [N, M]
    u, inverse, power = softened_power(base, lag, edge, EXPONENT, BITS, CUTOFF)
    if MASKED:
        power = tl.where(tq[None, :] >= tk[:, None], power, 0.0)
    weight = power * inverse_total[None, :]  # [N, M], of a unit mass
    gain = dot(v, tl.trans(g)) - delta[None, :]  # [N, M]
    if CUTOFF == "soft":
        rho = tl.maximum((edge - u) * inverse_radius2, 0.0)
        weight = weight * rho
        at_edge = weight * gain
        weight = weight * rho
        mass_sum += tl.sum(at_edge * rho, 1)
        slope = at_edge * (rho * inverse + (2.0 / EXPONENT) * inverse_radius2)
    else:
        weighted_gain = weight * gain
        mass_sum += tl.sum(weighted_gain, 1)
        slope = weighted_gain * inverse
    dv_sum = add_weighted(dv_sum, weight, g)
    slope_sum = add_row_sums(slope_sum, slope, q.dtype)
    dk_sum = add_weighted(dk_sum, slope, q)
    return dk_sum, dv_sum, slope_sum, mass_sum


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def key_gradient_kernel(
    q_ptr,
    q_norm_ptr,
    k_ptr,
    k_norm_ptr,
    v_ptr,
    mass_ptr,
    tq_ptr,
    tk_ptr,
    time_scale_ptr,
    time_offset_ptr,
    radius_ptr,
    window_ptr,
    first_seen_ptr,
    inverse_total_ptr,
    first_kept_ptr,
    grad_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    dmass_ptr,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_qc,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kc,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_gd,
    stride_dkb,
    stride_dkh,
    stride_dkt,
    stride_dkc,
    stride_dvb,
    stride_dvh,
    stride_dvt,
    stride_dvd,
    batch_heads,
    heads,
    num_queries,
    num_keys,
    EXPONENT: tl.constexpr,
    BITS: tl.constexpr,
    CUTOFF: tl.constexpr,
    COORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BY_SUM: tl.constexpr,
    FORWARD_M: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Gradients of one key block of one head; M divides FORWARD_M, N the forward key block.

    Args:
        first_seen_ptr: the first query that is not earlier than each key, (Tk,).
        dk_ptr, dv_ptr, dmass_ptr: written; (B, H, Tk, COORDS), (B, H, Tk, WIDTH), (B, H, Tk).
    """
    pid = tl.program_id(0)
    block = pid // batch_heads  # the oldest first: they have the most queries
    bh = (pid % batch_heads).to(tl.int64)
    b, h = bh // heads, bh % heads
    first_key = block * N
    rows = first_key + tl.arange(0, N)
    real = rows < num_keys
    c, d = tl.arange(0, C), tl.arange(0, D)
    time_scale, time_offset = tl.load(time_scale_ptr + h), tl.load(time_offset_ptr + h)
    edge, inverse_radius2 = 0.0, 0.0
    if CUTOFF != "none":
        radius = tl.load(radius_ptr + h)
        edge, inverse_radius2 = 1.0 + radius * radius, 1.0 / (radius * radius)
    key = bh * num_keys + rows
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    k, v, k_norm, mass, tk = load_keys(
        *(k_ptr, k_norm_ptr + bh * num_keys, v_ptr, mass_ptr + b * num_keys, tk_ptr, rows),
        *(stride_kt, stride_kc, stride_vt, stride_vd, num_keys, True, COORDS, WIDTH, C, D),
    )

    q_ptr += b * stride_qb + h * stride_qh
    q_norm_ptr += bh * num_queries
    grad_ptr += b * stride_gb + h * stride_gh
    delta_ptr += bh * num_queries
    inverse_total_ptr += bh * num_queries
    low = tl.load(first_seen_ptr + first_key) // M
    newest = tl.minimum(first_key + N, num_keys) - 1
    blocks = tl.cdiv(num_queries, M)
    middle = tl.minimum(tl.cdiv(tl.load(first_seen_ptr + newest), M), blocks)
    if BY_SUM:
        forward_blocks = tl.cdiv(num_queries, FORWARD_M)
        first_kept_ptr += bh * forward_blocks
        end = 0  # all forward blocks from here on left out these keys
        for start in range(low * M // FORWARD_M, forward_blocks, SEARCH):
            m = start + tl.arange(0, SEARCH)
            kept = tl.load(first_kept_ptr + m, mask=m < forward_blocks, other=2147483647)
            end = tl.maximum(end, tl.max(tl.where(kept <= first_key, m + 1, 0), 0))
        end = tl.minimum(end * (FORWARD_M // M), blocks)
    else:
        # the blocks whose oldest query has the newest of these keys in its window
        last_time = tl.load(tk_ptr + newest) + tl.load(window_ptr + h)
        end = blocks_before(tq_ptr, last_time + 1.0, blocks, M)

    dk = tl.zeros([N, C], tl.float32)
    dv = tl.zeros([N, D], tl.float32)
    slope_sum = tl.zeros([N, SUM], tl.float32)
    mass_sum = tl.zeros([N], tl.float32)
    for m in range(low, tl.minimum(middle, end)):
        dk, dv, slope_sum, mass_sum = _key_gradient(
            *(dk, dv, slope_sum, mass_sum, m, k, k_norm, tk, v, first_key),
            *(q_ptr, q_norm_ptr, tq_ptr, grad_ptr, delta_ptr, inverse_total_ptr, first_kept_ptr),
            *(stride_qt, stride_qc, stride_gt, stride_gd, num_queries),
            *(time_scale, time_offset, edge, inverse_radius2),
            *(True, EXPONENT, BITS, CUTOFF, COORDS, WIDTH, C, D, BY_SUM, FORWARD_M, M),
        )
    for m in range(middle, end):
        dk, dv, slope_sum, mass_sum = _key_gradient(
            *(dk, dv, slope_sum, mass_sum, m, k, k_norm, tk, v, first_key),
            *(q_ptr, q_norm_ptr, tq_ptr, grad_ptr, delta_ptr, inverse_total_ptr, first_kept_ptr),
            *(stride_qt, stride_qc, stride_gt, stride_gd, num_queries),
            *(time_scale, time_offset, edge, inverse_radius2),
            *(False, EXPONENT, BITS, CUTOFF, COORDS, WIDTH, C, D, BY_SUM, FORWARD_M, M),
        )

    dk = k.to(tl.float32) * (tl.sum(slope_sum, 1) / SUM)[:, None] - dk
    dk = dk * (-2.0 * EXPONENT * mass)[:, None]
    wide = rows.to(tl.int64)[:, None]
    place = b * stride_dkb + h * stride_dkh + wide * stride_dkt + c[None, :] * stride_dkc
    dk_mask = real[:, None] & (c < COORDS)[None, :]
    tl.store(dk_ptr + place, dk.to(dk_ptr.dtype.element_ty), mask=dk_mask)
    place = b * stride_dvb + h * stride_dvh + wide * stride_dvt + d[None, :] * stride_dvd
    dv = dv * mass[:, None]
    dv_mask = real[:, None] & (d < WIDTH)[None, :]
    tl.store(dv_ptr + place, dv.to(dv_ptr.dtype.element_ty), mask=dv_mask)
    tl.store(dmass_ptr + key, mass_sum, mask=real)

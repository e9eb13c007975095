"""The Triton kernels of the backward pass.

One kernel goes through the pairs, a key block against all queries that see it, and adds up what
concerns the queries with atomic additions, whose order is not fixed. If results must be the same to
the bit, another kernel computes that part a second time, a query block against its keys.
Letters in shapes as in `cuda_tiles.py`.
"""

import triton
import triton.language as tl

from gravity.cuda_tiles import (
    LAW,
    PARTS,
    add_product,
    by_token,
    column,
    factor_columns,
    fields,
    key_blocks,
    lags,
    load_law,
    load_packed,
    load_rows,
    product,
    sum_of_parts,
    tile,
)


@triton.jit
def pack_gradient_kernel(
    grad,
    exact_ptr,
    inverse_total_ptr,
    packed,
    dq_ptr,
    background_ptr,
    heads,
    queries,
    query_rows,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the outputs as the other kernels read them.

    With g = gradient / (background + sum of fields), a pair's field gets the gradient
    `mass * (g . value - g . out)`.

    Args:
        grad: a pointer to (B, H, Tq, WIDTH), and its strides.
        exact_ptr: the output in fp32, (B, Tq, H, WIDTH). Were it rounded to 16 bits, the error of
            g.out would be all that a row gets if one source has all of its pull.
        packed: written, pointers to g [rows, D] and to -g.out as `factor_columns`.
        dq_ptr: set to 0, see `key_gradient_kernel`.
        background_ptr: written, each block's part of its gradient, (blocks, B * H).
    """
    g_out, factor_out = packed
    dtype: tl.constexpr = g_out.dtype.element_ty
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // heads, bh % heads
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place, inside = by_token(exact_ptr, b, h, heads, rows, queries, WIDTH, D)
    out = tl.load(place, mask=inside, other=0.0)  # [BLOCK, D]
    real = rows < queries
    scale = tl.load(inverse_total_ptr + bh * queries + rows, mask=real, other=0.0)
    g = load_rows(grad, b, h, rows, queries, WIDTH, D) * scale[:, None]  # [BLOCK, D]
    g = g.to(dtype)
    brought = tl.sum(g.to(tl.float32) * out, 1)  # of the rounded g, as all else is
    row = (bh * query_rows + rows.to(tl.int64))[:, None]
    exists = (rows < query_rows)[:, None]
    tl.store(g_out + row * D + tl.arange(0, D)[None, :], g, mask=exists)
    factor = factor_columns(-brought, dtype).to(dtype)
    tl.store(factor_out + row * PARTS + tl.arange(0, PARTS)[None, :], factor, mask=exists)
    nothing = tl.zeros([BLOCK, K], tl.float32)
    tl.store(dq_ptr + row * K + tl.arange(0, K)[None, :], nothing, mask=exists)
    tl.store(background_ptr + tl.program_id(1) * tl.num_programs(0) + bh, -tl.sum(brought, 0))


@triton.jit
def query_gradient_kernel(
    packed,
    gradients,
    tq_ptr,
    tk_ptr,
    dq_ptr,
    heads,
    queries,
    keys,
    query_rows,
    key_rows,
    EXPONENT: tl.constexpr,
    BITS: tl.constexpr,
    CUTOFF: tl.constexpr,
    COORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """What `key_gradient_kernel` adds to dq, for one query block of one head, without atomics."""
    q_ptr, k_ptr, v_ptr, mass_ptr, q_age, k_age, law_ptr = packed
    g_ptr, factor_ptr = gradients
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // heads, bh % heads
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # the newest first: they have the most keys
    rows = block * M + tl.arange(0, M)
    law = load_law(law_ptr + h * LAW)
    low, high, end, first_query, first_key = key_blocks(
        tq_ptr, tk_ptr, block, queries, keys, law[4], M, N
    )
    first = (first_query, first_key)
    age = tl.load(q_age + rows)  # [M]
    q = load_packed(q_ptr + bh * query_rows * K, rows, K)  # [M, K]
    g = load_packed(g_ptr + bh * query_rows * D, rows, D)  # [M, D]
    factor = load_packed(factor_ptr + bh * query_rows * PARTS, rows, PARTS)
    keys_packed = (
        k_ptr + bh * key_rows * K,
        v_ptr + bh * key_rows * D,
        mass_ptr + b * key_rows * PARTS,
        k_age,
    )
    dq = tl.zeros([M, K], tl.float32)
    for n in range(low, high):
        pairs, k, v, mass = tile(
            *(n, q, age, first, law, keys_packed, tk_ptr),
            *(False, EXPONENT, BITS, CUTOFF, K, D, N),
        )
        gain = add_product(product(g, tl.trans(v)), factor, tl.trans(mass))
        dq = add_product(dq, pairs[1] * gain, k)
    for n in tl.range(high, end, num_stages=1):  # few blocks: a pipeline would only take registers
        pairs, k, v, mass = tile(
            *(n, q, age, first, law, keys_packed, tk_ptr),
            *(True, EXPONENT, BITS, CUTOFF, K, D, N),
        )
        gain = add_product(product(g, tl.trans(v)), factor, tl.trans(mass))
        dq = add_product(dq, pairs[1] * gain, k)
    place = (bh * query_rows + rows)[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(dq_ptr + place, dq)


@triton.jit
def finish_kernel(
    sums_ptr,
    q_ptr,
    dq_ptr,
    heads,
    queries,
    query_rows,
    EXPONENT: tl.constexpr,
    COORDS: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of queries, (B, Tq, H, COORDS), from the sums of slope * (k, 1) over their keys."""
    bh = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = load_packed(sums_ptr + bh * query_rows * K, rows, K)
    q = load_packed(q_ptr + bh * query_rows * K, rows, K).to(tl.float32)  # -2 q
    dq = EXPONENT * (q * column(sums, COORDS)[:, None] + 2.0 * sums)
    place, inside = by_token(dq_ptr, bh // heads, bh % heads, heads, rows, queries, COORDS, K)
    tl.store(place, dq.to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _pull_back(
    sums,
    m,
    key_block,
    law,
    queries_packed,
    tq_ptr,
    first,
    dq_ptr,
    GENERAL: tl.constexpr,
    ATOMIC: tl.constexpr,
    EXPONENT: tl.constexpr,
    BITS: tl.constexpr,
    CUTOFF: tl.constexpr,
    COORDS: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
):
    """Add query block m to the sums from which a key block's gradients are made.

    Args:
        key_block: k [N, K], v [N, D] and masses [N, PARTS], packed, times counted from the first
            key, [N], and the time of that.
        first: the time of the first of all queries.
    """
    dk, dv, dmass, lag_sum, lag2_sum, radius_sum = sums
    k, v, mass, k_age, start = key_block
    i = m * M + tl.arange(0, M)
    q = load_packed(queries_packed[0], i, K)  # [M, K]
    g = load_packed(queries_packed[1], i, D)  # [M, D]
    factor = load_packed(queries_packed[2], i, PARTS)
    age = tl.arange(0, M).to(tl.float32)
    distance = (first + m * M - start).to(tl.float32)
    if GENERAL:
        age = tl.load(queries_packed[3] + i)
        distance = (tl.load(tq_ptr + m * M) - start).to(tl.float32)
    seen = (age + distance)[None, :] >= k_age[:, None]
    q_time = law[0] * (age - law[1])
    lag = lags(law[0], distance, q_time[None, :], k_age[:, None])  # [N, M]
    base = product(k, tl.trans(q))
    field, fall, at_edge = fields(base, lag, seen, law, GENERAL, EXPONENT, BITS, CUTOFF)
    gain = add_product(product(v, tl.trans(g)), mass, tl.trans(factor))  # [N, M]
    slope = fall * gain
    # before the products, so that registers are free while these run
    slope_lag = slope * lag
    lag_sum += tl.sum(slope_lag, 1)
    lag2_sum += tl.sum(slope_lag * lag, 1)
    if CUTOFF == "soft":
        radius_sum += tl.sum(at_edge * gain, 1)
    dv = add_product(dv, field, g)
    dmass = add_product(dmass, field, factor)
    dk = add_product(dk, slope, q)
    if ATOMIC:
        c = tl.arange(0, K)[None, :]
        part = product(tl.trans(slope.to(k.dtype)), k)  # [M, K]
        place = dq_ptr + i[:, None] * K + c
        tl.atomic_add(place, part, mask=c <= COORDS, sem="relaxed")
    return dk, dv, dmass, lag_sum, lag2_sum, radius_sum


@triton.jit
def key_gradient_kernel(
    packed,
    gradients,
    tq_ptr,
    tk_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dmass_ptr,
    law_ptr,
    heads,
    queries,
    keys,
    query_rows,
    key_rows,
    ATOMIC: tl.constexpr,
    EXPONENT: tl.constexpr,
    BITS: tl.constexpr,
    CUTOFF: tl.constexpr,
    COORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Gradients of one key block of one head.

    Args:
        packed, gradients: pointers to what `pack_kernel` and `pack_gradient_kernel` wrote.
        dq_ptr: if ATOMIC, sums of slope * (k, 1) are added to it, (B * H, rows, K).
        dk_ptr, dv_ptr, dmass_ptr: written; (B, Tk, H, COORDS), (B, Tk, H, WIDTH), (B, H, Tk).
        law_ptr: written, (3, key blocks, B * H): what each block adds to the gradients of
            time_scale, time_offset and radius.
    """
    q_ptr, k_ptr, v_ptr, mass_ptr, q_age, k_age, head_ptr = packed
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // heads, bh % heads
    block = tl.program_id(1)  # the oldest first: they have the most queries
    rows = block * N + tl.arange(0, N)
    law = load_law(head_ptr + h * LAW)
    queries_packed = (
        q_ptr + bh * query_rows * K,
        gradients[0] + bh * query_rows * D,
        gradients[1] + bh * query_rows * PARTS,
        q_age,
    )
    dq_ptr += bh * query_rows * K
    k = load_packed(k_ptr + bh * key_rows * K, rows, K)
    v = load_packed(v_ptr + bh * key_rows * D, rows, D)
    mass = load_packed(mass_ptr + b * key_rows * PARTS, rows, PARTS)
    start = tl.load(tk_ptr + block * N)
    key_block = (k, v, mass, tl.load(k_age + rows), start)

    # as in `key_blocks`, seen from the other side
    newest = tl.load(tk_ptr + tl.minimum(block * N + N, keys) - 1)
    first, last = tl.load(tq_ptr), tl.load(tq_ptr + queries - 1)
    blocks = tl.cdiv(queries, M)
    low = tl.minimum(tl.maximum(queries - 1 - last + start, 0) // M, blocks).to(tl.int32)
    end = tl.minimum(tl.maximum(newest + law[4] - first + 1, 0), queries)
    end = tl.maximum(tl.cdiv(end, M).to(tl.int32), low)
    high = tl.cdiv(tl.minimum(tl.maximum(newest - first, 0), queries), M).to(tl.int32)
    high = tl.where(last - first == queries - 1, tl.minimum(tl.maximum(high, low), end), end)

    zero = tl.zeros([N], tl.float32)
    dk, dv = tl.zeros([N, K], tl.float32), tl.zeros([N, D], tl.float32)
    dmass = tl.zeros([N, PARTS], tl.float32)
    sums = (dk, dv, dmass, zero, zero, zero)
    for m in range(low, high):
        sums = _pull_back(
            *(sums, m, key_block, law, queries_packed, tq_ptr, first, dq_ptr),
            *(True, ATOMIC, EXPONENT, BITS, CUTOFF, COORDS, K, D, M),
        )
    for m in range(high, end):
        sums = _pull_back(
            *(sums, m, key_block, law, queries_packed, tq_ptr, first, dq_ptr),
            *(False, ATOMIC, EXPONENT, BITS, CUTOFF, COORDS, K, D, M),
        )
    dk, dv, dmass, lag_sum, lag2_sum, radius_sum = sums

    # dk holds slope * (-2 q) in its first columns, and slope alone where queries have ones
    slope_sum = column(dk, COORDS + 3)[:, None]
    dk = -EXPONENT * (2.0 * k.to(tl.float32) * slope_sum + dk)
    place, inside = by_token(dk_ptr, b, h, heads, rows, keys, COORDS, K)
    tl.store(place, dk.to(dk_ptr.dtype.element_ty), mask=inside)
    weight = sum_of_parts(mass.to(tl.float32))  # [N]
    place, inside = by_token(dv_ptr, b, h, heads, rows, keys, WIDTH, D)
    tl.store(place, (dv * weight[:, None]).to(dv_ptr.dtype.element_ty), mask=inside)
    # packed values are multiplied by the mass
    dmass = column(dmass, 0) + column(dmass, 1) + column(dmass, 2)
    dmass += tl.sum(v.to(tl.float32) * dv, 1) / weight
    tl.store(dmass_ptr + bh * keys + rows, dmass, mask=rows < keys)
    # lag contains one factor of time_scale, which may be 0
    per_scale = -2.0 * EXPONENT / tl.maximum(law[0], 1e-30)
    place = law_ptr + block * tl.num_programs(0) + bh
    step = tl.num_programs(0) * tl.num_programs(1)
    tl.store(place, per_scale * tl.sum(lag2_sum, 0))
    tl.store(place + step, 2.0 * EXPONENT * law[0] * tl.sum(lag_sum, 0))
    tl.store(place + 2 * step, 4.0 * law[6] / law[2] * tl.sum(radius_sum, 0))

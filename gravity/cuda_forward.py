"""The Triton kernel of the forward pass; letters in shapes as in `cuda_tiles.py`."""

import triton
import triton.language as tl

from gravity.cuda_tiles import (
    SUM,
    add_row_sums,
    add_weighted,
    blocks_before,
    dot,
    load_keys,
    load_rows,
    provably_needed_from,
    softened_power,
)


@triton.jit
def _attend(
    sums,
    total,
    block,
    q,
    q_norm,
    q_time,
    tq,
    t_first,
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
    """Add one key block to the sums of a query block: sums [M, D], total [M, SUM]."""
    n = block * N + tl.arange(0, N)
    k, v, k_norm, mass, tk = load_keys(
        *(k_ptr, k_norm_ptr, v_ptr, mass_ptr, tk_ptr, n, stride_kt, stride_kc),
        *(stride_vt, stride_vd, num_keys, MASKED, COORDS, WIDTH, C, D),
    )
    base = (q_norm[:, None] + k_norm[None, :]) - 2.0 * dot(q, tl.trans(k))  # [M, N]
    lag = q_time[:, None] - time_scale * (tk - t_first)[None, :]  # [M, N]
    u, _, field = softened_power(base, lag, edge, EXPONENT, BITS, CUTOFF)  # [M, N]
    if MASKED:
        field = tl.where(tq[:, None] >= tk[None, :], field, 0.0)
    field = field * mass[None, :]
    if CUTOFF == "soft":
        rho = tl.maximum((edge - u) * inverse_radius2, 0.0)
        field = field * rho * rho
    total = add_row_sums(total, field, v.dtype)
    sums = add_weighted(sums, field, v)
    return sums, total


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def forward_kernel(
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
    background_ptr,
    window_ptr,
    max_mass_ptr,
    visible_ptr,
    out_ptr,
    exact_ptr,
    inverse_total_ptr,
    first_kept_ptr,
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
    batch_heads,
    heads,
    num_queries,
    num_keys,
    log_share,
    BY_SUM: tl.constexpr,
    EXPONENT: tl.constexpr,
    BITS: tl.constexpr,
    CUTOFF: tl.constexpr,
    COORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Outputs of one query block of one head: its key blocks are added, newest first.

    Args:
        visible_ptr: how many keys are not later than each query, (Tq,).
        window_ptr: how many tokens back each head must look, as far as that is known, (H,).
        max_mass_ptr: the largest mass, one number.
        log_share: log2 of `tolerance * (2 * EXPONENT - 1)`.
        out_ptr, inverse_total_ptr: written; (B, H, Tq, WIDTH) and (B, H, Tq).
        exact_ptr: written, the output in fp32; None if `out_ptr` is in fp32 already.
        first_kept_ptr: written if BY_SUM, the oldest key that was summed, (B, H, query blocks).
        BY_SUM: whether the sums so far also decide how far back to look.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(num_queries, M)
    block = blocks - 1 - pid // batch_heads  # the newest first: they have the most keys
    bh = (pid % batch_heads).to(tl.int64)
    b, h = bh // heads, bh % heads
    rows = block * M + tl.arange(0, M)
    real = rows < num_queries
    d = tl.arange(0, D)
    time_scale, time_offset = tl.load(time_scale_ptr + h), tl.load(time_offset_ptr + h)
    edge, inverse_radius2 = 0.0, 0.0
    if CUTOFF != "none":
        radius = tl.load(radius_ptr + h)
        edge, inverse_radius2 = 1.0 + radius * radius, 1.0 / (radius * radius)
    query = bh * num_queries + rows
    q_ptr += b * stride_qb + h * stride_qh
    q = load_rows(q_ptr, rows, stride_qt, stride_qc, num_queries, True, COORDS, C)  # [M, C]
    q_norm = 1.0 + tl.load(q_norm_ptr + query, mask=real, other=0.0)  # [M]
    tq = tl.load(tq_ptr + rows, mask=real, other=0.0)
    t_first = tl.load(tq_ptr + block * M)
    q_time = time_scale * (tq - t_first - time_offset)  # [M]
    k_ptr += b * stride_kb + h * stride_kh
    k_norm_ptr += bh * num_keys
    v_ptr += b * stride_vb + h * stride_vh
    mass_ptr += b * num_keys
    newest = tl.load(visible_ptr + tl.minimum(block * M + M, num_queries) - 1)
    high = tl.load(visible_ptr + block * M) // N  # every row sees all blocks below it

    sums = tl.zeros([M, D], tl.float32)
    total = tl.zeros([M, SUM], tl.float32)  # the same in each column
    for n in range(high, tl.cdiv(newest, N)):
        sums, total = _attend(
            *(sums, total, n, q, q_norm, q_time, tq, t_first),
            *(k_ptr, k_norm_ptr, v_ptr, mass_ptr, tk_ptr),
            *(stride_kt, stride_kc, stride_vt, stride_vd, num_keys),
            *(time_scale, edge, inverse_radius2),
            *(True, EXPONENT, BITS, CUTOFF, COORDS, WIDTH, C, D, N),
        )
    # a block is left out if its newest key is beyond the window of the oldest query
    last_ptr = tk_ptr + N - 1
    low = blocks_before(last_ptr, t_first - tl.load(window_ptr + h), high, N)
    if BY_SUM:
        log_window = tl.log2(tl.load(max_mass_ptr)) - log_share
        log_window = (log_window - 2 * EXPONENT * tl.log2(time_scale)) / (2 * EXPONENT - 1)
        needed = provably_needed_from(tl.max(total, 1), tq, real, time_offset, log_window, EXPONENT)
        end = tl.maximum(low, blocks_before(last_ptr, needed, high, N))
        chunk = 1
        # few searches, each after four times as many blocks: the loops between them are pipelined
        while high > end:
            stop = tl.maximum(high - chunk, end)
            for i in range(stop, high):
                sums, total = _attend(
                    *(sums, total, high - 1 - (i - stop), q, q_norm, q_time, tq, t_first),
                    *(k_ptr, k_norm_ptr, v_ptr, mass_ptr, tk_ptr),
                    *(stride_kt, stride_kc, stride_vt, stride_vd, num_keys),
                    *(time_scale, edge, inverse_radius2),
                    *(False, EXPONENT, BITS, CUTOFF, COORDS, WIDTH, C, D, N),
                )
            high = stop
            chunk *= 4
            needed = provably_needed_from(
                tl.max(total, 1), tq, real, time_offset, log_window, EXPONENT
            )
            end = tl.maximum(low, blocks_before(last_ptr, needed, high, N))
        tl.store(first_kept_ptr + bh * blocks + block, high * N)
    else:
        for i in range(low, high):
            sums, total = _attend(
                *(sums, total, high - 1 - (i - low), q, q_norm, q_time, tq, t_first),
                *(k_ptr, k_norm_ptr, v_ptr, mass_ptr, tk_ptr),
                *(stride_kt, stride_kc, stride_vt, stride_vd, num_keys),
                *(time_scale, edge, inverse_radius2),
                *(False, EXPONENT, BITS, CUTOFF, COORDS, WIDTH, C, D, N),
            )

    inverse_total = 1.0 / (tl.max(total, 1) + tl.load(background_ptr + h))  # [M]
    out = sums * inverse_total[:, None]  # [M, D]
    place = b * stride_ob + h * stride_oh + rows.to(tl.int64)[:, None] * stride_ot + d[None, :]
    inside = real[:, None] & (d < WIDTH)[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)
    if exact_ptr is not None:
        tl.store(exact_ptr + place, out, mask=inside)
    tl.store(inverse_total_ptr + query, inverse_total, mask=real)

"""The CUDA kernels of gravity attention, in Triton; `gravity_triton.py` launches them.

Shapes behind the comments: M queries and N keys of a tile, C padded coordinates, D padded width of
a value. Every kernel recomputes the field from the same few rows and columns:

    u     = max(|q|^2 + |k|^2 - 2 q.k, 0) + 1 + lag^2       lag = time_scale * (t_i - t_j - offset)
    power = u ** -exponent                                  the field is mass_j * power

A row's norm carries the 1, so that a pair costs an addition, a fused multiply-add, a maximum, a
subtraction, another fused multiply-add, one reciprocal and the squarings. The time of a tile is
counted from the first query of its forward block: counted from 0 it would lose the digits of the
nearest distances, and counted differently in the backward pass the weights of a row would not sum
to 1 where a soft cutoff leaves little of them. For the same reason all kernels add in one order.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LATER = tl.constexpr(1e12)  # the time of a key that does not exist: after every query
SUM = tl.constexpr(16)  # the narrowest matrix that a product takes
SEARCH = tl.constexpr(128)  # blocks looked at together when the end of a loop is searched


@triton.jit
def _reciprocal(u):
    """1 / u in one instruction; u is at least 1."""
    if INTERPRETED:
        return 1.0 / u
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _dot(a, b):
    """a @ b of inputs, summed in fp32; fp32 inputs are not rounded to tf32."""
    if INTERPRETED:  # its products of bf16 are wrong
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _add_weighted(sums, weights, values):
    """sums + weights @ values; weights are fp32 and may be far too small for fp16."""
    if INTERPRETED:
        return tl.dot(weights, values.to(tl.float32), sums)
    elif values.dtype == tl.float16:
        return tl.dot(weights, values.to(tl.float32), sums, input_precision="tf32")
    else:
        return tl.dot(weights.to(values.dtype), values, sums, input_precision="ieee")


@triton.jit
def _add_row_sums(sums, weights, dtype: tl.constexpr):
    """sums + the row sums of weights in each of its 16 columns.

    `q * sum(slope) - slope @ k` cancels where q and k lie far from the origin: both of its terms
    have to see the same rounded slopes, so 16-bit sums are a product with ones, too.
    """
    if dtype == tl.float32:
        return sums + tl.sum(weights, 1)[:, None]
    else:
        return _add_weighted(sums, weights, tl.full([weights.shape[1], SUM], 1.0, dtype))


@triton.jit
def _load_rows(
    ptr,
    rows,
    stride_t,
    stride_c,
    length,
    MASKED: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Rows of a (T, WIDTH) matrix, [rows, PADDED]; 0 past its end (where MASKED) and in padding."""
    c = tl.arange(0, PADDED)
    place = ptr + rows.to(tl.int64)[:, None] * stride_t + c[None, :] * stride_c
    if MASKED and WIDTH < PADDED:
        return tl.load(place, mask=(rows < length)[:, None] & (c < WIDTH)[None, :], other=0.0)
    elif MASKED:
        return tl.load(place, mask=(rows < length)[:, None], other=0.0)
    elif WIDTH < PADDED:
        return tl.load(place, mask=(c < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(place)


@triton.jit
def _load_keys(
    k_ptr,
    k_norm_ptr,
    v_ptr,
    mass_ptr,
    tk_ptr,
    n,
    stride_kt,
    stride_kc,
    stride_vt,
    stride_vd,
    num_keys,
    MASKED: tl.constexpr,
    COORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
):
    """Keys n of one head: k [N, C], v [N, D], and their norms, masses and times [N]."""
    k = _load_rows(k_ptr, n, stride_kt, stride_kc, num_keys, MASKED, COORDS, C)
    v = _load_rows(v_ptr, n, stride_vt, stride_vd, num_keys, MASKED, WIDTH, D)
    if MASKED:
        exists = n < num_keys
        k_norm = tl.load(k_norm_ptr + n, mask=exists, other=0.0)
        mass = tl.load(mass_ptr + n, mask=exists, other=0.0)
        tk = tl.load(tk_ptr + n, mask=exists, other=LATER)
    else:
        k_norm = tl.load(k_norm_ptr + n)
        mass = tl.load(mass_ptr + n)
        tk = tl.load(tk_ptr + n)
    return k, v, k_norm, mass, tk


@triton.jit
def _softened_power(base, lag, edge, EXPONENT: tl.constexpr, BITS: tl.constexpr, CUTOFF):
    """u, 1 / u and u ** -EXPONENT, 0 beyond a hard cutoff.

    Args:
        base: spatial part of r2, plus 1; rounding may have brought it below 1.
        edge: 1 + radius^2.
        BITS: number of binary digits of EXPONENT.
    """
    # never nearer than the time alone allows: the bound on what is left out rests on it
    u = tl.maximum(base, 1.0) + lag * lag
    inverse = _reciprocal(u)
    power = inverse
    for i in tl.static_range(BITS - 1):
        power = power * power
        if (EXPONENT >> (BITS - 2 - i)) & 1:
            power = power * inverse
    if CUTOFF == "hard":
        power = tl.where(u <= edge, power, 0.0)
    return u, inverse, power


@triton.jit(do_not_specialize=["length"])
def norm_kernel(
    x_ptr,
    norm_ptr,
    stride_b,
    stride_h,
    stride_t,
    stride_c,
    heads,
    length,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """|x|^2 in fp32: (B, H, T, WIDTH) with any strides -> (B, H, T)."""
    blocks = tl.cdiv(length, BLOCK)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    x_ptr += (bh // heads) * stride_b + (bh % heads) * stride_h
    x = _load_rows(x_ptr, rows, stride_t, stride_c, length, True, WIDTH, C).to(tl.float32)
    tl.store(norm_ptr + bh * length + rows, tl.sum(x * x, 1), mask=rows < length)


@triton.jit
def _blocks_before(tk_ptr, time, high, N: tl.constexpr):
    """How many of the first `high` key blocks lie before a time as a whole."""
    before = 0
    for start in range(0, high, SEARCH):
        n = start + tl.arange(0, SEARCH)
        newest = tl.load(tk_ptr + (n + 1) * N - 1, mask=n < high, other=LATER)
        before += tl.sum((newest < time).to(tl.int32), 0)
    return before


@triton.jit
def _provably_needed_from(total, tq, real, time_offset, log_window, EXPONENT: tl.constexpr):
    """The time before which no source can matter to any row of a query block.

    Whatever the coordinates are, what is older than `n >= time_offset` tokens weighs together at
    most `max_mass * time_scale^(-2p) * (n - time_offset)^(1 - 2p) / (2p - 1)`, the integral of the
    field of time alone, where p is the exponent and n is rounded up to a whole token. The window
    of a row is the n at which that is `tolerance * total`; a total of 0 proves nothing.

    Args:
        total: sums of fields so far, [M]; further fields only add to them.
        log_window: log2 of `n - time_offset` where the total is 1.
    """
    log_row = log_window - tl.log2(total) * (1.0 / (2 * EXPONENT - 1))
    window = time_offset + tl.exp2(log_row) * 1.0001  # what fp32 loses here is less
    needed = tl.where(total > 0, tl.floor(tq - window), float("-inf"))
    return tl.min(tl.where(real, needed, float("inf")), 0)


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
    """Add one key block to the sums of a query block: sums [M, D], total [M]."""
    n = block * N + tl.arange(0, N)
    k, v, k_norm, mass, tk = _load_keys(
        *(k_ptr, k_norm_ptr, v_ptr, mass_ptr, tk_ptr, n, stride_kt, stride_kc),
        *(stride_vt, stride_vd, num_keys, MASKED, COORDS, WIDTH, C, D),
    )
    base = (q_norm[:, None] + k_norm[None, :]) - 2.0 * _dot(q, tl.trans(k))  # [M, N]
    lag = q_time[:, None] - time_scale * (tk - t_first)[None, :]
    u, _, field = _softened_power(base, lag, edge, EXPONENT, BITS, CUTOFF)
    if MASKED:
        field = tl.where(tq[:, None] >= tk[None, :], field, 0.0)
    field = field * mass[None, :]
    if CUTOFF == "soft":
        rho = tl.maximum((edge - u) * inverse_radius2, 0.0)
        field = field * rho * rho
    total += tl.sum(field, 1)
    sums = _add_weighted(sums, field, v)
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
    reach_ptr,
    max_mass_ptr,
    visible_ptr,
    out_ptr,
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
    TINY: tl.constexpr,
    BOUNDED: tl.constexpr,
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
    """One query block of one head against its key blocks, newest first.

    Args:
        visible_ptr: for each query, how many keys are not later, (Tq,).
        reach_ptr: how many tokens back a head can feel, (H,) (where there is a cutoff).
        max_mass_ptr: the largest mass, one number (where BOUNDED: by a tolerance).
        log_share: log2 of `tolerance * (2 * EXPONENT - 1)`.
        out_ptr, inverse_total_ptr, first_kept_ptr: written; (B, H, Tq, WIDTH), (B, H, Tq) and
            (B, H, query blocks), the key at which summing ended.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(num_queries, M)
    block = blocks - 1 - pid // batch_heads  # the longest rows first
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
    q = _load_rows(q_ptr, rows, stride_qt, stride_qc, num_queries, True, COORDS, C)  # [M, C]
    q_norm = 1.0 + tl.load(q_norm_ptr + query, mask=real, other=0.0)
    tq = tl.load(tq_ptr + rows, mask=real, other=0.0)
    t_first = tl.load(tq_ptr + block * M)
    q_time = time_scale * (tq - t_first - time_offset)
    k_ptr += b * stride_kb + h * stride_kh
    k_norm_ptr += bh * num_keys
    v_ptr += b * stride_vb + h * stride_vh
    mass_ptr += b * num_keys
    newest = tl.load(visible_ptr + tl.minimum(block * M + M, num_queries) - 1)
    high = tl.load(visible_ptr + block * M) // N  # blocks below it are seen by every row

    sums = tl.zeros([M, D], tl.float32)
    total = tl.zeros([M], tl.float32)
    for n in range(high, tl.cdiv(newest, N)):
        sums, total = _attend(
            *(sums, total, n, q, q_norm, q_time, tq, t_first),
            *(k_ptr, k_norm_ptr, v_ptr, mass_ptr, tk_ptr),
            *(stride_kt, stride_kc, stride_vt, stride_vd, num_keys),
            *(time_scale, edge, inverse_radius2),
            *(True, EXPONENT, BITS, CUTOFF, COORDS, WIDTH, C, D, N),
        )
    low = 0
    if CUTOFF != "none":
        low = _blocks_before(tk_ptr, t_first - tl.load(reach_ptr + h), high, N)
    if BOUNDED:
        log_window = tl.log2(tl.load(max_mass_ptr)) - log_share
        log_window = (log_window - 2 * EXPONENT * tl.log2(time_scale)) / (2 * EXPONENT - 1)
        needed = _provably_needed_from(total, tq, real, time_offset, log_window, EXPONENT)
        end = tl.maximum(low, _blocks_before(tk_ptr, needed, high, N))
        chunk = 1
        # a few searches, each after four times as many blocks; the loops between them are pipelined
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
            needed = _provably_needed_from(total, tq, real, time_offset, log_window, EXPONENT)
            end = tl.maximum(low, _blocks_before(tk_ptr, needed, high, N))
    else:
        for i in range(low, high):
            sums, total = _attend(
                *(sums, total, high - 1 - (i - low), q, q_norm, q_time, tq, t_first),
                *(k_ptr, k_norm_ptr, v_ptr, mass_ptr, tk_ptr),
                *(stride_kt, stride_kc, stride_vt, stride_vd, num_keys),
                *(time_scale, edge, inverse_radius2),
                *(False, EXPONENT, BITS, CUTOFF, COORDS, WIDTH, C, D, N),
            )
        high = low

    inverse_total = 1.0 / (total + TINY)
    out = sums * inverse_total[:, None]
    place = b * stride_ob + h * stride_oh + rows.to(tl.int64)[:, None] * stride_ot + d[None, :]
    inside = real[:, None] & (d < WIDTH)[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(inverse_total_ptr + query, inverse_total, mask=real)
    tl.store(first_kept_ptr + bh * blocks + block, high * N)


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
    """Add one key block to what the gradients of a query block's rows and of the scalars need.

    The slope is `-dL/dr2 * total / EXPONENT`: its row's 1 / total and the -EXPONENT come last.
    """
    n = block * N + tl.arange(0, N)
    k, v, k_norm, mass, tk = _load_keys(
        *(k_ptr, k_norm_ptr, v_ptr, mass_ptr, tk_ptr, n, stride_kt, stride_kc),
        *(stride_vt, stride_vd, num_keys, MASKED, COORDS, WIDTH, C, D),
    )
    base = (q_norm[:, None] + k_norm[None, :]) - 2.0 * _dot(q, tl.trans(k))  # [M, N]
    lag = q_time[:, None] - time_scale * (tk - t_first)[None, :]
    u, inverse, power = _softened_power(base, lag, edge, EXPONENT, BITS, CUTOFF)
    if MASKED:
        power = tl.where(tq[:, None] >= tk[None, :], power, 0.0)
    gain = _dot(g, tl.trans(v)) - delta[:, None]  # what a pull brings above the mean pull
    slope = power * mass[None, :] * gain
    if CUTOFF == "soft":
        rho = tl.maximum((edge - u) * inverse_radius2, 0.0)
        at_edge = slope * rho  # one factor of rho: the cutoff is rho^2
        radius_sum += tl.sum(at_edge * (u - 1.0), 1)
        slope = at_edge * (rho * inverse + (2.0 / EXPONENT) * inverse_radius2)
    else:
        slope = slope * inverse
    slope_lag = slope * lag
    slope_sum = _add_row_sums(slope_sum, slope, k.dtype)
    lag_sum += tl.sum(slope_lag, 1)
    lag2_sum += tl.sum(slope_lag * lag, 1)
    dq_sum = _add_weighted(dq_sum, slope, k)
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
    visible_ptr,
    out_ptr,
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
    FORWARD_M: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Gradients of one query block; M divides FORWARD_M.

    Args:
        delta_ptr: written for the other kernel, gradient times output of each row, (B, H, Tq).
        dq_ptr: written, (B, H, Tq, COORDS).
        partial_ptr: written, what this block adds to the gradients of time_scale, time_offset and
            radius, (3, query blocks, B, H).
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
    q = _load_rows(q_ptr, rows, stride_qt, stride_qc, num_queries, True, COORDS, C)  # [M, C]
    q_norm = 1.0 + tl.load(q_norm_ptr + query, mask=real, other=0.0)
    tq = tl.load(tq_ptr + rows, mask=real, other=0.0)
    t_first = tl.load(tq_ptr + block * M // FORWARD_M * FORWARD_M)
    q_time = time_scale * (tq - t_first - time_offset)
    inverse_total = tl.load(inverse_total_ptr + query, mask=real, other=0.0)

    grad_ptr += b * stride_gb + h * stride_gh
    g = _load_rows(grad_ptr, rows, stride_gt, stride_gd, num_queries, True, WIDTH, D)  # [M, D]
    out_ptr += b * stride_ob + h * stride_oh
    out = _load_rows(out_ptr, rows, stride_ot, 1, num_queries, True, WIDTH, D)
    delta = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + query, delta, mask=real)

    k_ptr += b * stride_kb + h * stride_kh
    k_norm_ptr += bh * num_keys
    v_ptr += b * stride_vb + h * stride_vh
    mass_ptr += b * num_keys
    newest = tl.load(visible_ptr + tl.minimum(block * M + M, num_queries) - 1)
    high = tl.load(visible_ptr + block * M) // N
    forward_blocks = tl.cdiv(num_queries, FORWARD_M)
    low = tl.load(first_kept_ptr + bh * forward_blocks + block * M // FORWARD_M) // N

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

    factor = -EXPONENT * inverse_total
    dq = q.to(tl.float32) * (tl.sum(slope_sum, 1) / SUM)[:, None] - dq
    dq = dq * (2.0 * factor)[:, None]
    wide = rows.to(tl.int64)[:, None]
    place = b * stride_dqb + h * stride_dqh + wide * stride_dqt + c[None, :] * stride_dqc
    dq_mask = real[:, None] & (c < COORDS)[None, :]
    tl.store(dq_ptr + place, dq.to(dq_ptr.dtype.element_ty), mask=dq_mask)
    # lag carries one factor of time_scale
    per_scale = 2.0 / tl.maximum(time_scale, 1e-30)
    partial = block * batch_heads + bh
    step = blocks.to(tl.int64) * batch_heads
    tl.store(partial_ptr + partial, per_scale * tl.sum(factor * lag2_sum, 0))
    tl.store(partial_ptr + step + partial, -2.0 * time_scale * tl.sum(factor * lag_sum, 0))
    if CUTOFF == "soft":
        d_radius = 4.0 * inverse_radius2 / radius * tl.sum(inverse_total * radius_sum, 0)
        tl.store(partial_ptr + 2 * step + partial, d_radius)


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
    FORWARD_M: tl.constexpr,
    M: tl.constexpr,
):
    """Add one query block to what the gradients of a key block need; tiles lie keys by queries."""
    m = block * M + tl.arange(0, M)
    real = m < num_queries
    q = _load_rows(q_ptr, m, stride_qt, stride_qc, num_queries, True, COORDS, C)  # [M, C]
    g = _load_rows(grad_ptr, m, stride_gt, stride_gd, num_queries, True, WIDTH, D)  # [M, D]
    q_norm = 1.0 + tl.load(q_norm_ptr + m, mask=real, other=0.0)
    tq = tl.load(tq_ptr + m, mask=real, other=0.0)
    t_first = tl.load(tq_ptr + block * M // FORWARD_M * FORWARD_M)
    q_time = time_scale * (tq - t_first - time_offset)
    delta = tl.load(delta_ptr + m, mask=real, other=0.0)
    inverse_total = tl.load(inverse_total_ptr + m, mask=real, other=0.0)
    # the blocks that kept this key do not follow each other without gaps
    kept = tl.load(first_kept_ptr + block * M // FORWARD_M) <= first_key
    inverse_total = tl.where(kept, inverse_total, 0.0)

    base = (q_norm[None, :] + k_norm[:, None]) - 2.0 * _dot(k, tl.trans(q))  # [N, M]
    lag = q_time[None, :] - time_scale * (tk - t_first)[:, None]
    u, inverse, power = _softened_power(base, lag, edge, EXPONENT, BITS, CUTOFF)
    if MASKED:
        power = tl.where(tq[None, :] >= tk[:, None], power, 0.0)
    weight = power * inverse_total[None, :]
    gain = _dot(v, tl.trans(g)) - delta[None, :]
    if CUTOFF == "soft":
        rho = tl.maximum((edge - u) * inverse_radius2, 0.0)
        weight = weight * rho
        at_edge = weight * gain
        weight = weight * rho
        mass_sum += tl.sum(at_edge * rho, 1)
        slope = at_edge * (rho * inverse + (2.0 / EXPONENT) * inverse_radius2)
    else:
        brought = weight * gain
        mass_sum += tl.sum(brought, 1)
        slope = brought * inverse
    dv_sum = _add_weighted(dv_sum, weight, g)
    slope_sum = _add_row_sums(slope_sum, slope, q.dtype)
    dk_sum = _add_weighted(dk_sum, slope, q)
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
    FORWARD_M: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Gradients of one key block; M divides FORWARD_M and N the forward pass's key block.

    Args:
        first_seen_ptr: for each key, the first query that is not earlier, (Tk,).
        dk_ptr, dv_ptr, dmass_ptr: written; (B, H, Tk, COORDS), (B, H, Tk, WIDTH), (B, H, Tk).
    """
    pid = tl.program_id(0)
    block = pid // batch_heads  # the oldest keys have the most queries
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
    k, v, k_norm, mass, tk = _load_keys(
        *(k_ptr, k_norm_ptr + bh * num_keys, v_ptr, mass_ptr + b * num_keys, tk_ptr, rows),
        *(stride_kt, stride_kc, stride_vt, stride_vd, num_keys, True, COORDS, WIDTH, C, D),
    )

    q_ptr += b * stride_qb + h * stride_qh
    q_norm_ptr += bh * num_queries
    grad_ptr += b * stride_gb + h * stride_gh
    delta_ptr += bh * num_queries
    inverse_total_ptr += bh * num_queries
    forward_blocks = tl.cdiv(num_queries, FORWARD_M)
    first_kept_ptr += bh * forward_blocks
    low = tl.load(first_seen_ptr + first_key) // M
    all_seen = tl.load(first_seen_ptr + tl.minimum(first_key + N, num_keys) - 1)
    middle = tl.minimum(tl.cdiv(all_seen, M), tl.cdiv(num_queries, M))
    end = 0  # forward blocks from here on have not kept these keys
    for start in range(low * M // FORWARD_M, forward_blocks, SEARCH):
        m = start + tl.arange(0, SEARCH)
        kept = tl.load(first_kept_ptr + m, mask=m < forward_blocks, other=2147483647)
        end = tl.maximum(end, tl.max(tl.where(kept <= first_key, m + 1, 0), 0))
    end = tl.minimum(end * (FORWARD_M // M), tl.cdiv(num_queries, M))

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
            *(True, EXPONENT, BITS, CUTOFF, COORDS, WIDTH, C, D, FORWARD_M, M),
        )
    for m in range(middle, end):
        dk, dv, slope_sum, mass_sum = _key_gradient(
            *(dk, dv, slope_sum, mass_sum, m, k, k_norm, tk, v, first_key),
            *(q_ptr, q_norm_ptr, tq_ptr, grad_ptr, delta_ptr, inverse_total_ptr, first_kept_ptr),
            *(stride_qt, stride_qc, stride_gt, stride_gd, num_queries),
            *(time_scale, time_offset, edge, inverse_radius2),
            *(False, EXPONENT, BITS, CUTOFF, COORDS, WIDTH, C, D, FORWARD_M, M),
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

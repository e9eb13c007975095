"""Triton functions that the forward and the backward kernels share; `cuda.py` launches them.

Letters in shapes: M queries and N keys per tile, C padded coordinates, D padded width of a value.
Every kernel recomputes the field of a tile in the same way:

    u     = max(|q|^2 + |k|^2 - 2 q.k, 0) + 1 + lag^2       lag = time_scale * (t_i - t_j - offset)
    power = u ** -exponent                                  the field is mass_j * power

The 1 is added to the norm of the query beforehand, so that a pair costs an addition, a fused
multiply-add, a maximum, a subtraction, another fused multiply-add, one reciprocal and the
squarings. The time of a tile is counted from the first query of its forward block. Counted from 0
it would lose the digits of the nearest distances. Counted otherwise in the backward pass, the
weights of a row would not sum to 1 if a soft cutoff leaves little of them; for the same reason all
kernels add in the same order.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LATER = tl.constexpr(1e12)  # the time of a key past the end: later than every query
SUM = tl.constexpr(16)  # the narrowest matrix that a product takes
SEARCH = tl.constexpr(128)  # blocks compared at once to find the end of a loop


@triton.jit
def reciprocal(u):
    """1 / u in one instruction, for u >= 1."""
    if INTERPRETED:
        return 1.0 / u
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def dot(a, b):
    """a @ b of inputs, summed in fp32; fp32 inputs are not rounded to tf32."""
    if INTERPRETED:  # its products of bf16 are wrong
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def add_weighted(sums, weights, values):
    """sums + weights @ values; weights are fp32 and may be too small for fp16."""
    if INTERPRETED:
        if values.dtype == tl.bfloat16:  # rounds the weights as a GPU does
            weights = weights.to(tl.bfloat16).to(tl.float32)
        return tl.dot(weights, values.to(tl.float32), sums)
    elif values.dtype == tl.float16:
        return tl.dot(weights, values.to(tl.float32), sums, input_precision="tf32")
    else:
        return tl.dot(weights.to(values.dtype), values, sums, input_precision="ieee")


@triton.jit
def add_row_sums(sums, weights, dtype: tl.constexpr):
    """sums [M, SUM] + the row sums of weights [M, N], the same in each of the SUM columns.

    In 16 bits the sum is a product with ones, so that it sees the same rounded weights as another
    product does. The terms of `q * sum(slope) - slope @ k` nearly cancel if q and k are far from
    the origin; and the shares of a row, field / sum, add up to 1.
    """
    if dtype == tl.float32:
        return sums + tl.sum(weights, 1)[:, None]
    else:
        return add_weighted(sums, weights, tl.full([weights.shape[1], SUM], 1.0, dtype))


@triton.jit
def load_rows(
    ptr,
    rows,
    stride_t,
    stride_c,
    length,
    MASKED: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Rows of a (T, WIDTH) matrix, [rows, PADDED]; 0 in padding and, if MASKED, past the end."""
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
def load_keys(
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
    """Keys n of one head: k [N, C], v [N, D], and norms, masses and times, [N] each."""
    k = load_rows(k_ptr, n, stride_kt, stride_kc, num_keys, MASKED, COORDS, C)
    v = load_rows(v_ptr, n, stride_vt, stride_vd, num_keys, MASKED, WIDTH, D)
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
def softened_power(base, lag, edge, EXPONENT: tl.constexpr, BITS: tl.constexpr, CUTOFF):
    """u, 1 / u and u ** -EXPONENT, each shaped as a tile; the power is 0 beyond a hard cutoff.

    Args:
        base: 1 plus the spatial part of r2; rounding may have brought it below 1.
        lag: time_scale * (t_i - t_j - time_offset).
        edge: 1 + radius^2.
        BITS: how many binary digits EXPONENT has.
    """
    # never nearer than the time alone allows: the proof of what is left out needs that
    u = tl.maximum(base, 1.0) + lag * lag
    inverse = reciprocal(u)
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
    x = load_rows(x_ptr, rows, stride_t, stride_c, length, True, WIDTH, C).to(tl.float32)
    tl.store(norm_ptr + bh * length + rows, tl.sum(x * x, 1), mask=rows < length)


@triton.jit
def blocks_before(t_ptr, time, blocks, SIZE: tl.constexpr):
    """How many of a number of blocks have a time before the given one: t_ptr, one per SIZE."""
    before = 0
    for start in range(0, blocks, SEARCH):
        n = start + tl.arange(0, SEARCH)
        t = tl.load(t_ptr + n * SIZE, mask=n < blocks, other=float("inf"))
        before += tl.sum((t < time).to(tl.int32), 0)
    return before


@triton.jit
def provably_needed_from(total, tq, real, time_offset, log_window, EXPONENT: tl.constexpr):
    """The time before which no token can matter to any row of a query block.

    `law.proven_window` has the proof. A total of 0 proves nothing.

    Args:
        total: sums of fields so far, [M]; fields that follow only add to them.
        log_window: log2 of `window - time_offset` for a total of 1.
    """
    log_row = log_window - tl.log2(total) * (1.0 / (2 * EXPONENT - 1))
    window = time_offset + tl.exp2(log_row) * 1.0001  # [M]; fp32 loses less than that here
    needed = tl.where(total > 0, tl.floor(tq - window), float("-inf"))
    return tl.min(tl.where(real, needed, float("inf")), 0)

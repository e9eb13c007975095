"""Triton functions that the kernels share, and the kernel that packs their inputs.

Letters in shapes: M queries and N keys per tile, C coordinates, D padded width of a value, K
columns of a packed point. Every kernel recomputes the field of a tile in the same way:

    base = packed query . packed key                1 + |q - k|^2
    lag  = time_scale * (t_i - t_j - time_offset)
    u    = max(base, 1) + lag^2                     the field is mass_j * u ** -exponent

The packed points hold the norms, `(-2 q, |q|^2 + 1, 1) . (k, 1, |k|^2) = 1 + |q - k|^2`, and the
packed values the mass, so that a pair costs the matrix products, two fused multiply-adds, a
maximum, one reciprocal and the squarings. What 16 bits would round is packed as a sum of three.

If a soft cutoff leaves little of a row's fields, the weights of the row would not sum to 1 in a
kernel that rounds `lag` differently from the others. So times count from the first query and the
first key of a tile, tiles are the same in all kernels, and `tl.fma` says what is rounded.
"""

import triton
import triton.language as tl

from gravity import law

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
TINY = tl.constexpr(law.TINY)
LATER = tl.constexpr(1e12)  # the age of a key past the end: later than every query
PARTS = tl.constexpr(16)  # columns of a mass in parts; six are used
LAW = tl.constexpr(8)  # columns of a head's numbers; five are used


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
def add_product(sums, a, b):
    """sums + a @ b, summed in fp32; a is rounded to b's type, and fp32 is not cut to tf32."""
    if INTERPRETED:  # its products of bf16 are wrong
        return tl.dot(a.to(b.dtype).to(tl.float32), b.to(tl.float32), sums)
    else:
        return tl.dot(a.to(b.dtype), b, sums, input_precision="ieee")


@triton.jit
def product(a, b):
    """a @ b, as `add_product`."""
    return add_product(tl.zeros([a.shape[0], b.shape[1]], tl.float32), a, b)


@triton.jit
def load_packed(ptr, rows, COLUMNS: tl.constexpr):
    """Rows of a packed matrix, [rows, COLUMNS]; it has rows for all tiles."""
    return tl.load(ptr + rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def column(matrix, place: tl.constexpr):
    """One column of a matrix, [rows]."""
    c = tl.arange(0, matrix.shape[1])[None, :]
    return tl.sum(tl.where(c == place, matrix, 0.0), 1)


@triton.jit
def sum_of_parts(sums):
    """What the product with masses, `mass_columns`, sums up to, [rows]."""
    return column(sums, 0) + column(sums, 3) + column(sums, 5)


@triton.jit
def head_law(law, h, log_share, EXPONENT: tl.constexpr):
    """time_scale, time_offset, radius, background and window of head h.

    The window is that of `law.windows`, in fp32.

    Args:
        law: pointers to time_scale, time_offset, radius, background, (H,) each, and to the largest
            mass; radius and background may be None.
        log_share: log2 of `tolerance * (2 * EXPONENT - 1)`, -inf for a tolerance of 0.
    """
    time_scale_ptr, time_offset_ptr, radius_ptr, background_ptr, max_mass_ptr = law
    time_scale = tl.load(time_scale_ptr + h).to(tl.float32)
    time_offset = tl.load(time_offset_ptr + h).to(tl.float32)
    radius, background, window = 1.0, TINY, float("inf")
    if radius_ptr is not None:
        radius = tl.load(radius_ptr + h).to(tl.float32)
        window = time_offset + radius / time_scale + 1.0
    if background_ptr is not None:
        background = tl.load(background_ptr + h).to(tl.float32)
        log_window = tl.log2(tl.load(max_mass_ptr).to(tl.float32)) - log_share
        log_window -= tl.log2(background) + 2 * EXPONENT * tl.log2(time_scale)
        # 1.0001 is more than fp32 loses here
        proven = time_offset + 1.0001 * tl.exp2(log_window / (2 * EXPONENT - 1))
        window = tl.where(proven < window, proven, window)  # NaN proves nothing
    return time_scale, time_offset, radius, background, tl.ceil(window)


@triton.jit
def load_law(ptr):
    """What the packed law says of one head.

    Returns:
        `(time_scale, time_offset, radius, background, window, edge, inverse_radius2)`, the window
        in whole tokens, `edge = 1 + radius^2`.
    """
    radius = tl.load(ptr + 2)
    window = tl.minimum(tl.load(ptr + 4), 1e9).to(tl.int64)
    edge, inverse_radius2 = 1.0 + radius * radius, 1.0 / (radius * radius)
    time_scale, time_offset, background = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 3)
    return time_scale, time_offset, radius, background, window, edge, inverse_radius2


@triton.jit
def lags(time_scale, distance, q_time, k_age):
    """The lags of a tile, for q_time and k_age shaped to broadcast over it.

    Args:
        distance: tokens from the tile's first key to its first query.
        q_time: time_scale * (tokens since the first query - time_offset).
        k_age: tokens since the first key.
    """
    return tl.fma(-time_scale, k_age, tl.fma(time_scale, distance, q_time))


@triton.jit
def fields(base, lag, seen, law, MASKED: tl.constexpr, EXPONENT: tl.constexpr, BITS, CUTOFF):
    """What the pairs of a tile feel of a unit mass.

    Args:
        base: 1 plus the spatial part of r2; rounding may have brought it below 1.
        seen: whether the key is not later than the query; read if MASKED.
        law: as `load_law` returns it.
        BITS: how many binary digits EXPONENT has.

    Returns:
        The field; its fall with r2, `-dfield / dr2 / EXPONENT`; and with a soft cutoff, whose
        factor is rho^2, `r2 * field / rho`, of which the gradient of the radius is made.
    """
    edge, inverse_radius2 = law[5], law[6]
    # never nearer than the time alone allows: the proof of what is left out needs that
    u = tl.fma(lag, lag, tl.maximum(base, 1.0))
    inverse = reciprocal(u)
    if MASKED:
        inverse = tl.where(seen, inverse, 0.0)
    field = inverse
    for i in tl.static_range(BITS - 1):
        field = field * field
        if (EXPONENT >> (BITS - 2 - i)) & 1:
            field = field * inverse
    if CUTOFF == "hard":
        field = tl.where(u <= edge, field, 0.0)
    fall, at_edge = field * inverse, field
    if CUTOFF == "soft":
        rho = tl.maximum((edge - u) * inverse_radius2, 0.0)
        fall = field * rho * (rho * inverse + (2.0 / EXPONENT) * inverse_radius2)
        at_edge = field * rho * (u - 1.0)
        field = field * rho * rho
    return field, fall, at_edge


@triton.jit
def tile(
    n,
    q,
    age,
    first,
    law,
    keys_packed,
    tk_ptr,
    GENERAL: tl.constexpr,
    EXPONENT: tl.constexpr,
    BITS: tl.constexpr,
    CUTOFF: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
):
    """Key block n, and what a query block feels of it.

    Args:
        age: times of the queries, counted from the first of them, [M].
        first: the times of that query and of the first of all keys.
        keys_packed: pointers to one head's packed keys, values, masses and ages.
        GENERAL: whether keys may be later than queries, or not consecutive.

    Returns:
        `fields`, [M, N] each; k [N, K], v [N, D] and masses [N, PARTS], all packed.
    """
    j = n * N + tl.arange(0, N)
    k = load_packed(keys_packed[0], j, K)
    v = load_packed(keys_packed[1], j, D)
    mass = load_packed(keys_packed[2], j, PARTS)
    start = first[1] + n * N
    k_age = tl.arange(0, N).to(tl.float32)
    if GENERAL:
        start = tl.load(tk_ptr + n * N)
        k_age = tl.load(keys_packed[3] + j)
    distance = (first[0] - start).to(tl.float32)
    seen = (age + distance)[:, None] >= k_age[None, :]
    q_time = law[0] * (age - law[1])
    lag = lags(law[0], distance, q_time[:, None], k_age[None, :])
    base = product(q, tl.trans(k))
    return fields(base, lag, seen, law, GENERAL, EXPONENT, BITS, CUTOFF), k, v, mass


@triton.jit
def key_blocks(tq_ptr, tk_ptr, block, queries, keys, window, M: tl.constexpr, N: tl.constexpr):
    """Which key blocks a query block reads: from `low` to `end`, those below `high` without a mask.

    Positions are whole numbers that increase, so the ends of the two tables bound every index, and
    exactly so if nothing is missing in between. Only then is any block read without a mask.
    """
    first_query = tl.load(tq_ptr + block * M)
    last_query = tl.load(tq_ptr + tl.minimum(block * M + M, queries) - 1)
    first, last = tl.load(tk_ptr), tl.load(tk_ptr + keys - 1)
    end = tl.cdiv(tl.minimum(tl.maximum(last_query - first + 1, 0), keys), N).to(tl.int32)
    before = keys - last + first_query  # at least so many keys are not later than any query
    low = tl.minimum(tl.maximum(before - 1 - window, 0) // N, end).to(tl.int32)
    high = tl.minimum(tl.maximum(before // N, low), end).to(tl.int32)
    high = tl.where(last - first == keys - 1, high, low)
    return low, high, end, first_query, first


@triton.jit
def load_rows(x, b, h, rows, length, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows of one head, [rows, PADDED] in fp32; 0 in padding.

    Args:
        x: a pointer to (B, H, T, WIDTH), and its strides.
    """
    ptr, strides = x
    c = tl.arange(0, PADDED)[None, :]
    place = ptr + b * strides[0] + h * strides[1] + rows.to(tl.int64)[:, None] * strides[2]
    inside = (rows < length)[:, None] & (c < WIDTH)
    return tl.load(place + c * strides[3], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def by_token(ptr, b, h, heads, rows, length, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Places of [rows, PADDED] in a contiguous (B, T, H, WIDTH), and which of them exist."""
    c = tl.arange(0, PADDED)[None, :]
    place = ptr + ((b * length + rows.to(tl.int64)) * heads + h)[:, None] * WIDTH + c
    return place, (rows < length)[:, None] & (c < WIDTH)


@triton.jit
def in_parts(x, dtype: tl.constexpr):
    """x, [rows] in fp32, as a sum of three numbers that dtype can hold."""
    first = x.to(dtype).to(tl.float32)
    second = (x - first).to(dtype).to(tl.float32)
    return first, second, x - first - second


@triton.jit
def in_columns(parts, c, first: tl.constexpr):
    """Three numbers of each row in the columns from `first` on, else 0, [rows, columns]."""
    a, b, rest = parts
    found = tl.where(c == first, a[:, None], 0.0)
    found = tl.where(c == first + 1, b[:, None], found)
    return tl.where(c == first + 2, rest[:, None], found)


@triton.jit
def factor_columns(x, dtype: tl.constexpr):
    """x in the columns that a product with `mass_columns` multiplies by the mass, [rows, PARTS]."""
    a, b, rest = in_parts(x, dtype)
    c = tl.arange(0, PARTS)[None, :]
    return in_columns((a, b, rest), c, 0) + in_columns((a, b, a), c, 3)


@triton.jit
def mass_columns(x, dtype: tl.constexpr):
    """A mass in parts, each beside those of a factor that do not vanish, [rows, PARTS]."""
    a, b, rest = in_parts(x, dtype)
    c = tl.arange(0, PARTS)[None, :]
    return in_columns((a, a, a), c, 0) + in_columns((b, b, rest), c, 3)


@triton.jit
def pack_kernel(
    q,
    k,
    v,
    mass_ptr,
    centre_ptr,
    law,
    tq_ptr,
    tk_ptr,
    packed,
    heads,
    queries,
    keys,
    query_rows,
    key_rows,
    log_share,
    EXPONENT: tl.constexpr,
    COORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Points, values, masses, times and the law as the other kernels read them; see `cuda.Saved`.

    Args:
        q, k, v: pointers with strides, see `load_rows`.
        centre_ptr: what is subtracted from points, (B, H, COORDS) fp32, or None.
        law: see `head_law`.
        packed: pointers to what is written, the first seven of `cuda.Saved`.
        query_rows, key_rows: how many rows packed matrices have.
    """
    q_out, k_out, v_out, mass_out, q_age, k_age, law_out = packed
    dtype: tl.constexpr = q_out.dtype.element_ty
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // heads, bh % heads
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c, d = tl.arange(0, K)[None, :], tl.arange(0, D)[None, :]
    points_q = load_rows(q, b, h, rows, queries, COORDS, K)  # [BLOCK, K]
    points_k = load_rows(k, b, h, rows, keys, COORDS, K)
    if centre_ptr is not None:
        centre = tl.load(centre_ptr + bh * COORDS + c, mask=c < COORDS, other=0.0)
        points_q, points_k = points_q - centre, points_k - centre
    one = tl.full([BLOCK], 1.0, tl.float32)
    norm_q = in_parts(1.0 + tl.sum(points_q * points_q, 1), dtype)
    norm_k = in_parts(tl.sum(points_k * points_k, 1), dtype)
    ones = (one, one, one)
    points_q = in_columns(norm_q, c, COORDS) + in_columns(ones, c, COORDS + 3) - 2.0 * points_q
    points_k += in_columns(ones, c, COORDS) + in_columns(norm_k, c, COORDS + 3)
    place = rows.to(tl.int64)[:, None]
    in_q, in_k = (rows < query_rows)[:, None], (rows < key_rows)[:, None]
    tl.store(q_out + (bh * query_rows + place) * K + c, points_q.to(dtype), mask=in_q)
    tl.store(k_out + (bh * key_rows + place) * K + c, points_k.to(dtype), mask=in_k)
    # a row of padding has no mass, and so no part in anything
    mass = tl.load(mass_ptr + b * keys + rows, mask=rows < keys, other=0.0).to(tl.float32)
    values = load_rows(v, b, h, rows, keys, WIDTH, D) * mass[:, None]
    tl.store(v_out + (bh * key_rows + place) * D + d, values.to(dtype), mask=in_k)
    if h == 0:
        parts = tl.arange(0, PARTS)[None, :]
        masses = mass_columns(mass, dtype).to(dtype)
        tl.store(mass_out + (b * key_rows + place) * PARTS + parts, masses, mask=in_k)
    if bh == 0:
        age = tl.load(tq_ptr + rows, mask=rows < queries, other=0)
        age -= tl.load(tq_ptr + rows // M * M, mask=rows < queries, other=0)
        tl.store(q_age + rows, age.to(tl.float32), mask=rows < query_rows)
        age = tl.load(tk_ptr + rows, mask=rows < keys, other=0)
        age -= tl.load(tk_ptr + rows // N * N, mask=rows < keys, other=0)
        age = tl.where(rows < keys, age.to(tl.float32), LATER)
        tl.store(k_age + rows, age, mask=rows < key_rows)
    if (b == 0) & (tl.program_id(1) == 0):
        numbers = head_law(law, h, log_share, EXPONENT)
        for i in tl.static_range(5):
            tl.store(law_out + h * LAW + i, numbers[i])

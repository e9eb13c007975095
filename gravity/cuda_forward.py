"""The Triton kernels of the forward pass: for many queries, and for a few while decoding.

Letters in shapes as in `cuda_tiles.py`.
"""

import triton
import triton.language as tl

from gravity.cuda_tiles import (
    LAW,
    PARTS,
    TINY,
    add_product,
    by_token,
    fields,
    head_law,
    key_blocks,
    load_law,
    load_packed,
    load_rows,
    sum_of_parts,
    tile,
)


@triton.jit
def forward_kernel(
    packed,
    tq_ptr,
    tk_ptr,
    out_ptr,
    exact_ptr,
    inverse_total_ptr,
    heads,
    queries,
    keys,
    query_rows,
    key_rows,
    EXPONENT: tl.constexpr,
    BITS: tl.constexpr,
    CUTOFF: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Outputs of one query block of one head.

    Args:
        packed: pointers to what `pack_kernel` wrote.
        tq_ptr, tk_ptr: positions of queries and keys.
        out_ptr: written, (B, Tq, H, WIDTH).
        exact_ptr: written, the same in fp32; None if `out_ptr` is in fp32 already.
        inverse_total_ptr: written, 1 / (background + sum of fields), (B, H, Tq).
    """
    q_ptr, k_ptr, v_ptr, mass_ptr, q_age, k_age, law_ptr = packed
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
    keys_packed = (
        k_ptr + bh * key_rows * K,
        v_ptr + bh * key_rows * D,
        mass_ptr + b * key_rows * PARTS,
        k_age,
    )
    sums = tl.zeros([M, D], tl.float32)
    total = tl.zeros([M, PARTS], tl.float32)
    for n in range(low, high):
        pairs, _, v, mass = tile(
            *(n, q, age, first, law, keys_packed, tk_ptr),
            *(False, EXPONENT, BITS, CUTOFF, K, D, N),
        )
        total = add_product(total, pairs[0], mass)
        sums = add_product(sums, pairs[0], v)
    for n in tl.range(high, end, num_stages=1):  # few blocks: a pipeline would only take registers
        pairs, _, v, mass = tile(
            *(n, q, age, first, law, keys_packed, tk_ptr),
            *(True, EXPONENT, BITS, CUTOFF, K, D, N),
        )
        total = add_product(total, pairs[0], mass)
        sums = add_product(sums, pairs[0], v)
    inverse_total = 1.0 / (sum_of_parts(total) + law[3])  # [M]
    out = sums * inverse_total[:, None]  # [M, D]
    place, inside = by_token(out_ptr, b, h, heads, rows, queries, WIDTH, D)
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=inside)
    if exact_ptr is not None:
        place, _ = by_token(exact_ptr, b, h, heads, rows, queries, WIDTH, D)
        tl.store(place, out, mask=inside)
    tl.store(inverse_total_ptr + bh * queries + rows, inverse_total, mask=rows < queries)


@triton.jit
def decode_kernel(
    q,
    k,
    v,
    mass_ptr,
    law,
    tq_ptr,
    tk_ptr,
    sums_ptr,
    total_ptr,
    heads,
    queries,
    keys,
    log_share,
    EXPONENT: tl.constexpr,
    BITS: tl.constexpr,
    CUTOFF: tl.constexpr,
    COORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
):
    """What one query feels of its share of the keys; nothing is packed, all is computed in fp32.

    Args:
        q, k, v: pointers with strides, see `load_rows`.
        law, log_share: see `head_law`.
        sums_ptr: written, sums of fields times values, (B * H * Tq, shares, D).
        total_ptr: written, sums of fields, (B * H * Tq, shares).
    """
    row, shares = tl.program_id(0).to(tl.int64), tl.num_programs(1)
    bh, i = row // queries, row % queries
    b, h = bh // heads, bh % heads
    time_scale, time_offset, radius, _, window = head_law(law, h, log_share, EXPONENT)
    window = tl.minimum(window, 1e9).to(tl.int64)
    limits = (0.0, 0.0, 0.0, 0.0, 0, 1.0 + radius * radius, 1.0 / (radius * radius))
    t = tl.load(tq_ptr + i)
    # positions increase by at least 1, so that the first and the last one bound every index
    first, last = tl.load(tk_ptr), tl.load(tk_ptr + keys - 1)
    low = tl.maximum(keys - 1 - (last - t) - window, 0)
    end = tl.minimum(t - first + 1, keys)
    share = tl.cdiv(tl.maximum(end - low, 0), shares * N) * N
    low += tl.program_id(1) * share
    end = tl.minimum(low + share, end)
    query = load_rows(q, b, h, i + tl.arange(0, 1), queries, COORDS, C)  # [1, C]
    total = tl.zeros([N], tl.float32)
    sums = tl.zeros([N, D], tl.float32)
    for start in range(low, end, N):
        j = start + tl.arange(0, N)
        away = load_rows(k, b, h, j, end, COORDS, C) - query  # [N, C]
        times = tl.load(tk_ptr + j, mask=j < end, other=0)
        lag = time_scale * ((t - times).to(tl.float32) - time_offset)
        seen = (j < end) & (times <= t)
        base = 1.0 + tl.sum(away * away, 1)
        field = fields(base, lag, seen, limits, True, EXPONENT, BITS, CUTOFF)[0]  # [N]
        field *= tl.load(mass_ptr + b * keys + j, mask=j < end, other=0.0).to(tl.float32)
        total += field
        sums += field[:, None] * load_rows(v, b, h, j, end, WIDTH, D)
    place = row * shares + tl.program_id(1)
    tl.store(total_ptr + place, tl.sum(total, 0))
    tl.store(sums_ptr + place * D + tl.arange(0, D), tl.sum(sums, 0))


@triton.jit
def combine_kernel(
    sums_ptr,
    total_ptr,
    background_ptr,
    out_ptr,
    heads,
    queries,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    SHARES: tl.constexpr,
):
    """The output of one query, (B, Tq, H, WIDTH), from its shares of the keys."""
    row = tl.program_id(0).to(tl.int64)
    bh, i = row // queries, row % queries
    places = row * SHARES + tl.arange(0, SHARES)
    sums = load_packed(sums_ptr, places, D)  # [SHARES, D]
    total = tl.sum(tl.load(total_ptr + places), 0)
    background = TINY
    if background_ptr is not None:
        background = tl.load(background_ptr + bh % heads).to(tl.float32)
    out = tl.sum(sums, 0)[None, :] / (total + background)
    rows = i + tl.arange(0, 1)
    place, inside = by_token(out_ptr, bh // heads, bh % heads, heads, rows, queries, WIDTH, D)
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=inside)

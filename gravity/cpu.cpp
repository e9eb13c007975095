// Gravity attention on a CPU, forward and backward. cpu.py compiles and calls these kernels; law.py
// has the formula, blocked.py the same algorithm in plain PyTorch.
//
// One thread works on one (batch, head) at a time. A block of ROWS queries visits blocks of KEYS
// keys from the newest to the oldest and stops as soon as older keys provably cannot matter: the
// background or a radius says where before any field is known, else the sum of fields so far does.
// Blocks are small enough for the L1 and L2 caches. All sums are in fp32.
//
// Letters in shapes: B batch, H heads, T tokens (Tq queries, Tk keys), C coordinates per head, D
// width of a value. Names that end in `across` are transposed: one row per coordinate or channel, a
// column per key, so that a vector holds neighbouring keys.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, COLUMN_VECTORS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, COLUMN_VECTORS = 2;
#else
constexpr int LANES = 4, COLUMN_VECTORS = 4;
#endif
constexpr int ROWS = 48, KEYS = 192;
constexpr float TINY = 1e-30f;  // as in law.py

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose_vec __attribute__((vector_size(4 * LANES), aligned(4)));

inline vec load(const float *p) { return *(const loose_vec *)p; }
inline void store(float *p, vec v) { *(loose_vec *)p = v; }
inline vec zero() { return vec{}; }
// The first `count` lanes of v.
inline void store_first(float *p, vec v, int count) {
    if (count == LANES) return store(p, v);
    for (int n = 0; n < count; ++n) p[n] = v[n];
}
// max(a, low); a NaN in a stays NaN, so that a broken weight shows in the loss
inline vec at_least(vec a, vec low) { return a < low ? low : a; }

inline float sum(vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float x[LANES];
    store(x, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int n = 0; n < half; ++n) x[n] += x[n + half];
    return x[0];
#endif
}

// The first or the last half of two vectors, lane by lane in turn.
#if defined(__AVX512F__)
#define FIRST_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define LAST_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
#define FIRST_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define LAST_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define FIRST_HALVES 0, 4, 1, 5
#define LAST_HALVES 2, 6, 3, 7
#endif
#if defined(__clang__)
inline vec first_halves(vec a, vec b) { return __builtin_shufflevector(a, b, FIRST_HALVES); }
inline vec last_halves(vec a, vec b) { return __builtin_shufflevector(a, b, LAST_HALVES); }
#else
typedef int lanes __attribute__((vector_size(4 * LANES)));
inline vec first_halves(vec a, vec b) { return __builtin_shuffle(a, b, lanes{FIRST_HALVES}); }
inline vec last_halves(vec a, vec b) { return __builtin_shuffle(a, b, lanes{LAST_HALVES}); }
#endif

// Make columns of rows: each step doubles how many lanes of a column are side by side.
inline void transpose(vec (&rows)[LANES]) {
    for (int step = 1; step < LANES; step *= 2) {
        vec from[LANES];
        memcpy(from, rows, sizeof(from));
        for (int n = 0; n < LANES / 2; ++n) {
            rows[2 * n] = first_halves(from[n], from[n + LANES / 2]);
            rows[2 * n + 1] = last_halves(from[n], from[n + LANES / 2]);
        }
    }
}

inline long round_up(long n, long step) { return (n + step - 1) / step * step; }

// Fields below 1e-38 become 0 while this lives: with denormals a CPU is a hundred times slower.
struct FlushDenormals {
#if defined(__x86_64__)
    unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }  // of results, and of inputs
    ~FlushDenormals() { _mm_setcsr(before); }
#endif
};

// C += A B, or C = A B unless `add`, for M rows and N vectors of columns; C stays in registers.
// Strides in floats: ars, brs, crs from row to row of a, b, c, aks from column to column of a, so
// that A[m][k] = a[m * ars + k * aks] and B[k][n] = b[k * brs + n].
template <int M, int N>
inline void tile_product(const float *a, long ars, long aks, const float *b, long brs, float *c,
                         long crs, long depth, bool add) {
    vec acc[M][N];
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) acc[m][n] = add ? load(c + m * crs + n * LANES) : zero();
    for (long k = 0; k < depth; ++k) {
        vec row[N];
        for (int n = 0; n < N; ++n) row[n] = load(b + k * brs + n * LANES);
        for (int m = 0; m < M; ++m) {
            float x = a[m * ars + k * aks];
            for (int n = 0; n < N; ++n) acc[m][n] += x * row[n];
        }
    }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) store(c + m * crs + n * LANES, acc[m][n]);
}

// The same for any number of rows. M is as large as the vector registers allow.
template <int N>
inline void strip_product(const float *a, long ars, long aks, const float *b, long brs, float *c,
                          long crs, long rows, long depth, bool add) {
    constexpr int M = N == 1 ? 12 : 6;
    long m = 0;
    for (; m + M <= rows; m += M)
        tile_product<M, N>(a + m * ars, ars, aks, b, brs, c + m * crs, crs, depth, add);
    for (; m + 2 <= rows; m += 2)
        tile_product<2, N>(a + m * ars, ars, aks, b, brs, c + m * crs, crs, depth, add);
    for (; m < rows; ++m)
        tile_product<1, N>(a + m * ars, ars, aks, b, brs, c + m * crs, crs, depth, add);
}

// The same for any number of columns that is a multiple of LANES.
void product(const float *a, long ars, long aks, const float *b, long brs, float *c, long crs,
             long rows, long columns, long depth, bool add) {
    long n = 0;
    for (; n + COLUMN_VECTORS * LANES <= columns; n += COLUMN_VECTORS * LANES)
        strip_product<COLUMN_VECTORS>(a, ars, aks, b + n, brs, c + n, crs, rows, depth, add);
    for (; n + 2 * LANES <= columns; n += 2 * LANES)
        strip_product<2>(a, ars, aks, b + n, brs, c + n, crs, rows, depth, add);
    for (; n < columns; n += LANES)
        strip_product<1>(a, ars, aks, b + n, brs, c + n, crs, rows, depth, add);
}

// base ** exponent by squaring; EXPONENT is the default, 4, or 0 for any other.
template <int EXPONENT> inline vec power_of(vec base, int exponent) {
    if (EXPONENT == 4) {
        vec square = base * base;
        return square * square;
    }
    vec power = base;
    int bit = 1;
    while (bit * 2 <= exponent) bit *= 2;
    while (bit >>= 1) {
        power *= power;
        if (exponent & bit) power *= base;
    }
    return power;
}

}  // namespace

extern "C" {

// A (B, H, T, C) tensor of fp32 or bf16 with contiguous last dimension; strides in elements.
struct Tensor {
    const void *data;
    int64_t batch_stride, head_stride, token_stride;
    int64_t is_bf16;
};

// Arguments and results of a call: `_Problem` of cpu.py has the same fields in the same order.
struct Problem {
    int64_t batch, heads, queries, keys, coords, width;
    int64_t exponent, cutoff;  // 0 none, 1 hard, 2 soft
    int64_t threads;
    double tolerance;                                 // share of the sum that may be left out
    Tensor q, k, v, out, grad_out;                    // out and grad_out: backward only
    const float *mass;                                // (B, Tk)
    const float *time_scale, *time_offset;            // (H,)
    const float *background;                          // (H,), or null for none
    const float *radius;                              // (H,), or null without a cutoff
    const int64_t *query_positions, *key_positions;   // (Tq,), (Tk,), both increase
    float *result;   // forward: out (B, Tq, H, D)
    float *total;    // (B, H, Tq), background + sum of fields
    int32_t *first;  // (B, H, row blocks), the oldest key that a block of queries visited
    // backward
    float *d_q, *d_k, *d_v;  // (B, T, H, C or D)
    float *d_mass;           // (B, Tk)
    float *d_law;            // (4, H): time_scale, time_offset, radius, background
};

// Arguments and results of `mix_forward` and `mix_backward`: `_Mix` of retardation.py.
struct Mix {
    int64_t batch, tokens, channels, is_bf16, threads;
    const void *x;       // (B, T, C)
    const float *share;  // (C,)
    void *result;        // forward: (B, T, C), (1 - share) x_j + share x_(j-1)
    // backward
    const void *grad;    // (B, T, C)
    void *d_x;           // (B, T, C)
    float *d_share;      // (C,)
};
}

namespace {

// One token's row of a tensor as fp32.
void read_row(const Tensor &t, long b, long h, long token, long width, float *row) {
    long at = b * t.batch_stride + h * t.head_stride + token * t.token_stride;
    if (!t.is_bf16) {
        const float *from = (const float *)t.data + at;
        long c = 0;
        for (; c + LANES <= width; c += LANES) store(row + c, load(from + c));
        for (; c < width; ++c) row[c] = from[c];
        return;
    }
    const uint16_t *low = (const uint16_t *)t.data + at;  // bf16: the upper half of an fp32
    for (long c = 0; c < width; ++c) {
        uint32_t bits = (uint32_t)low[c] << 16;
        memcpy(row + c, &bits, 4);
    }
}

// A thread's scratch buffer, kept from call to call: fresh pages would cost more than the
// arithmetic of a decoding step. Not set to zero. Each buffer of a thread has a slot of its own.
struct Scratch {
    float *data;
    Scratch(int slot, long size) {
        static thread_local std::vector<std::pair<std::unique_ptr<float[]>, long>> kept(16);
        auto &[memory, capacity] = kept[slot];
        if (capacity < size) {
            memory.reset(new float[size]);
            capacity = size;
        }
        data = memory.get();
    }
    float &operator[](long n) const { return data[n]; }
};

// The (batch, head) that a thread works on: its keys, packed when they are first visited, and one
// block of its queries. One query alone, a decoding step, keeps distances in place of products.
struct Head {
    const Problem &p;
    const std::vector<float> &heaviest;  // (B), see `heaviest_masses`
    const bool backward;
    const long stride, coords, width;  // padded to whole vectors: Tk, C and D
    const bool v_in_place;             // v needs no copy
    const bool single;                 // one query: its distances are computed without products
    const Scratch k, k_across, k2;     // (Tk, C), (C, Tk), (Tk), all less `centre`; k2 = |k|^2
    const Scratch v, v_across;         // (Tk, D), (D, Tk)
    const Scratch time, mass;          // (Tk) each; time in tokens since the oldest key
    const Scratch rows;                // (LANES, C or D), some tokens' rows
    const Scratch field, slope;        // (ROWS, KEYS); q.k and g.v before they are overwritten
    long b = 0, h = 0, v_stride = 0;
    long packed_from = 0;              // keys from here on are packed
    const float *v_rows = nullptr;     // (Tk, D), rows v_stride apart
    double max_mass = 0;
    double window = 0;                 // tokens back that the head must look, as far as is known
    float scale = 0, offset = 0, radius2 = 0, background = TINY;
    std::vector<float> centre;         // (C), about the mean key
    std::vector<float> q, q2;          // (ROWS, C), (ROWS); q2 = |q|^2
    std::vector<float> sums;           // (ROWS, D), sums of field * v

    Head(const Problem &p, const std::vector<float> &heaviest, bool backward)
        : p(p), heaviest(heaviest), backward(backward), stride(round_up(p.keys, LANES) + LANES),
          coords(round_up(p.coords, LANES)), width(round_up(p.width, LANES)),
          v_in_place(!p.v.is_bf16 && width == p.width),
          single(!backward && p.queries == 1), k(0, backward ? stride * coords : 0),
          k_across(1, stride * p.coords), k2(2, stride),
          v(3, backward || v_in_place ? 0 : stride * width),
          v_across(4, backward ? stride * p.width : 0), time(5, stride), mass(6, stride),
          rows(11, LANES * std::max(coords, width)), field(12, ROWS * KEYS),
          slope(13, backward ? ROWS * KEYS : 0), centre(coords), q(ROWS * coords), q2(ROWS),
          sums(ROWS * width) {}

    // Start on another (batch, head).
    void begin(long batch, long head) {
        b = batch, h = head, packed_from = p.keys;
        scale = p.time_scale[h], offset = p.time_offset[h];
        radius2 = p.cutoff ? p.radius[h] * p.radius[h] : 0;
        background = p.background ? p.background[h] : TINY;
        // r2 does not change, but |q|^2 + |k|^2 - 2 q.k loses fewer digits near the origin
        const long count = single ? 0 : std::min<long>(16, p.keys);  // a sample of keys is enough
        std::fill(centre.begin(), centre.end(), 0.0f);
        for (long n = 0; n < count; ++n) {
            read_rows(p.k, n * p.keys / count, 1, p.coords, coords, rows.data);
            for (long c = 0; c < coords; ++c) centre[c] += rows[c] / count;
        }
        max_mass = heaviest[b];
        window = INFINITY;
        if (p.cutoff) window = p.time_offset[h] + p.radius[h] / p.time_scale[h] + 1;
        if (p.background && p.tolerance > 0) {
            double proven = std::ceil(proven_window(p.background[h]));
            if (proven < window) window = proven;
        }
        if (v_in_place) {
            v_stride = p.v.token_stride;
            v_rows = (const float *)p.v.data + b * p.v.batch_stride + h * p.v.head_stride;
        } else {
            v_stride = width;
            v_rows = v.data;
        }
        // between the last key and the end of its vector: mass 0, later than every query
        for (long j = p.keys; j < stride; ++j) {
            time[j] = 1e30f, mass[j] = k2[j] = 0;
            for (long c = 0; c < p.coords; ++c) k_across[c * stride + j] = 0;
            for (long c = 0; backward && c < p.width; ++c) v_across[c * stride + j] = 0;
        }
    }

    // Tokens since the oldest key, exact in fp32 up to 2^24.
    float since_origin(int64_t position) const { return (float)(position - p.key_positions[0]); }

    // Pack the keys from `from` to those that are packed already.
    void pack_keys(long from) {
        for (long j = from; j < packed_from; j += LANES) {
            const int count = std::min<long>(LANES, packed_from - j);
            pack_points(j, count);
            for (int n = 0; n < count; ++n) {
                time[j + n] = since_origin(p.key_positions[j + n]);
                mass[j + n] = p.mass[b * p.keys + j + n];
            }
            if (backward) {
                read_rows(p.v, j, count, p.width, width, rows.data);
                for (long c = 0; c < width; c += LANES) {
                    vec block[LANES];
                    for (int n = 0; n < LANES; ++n) block[n] = load(&rows[n * width + c]);
                    transpose(block);
                    for (int n = 0; n < LANES && c + n < p.width; ++n)
                        store_first(&v_across[(c + n) * stride + j], block[n], count);
                }
            } else if (!v_in_place) {
                read_rows(p.v, j, count, p.width, width, &v[j * width]);
            }
        }
        packed_from = std::min(packed_from, from);
    }

    // `count` tokens' rows of a tensor, each filled up with zeros to `padded`.
    void read_rows(const Tensor &t, long token, long count, long size, long padded, float *to) {
        for (long n = 0; n < count; ++n, to += padded) {
            read_row(t, b, h, token + n, size, to);
            std::fill(to + size, to + padded, 0.0f);
        }
    }

    // The points of `count` keys less the centre, and their squared norms. One query is itself the
    // centre, and -1/2 of a squared distance stands for q.k, with both norms 0.
    void pack_points(long j, int count) {
        float *points = backward ? &k[j * coords] : rows.data;
        const float *origin = single ? q.data() : centre.data();
        read_rows(p.k, j, count, p.coords, coords, points);
        vec norm = zero();
        for (long c = 0; c < coords; c += LANES) {
            vec block[LANES];
            for (int n = 0; n < LANES; ++n) {
                block[n] = n < count ? load(points + n * coords + c) - load(origin + c) : zero();
                if (backward && n < count) store(points + n * coords + c, block[n]);
            }
            transpose(block);
            for (int n = 0; n < LANES; ++n) {
                norm += block[n] * block[n];
                if (!single && c + n < p.coords)
                    store_first(&k_across[(c + n) * stride + j], block[n], count);
            }
        }
        store_first(&k2[j], single ? zero() : norm, count);
        if (single) store_first(&k_across[j], -0.5f * norm, count);
    }

    void read_queries(long row, long rows) {
        read_rows(p.q, row, rows, p.coords, coords, q.data());
        for (long r = 0; r < rows && !single; ++r) {
            vec norm = zero();
            for (long c = r * coords; c < (r + 1) * coords; c += LANES) {
                vec x = load(&q[c]) - load(&centre[c - r * coords]);
                store(&q[c], x);
                norm += x * x;
            }
            q2[r] = sum(norm);
        }
    }

    // field = q.k of a block of queries with keys [from, from + keys), before it becomes the field.
    void dots(long rows, long from, long keys) {
        if (single) {
            memcpy(field.data, &k_across[from], round_up(keys, LANES) * sizeof(float));
            return;
        }
        product(q.data(), coords, 1, &k_across[from], stride, field.data, KEYS, rows,
                round_up(keys, LANES), p.coords, false);
    }

    // 1 / (1 + r2) of query r with the LANES keys from j on, 0 for keys in the future and beyond a
    // hard cutoff. `lag` is set to t_i - t_j - time_offset.
    vec inverse_distance(vec dot, long r, float position, long j, vec &lag) const {
        vec ago = position - load(&time[j]);
        lag = ago - offset;
        vec along = scale * lag;
        vec r2 = at_least(q2[r] + load(&k2[j]) - 2 * dot, zero()) + along * along;
        vec inverse = 1.0f / (1 + r2);
        if (p.cutoff == 1) inverse = r2 > radius2 ? zero() : inverse;
        return ago >= zero() ? inverse : zero();
    }

    // rho = relu(1 - r2 / radius^2) of the soft cutoff, from 1 / (1 + r2)
    vec soft_cutoff(vec inverse) const {
        return at_least(1 + (1 - 1 / at_least(inverse, zero() + TINY)) / radius2, zero());
    }

    // The oldest key that queries from `position` on must visit, as far as the windows say.
    long oldest_key(int64_t position) const {
        if (!(window < (double)position - p.key_positions[0])) return 0;  // also if NaN
        int64_t oldest = (int64_t)std::min(position + 1.0, std::floor(position - window));
        return std::lower_bound(p.key_positions, p.key_positions + p.keys, oldest) -
               p.key_positions;
    }

    // What may be left out at once, as a share of the sum: a decoding step is bound by memory, and
    // half of the tolerance pays for values that it skips.
    double tolerance() const { return single ? p.tolerance / 2 : p.tolerance; }

    // proven_window of law.py
    double proven_window(double smallest_sum) const {
        double degree = 2 * p.exponent - 1;
        double log_window = std::log(max_mass / degree) - std::log(tolerance()) -
                            std::log(smallest_sum) - (degree + 1) * std::log(p.time_scale[h]);
        return p.time_offset[h] + std::exp(log_window / degree) * (1 + 1e-6);
    }

    // Whether the keys before `oldest` can be left out for all queries from `position` on, because
    // all together they provably weigh at most tolerance * smallest_sum.
    // With a background the windows have said so already.
    bool nothing_left(long oldest, int64_t position, float smallest_sum) const {
        if (p.background || !(p.tolerance > 0) || !(smallest_sum > 0)) return false;  // also if NaN
        double kept = (double)(position - p.key_positions[oldest]);
        return proven_window(smallest_sum) <= kept;
    }
};

// Outputs of one block of queries. `first` is set to the oldest key that was visited.
template <int EXPONENT> void forward_block(Head &head, long row, long rows, int32_t *first) {
    const Problem &p = head.p;
    head.read_queries(row, rows);
    std::fill(head.sums.begin(), head.sums.end(), 0.0f);
    float total[ROWS] = {}, added[ROWS], unread = 0;  // unread: fields whose values were skipped
    const int64_t oldest_query = p.query_positions[row];
    long end = std::upper_bound(p.key_positions, p.key_positions + p.keys,
                                p.query_positions[row + rows - 1]) - p.key_positions;
    const long step = head.single ? 64 : KEYS;  // keys per visit
    // the first visit holds the block's own keys and few older ones: they may already be enough
    long width = std::min(step, round_up(rows + 48, LANES));
    const long oldest = std::min(end, head.oldest_key(oldest_query));
    *first = end;
    float smallest = 0;
    while (end > oldest) {
        if (end < p.keys && head.nothing_left(end, oldest_query, smallest)) break;
        long from = std::max(oldest, end - width), keys = end - from;
        if (from < head.packed_from) head.pack_keys(from);
        head.dots(rows, from, keys);
        for (long r = 0; r < rows; ++r) {
            float position = head.since_origin(p.query_positions[row + r]);
            float *fields = &head.field[r * KEYS];
            vec field_sum = zero();
            for (long j = 0; j < keys; j += LANES) {
                vec lag, x = head.inverse_distance(load(fields + j), r, position, from + j, lag);
                vec field = power_of<EXPONENT>(x, p.exponent) * load(&head.mass[from + j]);
                if (p.cutoff == 2) {
                    vec rho = head.soft_cutoff(x);
                    field *= rho * rho;
                }
                if (j + LANES > keys)  // the last vector may hold keys of the newer block
                    for (long n = keys - j; n < LANES; ++n) field[n] = 0;
                store(fields + j, field);
                field_sum += field;
            }
            added[r] = sum(field_sum);
        }
        end = *first = from;
        width = step;
        if (head.single && unread + added[0] <= head.tolerance() * (total[0] + head.background)) {
            unread += added[0];
            continue;
        }
        for (long r = 0; r < rows; ++r) total[r] += added[r];
        smallest = *std::min_element(total, total + rows);
        product(head.field.data, KEYS, 1, head.v_rows + from * head.v_stride, head.v_stride,
                head.sums.data(), head.width, rows, head.width, keys, true);
    }
    for (long r = 0; r < rows; ++r) {
        total[r] += head.background;
        p.total[(head.b * p.heads + head.h) * p.queries + row + r] = total[r];
        float inverse = 1 / total[r];
        float *out = p.result + ((head.b * p.queries + row + r) * p.heads + head.h) * p.width;
        for (long c = 0; c < p.width; ++c) out[c] = head.sums[r * head.width + c] * inverse;
    }
}

// Sums that the gradients of one (batch, head) are made of.
struct Gradients {
    const long keys, coords, width;
    const Scratch d_k, d_v;              // (Tk, C), slope^T q; (Tk, D)
    const Scratch slope_of_key, d_mass;  // (Tk) each
    std::vector<float> d_q;              // (ROWS, C), slope k
    std::vector<float> g, delta;         // (ROWS, D), gradient of out; (ROWS), g.out
    std::vector<float> inverse_total;    // (ROWS)
    double d_scale = 0, d_offset = 0, d_radius = 0, d_background = 0;

    explicit Gradients(const Head &head)
        : keys(head.stride), coords(head.coords), width(head.width), d_k(7, keys * coords),
          d_v(8, keys * width), slope_of_key(9, keys), d_mass(10, keys), d_q(ROWS * coords),
          g(ROWS * width), delta(ROWS), inverse_total(ROWS) {}

    void clear() {
        std::fill_n(d_k.data, keys * coords, 0.0f);
        std::fill_n(d_v.data, keys * width, 0.0f);
        std::fill_n(slope_of_key.data, keys, 0.0f);
        std::fill_n(d_mass.data, keys, 0.0f);
        d_scale = d_offset = d_radius = d_background = 0;
    }
};

// Turn q.k and g.v of a tile into field / total (head.field) and slopes (head.slope), which are
// dL/dr2 up to the factor -exponent (-1 under the soft cutoff), and add up their sums.
template <int EXPONENT>
void slopes(Head &head, Gradients &sums, long row, long rows, long from, long keys,
            float *slope_of_query) {
    const Problem &p = head.p;
    vec moment1 = zero(), moment2 = zero(), in_radius = zero();
    for (long r = 0; r < rows; ++r) {
        float position = head.since_origin(p.query_positions[row + r]);
        float *fields = &head.field[r * KEYS], *gains = &head.slope[r * KEYS];
        float inverse_total = sums.inverse_total[r], delta = sums.delta[r];
        vec slope_sum = zero();
        for (long j = 0; j < keys; j += LANES) {
            vec lag, inverse = head.inverse_distance(load(fields + j), r, position, from + j, lag);
            vec power = power_of<EXPONENT>(inverse, p.exponent) * inverse_total;
            if (j + LANES > keys)
                for (long n = keys - j; n < LANES; ++n) power[n] = 0;
            vec mass = load(&head.mass[from + j]);
            vec gain = (load(gains + j) - delta) * power;  // dL/dmass of the key
            vec slope;
            if (p.cutoff == 2) {
                vec rho = head.soft_cutoff(inverse);
                vec edge = gain * rho * mass;
                slope = edge * ((float)p.exponent * rho * inverse + 2 / head.radius2);
                in_radius += edge * (1 - rho);
                gain *= rho * rho;
                power *= rho * rho;
            } else {
                slope = gain * mass * inverse;
            }
            store(fields + j, power * mass);
            store(gains + j, slope);
            float *d_mass = &sums.d_mass[from + j], *of_key = &sums.slope_of_key[from + j];
            store(d_mass, load(d_mass) + gain);
            store(of_key, load(of_key) + slope);
            slope_sum += slope;
            moment1 += slope * lag;
            moment2 += slope * lag * lag;
        }
        slope_of_query[r] += sum(slope_sum);
    }
    sums.d_offset += sum(moment1);
    sums.d_scale += sum(moment2);
    sums.d_radius += sum(in_radius);
}

// Gradients of one block of queries, and what it adds to those of its keys. Tiles are recomputed
// down to key `first`, at which the forward pass stopped.
template <int EXPONENT>
void backward_block(Head &head, Gradients &sums, long row, long rows, long first) {
    const Problem &p = head.p;
    head.read_queries(row, rows);
    float slope_of_query[ROWS] = {};
    std::vector<float> out(p.width);
    std::fill(sums.d_q.begin(), sums.d_q.end(), 0.0f);
    for (long r = 0; r < rows; ++r) {
        float *g = &sums.g[r * head.width];
        read_row(p.grad_out, head.b, head.h, row + r, p.width, g);
        read_row(p.out, head.b, head.h, row + r, p.width, out.data());
        float delta = 0;
        for (long c = 0; c < p.width; ++c) delta += g[c] * out[c];
        sums.delta[r] = delta;
        float total = p.total[(head.b * p.heads + head.h) * p.queries + row + r];
        sums.inverse_total[r] = 1 / total;
        sums.d_background -= delta / total;
    }
    long end = std::upper_bound(p.key_positions, p.key_positions + p.keys,
                                p.query_positions[row + rows - 1]) - p.key_positions;
    while (end > first) {
        long from = std::max<long>(first, end - KEYS), keys = end - from;
        if (from < head.packed_from) head.pack_keys(from);
        head.dots(rows, from, keys);
        product(sums.g.data(), head.width, 1, &head.v_across[from], head.stride,
                head.slope.data, KEYS, rows, round_up(keys, LANES), p.width, false);
        slopes<EXPONENT>(head, sums, row, rows, from, keys, slope_of_query);
        product(head.field.data, 1, KEYS, sums.g.data(), head.width,
                &sums.d_v[from * head.width], head.width, keys, head.width, rows, true);
        product(head.slope.data, KEYS, 1, &head.k[from * head.coords], head.coords,
                sums.d_q.data(), head.coords, rows, head.coords, keys, true);
        product(head.slope.data, 1, KEYS, head.q.data(), head.coords,
                &sums.d_k[from * head.coords], head.coords, keys, head.coords, rows, true);
        end = from;
    }
    float factor = p.cutoff == 2 ? -2.0f : -2.0f * p.exponent;
    for (long r = 0; r < rows; ++r) {
        float *d_q = p.d_q + ((head.b * p.queries + row + r) * p.heads + head.h) * p.coords;
        for (long c = 0; c < p.coords; ++c)
            d_q[c] = factor * (head.q[r * head.coords + c] * slope_of_query[r] -
                               sums.d_q[r * head.coords + c]);
    }
}

// Gradients of keys and values once all blocks of queries have been added, and what this head adds
// to those of its masses, (Tk), and of its law, (4).
void write_gradients(const Head &head, const Gradients &sums, float *d_mass, double *law) {
    const Problem &p = head.p;
    float factor = p.cutoff == 2 ? -2.0f : -2.0f * p.exponent;
    for (long j = 0; j < p.keys; ++j) {
        long at = (head.b * p.keys + j) * p.heads + head.h;
        bool visited = j >= head.packed_from;
        float slope = sums.slope_of_key[j];
        for (long c = 0; c < p.coords; ++c)
            p.d_k[at * p.coords + c] =
                visited
                    ? factor * (head.k[j * head.coords + c] * slope - sums.d_k[j * head.coords + c])
                    : 0.0f;
        memcpy(p.d_v + at * p.width, &sums.d_v[j * head.width], p.width * sizeof(float));
        d_mass[j] = sums.d_mass[j];
    }
    const double scale = p.time_scale[head.h];
    law[0] = factor * scale * sums.d_scale;
    law[1] = -factor * scale * scale * sums.d_offset;
    law[2] = p.cutoff == 2 ? 4 / p.radius[head.h] * sums.d_radius : 0;
    law[3] = sums.d_background;
}

// All (batch, head) as numbers b * heads + h, the heads that look farthest back first: if the
// longest task started last, the other threads would wait for it.
std::vector<long> longest_first(const Problem &p) {
    std::vector<long> heads(p.heads), matrices;
    std::iota(heads.begin(), heads.end(), 0);
    std::stable_sort(heads.begin(), heads.end(),
                     [&](long a, long b) { return p.time_scale[a] < p.time_scale[b]; });
    for (long head : heads)
        for (long b = 0; b < p.batch; ++b) matrices.push_back(b * p.heads + head);
    return matrices;
}

// The largest mass of each batch, which all of its heads ask for.
std::vector<float> heaviest_masses(const Problem &p) {
    std::vector<float> heaviest(p.batch);
    for (long b = 0; b < p.batch; ++b) {
        float largest = 0;
#pragma omp simd reduction(max : largest)
        for (long j = 0; j < p.keys; ++j) largest = std::max(largest, p.mass[b * p.keys + j]);
        heaviest[b] = largest;
    }
    return heaviest;
}

template <int EXPONENT> void run_forward(const Problem &p) {
    const std::vector<long> matrices = longest_first(p);
    const std::vector<float> heaviest = heaviest_masses(p);
    const long blocks = (p.queries + ROWS - 1) / ROWS;
    // each part packs the keys again: split queries only if there are more threads than heads
    const long parts = std::min(blocks, std::max<long>(1, p.threads / (p.batch * p.heads)));
#pragma omp parallel num_threads(p.threads)
    {
        FlushDenormals flush;
        Head head(p, heaviest, false);
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < p.batch * p.heads * parts; ++task) {
            long matrix = matrices[task / parts], part = task % parts;
            head.begin(matrix / p.heads, matrix % p.heads);
            for (long n = part; n < blocks; n += parts) {
                long row = n * ROWS, rows = std::min<long>(ROWS, p.queries - row);
                forward_block<EXPONENT>(head, row, rows, p.first + matrix * blocks + n);
            }
        }
    }
}

template <int EXPONENT> void run_backward(const Problem &p) {
    const std::vector<long> matrices = longest_first(p);
    const std::vector<float> heaviest = heaviest_masses(p);
    std::vector<float> d_mass(p.batch * p.heads * p.keys);
    std::vector<double> d_law(p.batch * p.heads * 4);
    const long blocks = (p.queries + ROWS - 1) / ROWS;
#pragma omp parallel num_threads(p.threads)
    {
        FlushDenormals flush;
        Head head(p, heaviest, true);
        Gradients sums(head);
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < p.batch * p.heads; ++task) {
            long matrix = matrices[task];
            head.begin(matrix / p.heads, matrix % p.heads);
            sums.clear();
            for (long n = blocks - 1; n >= 0; --n) {
                long row = n * ROWS, rows = std::min<long>(ROWS, p.queries - row);
                backward_block<EXPONENT>(head, sums, row, rows, p.first[matrix * blocks + n]);
            }
            write_gradients(head, sums, &d_mass[matrix * p.keys], &d_law[matrix * 4]);
        }
    }
    std::fill_n(p.d_mass, p.batch * p.keys, 0.0f);
    for (long matrix = 0; matrix < p.batch * p.heads; ++matrix)
        for (long j = 0; j < p.keys; ++j)
            p.d_mass[matrix / p.heads * p.keys + j] += d_mass[matrix * p.keys + j];
    for (long n = 0; n < 4 * p.heads; ++n) {
        double sum = 0;
        for (long b = 0; b < p.batch; ++b) sum += d_law[(b * p.heads + n % p.heads) * 4 + n / p.heads];
        p.d_law[n] = sum;
    }
}

float wide(float x) { return x; }
float wide(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}
void narrow(float x, float *to) { *to = x; }
void narrow(float x, uint16_t *to) {  // to the nearest, to even if there are two
    uint32_t bits;
    memcpy(&bits, &x, 4);
    *to = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

template <typename Number> void run_mix_forward(const Mix &m) {
    const long width = m.channels;
#pragma omp parallel for num_threads(m.threads) schedule(static)
    for (long row = 0; row < m.batch * m.tokens; ++row) {
        const Number *x = (const Number *)m.x + row * width;
        const Number *before = row % m.tokens ? x - width : x;
        Number *result = (Number *)m.result + row * width;
#pragma omp simd
        for (long c = 0; c < width; ++c)
            narrow(wide(x[c]) + m.share[c] * (wide(before[c]) - wide(x[c])), &result[c]);
    }
}

template <typename Number> void run_mix_backward(const Mix &m) {
    const long width = m.channels;
    std::vector<float> d_share(m.threads * width);
#pragma omp parallel for num_threads(m.threads) schedule(static)
    for (long part = 0; part < m.threads; ++part) {
        float *sums = &d_share[part * width];
        const long rows = m.batch * m.tokens;
        for (long row = part * rows / m.threads; row < (part + 1) * rows / m.threads; ++row) {
            const long token = row % m.tokens;
            const Number *x = (const Number *)m.x + row * width;
            const Number *before = token ? x - width : x;
            const Number *grad = (const Number *)m.grad + row * width;
            // the token after it takes a share of this one; so does a text's first token itself
            const Number *after = grad + width;
            const float is_last = token + 1 == m.tokens, is_first = token == 0;
            if (is_last) after = grad;
            Number *d_x = (Number *)m.d_x + row * width;
#pragma omp simd
            for (long c = 0; c < width; ++c) {
                const float g = wide(grad[c]), share = m.share[c];
                narrow(g * (1 - share + is_first * share) + (1 - is_last) * share * wide(after[c]),
                       &d_x[c]);
                sums[c] += g * (wide(before[c]) - wide(x[c]));
            }
        }
    }
    for (long c = 0; c < width; ++c) {
        m.d_share[c] = 0;
        for (long part = 0; part < m.threads; ++part) m.d_share[c] += d_share[part * width + c];
    }
}

}  // namespace

extern "C" {
void mix_forward(const Mix *m) {
    m->is_bf16 ? run_mix_forward<uint16_t>(*m) : run_mix_forward<float>(*m);
}
void mix_backward(const Mix *m) {
    m->is_bf16 ? run_mix_backward<uint16_t>(*m) : run_mix_backward<float>(*m);
}
void gravity_forward(const Problem *p) {
    p->exponent == 4 ? run_forward<4>(*p) : run_forward<0>(*p);
}
void gravity_backward(const Problem *p) {
    p->exponent == 4 ? run_backward<4>(*p) : run_backward<0>(*p);
}
int64_t rows_per_block() { return ROWS; }
}

// Packed causal attention in fp32 for training on a CPU: forward, and backward from the saved log-sum-exp.
//
// Shapes: T tokens, H query heads, G key/value heads, K head width. Documents lie one after another on the token axis;
// key j of the same document is visible to query i if  i - window < j <= i.
//
//   forward    S = q k^T / sqrt(K)    P = softmax(S)          o = P v
//   backward   dP = do v^T            dS = P (dP - do . o)    dq = dS k / sqrt(K)    dk = dS^T q / sqrt(K)    dv = P^T do
//
// Blocks of 64 queries meet blocks of 64 keys; the scores of one pair never leave the cache, and pairs that no query can
// see are skipped (Dao 2023, arXiv:2307.08691). Scores are kept transposed, S[key][query]: a vector holds one key and
// neighbouring queries, so maxima and sums over keys need no sums across a vector, and all five products have one form,
// "broadcast a, multiply with a row of b" (`tile`). q carries log2(e) / sqrt(K), so that a power of two is all softmax needs.
//
// Rows are copied once per head into zero-padded arrays: any K and any length then run the same code, and rows lie side
// by side (in the tensors they are H * K apart, a power of two, which maps them onto a few lines of the cache).
//
// One task is one (document, head) - backward: one (document, key/value head), with all its query heads. A task owns what
// it writes and sums in a fixed order, so results depend neither on the run nor on the number of threads.
//
// Vectors are the compiler's own, as in gemv.cpp.

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors pass between inlined functions only

namespace {

constexpr int64_t BLOCK = 64;   // queries, and keys, of one block
constexpr int64_t PAD = 16;     // lengths and widths are rounded up to the widest vector
constexpr int64_t CHUNK = 512;  // queries of one forward task: a long prompt feeds every core, and its keys are copied anew
constexpr int64_t AHEAD = 16;   // rows that `pack` fetches ahead
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

struct View {  // (T, heads, K) with K contiguous
    const float *data;
    int64_t token, head;
};

// The argument of the C functions, packed in Python (native/attention.py). Outputs are contiguous: o, dq (T, H, K); dk, dv
// (T, G, K). lse (H, T), in powers of two; forward writes it unless it is null.
struct Problem {
    View q, k, v, o, d_o;
    float *out, *lse, *dq, *dk, *dv;
    const int64_t *documents;  // (start, length) each
    int64_t count, longest, tokens, heads, groups, width, window;
    int32_t threads, level;
};

struct Document {
    int64_t start, length;
};

struct Range {
    int64_t begin, end;
};

constexpr int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
INLINE int64_t clamp(int64_t n, int64_t most) { return n < 0 ? 0 : n > most ? most : n; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <int LANES> struct Vector {
    typedef float floats __attribute__((vector_size(LANES * 4)));
    typedef int32_t ints __attribute__((vector_size(LANES * 4)));
    typedef floats floats_anywhere __attribute__((aligned(4), may_alias));
};
template <int LANES> using floats = typename Vector<LANES>::floats;
template <int LANES> using ints = typename Vector<LANES>::ints;

template <int LANES> INLINE floats<LANES> load(const float *from) {
    return *(const typename Vector<LANES>::floats_anywhere *)from;
}
template <int LANES> INLINE void store(float *to, floats<LANES> v) { *(typename Vector<LANES>::floats_anywhere *)to = v; }
template <int LANES> INLINE floats<LANES> fill(float value) { return floats<LANES>{} + value; }

// 2^x for x < 128, relative error 2e-7; exactly 0 below 2^-126 (so at -inf), nan stays nan. x = n + f with n whole: adding
// 1.5 * 2^23 rounds x to n in the low bits; 2^f on [-1/2, 1/2] is a polynomial fitted for least relative error (2e-9).
template <int LANES> INLINE floats<LANES> exp2(floats<LANES> x) {
    constexpr float ROUND = 12582912.0f;
    floats<LANES> shifted = x + ROUND, f = x - (shifted - ROUND), p = fill<LANES>(0.000153533620f);
    p = p * f + 0.00133988750f;
    p = p * f + 0.00961843692f;
    p = p * f + 0.0555033237f;
    p = p * f + 0.240226477f;
    p = p * f + 0.693147182f;
    p = p * f + 1.0f;
    ints<LANES> power = ((ints<LANES>)shifted + 127) << 23;  // the bits of ROUND itself are shifted out
    return (floats<LANES>)((ints<LANES>)(p * (floats<LANES>)power) & ~(x < -126.0f));
}

// --- the product: c = a b --------------------------------------------------------------------------------------------

enum Into { STORE, ADD, SCALE_ADD };  // c = ab, c += ab, c = c * scale[row] + ab

// ROWS x (VECS * LANES) of c, its sums in registers. a[row][k], or with COLUMNS a[k][row]; b[k][column].
template <int LANES, int ROWS, int VECS, Into INTO, bool COLUMNS>
INLINE void tile(float *c, int64_t c_row, const float *a, int64_t a_row, const float *b, int64_t b_row, int64_t inner,
                 const float *scale) {
    floats<LANES> sum[ROWS][VECS];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int v = 0; v < VECS; v++) {
            sum[r][v] = INTO == STORE ? floats<LANES>{} : load<LANES>(c + r * c_row + v * LANES);
            if (INTO == SCALE_ADD) sum[r][v] *= scale[r];
        }
    for (int64_t k = 0; k < inner; k++, b += b_row, a += COLUMNS ? a_row : 1) {
        floats<LANES> row[VECS];
        UNROLL for (int v = 0; v < VECS; v++) row[v] = load<LANES>(b + v * LANES);
        UNROLL for (int r = 0; r < ROWS; r++) {
            float value = COLUMNS ? a[r] : a[r * a_row];
            UNROLL for (int v = 0; v < VECS; v++) sum[r][v] += value * row[v];
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int v = 0; v < VECS; v++) store<LANES>(c + r * c_row + v * LANES, sum[r][v]);
}

// ROWS rows of c, all `columns` (a multiple of LANES) of them.
template <int LANES, int ROWS, Into INTO, bool COLUMNS>
INLINE void multiply(float *c, int64_t c_row, const float *a, int64_t a_row, const float *b, int64_t b_row, int64_t inner,
                     int64_t columns, const float *scale = nullptr) {
    int64_t n = 0;
    for (; n + 2 * LANES <= columns; n += 2 * LANES)
        tile<LANES, ROWS, 2, INTO, COLUMNS>(c + n, c_row, a, a_row, b + n, b_row, inner, scale);
    if (n < columns) tile<LANES, ROWS, 1, INTO, COLUMNS>(c + n, c_row, a, a_row, b + n, b_row, inner, scale);
}

// --- which queries and keys of two blocks meet -------------------------------------------------------------------------

// Queries of the block at i0 that see any of the ROWS keys from j, as offsets; rounded outwards to whole vectors and tiles.
template <int LANES, int ROWS> INLINE Range queries_of(int64_t j, int64_t i0, int64_t size, int64_t window) {
    constexpr int64_t GRAIN = LANES > ROWS ? LANES : ROWS;
    return {clamp(j - i0, size) / GRAIN * GRAIN, up(clamp(j + ROWS - 1 + window - i0, size), GRAIN)};
}

// Keys of the block at j0 that any of the ROWS queries from i sees, as offsets; rounded outwards to whole tiles.
template <int ROWS> INLINE Range keys_of(int64_t i, int64_t j0, int64_t size, int64_t window) {
    return {clamp(i - window + 1 - j0, size) / ROWS * ROWS, clamp(i + ROWS - j0, size)};
}

// Scores that may not be seen become -inf. `scores` holds ROWS keys from j, BLOCK queries from i0 each.
template <int LANES, int ROWS> INLINE void mask(float *scores, int64_t j, int64_t i0, Range queries, int64_t window) {
    const ints<LANES> least = (ints<LANES>)fill<LANES>(-INFINITY);
    ints<LANES> lane;
    for (int l = 0; l < LANES; l++) lane[l] = l;
    for (int64_t n = queries.begin; n < queries.end; n += LANES) {
        if (i0 + n >= j + ROWS - 1 && i0 + n + LANES <= j + window) continue;  // all of them may be seen
        UNROLL for (int r = 0; r < ROWS; r++) {
            float *at = scores + r * BLOCK + n;
            ints<LANES> distance = lane + int32_t(i0 + n - (j + r)), score = (ints<LANES>)load<LANES>(at);
            ints<LANES> hidden = (distance | (int32_t(window) - 1 - distance)) >> 31;  // GCC 12 compares lane by lane
            store<LANES>(at, (floats<LANES>)((score & ~hidden) | (least & hidden)));
        }
    }
}

// --- copies in and out -------------------------------------------------------------------------------------------------

// Rows [begin, end) of one head, times `scale`, into rows of `padded` values; the rest up to row `stop` is zero.
INLINE void pack(float *to, const View &view, const Document &document, int64_t head, Range rows, int64_t stop,
                 int64_t width, int64_t padded, float scale) {
    const float *from = view.data + (document.start + rows.begin) * view.token + head * view.head;
    if (rows.end < stop || width < padded) memset(to, 0, size_t(stop - rows.begin) * size_t(padded) * sizeof(float));
    for (int64_t t = rows.begin; t < rows.end; t++, from += view.token, to += padded) {
        for (int64_t x = 0; x < width; x += PAD)  // rows lie too far apart for the processor to foresee the next
            __builtin_prefetch((const void *)(uintptr_t(from + x) + uintptr_t(AHEAD * view.token) * sizeof(float)));
        for (int64_t x = 0; x < width; x++) to[x] = from[x] * scale;
    }
}

// One block of rows (rows, padded) as columns (width, BLOCK).
INLINE void transpose(float *to, const float *from, int64_t rows, int64_t width, int64_t padded) {
    for (int64_t t = 0; t < rows; t += PAD)
        for (int64_t x = 0; x < width; x++)
            UNROLL for (int64_t r = 0; r < PAD; r++) to[x * BLOCK + t + r] = from[(t + r) * padded + x];
}

// The sum of a * b over `width` values.
template <int LANES> INLINE float dot(const float *a, const float *b, int64_t width) {
    floats<LANES> sums = {};
    float sum = 0.0f;
    int64_t x = 0;
    for (; x + LANES <= width; x += LANES) sums += load<LANES>(a + x) * load<LANES>(b + x);
    for (; x < width; x++) sum += a[x] * b[x];
    for (int l = 0; l < LANES; l++) sum += sums[l];
    return sum;
}

INLINE void unpack(float *to, int64_t token, const float *from, int64_t rows, int64_t width, int64_t padded, float scale) {
    for (int64_t t = 0; t < rows; t++)
        for (int64_t x = 0; x < width; x++) to[t * token + x] = from[t * padded + x] * scale;
}

// --- forward -----------------------------------------------------------------------------------------------------------

INLINE int64_t forward_scratch(const Problem &p) {
    int64_t length = up(p.longest, PAD), padded = up(p.width, PAD);
    return 2 * length * padded + 3 * BLOCK * padded + BLOCK * BLOCK + 4 * BLOCK;
}

// Queries [chunk.begin, chunk.end) of one document and head.
template <int LANES, int ROWS>
INLINE void forward_task(const Problem &p, Document document, int64_t head, Range chunk, float *scratch) {
    const int64_t width = p.width, padded = up(width, PAD), kv_head = head / (p.heads / p.groups);
    const int64_t first_key = clamp(chunk.begin - p.window + 1, document.length) / BLOCK * BLOCK;
    const int64_t stop = up(chunk.end, PAD);
    float *keys = scratch, *values = keys + (stop - first_key) * padded, *out = values + (stop - first_key) * padded;
    float *rows = out + BLOCK * padded, *queries = rows + BLOCK * padded, *scores = queries + BLOCK * padded;
    float *most = scores + BLOCK * BLOCK, *peak = most + BLOCK, *total = peak + BLOCK, *scale = total + BLOCK;
    pack(keys, p.k, document, kv_head, {first_key, chunk.end}, stop, width, padded, 1.0f);
    pack(values, p.v, document, kv_head, {first_key, chunk.end}, stop, width, padded, 1.0f);

    for (int64_t i0 = chunk.begin; i0 < chunk.end; i0 += BLOCK) {
        const int64_t size = smaller(BLOCK, stop - i0), real = smaller(BLOCK, chunk.end - i0);
        pack(rows, p.q, document, head, {i0, i0 + real}, i0 + size, width, padded, LOG2_E / sqrtf(float(width)));
        transpose(queries, rows, size, width, padded);
        memset(out, 0, size_t(BLOCK * padded) * sizeof(float));
        for (int64_t n = 0; n < BLOCK; n++) most[n] = -FLT_MAX, total[n] = 0.0f;

        for (int64_t j0 = clamp(i0 - p.window + 1, stop) / BLOCK * BLOCK; j0 < i0 + size; j0 += BLOCK) {
            const int64_t j_size = smaller(BLOCK, stop - j0);
            const float *k = keys + (j0 - first_key) * padded, *v = values + (j0 - first_key) * padded;
            memcpy(peak, most, BLOCK * sizeof(float));
            for (int64_t j = 0; j < j_size; j += ROWS) {
                Range seen = queries_of<LANES, ROWS>(j0 + j, i0, size, p.window);
                float *s = scores + j * BLOCK;
                if (seen.begin >= seen.end) continue;
                multiply<LANES, ROWS, STORE, false>(s + seen.begin, BLOCK, k + j * padded, padded, queries + seen.begin,
                                                    BLOCK, width, seen.end - seen.begin);
                mask<LANES, ROWS>(s, j0 + j, i0, seen, p.window);
                for (int64_t n = seen.begin; n < seen.end; n += LANES) {
                    floats<LANES> high = load<LANES>(peak + n);
                    UNROLL for (int r = 0; r < ROWS; r++) {
                        floats<LANES> score = load<LANES>(s + r * BLOCK + n);
                        high = score > high ? score : high;
                    }
                    store<LANES>(peak + n, high);
                }
            }
            for (int64_t n = 0; n < size; n += LANES) {
                floats<LANES> factor = exp2<LANES>(load<LANES>(most + n) - load<LANES>(peak + n));
                store<LANES>(scale + n, factor);
                store<LANES>(total + n, load<LANES>(total + n) * factor);
            }
            memcpy(most, peak, BLOCK * sizeof(float));
            for (int64_t j = 0; j < j_size; j += ROWS) {
                Range seen = queries_of<LANES, ROWS>(j0 + j, i0, size, p.window);
                float *s = scores + j * BLOCK;
                for (int64_t n = seen.begin; n < seen.end; n += LANES) {
                    floats<LANES> high = load<LANES>(most + n), sum = load<LANES>(total + n);
                    UNROLL for (int r = 0; r < ROWS; r++) {
                        floats<LANES> weight = exp2<LANES>(load<LANES>(s + r * BLOCK + n) - high);
                        store<LANES>(s + r * BLOCK + n, weight);
                        sum += weight;
                    }
                    store<LANES>(total + n, sum);
                }
            }
            for (int64_t i = 0; i < size; i += ROWS) {
                Range seen = keys_of<ROWS>(i0 + i, j0, j_size, p.window);
                if (seen.begin >= seen.end) continue;
                multiply<LANES, ROWS, SCALE_ADD, true>(out + i * padded, padded, scores + seen.begin * BLOCK + i, BLOCK,
                                                       v + seen.begin * padded, padded, seen.end - seen.begin, padded, scale + i);
            }
        }
        for (int64_t n = 0; n < real; n++) {
            int64_t token = document.start + i0 + n;
            unpack(p.out + (token * p.heads + head) * width, 0, out + n * padded, 1, width, padded, 1.0f / total[n]);
            if (p.lse) p.lse[head * p.tokens + token] = most[n] + log2f(total[n]);
        }
    }
}

// --- backward ----------------------------------------------------------------------------------------------------------

INLINE int64_t backward_scratch(const Problem &p) {
    int64_t length = up(p.longest, PAD), padded = up(p.width, PAD);
    return 7 * length * padded + 2 * up(length, BLOCK) * p.width + 2 * length + BLOCK * BLOCK + 2 * PAD * BLOCK;
}

// All of one document and key/value head.
template <int LANES, int ROWS> INLINE void backward_task(const Problem &p, Document document, int64_t kv_head, float *scratch) {
    const int64_t width = p.width, padded = up(width, PAD), length = document.length, stop = up(length, PAD);
    const int64_t matrix = stop * padded, columns = up(stop, BLOCK) * width, sharing = p.heads / p.groups;
    const Range all = {0, length};
    float *k = scratch, *v = k + matrix, *dk = v + matrix, *dv = dk + matrix, *q = dv + matrix, *d_o = q + matrix;
    float *dq = d_o + matrix, *q_columns = dq + matrix, *do_columns = q_columns + columns, *lse = do_columns + columns;
    float *delta = lse + stop, *ds = delta + stop, *weights = ds + BLOCK * BLOCK, *dp = weights + PAD * BLOCK;
    pack(k, p.k, document, kv_head, all, stop, width, padded, 1.0f);
    pack(v, p.v, document, kv_head, all, stop, width, padded, 1.0f);
    memset(dk, 0, size_t(2 * matrix) * sizeof(float));

    for (int64_t head = kv_head * sharing; head < (kv_head + 1) * sharing; head++) {
        pack(q, p.q, document, head, all, stop, width, padded, LOG2_E / sqrtf(float(width)));
        pack(d_o, p.d_o, document, head, all, stop, width, padded, 1.0f);
        memset(dq, 0, size_t(matrix) * sizeof(float));
        memset(lse, 0, size_t(2 * stop) * sizeof(float));
        memcpy(lse, p.lse + head * p.tokens + document.start, size_t(length) * sizeof(float));
        const float *o = p.o.data + document.start * p.o.token + head * p.o.head;
        for (int64_t t = 0; t < length; t++) delta[t] = dot<LANES>(d_o + t * padded, o + t * p.o.token, width);
        for (int64_t i0 = 0; i0 < stop; i0 += BLOCK) {
            transpose(q_columns + i0 * width, q + i0 * padded, smaller(BLOCK, stop - i0), width, padded);
            transpose(do_columns + i0 * width, d_o + i0 * padded, smaller(BLOCK, stop - i0), width, padded);
        }
        for (int64_t j0 = 0; j0 < stop; j0 += BLOCK) {
            const int64_t j_size = smaller(BLOCK, stop - j0);
            for (int64_t i0 = j0; i0 < smaller(stop, j0 + j_size - 1 + p.window); i0 += BLOCK) {
                const int64_t size = smaller(BLOCK, stop - i0);
                for (int64_t j = 0; j < j_size; j += ROWS) {
                    const Range seen = queries_of<LANES, ROWS>(j0 + j, i0, size, p.window);
                    const int64_t seen_size = seen.end - seen.begin, at = (j0 + j) * padded, from = (i0 + seen.begin) * padded;
                    if (seen_size <= 0) continue;
                    multiply<LANES, ROWS, STORE, false>(weights + seen.begin, BLOCK, k + at, padded,
                                                        q_columns + i0 * width + seen.begin, BLOCK, width, seen_size);
                    multiply<LANES, ROWS, STORE, false>(dp + seen.begin, BLOCK, v + at, padded,
                                                        do_columns + i0 * width + seen.begin, BLOCK, width, seen_size);
                    mask<LANES, ROWS>(weights, j0 + j, i0, seen, p.window);
                    for (int64_t n = seen.begin; n < seen.end; n += LANES) {
                        floats<LANES> high = load<LANES>(lse + i0 + n), mean = load<LANES>(delta + i0 + n);
                        UNROLL for (int r = 0; r < ROWS; r++) {
                            float *weight = weights + r * BLOCK + n;
                            floats<LANES> value = exp2<LANES>(load<LANES>(weight) - high);
                            store<LANES>(weight, value);
                            store<LANES>(ds + (j + r) * BLOCK + n, value * (load<LANES>(dp + r * BLOCK + n) - mean));
                        }
                    }
                    multiply<LANES, ROWS, ADD, false>(dv + at, padded, weights + seen.begin, BLOCK, d_o + from, padded,
                                                      seen_size, padded);
                    multiply<LANES, ROWS, ADD, false>(dk + at, padded, ds + j * BLOCK + seen.begin, BLOCK, q + from, padded,
                                                      seen_size, padded);
                }
                for (int64_t i = 0; i < size; i += ROWS) {
                    const Range seen = keys_of<ROWS>(i0 + i, j0, j_size, p.window);
                    if (seen.begin >= seen.end) continue;
                    multiply<LANES, ROWS, ADD, true>(dq + (i0 + i) * padded, padded, ds + seen.begin * BLOCK + i, BLOCK,
                                                     k + (j0 + seen.begin) * padded, padded, seen.end - seen.begin, padded);
                }
            }
        }
        unpack(p.dq + (document.start * p.heads + head) * width, p.heads * width, dq, length, width, padded,
               1.0f / sqrtf(float(width)));
    }
    const int64_t first = (document.start * p.groups + kv_head) * width;
    unpack(p.dk + first, p.groups * width, dk, length, width, padded, LN_2);  // q carries log2(e) / sqrt(K)
    unpack(p.dv + first, p.groups * width, dv, length, width, padded, 1.0f);
}

// --- one function per level; a tile's sums fill half of the vector registers: 32 in AVX-512 and NEON, 16 below -------------

using Forward = void (*)(const Problem &, Document, int64_t, Range, float *);
using Backward = void (*)(const Problem &, Document, int64_t, float *);

#define LEVEL(NAME, TARGET, LANES, ROWS)                                                                          \
    TARGET void forward_##NAME(const Problem &p, Document document, int64_t head, Range chunk, float *scratch) {   \
        forward_task<LANES, ROWS>(p, document, head, chunk, scratch);                                             \
    }                                                                                                             \
    TARGET void backward_##NAME(const Problem &p, Document document, int64_t kv_head, float *scratch) {            \
        backward_task<LANES, ROWS>(p, document, kv_head, scratch);                                                \
    }

#if defined(__x86_64__)
LEVEL(baseline, , 4, 4)
LEVEL(avx2, __attribute__((target("avx2,fma"))), 8, 4)
LEVEL(avx512, __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), 16, 8)
Forward forward_of(int level) { return level == 2 ? forward_avx512 : level == 1 ? forward_avx2 : forward_baseline; }
Backward backward_of(int level) { return level == 2 ? backward_avx512 : level == 1 ? backward_avx2 : backward_baseline; }
#else
LEVEL(baseline, , 4, 8)
Forward forward_of(int) { return forward_baseline; }
Backward backward_of(int) { return backward_baseline; }
#endif

Document document_of(const Problem &p, int64_t i) { return {p.documents[2 * i], p.documents[2 * i + 1]}; }

float *reserve(int64_t values) {
    void *memory = nullptr;
    return posix_memalign(&memory, 64, size_t(values) * sizeof(float)) ? nullptr : (float *)memory;
}

}  // namespace

extern "C" {

// Both return 0, or 1 if there was no memory for the working arrays (the outputs are then not filled).
int puna_attention_forward(const Problem *problem) {
    const Problem &p = *problem;
    const Forward task = forward_of(p.level);
    const int64_t chunks = (p.longest + CHUNK - 1) / CHUNK, per_document = p.heads * chunks;
    int failed = 0;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1) reduction(| : failed)
    {
        float *scratch = reserve(forward_scratch(p));
        failed = !scratch;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < p.count * per_document; i++) {
            Document document = document_of(p, i / per_document);
            int64_t begin = i % chunks * CHUNK, end = smaller(begin + CHUNK, document.length);
            if (scratch && begin < end) task(p, document, i % per_document / chunks, {begin, end}, scratch);
        }
        free(scratch);
    }
    return failed;
}

int puna_attention_backward(const Problem *problem) {
    const Problem &p = *problem;
    const Backward task = backward_of(p.level);
    int failed = 0;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1) reduction(| : failed)
    {
        float *scratch = reserve(backward_scratch(p));
        failed = !scratch;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < p.count * p.groups; i++) {
            Document document = document_of(p, i / p.groups);
            if (scratch && document.length > 0) task(p, document, i % p.groups, scratch);
        }
        free(scratch);
    }
    return failed;
}
}

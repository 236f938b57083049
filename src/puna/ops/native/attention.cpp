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

#include <cfloat>
#include <cmath>
#include <cstdlib>

#include "product.h"

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

struct Document {
    int64_t start, length;
};

// The argument of the C functions, packed in Python (native/attention.py). Outputs are contiguous: o, dq (T, H, K); dk, dv
// (T, G, K). lse (H, T), in powers of two; forward writes it unless it is null.
struct Problem {
    View q, k, v, o, d_o;
    float *out, *lse, *dq, *dk, *dv;
    const Document *documents;
    int64_t count, longest, tokens, heads, groups, width, window;
    int32_t threads, level;
};

constexpr int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
INLINE int64_t clamp(int64_t n, int64_t most) { return n < 0 ? 0 : n > most ? most : n; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// --- a block of queries meets a block of keys --------------------------------------------------------------------------

struct Pair {  // where the two begin in the document, and how many there are: whole vectors and tiles, padded at the end
    int64_t i0, queries, j0, keys, window;
};

// Queries that see any of the ROWS keys from offset j, as offsets; rounded outwards to whole vectors and tiles.
template <int LANES, int ROWS> INLINE Range queries_of(const Pair &pair, int64_t j) {
    constexpr int64_t GRAIN = LANES > ROWS ? LANES : ROWS;
    const int64_t first = pair.j0 + j - pair.i0, last = first + ROWS - 1 + pair.window;
    return {clamp(first, pair.queries) / GRAIN * GRAIN, up(clamp(last, pair.queries), GRAIN)};
}

// Keys that any of the ROWS queries from offset i sees, as offsets; rounded outwards to whole tiles.
template <int ROWS> INLINE Range keys_of(const Pair &pair, int64_t i) {
    const int64_t self = pair.i0 + i - pair.j0;
    return {clamp(self - pair.window + 1, pair.keys) / ROWS * ROWS, clamp(self + ROWS, pair.keys)};
}

// Scores of keys j .. j + ROWS with the queries that see one of them; -inf where a query does not see the key.
template <int LANES, int ROWS>
INLINE void score(float *scores, const Pair &pair, int64_t j, Range seen, const float *k, int64_t k_row, const float *queries,
                  int64_t width) {
    multiply<LANES, ROWS, STORE, false>(scores + seen.begin, BLOCK, k, k_row, queries + seen.begin, BLOCK, width, seen);
    const ints<LANES> least = (ints<LANES>)fill<LANES>(-INFINITY);
    ints<LANES> lane;
    for (int l = 0; l < LANES; l++) lane[l] = l;
    for (int64_t n = seen.begin; n < seen.end; n += LANES) {
        const int64_t ahead = pair.i0 + n - pair.j0 - j;  // of the first query, over the first key
        if (ahead >= ROWS - 1 && ahead + LANES <= pair.window) continue;  // all of them are seen
        UNROLL for (int r = 0; r < ROWS; r++) {
            float *at = scores + r * BLOCK + n;
            ints<LANES> distance = lane + int32_t(ahead - r), value = (ints<LANES>)load<LANES>(at);
            ints<LANES> hidden = (distance | (int32_t(pair.window) - 1 - distance)) >> 31;  // GCC 12 compares lane by lane
            store<LANES>(at, (floats<LANES>)((value & ~hidden) | (least & hidden)));
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
    return 2 * length * padded + 3 * BLOCK * padded + BLOCK * BLOCK;
}

// The running softmax of a block of queries: the highest score so far, the sum of all weights relative to it, and what the
// earlier weights must be multiplied with since this block of keys raised the maximum.
struct Running {
    float most[BLOCK], total[BLOCK], scale[BLOCK];
};

// Scores of one pair of blocks become weights, 2^(score - most).
template <int LANES, int ROWS>
INLINE void softmax(float *scores, Running &running, const Pair &pair, const float *k, int64_t k_row, const float *queries,
                    int64_t width) {
    memcpy(running.scale, running.most, sizeof running.most);  // the maximum before
    for (int64_t j = 0; j < pair.keys; j += ROWS) {
        const Range seen = queries_of<LANES, ROWS>(pair, j);
        score<LANES, ROWS>(scores + j * BLOCK, pair, j, seen, k + j * k_row, k_row, queries, width);
        for (int64_t n = seen.begin; n < seen.end; n += LANES) {
            floats<LANES> most = load<LANES>(running.most + n);
            UNROLL for (int r = 0; r < ROWS; r++) {
                floats<LANES> value = load<LANES>(scores + (j + r) * BLOCK + n);
                most = value > most ? value : most;
            }
            store<LANES>(running.most + n, most);
        }
    }
    for (int64_t n = 0; n < pair.queries; n += LANES) {
        floats<LANES> scale = exp2<LANES>(load<LANES>(running.scale + n) - load<LANES>(running.most + n));
        store<LANES>(running.scale + n, scale);
        store<LANES>(running.total + n, load<LANES>(running.total + n) * scale);
    }
    for (int64_t j = 0; j < pair.keys; j += ROWS) {
        const Range seen = queries_of<LANES, ROWS>(pair, j);
        for (int64_t n = seen.begin; n < seen.end; n += LANES) {
            floats<LANES> most = load<LANES>(running.most + n), total = load<LANES>(running.total + n);
            UNROLL for (int r = 0; r < ROWS; r++) {
                float *at = scores + (j + r) * BLOCK + n;
                floats<LANES> weight = exp2<LANES>(load<LANES>(at) - most);
                store<LANES>(at, weight);
                total += weight;
            }
            store<LANES>(running.total + n, total);
        }
    }
}

// One document, head and chunk of queries.
template <int LANES, int ROWS> INLINE void forward_task(const Problem &p, int64_t index, float *scratch) {
    const int64_t chunks = (p.longest + CHUNK - 1) / CHUNK, head = index / chunks % p.heads;
    const Document document = p.documents[index / chunks / p.heads];
    const int64_t begin = index % chunks * CHUNK, end = smaller(begin + CHUNK, document.length), stop = up(end, PAD);
    if (begin >= end) return;
    const int64_t width = p.width, padded = up(width, PAD), kv_head = head / (p.heads / p.groups);
    const int64_t first_key = clamp(begin - p.window + 1, end) / BLOCK * BLOCK;
    float *k = scratch, *v = k + (stop - first_key) * padded, *out = v + (stop - first_key) * padded;
    float *rows = out + BLOCK * padded, *queries = rows + BLOCK * padded, *scores = queries + BLOCK * padded;
    pack(k, p.k, document, kv_head, {first_key, end}, stop, width, padded, 1.0f);
    pack(v, p.v, document, kv_head, {first_key, end}, stop, width, padded, 1.0f);

    for (int64_t i0 = begin; i0 < end; i0 += BLOCK) {
        const int64_t size = smaller(BLOCK, stop - i0), real = smaller(BLOCK, end - i0);
        pack(rows, p.q, document, head, {i0, i0 + real}, i0 + size, width, padded, LOG2_E / sqrtf(float(width)));
        transpose(queries, rows, size, width, padded);
        memset(out, 0, size_t(BLOCK * padded) * sizeof(float));
        Running running;
        for (int64_t n = 0; n < BLOCK; n++) running.most[n] = -FLT_MAX, running.total[n] = 0.0f;

        for (int64_t j0 = clamp(i0 - p.window + 1, stop) / BLOCK * BLOCK; j0 < i0 + size; j0 += BLOCK) {
            const Pair pair = {i0, size, j0, smaller(BLOCK, stop - j0), p.window};
            const int64_t at = (j0 - first_key) * padded;
            softmax<LANES, ROWS>(scores, running, pair, k + at, padded, queries, width);
            for (int64_t i = 0; i < size; i += ROWS) {
                const Range seen = keys_of<ROWS>(pair, i);  // if there are none, there is nothing to scale either
                if (seen.begin < seen.end)
                    multiply<LANES, ROWS, SCALE_ADD, true>(out + i * padded, padded, scores + seen.begin * BLOCK + i, BLOCK,
                                                           v + at + seen.begin * padded, padded, seen.end - seen.begin,
                                                           {0, padded}, running.scale + i);
            }
        }
        for (int64_t n = 0; n < real; n++) {
            const int64_t token = document.start + i0 + n;
            unpack(p.out + (token * p.heads + head) * width, 0, out + n * padded, 1, width, padded, 1.0f / running.total[n]);
            if (p.lse) p.lse[head * p.tokens + token] = running.most[n] + log2f(running.total[n]);
        }
    }
}

// --- backward ----------------------------------------------------------------------------------------------------------

INLINE int64_t backward_scratch(const Problem &p) {
    int64_t length = up(p.longest, PAD), padded = up(p.width, PAD);
    return 7 * length * padded + 2 * up(length, BLOCK) * p.width + 2 * length + BLOCK * BLOCK;
}

// What one pair of blocks adds to dv and dk; dS is left for dq. Rows of k, v, q, d_o start at the blocks, those of the
// transposed q and d_o, too.
struct Operands {
    const float *k, *v, *q, *d_o, *q_columns, *do_columns, *lse, *delta;
    float *dk, *dv;
};

template <int LANES, int ROWS>
INLINE void key_gradients(const Operands &x, const Pair &pair, int64_t width, int64_t padded, float *ds) {
    float weights[ROWS * BLOCK], dp[ROWS * BLOCK];
    for (int64_t j = 0; j < pair.keys; j += ROWS) {
        const Range seen = queries_of<LANES, ROWS>(pair, j);
        const int64_t at = j * padded, from = seen.begin * padded, count = seen.end - seen.begin;
        if (count <= 0) continue;
        score<LANES, ROWS>(weights, pair, j, seen, x.k + at, padded, x.q_columns, width);
        multiply<LANES, ROWS, STORE, false>(dp + seen.begin, BLOCK, x.v + at, padded, x.do_columns + seen.begin, BLOCK, width,
                                            seen);
        for (int64_t n = seen.begin; n < seen.end; n += LANES) {
            floats<LANES> lse = load<LANES>(x.lse + n), delta = load<LANES>(x.delta + n);
            UNROLL for (int r = 0; r < ROWS; r++) {
                floats<LANES> weight = exp2<LANES>(load<LANES>(weights + r * BLOCK + n) - lse);
                store<LANES>(weights + r * BLOCK + n, weight);
                store<LANES>(ds + (j + r) * BLOCK + n, weight * (load<LANES>(dp + r * BLOCK + n) - delta));
            }
        }
        multiply<LANES, ROWS, ADD, false>(x.dv + at, padded, weights + seen.begin, BLOCK, x.d_o + from, padded, count,
                                          {0, padded});
        multiply<LANES, ROWS, ADD, false>(x.dk + at, padded, ds + j * BLOCK + seen.begin, BLOCK, x.q + from, padded, count,
                                          {0, padded});
    }
}

// One document and key/value head, with all its query heads.
template <int LANES, int ROWS> INLINE void backward_task(const Problem &p, int64_t index, float *scratch) {
    const Document document = p.documents[index / p.groups];
    const int64_t kv_head = index % p.groups, sharing = p.heads / p.groups, width = p.width, padded = up(width, PAD);
    const int64_t length = document.length, stop = up(length, PAD), rows = stop * padded, columns = up(stop, BLOCK) * width;
    const Range all = {0, length};
    float *k = scratch, *v = k + rows, *dk = v + rows, *dv = dk + rows, *q = dv + rows, *d_o = q + rows, *dq = d_o + rows;
    float *q_columns = dq + rows, *do_columns = q_columns + columns, *lse = do_columns + columns, *delta = lse + stop;
    float *ds = delta + stop;
    pack(k, p.k, document, kv_head, all, stop, width, padded, 1.0f);
    pack(v, p.v, document, kv_head, all, stop, width, padded, 1.0f);
    memset(dk, 0, size_t(2 * rows) * sizeof(float));

    for (int64_t head = kv_head * sharing; head < (kv_head + 1) * sharing; head++) {
        pack(q, p.q, document, head, all, stop, width, padded, LOG2_E / sqrtf(float(width)));
        pack(d_o, p.d_o, document, head, all, stop, width, padded, 1.0f);
        memset(dq, 0, size_t(rows) * sizeof(float));
        memset(lse, 0, size_t(2 * stop) * sizeof(float));
        memcpy(lse, p.lse + head * p.tokens + document.start, size_t(length) * sizeof(float));
        const float *o = p.o.data + document.start * p.o.token + head * p.o.head;
        for (int64_t t = 0; t < length; t++) delta[t] = dot<LANES>(d_o + t * padded, o + t * p.o.token, width);
        for (int64_t i0 = 0; i0 < stop; i0 += BLOCK) {
            transpose(q_columns + i0 * width, q + i0 * padded, smaller(BLOCK, stop - i0), width, padded);
            transpose(do_columns + i0 * width, d_o + i0 * padded, smaller(BLOCK, stop - i0), width, padded);
        }
        for (int64_t j0 = 0; j0 < stop; j0 += BLOCK)
            for (int64_t i0 = j0; i0 < smaller(stop, j0 + BLOCK - 1 + p.window); i0 += BLOCK) {
                const Pair pair = {i0, smaller(BLOCK, stop - i0), j0, smaller(BLOCK, stop - j0), p.window};
                const int64_t i_row = i0 * padded, j_row = j0 * padded, column = i0 * width;
                key_gradients<LANES, ROWS>({k + j_row, v + j_row, q + i_row, d_o + i_row, q_columns + column,
                                            do_columns + column, lse + i0, delta + i0, dk + j_row, dv + j_row},
                                           pair, width, padded, ds);
                for (int64_t i = 0; i < pair.queries; i += ROWS) {
                    const Range seen = keys_of<ROWS>(pair, i);
                    multiply<LANES, ROWS, ADD, true>(dq + i_row + i * padded, padded, ds + seen.begin * BLOCK + i, BLOCK,
                                                     k + j_row + seen.begin * padded, padded, seen.end - seen.begin, {0, padded});
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

using Task = void (*)(const Problem &, int64_t, float *);

#define LEVEL(NAME, TARGET, LANES, ROWS)                                                                                     \
    TARGET void forward_##NAME(const Problem &p, int64_t i, float *scratch) { forward_task<LANES, ROWS>(p, i, scratch); }    \
    TARGET void backward_##NAME(const Problem &p, int64_t i, float *scratch) { backward_task<LANES, ROWS>(p, i, scratch); }

#if defined(__x86_64__)
LEVEL(baseline, , 4, 4)
LEVEL(avx2, AVX2, 8, 4)
LEVEL(avx512, AVX512, 16, 8)
Task forward_of(int level) { return level == 2 ? forward_avx512 : level == 1 ? forward_avx2 : forward_baseline; }
Task backward_of(int level) { return level == 2 ? backward_avx512 : level == 1 ? backward_avx2 : backward_baseline; }
#else
LEVEL(baseline, , 4, 8)
Task forward_of(int) { return forward_baseline; }
Task backward_of(int) { return backward_baseline; }
#endif

int run(const Problem &p, Task task, int64_t tasks, int64_t scratch_values) {
    int failed = 0;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1) reduction(| : failed)
    {
        void *scratch = nullptr;
        failed = posix_memalign(&scratch, 64, size_t(scratch_values) * sizeof(float)) != 0;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks; i++)
            if (!failed) task(p, i, (float *)scratch);
        free(scratch);
    }
    return failed;
}

}  // namespace

extern "C" {

// Both return 0, or 1 if there was no memory for the working arrays (the outputs are then not filled).
int puna_attention_forward(const Problem *p) {
    const int64_t chunks = (p->longest + CHUNK - 1) / CHUNK;
    return run(*p, forward_of(p->level), p->count * p->heads * chunks, forward_scratch(*p));
}

int puna_attention_backward(const Problem *p) {
    return run(*p, backward_of(p->level), p->count * p->groups, backward_scratch(*p));
}
}

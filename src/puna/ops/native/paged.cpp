// Attention over a paged KV cache, for prompts in pieces and single new tokens alike; what it offers is in paged.h.
//
// The rows of a task are all queries that share a kv head (tokens x R heads); they meet blocks of 64 keys, aligned at
// positions 0, 64, 128 ...:
//
//   pack      64 keys become columns, keys[x][position], the values stay rows; both in fp32, whatever the cache holds
//   scores    s[row][position] = sum over x of q[row][x] * keys[x][position], x by x
//   softmax   weights 2^(s - most); the highest score so far, and the sums of weights, one per lane of a vector
//   sums      out[row][x] = out * 2^(most before - most) + sum over positions of weight * values[position][x], in order
//
// (Dao 2023, arXiv:2307.08691.) A vector holds neighbouring positions or neighbouring x of one row, never parts of a sum
// that would have to be added across: so it does not matter how many rows are computed together. Blocks that a row does
// not see change nothing: their weights are exactly 0, and 2^0 is exactly 1.
//
// If a sequence has a single new token and R <= FEW, packing would cost more than all the rest: its rows read keys and
// values as they lie. Then a score's sum has a part per lane, which are added up for as many positions at once as there
// are lanes; softmax and sums are the same. So there are two kinds of rows: those of single tokens, and those of pieces
// of two tokens or more. Rows of one kind are the same bit for bit in any company; between the kinds the last bits of
// the scores differ (1e-6 of an output). The kind depends on the sequence's own number of new tokens alone, never on
// how a piece is cut into tasks.
//
// Every SPLIT positions a partial result is closed and merged into the row's total, in order. Long contexts can so be
// divided between threads without a bit changing (as in flash-decoding, but with splits fixed by position).

#include "paged.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <new>
#include <utility>

#include "paged_numbers.h"
#include "product.h"

namespace {

using paged::Call;
using paged::Plan;
using paged::Task;

constexpr int64_t BLOCK = 64;          // positions of one block
constexpr int64_t SPLIT = 512;         // positions of one partial result
constexpr int64_t CHUNK = 512;         // most rows of one task: keys are packed anew for each
constexpr int64_t FEW = 3;             // most rows of a single token that read keys and values as they lie
constexpr int64_t AHEAD = 4;           // tokens whose rows are fetched ahead: they lie too far apart to be foreseen
constexpr int64_t PAD = 16;            // values of the widest vector
constexpr int64_t ONE_CORE = 1 << 18;  // multiplications below which waking a second core takes longer
constexpr float LOG2_E = 1.44269504f;

constexpr int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Numbers of a cache in a word, and numbers of a row in working memory: whole vectors of words.
INLINE int64_t parts_of(const Call &p) { return p.cache_kind == paged::FLOAT32 ? 1 : p.cache_kind < paged::INT8 ? 2 : 4; }
INLINE int64_t padded_of(const Call &p) { return up(p.width, PAD * parts_of(p)); }

// `numbers` behind row: an address that may lie behind the array, as it is only fetched.
template <int WRITE, typename C> INLINE void fetch(const C *row, int64_t numbers, int64_t width) {
    const uintptr_t at = uintptr_t(row) + uintptr_t(numbers) * sizeof(C);
    for (int64_t byte = 0; byte < width * int64_t(sizeof(C)); byte += 64) __builtin_prefetch((const void *)(at + byte), WRITE);
}

// --- the new rows --------------------------------------------------------------------------------------------------------

template <typename T, typename C> INLINE void write_row(C *to, const T *from, int64_t width, float scale) {
    if (scale == 1.0f)
        for (int64_t x = 0; x < width; x++) keep(widen(from[x]), to + x);
    else
        for (int64_t x = 0; x < width; x++) keep(widen(from[x]) / scale, to + x);
}

template <typename T, typename C>
void write_rows(C *to, const Call &p, const paged::Rows &rows, const float *scales, int64_t begin, int64_t end) {
    const auto slot = [&](int64_t t) { return p.slots[t] / p.page_size * p.page + p.slots[t] % p.page_size * p.width; };
    for (int64_t t = begin; t < end; t++)
        for (int64_t g = 0, at = slot(t), next = slot(std::min(t + AHEAD, end - 1)); g < p.groups; g++) {
            const T *from = (const T *)rows.data + t * rows.token + g * rows.head;
            fetch<1>(to, next + g * p.head, p.width);
            write_row(to + at + g * p.head, from, p.width, scales ? scales[g * p.scale_step] : 1.0f);
        }
}
template <typename T, typename C> void write_both(const Call &p, int64_t begin, int64_t end) {
    write_rows<T>((C *)p.keys, p, p.k, p.key_scales, begin, end);
    write_rows<T>((C *)p.values, p, p.v, p.value_scales, begin, end);
}

// --- keys and values of a block -------------------------------------------------------------------------------------------

template <int LANES, int D, int... I>
INLINE void exchange(floats<LANES> &a, floats<LANES> &b, std::integer_sequence<int, I...>) {
    const floats<LANES> first = a, second = b;
#if defined(__clang__)
    a = __builtin_shufflevector(first, second, ((I & D) ? LANES + I - D : I)...);
    b = __builtin_shufflevector(first, second, ((I & D) ? LANES + I : I + D)...);
#else
    a = __builtin_shuffle(first, second, ints<LANES>{((I & D) ? LANES + I - D : I)...});
    b = __builtin_shuffle(first, second, ints<LANES>{((I & D) ? LANES + I : I + D)...});
#endif
}

// LANES x LANES numbers, rows become columns: blocks of D x D change places, for D = 1, 2, 4, ...
template <int LANES, int D = 1> INLINE void transpose(floats<LANES> *rows) {
    if constexpr (D < LANES) {
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            const int at = i / D * 2 * D + i % D;
            exchange<LANES, D>(rows[at], rows[at + D], std::make_integer_sequence<int, LANES>());
        }
        transpose<LANES, 2 * D>(rows);
    }
}

// Where the rows of some positions begin, counted from keys and from values alike.
INLINE void locate(int64_t *offsets, const Call &p, const Task &task, int64_t first, int64_t end) {
    for (int64_t at = first; at < end;) {
        const int64_t row = at % p.page_size, stop = std::min(end, at + p.page_size - row);
        int64_t offset = task.table[at / p.page_size] * p.page + task.group * p.head + row * p.width;
        for (; at < stop; at++, offset += p.width) *offsets++ = offset;
    }
}

// `count` rows of a block; of the block behind it, `ahead` rows are fetched. Columns behind `count` repeat its last row.
template <int LANES, typename C>
INLINE void pack(float *keys, float *values, const Call &p, const int64_t *offsets, int64_t count, int64_t ahead) {
    const int64_t width = p.width, padded = padded_of(p);
    const C *k = (const C *)p.keys, *v = (const C *)p.values;
    for (int64_t j = 0; j < count; j += LANES) {
        const C *rows[LANES];
        UNROLL_16 for (int l = 0; l < LANES; l++) rows[l] = k + offsets[std::min(j + l, count - 1)];
        for (int64_t l = j; l < std::min(j + LANES, ahead); l++) {
            fetch<0>(k, offsets[BLOCK + l], width);
            fetch<0>(v, offsets[BLOCK + l], width);
        }
        for (int64_t x = 0; x < width; x += LANES * PARTS<C>) {
            floats<LANES> parts[LANES][PARTS<C>], square[LANES];
            UNROLL_16 for (int l = 0; l < LANES; l++) widen_words<LANES>(rows[l] + x, width - x, parts[l]);
            UNROLL for (int n = 0; n < PARTS<C>; n++) {
                UNROLL_16 for (int l = 0; l < LANES; l++) square[l] = parts[l][n];
                transpose<LANES>(square);
                UNROLL_16 for (int l = 0; l < LANES; l++) store<LANES>(keys + (x + l * PARTS<C> + n) * BLOCK + j, square[l]);
            }
        }
    }
    for (int64_t j = 0; j < count; j++)  // the parts of LANES words one after another: `give` puts them in order
        for (int64_t x = 0; x < width; x += LANES * PARTS<C>) {
            floats<LANES> parts[PARTS<C>];
            widen_words<LANES>(v + offsets[j] + x, width - x, parts);
            UNROLL for (int n = 0; n < PARTS<C>; n++) store<LANES>(values + j * padded + x + n * LANES, parts[n]);
        }
}

template <int LANES>
INLINE void pack(float *keys, float *values, const Call &p, const int64_t *offsets, int64_t count, int64_t ahead) {
    switch (p.cache_kind) {
        case paged::FLOAT32: return pack<LANES, float>(keys, values, p, offsets, count, ahead);
        case paged::BFLOAT16: return pack<LANES, bf16>(keys, values, p, offsets, count, ahead);
        case paged::FLOAT16: return pack<LANES, half>(keys, values, p, offsets, count, ahead);
        case paged::INT8: return pack<LANES, int8>(keys, values, p, offsets, count, ahead);
        default: return pack<LANES, float8>(keys, values, p, offsets, count, ahead);
    }
}

// --- rows meet a block -----------------------------------------------------------------------------------------------------

// Sums of some rows: `out` (rows, padded), `total` (rows, PAD): a vector each, `most` (rows).
struct State {
    float *out, *total, *most;
    int64_t rows, padded;

    State(float *at, int64_t rows, int64_t padded)
        : out(at), total(out + rows * padded), most(total + rows * PAD), rows(rows), padded(padded) {}
    static int64_t size(int64_t rows, int64_t padded) { return rows * (padded + PAD) + up(rows, PAD); }
    void clear() {
        memset(out, 0, size_t(rows * (padded + PAD)) * sizeof(float));
        for (int64_t i = 0; i < rows; i++) most[i] = -FLT_MAX;
    }
};

struct Block {
    const float *keys, *values;  // (K, BLOCK), (BLOCK, padded)
    int64_t position;            // of the first
};

// ROWS rows of c, columns [begin, end), a multiple of LANES.
template <int LANES, int ROWS, int VECS, Into INTO>
INLINE void multiply(float *c, int64_t c_row, const float *a, int64_t a_row, const float *b, int64_t b_row, int64_t inner,
                     int64_t begin, int64_t end) {
    for (; begin + VECS * LANES <= end; begin += VECS * LANES)
        tile<LANES, ROWS, VECS, INTO, false>(c + begin, c_row, a, a_row, b + begin, b_row, inner, nullptr);
    if constexpr (VECS > 1)
        multiply<LANES, ROWS, VECS / 2, INTO>(c, c_row, a, a_row, b, b_row, inner, begin, end);
}

template <int LANES> INLINE float highest(const floats<LANES> &v) {
    if constexpr (LANES == 1) {
        return v[0];
    } else if constexpr (LANES == 4) {
        const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
        return a > b ? a : b;
    } else {
        floats<LANES / 2> halves[2];
        memcpy(halves, &v, sizeof v);
        return highest<LANES / 2>(halves[0] > halves[1] ? halves[0] : halves[1]);
    }
}

// What is not in [begin, end) of scores [from, to) becomes -infinity; returns the highest.
template <int LANES> INLINE float hide(float *scores, int64_t begin, int64_t end, int64_t from, int64_t to) {
    const ints<LANES> least = (ints<LANES>)fill<LANES>(-INFINITY);
    floats<LANES> top = fill<LANES>(-FLT_MAX);
    ints<LANES> lane;
    for (int l = 0; l < LANES; l++) lane[l] = l;
    for (int64_t j = from; j < to; j += LANES) {
        floats<LANES> value = load<LANES>(scores + j);
        if (j < begin || j + LANES > end) {
            ints<LANES> at = lane + int32_t(j - begin);
            ints<LANES> hidden = (at | (int32_t(end - begin) - 1 - at)) >> 31;  // GCC 12 compares lane by lane
            value = (floats<LANES>)(((ints<LANES>)value & ~hidden) | (least & hidden));
            store<LANES>(scores + j, value);
        }
        top = value > top ? value : top;
    }
    return highest<LANES>(top);
}

// Scores become weights, 2^(score - most), and their sums, lane by lane, go to `total`.
template <int LANES> INLINE void weigh(float *scores, int64_t from, int64_t to, float most, float scale, float *total) {
    floats<LANES> sums = {};
    for (int64_t j = from; j < to; j += LANES) {
        const floats<LANES> weight = exp2<LANES>(load<LANES>(scores + j) - most);
        store<LANES>(scores + j, weight);
        sums += weight;
    }
    store<LANES>(total, load<LANES>(total) * scale + sums);
}

// By itself, not on the way to a sum: in a * b + c * d it is the compiler's choice which product is rounded.
template <int LANES> INLINE void multiply_by(float *row, float scale, int64_t count) {
    for (int64_t x = 0; x < count; x += LANES) store<LANES>(row + x, load<LANES>(row + x) * scale);
}

// Scores [from, to) of rows i .. i + ROWS become weights, and what the rows have summed up so far is scaled down to them.
// `base`: the first token's position, counted from the block's.
template <int LANES, int ROWS>
INLINE void soften(float *scores, const Call &p, int64_t base, int64_t sharing, State &state, int64_t i, int64_t from,
                   int64_t to) {
    float scale[PAD] __attribute__((aligned(64))) = {}, *most = state.most + i;
    for (int r = 0; r < ROWS; r++) {
        const int64_t self = base + (i + r) / sharing, oldest = std::max(self - p.window + 1, int64_t(0));
        const float top = hide<LANES>(scores + r * BLOCK, oldest, std::min(self + 1, BLOCK), from, to);
        scale[r] = top > most[r] ? most[r] - top : 0.0f;
        most[r] = top > most[r] ? top : most[r];
    }
    for (int r = 0; r < ROWS; r += LANES) store<LANES>(scale + r, exp2<LANES>(load<LANES>(scale + r)));
    for (int r = 0; r < ROWS; r++)
        weigh<LANES>(scores + r * BLOCK, from, to, most[r], scale[r], state.total + (i + r) * PAD);
    for (int r = 0; r < ROWS; r++)
        if (scale[r] != 1.0f) multiply_by<LANES>(state.out + (i + r) * state.padded, scale[r], state.padded);
}

// Rows i .. i + ROWS of a task with one block. A tile's sums fill half of the vector registers.
template <int LANES, int ROWS>
INLINE void meet(const Call &p, const Task &task, const float *queries, State &state, const Block &block, int64_t i) {
    constexpr int VECS = ROWS == 8 || (ROWS == 4 && LANES < 16) ? 2 : 4;
    const int64_t sharing = p.heads / p.groups, base = task.position - block.position, padded = state.padded;
    const int64_t last = std::min(base + (i + ROWS - 1) / sharing + 1, BLOCK);
    const int64_t first = std::max(base + i / sharing - p.window + 1, int64_t(0));
    if (first >= last) return;
    const int64_t from = first / LANES * LANES, to = up(last, LANES);
    float scores[ROWS * BLOCK] __attribute__((aligned(64)));
    multiply<LANES, ROWS, VECS, STORE>(scores, BLOCK, queries + i * padded, padded, block.keys, BLOCK, p.width, from, to);
    soften<LANES, ROWS>(scores, p, base, sharing, state, i, from, to);
    multiply<LANES, ROWS, VECS, ADD>(state.out + i * padded, padded, scores + first, BLOCK, block.values + first * padded, padded,
                                     last - first, 0, padded);
}

template <int LANES, int ROWS>
INLINE void meet_all(const Call &p, const Task &task, const float *queries, State &state, const Block &block) {
    int64_t i = 0;
    if constexpr (ROWS >= 8)
        for (; i + 8 <= state.rows; i += 8) meet<LANES, 8>(p, task, queries, state, block, i);
    for (; i + 4 <= state.rows; i += 4) meet<LANES, 4>(p, task, queries, state, block, i);
    if (i + 2 <= state.rows) {
        meet<LANES, 2>(p, task, queries, state, block, i);
        i += 2;
    }
    if (i < state.rows) meet<LANES, 1>(p, task, queries, state, block, i);
}

// --- a single new token: its rows read keys and values as they lie -----------------------------------------------------------

// LANES vectors become one: lane l has the sum of vector l.
template <int LANES, int D = LANES / 2> INLINE floats<LANES> add_up(floats<LANES> *vectors) {
    UNROLL for (int i = 0; i < D; i++) {
        exchange<LANES, D>(vectors[i], vectors[i + D], std::make_integer_sequence<int, LANES>());
        vectors[i] += vectors[i + D];
    }
    if constexpr (D > 1) add_up<LANES, D / 2>(vectors);
    return vectors[0];
}

// sums[row * EACH + l] += a vector of words from each query, its parts in order, times one from keys[l] + x.
template <int LANES, int ROWS, typename C>
INLINE void add_word(floats<LANES> *sums, const float *queries, int64_t padded, const C *const *keys, int64_t x) {
    constexpr int EACH = LANES / ROWS;
    UNROLL_16 for (int l = 0; l < EACH; l++) {
        floats<LANES> parts[PARTS<C>];
        widen_words<LANES>(keys[l] + x, LANES * PARTS<C>, parts);
        UNROLL for (int n = 0; n < PARTS<C>; n++)
            UNROLL for (int r = 0; r < ROWS; r++)
                sums[r * EACH + l] += parts[n] * load<LANES>(queries + r * padded + n * LANES);
    }
}

// Scores [from, to) of ROWS rows, LANES / ROWS positions at once, so that the vectors to add up are as many as lanes.
// Positions behind `count` repeat the last one; of the block behind this one, `ahead` rows are fetched.
template <int LANES, int ROWS, typename C>
INLINE void dots(float *scores, const Call &p, const float *queries, int64_t padded, const int64_t *offsets, int64_t count,
                 int64_t ahead, int64_t from, int64_t to) {
    constexpr int64_t EACH = LANES / ROWS, WORD = LANES * PARTS<C>;
    const int64_t width = p.width, whole = width / WORD * WORD;
    const C *keys = (const C *)p.keys, *values = (const C *)p.values;
    C ends[EACH][WORD];
    if (whole < width) memset(ends, 0, sizeof ends);
    for (int64_t j = from; j < to; j += EACH) {
        const C *rows[EACH];
        UNROLL_16 for (int l = 0; l < EACH; l++) rows[l] = keys + offsets[std::min(j + l, count - 1)];
        for (int64_t l = j; l < std::min(j + EACH, ahead); l++) {
            fetch<0>(keys, offsets[BLOCK + l], width);
            fetch<0>(values, offsets[BLOCK + l], width);
        }
        floats<LANES> sums[LANES] = {};
        for (int64_t x = 0; x < whole; x += WORD) add_word<LANES, ROWS>(sums, queries + x, padded, rows, x);
        if (whole < width) {
            for (int64_t l = 0; l < EACH; l++)
                rows[l] = (const C *)memcpy(ends[l], rows[l] + whole, size_t(width - whole) * sizeof(C));
            add_word<LANES, ROWS>(sums, queries + whole, padded, rows, 0);
        }
        floats<LANES> total = add_up<LANES>(sums);
        UNROLL for (int r = 0; r < ROWS; r++)
            memcpy(scores + r * BLOCK + j, (const float *)&total + r * EACH, EACH * sizeof(float));
    }
}

// out += weights times values of `count` positions: WORDS vectors of words from each row, the sums in registers. `left`:
// numbers of a row from here on, fewer than the vectors take only at its end.
template <int LANES, int ROWS, int WORDS, typename C>
INLINE void add_words(float *out, int64_t padded, const float *weights, const C *values, const int64_t *offsets, int64_t count,
                      int64_t left) {
    constexpr int VECS = WORDS * PARTS<C>;
    floats<LANES> sums[ROWS][VECS];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int n = 0; n < VECS; n++) sums[r][n] = load<LANES>(out + r * padded + n * LANES);
    for (int64_t j = 0; j < count; j++) {
        floats<LANES> parts[VECS];
        UNROLL for (int n = 0; n < WORDS; n++)
            widen_words<LANES>(values + offsets[j] + n * LANES * PARTS<C>, left, parts + n * PARTS<C>);
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int n = 0; n < VECS; n++) sums[r][n] += weights[r * BLOCK + j] * parts[n];
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int n = 0; n < VECS; n++) store<LANES>(out + r * padded + n * LANES, sums[r][n]);
}

template <int LANES, int ROWS, int WORDS, typename C>
INLINE void add_values(float *out, int64_t padded, const float *weights, const C *values, const int64_t *offsets, int64_t count,
                       int64_t width) {
    constexpr int64_t WORD = LANES * PARTS<C>, STEP = WORDS * WORD;
    for (; width >= STEP; width -= STEP, out += STEP, values += STEP)
        add_words<LANES, ROWS, WORDS>(out, padded, weights, values, offsets, count, STEP);
    if constexpr (WORDS > 1)
        add_values<LANES, ROWS, WORDS / 2>(out, padded, weights, values, offsets, count, width);
    else if (width)
        add_words<LANES, ROWS, 1>(out, padded, weights, values, offsets, count, width);
}

// Rows i .. i + ROWS of a single token with the block at position `at`, whose rows lie at the offsets.
template <int LANES, int ROWS, typename C>
INLINE void meet_few(const Call &p, const Task &task, const float *queries, State &state, const int64_t *offsets, int64_t at,
                     int64_t ahead, int64_t i) {
    constexpr int VECS = LANES < 16 && ROWS > 1 ? 4 : 8, WORDS = VECS > PARTS<C> ? VECS / PARTS<C> : 1;
    const int64_t base = task.position - at, padded = state.padded, last = std::min(base + 1, BLOCK);
    const int64_t first = std::max(base - p.window + 1, int64_t(0)), from = first / LANES * LANES, to = up(last, LANES);
    float scores[ROWS * BLOCK] __attribute__((aligned(64)));
    dots<LANES, ROWS, C>(scores, p, queries + i * padded, padded, offsets, last, i ? 0 : ahead, from, to);
    soften<LANES, ROWS>(scores, p, base, state.rows, state, i, from, to);
    add_values<LANES, ROWS, WORDS>(state.out + i * padded, padded, scores + first, (const C *)p.values, offsets + first,
                                   last - first, p.width);
}

// All blocks of positions [first, end), the partial result of a single token.
template <int LANES, typename C>
INLINE void compute_few(const Call &p, const Task &task, const float *queries, State &state, const int64_t *offsets,
                        int64_t first, int64_t end) {
    for (int64_t at = first; at < end; at += BLOCK, offsets += BLOCK) {
        const int64_t ahead = std::min(end - at - BLOCK, BLOCK);
        int64_t i = 0;
        for (; i + 2 <= state.rows; i += 2) meet_few<LANES, 2, C>(p, task, queries, state, offsets, at, ahead, i);
        if (i < state.rows) meet_few<LANES, 1, C>(p, task, queries, state, offsets, at, ahead, i);
    }
}

template <int LANES>
INLINE void compute_few(const Call &p, const Task &task, const float *queries, State &state, const int64_t *offsets,
                        int64_t first, int64_t end) {
    switch (p.cache_kind) {
        case paged::FLOAT32: return compute_few<LANES, float>(p, task, queries, state, offsets, first, end);
        case paged::BFLOAT16: return compute_few<LANES, bf16>(p, task, queries, state, offsets, first, end);
        case paged::FLOAT16: return compute_few<LANES, half>(p, task, queries, state, offsets, first, end);
        case paged::INT8: return compute_few<LANES, int8>(p, task, queries, state, offsets, first, end);
        default: return compute_few<LANES, float8>(p, task, queries, state, offsets, first, end);
    }
}

// A query's numbers in the order in which the parts of its words meet those of the keys; zeros behind them.
template <int LANES> INLINE void spread(float *query, int64_t width, int64_t padded, int64_t parts) {
    float words[PAD * 4];
    for (int64_t x = width; x < padded; x++) query[x] = 0.0f;
    for (int64_t first = 0; first < padded; first += LANES * parts) {
        memcpy(words, query + first, size_t(LANES * parts) * sizeof(float));
        for (int64_t l = 0; l < LANES; l++)
            for (int64_t n = 0; n < parts; n++) query[first + n * LANES + l] = words[l * parts + n];
    }
}

// --- a task ------------------------------------------------------------------------------------------------------------------

// Positions packed at once. A few rows take each block while it is in the first-level cache; many rows take a split.
INLINE int64_t panel_of(int64_t rows) { return rows > BLOCK ? SPLIT : BLOCK; }

INLINE int64_t scratch_of(int64_t rows, int64_t padded) {
    return rows * padded + 2 * State::size(rows, padded) + 2 * panel_of(rows) * padded + SPLIT * 2;
}

// Queries (rows, padded), row = token * R + head; scaled so that a power of two is all softmax needs.
template <typename T> INLINE void take(float *queries, const Call &p, const Task &task) {
    const int64_t sharing = p.heads / p.groups, padded = padded_of(p);
    const float k_scale = p.key_scales ? p.key_scales[task.group * p.scale_step] : 1.0f;
    const float scale = LOG2_E / sqrtf(float(p.width)) * k_scale;
    for (int64_t t = 0; t < task.tokens; t++)
        for (int64_t r = 0; r < sharing; r++, queries += padded) {
            const T *from = (const T *)p.q.data + (task.token + t) * p.q.token + (task.group * sharing + r) * p.q.head;
            fetch<0>(from, AHEAD * p.q.token, p.width);
            for (int64_t x = 0; x < p.width; x++) queries[x] = widen(from[x]) * scale;
        }
}

// Rows that end within a vector of words must be copied before they are read: that costs more than packing.
template <int LANES> INLINE bool is_few(const Call &p, const Task &task) {
    return task.alone && p.heads / p.groups <= FEW && p.width % (LANES * parts_of(p)) == 0;
}

// The partial result of positions [first, end), at most a split.
template <int LANES, int ROWS>
INLINE void compute(const Call &p, const Task &task, const float *queries, State &state, int64_t first, int64_t end,
                    float *panel) {
    const int64_t size = panel_of(state.rows), padded = state.padded;
    float *keys = panel, *values = keys + size * padded;
    int64_t *offsets = (int64_t *)(values + size * padded);
    first = std::max(first, std::max(task.position - p.window + 1, int64_t(0)) / BLOCK * BLOCK);
    locate(offsets, p, task, first, end);
    state.clear();
    if (is_few<LANES>(p, task)) return compute_few<LANES>(p, task, queries, state, offsets, first, end);
    for (int64_t begin = first; begin < end; begin += size) {
        const int64_t stop = std::min(begin + size, end);
        for (int64_t at = begin; at < stop; at += BLOCK) {
            const int64_t to = (at - begin) * padded, ahead = std::min(end - at - BLOCK, BLOCK);
            pack<LANES>(keys + to, values + to, p, offsets + at - first, std::min(BLOCK, stop - at), ahead);
        }
        for (int64_t at = begin; at < stop; at += BLOCK) {
            const int64_t to = (at - begin) * padded;
            meet_all<LANES, ROWS>(p, task, queries, state, {keys + to, values + to, at});
        }
    }
}

// A later partial result goes into an earlier one.
template <int LANES> INLINE void merge(State &into, const State &part) {
    for (int64_t i = 0; i < into.rows; i++) {
        const float most = into.most[i] > part.most[i] ? into.most[i] : part.most[i];
        const float down = exp2<LANES>(fill<LANES>(into.most[i] - most))[0];
        const floats<LANES> scale = exp2<LANES>(fill<LANES>(part.most[i] - most));
        float *total = into.total + i * PAD, *out = into.out + i * into.padded;
        multiply_by<LANES>(total, down, LANES);
        multiply_by<LANES>(out, down, into.padded);
        store<LANES>(total, load<LANES>(total) + load<LANES>(part.total + i * PAD) * scale);
        for (int64_t x = 0; x < into.padded; x += LANES)
            store<LANES>(out + x, load<LANES>(out + x) + load<LANES>(part.out + i * part.padded + x) * scale);
        into.most[i] = most;
    }
}

template <int LANES, typename T> INLINE void give(const Call &p, const Task &task, const State &state) {
    const int64_t sharing = p.heads / p.groups, parts = parts_of(p), vectors = LANES * parts;
    const float v_scale = p.value_scales ? p.value_scales[task.group * p.scale_step] : 1.0f;
    for (int64_t i = 0; i < state.rows; i++) {
        const float *row = state.out + i * state.padded, scale = v_scale / sum<LANES>(load<LANES>(state.total + i * PAD));
        const int64_t head = task.group * sharing + i % sharing;
        T *to = (T *)p.out.data + (task.token + i / sharing) * p.out.token + head * p.out.head;
        fetch<1>(to, AHEAD * p.out.token, p.width);
        if (parts == 1) {
            for (int64_t x = 0; x < p.width; x++) keep(row[x] * scale, to + x);
            continue;
        }
        for (int64_t first = 0; first < p.width; first += vectors)
            for (int64_t l = 0; l < LANES; l++)
                for (int64_t n = 0; n < parts && first + l * parts + n < p.width; n++)
                    keep(row[first + n * LANES + l] * scale, to + first + l * parts + n);
    }
}

INLINE void take_any(float *queries, const Call &p, const Task &task) {
    switch (p.kind) {
        case paged::FLOAT32: return take<float>(queries, p, task);
        case paged::BFLOAT16: return take<bf16>(queries, p, task);
        default: return take<half>(queries, p, task);
    }
}
template <int LANES> INLINE void give_any(const Call &p, const Task &task, const State &state) {
    switch (p.kind) {
        case paged::FLOAT32: return give<LANES, float>(p, task, state);
        case paged::BFLOAT16: return give<LANES, bf16>(p, task, state);
        default: return give<LANES, half>(p, task, state);
    }
}

template <int LANES, int ROWS> INLINE void task_of(const Call &p, Plan &plan, const Task &task, float *scratch) {
    const int64_t padded = padded_of(p), rows = task.tokens * (p.heads / p.groups), size = State::size(rows, padded);
    float *queries = scratch, *merged_at = queries + rows * padded, *part_at = merged_at + size, *panel = part_at + size;
    Plan::Unit *unit = task.unit < 0 ? nullptr : &plan.units[size_t(task.unit)];
    float *partials = plan.partials.data() + (unit ? unit->partials : 0);
    if (unit) part_at = partials + task.part * size;
    State merged(merged_at, rows, padded), part(part_at, rows, padded);
    take_any(queries, p, task);
    if (is_few<LANES>(p, task))
        for (int64_t i = 0; i < rows; i++) spread<LANES>(queries + i * padded, p.width, padded, parts_of(p));
    for (int64_t first = task.first; first < task.end; first += SPLIT) {
        State &into = unit || first > task.first ? part : merged;  // an empty result and a part are the part itself
        compute<LANES, ROWS>(p, task, queries, into, first, std::min(first + SPLIT, task.end), panel);
        if (!unit && first > task.first) merge<LANES>(merged, part);
    }
    if (unit) {
        if (__atomic_add_fetch(&unit->finished, 1, __ATOMIC_ACQ_REL) < unit->parts) return;
        unit->finished = 0;  // for the next layer
        merged.clear();
        for (int64_t i = 0; i < unit->parts; i++) merge<LANES>(merged, State(partials + i * size, rows, padded));
    }
    give_any<LANES>(p, task, merged);
}

// One function per level; a tile's sums fill half of the vector registers: 32 in AVX-512 and NEON, 16 below.
#if defined(__x86_64__)
void task_baseline(const Call &p, Plan &plan, const Task &task, float *s) { task_of<4, 4>(p, plan, task, s); }
AVX2 void task_avx2(const Call &p, Plan &plan, const Task &task, float *s) { task_of<8, 4>(p, plan, task, s); }
AVX512 void task_avx512(const Call &p, Plan &plan, const Task &task, float *s) { task_of<16, 8>(p, plan, task, s); }
auto task_at(int level) { return level == 2 ? task_avx512 : level == 1 ? task_avx2 : task_baseline; }
#else
void task_baseline(const Call &p, Plan &plan, const Task &task, float *s) { task_of<4, 8>(p, plan, task, s); }
auto task_at(int) { return task_baseline; }
#endif

// --- dividing the work ---------------------------------------------------------------------------------------------------

using Writer = void (*)(const Call &, int64_t, int64_t);

template <typename T> Writer writer_of(int cache_kind) {
    switch (cache_kind) {
        case paged::FLOAT32: return write_both<T, float>;
        case paged::BFLOAT16: return write_both<T, bf16>;
        case paged::FLOAT16: return write_both<T, half>;
        case paged::INT8: return write_both<T, int8>;
        default: return write_both<T, float8>;
    }
}

// Tokens `token` .. `token + tokens` of a sequence, all kv heads; `length` positions, the new ones included.
struct Piece {
    int64_t token, tokens, position, first, length;
    const int32_t *table;
    bool alone;  // no other new token of its sequence
    int64_t cost() const { return tokens * (length - first); }
};

std::vector<Piece> pieces_of(const Call &p, int64_t workers) {
    const int64_t rows = std::clamp(p.tokens * p.heads / (4 * workers), BLOCK, CHUNK);  // four to a core are even enough
    const int64_t most = std::max(rows * p.groups / p.heads, int64_t(1));
    std::vector<Piece> pieces;
    for (int64_t b = 0; b < p.sequences; b++) {
        const int64_t start = p.starts[b], count = p.starts[b + 1] - start, before = p.lengths[b] - count;
        for (int64_t t = 0; t < count; t += most) {
            const int64_t tokens = std::min(most, count - t), position = before + t;
            const int64_t first = std::max(position - p.window + 1, int64_t(0)) / SPLIT * SPLIT;
            pieces.push_back({start + t, tokens, position, first, position + tokens, p.tables + b * p.table_row, count == 1});
        }
    }
    // The largest first, so that no core is left with one at the end.
    std::stable_sort(pieces.begin(), pieces.end(), [](const Piece &a, const Piece &b) { return a.cost() > b.cost(); });
    return pieces;
}

}  // namespace

namespace paged {

void plan(const Call &p, int64_t workers, Plan &plan) {
    const std::vector<Piece> pieces = pieces_of(p, workers);
    const int64_t sharing = p.heads / p.groups, padded = padded_of(p);
    int64_t cost = 0, partials = 0;
    for (const Piece &piece : pieces) cost += piece.cost() * p.groups;
    plan.tasks.clear();
    plan.units.clear();
    plan.scratch = 0;
    for (const Piece &piece : pieces) {
        const int64_t rows = piece.tokens * sharing, parts = (piece.length - piece.first + SPLIT - 1) / SPLIT;
        const bool whole = workers == 1 || parts == 1 || piece.cost() * workers * 4 < cost;
        plan.scratch = std::max(plan.scratch, up(scratch_of(rows, padded), PAD));
        for (int64_t g = 0; g < p.groups; g++) {
            Task task = {piece.token, piece.tokens, piece.position, g, piece.first, piece.length, piece.table, -1, 0, piece.alone};
            if (whole) {
                plan.tasks.push_back(task);
                continue;
            }
            task.unit = int64_t(plan.units.size());
            plan.units.push_back({partials, parts, 0});
            partials += parts * State::size(rows, padded);
            for (; task.part < parts; task.part++) {
                task.first = piece.first + task.part * SPLIT;
                task.end = std::min(task.first + SPLIT, piece.length);
                plan.tasks.push_back(task);
            }
        }
    }
    if (int64_t(plan.partials.size()) < partials) plan.partials.resize(size_t(partials));
}

void write(const Call &p, int64_t begin, int64_t end) {
    const Writer writer = p.kind == FLOAT32    ? writer_of<float>(p.cache_kind)
                          : p.kind == BFLOAT16 ? writer_of<bf16>(p.cache_kind)
                                               : writer_of<half>(p.cache_kind);
    writer(p, begin, end);
}

void attend(const Call &p, Plan &plan, int64_t task, float *scratch) {
    task_at(p.level)(p, plan, plan.tasks[size_t(task)], scratch);
}

}  // namespace paged

extern "C" {

// Writes the new rows, then attends; 0, or 1 if there was no memory for the working arrays (`out` is then not filled).
int puna_paged_attention(const Call *call) {
    const Call &p = *call;
    Plan plan;
    int failed = 0;
    try {
        paged::plan(p, p.threads, plan);
    } catch (const std::bad_alloc &) {
        return 1;
    }
    int64_t seen = 0;
    for (const Task &task : plan.tasks) seen += task.tokens * (task.end - task.first);
    const bool many = p.threads > 1 && seen * (p.heads / p.groups) * p.width > ONE_CORE;
#pragma omp parallel num_threads(p.threads) if (many) reduction(| : failed)
    {
        void *scratch = nullptr;
        failed = posix_memalign(&scratch, 64, size_t(plan.scratch) * sizeof(float)) != 0;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < p.tokens; t += BLOCK) paged::write(p, t, std::min(t + BLOCK, p.tokens));
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < int64_t(plan.tasks.size()); i++)
            if (!failed) paged::attend(p, plan, i, (float *)scratch);
        free(scratch);
    }
    return failed;
}
}

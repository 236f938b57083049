// y = x W^T (+ bias) for a few rows of x and a weight in llama.cpp's own blocks, read as the file holds them; and blocks
// as numbers. What the blocks look like: ops/formats/gguf_simple.py and gguf_k.py.
//
// A chunk of 256 weights (one K block, or eight blocks of 32) is unpacked to bytes in the first cache, natural order, with a
// scale and an offset for every group; in registers a weight is then scale * code + offset. The products scale * code need
// at most 24 bits, so every weight is the very number that `dequantize_gguf` gives, with or without fused arithmetic.
// Everything is summed in fp32: the exact product up to the order of its sum. That order depends on k, the type and the
// vector width alone: the same bits for any number of rows and threads. Nothing outside the arrays is read (a prefetch is
// no read).

#include "ggufblocks.h"
#include "vector.h"

namespace {

enum Kind : int32_t { Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K };
constexpr int64_t AHEAD = 2048;  // bytes from where a core reads to what it prefetches
using Problem = puna::BlocksProduct;

constexpr int64_t block_bytes(int32_t kind) {
    constexpr int64_t bytes[] = {20, 22, 24, 144, 176, 210};
    return bytes[kind];
}
constexpr int64_t block_weights(int32_t kind) { return kind < Q4_K ? 32 : 256; }

// --- bytes to vectors -----------------------------------------------------------------------------------------------

template <typename T> INLINE T read(const uint8_t *from) {
    T value;
    memcpy(&value, from, sizeof value);
    return value;
}

// LANES bytes as integers. (GCC 12 would widen them one by one.)
template <int LANES> INLINE ints<LANES> spread(const uint8_t *from) {
    ints<LANES> wide;
#if defined(__x86_64__)
    typedef uint8_t bytes[LANES];
    if constexpr (LANES > 4) {
        asm("vpmovzxbd %1, %0" : "=v"(wide) : "m"(*(const bytes *)from));
        return wide;
    }
#endif
    for (int l = 0; l < LANES; l++) wide[l] = from[l];
    return wide;
}

// Two fp16 numbers side by side.
struct Halves {
    float first, second;
};
template <int LANES> INLINE Halves halves(const uint8_t *from) {
    uint32_t bits = read<uint32_t>(from);
#if defined(__x86_64__)
    if constexpr (LANES > 4) {  // every processor with AVX2 has F16C
        floats<4> wide;
        typedef uint32_t words __attribute__((vector_size(16)));
        asm("vcvtph2ps %1, %0" : "=v"(wide) : "v"(words{bits, 0, 0, 0}));
        return {wide[0], wide[1]};
    }
#endif
    uint32_t words[] = {(bits & 0x7fff) << 13, (bits >> 16 & 0x7fff) << 13};
    float values[2];
    memcpy(values, words, sizeof values);
    for (float &v : values) v *= 0x1p112f;  // shifts the exponent from half's to float's: exact for finite numbers
    return {bits & 0x8000 ? -values[0] : values[0], bits & 0x80000000u ? -values[1] : values[1]};
}

template <int LANES> INLINE ints<LANES> count_up() {
    ints<LANES> v;
    for (int l = 0; l < LANES; l++) v[l] = l;
    return v;
}
// One number in every lane, straight from memory: shuffles are what these kernels have too few of.
template <int LANES> INLINE floats<LANES> spread(const float &value) {
    floats<LANES> v;
#if defined(__x86_64__)
    if constexpr (LANES > 4) {
        asm("vbroadcastss %1, %0" : "=v"(v) : "m"(value));
        return v;
    }
#endif
    for (int l = 0; l < LANES; l++) v[l] = value;
    return v;
}
template <int LANES> INLINE floats<LANES> floats_of(ints<LANES> v) { return __builtin_convertvector(v, floats<LANES>); }

// --- what a block's codes are multiplied with -------------------------------------------------------------------------

// K blocks have 16 numbers: Q6_K its 16 scales, the others 8 scales and 8 offsets. Blocks of 32: a scale and an offset.
constexpr int factors_of(int32_t kind) { return kind < Q4_K ? 2 : 16; }

// Q4_K and Q5_K: six bits each (drawn in gguf_k.py), times their units.
template <int LANES> INLINE void line_factors(const uint8_t *block, float *to) {
    typedef uint32_t words __attribute__((vector_size(16)));
    words all = read<words>(block);  // units, upper bits and all of s, of m, lower bits
    words lower = words{all[1], all[3], all[2], all[3]} >> words{0, 0, 0, 4};
    words upper = words{all[1], all[1], all[2], all[2]} >> 2 & words{0, 0x30303030, 0, 0x30303030};
    words joined = (lower & words{0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f}) | upper;
    uint8_t bytes[16];
    memcpy(bytes, &joined, sizeof bytes);
    Halves units = halves<LANES>(block);
    UNROLL for (int g = 0; g < 16; g += LANES) {
        floats<LANES> unit = count_up<LANES>() + g < 8 ? fill<LANES>(units.first) : fill<LANES>(-units.second);
        store<LANES>(to + g, floats_of<LANES>(spread<LANES>(bytes + g)) * unit);
    }
}

template <int LANES, int KIND> INLINE void factors(const uint8_t *block, float *to) {
    if constexpr (KIND == Q4_K || KIND == Q5_K) {
        line_factors<LANES>(block, to);
    } else if constexpr (KIND == Q6_K) {
        float d = halves<LANES>(block + 206).second;
        UNROLL for (int g = 0; g < 16; g += LANES)
            store<LANES>(to + g, floats_of<LANES>(spread<LANES>(block + 192 + g) << 24 >> 24) * d);  // int8
    } else {
        Halves h = halves<LANES>(block);
        to[0] = h.first, to[1] = KIND == Q5_0 ? -16 * h.first : h.second;
    }
}

// --- weights of one block, handed on LANES at a time: give(i, weights i to i + LANES - 1) ----------------------------

// scale * q + offset for the four or five low bits of codes; what is above them is ignored. With 16 lanes the line's
// values are a table: looking up is cheaper than masking, converting and computing, and one table serves 32 weights.
template <int LANES, int BITS> struct Line {
#if defined(__clang__)
    static constexpr bool LOOKS_UP = false;
#else
    static constexpr bool LOOKS_UP = LANES == 16;
#endif
    floats<LANES> scale, offset, low, high;

    INLINE Line of(const float &scale, const float &offset) {
        Line line;
        line.scale = spread<LANES>(scale), line.offset = spread<LANES>(offset);
        if (LOOKS_UP) line.low = floats_of<LANES>(count_up<LANES>()) * line.scale + line.offset;
        if (LOOKS_UP && BITS == 5) line.high = floats_of<LANES>(count_up<LANES>() + 16) * line.scale + line.offset;
        return line;
    }

    INLINE floats<LANES> at(const Line &line, ints<LANES> q) {
#if !defined(__clang__)
        if constexpr (LOOKS_UP && BITS == 4) return __builtin_shuffle(line.low, q);
        if constexpr (LOOKS_UP && BITS == 5) return __builtin_shuffle(line.low, line.high, q);
#endif
        return floats_of<LANES>(q & ((1 << BITS) - 1)) * line.scale + line.offset;
    }
};

// Low four bits of q, fifth bit of bits.
template <int LANES> INLINE ints<LANES> join(ints<LANES> q, ints<LANES> bits) { return (q & 15) | (bits & ~15); }

template <int LANES, typename Give> INLINE void q4_k(const uint8_t *block, const float *f, Give give) {
    UNROLL for (int k = 0; k < 4; k++) {
        auto first = Line<LANES, 4>::of(f[2 * k], f[2 * k + 8]);
        auto second = Line<LANES, 4>::of(f[2 * k + 1], f[2 * k + 9]);
        UNROLL for (int i = 0; i < 32; i += LANES) {
            ints<LANES> q = spread<LANES>(block + 16 + 32 * k + i);
            give(64 * k + i, Line<LANES, 4>::at(first, q));
            give(64 * k + 32 + i, Line<LANES, 4>::at(second, q >> 4));
        }
    }
}

template <int LANES, typename Give> INLINE void q5_k(const uint8_t *block, const float *f, Give give) {
    ints<LANES> fifth[32 / LANES];
    UNROLL for (int i = 0; i < 32; i += LANES) fifth[i / LANES] = spread<LANES>(block + 16 + i) << 4;
    UNROLL for (int k = 0; k < 4; k++) {
        auto first = Line<LANES, 5>::of(f[2 * k], f[2 * k + 8]);
        auto second = Line<LANES, 5>::of(f[2 * k + 1], f[2 * k + 9]);
        UNROLL for (int i = 0; i < 32; i += LANES) {
            ints<LANES> q = spread<LANES>(block + 48 + 32 * k + i), bits = fifth[i / LANES] >> 2 * k;
            give(64 * k + i, Line<LANES, 5>::at(first, join<LANES>(q, bits)));
            give(64 * k + 32 + i, Line<LANES, 5>::at(second, join<LANES>(q >> 4, bits >> 1)));
        }
    }
}

template <int LANES, typename Give> INLINE void q6_k(const uint8_t *block, const float *f, Give give) {
    UNROLL for (int half = 0; half < 2; half++)
        UNROLL for (int i = 0; i < 64; i += LANES) {  // low nibbles: weights i of 128, and i + 64
            ints<LANES> q = spread<LANES>(block + 64 * half + i);
            ints<LANES> high = spread<LANES>(block + 128 + 32 * half + i % 32) >> (i < 32 ? 0 : 2);
            int at = 128 * half + i;
            floats<LANES> one = floats_of<LANES>(((q & 15) | (high << 4 & 48)) - 32);
            floats<LANES> two = floats_of<LANES>(((q >> 4) | (high & 48)) - 32);
            give(at, one * spread<LANES>(f[at / 16]));
            give(at + 64, two * spread<LANES>(f[at / 16 + 4]));
        }
}

// A block of 32.
template <int LANES, int KIND, typename Give> INLINE void simple(const uint8_t *block, const float *f, Give give) {
    constexpr int HEAD = KIND == Q4_1 ? 4 : KIND == Q5_0 ? 6 : 8, BITS = KIND == Q4_1 ? 4 : 5;
    auto line = Line<LANES, BITS>::of(f[0], f[1]);
    typedef typename Vector<LANES>::words words;
    UNROLL for (int i = 0; i < 16; i += LANES) {
        ints<LANES> q = spread<LANES>(block + HEAD + i), upper = q >> 4;
        if constexpr (BITS == 5) {
            words fifth = words{} + read<uint32_t>(block + HEAD - 4), lane = (words)(count_up<LANES>() + i);
            q = join<LANES>(q, (ints<LANES>)(fifth >> lane << 4));
            upper = join<LANES>(upper, (ints<LANES>)(fifth >> (lane + 16) << 4));
        }
        give(i, Line<LANES, BITS>::at(line, q));
        give(i + 16, Line<LANES, BITS>::at(line, upper));
    }
}

template <int LANES, int KIND, typename Give> INLINE void weights(const uint8_t *block, const float *f, Give give) {
    if constexpr (KIND == Q4_K) q4_k<LANES>(block, f, give);
    else if constexpr (KIND == Q5_K) q5_k<LANES>(block, f, give);
    else if constexpr (KIND == Q6_K) q6_k<LANES>(block, f, give);
    else simple<LANES, KIND>(block, f, give);
}

// All weights of a row. Factors come a few blocks ahead: a block's codes would have to wait for them.
template <int LANES, int KIND, typename Give> INLINE void weights_of_row(const Problem &p, int64_t column, Give give) {
    constexpr int64_t BYTES = block_bytes(KIND), FACTORS = factors_of(KIND), ROOM = 256 / FACTORS;
    alignas(64) float f[ROOM * FACTORS];
    const uint8_t *block = p.data + column * p.row_bytes;
    int64_t left = p.k / block_weights(KIND), at = 0;
    for (; left > 0; left -= ROOM) {
        int64_t count = left < ROOM ? left : ROOM;
        for (int64_t b = 0; b < count; b++) factors<LANES, KIND>(block + b * BYTES, f + b * FACTORS);
        for (int64_t b = 0; b < count; b++, block += BYTES, at += block_weights(KIND)) {
            for (int64_t line = 0; line < BYTES; line += 64)
                __builtin_prefetch((const void *)(uintptr_t(block) + AHEAD + line));
            weights<LANES, KIND>(block, f + b * FACTORS, [&](int i, floats<LANES> w) __attribute__((always_inline)) {
                give(at, i, w);
            });
        }
    }
}

int64_t share_of(int64_t row_bytes) { return (1 << 16) / (row_bytes + 1) + 1; }  // columns of about 64 KiB, as in gemv.cpp

// --- products -------------------------------------------------------------------------------------------------------

// y[row : row + ROWS, column]. Two sums for each row hide the adds' latency.
template <int LANES, int ROWS, int KIND> INLINE void dots(const Problem &p, int64_t row, int64_t column) {
    floats<LANES> total[2][ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) total[0][r] = total[1][r] = floats<LANES>{};
    weights_of_row<LANES, KIND>(p, column, [&](int64_t at, int i, floats<LANES> w) __attribute__((always_inline)) {
        UNROLL for (int r = 0; r < ROWS; r++)
            total[i / LANES & 1][r] += w * load<LANES>(p.x + (row + r) * p.x_stride + at + i);
    });
    UNROLL for (int r = 0; r < ROWS; r++)
        p.y[(row + r) * p.n + column] = sum<LANES>(total[0][r] + total[1][r]) + (p.bias ? p.bias[column] : 0.0f);
}

// A few rows of x at a time with all columns of a share, so that they stay in the first cache and the share in the second.
template <int LANES, int KIND> INLINE void columns_of(const Problem &p, int64_t begin, int64_t end) {
    for (int64_t share = share_of(p.row_bytes); begin < end; begin += share) {
        int64_t row = 0, last = begin + share < end ? begin + share : end;
        for (; row + 4 <= p.rows; row += 4)
            for (int64_t column = begin; column < last; column++) dots<LANES, 4, KIND>(p, row, column);
        for (; row + 2 <= p.rows; row += 2)
            for (int64_t column = begin; column < last; column++) dots<LANES, 2, KIND>(p, row, column);
        for (; row < p.rows; row++)
            for (int64_t column = begin; column < last; column++) dots<LANES, 1, KIND>(p, row, column);
    }
}

template <int LANES> INLINE void columns(const Problem &p, int64_t begin, int64_t end) {
    switch (p.kind) {
        case Q4_1: return columns_of<LANES, Q4_1>(p, begin, end);
        case Q5_0: return columns_of<LANES, Q5_0>(p, begin, end);
        case Q5_1: return columns_of<LANES, Q5_1>(p, begin, end);
        case Q4_K: return columns_of<LANES, Q4_K>(p, begin, end);
        case Q5_K: return columns_of<LANES, Q5_K>(p, begin, end);
        default: return columns_of<LANES, Q6_K>(p, begin, end);
    }
}

// --- blocks as numbers ----------------------------------------------------------------------------------------------

template <int LANES, int KIND> INLINE void row_of(const Problem &p, int64_t column) {
    float *to = p.y + (column - p.rows) * p.k;
    weights_of_row<LANES, KIND>(p, column, [&](int64_t at, int i, floats<LANES> w) __attribute__((always_inline)) {
        store<LANES>(to + at + i, w);
    });
}

template <int LANES> INLINE void numbers_row(const Problem &p, int64_t column) {
    switch (p.kind) {
        case Q4_1: return row_of<LANES, Q4_1>(p, column);
        case Q5_0: return row_of<LANES, Q5_0>(p, column);
        case Q5_1: return row_of<LANES, Q5_1>(p, column);
        case Q4_K: return row_of<LANES, Q4_K>(p, column);
        case Q5_K: return row_of<LANES, Q5_K>(p, column);
        default: return row_of<LANES, Q6_K>(p, column);
    }
}

// --- one function per level -----------------------------------------------------------------------------------------

typedef void Row(const Problem &, int64_t);

void columns_baseline(const Problem &p, int64_t begin, int64_t end) { columns<4>(p, begin, end); }
void row_baseline(const Problem &p, int64_t column) { numbers_row<4>(p, column); }
#if defined(__x86_64__)
AVX2 void columns_avx2(const Problem &p, int64_t begin, int64_t end) { columns<8>(p, begin, end); }
AVX2 void row_avx2(const Problem &p, int64_t column) { numbers_row<8>(p, column); }
AVX512 void columns_avx512(const Problem &p, int64_t begin, int64_t end) { columns<16>(p, begin, end); }
AVX512 void row_avx512(const Problem &p, int64_t column) { numbers_row<16>(p, column); }
#endif

Row *row_at(int level) {
#if defined(__x86_64__)
    if (level == 2) return row_avx512;
    if (level == 1) return row_avx2;
#endif
    return row_baseline;
}

constexpr int64_t MOST = 4;

}  // namespace

puna::BlocksColumns *puna::blocks_columns(int level) {
#if defined(__x86_64__)
    if (level == 2) return columns_avx512;
    if (level == 1) return columns_avx2;
#endif
    return columns_baseline;
}

extern "C" {

// One to four products of as many rows in one parallel region; level and threads are the first one's.
void puna_blocks_product(const Problem *problems, int64_t count) {
    int64_t share[MOST], last[MOST], shares = 0;
    for (int64_t i = 0; i < count; i++) {
        const Problem &p = problems[i];
        share[i] = share_of(p.row_bytes);
        last[i] = shares += (p.n + share[i] - 1) / share[i];
    }
    int64_t threads = problems[0].threads, parts = threads < shares ? threads : shares;
    auto work = puna::blocks_columns(problems[0].level);
#pragma omp parallel for schedule(static) num_threads(parts) if (parts > 1)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t s = part * shares / parts; s < (part + 1) * shares / parts; s++) {
            int64_t i = 0;
            while (s >= last[i]) i++;
            int64_t begin = (s - (i ? last[i - 1] : 0)) * share[i], end = begin + share[i];
            work(problems[i], begin, end < problems[i].n ? end : problems[i].n);
        }
}

// Rows `rows` to n - 1 of the weight as fp32 into y.
void puna_blocks_dequantize(const Problem *problem) {
    const Problem &p = *problem;
    Row *row = row_at(p.level);
    int64_t count = p.n - p.rows, parts = count * p.k < (1 << 15) ? 1 : p.threads < count ? p.threads : count;
#pragma omp parallel for schedule(static) num_threads(parts) if (parts > 1)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t column = p.rows + part * count / parts; column < p.rows + (part + 1) * count / parts; column++)
            row(p, column);
}
}

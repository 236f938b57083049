// y = x W^T (+ bias) for a few rows of x and a weight in four or eight bits: decoding with a quantized model.
//
//   y[m, n] = bias[n] + sum_g scale[n, g] * (sum_{k in g} x[m, k] code[n, k] - zero[n, g] * sum_{k in g} x[m, k])
//
// Codes become floats in registers and everything is summed in fp32: the exact product up to the order of its sum.
// Memory should be the whole cost, which leaves half a nanosecond of one core for 16 int4 weights. Hence:
//
// - One vector holds LANES words of eight int4 (or four eight-bit) codes, and step j takes code j of every word. x is
//   laid out to match once a call, code j of all words side by side, instead of the weights at every call.
// - int4 in AVX-512: the words shifted right by 4 j look up a table of 16 floats by their low four bits: shift,
//   permute, multiply-add. (Slower: the nibble under the exponent of 2^23, less 2^23 + 8.)
// - Zero points act on sums of x, which are taken once a call as well.
//
// Each y[m, n] is summed in an order that depends on k, the format and the vector width alone: the same bits for any
// number of rows and threads. Nothing outside the arrays is read (a prefetch is no read).

#include <cstdlib>

#include "products.h"
#include "vector.h"

namespace {

enum Kind : int32_t { INT4, INT8, FLOAT8 };
enum Rounding : int32_t { KEEP, TO_INT8, TO_FLOAT8 };

using namespace puna;
using Problem = PackedProduct;

INLINE float half(uint16_t bits) {  // exact for finite numbers; 2^112 shifts the exponent from half's to float's
    uint32_t word = uint32_t(bits & 0x7fff) << 13;
    float value;
    memcpy(&value, &word, sizeof value);
    value *= 0x1p112f;
    return bits & 0x8000 ? -value : value;
}

INLINE float number(const void *from, int64_t i, int32_t type) {
    if (type == FLOAT32) return ((const float *)from)[i];
    if (type == BFLOAT16) return widen(((const bf16 *)from)[i]);
    return half(((const uint16_t *)from)[i]);
}

// --- x, once a call -------------------------------------------------------------------------------------------------

// To the nearest float8 (three bits of mantissa, quantum 2^-9 below 2^-6), ties to even; |v| <= 448.
INLINE float to_float8(float v) {
    uint32_t word;
    memcpy(&word, &v, sizeof word);
    if ((word & 0x7fffffffu) < 0x3c800000u) return (v + 24576.0f) - 24576.0f;
    word = (word + 0x7ffffu + ((word >> 20) & 1u)) & 0xfff00000u;
    memcpy(&v, &word, sizeof v);
    return v;
}

// As formats/activations: scale from the range (or given), codes by division, clamping and rounding to even, and back.
INLINE void round_row(const Problem &p, float *x) {
    bool integer = p.rounding == TO_INT8;
    float scale = p.input_scale, most = 0, low = integer ? -128.0f : -448.0f, high = integer ? 127.0f : 448.0f;
    if (scale == 0) {
        for (int64_t i = 0; i < p.k; i++) {
            float size = x[i] < 0 ? -x[i] : x[i];
            most = size > most ? size : most;
        }
        scale = most / (integer ? 127.5f : 448.0f);
        scale = scale > 0x1.fffffep127f ? 0x1.fffffep127f : scale == 0 ? 0x1p-23f : scale;
    }
    for (int64_t i = 0; i < p.k; i++) {
        float v = x[i] / scale;
        v = v < low ? low : v > high ? high : v;
        v = (integer ? (v + 12582912.0f) - 12582912.0f : to_float8(v)) * scale;
        if (p.type == BFLOAT16) {
            bf16 rounded;
            narrow(v, &rounded);
            v = widen(rounded);
        }
        x[i] = v;
    }
}

INLINE void read_row(const Problem &p, int64_t row, float *to) {
    int64_t start = row * p.x_stride;
    if (p.order)
        for (int64_t i = 0; i < p.k; i++) to[i] = number(p.x, start + p.order[i], p.type);
    else if (p.type == FLOAT32)
        memcpy(to, (const float *)p.x + start, size_t(p.k) * sizeof(float));
    else
        for (int64_t i = 0; i < p.k; i++) to[i] = widen(((const bf16 *)p.x)[start + i]);
    if (p.rounding != KEEP) round_row(p, to);
}

// Codes of one word, and columns of x with zeros up to a whole block: what a vector of words holds.
INLINE int64_t codes_in_word(const Problem &p) { return p.kind == INT4 ? 8 : 4; }
INLINE int64_t padded(const Problem &p, int64_t lanes) {
    int64_t block = codes_in_word(p) * lanes;
    return (p.k + block - 1) / block * block;
}

template <int LANES>
INLINE void arrange(const Problem &p, const Arranged &to, int64_t first, int64_t last, float *row) {
    int64_t codes = codes_in_word(p), block = codes * LANES;
    memset(row + p.k, 0, size_t(to.x_row - p.k) * sizeof(float));
    for (int64_t r = first; r < last; r++) {
        float *x = to.x + r * to.x_row, *sums = to.sums + r * to.sum_row;
        read_row(p, r, row);
        for (int64_t b = 0; b < to.x_row; b += block) {
            for (int64_t j = 0; j < codes; j++)
                UNROLL for (int l = 0; l < LANES; l++) x[b + j * LANES + l] = row[b + codes * l + j];
            if (!p.zeros) continue;
            floats<LANES> total{};
            for (int64_t j = 0; j < codes; j++) total += load<LANES>(x + b + j * LANES);
            store<LANES>(sums + b / codes, total);
        }
    }
}

// --- the sums -------------------------------------------------------------------------------------------------------

// Scales and zero points of a row as floats, and zeros after them for the lanes beyond the last group.
template <int LANES> INLINE void read_scales(const Problem &p, int64_t column, float *scales, float *zeros) {
    int64_t groups = p.k / p.width, start = column / p.height * groups;
    if (p.scales_are == FLOAT32)
        memcpy(scales, (const float *)p.scales + start, size_t(groups) * sizeof(float));
    else if (p.scales_are == BFLOAT16)
        for (int64_t g = 0; g < groups; g++) scales[g] = widen(((const bf16 *)p.scales)[start + g]);
    else
        for (int64_t g = 0; g < groups; g++) scales[g] = half(((const uint16_t *)p.scales)[start + g]);
    for (int64_t g = 0; g < groups; g++) zeros[g] = p.zeros ? float(p.zeros[start + g]) : 0.0f;
    for (int64_t g = groups; g < groups + LANES; g++) scales[g] = zeros[g] = 0;
}

// Code j of every word as floats, those of int8 times 2^24 (see `UNIT`; so inputs beyond 2^96 or so overflow).
template <int LANES, int KIND> INLINE floats<LANES> code(ints<LANES> word, int j) {
    typedef typename Vector<LANES>::words words;
    if constexpr (KIND == INT8) {  // at the top of the word it keeps its sign without being shifted back
        words top = (words)word << (24 - 8 * j);
        return __builtin_convertvector((ints<LANES>)(j ? top & 0xff000000u : top), floats<LANES>);
    }
    if constexpr (KIND == FLOAT8) {  // sign and the rest in place, 2^120 shifts the exponent; the two nan become +-480
        ints<LANES> top = (ints<LANES>)((words)word << (24 - 8 * j));
        return (floats<LANES>)((top >> 4) & int32_t(0x87f00000)) * 0x1p120f;
    }
#if !defined(__clang__)
    if constexpr (LANES == 16) {
        const floats<16> table{-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
        return __builtin_shuffle(table, (ints<16>)((words)word >> (4 * j)));
    }
#endif
    // The stored nibble is code + 8: its upper bit turned, it goes to the top and back, and brings its sign along.
    words top = (words)(word ^ int32_t(0x88888888)) << (28 - 4 * j);
    return __builtin_convertvector((ints<LANES>)top >> 28, floats<LANES>);
}

template <int LANES> INLINE floats<LANES> pick(floats<LANES> from, ints<LANES> lanes) {
#if defined(__clang__)
    floats<LANES> picked;
    for (int l = 0; l < LANES; l++) picked[l] = from[lanes[l]];
    return picked;
#else
    return __builtin_shuffle(from, lanes);
#endif
}

template <int LANES> INLINE ints<LANES> load_words(const uint8_t *from, int64_t bytes) {
    ints<LANES> words{};
    if (bytes >= int64_t(sizeof words))
        memcpy(&words, from, sizeof words);
    else
        memcpy(&words, from, size_t(bytes));
    return words;
}

// Sums of the tile y[row : row + ROWS, column : column + COLS], one part in each lane.
template <int LANES, int ROWS, int COLS, int KIND>
INLINE void add(const Problem &p, const Arranged &a, int64_t row, int64_t column, const float *const scales[COLS],
                const float *const zeros[COLS], floats<LANES> total[ROWS][COLS]) {
    constexpr int CODES = KIND == INT4 ? 8 : 4;
    constexpr int64_t BLOCK = CODES * LANES;
    constexpr float UNIT = KIND == INT8 ? 0x1p-24f : 1.0f;
    bool shared = p.width >= BLOCK || p.width == p.k;  // one scale for whole blocks, else several for the lanes of one
    ints<LANES> lane_group;
    memcpy(&lane_group, a.lane_group, sizeof lane_group);
    const uint8_t *codes = p.codes + column * p.row_bytes;
    uintptr_t ahead = uintptr_t(codes) + COLS * p.row_bytes;
    int64_t left = p.row_bytes, group = 0, step = shared ? 1 : BLOCK / p.width;
    for (int64_t begin = 0; begin < a.x_row; group += step) {
        int64_t end = shared ? (p.width == p.k ? a.x_row : begin + p.width) : begin + BLOCK;
        floats<LANES> even[ROWS][COLS], odd[ROWS][COLS], sums[ROWS];
        UNROLL for (int r = 0; r < ROWS; r++) {
            sums[r] = floats<LANES>{};
            UNROLL for (int c = 0; c < COLS; c++) even[r][c] = odd[r][c] = floats<LANES>{};
        }
        for (int64_t at = begin; at < end; at += BLOCK, left -= 4 * LANES, codes += 4 * LANES) {
            for (int line = 0; line < COLS * 4 * LANES; line += 64, ahead += 64)
                __builtin_prefetch((const void *)ahead);
            ints<LANES> words[COLS];
            UNROLL for (int c = 0; c < COLS; c++) words[c] = load_words<LANES>(codes + c * p.row_bytes, left);
            UNROLL for (int j = 0; j < CODES; j += 2) {
                floats<LANES> code1[COLS], code2[COLS];
                UNROLL for (int c = 0; c < COLS; c++) {
                    code1[c] = code<LANES, KIND>(words[c], j);
                    code2[c] = code<LANES, KIND>(words[c], j + 1);
                }
                UNROLL for (int r = 0; r < ROWS; r++) {
                    const float *x = a.x + (row + r) * a.x_row + at + j * LANES;
                    floats<LANES> x1 = load<LANES>(x), x2 = load<LANES>(x + LANES);
                    UNROLL for (int c = 0; c < COLS; c++) {
                        even[r][c] += x1 * code1[c];
                        odd[r][c] += x2 * code2[c];
                    }
                }
            }
            if (p.zeros)
                UNROLL for (int r = 0; r < ROWS; r++)
                    sums[r] += load<LANES>(a.sums + (row + r) * a.sum_row + at / CODES);
        }
        UNROLL for (int c = 0; c < COLS; c++) {
            const float *s = scales[c] + group, *z = zeros[c] + group;
            floats<LANES> scale = shared ? fill<LANES>(*s) : pick<LANES>(load<LANES>(s), lane_group);
            floats<LANES> zero = shared ? fill<LANES>(*z) : pick<LANES>(load<LANES>(z), lane_group);
            UNROLL for (int r = 0; r < ROWS; r++) {
                floats<LANES> sum = (even[r][c] + odd[r][c]) * UNIT;
                if (p.zeros) sum -= zero * sums[r];
                total[r][c] += scale * sum;
            }
        }
        begin = end;
    }
}

template <int LANES, int ROWS, int COLS, int KIND>
INLINE void tile(const Problem &p, const Arranged &a, int64_t row, int64_t column, const float *const scales[COLS],
                 const float *const zeros[COLS]) {
    floats<LANES> total[ROWS][COLS];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int c = 0; c < COLS; c++) total[r][c] = floats<LANES>{};
    add<LANES, ROWS, COLS, KIND>(p, a, row, column, scales, zeros, total);
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int c = 0; c < COLS; c++) {
            float y = sum<LANES>(total[r][c]) + (p.bias ? p.bias[column + c] : 0.0f);
            int64_t place = (row + r) * p.n + column + c;
            if (p.out == FLOAT32) ((float *)p.y)[place] = y;
            else narrow(y, (bf16 *)p.y + place);
        }
}

// All rows of COLS columns. The first tile brings the codes from memory, the others find them in the cache.
template <int LANES, int MOST, int COLS, int KIND>
INLINE void stripe(const Problem &p, const Arranged &a, int64_t column, float *scratch) {
    int64_t room = p.k / p.width + LANES, row = 0;
    const float *scales[COLS], *zeros[COLS];
    UNROLL for (int c = 0; c < COLS; c++) {
        float *s = scratch + 2 * c * room;
        read_scales<LANES>(p, column + c, s, s + room);
        scales[c] = s, zeros[c] = s + room;
    }
    if constexpr (MOST == 4)
        for (; row + 4 <= p.rows; row += 4) tile<LANES, 4, COLS, KIND>(p, a, row, column, scales, zeros);
    for (; row + 2 <= p.rows; row += 2) tile<LANES, 2, COLS, KIND>(p, a, row, column, scales, zeros);
    if (row < p.rows) tile<LANES, 1, COLS, KIND>(p, a, row, column, scales, zeros);
}

template <int LANES, int MOST, int KIND>
INLINE void stripes_of(const Problem &p, const Arranged &a, int64_t begin, int64_t end, float *scratch) {
    int64_t column = begin;
    for (; column + 2 <= end; column += 2) stripe<LANES, MOST, 2, KIND>(p, a, column, scratch);
    if (column < end) stripe<LANES, MOST, 1, KIND>(p, a, column, scratch);
}

template <int LANES, int MOST>
INLINE void stripes(const Problem &p, const Arranged &a, int64_t begin, int64_t end, float *scratch) {
    if (p.kind == INT4) stripes_of<LANES, MOST, INT4>(p, a, begin, end, scratch);
    else if (p.kind == INT8) stripes_of<LANES, MOST, INT8>(p, a, begin, end, scratch);
    else stripes_of<LANES, MOST, FLOAT8>(p, a, begin, end, scratch);
}

// --- codes to numbers, for products of many rows --------------------------------------------------------------------

INLINE void put(float value, float *to) { *to = value; }
INLINE void put(float value, bf16 *to) { narrow(value, to); }

// A row of nibbles, one in each byte: a word is spread over eight bytes. The compiler makes vectors of these loops.
INLINE void spread_nibbles(const uint8_t *from, int64_t words, uint8_t *to) {
    for (int64_t i = 0; i < words; i++) {
        uint32_t word;
        memcpy(&word, from + 4 * i, sizeof word);
        uint64_t spread = word;
        spread = (spread | spread << 16) & 0x0000ffff0000ffffull;
        spread = (spread | spread << 8) & 0x00ff00ff00ff00ffull;
        spread = (spread | spread << 4) & 0x0f0f0f0f0f0f0f0full;
        memcpy(to + 8 * i, &spread, sizeof spread);
    }
}

template <int KIND, typename T> INLINE void decode(const uint8_t *from, int64_t count, float scale, float zero, T *to) {
    for (int64_t i = 0; i < count; i++) {
        float code;
        if constexpr (KIND == FLOAT8) {
            uint32_t word = uint32_t(int32_t(int8_t(from[i])) << 20) & 0x87f00000u;
            memcpy(&code, &word, sizeof code);
            code *= 0x1p120f;
        } else
            code = KIND == INT4 ? float(from[i]) : float(int8_t(from[i]));
        put((code - zero) * scale, to + i);
    }
}

// scratch: scales, zeros and, for int4, the nibbles.
template <int KIND, typename T>
INLINE void numbers_of(const Problem &p, int64_t column, float *scratch, T *__restrict to) {
    constexpr int64_t PIECE = 32;  // a known count makes short groups fast
    int64_t groups = p.k / p.width;
    float *zeros = scratch + groups + 4;
    read_scales<4>(p, column, scratch, zeros);
    const uint8_t *codes = p.codes + column * p.row_bytes;
    if constexpr (KIND == INT4) {
        uint8_t *nibbles = (uint8_t *)(zeros + groups + 4);
        spread_nibbles(codes, p.row_bytes / 4, nibbles);
        codes = nibbles;
    }
    for (int64_t g = 0; g < groups; g++) {
        float scale = scratch[g], zero = zeros[g] + (KIND == INT4 ? 8.0f : 0.0f);  // a nibble is code + 8
        int64_t at = g * p.width, end = at + p.width;
        for (; at + PIECE <= end; at += PIECE) decode<KIND>(codes + at, PIECE, scale, zero, to + at);
        decode<KIND>(codes + at, end - at, scale, zero, to + at);
    }
}

template <typename T> INLINE void numbers_row(const Problem &p, int64_t column, float *scratch) {
    T *to = (T *)p.y + (column - p.rows) * p.k;
    if (p.kind == INT4) numbers_of<INT4, T>(p, column, scratch, to);
    else if (p.kind == INT8) numbers_of<INT8, T>(p, column, scratch, to);
    else numbers_of<FLOAT8, T>(p, column, scratch, to);
}

INLINE void weight_row(const Problem &p, int64_t column, float *scratch) {
    if (p.out == FLOAT32) numbers_row<float>(p, column, scratch);
    else numbers_row<bf16>(p, column, scratch);
}

// --- one function per level -----------------------------------------------------------------------------------------

void arrange_baseline(const Problem &p, const Arranged &a, int64_t first, int64_t last, float *row) {
    arrange<4>(p, a, first, last, row);
}
void columns_baseline(const Problem &p, const Arranged &a, int64_t begin, int64_t end, float *scratch) {
    stripes<4, 2>(p, a, begin, end, scratch);
}
void row_baseline(const Problem &p, int64_t column, float *scratch) { weight_row(p, column, scratch); }
#if defined(__x86_64__)
AVX2 void arrange_avx2(const Problem &p, const Arranged &a, int64_t first, int64_t last, float *row) {
    arrange<8>(p, a, first, last, row);
}
AVX2 void columns_avx2(const Problem &p, const Arranged &a, int64_t begin, int64_t end, float *scratch) {
    stripes<8, 2>(p, a, begin, end, scratch);
}
AVX2 void row_avx2(const Problem &p, int64_t column, float *scratch) { weight_row(p, column, scratch); }
AVX512 void arrange_avx512(const Problem &p, const Arranged &a, int64_t first, int64_t last, float *row) {
    arrange<16>(p, a, first, last, row);
}
AVX512 void columns_avx512(const Problem &p, const Arranged &a, int64_t begin, int64_t end, float *scratch) {
    stripes<16, 4>(p, a, begin, end, scratch);
}
AVX512 void row_avx512(const Problem &p, int64_t column, float *scratch) { weight_row(p, column, scratch); }
#endif

int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

constexpr int64_t MOST = 4;

}  // namespace

namespace puna {

PackedLevel packed_level(int number) {
#if defined(__x86_64__)
    if (number == 2) return {16, arrange_avx512, columns_avx512, row_avx512};
    if (number == 1) return {8, arrange_avx2, columns_avx2, row_avx2};
#endif
    return {4, arrange_baseline, columns_baseline, row_baseline};
}

Arranged arranged(const Problem &p, int lanes) {
    int64_t x_row = padded(p, lanes), sum_row = p.zeros ? x_row / codes_in_word(p) : 0;
    Arranged to{nullptr, nullptr, x_row, sum_row, {}};
    for (int l = 0; l < lanes; l++) to.lane_group[l] = int32_t(codes_in_word(p) * l / p.width);
    return to;
}

int64_t packed_scratch(const Problem &p, int lanes) { return 4 * (p.k / p.width + lanes); }

bool same_input(const Problem &p, const Problem &q) {  // q, k and v read one x: it is laid out once
    return p.x == q.x && p.k == q.k && (p.kind == INT4) == (q.kind == INT4) && p.order == q.order && !q.zeros &&
           p.rounding == q.rounding && p.input_scale == q.input_scale;
}

}  // namespace puna

extern "C" {

// One to four products of as many rows; level and threads are the first one's. 1: no memory.
int puna_packed_product(const Problem *problems, int64_t count) {
    PackedLevel with = packed_level(problems[0].level);
    Arranged arranged[MOST];
    int64_t share[MOST], last[MOST], shares = 0, room = 0, longest = 0, scratch = 0, threads = problems[0].threads;
    for (int64_t i = 0; i < count; i++) {
        const Problem &p = problems[i];
        arranged[i] = puna::arranged(p, with.lanes);
        room += p.rows * (arranged[i].x_row + arranged[i].sum_row);
        longest = arranged[i].x_row > longest ? arranged[i].x_row : longest;
        scratch = packed_scratch(p, with.lanes) > scratch ? packed_scratch(p, with.lanes) : scratch;
        share[i] = share_of(p.row_bytes);
        last[i] = shares += (p.n + share[i] - 1) / share[i];
    }
    // Cores write their scratch all the time: each on its own cache lines.
    int64_t parts = threads < shares ? threads : shares;
    scratch = up(scratch, 16);
    float *memory = (float *)aligned_alloc(64, size_t(up(room + longest, 16) + parts * scratch) * sizeof(float));
    if (!memory) return 1;
    float *next = memory;
    for (int64_t i = 0; i < count; i++) {
        const Problem &p = problems[i];
        if (i && same_input(problems[i - 1], p)) {
            arranged[i].x = arranged[i - 1].x;  // without zeros there are no sums
            continue;
        }
        arranged[i].x = next, arranged[i].sums = next + p.rows * arranged[i].x_row;
        next += p.rows * (arranged[i].x_row + arranged[i].sum_row);
        with.arrange(p, arranged[i], 0, p.rows, memory + room);
    }
    float *scratches = memory + up(room + longest, 16);
#pragma omp parallel for schedule(static) num_threads(parts) if (parts > 1)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t s = part * shares / parts; s < (part + 1) * shares / parts; s++) {
            int64_t i = 0;
            while (s >= last[i]) i++;
            int64_t begin = (s - (i ? last[i - 1] : 0)) * share[i], end = begin + share[i];
            with.columns(problems[i], arranged[i], begin, end < problems[i].n ? end : problems[i].n,
                         scratches + part * scratch);
        }
    free(memory);
    return 0;
}

// Rows `rows` to n - 1 of the weight as numbers into y, in `out`. 1: no memory.
int puna_packed_dequantize(const Problem *problem) {
    const Problem &p = *problem;
    PackedLevel with = packed_level(p.level);
    int64_t nibbles = p.kind == INT4 ? p.row_bytes / 2 : 0;  // in floats
    int64_t scratch = up(2 * (p.k / p.width + 4) + nibbles, 16), count = p.n - p.rows;
    int64_t parts = count * p.k < (1 << 15) ? 1 : p.threads < count ? p.threads : count;
    float *memory = (float *)aligned_alloc(64, size_t(parts * scratch) * sizeof(float));
    if (!memory) return 1;
#pragma omp parallel for schedule(static) num_threads(parts) if (parts > 1)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t column = p.rows + part * count / parts; column < p.rows + (part + 1) * count / parts; column++)
            with.row(p, column, memory + part * scratch);
    free(memory);
    return 0;
}
}

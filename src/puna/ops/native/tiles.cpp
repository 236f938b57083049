// y = x W^T for weights in four or eight bits and rows of x rounded to int8: integer products, so that a few rows cost
// what reading W from memory costs, and many rows run at the speed of the processor's dot products of bytes.
//
//   y[m, n] = sum_g scale[n, g] * sum_{b in g} d[m, b] * (sum_{k in b} code[n, k] xcode[m, k] - zero[n, g] * sum xcode)
//
// A block b is 32 columns: x is rounded block by block (d = max |x| / 127, to even), as llama.cpp's Q8_0 does.
//
// W lies in tiles of 16 outputs. A line is 64 bytes, four columns of all 16: what one instruction multiplies with four
// numbers of x (vpdpbusd; bytes without a sign times bytes with one, added by fours). So a lane is an output, its sum
// never leaves it, and the scales of 16 outputs lie side by side as well.
//
//   line j of a block, byte 4 n + c    8 bits (8 lines)   column 4 j + c of output n, as code + 128
//                                      4 bits (4 lines)   columns 4 j + c (low half) and 16 + 4 j + c, as code + 8
//
// The 8 or 128 too much comes off as that many times the sum of the codes of x, which every sum starts from.
//
// x lies in panels of up to 8 rows, block after block, each block as the multiplication reads it:
//
//   4 codes of each row | the next 4 of each row | ... (8 in all) | d of each row, fp32 | -8 * its sum of codes, int32

#include "tiles.h"

#include <cstdlib>
#include <utility>

#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#include "vector.h"

namespace {

constexpr int64_t OUTPUTS = 16, BLOCK = 32, PANEL = 8, PER_ROW = BLOCK + 8;  // bytes of a row in a block of a panel
enum Level : int32_t { BASE, AVX2_LEVEL, AVX512_LEVEL, VNNI_LEVEL };

constexpr int lanes_of(int level) { return level == BASE ? 4 : level == AVX2_LEVEL ? 8 : 16; }

template <int LANES> struct Parts {
    typedef int16_t shorts __attribute__((vector_size(LANES * 4)));
    typedef uint16_t ushorts __attribute__((vector_size(LANES * 4)));
    typedef int8_t bytes __attribute__((vector_size(LANES)));
    typedef bytes bytes_anywhere __attribute__((aligned(1), may_alias));
    typedef uint16_t halves __attribute__((vector_size(LANES * 2)));
    typedef halves halves_anywhere __attribute__((aligned(1), may_alias));
    typedef ints<LANES> ints_anywhere __attribute__((aligned(1), may_alias));
};
template <int LANES> using shorts = typename Parts<LANES>::shorts;
template <int LANES> using ushorts = typename Parts<LANES>::ushorts;
typedef int32_t word __attribute__((may_alias));
typedef float number __attribute__((may_alias));

// f(0), f(1), ... with constants, so that an array of sums is registers before the compiler's first look at it.
#define INLINED __attribute__((always_inline))
template <typename F, int... I> INLINE void each(F f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}
template <int COUNT, typename F> INLINE void each(F f) { each(f, std::make_integer_sequence<int, COUNT>{}); }

// --- one instruction each -------------------------------------------------------------------------------------------

// Written as instructions, because a template cannot carry the target that an intrinsic wants (see vector.h). Clang
// takes no wide vectors into assembly without a target either: for it, and for all but x86, there is code without.
#if defined(__x86_64__) && !defined(__clang__)
#define X86_INSTRUCTIONS 1
template <typename V> INLINE V multiply_bytes(V w, V x) {  // u8 times s8, neighbours added: 16-bit sums
    V result;
    asm("vpmaddubsw %2, %1, %0" : "=v"(result) : "v"(w), "v"(x));
    return result;
}
template <typename V> INLINE V multiply_shorts(V a, V b) {  // s16 times s16, neighbours added: 32-bit sums
    V result;
    asm("vpmaddwd %2, %1, %0" : "=v"(result) : "v"(a), "v"(b));
    return result;
}
// u8 times s8, fours added to a 32-bit sum. The broadcast inside the instruction is half of its speed.
INLINE ints<16> dot_bytes(ints<16> sum, ints<16> w, const word *x) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*x));
    return sum;
}
INLINE floats<16> widen_halves(Parts<16>::halves v) {
    floats<16> result;
    asm("vcvtph2ps %1, %0" : "=v"(result) : "v"(v));
    return result;
}
INLINE floats<8> widen_halves(Parts<8>::halves v) {
    floats<8> result;
    asm("vcvtph2ps %1, %0" : "=v"(result) : "v"(v));
    return result;
}
template <typename V> INLINE V widen_bytes(Parts<16>::bytes v) {  // as many of them as V has lanes
    V result;
    asm("vpmovsxbd %1, %0" : "=v"(result) : "v"(v));
    return result;
}
#else
#define X86_INSTRUCTIONS 0
#endif
#if defined(__ARM_FEATURE_DOTPROD)  // s8 times s8
INLINE ints<4> dot_signed(ints<4> sum, ints<4> w, ints<4> x) {
    return (ints<4>)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)x);
}
#endif

// Whether four products of bytes are added to a 32-bit sum in one instruction.
constexpr bool has_dots(int level) {
#if defined(__ARM_FEATURE_DOTPROD)
    return level == BASE;
#else
    return X86_INSTRUCTIONS && level == VNNI_LEVEL;
#endif
}

// A product is not fused with the sum that follows, so that codes are the twin's.
template <int LANES> INLINE floats<LANES> rounded_product(floats<LANES> a, float b) {
#if defined(__clang__)
#pragma clang fp contract(off)
    return a * b;
#else
    floats<LANES> product = a * b;
#if defined(__x86_64__)
    asm("" : "+x"(product));
#elif defined(__aarch64__)
    asm("" : "+w"(product));
#endif
    return product;
#endif
}

// 16 bit numbers to fp32, exactly.
template <int LEVEL> INLINE floats<lanes_of(LEVEL)> load_halves(const uint16_t *from) {
    constexpr int LANES = lanes_of(LEVEL);
    typename Parts<LANES>::halves halves = *(const typename Parts<LANES>::halves_anywhere *)from;
#if X86_INSTRUCTIONS
    if constexpr (LEVEL != BASE) return widen_halves(halves);
#endif
    ints<LANES> bits = __builtin_convertvector(halves, ints<LANES>);  // 2^112 shifts the exponent to that of fp32
    floats<LANES> size = (floats<LANES>)((bits & 0x7fff) << 13) * 0x1p112f;
    return (floats<LANES>)((ints<LANES>)size | (bits & 0x8000) << 16);
}

template <int LEVEL> INLINE floats<lanes_of(LEVEL)> load_zeros(const int8_t *from) {
    constexpr int LANES = lanes_of(LEVEL);
#if X86_INSTRUCTIONS
    if constexpr (LEVEL != BASE) {
        Parts<16>::bytes bytes{};
        memcpy(&bytes, from, LANES);
        return __builtin_convertvector(widen_bytes<ints<LANES>>(bytes), floats<LANES>);
    }
#endif
    floats<LANES> result;
    for (int l = 0; l < LANES; l++) result[l] = float(from[l]);
    return result;
}

template <int LEVEL> INLINE floats<lanes_of(LEVEL)> load_scales(const void *from, int64_t at, bool half) {
    if (half) return load_halves<LEVEL>((const uint16_t *)from + at);
    return load<lanes_of(LEVEL)>((const float *)from + at);
}

// A word for every lane. As a float, because of whole numbers GCC 12 makes sixteen instructions.
template <int LANES> INLINE ints<LANES> spread_word(float v) {
    if constexpr (LANES == 16) return (ints<16>)floats<16>{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v};
    else if constexpr (LANES == 8) return (ints<8>)floats<8>{v, v, v, v, v, v, v, v};
    else return (ints<4>)floats<4>{v, v, v, v};
}

// --- sums of a block ------------------------------------------------------------------------------------------------

// sum += four columns of w (bytes without a sign) times four codes of x. Where that is not one instruction, eight of
// these fit 16 bits if w < 16: such sums have 16 bits, until `finish`.
template <int LEVEL, int BITS>
INLINE ints<lanes_of(LEVEL)> dot(ints<lanes_of(LEVEL)> sum, ints<lanes_of(LEVEL)> w, const word *four) {
    constexpr int LANES = lanes_of(LEVEL);
    typedef ints<LANES> I;
    typedef shorts<LANES> S;
    typedef ushorts<LANES> U;
    typedef typename Vector<LANES>::words W;
#if X86_INSTRUCTIONS
    if constexpr (LEVEL == VNNI_LEVEL) return dot_bytes(sum, w, four);
#endif
    I x = spread_word<LANES>(*(const number *)four);
#if X86_INSTRUCTIONS
    if constexpr (LEVEL != BASE && BITS == 4) return (I)((S)sum + (S)multiply_bytes(w, x));
#elif defined(__ARM_FEATURE_DOTPROD)
    if constexpr (LEVEL == BASE) return dot_signed(sum, BITS == 8 ? w ^ int32_t(0x80808080) : w, x);
#endif
    // Eight bits take 16-bit factors: the even bytes and the odd ones.
    S even = (S)((U)w & 255), odd = (S)((U)w >> 8), x_even = (S)((U)x << 8) >> 8, x_odd = (S)x >> 8;
#if X86_INSTRUCTIONS
    if constexpr (LEVEL != BASE) return sum + (I)multiply_shorts(even, x_even) + (I)multiply_shorts(odd, x_odd);
#endif
    if constexpr (BITS == 4) return (I)((S)sum + even * x_even + odd * x_odd);
    I first = (I)(even * x_even), second = (I)(odd * x_odd);  // each product fits 16 bits
    return sum + ((I)((W)first << 16) >> 16) + (first >> 16) + ((I)((W)second << 16) >> 16) + (second >> 16);
}

// What a sum of 32 bits starts from: the offset of the codes.
template <int LEVEL, int BITS> INLINE ints<lanes_of(LEVEL)> offset(float minus_8_sums) {
    ints<lanes_of(LEVEL)> eight = spread_word<lanes_of(LEVEL)>(minus_8_sums);
#if defined(__ARM_FEATURE_DOTPROD)
    if constexpr (BITS == 8) return eight ^ eight;  // codes got their signs in `dot`
#endif
    return BITS == 8 ? eight << 4 : eight;
}

template <int LEVEL, int BITS> constexpr bool is_wide() { return has_dots(LEVEL) || BITS == 8; }

template <int LEVEL, int BITS> INLINE ints<lanes_of(LEVEL)> finish(ints<lanes_of(LEVEL)> sum, float minus_8_sums) {
    constexpr int LANES = lanes_of(LEVEL);
    if constexpr (is_wide<LEVEL, BITS>()) return sum;
    ints<LANES> start = offset<LEVEL, BITS>(minus_8_sums);
#if X86_INSTRUCTIONS
    if constexpr (LEVEL != BASE) return start + (ints<LANES>)multiply_shorts(sum, ints<LANES>{} + 0x00010001);
#endif
    typedef typename Vector<LANES>::words W;
    return start + ((ints<LANES>)((W)sum << 16) >> 16) + (sum >> 16);
}

// The sums of one block for ROWS rows and LANES outputs, as whole numbers in fp32 (below 2^24, so exact).
template <int LEVEL, int ROWS, int BITS>
INLINE void block(const uint8_t *codes, const uint8_t *x, floats<lanes_of(LEVEL)> t[ROWS]) {
    constexpr int LANES = lanes_of(LEVEL);
    const number *sums = (const number *)(x + ROWS * (BLOCK + 4));
    // Of one or two rows there are too few sums to fill the time that adding to one takes: every other goes to `more`.
    constexpr bool TWICE = ROWS <= 2 && has_dots(LEVEL);
    ints<LANES> sum[ROWS], more[ROWS];
    each<ROWS>([&](auto r) INLINED {
        sum[r] = is_wide<LEVEL, BITS>() ? offset<LEVEL, BITS>(sums[r]) : ints<LANES>{};
        more[r] = ints<LANES>{};
    });
    UNROLL for (int line = 0; line < BITS; line++) {
        ints<LANES> w = *(const typename Parts<LANES>::ints_anywhere *)(codes + 64 * line);
        ints<LANES> low = BITS == 4 ? w & 0x0f0f0f0f : w, high = (w >> 4) & 0x0f0f0f0f;
        const word *fours = (const word *)x + line * ROWS;
        each<ROWS>([&](auto r) INLINED {
            if (TWICE && BITS == 8 && line % 2) more[r] = dot<LEVEL, BITS>(more[r], low, fours + r);
            else sum[r] = dot<LEVEL, BITS>(sum[r], low, fours + r);
            if constexpr (BITS == 4 && TWICE) more[r] = dot<LEVEL, BITS>(more[r], high, fours + 4 * ROWS + r);
            else if constexpr (BITS == 4) sum[r] = dot<LEVEL, BITS>(sum[r], high, fours + 4 * ROWS + r);
        });
    }
    if constexpr (TWICE) each<ROWS>([&](auto r) INLINED { sum[r] += more[r]; });
    each<ROWS>([&](auto r) INLINED {
        t[r] = __builtin_convertvector(finish<LEVEL, BITS>(sum[r], sums[r]), floats<LANES>);
    });
}

// --- products -------------------------------------------------------------------------------------------------------

int64_t blocks_of(const Tiles &w) { return (w.k + BLOCK - 1) / BLOCK; }

// Rows of a panel in memory: the sizes that there are kernels for. Beyond the last row there are zeros, as sums of what
// happened to lie there (numbers next to nothing) could be slow.
constexpr int64_t padded(int64_t rows) { return rows > 4 ? 8 : rows > 2 ? 4 : rows; }

INLINE void put(const Tiles &w, const float *tile, int64_t rows, int64_t first, float *y, int64_t stride, bool add) {
    int64_t columns = w.n - first < OUTPUTS ? w.n - first : OUTPUTS;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) {
            float value = tile[r * OUTPUTS + c] + (w.bias ? w.bias[first + c] : 0.0f);
            float &to = y[r * stride + first + c];
            to = add ? to + value : value;
        }
}

// LANES outputs from `lane` of a tile for all rows of a panel, into out (ROWS x 16).
template <int LEVEL, int ROWS, int BITS, bool PLAIN>
INLINE void stripe(const Tiles &w, int64_t tile, int lane, const uint8_t *x, float *out) {
    constexpr int LANES = lanes_of(LEVEL);
    constexpr int64_t BYTES = 64 * BITS, AHEAD = 4096;
    int64_t blocks = blocks_of(w), groups = (blocks + w.span - 1) / w.span;
    const uint8_t *codes = w.codes + tile * blocks * BYTES;
    int64_t scale = tile * groups * OUTPUTS + lane;
    floats<LANES> total[ROWS], t[ROWS], part[ROWS], zero{};
    float sums[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) total[r] = floats<LANES>{};
    for (int64_t begin = 0; begin < blocks; begin += w.span, scale += OUTPUTS) {
        int64_t end = begin + w.span < blocks ? begin + w.span : blocks;
        UNROLL for (int r = 0; r < ROWS; r++) part[r] = floats<LANES>{}, sums[r] = 0;
        if (!PLAIN && w.zeros)  // of eighths: the sums come times 8
            zero = load_zeros<LEVEL>(w.zeros + scale) * 0.125f;
        for (int64_t b = begin; b < end; b++, codes += BYTES, x += ROWS * PER_ROW) {
            if (BITS == 4)  // with eight the processor fetches ahead better by itself
                UNROLL for (int line = 0; line < BITS; line++) __builtin_prefetch(codes + AHEAD + 64 * line);
            const number *d = (const number *)(x + ROWS * BLOCK);
            const word *minus_8_sums = (const word *)(x + ROWS * (BLOCK + 4));
            const number *eights = (const number *)minus_8_sums;  // their bits
            block<LEVEL, ROWS, BITS>(codes + 4 * lane, x, t);
            if (!PLAIN && w.zeros)
                UNROLL for (int r = 0; r < ROWS; r++)
                    t[r] += zero * __builtin_convertvector(spread_word<LANES>(eights[r]), floats<LANES>);
            if (!PLAIN && w.mins)
                UNROLL for (int r = 0; r < ROWS; r++) sums[r] += d[r] * float(minus_8_sums[r]);
            UNROLL for (int r = 0; r < ROWS; r++) part[r] += t[r] * d[r];
        }
        floats<LANES> factor = load_scales<LEVEL>(w.scales, scale, w.half);
        UNROLL for (int r = 0; r < ROWS; r++) total[r] += part[r] * factor;
        if (!PLAIN && w.mins) {
            floats<LANES> least = load_scales<LEVEL>(w.mins, scale, w.half) * 0.125f;
            UNROLL for (int r = 0; r < ROWS; r++) total[r] += least * sums[r];
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++) store<LANES>(out + r * OUTPUTS + lane, total[r]);
}

template <int LEVEL, int ROWS, int BITS> INLINE void panel(const Tiles &w, int64_t tile, const uint8_t *x, float *out) {
    for (int lane = 0; lane < OUTPUTS; lane += lanes_of(LEVEL))
        if (w.zeros || w.mins) stripe<LEVEL, ROWS, BITS, false>(w, tile, lane, x, out);
        else stripe<LEVEL, ROWS, BITS, true>(w, tile, lane, x, out);
}

template <int LEVEL, int BITS>
INLINE void panel_of(const Tiles &w, int64_t tile, int64_t rows, const uint8_t *x, float *out) {
    if (rows > 4) panel<LEVEL, 8, BITS>(w, tile, x, out);
    else if (rows > 2) panel<LEVEL, 4, BITS>(w, tile, x, out);
    else if (rows == 2) panel<LEVEL, 2, BITS>(w, tile, x, out);
    else panel<LEVEL, 1, BITS>(w, tile, x, out);
}

// All rows times a range of tiles: as many panels as stay in a core's own cache, for which a tile is read once.
struct Work {
    const uint8_t *x;
    int64_t rows;
    float *y;
    int64_t y_stride, first, end;
    bool add;
};

template <int LEVEL> INLINE void multiply(const Tiles &w, const Work &work) {
    constexpr int64_t CACHED = 256 << 10;
    int64_t panel_bytes = PANEL * blocks_of(w) * PER_ROW, step = CACHED / panel_bytes * PANEL;
    if (step < PANEL) step = PANEL;
    alignas(64) float out[PANEL * OUTPUTS];
    for (int64_t from = 0; from < work.rows; from += step)
        for (int64_t tile = work.first; tile < work.end; tile++)
            for (int64_t row = from; row < from + step && row < work.rows; row += PANEL) {
                int64_t rows = work.rows - row < PANEL ? work.rows - row : PANEL;
                const uint8_t *x = work.x + row / PANEL * panel_bytes;
                if (w.bits == 4) panel_of<LEVEL, 4>(w, tile, rows, x, out);
                else panel_of<LEVEL, 8>(w, tile, rows, x, out);
                put(w, out, rows, tile * OUTPUTS, work.y + row * work.y_stride, work.y_stride, work.add);
            }
}

// --- rounding of x --------------------------------------------------------------------------------------------------

template <int LANES> INLINE float largest(floats<LANES> v) {
    float most = v[0];
    for (int lane = 1; lane < LANES; lane++) most = v[lane] > most ? v[lane] : most;
    return most;
}

// 32 numbers; all are 0 below 2^-100, where 127 / most could be infinite. d is nan if one of them is not finite.
template <int LANES> INLINE void round_block(const float *x, int8_t *codes, number *d, word *minus_8_sum) {
    constexpr float WHOLE = 12582912.0f;  // 1.5 * 2^23: a sum with it has no bits below 1, its low bits are the code
    floats<LANES> most{}, nothing{};
    for (int at = 0; at < BLOCK; at += LANES) {
        floats<LANES> v = load<LANES>(x + at), size = (floats<LANES>)((ints<LANES>)v & 0x7fffffff);
        most = size > most ? size : most;
        nothing += v * 0.0f;
    }
    float range = largest<LANES>(most), steps = range > 0x1p-100f ? 127.0f / range : 0.0f;
    ints<LANES> total{};
    for (int at = 0; at < BLOCK; at += LANES) {
        ints<LANES> code = (ints<LANES>)(rounded_product<LANES>(load<LANES>(x + at), steps) + WHOLE) - 0x4b400000;
        total += code;
        *(typename Parts<LANES>::bytes_anywhere *)(codes + at) =
            __builtin_convertvector(code, typename Parts<LANES>::bytes);
    }
    int32_t sum_of_codes = 0;
    for (int lane = 0; lane < LANES; lane++) sum_of_codes += total[lane];
    *d = (steps == 0 ? 0.0f : range / 127.0f) + sum<LANES>(nothing);
    *minus_8_sum = -8 * sum_of_codes;
}

struct Rows {
    const float *x;
    int64_t stride, rows, first, end;
    uint8_t *to;
};

template <int LANES> INLINE void round_rows(const Tiles &w, const Rows &p) {
    int64_t blocks = blocks_of(w);
    float buffer[BLOCK];
    for (int64_t row = p.first; row < p.end; row++) {
        int64_t in_panel = row % PANEL, left = p.rows - (row - in_panel), height = left < PANEL ? padded(left) : PANEL;
        uint8_t *to = p.to + row / PANEL * PANEL * blocks * PER_ROW;
        const float *x = p.x + row * p.stride;
        for (int64_t b = 0; b < blocks; b++, to += height * PER_ROW) {
            const float *from = x + b * BLOCK;
            int64_t columns = w.k - b * BLOCK < BLOCK ? w.k - b * BLOCK : BLOCK;
            if (w.order || columns < BLOCK) {
                for (int64_t i = 0; i < BLOCK; i++)
                    buffer[i] = i >= columns ? 0.0f : w.order ? x[w.order[b * BLOCK + i]] : from[i];
                from = buffer;
            }
            word codes[BLOCK / 4], *fours = (word *)to + in_panel;
            round_block<LANES>(from, (int8_t *)codes, (number *)fours + height * (BLOCK / 4),
                               fours + height * (BLOCK / 4 + 1));
            for (int64_t i = 0; i < BLOCK / 4; i++) fours[i * height] = codes[i];
        }
    }
    int64_t last = p.rows % PANEL, height = padded(last);
    if (p.end < p.rows || last == height) return;
    uint8_t *to = p.to + p.rows / PANEL * PANEL * blocks * PER_ROW;
    for (int64_t b = 0; b < blocks; b++, to += height * PER_ROW)
        for (int64_t i = 0; i < PER_ROW / 4; i++) memset(to + 4 * (i * height + last), 0, size_t(4 * (height - last)));
}

// --- between canonical codes and tiles ------------------------------------------------------------------------------

// Packed as "PPqqqii". codes (n, row_bytes): int8, or nibbles as in `Packed`; tiles as above.
struct Layout {
    uint8_t *codes, *tiles;
    int64_t n, k, row_bytes;
    int32_t bits, threads;
};

INLINE uint64_t spread(uint32_t nibbles) {  // one in each byte
    uint64_t v = nibbles;
    v = (v | v << 16) & 0x0000ffff0000ffffull;
    v = (v | v << 8) & 0x00ff00ff00ff00ffull;
    return (v | v << 4) & 0x0f0f0f0f0f0f0f0full;
}

INLINE uint32_t gather(uint64_t v) {  // the inverse
    v = (v | v >> 4) & 0x00ff00ff00ff00ffull;
    v = (v | v >> 8) & 0x0000ffff0000ffffull;
    return uint32_t(v | v >> 16);
}

// 32 codes of one output, to or from where its bytes stand in a block.
INLINE void nibbles_in(const uint8_t *codes, uint8_t *tile) {
    for (int i = 0; i < 2; i++) {
        uint32_t low, high;
        memcpy(&low, codes + 4 * i, 4), memcpy(&high, codes + 8 + 4 * i, 4);
        uint64_t both = spread(low) | spread(high) << 4;
        memcpy(tile + 128 * i, &both, 4);
        both >>= 32;
        memcpy(tile + 128 * i + 64, &both, 4);
    }
}

INLINE void nibbles_out(const uint8_t *tile, uint8_t *codes) {
    for (int i = 0; i < 2; i++) {
        uint32_t first, second;
        memcpy(&first, tile + 128 * i, 4), memcpy(&second, tile + 128 * i + 64, 4);
        uint64_t both = first | uint64_t(second) << 32;
        uint32_t low = gather(both & 0x0f0f0f0f0f0f0f0full), high = gather(both >> 4 & 0x0f0f0f0f0f0f0f0full);
        memcpy(codes + 4 * i, &low, 4), memcpy(codes + 8 + 4 * i, &high, 4);
    }
}

INLINE void bytes_in(const uint8_t *codes, uint8_t *tile) {
    for (int line = 0; line < 8; line++) {
        uint32_t four;
        memcpy(&four, codes + 4 * line, 4);
        four ^= 0x80808080u;
        memcpy(tile + 64 * line, &four, 4);
    }
}

INLINE void bytes_out(const uint8_t *tile, uint8_t *codes) {
    for (int line = 0; line < 8; line++) {
        uint32_t four;
        memcpy(&four, tile + 64 * line, 4);
        four ^= 0x80808080u;
        memcpy(codes + 4 * line, &four, 4);
    }
}

template <bool IN> INLINE void convert_codes(int32_t bits, uint8_t *codes, uint8_t *tile) {
    if (IN && bits == 4) nibbles_in(codes, tile);
    else if (IN) bytes_in(codes, tile);
    else if (bits == 4) nibbles_out(tile, codes);
    else bytes_out(tile, codes);
}

// Beyond the last row or column there is anything: scales and numbers of x are zero there.
template <bool IN> INLINE void convert(const Layout &p, int64_t tile) {
    int64_t blocks = (p.k + BLOCK - 1) / BLOCK, bytes = BLOCK * p.bits / 8;  // of one output in a block
    uint8_t *to = p.tiles + tile * blocks * OUTPUTS * bytes, buffer[BLOCK] = {};
    for (int64_t b = 0; b < blocks; b++, to += OUTPUTS * bytes)
        for (int64_t r = 0; r < OUTPUTS; r++) {
            int64_t row = tile * OUTPUTS + r, left = row < p.n ? p.row_bytes - b * bytes : 0;
            uint8_t *codes = p.codes + row * p.row_bytes + b * bytes;
            if (left >= bytes) {
                convert_codes<IN>(p.bits, codes, to + 4 * r);
                continue;
            }
            if (IN) memset(buffer, 0, sizeof buffer), memcpy(buffer, codes, size_t(left));
            convert_codes<IN>(p.bits, buffer, to + 4 * r);
            if (!IN) memcpy(codes, buffer, size_t(left));
        }
}

template <bool IN> void convert_all(const Layout &p) {
    int64_t tiles = (p.n + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.threads > 1 && tiles > 64)
    for (int64_t tile = 0; tile < tiles; tile++) convert<IN>(p, tile);
}

// --- one function per level -----------------------------------------------------------------------------------------

void multiply_baseline(const Tiles &w, const Work &work) { multiply<BASE>(w, work); }
void round_baseline(const Tiles &w, const Rows &rows) { round_rows<4>(w, rows); }
#if defined(__x86_64__)
AVX2 void multiply_avx2(const Tiles &w, const Work &work) { multiply<AVX2_LEVEL>(w, work); }
AVX2 void round_avx2(const Tiles &w, const Rows &rows) { round_rows<8>(w, rows); }
AVX512 void multiply_avx512(const Tiles &w, const Work &work) { multiply<AVX512_LEVEL>(w, work); }
AVX512 void round_avx512(const Tiles &w, const Rows &rows) { round_rows<16>(w, rows); }
AVX512 void multiply_vnni(const Tiles &w, const Work &work) { multiply<VNNI_LEVEL>(w, work); }
#endif

// Packed as "PPqqq" and a `Tiles` ("PPPPPPqqqiii4x"). x (rows, k) fp32 with row stride x_stride, y (rows, n) fp32.
struct Problem {
    const float *x;
    float *y;
    int64_t rows, x_stride, threads;
    Tiles w;
};

bool same_input(const Problem &p, const Problem &q) { return p.x == q.x && p.w.k == q.w.k && p.w.order == q.w.order; }

constexpr int64_t MOST = 4;

}  // namespace

size_t tiles_rounded_bytes(int64_t rows, int64_t k) {
    return size_t((rows / PANEL * PANEL + padded(rows % PANEL)) * ((k + BLOCK - 1) / BLOCK) * PER_ROW);
}

void tiles_round(const Tiles &w, const float *x, int64_t stride, int64_t rows, int64_t first, int64_t end, void *to) {
    Rows part{x, stride, rows, first, end, (uint8_t *)to};
#if defined(__x86_64__)
    if (w.level >= AVX512_LEVEL) return round_avx512(w, part);
    if (w.level == AVX2_LEVEL) return round_avx2(w, part);
#endif
    round_baseline(w, part);
}

void tiles_multiply(const Tiles &w, const void *rounded, int64_t rows, float *y, int64_t y_stride, int64_t first_tile,
                    int64_t end_tile, bool add) {
    Work work{(const uint8_t *)rounded, rows, y, y_stride, first_tile, end_tile, add};
#if defined(__x86_64__)
    if (w.level == VNNI_LEVEL) return multiply_vnni(w, work);
    if (w.level == AVX512_LEVEL) return multiply_avx512(w, work);
    if (w.level == AVX2_LEVEL) return multiply_avx2(w, work);
#endif
    multiply_baseline(w, work);
}

extern "C" {

// The highest level of this processor: 0 any, 1 AVX2, 2 AVX-512, 3 AVX-512 with dot products of bytes.
int puna_tiles_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return BASE;  // with F16C
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return AVX2_LEVEL;
    return __builtin_cpu_supports("avx512vnni") ? VNNI_LEVEL : AVX512_LEVEL;
#else
    return BASE;
#endif
}

void puna_tiles_pack(const Layout *p) { convert_all<true>(*p); }
void puna_tiles_unpack(const Layout *p) { convert_all<false>(*p); }

// One to four products of as many rows; threads are the first one's. 1: no memory for the rounded rows.
int puna_tiles_product(const Problem *problems, int64_t count) {
    constexpr int64_t SHARE = 64 << 10, WAKE = 1 << 15;  // bytes of a share; numbers worth waking a core for
    int64_t rows = problems[0].rows, share[MOST], last[MOST], shares = 0;
    size_t at[MOST], room = 0;
    for (int64_t i = 0; i < count; i++) {
        const Problem &p = problems[i];
        int64_t bytes = blocks_of(p.w) * 64 * p.w.bits;
        share[i] = SHARE / bytes + 1;
        last[i] = shares += (tiles_of(p.w) + share[i] - 1) / share[i];
        if (i && same_input(problems[i - 1], p)) at[i] = at[i - 1];
        else at[i] = room, room += (tiles_rounded_bytes(rows, p.w.k) + 63) / 64 * 64;
    }
    uint8_t *memory = (uint8_t *)aligned_alloc(64, room);
    if (!memory) return 1;
    int64_t threads = problems[0].threads < shares ? problems[0].threads : shares;
    for (int64_t i = 0; i < count; i++) {
        const Problem &p = problems[i];
        if (i && at[i] == at[i - 1]) continue;
        int64_t parts = rows * p.w.k < WAKE ? 1 : threads < rows ? threads : rows;
#pragma omp parallel for schedule(static) num_threads(parts) if (parts > 1)
        for (int64_t part = 0; part < parts; part++)
            tiles_round(p.w, p.x, p.x_stride, rows, part * rows / parts, (part + 1) * rows / parts, memory + at[i]);
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t s = 0; s < shares; s++) {
        int64_t i = 0;
        while (s >= last[i]) i++;
        const Problem &p = problems[i];
        int64_t first = (s - (i ? last[i - 1] : 0)) * share[i], end = first + share[i], tiles = tiles_of(p.w);
        tiles_multiply(p.w, memory + at[i], rows, p.y, p.w.n, first, end < tiles ? end : tiles, false);
    }
    free(memory);
    return 0;
}
}

// llama.cpp's K blocks: the search for the best scales, and packing. Byte for byte the same as the twin in torch,
// ops/formats/gguf_k.py and gguf_search.py, which explain what is computed and why; here is only how.
//
// Sixteen groups (two blocks of Q4_K or Q5_K, one of Q6_K) are worked on side by side, one lane each, so that no sum
// runs across a vector. Same bytes need the same order of every sum (halves added to halves) and every product rounded
// by itself: no fused multiply-add.

#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "vector.h"

namespace {

constexpr int GROUPS = 16, BLOCK = 256;
constexpr float HALF_MAX = 65504.0f, FLAT = 1e-5f, LARGEST = 3.40282347e38f;

// x (blocks, 256); importance (per_row * 256) or null, block b of x stands at place (first + b) % per_row of its row;
// out (blocks, bytes of the kind); factors: codes that the range is divided by, one per trial. kind: 4, 5 or 6 bits.
// Packed as "PPPPqqqiiii".
struct Problem {
    const float *x, *importance;
    uint8_t *out;
    const float *factors;
    int64_t blocks, first, per_row;
    int32_t trials, kind, threads, level;
};

// --- numbers ---------------------------------------------------------------------------------------------------------

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// To nearest, ties to even.
INLINE uint16_t to_half(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits >= 0x47800000u) return uint16_t(sign | (bits > 0x7f800000u ? 0x7e00u : 0x7c00u));
    // Below 2^-14 the last bit of a half is worth 2^-24, which is that of fp32 numbers from 1/2 to 1.
    if (bits < 0x38800000u) return uint16_t(sign | (bits_of(float_of(bits) + 0.5f) - 0x3f000000u));
    return uint16_t(sign | ((bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13));
}

INLINE float from_half(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000u) << 16, rest = half & 0x7fffu;
    if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    if (rest < 0x400u) return float_of(sign | bits_of(float(rest) * 0x1p-24f));
    return float_of(sign | ((rest << 13) + 0x38000000u));
}

INLINE float rounded_half(float value) { return from_half(to_half(value)); }
INLINE bool is_finite(float value) { return (bits_of(value) & 0x7f800000u) != 0x7f800000u; }
INLINE float clamp(float value, float least, float most) { return value < least ? least : value > most ? most : value; }

// 1 / d, and 0 where that is infinite.
INLINE float inverse(float d) {
    float result = 1.0f / d;
    return is_finite(result) || result != result ? result : 0.0f;
}

// To nearest, ties to even, up to 2^22; beyond, to some number beyond.
template <typename T> INLINE T nearest(T value) { return (value + 12582912.0f) - 12582912.0f; }

template <int LANES> INLINE floats<LANES> smaller(floats<LANES> a, floats<LANES> b) { return a < b ? a : b; }
template <int LANES> INLINE floats<LANES> larger(floats<LANES> a, floats<LANES> b) { return a > b ? a : b; }

// The square root of each lane, correctly rounded.
template <int LANES> INLINE floats<LANES> root(floats<LANES> v) {
    for (int lane = 0; lane < LANES; lane++) v[lane] = __builtin_sqrtf(v[lane]);
    return v;
}

// --- sums ------------------------------------------------------------------------------------------------------------

// The sum of leaf(0) .. leaf(SIZE - 1), each half added to the other, as `total` in gguf_search.py.
template <int LEAVES, int SIZE, typename Leaf> INLINE auto tree(const Leaf &leaf, int at) {
    if constexpr (LEAVES == 1) {
        return leaf(at);
    } else {
        auto sum = tree<LEAVES / 2, SIZE>(leaf, at);
        sum += tree<LEAVES / 2, SIZE>(leaf, at + SIZE / LEAVES);
        return sum;
    }
}

INLINE float sum_of_8(const float *v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

template <int LANES, int COUNT> struct Several {
    floats<LANES> sum[COUNT];
    __attribute__((always_inline)) void operator+=(const Several &other) {
        UNROLL for (int i = 0; i < COUNT; i++) sum[i] += other.sum[i];
    }
};

template <int LANES> struct Square {
    const float *x;
    __attribute__((always_inline)) floats<LANES> operator()(int i) const {
        floats<LANES> v = load<LANES>(x + i * GROUPS);
        return v * v;
    }
};

template <int LANES> struct Weighted {  // w and w y
    const float *w, *y;
    __attribute__((always_inline)) Several<LANES, 2> operator()(int i) const {
        floats<LANES> v = load<LANES>(w + i * GROUPS);
        return {{v, v * load<LANES>(y + i * GROUPS)}};
    }
};

template <int LANES> struct Trial {  // w q, w q y and w q q, for the codes of one trial
    const float *w, *y;
    floats<LANES> steps, lowest, highest;
    __attribute__((always_inline)) Several<LANES, 3> operator()(int i) const {
        floats<LANES> v = load<LANES>(y + i * GROUPS);
        floats<LANES> q = larger<LANES>(smaller<LANES>(nearest(v * steps), highest), lowest);
        floats<LANES> wq = load<LANES>(w + i * GROUPS) * q;
        return {{wq, wq * v, wq * q}};
    }
};

template <int LANES> struct Fit {  // w q q, w q, w, w q x and w x, for the codes that the block really stores
    const float *w, *x, *q;
    __attribute__((always_inline)) Several<LANES, 5> operator()(int i) const {
        floats<LANES> v = load<LANES>(w + i * GROUPS), c = load<LANES>(q + i * GROUPS), y = load<LANES>(x + i * GROUPS);
        floats<LANES> wq = v * c;
        return {{wq * c, wq, v, wq * y, v * y}};
    }
};

// --- the searches ----------------------------------------------------------------------------------------------------

// gguf_search.search_line for LANES groups of 32; y is room for 32 rows.
template <int LANES>
INLINE void search_line(const Problem &p, const float *x, const float *w, float *y, float highest, float *scale,
                        float *offset) {
    typedef floats<LANES> V;
    V low = {}, span = fill<LANES>(-LARGEST);
    for (int i = 0; i < 32; i++) low = smaller<LANES>(low, load<LANES>(x + i * GROUPS));
    for (int i = 0; i < 32; i++) {
        V v = load<LANES>(x + i * GROUPS) - low;
        store<LANES>(y + i * GROUPS, v);
        span = larger<LANES>(span, v);
    }
    auto of = tree<32, 32>(Weighted<LANES>{w, y}, 0);
    V sum_w = of.sum[0], sum_y = of.sum[1], steps = fill<LANES>(1.0f) / span;
    steps = steps > LARGEST ? V{} : steps;
    V least = fill<LANES>(__builtin_inff()), best_s = {}, best_t = {};
    ints<LANES> broken = {};
    for (int trial = 0; trial < p.trials; trial++) {
        Trial<LANES> leaf = {w, y, steps * p.factors[trial], fill<LANES>(-LARGEST), fill<LANES>(highest)};
        auto with = tree<32, 32>(leaf, 0);
        V sum_q = with.sum[0], sum_qy = with.sum[1], sum_qq = with.sum[2];
        V det = sum_w * sum_qq - sum_q * sum_q;
        V t = smaller<LANES>(-low, (sum_qq * sum_y - sum_q * sum_qy) / det);  // in this order a nan stays one
        V s = (sum_qy - t * sum_q) / sum_qq;
        V error = s * (s * sum_qq + 2.0f * (t * sum_q - sum_qy)) + t * (t * sum_w - 2.0f * sum_y);
        error = det > FLAT * sum_w * sum_qq ? error : fill<LANES>(__builtin_inff());
        broken |= error != error;
        best_s = error < least ? s : best_s;
        best_t = error < least ? t : best_t;
        least = smaller<LANES>(error, least);
    }
    ints<LANES> fits = (least < LARGEST) & (least > -LARGEST) & ~broken;
    store<LANES>(scale, fits ? best_s : span / highest);
    store<LANES>(offset, fits ? -(low + best_t) : -low);
}

// gguf_search.search_scale for LANES groups of 16, codes -32 .. 31.
template <int LANES> INLINE void search_scale(const Problem &p, const float *x, const float *w, float *scale) {
    typedef floats<LANES> V;
    V high = load<LANES>(x), low = high;
    for (int i = 1; i < 16; i++) {
        high = larger<LANES>(high, load<LANES>(x + i * GROUPS));
        low = smaller<LANES>(low, load<LANES>(x + i * GROUPS));
    }
    V peak = high > -low ? high : low, steps = fill<LANES>(1.0f) / peak;
    steps = (steps > LARGEST) | (steps < -LARGEST) ? V{} : steps;
    V most = fill<LANES>(-__builtin_inff()), best = {};
    for (int trial = 0; trial < p.trials; trial++) {
        Trial<LANES> leaf = {w, x, steps * p.factors[trial], fill<LANES>(-32.0f), fill<LANES>(31.0f)};
        auto with = tree<16, 16>(leaf, 0);
        V s = with.sum[1] / with.sum[2], gain = s * with.sum[1];
        gain = gain == gain ? gain : V{};
        gain = larger<LANES>(smaller<LANES>(gain, fill<LANES>(LARGEST)), fill<LANES>(-LARGEST));
        best = gain > most ? s : best;
        most = larger<LANES>(gain, most);
    }
    store<LANES>(scale, most > 0.0f ? best : peak / -32.0f);
}

// --- Q4_K and Q5_K ---------------------------------------------------------------------------------------------------

// How much an error on each weight counts, for LANES groups of 32 without importance: gguf_k._weights.
template <int LANES> INLINE void weights(const float *x, float *w) {
    floats<LANES> mean = root<LANES>(tree<32, 32>(Square<LANES>{x}, 0) * (1.0f / 32.0f));
    for (int i = 0; i < 32; i++) {
        floats<LANES> v = load<LANES>(x + i * GROUPS);
        store<LANES>(w + i * GROUPS, mean + (v < 0.0f ? -v : v));
    }
}

// The same with importance, for one block of 8 groups; x and w point at the first.
INLINE void important_weights(const float *block, const float *importance, float *w) {
    float squares[BLOCK], sums[BLOCK];
    for (int i = 0; i < BLOCK; i++) sums[i] = squares[i] = block[i] * block[i];
    for (int half = BLOCK / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    float mean = sums[0] / 128.0f;
    for (int i = 0; i < BLOCK; i++) squares[i] = __builtin_sqrtf(squares[i] + mean) * importance[i];
    for (int i = 0; i < BLOCK; i++) w[i % 32 * GROUPS + i / 32] = squares[i];
}

// Codes (as floats) for the scales and offsets of each group.
template <int LANES>
INLINE void round_codes(const float *x, const float *scale, const float *offset, float highest, float *q) {
    floats<LANES> steps, shift = load<LANES>(offset);
    UNROLL for (int lane = 0; lane < LANES; lane++) steps[lane] = inverse(scale[lane]);
    for (int i = 0; i < 32; i++) {
        floats<LANES> v = nearest((load<LANES>(x + i * GROUPS) + shift) * steps);
        store<LANES>(q + i * GROUPS, smaller<LANES>(larger<LANES>(v, floats<LANES>{}), fill<LANES>(highest)));
    }
}

struct Units {  // what one block stores: its two fp16 units and the factors of its 8 groups
    float d, dmin, sc[8], m[8];
};

// gguf_k._six_bits; + 0 turns -0, whose sign no order of comparisons decides, into 0.
INLINE float six_bits(const float *values, float *factors) {
    float most = values[0];
    for (int g = 1; g < 8; g++) most = values[g] > most ? values[g] : most;
    float unit = rounded_half(clamp(most / 63.0f, -LARGEST, HALF_MAX) + 0.0f), steps = inverse(unit);
    for (int g = 0; g < 8; g++) factors[g] = clamp(nearest(values[g] * steps), 0.0f, 63.0f);
    return unit;
}

// gguf_k._refit: sums[k][g] as `Fit` gives them, of this block's groups.
INLINE void refit(Units &u, const float (*sums)[GROUPS]) {
    float part[5][8], all[5];
    for (int g = 0; g < 8; g++) {
        float sc = u.sc[g], m = u.m[g];
        part[0][g] = sc * sc * sums[0][g];
        part[1][g] = sc * m * sums[1][g];
        part[2][g] = m * m * sums[2][g];
        part[3][g] = sc * sums[3][g];
        part[4][g] = m * sums[4][g];
    }
    for (int k = 0; k < 5; k++) all[k] = sum_of_8(part[k]);
    float a = all[0], b = all[1], c = all[2], f = all[3], g = all[4], det = a * c - b * b;
    float d = rounded_half((c * f - b * g) / det), dmin = rounded_half((b * f - a * g) / det);
    if (det > 1e-4f * a * c && d > 0 && dmin >= 0 && is_finite(d) && is_finite(dmin)) {
        u.d = d;
        u.dmin = dmin;
    }
}

INLINE void store_half(uint8_t *to, float value) {
    uint16_t half = to_half(value);
    to[0] = uint8_t(half);
    to[1] = uint8_t(half >> 8);
}

// One block; q points at the codes of its first group.
INLINE void pack_line(const Units &u, const float *q, bool has_fifth, uint8_t *out) {
    store_half(out, u.d);
    store_half(out + 2, u.dmin);
    for (int k = 0; k < 4; k++) {
        uint8_t s = uint8_t(u.sc[k]), s4 = uint8_t(u.sc[k + 4]), m = uint8_t(u.m[k]), m4 = uint8_t(u.m[k + 4]);
        out[4 + k] = uint8_t(s | s4 >> 4 << 6);
        out[8 + k] = uint8_t(m | m4 >> 4 << 6);
        out[12 + k] = uint8_t((s4 & 15) | m4 << 4);
    }
    uint8_t *nibbles = out + (has_fifth ? 48 : 16);
    for (int i = 0; i < 32; i++) {
        uint8_t codes[8], fifth = 0;
        for (int g = 0; g < 8; g++) codes[g] = uint8_t(q[i * GROUPS + g]);
        for (int g = 0; g < 8; g++) fifth = uint8_t(fifth | codes[g] >> 4 << g);
        if (has_fifth) out[16 + i] = fifth;
        for (int k = 0; k < 4; k++) nibbles[k * 32 + i] = uint8_t((codes[2 * k] & 15) | codes[2 * k + 1] << 4);
    }
}

// Two blocks (or one: then the other half holds zeros), from block `at`.
template <int LANES> INLINE void line_blocks(const Problem &p, int64_t at, int count) {
    alignas(64) float x[32 * GROUPS], w[32 * GROUPS], room[32 * GROUPS];
    alignas(64) float scale[GROUPS], offset[GROUPS], sums[5][GROUPS];
    float highest = p.kind == 4 ? 15.0f : 31.0f;
    Units units[2];
    if (count < 2) memset(x, 0, sizeof x), memset(w, 0, sizeof w);
    for (int b = 0; b < count; b++) {
        const float *from = p.x + (at + b) * BLOCK;
        for (int g = 0; g < 8; g++)
            for (int i = 0; i < 32; i++) x[i * GROUPS + 8 * b + g] = from[32 * g + i];
        if (p.importance)
            important_weights(from, p.importance + (p.first + at + b) % p.per_row * BLOCK, w + 8 * b);
    }
    for (int lane = 0; lane < GROUPS; lane += LANES) {
        if (!p.importance) weights<LANES>(x + lane, w + lane);
        search_line<LANES>(p, x + lane, w + lane, room + lane, highest, scale + lane, offset + lane);
    }
    auto scaled = [&](int b) __attribute__((always_inline)) {
        for (int g = 0; g < 8; g++) {
            scale[8 * b + g] = units[b].d * units[b].sc[g];
            offset[8 * b + g] = units[b].dmin * units[b].m[g];
        }
    };
    for (int b = 0; b < 2; b++) {
        units[b].d = six_bits(scale + 8 * b, units[b].sc);
        units[b].dmin = six_bits(offset + 8 * b, units[b].m);
        scaled(b);
    }
    for (int lane = 0; lane < GROUPS; lane += LANES) {
        round_codes<LANES>(x + lane, scale + lane, offset + lane, highest, room + lane);
        auto fit = tree<32, 32>(Fit<LANES>{w + lane, x + lane, room + lane}, 0);
        for (int k = 0; k < 5; k++) store<LANES>(sums[k] + lane, fit.sum[k]);
    }
    for (int b = 0; b < 2; b++) {
        refit(units[b], (const float(*)[GROUPS])(sums[0] + 8 * b));
        scaled(b);
    }
    for (int lane = 0; lane < GROUPS; lane += LANES)
        round_codes<LANES>(x + lane, scale + lane, offset + lane, highest, room + lane);
    int64_t bytes = p.kind == 4 ? 144 : 176;
    for (int b = 0; b < count; b++) pack_line(units[b], room + 8 * b, p.kind == 5, p.out + (at + b) * bytes);
}

// --- Q6_K ------------------------------------------------------------------------------------------------------------

template <int LANES> INLINE void six_bit_block(const Problem &p, int64_t at) {
    alignas(64) float x[16 * GROUPS], w[16 * GROUPS], scale[GROUPS], steps[GROUPS];
    const float *from = p.x + at * BLOCK;
    const float *importance = p.importance ? p.importance + (p.first + at) % p.per_row * BLOCK : nullptr;
    for (int g = 0; g < 16; g++)
        for (int i = 0; i < 16; i++) {
            float v = from[16 * g + i];
            x[i * GROUPS + g] = v;
            w[i * GROUPS + g] = importance ? importance[16 * g + i] : v * v;
        }
    for (int lane = 0; lane < GROUPS; lane += LANES) search_scale<LANES>(p, x + lane, w + lane, scale + lane);
    float peak = scale[0], size = 0.0f;
    for (int g = 0; g < 16; g++) {
        float magnitude = float_of(bits_of(scale[g]) & 0x7fffffffu);
        if (magnitude > size) size = magnitude, peak = scale[g];
    }
    float d = rounded_half(clamp(peak / -128.0f, -HALF_MAX, HALF_MAX) + 0.0f), unit = inverse(d);
    uint8_t *out = p.out + at * 210, codes[BLOCK];
    for (int g = 0; g < 16; g++) {
        float sc = clamp(nearest(scale[g] * unit), -128.0f, 127.0f);
        out[192 + g] = uint8_t(int8_t(sc));
        steps[g] = inverse(d * sc);
    }
    for (int g = 0; g < 16; g++)
        for (int i = 0; i < 16; i++)
            codes[16 * g + i] = uint8_t(clamp(nearest(from[16 * g + i] * steps[g]), -32.0f, 31.0f) + 32.0f);
    for (int half = 0; half < 2; half++) {
        const uint8_t *q = codes + 128 * half;
        for (int i = 0; i < 64; i++) out[64 * half + i] = uint8_t((q[i] & 15) | q[64 + i] << 4);
        for (int i = 0; i < 32; i++)
            out[128 + 32 * half + i] =
                uint8_t(q[i] >> 4 | q[32 + i] >> 4 << 2 | q[64 + i] >> 4 << 4 | q[96 + i] >> 4 << 6);
    }
    store_half(out + 208, d);
}

template <int LANES> INLINE void share(const Problem &p, int64_t begin, int64_t end) {
    if (p.kind == 6) {
        for (int64_t at = begin; at < end; at++) six_bit_block<LANES>(p, at);
    } else {
        for (int64_t at = begin; at < end; at += 2) line_blocks<LANES>(p, at, end - at < 2 ? 1 : 2);
    }
}

void share_baseline(const Problem &p, int64_t begin, int64_t end) { share<4>(p, begin, end); }
#if defined(__x86_64__)
AVX2 void share_avx2(const Problem &p, int64_t begin, int64_t end) { share<8>(p, begin, end); }
AVX512 void share_avx512(const Problem &p, int64_t begin, int64_t end) { share<16>(p, begin, end); }
#endif

}  // namespace

extern "C" void puna_k_blocks(const char *packed) {
    const Problem &p = *reinterpret_cast<const Problem *>(packed);
    auto work = share_baseline;
#if defined(__x86_64__)
    work = p.level == 2 ? share_avx512 : p.level == 1 ? share_avx2 : share_baseline;
#endif
    constexpr int64_t SHARE = 64;  // blocks, even: two are worked on at once
    int64_t shares = (p.blocks + SHARE - 1) / SHARE;
#pragma omp parallel for schedule(dynamic) num_threads(p.threads) if (p.threads > 1 && shares > 1)
    for (int64_t s = 0; s < shares; s++) {
        int64_t end = (s + 1) * SHARE;
        work(p, s * SHARE, end < p.blocks ? end : p.blocks);
    }
}

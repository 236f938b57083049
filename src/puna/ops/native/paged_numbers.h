// The numbers that a KV cache may hold: to fp32 and back, as torch rounds. The names are those of paged.h's kinds.

#pragma once

#include <cmath>

#include "vector.h"

#define UNROLL_16 _Pragma("GCC unroll 16")

namespace {

struct half {
    uint16_t bits;
};
struct int8 {
    int8_t code;
};
struct float8 {  // e4m3fn: sign, four bits of exponent (bias 7), three of mantissa
    uint8_t bits;
};

// A word holds 4 / sizeof(C) numbers. LANES words become as many vectors of fp32: vector n has every n-th number of a word,
// as nothing must move between lanes then.
template <typename C> constexpr int PARTS = 4 / sizeof(C);

template <int LANES> INLINE void divide(ints<LANES> word, const float *, floats<LANES> *to) { to[0] = (floats<LANES>)word; }
template <int LANES> INLINE void divide(ints<LANES> word, const bf16 *, floats<LANES> *to) {
    to[0] = (floats<LANES>)(word << 16);
    to[1] = (floats<LANES>)(word & int32_t(0xffff0000));
}
template <int LANES> INLINE void divide(ints<LANES> word, const int8 *, floats<LANES> *to) {
    UNROLL for (int n = 0; n < 4; n++) to[n] = __builtin_convertvector(word << (24 - 8 * n) >> 24, floats<LANES>);
}
// Mantissa and exponent go to their places in an fp32, and a product puts the exponent's bias right: exact, for the
// smallest numbers too (as long as nobody turned on "denormals are zero"). What is then out of range was infinite or nan.
template <int LANES> INLINE void divide(ints<LANES> word, const half *, floats<LANES> *to) {
    UNROLL for (int n = 0; n < 2; n++) {
        floats<LANES> value = (floats<LANES>)((word << (16 - 16 * n) >> 3) & int32_t(0x8fffe000)) * 0x1p112f;
        floats<LANES> size = (floats<LANES>)((ints<LANES>)value & 0x7fffffff);
        to[n] = (floats<LANES>)((ints<LANES>)value | ((ints<LANES>)(size >= 65536.0f) & 0x7f800000));
    }
}
template <int LANES> INLINE void divide(ints<LANES> word, const float8 *, floats<LANES> *to) {  // a nan would be 480
    UNROLL for (int n = 0; n < 4; n++)
        to[n] = (floats<LANES>)((word << (24 - 8 * n) >> 4) & int32_t(0x87f00000)) * 0x1p120f;
}

template <int LANES, typename C> INLINE void widen_words(const C *from, int64_t left, floats<LANES> *to) {  // zeros behind
    constexpr int64_t COUNT = LANES * PARTS<C>;
    C padded[COUNT];
    if (left < COUNT) {
        memset(padded, 0, sizeof padded);
        from = (const C *)memcpy(padded, from, size_t(left) * sizeof(C));
    }
    divide<LANES>((ints<LANES>)*(const typename Vector<LANES>::words_anywhere *)from, (const C *)nullptr, to);
}

INLINE float widen(half value) {
    floats<4> parts[2];
    widen_words<4>(&value, 1, parts);
    return parts[0][0];
}

INLINE uint32_t bits_of(float value) {
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    return word;
}

// fp32 in fewer bits, to nearest, ties to even. Below `least`, the smallest normal number, the exponent stays: adding
// `magic`, whose last bit is worth as much as the result's, rounds there.
INLINE uint32_t shorter(float value, int drop, uint32_t bias, float least, float magic) {
    const float size = fabsf(value);
    const uint32_t word = bits_of(size), normal = (word - (bias << 23) + (1u << (drop - 1)) - 1 + (word >> drop & 1)) >> drop;
    return size < least ? bits_of(size + magic) - bits_of(magic) : normal;
}
INLINE uint32_t sign_of(float value) { return bits_of(value) >> 31; }
INLINE float clamped(float value, float low, float high) { return value < low ? low : value > high ? high : value; }

INLINE void keep(float value, float *to) { *to = value; }
INLINE void keep(float value, bf16 *to) { narrow(value, to); }
INLINE void keep(float value, half *to) {
    uint32_t word = shorter(value, 13, 112, 0x1p-14f, 0.5f);
    word = fabsf(value) < 65520.0f ? word : value != value ? 0x7e00 : 0x7c00;
    to->bits = uint16_t(word | sign_of(value) << 15);
}
INLINE void keep(float value, int8 *to) {  // adding 1.5 * 2^23 rounds to a whole number in the low bits
    to->code = int8_t(bits_of(clamped(value, -128.0f, 127.0f) + 12582912.0f) & 0xff);
}
INLINE void keep(float value, float8 *to) {
    const float inside = clamped(value, -448.0f, 448.0f);
    const uint32_t word = value != value ? 0x7f : shorter(inside, 20, 120, 0x1p-6f, 16384.0f);
    to->bits = uint8_t(word | sign_of(value) << 7);
}

}  // namespace

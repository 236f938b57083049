// Vectors of the compiler's own kind (`vector_size`, GCC and Clang): one template becomes AVX-512, AVX2, SSE2 or NEON
// code. fp32 and bf16 values are computed in fp32. A kernel is compiled once per level with the attributes below, and the
// caller passes the level, found once with `puna_cpu_level`.

#pragma once

#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

namespace {

struct bf16 {
    uint16_t bits;
};

template <int LANES> struct Vector {
    typedef float floats __attribute__((vector_size(LANES * 4)));
    typedef uint32_t words __attribute__((vector_size(LANES * 4)));
    typedef int32_t ints __attribute__((vector_size(LANES * 4)));
    typedef floats floats_anywhere __attribute__((aligned(1), may_alias));  // for loads from any address
    typedef words words_anywhere __attribute__((aligned(1), may_alias));
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

// One step of k: 2 * LANES values as two vectors. Which values share a lane is free, as long as x and w agree.
template <int LANES> INLINE void load(const float *from, floats<LANES> &first, floats<LANES> &second) {
    first = *(const typename Vector<LANES>::floats_anywhere *)from;
    second = *(const typename Vector<LANES>::floats_anywhere *)(from + LANES);
}

// A bf16 is the upper half of an fp32: seen as 32-bit words, the odd values are in place and the even ones need a shift.
template <int LANES> INLINE void load(const bf16 *from, floats<LANES> &first, floats<LANES> &second) {
    typename Vector<LANES>::words words = *(const typename Vector<LANES>::words_anywhere *)from;
    first = (floats<LANES>)(words << 16);
    second = (floats<LANES>)(words & 0xffff0000u);
}

template <int LANES> INLINE float sum(const floats<LANES> &v) {
    if constexpr (LANES == 4) {
        return (v[0] + v[2]) + (v[1] + v[3]);
    } else {
        floats<LANES / 2> halves[2];
        memcpy(halves, &v, sizeof v);
        return sum<LANES / 2>(halves[0] + halves[1]);
    }
}

template <int LANES> INLINE void store(float *to, floats<LANES> first, floats<LANES> second) {
    *(typename Vector<LANES>::floats_anywhere *)to = first;
    *(typename Vector<LANES>::floats_anywhere *)(to + LANES) = second;
}

// To nearest, ties to even, as in `narrow` below; the odd values go back to the upper halves.
template <int LANES> INLINE void store(bf16 *to, floats<LANES> first, floats<LANES> second) {
    typedef typename Vector<LANES>::words words;
    words even = (words)first, odd = (words)second;
    even = (even + (0x7fffu + ((even >> 16) & 1u))) >> 16;
    odd = (odd + (0x7fffu + ((odd >> 16) & 1u))) & 0xffff0000u;
    *(typename Vector<LANES>::words_anywhere *)to = even | odd;
}

INLINE float widen(float value) { return value; }
INLINE float widen(bf16 value) {
    uint32_t word = uint32_t(value.bits) << 16;
    float result;
    memcpy(&result, &word, sizeof result);
    return result;
}

INLINE void narrow(float value, float *to) { *to = value; }
INLINE void narrow(float value, bf16 *to) {
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    // To nearest, ties to even. A carry out of the mantissa rounds up to infinity; a nan cannot carry over to zero, as
    // those that come from bf16 numbers have no bits in the lower half.
    to->bits = uint16_t((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#endif

}  // namespace

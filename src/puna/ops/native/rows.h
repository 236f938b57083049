// What happens to one row between two products of a layer: normalisation, rotary positions, SwiGLU. All in fp32; with
// HALF the numbers are rounded to bf16 wherever a bf16 model rounds them, so they stay what it would have.

#pragma once

#include <cmath>

#include "vector.h"

namespace {

// To the nearest bf16, ties to even, as `narrow`.
template <int LANES, bool HALF> INLINE floats<LANES> rounded(floats<LANES> v) {
    if constexpr (!HALF) return v;
    typedef typename Vector<LANES>::words words;
    words word = (words)v;
    return (floats<LANES>)((word + (0x7fffu + ((word >> 16) & 1u))) & 0xffff0000u);
}
template <bool HALF> INLINE float rounded1(float value) {
    if constexpr (!HALF) return value;
    bf16 half;
    narrow(value, &half);
    return widen(half);
}

// The last, shorter vector of a row goes through a zero-padded copy.
template <int LANES> INLINE floats<LANES> some(const float *from, int64_t left) {
    if (left >= LANES) return load<LANES>(from);
    floats<LANES> v{};
    memcpy(&v, from, size_t(left) * sizeof(float));
    return v;
}
template <int LANES> INLINE void put(float *to, floats<LANES> v, int64_t left) {
    memcpy(to, &v, size_t(left < LANES ? left : LANES) * sizeof(float));
}

// y = x / rms(x) * weight. x may be y.
template <int LANES, bool HALF> INLINE void norm(const float *x, const float *weight, float *y, int64_t width, float eps) {
    floats<LANES> sum1{}, sum2{};
    for (int64_t i = 0; i < width; i += 2 * LANES) {
        floats<LANES> a = some<LANES>(x + i, width - i);
        sum1 += a * a;
        if (i + LANES >= width) break;
        floats<LANES> b = some<LANES>(x + i + LANES, width - i - LANES);
        sum2 += b * b;
    }
    float scale = 1.0f / sqrtf(sum<LANES>(sum1 + sum2) / float(width) + eps);
    for (int64_t i = 0; i < width; i += LANES) {
        floats<LANES> v = some<LANES>(x + i, width - i) * scale * some<LANES>(weight + i, width - i);
        put<LANES>(y + i, rounded<LANES, HALF>(v), width - i);
    }
}

// x += delta, where there is one.
template <int LANES, bool HALF> INLINE void add(float *x, const float *delta, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES) {
        floats<LANES> d = rounded<LANES, HALF>(some<LANES>(delta + i, width - i));
        put<LANES>(x + i, rounded<LANES, HALF>(some<LANES>(x + i, width - i) + d), width - i);
    }
}

// Channel pairs (i, i + width / 2) by their angles; the products are rounded where ops.rope.rotate rounds them.
template <bool HALF> INLINE void turn(float *x, const float *cos, const float *sin, int64_t width) {
    float *y = x + width / 2;
    for (int64_t i = 0; i < width / 2; i++) {
        float a = x[i], b = y[i];
        x[i] = rounded1<HALF>(rounded1<HALF>(a * cos[i]) - b * sin[i]);
        y[i] = rounded1<HALF>(rounded1<HALF>(b * cos[i]) + a * sin[i]);
    }
}

// gate = silu(gate) * up; silu(x) = x / (1 + e^-x), and e^-x at most 2^127.
template <int LANES, bool HALF> INLINE void swiglu(float *gate, const float *up, int64_t count) {
    const float LOG2E = 1.44269504f;
    for (int64_t i = 0; i < count; i += LANES) {
        floats<LANES> g = rounded<LANES, HALF>(some<LANES>(gate + i, count - i));
        floats<LANES> u = rounded<LANES, HALF>(some<LANES>(up + i, count - i));
        floats<LANES> power = g * -LOG2E;
        power = power < 127.0f ? power : fill<LANES>(127.0f);  // not a number: 127, and g itself brings it back
        floats<LANES> silu = rounded<LANES, HALF>(g / (exp2<LANES>(power) + 1.0f));
        put<LANES>(gate + i, rounded<LANES, HALF>(silu * u), count - i);
    }
}

template <int LANES, bool HALF> INLINE void round_all(float *x, int64_t count) {
    if constexpr (HALF)
        for (int64_t i = 0; i < count; i += LANES)
            put<LANES>(x + i, rounded<LANES, HALF>(some<LANES>(x + i, count - i)), count - i);
}

// One set of functions per level and rounding.
struct Rows {
    void (*norm)(const float *x, const float *weight, float *y, int64_t width, float eps);
    void (*add)(float *x, const float *delta, int64_t width);
    void (*turn)(float *x, const float *cos, const float *sin, int64_t width);
    void (*swiglu)(float *gate, const float *up, int64_t count);
    void (*round)(float *x, int64_t count);
};
#define ROWS_AT(NAME, LANES, TARGET)                                                                                  \
    template <bool HALF> struct NAME {                                                                                \
        TARGET static void norm(const float *x, const float *w, float *y, int64_t n, float eps) {                     \
            ::norm<LANES, HALF>(x, w, y, n, eps);                                                                     \
        }                                                                                                             \
        TARGET static void add(float *x, const float *delta, int64_t n) { ::add<LANES, HALF>(x, delta, n); }          \
        TARGET static void turn(float *x, const float *cos, const float *sin, int64_t n) {                            \
            ::turn<HALF>(x, cos, sin, n);                                                                             \
        }                                                                                                             \
        TARGET static void swiglu(float *gate, const float *up, int64_t n) { ::swiglu<LANES, HALF>(gate, up, n); }    \
        TARGET static void round(float *x, int64_t n) { ::round_all<LANES, HALF>(x, n); }                             \
        static Rows all() { return {norm, add, turn, swiglu, round}; }                                                \
    }
ROWS_AT(RowsBaseline, 4, );
#if defined(__x86_64__)
ROWS_AT(RowsAvx2, 8, AVX2);
ROWS_AT(RowsAvx512, 16, AVX512);
#endif
#undef ROWS_AT

template <bool HALF> Rows rows_at(int level) {
#if defined(__x86_64__)
    if (level == 2) return RowsAvx512<HALF>::all();
    if (level == 1) return RowsAvx2<HALF>::all();
#endif
    return RowsBaseline<HALF>::all();
}

}  // namespace

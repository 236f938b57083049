// The small steps of decoding one token, where a dozen torch calls cost more than the arithmetic: normalisation, and
// attention of one query per head over the cache. fp32 and bf16 in and out, everything in fp32 between. The cache may
// hold codes of eight bits: numbers without their scales, which the caller multiplies into q and out.
//
// Shapes: H query heads, G key/value heads (H = G * R), K head width, S cached positions.

#include <cmath>
#include <cstdlib>

#include "vector.h"

namespace {

// y[r] = x[r] * rsqrt(mean(x[r]^2) + eps) * w; packed as "PPPqqfi". Rows are contiguous.
template <typename T> struct Norm {
    const T *x, *w;
    T *y;
    int64_t rows, width;
    float eps;
    int32_t level;
};

// out[h] = softmax(q[h] k^T / sqrt(K)) v over the first `length` positions; packed as "PPPPqqqqqii". q and out are (H, K)
// and contiguous; keys and values (G, S, K), `head` values from one head to the next and K from one position to the next.
template <typename T, typename C> struct Query {
    const T *q;
    const C *keys, *values;
    T *out;
    int64_t groups, repeat, width, head, length;
    int32_t threads, level;
};

struct int8 {
    int8_t code;
};
struct float8 {  // float8_e4m3fn: sign, four bits of exponent (bias 7), three of mantissa
    uint8_t bits;
};

// LANES bytes as 32-bit numbers. By way of 16 bits: from 8 to 32 in one step GCC goes element by element.
template <int LANES, typename BYTE, typename SHORT> INLINE ints<LANES> widen_bytes(const void *from) {
    typedef BYTE bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
    typedef SHORT shorts __attribute__((vector_size(2 * LANES)));
    return __builtin_convertvector(__builtin_convertvector(*(const bytes *)from, shorts), ints<LANES>);
}

template <int LANES> INLINE void load(const int8 *from, floats<LANES> &first, floats<LANES> &second) {
    first = __builtin_convertvector((widen_bytes<LANES, int8_t, int16_t>(from)), floats<LANES>);
    second = __builtin_convertvector((widen_bytes<LANES, int8_t, int16_t>(from + LANES)), floats<LANES>);
}

// Mantissa and exponent go to their places in an fp32, whose bias is 120 larger; without exponent the number is m / 512.
template <int LANES> INLINE floats<LANES> widen8(const float8 *from) {
    ints<LANES> word = widen_bytes<LANES, uint8_t, uint16_t>(from);
    ints<LANES> size = word & 0x7f, tiny = size < 8;
    ints<LANES> normal = (size << 20) + (120 << 23);
    ints<LANES> small = (ints<LANES>)(__builtin_convertvector(size, floats<LANES>) * (1.0f / 512));
    return (floats<LANES>)(((normal & ~tiny) | (small & tiny)) | ((word & 0x80) << 24));
}
template <int LANES> INLINE void load(const float8 *from, floats<LANES> &first, floats<LANES> &second) {
    first = widen8<LANES>(from);
    second = widen8<LANES>(from + LANES);
}

// A step of a row as two vectors; the last, shorter one goes through a zero-padded copy.
template <int LANES, typename T> INLINE void read(const T *from, int64_t left, floats<LANES> &first, floats<LANES> &second) {
    if (left >= 2 * LANES) return load<LANES>(from, first, second);
    T padded[2 * LANES];
    memset(padded, 0, sizeof padded);
    memcpy(padded, from, size_t(left) * sizeof(T));
    load<LANES>(padded, first, second);
}
template <int LANES, typename T> INLINE void write(T *to, int64_t left, floats<LANES> first, floats<LANES> second) {
    if (left >= 2 * LANES) return store<LANES>(to, first, second);
    T padded[2 * LANES];
    store<LANES>(padded, first, second);
    memcpy(to, padded, size_t(left) * sizeof(T));
}

template <int LANES, typename T> INLINE void norm(const Norm<T> &p) {
    constexpr int64_t STEP = 2 * LANES;
    for (int64_t r = 0; r < p.rows; r++) {
        const T *x = p.x + r * p.width;
        floats<LANES> sum1{}, sum2{}, a, b, wa, wb;
        for (int64_t i = 0; i < p.width; i += STEP) {
            read<LANES>(x + i, p.width - i, a, b);
            sum1 += a * a;
            sum2 += b * b;
        }
        float scale = 1.0f / sqrtf(sum<LANES>(sum1 + sum2) / float(p.width) + p.eps);
        for (int64_t i = 0; i < p.width; i += STEP) {
            read<LANES>(x + i, p.width - i, a, b);
            read<LANES>(p.w + i, p.width - i, wa, wb);
            write<LANES>(p.y + r * p.width + i, p.width - i, a * scale * wa, b * scale * wb);
        }
    }
}

// One query head: scores, softmax, weighted sum of the values. `scores` has room for `length` numbers.
template <int LANES, typename T, typename C> INLINE void attend(const Query<T, C> &p, int64_t h, float *scores) {
    constexpr int64_t STEP = 2 * LANES;
    const T *q = p.q + h * p.width;
    const C *keys = p.keys + h / p.repeat * p.head, *values = p.values + h / p.repeat * p.head;
    floats<LANES> a, b, c, d;
    float highest = -INFINITY, total = 0, scale = 1.0f / sqrtf(float(p.width));
    for (int64_t s = 0; s < p.length; s++) {
        floats<LANES> sum1{}, sum2{};
        for (int64_t i = 0; i < p.width; i += STEP) {
            read<LANES>(q + i, p.width - i, a, b);
            read<LANES>(keys + s * p.width + i, p.width - i, c, d);
            sum1 += a * c;
            sum2 += b * d;
        }
        scores[s] = sum<LANES>(sum1 + sum2) * scale;
        highest = scores[s] > highest ? scores[s] : highest;
    }
    for (int64_t s = 0; s < p.length; s++) total += scores[s] = expf(scores[s] - highest);
    for (int64_t i = 0; i < p.width; i += STEP) {
        floats<LANES> sum1{}, sum2{};
        for (int64_t s = 0; s < p.length; s++) {
            read<LANES>(values + s * p.width + i, p.width - i, c, d);
            sum1 += scores[s] * c;
            sum2 += scores[s] * d;
        }
        write<LANES>(p.out + h * p.width + i, p.width - i, sum1 / total, sum2 / total);
    }
}

// One function per level and kernel.
#if defined(__x86_64__)
template <typename T> void norm_baseline(const Norm<T> &p) { norm<4>(p); }
template <typename T> AVX2 void norm_avx2(const Norm<T> &p) { norm<8>(p); }
template <typename T> AVX512 void norm_avx512(const Norm<T> &p) { norm<16>(p); }
template <typename Q> void attend_baseline(const Q &p, int64_t h, float *scores) { attend<4>(p, h, scores); }
template <typename Q> AVX2 void attend_avx2(const Q &p, int64_t h, float *scores) { attend<8>(p, h, scores); }
template <typename Q> AVX512 void attend_avx512(const Q &p, int64_t h, float *scores) { attend<16>(p, h, scores); }
template <typename T> auto norm_at(int level) {
    return level == 2 ? norm_avx512<T> : level == 1 ? norm_avx2<T> : norm_baseline<T>;
}
template <typename Q> auto attend_at(int level) {
    return level == 2 ? attend_avx512<Q> : level == 1 ? attend_avx2<Q> : attend_baseline<Q>;
}
#else
template <typename T> void norm_baseline(const Norm<T> &p) { norm<4>(p); }
template <typename Q> void attend_baseline(const Q &p, int64_t h, float *scores) { attend<4>(p, h, scores); }
template <typename T> auto norm_at(int) { return norm_baseline<T>; }
template <typename Q> auto attend_at(int) { return attend_baseline<Q>; }
#endif

// Heads share nothing, so the result is the same for any number of threads. Below about 20 us of work one core is faster.
template <typename Q> int query(const Q &p) {
    auto one = attend_at<Q>(p.level);
    int64_t heads = p.groups * p.repeat;
    float *scores = (float *)malloc(size_t(heads) * size_t(p.length) * sizeof(float));
    if (!scores) return 1;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.threads > 1 && heads * p.length * p.width > 200000)
    for (int64_t h = 0; h < heads; h++) one(p, h, scores + h * p.length);
    free(scores);
    return 0;
}

}  // namespace

extern "C" {
void puna_norm_float32(const Norm<float> *p) { norm_at<float>(p->level)(*p); }
void puna_norm_bfloat16(const Norm<bf16> *p) { norm_at<bf16>(p->level)(*p); }
int puna_query_float32(const Query<float, float> *p) { return query(*p); }
int puna_query_bfloat16(const Query<bf16, bf16> *p) { return query(*p); }
int puna_query_int8(const Query<float, int8> *p) { return query(*p); }
int puna_query_float8(const Query<float, float8> *p) { return query(*p); }
}

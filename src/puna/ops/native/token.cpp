// The small steps of decoding one token, where a dozen torch calls cost more than the arithmetic: normalisation, and
// attention of one query per head over the cache. fp32 and bf16 in and out, everything in fp32 between.
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
template <typename T> struct Query {
    const T *q, *keys, *values;
    T *out;
    int64_t groups, repeat, width, head, length;
    int32_t threads, level;
};

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
template <int LANES, typename T> INLINE void attend(const Query<T> &p, int64_t h, float *scores) {
    constexpr int64_t STEP = 2 * LANES;
    const T *q = p.q + h * p.width, *keys = p.keys + h / p.repeat * p.head, *values = p.values + h / p.repeat * p.head;
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
template <typename T> void attend_baseline(const Query<T> &p, int64_t h, float *scores) { attend<4>(p, h, scores); }
template <typename T> AVX2 void attend_avx2(const Query<T> &p, int64_t h, float *scores) { attend<8>(p, h, scores); }
template <typename T> AVX512 void attend_avx512(const Query<T> &p, int64_t h, float *scores) { attend<16>(p, h, scores); }
template <typename T> auto norm_at(int level) {
    return level == 2 ? norm_avx512<T> : level == 1 ? norm_avx2<T> : norm_baseline<T>;
}
template <typename T> auto attend_at(int level) {
    return level == 2 ? attend_avx512<T> : level == 1 ? attend_avx2<T> : attend_baseline<T>;
}
#else
template <typename T> void norm_baseline(const Norm<T> &p) { norm<4>(p); }
template <typename T> void attend_baseline(const Query<T> &p, int64_t h, float *scores) { attend<4>(p, h, scores); }
template <typename T> auto norm_at(int) { return norm_baseline<T>; }
template <typename T> auto attend_at(int) { return attend_baseline<T>; }
#endif

// Heads share nothing, so the result is the same for any number of threads. Below about 20 us of work one core is faster.
template <typename T> int query(const Query<T> &p) {
    auto one = attend_at<T>(p.level);
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
int puna_query_float32(const Query<float> *p) { return query(*p); }
int puna_query_bfloat16(const Query<bf16> *p) { return query(*p); }
}

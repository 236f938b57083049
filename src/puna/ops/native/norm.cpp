// Normalisation of the few rows of a decoding step, where torch's calls cost more than the arithmetic. fp32 and bf16 in
// and out, everything in fp32 between.

#include <cmath>

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

// One function per level.
#if defined(__x86_64__)
template <typename T> void norm_baseline(const Norm<T> &p) { norm<4>(p); }
template <typename T> AVX2 void norm_avx2(const Norm<T> &p) { norm<8>(p); }
template <typename T> AVX512 void norm_avx512(const Norm<T> &p) { norm<16>(p); }
template <typename T> auto norm_at(int level) {
    return level == 2 ? norm_avx512<T> : level == 1 ? norm_avx2<T> : norm_baseline<T>;
}
#else
template <typename T> void norm_baseline(const Norm<T> &p) { norm<4>(p); }
template <typename T> auto norm_at(int) { return norm_baseline<T>; }
#endif

}  // namespace

extern "C" {
void puna_norm_float32(const Norm<float> *p) { norm_at<float>(p->level)(*p); }
void puna_norm_bfloat16(const Norm<bf16> *p) { norm_at<bf16>(p->level)(*p); }
}

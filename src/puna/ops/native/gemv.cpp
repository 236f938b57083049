// y = x W^T (+ bias) for a few rows of x: the matrix product of decoding.
//
//   y[m, n] = bias[n] + sum_k x[m, k] * w[n, k]        m = 1..8, so every weight is read once and used m times
//
// Reading W from memory is the whole cost. So one core walks a tile of TILE_N weight rows at a time, with several
// independent running sums to hide the latency of multiply-add, and the cores share the tiles among themselves.
//
// Every dot product is summed in one order that depends only on k and on the vector width: y[m, n] is the same bit for
// bit whatever the number of rows, of threads, or the place of n in its tile.
//
// Vectors are the compiler's own (GCC and Clang, `vector_size`), so one template makes AVX-512, AVX2, SSE2 and NEON
// code; the caller picks the level once with `puna_cpu_level`. Nothing is read outside the arrays: the last k % STEP
// values go through a zero-padded copy.

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
    typedef floats floats_anywhere __attribute__((aligned(1), may_alias));  // for loads from any address
    typedef words words_anywhere __attribute__((aligned(1), may_alias));
};
template <int LANES> using floats = typename Vector<LANES>::floats;

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
    bool is_nan = (word & 0x7fffffffu) > 0x7f800000u;
    uint32_t nearest_even = word + 0x7fffu + ((word >> 16) & 1u);  // a carry out of the mantissa rounds up to infinity
    to->bits = uint16_t((is_nan ? word | 0x400000u : nearest_even) >> 16);
}

template <typename T> struct Problem {
    const T *x, *w, *bias;
    T *y;
    int64_t rows, n, k, x_stride;
};

// The tile y[row : row + ROWS, column : column + COLS]. Loops over ROWS and COLS must unroll: the sums live in registers.
template <typename T, int LANES, int ROWS, int COLS> INLINE void tile(const Problem<T> &p, int64_t row, int64_t column) {
    constexpr int64_t STEP = 2 * LANES;
    const T *x[ROWS], *w[COLS];
    floats<LANES> sum1[ROWS][COLS], sum2[ROWS][COLS];
    UNROLL for (int r = 0; r < ROWS; r++) x[r] = p.x + (row + r) * p.x_stride;
    UNROLL for (int c = 0; c < COLS; c++) w[c] = p.w + (column + c) * p.k;
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int c = 0; c < COLS; c++) sum1[r][c] = sum2[r][c] = floats<LANES>{};

    int64_t k = 0;
    T padded_x[ROWS][STEP], padded_w[COLS][STEP];
    while (k < p.k) {
        if (k + STEP > p.k) {
            memset(padded_x, 0, sizeof padded_x);
            memset(padded_w, 0, sizeof padded_w);
            UNROLL for (int r = 0; r < ROWS; r++) {
                memcpy(padded_x[r], x[r] + k, size_t(p.k - k) * sizeof(T));
                x[r] = padded_x[r] - k;
            }
            UNROLL for (int c = 0; c < COLS; c++) {
                memcpy(padded_w[c], w[c] + k, size_t(p.k - k) * sizeof(T));
                w[c] = padded_w[c] - k;
            }
        }
        floats<LANES> w1[COLS], w2[COLS], x1, x2;
        UNROLL for (int c = 0; c < COLS; c++) {
#ifdef PF
            __builtin_prefetch((const char *)(w[c] + k) + PF);
            if (sizeof(T) * STEP > 64) __builtin_prefetch((const char *)(w[c] + k) + PF + 64);
#endif
            load<LANES>(w[c] + k, w1[c], w2[c]);
        }
        UNROLL for (int r = 0; r < ROWS; r++) {
            load<LANES>(x[r] + k, x1, x2);
            UNROLL for (int c = 0; c < COLS; c++) {
                sum1[r][c] += x1 * w1[c];
                sum2[r][c] += x2 * w2[c];
            }
        }
        k += STEP;
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int c = 0; c < COLS; c++) {
            float y = sum<LANES>(sum1[r][c] + sum2[r][c]) + (p.bias ? widen(p.bias[column + c]) : 0.0f);
            narrow(y, p.y + (row + r) * p.n + column + c);
        }
}

// All rows of y, columns begin..end. The first tile of a block brings its weights from memory, the others find them in
// the cache.
template <typename T, int LANES, int ROWS, int COLS> INLINE void columns(const Problem<T> &p, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end;) {
        bool whole = c + COLS <= end;
        for (int64_t r = 0; r < p.rows;) {
            bool many = r + ROWS <= p.rows;
            if (many && whole) { UNROLL for (int i = 0; i < COLS; i += 2) tile<T, LANES, ROWS, 2>(p, r, c + i); }
            else if (whole) tile<T, LANES, 1, COLS>(p, r, c);
            else { for (int i = 0; i < (many ? ROWS : 1); i++) tile<T, LANES, 1, 1>(p, r + i, c); }
            r += many ? ROWS : 1;
        }
        c += whole ? COLS : 1;
    }
}

// Tiles are as large as the registers of each level allow: ROWS * COLS sums and COLS pairs of weights.
template <typename T> void columns_baseline(const Problem<T> &p, int64_t begin, int64_t end) {
    columns<T, 4, 2, 4>(p, begin, end);
}
#if defined(__x86_64__)
template <typename T> __attribute__((target("avx2,fma"))) void columns_avx2(const Problem<T> &p, int64_t begin, int64_t end) {
    columns<T, 8, 2, 4>(p, begin, end);
}
template <typename T>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void columns_avx512(const Problem<T> &p, int64_t begin, int64_t end) {
    columns<T, 16, 4, 4>(p, begin, end);
}
#endif

template <typename T> void gemv(const Problem<T> &p, int threads, int level) {
    auto *work = columns_baseline<T>;
#if defined(__x86_64__)
    if (level == 1) work = columns_avx2<T>;
    if (level == 2) work = columns_avx512<T>;
#endif
    constexpr int64_t SHARE = 1 << 16;  // bytes of W: long enough for the prefetcher, short enough to balance the cores
    int64_t per_share = SHARE / (p.k * int64_t(sizeof(T)) + 1) / 4 * 4 + 4;
    int64_t shares = (p.n + per_share - 1) / per_share;
#pragma omp parallel for schedule(SCHED) num_threads(threads) if (threads > 1 && shares > 1)
    for (int64_t i = 0; i < shares; i++) {
        int64_t end = (i + 1) * per_share;
        work(p, i * per_share, end < p.n ? end : p.n);
    }
}

}  // namespace

extern "C" {

// 0: baseline (SSE2, NEON, ...), 1: AVX2, 2: AVX-512.
int puna_cpu_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx2 ? (avx512 ? 2 : 1) : 0;
#else
    return 0;
#endif
}

// x (rows, k) with row stride x_stride, w (n, k), bias (n) or null, y (rows, n); strides in elements, all in one type.
void puna_gemv_float32(const float *x, const float *w, const float *bias, float *y, int64_t rows, int64_t n, int64_t k,
                       int64_t x_stride, int threads, int level) {
    gemv<float>({x, w, bias, y, rows, n, k, x_stride}, threads, level);
}
void puna_gemv_bfloat16(const bf16 *x, const bf16 *w, const bf16 *bias, bf16 *y, int64_t rows, int64_t n, int64_t k,
                        int64_t x_stride, int threads, int level) {
    gemv<bf16>({x, w, bias, y, rows, n, k, x_stride}, threads, level);
}
}

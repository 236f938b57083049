// y = x W^T (+ bias) for a few rows of x: the matrix product of decoding.
//
//   y[m, n] = bias[n] + sum_k x[m, k] * w[n, k]        m = 1..8: every weight is read once and used m times
//
// Reading W from memory is the whole cost, and memory is fastest read straight on. A core therefore works on two
// neighbouring rows of W and prefetches the next two in address order. (Zen 4, one core, 768 columns: straight on 30
// GB/s; four rows side by side 18 GB/s; two rows with this prefetch 28 GB/s.)
//
// Each dot product is summed in an order that depends on k and the vector width alone, so y[m, n] is the same bit for
// bit whatever the number of rows and threads.
//
// Nothing outside the arrays is read (a prefetch is no read).

#include "products.h"
#include "vector.h"

namespace {

using Problem = puna::PlainProduct;  // one packed argument crosses from Python a microsecond faster than ten

// The tile y[row : row + ROWS, column : column + COLS]. Loops over ROWS and COLS must unroll: the sums live in registers.
template <typename T, typename Y, int LANES, int ROWS, int COLS>
INLINE void tile(const Problem &p, int64_t row, int64_t column) {
    constexpr int64_t STEP = 2 * LANES;
    const T *x[ROWS], *w[COLS];
    floats<LANES> sum1[ROWS][COLS], sum2[ROWS][COLS];
    UNROLL for (int r = 0; r < ROWS; r++) x[r] = (const T *)p.x + (row + r) * p.x_stride;
    UNROLL for (int c = 0; c < COLS; c++) w[c] = (const T *)p.w + (column + c) * p.k;
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int c = 0; c < COLS; c++) sum1[r][c] = sum2[r][c] = floats<LANES>{};

    uintptr_t ahead = uintptr_t(w[0]) + COLS * p.k * sizeof(T);
    T padded_x[ROWS][STEP], padded_w[COLS][STEP];
    for (int64_t left = p.k; left > 0; left -= STEP) {
        if (left < STEP) {  // the last few values go through a zero-padded copy
            memset(padded_x, 0, sizeof padded_x);
            memset(padded_w, 0, sizeof padded_w);
            UNROLL for (int r = 0; r < ROWS; r++) x[r] = (T *)memcpy(padded_x[r], x[r], size_t(left) * sizeof(T));
            UNROLL for (int c = 0; c < COLS; c++) w[c] = (T *)memcpy(padded_w[c], w[c], size_t(left) * sizeof(T));
        }
        for (int64_t line = 0; line < COLS * STEP * int64_t(sizeof(T)); line += 64, ahead += 64)
            __builtin_prefetch((const void *)ahead);
        floats<LANES> w1[COLS], w2[COLS], x1, x2;
        UNROLL for (int c = 0; c < COLS; c++) {
            load<LANES>(w[c], w1[c], w2[c]);
            w[c] += STEP;
        }
        UNROLL for (int r = 0; r < ROWS; r++) {
            load<LANES>(x[r], x1, x2);
            x[r] += STEP;
            UNROLL for (int c = 0; c < COLS; c++) {
                sum1[r][c] += x1 * w1[c];
                sum2[r][c] += x2 * w2[c];
            }
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int c = 0; c < COLS; c++) {
            float y = sum<LANES>(sum1[r][c] + sum2[r][c]) + (p.bias ? widen(((const T *)p.bias)[column + c]) : 0.0f);
            narrow(y, (Y *)p.y + (row + r) * p.n + column + c);
        }
}

// All rows of COLS columns. The first tile brings the weights from memory, the others find them in the cache.
template <typename T, typename Y, int LANES, int MAX_ROWS, int COLS>
INLINE void stripe(const Problem &p, int64_t column) {
    int64_t row = 0;
    if constexpr (MAX_ROWS == 4)
        for (; row + 4 <= p.rows; row += 4) tile<T, Y, LANES, 4, COLS>(p, row, column);
    for (; row + 2 <= p.rows; row += 2) tile<T, Y, LANES, 2, COLS>(p, row, column);
    if (row < p.rows) tile<T, Y, LANES, 1, COLS>(p, row, column);
}

template <typename T, typename Y, int LANES, int MAX_ROWS>
INLINE void stripes(const Problem &p, int64_t begin, int64_t end) {
    int64_t column = begin;
    for (; column + 2 <= end; column += 2) stripe<T, Y, LANES, MAX_ROWS, 2>(p, column);
    if (column < end) stripe<T, Y, LANES, MAX_ROWS, 1>(p, column);
}

// One function per level; a tile's sums fill half of its vector registers: 32 in AVX-512 and NEON, 16 in SSE2 and AVX2.
#if defined(__x86_64__)
template <typename T, typename Y> void columns_baseline(const Problem &p, int64_t begin, int64_t end) {
    stripes<T, Y, 4, 2>(p, begin, end);
}
template <typename T, typename Y> AVX2 void columns_avx2(const Problem &p, int64_t begin, int64_t end) {
    stripes<T, Y, 8, 2>(p, begin, end);
}
template <typename T, typename Y> AVX512 void columns_avx512(const Problem &p, int64_t begin, int64_t end) {
    stripes<T, Y, 16, 4>(p, begin, end);
}
template <typename T, typename Y> puna::PlainColumns *columns(int level) {
    return level == 2 ? columns_avx512<T, Y> : level == 1 ? columns_avx2<T, Y> : columns_baseline<T, Y>;
}
#else
template <typename T, typename Y> void columns_baseline(const Problem &p, int64_t begin, int64_t end) {
    stripes<T, Y, 4, 4>(p, begin, end);
}
template <typename T, typename Y> puna::PlainColumns *columns(int) { return columns_baseline<T, Y>; }
#endif

// Several products in one parallel region, so that the cores are woken once: q, k and v, or gate and up.
template <typename T> void gemv(const Problem *problems, int64_t count) {
    constexpr int64_t MOST = 4;
    int64_t share[MOST], last[MOST], shares = 0;
    for (int64_t i = 0; i < count; i++) {
        const Problem &p = problems[i];
        share[i] = puna::share_of(p.k * int64_t(sizeof(T)));
        last[i] = shares += (p.n + share[i] - 1) / share[i];
    }
    int threads = problems[0].threads;
    auto work = columns<T, T>(problems[0].level);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && shares > 1)
    for (int64_t s = 0; s < shares; s++) {
        int64_t i = 0;
        while (s >= last[i]) i++;
        int64_t begin = (s - (i ? last[i - 1] : 0)) * share[i], end = begin + share[i];
        work(problems[i], begin, end < problems[i].n ? end : problems[i].n);
    }
}

}  // namespace

puna::PlainColumns *puna::plain_columns(Type type, int level) {
    return type == BFLOAT16 ? columns<bf16, float>(level) : columns<float, float>(level);
}

extern "C" {

// 0: baseline (SSE2, NEON, ...), 1: AVX2, 2: AVX-512.
int puna_cpu_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") ? 2 : 1;
#else
    return 0;
#endif
}

// One to four products; their level and threads are the first one's.
void puna_gemv_float32(const Problem *problems, int64_t count) { gemv<float>(problems, count); }
void puna_gemv_bfloat16(const Problem *problems, int64_t count) { gemv<bf16>(problems, count); }
}

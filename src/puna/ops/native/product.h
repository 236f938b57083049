// Small matrix products with their sums in registers: c = a b, "broadcast a value of a, multiply with a row of b".

#pragma once

#include "vector.h"

namespace {

struct Range {
    int64_t begin, end;
};

enum Into { STORE, ADD, SCALE_ADD };  // c = ab, c += ab, c = c * scale[row] + ab

// ROWS x (VECS * LANES) of c, its sums in registers. a[row][k], or with COLUMNS a[k][row]; b[k][column].
template <int LANES, int ROWS, int VECS, Into INTO, bool COLUMNS>
INLINE void tile(float *c, int64_t c_row, const float *a, int64_t a_row, const float *b, int64_t b_row, int64_t inner,
                 const float *scale) {
    floats<LANES> sum[ROWS][VECS];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int v = 0; v < VECS; v++) {
            sum[r][v] = INTO == STORE ? floats<LANES>{} : load<LANES>(c + r * c_row + v * LANES);
            if (INTO == SCALE_ADD) sum[r][v] *= scale[r];
        }
    for (int64_t k = 0; k < inner; k++, b += b_row, a += COLUMNS ? a_row : 1) {
        floats<LANES> row[VECS];
        UNROLL for (int v = 0; v < VECS; v++) row[v] = load<LANES>(b + v * LANES);
        UNROLL for (int r = 0; r < ROWS; r++) {
            float value = COLUMNS ? a[r] : a[r * a_row];
            UNROLL for (int v = 0; v < VECS; v++) sum[r][v] += value * row[v];
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int v = 0; v < VECS; v++) store<LANES>(c + r * c_row + v * LANES, sum[r][v]);
}

// ROWS rows of c, as many columns as the range `columns` has (a multiple of LANES).
template <int LANES, int ROWS, Into INTO, bool COLUMNS>
INLINE void multiply(float *c, int64_t c_row, const float *a, int64_t a_row, const float *b, int64_t b_row, int64_t inner,
                     Range columns, const float *scale = nullptr) {
    int64_t n = 0;
    for (; n + 2 * LANES <= columns.end - columns.begin; n += 2 * LANES)
        tile<LANES, ROWS, 2, INTO, COLUMNS>(c + n, c_row, a, a_row, b + n, b_row, inner, scale);
    if (n < columns.end - columns.begin) tile<LANES, ROWS, 1, INTO, COLUMNS>(c + n, c_row, a, a_row, b + n, b_row, inner, scale);
}

}  // namespace

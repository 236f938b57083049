// y = x W^T (+ bias) with W in llama.cpp's own blocks, columns begin to end - 1: the piece of a product that one core of
// somebody's parallel region computes. Each column is summed in an order of its own, so the pieces may be cut anywhere.

#pragma once

#include <cstdint>

namespace puna {

// Packed as "PPPPqqqqqiii4x". x (rows, k) fp32 with row stride x_stride; y (rows, n) fp32; data (n, row_bytes); bias (n) or
// null; kind: `Kind` in ggufblocks.cpp. k is a multiple of the kind's block.
struct BlocksProduct {
    const float *x;
    float *y;
    const uint8_t *data;
    const float *bias;
    int64_t rows, x_stride, n, k, row_bytes;
    int32_t kind, threads, level;
};
typedef void BlocksColumns(const BlocksProduct &, int64_t begin, int64_t end);
BlocksColumns *blocks_columns(int level);

}  // namespace puna

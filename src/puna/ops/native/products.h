// y = x W^T (+ bias), columns begin to end - 1: the piece of a product that one core of somebody's parallel region
// computes. Each column is summed in an order of its own, so the pieces may be cut anywhere.

#pragma once

#include <cstdint>

namespace puna {

enum Type : int32_t { FLOAT32, BFLOAT16, FLOAT16 };

// --- a plain weight: gemv.cpp ---------------------------------------------------------------------------------------

// Laid out as struct.pack("PPPPqqqqii") does. x (rows, k) with row stride x_stride, w (n, k), bias (n) or null,
// y (rows, n), all of one type; k > 0.
struct PlainProduct {
    const void *x, *w, *bias;
    void *y;
    int64_t rows, n, k, x_stride;
    int32_t threads, level;
};
typedef void PlainColumns(const PlainProduct &, int64_t begin, int64_t end);
PlainColumns *plain_columns(Type type, int level);  // y in fp32, x and the weight in `type`

// --- a weight in four or eight bits, with x as it is: packed.cpp ----------------------------------------------------

// Packed as "PPqqii" + "PPPPPqqqqqfiiiii". x (rows, k) with row stride x_stride, in `type`; y (rows, n) in `out`.
// codes (n, row_bytes); scales (n / height, k / width) in `scales_are`; zeros alike or null; bias (n) or null; order
// (k) or null: column k of the codes belongs to x[order[k]]. rounding of x: per row, or by input_scale where not 0.
struct PackedProduct {
    const void *x;
    void *y;
    int64_t rows, x_stride;
    int32_t type, out;
    const uint8_t *codes;
    const void *scales;
    const int8_t *zeros;
    const float *bias;
    const int32_t *order;
    int64_t n, k, row_bytes, width, height;
    float input_scale;
    int32_t kind, scales_are, rounding, threads, level;
};

// x as the kernels read it: `x_row` floats a row, zero-padded; `sums` has sum_row floats a row (`lanes` for each block;
// none without zeros). Where groups are shorter than a block, lane l of a vector takes scale lane_group[l] of the block's.
struct Arranged {
    float *x, *sums;
    int64_t x_row, sum_row;
    int32_t lane_group[16];
};
Arranged arranged(const PackedProduct &, int lanes);             // without memory: x and sums are for the caller to set
int64_t packed_scratch(const PackedProduct &, int lanes);        // floats that each thread needs for `columns`
bool same_input(const PackedProduct &, const PackedProduct &);  // one arranged x serves both

struct PackedLevel {
    int lanes;
    // Rows first to last - 1 of x; row: x_row floats of scratch.
    void (*arrange)(const PackedProduct &, const Arranged &, int64_t first, int64_t last, float *row);
    void (*columns)(const PackedProduct &, const Arranged &, int64_t begin, int64_t end, float *scratch);
    void (*row)(const PackedProduct &, int64_t column, float *scratch);  // a row of the weight as numbers
};
PackedLevel packed_level(int level);

// Columns that make about 64 KiB of the weight: fine enough to be even between the cores, and a matrix below that stays
// on one core, where it takes less time than waking the others.
inline int64_t share_of(int64_t row_bytes) { return ((1 << 16) / (row_bytes + 1) + 2) / 2 * 2; }

}  // namespace puna

// Products with rows of x rounded to int8 in groups of 32, for a thread that works inside somebody's parallel region.
//
// A tile is 16 outputs side by side, a block 32 columns of them; tiles.cpp draws both. Every y[m, n] is summed by one
// thread in an order that depends on k alone: the same bits for any number of rows, ranges and threads.
//
//     bytes = tiles_rounded_bytes(rows, k)                        memory for x, from the caller, aligned to 64
//     tiles_round(w, x, stride, rows, 0, rows, memory)            or each thread some of the rows, then a barrier
//     tiles_multiply(w, memory, rows, y, y_stride, 0, tiles_of(w), false)      or each thread some of the tiles

#pragma once

#include <cstddef>
#include <cstdint>

// y[m, n] = bias[n] + sum_g scale[n, g] (x[m] . (code[n] - zero[n, g])) - min[n, g] sum x[m], over columns of group g.
// codes: tiles x blocks x 256 (bits 4) or 512 (bits 8) bytes, aligned to 64. scales, zeros, mins: tiles x groups x 16;
// outputs beyond n have scale 0. order (k) or null: column k of the codes belongs to x[order[k]]. span: blocks that
// share a scale. half: scales and mins are fp16, else fp32. Packed by Python as "PPPPPPqqqiii" (tiles.py).
struct Tiles {
    const uint8_t *codes;
    const void *scales;
    const int8_t *zeros;  // or null: zero is 0
    const void *mins;     // or null
    const float *bias;    // or null
    const int32_t *order;
    int64_t n, k, span;
    int32_t bits, half, level;
};

inline int64_t tiles_of(const Tiles &w) { return (w.n + 15) / 16; }

// Bytes that `rows` rounded rows of k numbers take.
size_t tiles_rounded_bytes(int64_t rows, int64_t k);

// Rows [first, end) of x (fp32, row m at x + m * stride), of `rows` in all, into `to`; with the last one comes what
// fills the memory up. Of w it takes k, order and level, so weights that share these (q, k, v) can share rounded rows.
void tiles_round(const Tiles &w, const float *x, int64_t stride, int64_t rows, int64_t first, int64_t end, void *to);

// Outputs [16 first_tile, 16 end_tile) of all rows: y[m * y_stride + n] = the product, or with `add` += the product.
void tiles_multiply(const Tiles &w, const void *rounded, int64_t rows, float *y, int64_t y_stride, int64_t first_tile,
                    int64_t end_tile, bool add);

// The linear layers of a step, whatever their weights are kept as: each lays out its inputs row by row, then computes any
// range of its outputs.

#pragma once

#include "ggufblocks.h"
#include "products.h"
#include "tiles.h"
#include "vector.h"

namespace {

using namespace puna;

enum Keeping : int64_t { PLAIN, PACKED, TILES, BLOCKS };

// Packed by step.py: "q" and the bytes of the weight's own struct, padded; what belongs to a call is 0 in them.
struct Linear {
    int64_t keeping;
    union {
        PlainProduct plain;
        PackedProduct packed;
        Tiles tiles;
        BlocksProduct blocks;
        uint8_t room[160];
    };

    int64_t outputs() const {
        return keeping == PLAIN ? plain.n : keeping == PACKED ? packed.n : keeping == TILES ? tiles.n : blocks.n;
    }
    int64_t inputs() const {
        return keeping == PLAIN ? plain.k : keeping == PACKED ? packed.k : keeping == TILES ? tiles.k : blocks.k;
    }
};
static_assert(sizeof(Linear) == 168, "step.py packs 168 bytes");

constexpr int64_t UNIT = 16;  // outputs that are never divided: a tile

INLINE int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// How kernels are called on this processor, and what plain weights are.
struct Kernels {
    PackedLevel packed;
    PlainColumns *plain;
    BlocksColumns *blocks;
    Type type;  // of plain weights, and of the x they take
};

// Bytes in which `rows` inputs lie as the kernel reads them; 0: it reads them as they are.
INLINE int64_t laid_out_bytes(const Linear &w, int64_t rows, const Kernels &kernels) {
    if (w.keeping == TILES) return up(int64_t(tiles_rounded_bytes(rows, w.tiles.k)), 64);
    if (w.keeping == BLOCKS) return 0;
    if (w.keeping == PLAIN) return kernels.type == FLOAT32 ? 0 : up(rows * w.plain.k * int64_t(sizeof(bf16)), 64);
    Arranged to = arranged(w.packed, kernels.packed.lanes);
    return up(rows * (to.x_row + to.sum_row) * int64_t(sizeof(float)), 64);
}

// Floats of working memory that a thread needs for this weight.
INLINE int64_t scratch_of(const Linear &w, const Kernels &kernels) {
    if (w.keeping != PACKED) return 0;
    int64_t row = arranged(w.packed, kernels.packed.lanes).x_row, scales = packed_scratch(w.packed, kernels.packed.lanes);
    return row > scales ? row : scales;
}

// y (rows, outputs) = x (rows, inputs) W^T + b in this step, both fp32.
struct Product {
    const Linear *of;
    const float *x;
    float *y;
    int64_t rows;
    uint8_t *laid_out;  // null: nothing to lay out
    bool shared;        // the product before lays it out
    Arranged arranged;

    PackedProduct packed() const {
        PackedProduct p = of->packed;
        p.x = x, p.y = y, p.rows = rows, p.x_stride = p.k, p.type = p.out = FLOAT32;
        return p;
    }
};

INLINE bool same_layout(const Linear &p, const Linear &q) {
    if (p.keeping != q.keeping) return false;
    if (p.keeping == TILES) return p.tiles.k == q.tiles.k && p.tiles.order == q.tiles.order;
    return p.keeping != PACKED || same_input(p.packed, q.packed);
}

// `count` products of one x, their inputs laid out one after another in `memory`.
INLINE void place(Product *products, int count, uint8_t *memory, const Kernels &kernels) {
    for (int i = 0; i < count; i++) {
        Product &p = products[i];
        p.shared = i && same_layout(*products[i - 1].of, *p.of);
        if (p.shared) {
            p.laid_out = products[i - 1].laid_out;
            p.arranged = products[i - 1].arranged;
            if (p.of->keeping != PACKED) continue;
            // Where groups end is each weight's own.
            Arranged own = arranged(p.of->packed, kernels.packed.lanes);
            memcpy(p.arranged.lane_group, own.lane_group, sizeof own.lane_group);
            continue;
        }
        int64_t bytes = laid_out_bytes(*p.of, p.rows, kernels);
        p.laid_out = bytes ? memory : nullptr;
        memory += bytes;
        if (p.of->keeping != PACKED) continue;
        p.arranged = arranged(p.of->packed, kernels.packed.lanes);
        p.arranged.x = (float *)p.laid_out, p.arranged.sums = p.arranged.x + p.rows * p.arranged.x_row;
    }
}

INLINE void lay_out(const Product &p, int64_t row, const Kernels &kernels, float *scratch) {
    if (p.shared || !p.laid_out) return;
    const Linear &w = *p.of;
    int64_t k = w.inputs();
    if (w.keeping == TILES) return tiles_round(w.tiles, p.x, k, p.rows, row, row + 1, p.laid_out);
    if (w.keeping == PACKED) return kernels.packed.arrange(p.packed(), p.arranged, row, row + 1, scratch);
    for (int64_t i = 0; i < k; i++) narrow(p.x[row * k + i], (bf16 *)p.laid_out + row * k + i);
}

// Outputs begin to end - 1 of all rows, `begin` a multiple of UNIT and so is `end` unless it is the last.
INLINE void multiply(const Product &p, int64_t begin, int64_t end, const Kernels &kernels, float *scratch) {
    const Linear &w = *p.of;
    if (w.keeping == TILES)
        return tiles_multiply(w.tiles, p.laid_out, p.rows, p.y, w.tiles.n, begin / UNIT, (end + UNIT - 1) / UNIT, false);
    if (w.keeping == PACKED) return kernels.packed.columns(p.packed(), p.arranged, begin, end, scratch);
    if (w.keeping == BLOCKS) {
        BlocksProduct blocks = w.blocks;
        blocks.x = p.x, blocks.y = p.y, blocks.rows = p.rows, blocks.x_stride = blocks.k;
        return kernels.blocks(blocks, begin, end);
    }
    PlainProduct plain = w.plain;
    plain.x = p.laid_out ? (const void *)p.laid_out : p.x;
    plain.y = p.y, plain.rows = p.rows, plain.x_stride = plain.k;
    kernels.plain(plain, begin, end);
}

}  // namespace

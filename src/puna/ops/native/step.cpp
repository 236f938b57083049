// A whole step of a dense Llama in one call: all layers, for rows of any sequences at any positions, over paged keys and
// values. Its twin is model/transformer.py with ops/paged.PagedCausal.
//
// Of a small model half the time goes into calling a dozen operations a layer; here there is one parallel region, whose
// threads meet between stages (a few hundred nanoseconds each). A layer:
//
//     rows      x += what came last; norm; inputs of q, k, v laid out as their kernel reads them
//     outputs   q, k, v
//     rows      norms of heads, rotary positions, keys and values into the pages
//     tasks     attention (paged.h)
//     rows      inputs of o laid out          outputs   o
//     rows      x += o; norm; laid out        outputs   gate and up, and silu(gate) * up
//     rows      inputs of down laid out       outputs   down
//
// Everything is fp32 between two products (rows.h: or what bf16 would leave of it). Every number is summed by one thread
// in an order of its own, so a row's bits depend on nothing that happens to be computed beside it, nor on the threads.
//
// Shapes: T rows, D model width, H query heads, G key/value heads, K head width, F feed-forward width, V words.

#include <algorithm>
#include <cstdlib>
#include <omp.h>
#include <utility>
#include <vector>

#include "linears.h"
#include "paged.h"
#include "rows.h"
#include "team.h"

namespace {

// Packed by step.py, like everything here: norms fp32, null where there is none; keys and values of this layer.
struct Layer {
    const float *attn_norm, *mlp_norm, *q_norm, *k_norm;
    void *keys, *values;
    const float *key_scales, *value_scales;
    int64_t window;
    Linear q, k, v, o, gate, up, down;
};

struct Model {
    const Layer *layers;
    const void *embed;  // (V, D), bf16 with `half`, else fp32
    const float *norm;
    int64_t count, words, width, heads, groups, head_width, inner;
    int64_t page, page_head, page_size, scale_step;  // as in paged::Call
    float eps;
    int32_t half, cache_kind, level;
    Linear head;
};

// What differs from step to step. cos, sin: (positions, K / 2); wanted (R,): rows whose logits (R, V) are asked for.
struct Step {
    const Model *model;
    const int64_t *tokens, *positions, *slots;
    const float *cos, *sin;
    const int32_t *starts, *lengths, *tables;
    const int64_t *wanted;
    float *logits;
    int64_t rows, sequences, table_row, asked, threads;
};

// What all threads of a step see.
struct Shared {
    const Step &step;
    const Model &model;
    Kernels kernels;
    Rows rows;
    paged::Call call;
    std::vector<paged::Plan> plans;  // one for each distinct window
    std::vector<int> plan_of;        // each layer's
    int threads;
    // x: the residual stream; h: normalised; delta: what is added to x next.
    float *x{}, *h{}, *delta{}, *q{}, *k{}, *v{}, *out{}, *gate{}, *up{};
    uint8_t *laid_out{};

    Shared(const Step &step, const Kernels &kernels)
        : step(step), model(*step.model), kernels(kernels),
          rows(model.half ? rows_at<true>(model.level) : rows_at<false>(model.level)), threads(int(step.threads)) {}
};

// --- products -------------------------------------------------------------------------------------------------------

// Up to three products of one x (T or R rows), as one or two stages.
struct Group {
    Product products[3];
    int count;
    bool lays_out = false;

    Group(const Shared &s, const float *x, int64_t rows, std::initializer_list<std::pair<const Linear *, float *>> all)
        : products{}, count(0) {
        for (auto [linear, y] : all) products[count++] = {linear, x, y, rows, nullptr, false, {}};
        place(products, count, s.laid_out, s.kernels);
        for (int i = 0; i < count; i++) lays_out = lays_out || products[i].laid_out;
    }
    void row(const Shared &s, int64_t r, float *scratch) const {
        for (int i = 0; i < count; i++) lay_out(products[i], r, s.kernels, scratch);
    }
};

INLINE int64_t units(const Product &p) { return (p.of->outputs() + UNIT - 1) / UNIT; }

// Tasks of about as many outputs: several for each thread, so that one that was away does not hold the others up.
INLINE int64_t cut(const Shared &s, int64_t units) { return units < 8 * s.threads ? units : 8 * s.threads; }

INLINE void outputs_of(const Shared &s, const Product &p, int64_t first, int64_t last, float *scratch) {
    int64_t end = last * UNIT < p.of->outputs() ? last * UNIT : p.of->outputs();
    if (first * UNIT < end) multiply(p, first * UNIT, end, s.kernels, scratch);
}

// All outputs, one product after another.
void outputs(const Shared &s, Member &me, const Group &group, float *scratch) {
    int64_t total = 0;
    for (int i = 0; i < group.count; i++) total += units(group.products[i]);
    int64_t tasks = cut(s, total);
    me.stage(tasks, [&](int64_t task) {
        int64_t first = task * total / tasks, last = (task + 1) * total / tasks;
        for (int i = 0; i < group.count && last > 0; i++) {
            int64_t here = units(group.products[i]);
            outputs_of(s, group.products[i], first > 0 ? first : 0, last < here ? last : here, scratch);
            first -= here, last -= here;
        }
    });
}

// gate = silu(gate) * up; whoever computed some outputs of both goes on with them.
void gated_outputs(const Shared &s, Member &me, const Group &group, float *scratch) {
    const Product &gate = group.products[0], &up = group.products[1];
    int64_t total = units(gate), tasks = cut(s, total), n = gate.of->outputs();
    me.stage(tasks, [&](int64_t task) {
        int64_t first = task * total / tasks, last = (task + 1) * total / tasks;
        outputs_of(s, gate, first, last, scratch);
        outputs_of(s, up, first, last, scratch);
        int64_t begin = first * UNIT, end = last * UNIT < n ? last * UNIT : n;
        for (int64_t r = 0; r < gate.rows; r++) s.rows.swiglu(gate.y + r * n + begin, up.y + r * n + begin, end - begin);
    });
}

void laid_out_rows(const Shared &s, Member &me, const Group &group, float *scratch) {
    if (group.lays_out) me.stage(s.step.rows, [&](int64_t r) { group.row(s, r, scratch); });
}

// --- stages ---------------------------------------------------------------------------------------------------------

void embed_row(const Shared &s, int64_t r) {
    int64_t width = s.model.width, from = s.step.tokens[r] * width;
    float *x = s.x + r * width;
    if (!s.model.half) memcpy(x, (const float *)s.model.embed + from, size_t(width) * sizeof(float));
    else for (int64_t i = 0; i < width; i++) x[i] = widen(((const bf16 *)s.model.embed)[from + i]);
}

// x += delta; h = norm(x), laid out for what reads it.
void norm_rows(const Shared &s, Member &me, const float *weight, const Group &group, bool first, float *scratch) {
    int64_t width = s.model.width;
    me.stage(s.step.rows, [&](int64_t r) {
        if (first) embed_row(s, r);
        else s.rows.add(s.x + r * width, s.delta + r * width, width);
        s.rows.norm(s.x + r * width, weight, s.h + r * width, width, s.model.eps);
        group.row(s, r, scratch);
    });
}

void heads_of(const Shared &s, float *x, int64_t heads, const float *norm, int64_t position) {
    int64_t width = s.model.head_width, at = position * (width / 2);
    for (int64_t h = 0; h < heads; h++, x += width) {
        if (norm) s.rows.norm(x, norm, x, width, s.model.eps);
        s.rows.turn(x, s.step.cos + at, s.step.sin + at, width);
    }
}

// Queries and keys are normed and turned; keys and values go to their pages.
void head_rows(const Shared &s, Member &me, const Layer &layer, const paged::Call &call) {
    const Model &m = s.model;
    int64_t q_row = m.heads * m.head_width, k_row = m.groups * m.head_width;
    me.stage(s.step.rows, [&](int64_t r) {
        s.rows.round(s.q + r * q_row, q_row);
        s.rows.round(s.k + r * k_row, k_row);
        s.rows.round(s.v + r * k_row, k_row);
        heads_of(s, s.q + r * q_row, m.heads, layer.q_norm, s.step.positions[r]);
        heads_of(s, s.k + r * k_row, m.groups, layer.k_norm, s.step.positions[r]);
        paged::write(call, r, r + 1);
    });
}

void attention(Shared &s, Member &me, const Layer &layer, int64_t number, float *scratch) {
    paged::Call call = s.call;
    call.keys = layer.keys, call.values = layer.values, call.window = layer.window;
    call.key_scales = layer.key_scales, call.value_scales = layer.value_scales;
    head_rows(s, me, layer, call);
    paged::Plan &plan = s.plans[size_t(s.plan_of[size_t(number)])];
    me.stage(int64_t(plan.tasks.size()), [&](int64_t task) { paged::attend(call, plan, task, scratch); });
    const int64_t width = s.model.heads * s.model.head_width;
    Group o(s, s.out, s.step.rows, {{&layer.o, s.delta}});
    if (o.lays_out || s.model.half)
        me.stage(s.step.rows, [&](int64_t r) {
            s.rows.round(s.out + r * width, width);
            o.row(s, r, scratch);
        });
    outputs(s, me, o, scratch);
}

void layer_of(Shared &s, Member &me, int64_t number, float *scratch) {
    const Layer &layer = s.model.layers[number];
    int64_t rows = s.step.rows;
    Group qkv(s, s.h, rows, {{&layer.q, s.q}, {&layer.k, s.k}, {&layer.v, s.v}});
    norm_rows(s, me, layer.attn_norm, qkv, number == 0, scratch);
    outputs(s, me, qkv, scratch);
    attention(s, me, layer, number, scratch);
    Group gate_up(s, s.h, rows, {{&layer.gate, s.gate}, {&layer.up, s.up}});
    norm_rows(s, me, layer.mlp_norm, gate_up, false, scratch);
    gated_outputs(s, me, gate_up, scratch);
    Group down(s, s.gate, rows, {{&layer.down, s.delta}});
    laid_out_rows(s, me, down, scratch);
    outputs(s, me, down, scratch);
}

void logits_of(const Shared &s, Member &me, float *scratch) {
    int64_t width = s.model.width, words = s.model.words;
    Group head(s, s.h, s.step.asked, {{&s.model.head, s.step.logits}});
    me.stage(s.step.asked, [&](int64_t i) {
        float *h = s.h + i * width;
        memcpy(h, s.x + s.step.wanted[i] * width, size_t(width) * sizeof(float));
        s.rows.add(h, s.delta + s.step.wanted[i] * width, width);
        s.rows.norm(h, s.model.norm, h, width, s.model.eps);
        head.row(s, i, scratch);
    });
    outputs(s, me, head, scratch);
    if (s.model.half)
        me.stage(s.step.asked, [&](int64_t i) { s.rows.round(s.step.logits + i * words, words); });
}

// --- before the threads start ---------------------------------------------------------------------------------------

bool is_sound(const Step &step) {
    for (int64_t r = 0; r < step.rows; r++)
        if (step.tokens[r] < 0 || step.tokens[r] >= step.model->words) return false;
    for (int64_t i = 0; i < step.asked; i++)
        if (step.wanted[i] < 0 || step.wanted[i] >= step.rows) return false;
    return true;
}

void make_plans(Shared &s) {
    std::vector<int64_t> windows;
    for (int64_t l = 0; l < s.model.count; l++) {
        int64_t window = s.model.layers[l].window;
        size_t i = 0;
        while (i < windows.size() && windows[i] != window) i++;
        s.plan_of.push_back(int(i));
        if (i < windows.size()) continue;
        windows.push_back(window);
        s.plans.emplace_back();
        s.call.window = window;
        paged::plan(s.call, s.threads, s.plans.back());
    }
}

void describe_call(Shared &s) {
    const Model &m = s.model;
    int64_t q_row = m.heads * m.head_width, k_row = m.groups * m.head_width;
    s.call = {};
    s.call.q = {s.q, q_row, m.head_width}, s.call.out = {s.out, q_row, m.head_width};
    s.call.k = {s.k, k_row, m.head_width}, s.call.v = {s.v, k_row, m.head_width};
    s.call.slots = s.step.slots, s.call.starts = s.step.starts, s.call.lengths = s.step.lengths;
    s.call.tables = s.step.tables, s.call.table_row = s.step.table_row;
    s.call.sequences = s.step.sequences, s.call.tokens = s.step.rows;
    s.call.page = m.page, s.call.head = m.page_head, s.call.page_size = m.page_size;
    s.call.heads = m.heads, s.call.groups = m.groups, s.call.width = m.head_width, s.call.scale_step = m.scale_step;
    s.call.kind = paged::FLOAT32, s.call.cache_kind = m.cache_kind;
    s.call.threads = s.threads, s.call.level = m.level;
}

// The largest needs of any layer: bytes for laid out inputs, and floats of scratch for a thread.
struct Needs {
    int64_t laid_out = 0, scratch = 0;

    void group(const Kernels &kernels, int64_t rows, std::initializer_list<const Linear *> linears) {
        int64_t bytes = 0;
        for (const Linear *linear : linears) {
            bytes += laid_out_bytes(*linear, rows, kernels);
            scratch = std::max(scratch, scratch_of(*linear, kernels));
        }
        laid_out = std::max(laid_out, bytes);
    }
};

Needs needs_of(const Shared &s) {
    Needs needs;
    for (int64_t l = 0; l < s.model.count; l++) {
        const Layer &layer = s.model.layers[l];
        needs.group(s.kernels, s.step.rows, {&layer.q, &layer.k, &layer.v});
        needs.group(s.kernels, s.step.rows, {&layer.o});
        needs.group(s.kernels, s.step.rows, {&layer.gate, &layer.up});
        needs.group(s.kernels, s.step.rows, {&layer.down});
    }
    needs.group(s.kernels, s.step.asked, {&s.model.head});
    for (const paged::Plan &plan : s.plans) needs.scratch = std::max(needs.scratch, plan.scratch);
    needs.scratch = up(needs.scratch, 16);
    return needs;
}

// Every array in its place, each on cache lines of its own; returns how many floats they take.
int64_t divide(Shared &s, float *memory) {
    const Model &m = s.model;
    int64_t q_row = m.heads * m.head_width, k_row = m.groups * m.head_width, room = 0;
    int64_t rows = up(std::max(s.step.rows, s.step.asked), 16);
    struct { float *&at; int64_t width; } arrays[] = {
        {s.x, m.width}, {s.h, m.width}, {s.delta, m.width}, {s.q, q_row}, {s.k, k_row},
        {s.v, k_row}, {s.out, q_row}, {s.gate, m.inner}, {s.up, m.inner}};
    for (auto &array : arrays) {
        if (memory) array.at = memory + room;
        room += rows * array.width;
    }
    return room;
}

}  // namespace

extern "C" {

// 0: done. 1: no memory. 2: a token or a wanted row that does not exist.
int puna_step(const Step *given) {
    const Step &step = *given;
    const Model &m = *step.model;
    if (!is_sound(step)) return 2;
    Type type = m.half ? BFLOAT16 : FLOAT32;
    Shared s(step, {packed_level(m.level), plain_columns(type, m.level), blocks_columns(m.level), type});
    describe_call(s);
    make_plans(s);
    Needs needs = needs_of(s);
    int64_t arrays = divide(s, nullptr), floats = arrays + s.threads * needs.scratch;
    float *memory = (float *)aligned_alloc(64, size_t(floats) * sizeof(float) + size_t(needs.laid_out));
    if (!memory) return 1;
    divide(s, memory);
    s.laid_out = (uint8_t *)(memory + floats);
    describe_call(s);  // now with addresses
    Team team;
#pragma omp parallel num_threads(s.threads)
    {
        Member me(team);
        float *scratch = memory + arrays + omp_get_thread_num() * needs.scratch;
        for (int64_t number = 0; number < m.count; number++) layer_of(s, me, number, scratch);
        if (step.asked) logits_of(s, me, scratch);
    }
    free(memory);
    return 0;
}
}

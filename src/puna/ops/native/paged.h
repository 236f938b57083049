// Attention over a paged KV cache: what other kernels call inside their own parallel region. The work is in paged.cpp.
//
// Shapes: T new tokens, B sequences, H query heads, G key/value heads (H = G * R), K head width, P pages of S positions.
//
//     Call call = {...};                          // one layer: its pages, this step's q, k, v, out, and who sits where
//     plan(call, threads, steps_plan);            // once a step and per distinct window (not per layer)
//     every thread:  write(call, begin, end)      // its share of the T tokens: new rows go into the pages
//     barrier
//     every thread:  attend(call, plan, i, scratch) for i of 0 .. plan.tasks.size(), each once, in any order
//
// Every number a task gives depends on its query, on the positions it sees, and on whether its sequence has a single new
// token: not on page ids, on the other rows, on the number of threads, or on how tokens are divided into tasks.

#pragma once

#include <cstdint>
#include <vector>

namespace paged {

enum Kind : int32_t { FLOAT32, BFLOAT16, FLOAT16, INT8, FLOAT8 };  // FLOAT8 is e4m3fn

// Rows of K contiguous numbers; `token` and `head` are the distances (in numbers) from one to the next.
struct Rows {
    void *data;
    int64_t token, head;
};

// One layer of one step, packed in Python as native/paged.py does.
struct Call {
    void *keys, *values;                     // (P, G, S, K) of this layer, of `cache_kind`
    const float *key_scales, *value_scales;  // of codes, (1,) or (G,); null for numbers
    Rows q, k, v, out;                       // (T, H, K), (T, G, K), (T, G, K), (T, H, K), of `kind`: no codes
    const int64_t *slots;                    // (T,): page * S + row of each new token
    const int32_t *starts, *lengths;         // (B + 1,): first token of each sequence; (B,): positions, new ones included
    const int32_t *tables;                   // (B, table_row): pages of each sequence in order
    int64_t table_row, sequences, tokens;
    int64_t page, head;                      // numbers from one page, and from one kv head, to the next
    int64_t page_size, heads, groups, width, scale_step;  // scale_step: 0 one scale for all heads, 1 each its own
    int64_t window;                          // a token sees itself and window - 1 before it; 2^30: all
    int32_t kind, cache_kind, threads, level;
};

// Some tokens of one sequence with one kv head, and all positions they see or one split of them.
struct Task {
    int64_t token, tokens, position;  // the first token on the token axis, how many, the first one's position
    int64_t group, first, end;        // kv head; positions to look at, `first` a multiple of a split's size
    const int32_t *table;
    int64_t unit, part;               // split tasks: which of plan.units, and which part of it; -1: the task is whole
    bool alone;                       // the sequence has no other new token
};

// The tasks of one step. Kept and filled again, it allocates nothing after the first steps.
struct Plan {
    struct Unit {
        int64_t partials, parts, finished;  // where its parts' results lie, how many, how many are there
    };
    std::vector<Task> tasks;
    std::vector<Unit> units;      // those whose positions are divided between threads
    std::vector<float> partials;  // softmax and sums of each part until the last one is there
    int64_t scratch;              // floats of working memory that a thread needs, 64-byte aligned
};

// Lists the tasks; long contexts are divided when there are fewer tasks than keep `workers` busy. Reads of `call` no
// tensor's contents but starts, lengths and the tables' addresses, so it holds for all layers with the same window.
void plan(const Call &call, int64_t workers, Plan &plan);

// Keys and values of tokens [begin, end) go to their slots, rounded to the cache's kind.
void write(const Call &call, int64_t begin, int64_t end);

// One task: rows of `out`. Whoever finishes the last part of a unit puts the unit together (no barrier is needed).
void attend(const Call &call, Plan &plan, int64_t task, float *scratch);

}  // namespace paged

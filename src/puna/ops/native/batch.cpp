// A training batch from memory-mapped token files: ids widened to int64, the next id as target, positions from zero.
// One pass over pieces of documents that lie anywhere; what is left is the speed of memory (26 or 28 bytes a token).

#include <cstdint>

namespace {

// tokens, targets, positions are (T,); piece i is `length[i]` ids at `source[i]`, to stand at `place[i]`. Its last
// target is the id behind it, or `ignore` where `ends[i]`. `width` bytes an id: 2 or 4. Packed as "PPPPPPPqqq".
struct Batch {
    int64_t *tokens, *targets, *positions;
    const uint64_t *source;
    const int64_t *place, *length;
    const uint8_t *ends;
    int64_t pieces, width, ignore;
};

template <typename T> void fill(const Batch &b, int64_t piece) {
    const T *from = reinterpret_cast<const T *>(b.source[piece]);
    const int64_t length = b.length[piece], place = b.place[piece], last = length - 1;
    int64_t *tokens = b.tokens + place, *targets = b.targets + place, *positions = b.positions + place;
    for (int64_t i = 0; i < length; ++i) tokens[i] = from[i];
    for (int64_t i = 0; i < last; ++i) targets[i] = from[i + 1];
    for (int64_t i = 0; i < length; ++i) positions[i] = i;
    targets[last] = b.ends[piece] ? b.ignore : int64_t(from[length]);
}

} // namespace

extern "C" void puna_fill_batch(const char *packed) {
    const Batch &b = *reinterpret_cast<const Batch *>(packed);
    for (int64_t i = 0; i < b.pieces; ++i) b.width == 2 ? fill<uint16_t>(b, i) : fill<uint32_t>(b, i);
}

// Neighbours in fp16 or bf16 as fp32 and back: eight of them in one load of 16 bytes, or one where a row does not begin at a
// multiple of 16 bytes.
#pragma once

#include "w4a16_types.cuh"

namespace halfbyte {

template <class Type, int WIDTH>
struct Lanes;

template <class Type>
struct Lanes<Type, 8> {
    using Word = uint4;
    static DEVICE void widen(const Word& word, float (&values)[8]) {
        const u32 pairs[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            values[2 * i] = Type::low(pairs[i]);
            values[2 * i + 1] = Type::high(pairs[i]);
        }
    }
    static DEVICE Word narrow(const float (&v)[8]) {
        return {Type::pack(v[0], v[1]), Type::pack(v[2], v[3]), Type::pack(v[4], v[5]), Type::pack(v[6], v[7])};
    }
};

template <class Type>
struct Lanes<Type, 1> {
    using Word = unsigned short;
    static DEVICE void widen(Word word, float (&values)[1]) { values[0] = Type::low(word); }
    static DEVICE Word narrow(const float (&values)[1]) { return static_cast<Word>(Type::pack(values[0], 0.0f)); }
};

// `index` counts 16-bit numbers from `base`, and is a multiple of WIDTH.
template <class Type, int WIDTH>
DEVICE void load_floats(const void* base, long long index, float (&values)[WIDTH]) {
    using Word = typename Lanes<Type, WIDTH>::Word;
    Lanes<Type, WIDTH>::widen(load_global<Word>(static_cast<const char*>(base) + 2 * index), values);
}
template <class Type, int WIDTH>
DEVICE void store_floats(void* base, long long index, const float (&values)[WIDTH]) {
    store_global(static_cast<char*>(base) + 2 * index, Lanes<Type, WIDTH>::narrow(values));
}
// What storing and loading would leave of them.
template <class Type, int WIDTH>
DEVICE void round_floats(float (&values)[WIDTH]) {
    Lanes<Type, WIDTH>::widen(Lanes<Type, WIDTH>::narrow(values), values);
}

}  // namespace halfbyte

// A decoder-only transformer, all of it: one call a step, whatever the number of tokens and sequences.
//
// The architecture is data (`DecoderConfig`, one `DecoderLayer` a layer). A step is a program that the threads of a team go
// through together (team.hpp), six phases a layer:
//
//     1  norm, prepare  →  q, k, v                       blocks of 16 output rows
//     2  norms of q and k, rotation, k and v to the cache   rows × key-value heads
//     3  attention                                        rows × key-value heads × spans of 256 positions
//     4  put spans together, prepare  →  output, + residual   blocks of 16 rows
//     5  norm, prepare  →  gate, up                       blocks of 16 rows
//     6  activation, prepare  →  down, + residual         blocks of 16 rows
//
// What a product needs prepared (norm, quantization of its input) every thread does for itself when there are few rows: cheaper
// than one more barrier. Every number of a row is computed by the same operations in the same order whatever else is in the
// step and however many threads there are: a row has the same bits in any company.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "linear.hpp"
#include "team.hpp"

namespace halfbyte {

enum class QkNorm : int { none = 0, heads = 1, whole = 2 };

struct DecoderConfig {
    int hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, intermediate = 0, vocabulary = 0;
    int rotary_pairs = 0;  // pairs of a head that turn: half its rotated part
    int rotations = 1;     // tables of cosines and sines
    float epsilon = 1e-5f;
    float attention_scale = 1.0f, attention_softcap = 0.0f;  // 0 for none
    float embedding_scale = 1.0f, residual_scale = 1.0f, logits_scale = 1.0f, logits_softcap = 0.0f;
    int activation = 0;  // Activation
    int qk_norm = 0;     // QkNorm
};

// Norm weights: [hidden], or [head_dim] or [rows] for q and k; empty where there is none.
struct DecoderLayer {
    std::vector<std::shared_ptr<const Linear>> qkv;  // one after the other they make q, k, v
    std::shared_ptr<const Linear> output;
    std::vector<std::shared_ptr<const Linear>> gate_up;
    std::shared_ptr<const Linear> down;
    std::vector<float> attention_norm, attention_post_norm, mlp_norm, mlp_post_norm, q_norm, k_norm;
    int window = 0;    // positions a token attends to, itself included; 0 for all
    int rotation = 0;  // which table
};

// Keys and values of some sequences, fp16 (attention.hpp). Untouched pages cost nothing.
class KvCache {
   public:
    KvCache(int layers, int sequences, int kv_heads, int head_dim, int capacity);
    ~KvCache();
    KvCache(const KvCache&) = delete;
    KvCache& operator=(const KvCache&) = delete;

    int layers() const { return layers_; }
    int sequences() const { return sequences_; }
    int capacity() const { return capacity_; }
    int kv_heads() const { return kv_heads_; }
    int head_dim() const { return head_dim_; }
    std::size_t nbytes() const;
    std::uint16_t* keys(int layer, int sequence, int head) const { return place(layer, sequence, head); }
    std::uint16_t* values(int layer, int sequence, int head) const { return place(layer, sequence, head) + stride_; }

   private:
    std::uint16_t* place(int layer, int sequence, int head) const {
        return data_ + ((static_cast<std::size_t>(layer) * sequences_ + sequence) * kv_heads_ + head) * 2 * stride_;
    }
    int layers_, sequences_, kv_heads_, head_dim_, capacity_;
    std::size_t stride_;  // numbers in the keys, and in the values, of one head
    std::uint16_t* data_;
};

// What one step is to do: a row is one token.
struct DecoderStep {
    const std::int32_t* ids;        // [rows], below the vocabulary
    const std::int32_t* sequences;  // [rows], below the cache's
    const std::int32_t* positions;  // [rows], below the capacity; earlier positions are in the cache or in this step
    int rows;
    const std::int32_t* wanted;  // [wanted_rows], ascending: rows whose logits are wanted
    int wanted_rows;
    float* logits;  // [wanted_rows][vocabulary]
};

class Decoder {
   public:
    // Rows that go through the layers together.
    static constexpr int CHUNK_ROWS = 256;

    // Throws std::invalid_argument when shapes contradict each other.
    Decoder(const Tier& tier, const DecoderConfig& config, std::vector<DecoderLayer> layers, std::vector<float> final_norm,
            std::shared_ptr<const Linear> head, const void* embedding, DType embedding_dtype);

    // Table `rotation`: [positions][rotary_pairs] of cosines and of sines, copied.
    void set_rotation(int rotation, const float* cosines, const float* sines, int positions);
    int rotation_positions() const;

    void step(KvCache& cache, const DecoderStep& step);

    const DecoderConfig& config() const { return config_; }
    int layers() const { return static_cast<int>(layers_.size()); }
    std::size_t nbytes() const;  // of weights a step reads

   private:
    struct Work;
    static constexpr int PARTS = 3;
    // Linears that share their input, one after the other in the output. `source[i]`: the first part whose prepared rows part i
    // can take.
    struct Projection {
        explicit Projection(const std::vector<std::shared_ptr<const Linear>>& linears);
        std::size_t prepared_bytes() const;  // of a row, for all parts
        int count = 0, blocks = 0;
        const Linear* parts[PARTS] = {};
        int source[PARTS] = {};
    };
    struct Projections {
        Projection qkv, output, gate_up, down;
    };
    struct Prepared {
        const std::uint8_t* rows[PARTS];
    };
    struct Rotation {
        std::vector<float> cosines, sines;
    };
    void chunk(KvCache& cache, const DecoderStep& step, int first, int rows);
    void run(Team& team, int id, Work& work) const;
    void run_layer(Team& team, int id, Work& work, int index) const;
    void place_keys(Team& team, Work& work, int index) const;
    void attend(Team& team, Work& work, int index) const;
    void gather_head(const Work& work, int index, int row, int head, float* out) const;
    void run_head(Team& team, int id, Work& work) const;
    template <class Produce>
    Prepared prepare(Team& team, int id, Work& work, const Projection& projection, int rows, const Produce& produce) const;
    template <class After>
    void multiply(Team& team, const Projection& projection, const Prepared& prepared, int rows, float* y, std::size_t stride,
                  const After& after) const;
    void add_normed(Team& team, Work& work, const std::vector<float>& norm) const;

    const Tier& tier_;
    DecoderConfig config_;
    std::vector<DecoderLayer> layers_;
    std::vector<float> final_norm_;
    std::shared_ptr<const Linear> head_;
    std::vector<Projections> projections_;
    std::size_t prepared_bytes_ = 0;  // of a row, for the widest projection
    const void* embedding_;
    DType embedding_dtype_;
    std::vector<Rotation> rotations_;
};

}  // namespace halfbyte

// A decoder-only transformer, all of it: one call a step, whatever the number of tokens and sequences.
//
// The architecture is data (`DecoderConfig`, one `DecoderLayer` a layer). A step is a program that the threads of a team go
// through together (team.hpp), five phases a layer:
//
//     1  norm, prepare  →  q, k, v                       blocks of 16 output rows
//        norms of q and k, rotation, k and v to the cache   heads, by the thread that computed them
//     2  attention                                        rows × key-value heads × spans of 256 positions
//     3  put spans together, prepare  →  output, + residual   blocks of 16 rows
//     4  norm, prepare  →  gate, up                       blocks of 16 rows
//     5  activation, prepare  →  down, + residual         blocks of 16 rows
//
// What a product needs prepared (norm, quantization of its input) every thread does for itself when there are few rows: cheaper
// than one more barrier. Every number of a row is computed by the same operations in the same order whatever else is in the
// step and however many threads there are: a row has the same bits in any company.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kv_cache.hpp"
#include "linear.hpp"
#include "step_profile.hpp"
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

// What one step is to do: a row is one token.
struct DecoderStep {
    const std::int32_t* ids;        // [rows], below the vocabulary
    const std::int32_t* sequences;  // [rows], below the cache's
    const std::int32_t* positions;  // [rows], below the capacity; earlier positions are in the cache or in this step
    int rows;
    const std::int32_t* wanted;  // [wanted_rows], ascending: rows whose logits are wanted
    int wanted_rows;
    float* logits;  // [wanted_rows][vocabulary]
    StepProfile* profile = nullptr;  // where the time goes is added to it
};

class Decoder {
   public:
    // Rows that go through the layers together.
    static constexpr int CHUNK_ROWS = SLACK;

    // Throws std::invalid_argument when shapes contradict each other.
    Decoder(const Tier& tier, const DecoderConfig& config, std::vector<DecoderLayer> layers, std::vector<float> final_norm,
            std::shared_ptr<const Linear> head, const void* embedding, DType embedding_dtype);

    // The same model with some of its layers only, over the same weights.
    Decoder with_layers(const std::vector<int>& numbers) const;

    // Table `rotation`: [positions][rotary_pairs] of cosines and of sines, copied.
    void set_rotation(int rotation, const float* cosines, const float* sines, int positions);
    int rotation_positions() const;

    void step(KvCache& cache, const DecoderStep& step);

    const DecoderConfig& config() const { return config_; }
    int layers() const { return static_cast<int>(layers_.size()); }
    // Whether a cache was made for a model of this shape.
    bool takes(const KvCache& cache) const;
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
    void multiply_qkv(Team& team, int id, Work& work, const Prepared& prepared, int index) const;
    void place_keys(Team& team, Work& work, int index) const;
    void place_head(Work& work, int index, int row, int number) const;
    bool places_while_multiplying(const Team& team) const;
    void store_key(KvCache& cache, int index, int sequence, int kv_head, int position, const float* key) const;
    void store_value(KvCache& cache, int index, int sequence, int kv_head, int position, const float* value) const;
    void attend(Team& team, Work& work, int index) const;
    void gather_head(const Work& work, int index, int row, int head, float* out) const;
    void run_head(Team& team, int id, Work& work) const;
    template <class Produce>
    Prepared prepare(Team& team, int id, Work& work, const Projection& projection, int rows, const Produce& produce) const;
    template <class After>
    void multiply(Team& team, const Projection& projection, const Prepared& prepared, int rows, float* y, std::size_t stride,
                  const After& after, int together = 2) const;
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

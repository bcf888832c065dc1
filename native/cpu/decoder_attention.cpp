// Attention in a step of the decoder: the new keys and values into the cache, spans of positions, and what they make together.
#include <algorithm>
#include <cmath>

#include "decoder_work.hpp"

namespace halfbyte {

// With several heads for a thread, whoever computed a head of q, k or v also places it.
bool Decoder::places_while_multiplying(const Team& team) const {
    return config_.qk_norm != static_cast<int>(QkNorm::whole) && config_.heads + 2 * config_.kv_heads >= 3 * team.size();
}

void Decoder::place_keys(Team& team, Work& work, int index) const {
    const DecoderConfig& c = config_;
    const DecoderLayer& layer = layers_[index];
    const int q_rows = c.heads * c.head_dim, kv_rows = c.kv_heads * c.head_dim, heads = c.heads + 2 * c.kv_heads;
    if (c.qk_norm == static_cast<int>(QkNorm::whole))
        team.phase(work.rows, team.piece(work.rows), [&](int begin, int end) {
            for (int row = begin; row < end; ++row) {
                float* q = work.qkv + row * work.qkv_stride;
                tier_.math.rms_norm(q, layer.q_norm.data(), q_rows, c.epsilon, q);
                tier_.math.rms_norm(q + q_rows, layer.k_norm.data(), kv_rows, c.epsilon, q + q_rows);
            }
        });
    const int units = work.rows * heads;
    team.phase(units, team.piece(units), [&](int begin, int end) {
        for (int unit = begin; unit < end; ++unit) place_head(work, index, unit / heads, unit % heads);
    });
}

// One head of a row, counted through q, k and v: q and k are turned, q scaled, k and v stored.
void Decoder::place_head(Work& work, int index, int row, int number) const {
    const DecoderConfig& c = config_;
    const DecoderLayer& layer = layers_[index];
    const int position = work.position(row), sequence = work.sequence(row);
    float* head = work.qkv + row * work.qkv_stride + static_cast<std::size_t>(number) * c.head_dim;
    if (number >= c.heads + c.kv_heads) return store_value(work.cache, index, sequence, number - c.heads - c.kv_heads, position, head);
    const bool is_query = number < c.heads;
    if (c.qk_norm == static_cast<int>(QkNorm::heads))
        tier_.math.rms_norm(head, (is_query ? layer.q_norm : layer.k_norm).data(), c.head_dim, c.epsilon, head);
    const Rotation& rotation = rotations_[layer.rotation];
    const std::size_t at = static_cast<std::size_t>(position) * c.rotary_pairs;
    tier_.math.rotate(head, rotation.cosines.data() + at, rotation.sines.data() + at, c.rotary_pairs);
    if (is_query)
        for (int d = 0; d < c.head_dim; ++d) head[d] *= c.attention_scale;
    else
        store_key(work.cache, index, sequence, number - c.heads, position, head);
}

void Decoder::store_key(KvCache& cache, int index, int sequence, int kv_head, int position, const float* key) const {
    const int slot = position % cache.slots(index), lane = slot % KEY_BLOCK, head_dim = config_.head_dim;
    const std::size_t block = static_cast<std::size_t>(slot - lane) * head_dim;
    const KvHead to = cache.head(index, sequence, kv_head);
    if (cache.type() == CacheType::int8)
        to.key_scales[slot] = tier_.math.store_key_int8(key, head_dim, reinterpret_cast<std::int8_t*>(to.keys) + block, lane);
    else
        tier_.math.store_key(key, head_dim, reinterpret_cast<std::uint16_t*>(to.keys) + block, lane);
}

void Decoder::store_value(KvCache& cache, int index, int sequence, int kv_head, int position, const float* value) const {
    const int slot = position % cache.slots(index), head_dim = config_.head_dim;
    const std::size_t row = static_cast<std::size_t>(slot) * head_dim;
    const KvHead to = cache.head(index, sequence, kv_head);
    if (cache.type() == CacheType::int8)
        to.value_scales[slot] = tier_.math.store_value_int8(value, head_dim, reinterpret_cast<std::int8_t*>(to.values) + row);
    else
        tier_.math.store_value(value, head_dim, reinterpret_cast<std::uint16_t*>(to.values) + row);
}

namespace {

int first_position(int position, int window) { return window > 0 ? std::max(0, position + 1 - window) : 0; }

}  // namespace

void Decoder::attend(Team& team, Work& work, int index) const {
    const DecoderConfig& c = config_;
    const int window = layers_[index].window, group = c.heads / c.kv_heads;
    const int pieces = (group + QUERIES - 1) / QUERIES;
    const int per_row = c.kv_heads * pieces * work.most_spans, units = work.rows * per_row;
    const int spans_of_row = c.heads * work.most_spans;
    // Units of neighbouring rows read the same keys; most of them are in one claim. Those of one row share nothing.
    const int claim = work.rows == 1 ? 1 : std::max(1, std::min(team.piece(units), 64));
    team.phase(units, claim, [&](int begin, int end) {
        for (int unit = begin; unit < end; ++unit) {
            const int row = unit / per_row, rest = unit % per_row;
            const int span = rest % work.most_spans, piece = rest / work.most_spans % pieces;
            const int kv_head = rest / work.most_spans / pieces;
            const int position = work.position(row);
            const int from = std::max(first_position(position, window), span * SPAN);
            const int to = std::min(position + 1, (span + 1) * SPAN);
            if (from >= to) continue;
            const int head = kv_head * group + piece * QUERIES, count = std::min(QUERIES, group - piece * QUERIES);
            const KvHead at = work.cache.head(index, work.sequence(row), kv_head);
            const std::size_t slot = static_cast<std::size_t>(span) * SPAN % work.cache.slots(index);
            const std::size_t bytes = slot * c.head_dim * work.cache.number_bytes();
            tier_.attend({work.qkv + row * work.qkv_stride + static_cast<std::size_t>(head) * c.head_dim,
                          static_cast<std::size_t>(c.head_dim), count, c.head_dim, work.cache.type(), at.keys + bytes,
                          at.values + bytes, at.key_scales + slot, at.value_scales + slot, from - span * SPAN,
                          to - span * SPAN, c.attention_softcap,
                          work.results + (static_cast<std::size_t>(row) * spans_of_row + head * work.most_spans + span) *
                                             work.result_stride,
                          work.most_spans * work.result_stride});
        }
    });
}

// Softmax over all spans of one head: Σ exp(m_span - m) · (sum, values).
void Decoder::gather_head(const Work& work, int index, int row, int head, float* out) const {
    const int head_dim = config_.head_dim, position = work.position(row);
    const int begin = first_position(position, layers_[index].window) / SPAN, end = position / SPAN + 1;
    const float* results =
        work.results + static_cast<std::size_t>(row * config_.heads + head) * work.most_spans * work.result_stride;
    const auto at = [&](int span) { return results + span * work.result_stride; };
    float most = at(begin)[0];
    for (int span = begin + 1; span < end; ++span) most = std::max(most, at(span)[0]);
    float sum = 0.0f;
    for (int span = begin; span < end; ++span) sum += std::exp(at(span)[0] - most) * at(span)[1];
    for (int span = begin; span < end; ++span) {
        const float factor = std::exp(at(span)[0] - most) / sum;
        const float* values = at(span) + SPAN_HEADER;
        for (int d = 0; d < head_dim; ++d) out[d] = (span == begin ? 0.0f : out[d]) + factor * values[d];
    }
}

}  // namespace halfbyte

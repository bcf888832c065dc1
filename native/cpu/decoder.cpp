#include "decoder.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "decoder_work.hpp"
#include "dtypes.hpp"
#include "parallel.hpp"
#include "thread_pool.hpp"

namespace halfbyte {

namespace {

// With at most this many rows every thread prepares all of them for itself.
constexpr int REDUNDANT_ROWS = 2;

void require(bool holds, const std::string& otherwise) {
    if (!holds) throw std::invalid_argument(otherwise);
}

int total_rows(const std::vector<std::shared_ptr<const Linear>>& parts) {
    int rows = 0;
    for (const auto& part : parts) rows += part->rows();
    return rows;
}

}  // namespace

Decoder::Projection::Projection(const std::vector<std::shared_ptr<const Linear>>& linears) {
    require(!linears.empty() && linears.size() <= PARTS, "a projection has one to three parts");
    for (const auto& linear : linears) {
        require(linear != nullptr, "a projection lacks a part");
        source[count] = 0;
        while (linears[source[count]]->form() != linear->form()) ++source[count];
        parts[count++] = linear.get();
        blocks += linear->blocks();
    }
}

std::size_t Decoder::Projection::prepared_bytes() const {
    std::size_t bytes = 0;
    for (int i = 0; i < count; ++i) bytes += parts[i]->prepared_bytes();
    return bytes;
}

Decoder::Decoder(const Tier& tier, const DecoderConfig& config, std::vector<DecoderLayer> layers,
                 std::vector<float> final_norm, std::shared_ptr<const Linear> head, const void* embedding,
                 DType embedding_dtype)
    : tier_(tier),
      config_(config),
      layers_(std::move(layers)),
      final_norm_(std::move(final_norm)),
      head_(std::move(head)),
      embedding_(embedding),
      embedding_dtype_(embedding_dtype),
      rotations_(config.rotations) {
    const DecoderConfig& c = config_;
    require(c.hidden > 0 && c.heads > 0 && c.kv_heads > 0 && c.intermediate > 0 && c.vocabulary > 0, "config: sizes must be positive");
    require(c.heads % c.kv_heads == 0, "config: heads must be a multiple of kv_heads");
    require(c.head_dim > 0 && c.head_dim % 16 == 0, "config: head_dim must be a multiple of 16");
    require(c.rotary_pairs >= 0 && 2 * c.rotary_pairs <= c.head_dim, "config: rotary_pairs is more than half of head_dim");
    require(static_cast<int>(final_norm_.size()) == c.hidden, "final_norm: must be [hidden]");
    require(head_ && head_->rows() == c.vocabulary && head_->cols() == c.hidden, "head: must be [vocabulary, hidden]");
    for (const DecoderLayer& layer : layers_) {
        const int q_rows = c.heads * c.head_dim, kv_rows = c.kv_heads * c.head_dim;
        require(total_rows(layer.qkv) == q_rows + 2 * kv_rows, "qkv: must have (heads + 2 kv_heads) · head_dim rows");
        require(total_rows(layer.gate_up) == 2 * c.intermediate, "gate_up: must have 2 · intermediate rows");
        for (const auto& part : layer.qkv) require(part->cols() == c.hidden, "qkv: must have hidden columns");
        for (const auto& part : layer.gate_up) require(part->cols() == c.hidden, "gate_up: must have hidden columns");
        require(layer.output && layer.output->rows() == c.hidden && layer.output->cols() == q_rows,
                "output: must be [hidden, heads · head_dim]");
        require(layer.down && layer.down->rows() == c.hidden && layer.down->cols() == c.intermediate,
                "down: must be [hidden, intermediate]");
        const auto sized = [&](const std::vector<float>& norm) { return norm.empty() || static_cast<int>(norm.size()) == c.hidden; };
        require(sized(layer.attention_norm) && sized(layer.attention_post_norm) && sized(layer.mlp_norm) &&
                    sized(layer.mlp_post_norm),
                "norms: must be [hidden]");
        const bool whole = c.qk_norm == static_cast<int>(QkNorm::whole);
        if (c.qk_norm != 0)
            require(static_cast<int>(layer.q_norm.size()) == (whole ? q_rows : c.head_dim) &&
                        static_cast<int>(layer.k_norm.size()) == (whole ? kv_rows : c.head_dim),
                    "q_norm, k_norm: must be [head_dim], or as wide as q and k");
        require(layer.rotation >= 0 && layer.rotation < c.rotations, "rotation: no such table");
        projections_.push_back({Projection(layer.qkv), Projection({layer.output}), Projection(layer.gate_up),
                                Projection({layer.down})});
        for (const Projection* p : {&projections_.back().qkv, &projections_.back().output, &projections_.back().gate_up,
                                    &projections_.back().down})
            prepared_bytes_ = std::max(prepared_bytes_, p->prepared_bytes());
    }
    prepared_bytes_ = std::max(prepared_bytes_, head_->prepared_bytes());
}

Decoder Decoder::with_layers(const std::vector<int>& numbers) const {
    std::vector<DecoderLayer> kept;
    for (const int number : numbers) {
        require(number >= 0 && number < layers(), "layers: no such layer");
        kept.push_back(layers_[number]);
    }
    Decoder other(tier_, config_, std::move(kept), final_norm_, head_, embedding_, embedding_dtype_);
    other.rotations_ = rotations_;
    return other;
}

void Decoder::set_rotation(int rotation, const float* cosines, const float* sines, int positions) {
    const std::size_t count = static_cast<std::size_t>(positions) * config_.rotary_pairs;
    rotations_[rotation].cosines.assign(cosines, cosines + count);
    rotations_[rotation].sines.assign(sines, sines + count);
}

int Decoder::rotation_positions() const {
    if (config_.rotary_pairs == 0) return std::numeric_limits<int>::max();
    std::size_t least = std::numeric_limits<int>::max();
    for (const Rotation& rotation : rotations_) least = std::min(least, rotation.cosines.size() / config_.rotary_pairs);
    return static_cast<int>(least);
}

std::size_t Decoder::nbytes() const {
    std::size_t total = head_->nbytes();
    for (const DecoderLayer& layer : layers_) {
        total += layer.output->nbytes() + layer.down->nbytes();
        for (const auto& part : layer.qkv) total += part->nbytes();
        for (const auto& part : layer.gate_up) total += part->nbytes();
    }
    return total;
}

bool Decoder::takes(const KvCache& cache) const {
    if (cache.layers() != layers() || cache.kv_heads() != config_.kv_heads || cache.head_dim() != config_.head_dim) return false;
    for (int index = 0; index < layers(); ++index)
        if (!cache.holds(index, layers_[index].window)) return false;
    return true;
}

void Decoder::step(KvCache& cache, const DecoderStep& step) {
    for (int first = 0; first < step.rows; first += CHUNK_ROWS)
        chunk(cache, step, first, std::min(CHUNK_ROWS, step.rows - first));
}

void Decoder::chunk(KvCache& cache, const DecoderStep& step, int first, int rows) {
    const DecoderConfig& c = config_;
    Work work{cache, step, first, rows, {}, nullptr, 0, 0, 0, {}, nullptr, nullptr, nullptr, nullptr, nullptr, {}, {}, {}};
    int earlier = 0;
    for (int i = 0; i < step.wanted_rows; ++i) {
        if (step.wanted[i] < first) ++earlier;
        if (step.wanted[i] >= first && step.wanted[i] < first + rows) work.wanted.push_back(step.wanted[i] - first);
    }
    work.logits = step.logits + static_cast<std::size_t>(earlier) * c.vocabulary;
    for (int row = 0; row < rows; ++row) work.most_spans = std::max(work.most_spans, work.position(row) / SPAN + 1);
    const int q_rows = c.heads * c.head_dim;
    work.qkv_stride = round_up(q_rows + 2 * c.kv_heads * c.head_dim, 16);
    work.wide_stride = round_up(2 * c.intermediate, 16);
    work.result_stride = round_up(SPAN_HEADER + c.head_dim, 16);
    const std::size_t hidden = round_up(c.hidden, 16);
    const std::size_t results = static_cast<std::size_t>(work.most_spans) * c.heads * work.result_stride;
    const std::size_t sizes[] = {hidden, work.qkv_stride, hidden, work.wide_stride, results};
    float** const places[] = {&work.x, &work.qkv, &work.y, &work.wide, &work.results};
    std::size_t total = LINE;
    for (const std::size_t size : sizes) total += size * rows;
    static thread_local std::vector<float> memory;  // grows and stays
    if (memory.size() < total) memory.resize(total);
    auto* at = reinterpret_cast<float*>(round_up(reinterpret_cast<std::uintptr_t>(memory.data()), LINE));
    for (int i = 0; i < 5; ++i) {
        *places[i] = at;
        at += sizes[i] * rows;
    }
    auto& pool = ThreadPool::instance();
    const int threads = pool.threads();
    work.prepared.resize(threads);
    work.scratch.resize(threads);
    for (int id = 0; id < threads; ++id) {
        work.prepared[id].resize(REDUNDANT_ROWS * prepared_bytes_ + LINE);
        work.scratch[id].resize(2 * std::max({c.hidden, q_rows, c.intermediate}) + LINE);
    }
    work.shared.resize(rows > REDUNDANT_ROWS ? rows * prepared_bytes_ + LINE : 0);
    pool.run_team([&](Team& team, int id) { run(team, id, work); });
}

void Decoder::run(Team& team, int id, Work& work) const {
    const DecoderConfig& c = config_;
    if (id == 0 && work.step.profile) work.step.profile->begin();
    team.phase(work.rows, team.piece(work.rows), [&](int begin, int end) {
        for (int row = begin; row < end; ++row) {
            float* x = work.x + static_cast<std::size_t>(row) * c.hidden;
            const void* source =
                element(embedding_, embedding_dtype_, static_cast<std::size_t>(work.step.ids[work.first + row]) * c.hidden);
            const auto* halves = static_cast<const std::uint16_t*>(source);
            for (int i = 0; i < c.hidden; ++i) {
                const float value = embedding_dtype_ == DType::f32    ? static_cast<const float*>(source)[i]
                                    : embedding_dtype_ == DType::bf16 ? from_bf16(halves[i])
                                                                      : from_f16(halves[i]);
                x[i] = value * c.embedding_scale;
            }
        }
    });
    work.lap(id, StepProfile::embedding);
    for (int index = 0; index < layers(); ++index) run_layer(team, id, work, index);
    run_head(team, id, work);
}

// Prepared rows for every part of a projection. `produce(row, scratch)` returns the row to prepare, in scratch or elsewhere.
template <class Produce>
Decoder::Prepared Decoder::prepare(Team& team, int id, Work& work, const Projection& projection, int rows,
                                   const Produce& produce) const {
    const bool redundant = rows <= REDUNDANT_ROWS;
    auto& memory = redundant ? work.prepared[id] : work.shared;
    auto* base = reinterpret_cast<std::uint8_t*>(round_up(reinterpret_cast<std::uintptr_t>(memory.data()), LINE));
    std::uint8_t* places[PARTS];
    Prepared result{};
    for (int i = 0; i < projection.count; ++i) {
        places[i] = base;
        base += projection.parts[i]->prepared_bytes() * rows;
        result.rows[i] = places[projection.source[i]];
    }
    float* scratch = work.scratch[id].data();
    const auto prepare_rows = [&](int begin, int end) {
        for (int row = begin; row < end; ++row) {
            const float* x = produce(row, scratch);
            for (int i = 0; i < projection.count; ++i)
                if (projection.source[i] == i)
                    projection.parts[i]->prepare(x, places[i] + projection.parts[i]->prepared_bytes() * row);
        }
    };
    if (redundant)
        prepare_rows(0, rows);
    else
        team.phase(rows, team.piece(rows), prepare_rows);
    return result;
}

// y[rows][...] = every part's product; then after(first column, last column) by the thread that computed them: a multiple of
// `together` blocks.
template <class After>
void Decoder::multiply(Team& team, const Projection& projection, const Prepared& prepared, int rows, float* y,
                       std::size_t stride, const After& after, int together) const {
    team.phase(projection.blocks, team.piece(projection.blocks, together), [&](int begin, int end) {
        int column = 0, start = 0;
        for (int i = 0; i < projection.count; ++i) {
            const Linear& part = *projection.parts[i];
            const int from = std::max(begin - start, 0), to = std::min(end - start, part.blocks());
            if (from < to) {
                part.multiply(prepared.rows[i], rows, y + column, stride, from, to);
                after(column + from * BLOCK_ROWS, column + std::min(to * BLOCK_ROWS, part.rows()));
            }
            column += part.rows();
            start += part.blocks();
        }
    });
}

// x += residual_scale · norm(y), where a norm follows a branch.
void Decoder::add_normed(Team& team, Work& work, const std::vector<float>& norm) const {
    const int hidden = config_.hidden;
    team.phase(work.rows, team.piece(work.rows), [&](int begin, int end) {
        for (int row = begin; row < end; ++row) {
            float *x = work.x + static_cast<std::size_t>(row) * hidden, *y = work.y + static_cast<std::size_t>(row) * hidden;
            tier_.math.rms_norm(y, norm.data(), hidden, config_.epsilon, y);
            for (int i = 0; i < hidden; ++i) x[i] += config_.residual_scale * y[i];
        }
    });
}

void Decoder::run_layer(Team& team, int id, Work& work, int index) const {
    const DecoderConfig& c = config_;
    const DecoderLayer& layer = layers_[index];
    const auto normed = [&](const std::vector<float>& norm) {
        return [this, &work, &norm, &c](int row, float* scratch) -> const float* {
            const float* x = work.x + static_cast<std::size_t>(row) * c.hidden;
            if (norm.empty()) return x;
            tier_.math.rms_norm(x, norm.data(), c.hidden, c.epsilon, scratch);
            return scratch;
        };
    };
    const auto nothing = [](int, int) {};
    // The branch's result goes to the residual stream, at once unless a norm comes between.
    const auto finish = [&](const Projection& projection, const Prepared& prepared, const std::vector<float>& post_norm) {
        multiply(team, projection, prepared, work.rows, work.y, c.hidden, [&](int first, int last) {
            if (!post_norm.empty()) return;
            for (int row = 0; row < work.rows; ++row) {
                const std::size_t at = static_cast<std::size_t>(row) * c.hidden;
                for (int i = first; i < last; ++i) work.x[at + i] += c.residual_scale * work.y[at + i];
            }
        });
        if (!post_norm.empty()) add_normed(team, work, post_norm);
    };

    const Projections& p = projections_[index];
    const auto normed_rows = prepare(team, id, work, p.qkv, work.rows, normed(layer.attention_norm));
    work.lap(id, StepProfile::qkv_input);
    multiply_qkv(team, id, work, normed_rows, index);
    attend(team, work, index);
    work.lap(id, StepProfile::attention);
    const auto attended = prepare(team, id, work, p.output, work.rows, [&](int row, float* scratch) {
        for (int head = 0; head < c.heads; ++head)
            gather_head(work, index, row, head, scratch + static_cast<std::size_t>(head) * c.head_dim);
        return static_cast<const float*>(scratch);
    });
    work.lap(id, StepProfile::output_input);
    finish(p.output, attended, layer.attention_post_norm);
    work.lap(id, StepProfile::output);

    const auto mlp_rows = prepare(team, id, work, p.gate_up, work.rows, normed(layer.mlp_norm));
    work.lap(id, StepProfile::gate_up_input);
    multiply(team, p.gate_up, mlp_rows, work.rows, work.wide, work.wide_stride, nothing);
    work.lap(id, StepProfile::gate_up);
    const auto gated = prepare(team, id, work, p.down, work.rows, [&](int row, float* scratch) {
        const float* wide = work.wide + row * work.wide_stride;
        tier_.math.gated(wide, wide + c.intermediate, c.intermediate, static_cast<Activation>(c.activation), scratch);
        return static_cast<const float*>(scratch);
    });
    work.lap(id, StepProfile::down_input);
    finish(p.down, gated, layer.mlp_post_norm);
    work.lap(id, StepProfile::down);
}

// q, k and v; queries are turned and scaled, keys and values in the cache.
void Decoder::multiply_qkv(Team& team, int id, Work& work, const Prepared& prepared, int index) const {
    const Projection& projection = projections_[index].qkv;
    const int head_dim = config_.head_dim;
    const bool at_once = places_while_multiplying(team);
    multiply(team, projection, prepared, work.rows, work.qkv, work.qkv_stride, [&](int first, int last) {
        for (int row = 0; at_once && row < work.rows; ++row)
            for (int head = first / head_dim; head < last / head_dim; ++head) place_head(work, index, row, head);
    }, at_once ? head_dim / BLOCK_ROWS : 2);
    work.lap(id, StepProfile::qkv);
    if (at_once) return;
    place_keys(team, work, index);
    work.lap(id, StepProfile::keys);
}

void Decoder::run_head(Team& team, int id, Work& work) const {
    const DecoderConfig& c = config_;
    const int rows = static_cast<int>(work.wanted.size());
    if (rows == 0) return;
    const Projection projection({head_});
    const auto prepared = prepare(team, id, work, projection, rows, [&](int row, float* scratch) {
        tier_.math.rms_norm(work.x + static_cast<std::size_t>(work.wanted[row]) * c.hidden, final_norm_.data(), c.hidden,
                            c.epsilon, scratch);
        return static_cast<const float*>(scratch);
    });
    work.lap(id, StepProfile::head_input);
    multiply(team, projection, prepared, rows, work.logits, c.vocabulary, [&](int first, int last) {
        for (int row = 0; row < rows; ++row) {
            float* logits = work.logits + static_cast<std::size_t>(row) * c.vocabulary + first;
            if (c.logits_scale != 1.0f)
                for (int i = 0; i < last - first; ++i) logits[i] *= c.logits_scale;
            if (c.logits_softcap != 0.0f) tier_.math.softcap(logits, last - first, c.logits_softcap);
        }
    });
    work.lap(id, StepProfile::head);
}

}  // namespace halfbyte

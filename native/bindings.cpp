// The only file that knows Python. Everything is checked here; nothing below this line checks anything twice.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/parallel.hpp"
#include "cpu/decoder.hpp"
#include "cpu/half_multiply.hpp"
#include "cpu/isa.hpp"
#include "cpu/measure.hpp"
#include "cpu/rejection.hpp"
#include "cpu/thread_pool.hpp"
#include "cpu/w4_matrix.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace halfbyte;

namespace {

using Codes = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Halves2 = nb::ndarray<const std::uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Numbers = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats1 = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MutableFloats2 = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

const Tier& tier_named(const std::string& name) {
    for (const Tier* tier : available_tiers())
        if (name == tier->name) return *tier;
    throw nb::value_error(("no such tier on this CPU: " + name).c_str());
}

void require(bool holds, const char* otherwise) {
    if (!holds) throw nb::value_error(otherwise);
}

// Whether every number is in [0, limit), and each above the one before if they must ascend.
bool in_range(const Numbers& numbers, std::size_t limit, bool ascending) {
    for (std::size_t i = 0; i < numbers.shape(0); ++i) {
        const std::int32_t value = numbers.data()[i];
        if (value < 0 || static_cast<std::size_t>(value) >= limit) return false;
        if (ascending && i > 0 && value <= numbers.data()[i - 1]) return false;
    }
    return true;
}

W4Matrix* make_matrix(Codes codes, Floats2 scales, Floats2 offsets, std::optional<Floats1> bias, std::size_t group_size,
                      const std::string& tier, int bits, std::optional<Numbers> group_index,
                      std::optional<Floats1> input_scale, std::optional<Numbers> kept_columns,
                      std::optional<Halves2> kept_weight, int kept_dtype) {
    const std::size_t rows = codes.shape(0), cols = codes.shape(1), groups = scales.shape(1);
    constexpr std::size_t LIMIT = std::numeric_limits<int>::max() / 64;
    require(rows >= 1 && cols >= 1 && rows <= LIMIT && cols <= LIMIT, "codes: rows or columns out of range");
    require(bits == 4 || bits == 8, "bits: must be 4 or 8");
    require(group_size >= 1 && group_size <= LIMIT, "group_size: must be a positive number");
    require(groups == (cols + group_size - 1) / group_size, "scales: must be [rows, ceil(columns / group_size)]");
    require(scales.shape(0) == rows, "scales: must be [rows, ceil(columns / group_size)]");
    require(offsets.shape(0) == rows && offsets.shape(1) == groups, "offsets: must have the shape of scales");
    require(!bias || bias->shape(0) == rows, "bias: must be [rows]");
    require(!group_index || (group_index->shape(0) == cols && in_range(*group_index, groups, false)),
            "group_index: must be [columns], each below the number of groups");
    require(!input_scale || input_scale->shape(0) == cols, "input_scale: must be [columns]");
    require(kept_columns.has_value() == kept_weight.has_value(), "kept_columns and kept_weight: must come together");
    require(!kept_columns || in_range(*kept_columns, cols, true), "kept_columns: must be ascending columns");
    require(!kept_weight || (kept_weight->shape(0) == rows && kept_weight->shape(1) == kept_columns->shape(0)),
            "kept_weight: must be [rows, kept columns]");
    require(kept_dtype == 1 || kept_dtype == 2, "kept_dtype: must be 1 (bf16) or 2 (fp16)");
    const std::size_t count = rows * cols;
    require(bits == 8 || std::all_of(codes.data(), codes.data() + count, [](std::uint8_t code) { return code < 16; }),
            "codes: must be below 16");
    const W4Parts parts{codes.data(),
                        scales.data(),
                        offsets.data(),
                        bias ? bias->data() : nullptr,
                        static_cast<int>(rows),
                        static_cast<int>(cols),
                        static_cast<int>(groups),
                        static_cast<int>(group_size),
                        bits,
                        group_index ? group_index->data() : nullptr,
                        input_scale ? input_scale->data() : nullptr,
                        kept_columns ? static_cast<int>(kept_columns->shape(0)) : 0,
                        kept_columns ? kept_columns->data() : nullptr,
                        kept_weight ? kept_weight->data() : nullptr,
                        static_cast<DType>(kept_dtype)};
    const Tier& picked = tier_named(tier);
    nb::gil_scoped_release release;
    return new W4Matrix(picked, parts);
}

// Addresses rather than arrays: the exchange of two array objects costs more than a small matrix product. The one caller,
// kernels/w4a16.py, has just checked shape, dtype, device and strides.
void multiply(const W4Matrix& matrix, std::uintptr_t x, std::size_t x_stride, std::uintptr_t y, int m, int dtype) {
    if (m < 1 || dtype < 0 || dtype > 2 || x == 0 || y == 0) throw nb::value_error("multiply: bad arguments");
    nb::gil_scoped_release release;
    matrix.multiply(reinterpret_cast<const void*>(x), x_stride, reinterpret_cast<void*>(y), m, static_cast<DType>(dtype));
}

// Likewise addresses, of tensors that kernels/half_linear.py has just checked.
void half_product(std::uintptr_t weight, int dtype, int rows, int cols, std::uintptr_t bias, std::uintptr_t x,
                  std::uintptr_t y, int m, const std::string& tier) {
    if (rows < 1 || cols < 1 || m < 1 || (dtype != 1 && dtype != 2) || !weight || !x || !y)
        throw nb::value_error("half_multiply: bad arguments");
    const Tier& picked = tier_named(tier);
    nb::gil_scoped_release release;
    half_multiply(picked, reinterpret_cast<const void*>(weight), static_cast<DType>(dtype), rows, cols,
                  reinterpret_cast<const float*>(bias), reinterpret_cast<const float*>(x), reinterpret_cast<float*>(y), m);
}

// Addresses of tensors that kernels/rounding.py has just checked.
void round_block(std::uintptr_t work, std::uintptr_t couplings, std::uintptr_t pivots, std::uintptr_t scales,
                 std::uintptr_t zeros, std::uintptr_t codes, std::uintptr_t moved, std::size_t rows, std::size_t stride,
                 int columns, int max_code, bool revisit, const std::string& tier) {
    if (columns < 1 || columns > RoundingBlock::MAX_COLUMNS || rows > stride || max_code < 1 || max_code > 255)
        throw nb::value_error("round_block: bad arguments");
    const auto in = [](std::uintptr_t address) { return reinterpret_cast<const float*>(address); };
    const auto out = [](std::uintptr_t address) { return reinterpret_cast<float*>(address); };
    const Tier& picked = tier_named(tier);
    nb::gil_scoped_release release;
    picked.round_block({in(work), in(couplings), in(pivots), in(scales), in(zeros), out(codes), out(moved), rows, stride,
                        columns, static_cast<float>(max_code), revisit});
}

// Addresses of tensors that kernels/ranges.py has just checked.
void try_range(std::uintptr_t weights, std::uintptr_t grams, std::uintptr_t projections, std::uintptr_t scales,
               std::uintptr_t zeros, std::uintptr_t quadratic, std::uintptr_t linear, int groups, std::size_t rows,
               int size, int max_code, const std::string& tier) {
    if (size < 1 || size > RangeTrial::MAX_SIZE || max_code < 1 || max_code > 255 || !projections != !linear)
        throw nb::value_error("try_range: bad arguments");
    const auto in = [](std::uintptr_t address) { return reinterpret_cast<const float*>(address); };
    const auto out = [](std::uintptr_t address) { return reinterpret_cast<float*>(address); };
    const Tier& picked = tier_named(tier);
    nb::gil_scoped_release release;
    const RangeTrial trial{in(weights), in(grams), in(projections), in(scales), in(zeros), out(quadratic), out(linear),
                           rows, size, static_cast<float>(max_code)};
    const std::size_t work = static_cast<std::size_t>(groups) * size * size / 2 * rows;
    parallel(groups, work, [&](int begin, int end) { picked.try_range(trial, begin, end); });
}

// Addresses of tensors that sampling/rejection_native.py has just checked. Returns the number of rows that are faulty.
int rejection_sample(std::uintptr_t draft_ids, std::uintptr_t draft, std::uintptr_t target, std::uintptr_t lengths,
                     std::uintptr_t uniforms, std::uintptr_t settings, std::size_t settings_stride, bool logits, int batch,
                     int drafts, std::size_t vocabulary, std::uintptr_t ids, std::uintptr_t counts, const std::string& tier) {
    if (batch < 0 || drafts < 0 || vocabulary < 1 || vocabulary > (std::size_t{1} << 22) || !target || !uniforms)
        throw nb::value_error("rejection_sample: bad arguments");
    const auto floats = [](std::uintptr_t address) { return reinterpret_cast<const float*>(address); };
    const Tier& picked = tier_named(tier);
    nb::gil_scoped_release release;
    return reject(picked, {reinterpret_cast<const std::int64_t*>(draft_ids), floats(draft), floats(target),
                           reinterpret_cast<const std::int64_t*>(lengths), floats(uniforms),
                           reinterpret_cast<const double*>(settings), settings_stride, logits, batch, drafts, vocabulary,
                           reinterpret_cast<std::int64_t*>(ids), reinterpret_cast<std::int64_t*>(counts)});
}

// Likewise. Returns the token, or minus the fault.
std::int64_t draw_logits(std::uintptr_t logits, std::size_t vocabulary, std::uintptr_t settings, float uniform,
                         std::uintptr_t probabilities, const std::string& tier) {
    if (!logits || !probabilities || vocabulary < 1 || vocabulary > (std::size_t{1} << 22) || !(uniform >= 0.0f && uniform < 1.0f))
        throw nb::value_error("draw_logits: bad arguments");
    const Tier& picked = tier_named(tier);
    nb::gil_scoped_release release;
    std::int64_t id = -1;
    const RejectionFault fault =
        draw_row(picked, reinterpret_cast<const float*>(logits), vocabulary, reinterpret_cast<const double*>(settings),
                 uniform, reinterpret_cast<float*>(probabilities), id);
    return fault == RejectionFault::none ? id : -static_cast<std::int64_t>(fault);
}

// Addresses of tensors that runtime/fused_norm.py has just checked.
void norm_rows(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t y, std::size_t count, int channels, float epsilon,
               const std::string& tier) {
    if (channels < 1 || count % static_cast<std::size_t>(channels) != 0) throw nb::value_error("rms_norm: bad arguments");
    const Tier& picked = tier_named(tier);
    nb::gil_scoped_release release;
    for (std::size_t at = 0; at < count; at += static_cast<std::size_t>(channels))
        picked.math.rms_norm(reinterpret_cast<const float*>(x) + at, reinterpret_cast<const float*>(weight), channels,
                             epsilon, reinterpret_cast<float*>(y) + at);
}

std::shared_ptr<Linear> make_a8(Codes codes, Floats2 scales, Codes zeros, std::optional<Floats1> bias,
                                const std::string& tier, int bits) {
    const std::size_t rows = codes.shape(0), cols = codes.shape(1), groups = scales.shape(1);
    constexpr std::size_t LIMIT = std::numeric_limits<int>::max() / 64;
    require(rows >= 1 && cols >= 1 && rows <= LIMIT && cols <= LIMIT, "codes: rows or columns out of range");
    require(scales.shape(0) == rows && zeros.shape(0) == rows && zeros.shape(1) == groups,
            "scales, zeros: must be [rows, groups]");
    require(!bias || bias->shape(0) == rows, "bias: must be [rows]");
    const Tier& picked = tier_named(tier);
    nb::gil_scoped_release release;
    return std::make_shared<A8Linear>(picked, codes.data(), scales.data(), zeros.data(), bias ? bias->data() : nullptr,
                                      static_cast<int>(rows), static_cast<int>(cols), static_cast<int>(groups), bits);
}

// The weight is an address: torch has dtypes that array interfaces lack. In place its owner is the caller, runtime/decoder.py.
std::shared_ptr<Linear> make_half(std::uintptr_t weight, int dtype, int rows, int cols, std::optional<Floats1> bias,
                                  const std::string& tier, bool in_place) {
    require(weight != 0 && rows >= 1 && cols >= 1 && (dtype == 1 || dtype == 2), "half_linear: bad arguments");
    require(!bias || bias->shape(0) == static_cast<std::size_t>(rows), "bias: must be [rows]");
    return std::make_shared<HalfLinear>(tier_named(tier), reinterpret_cast<const void*>(weight), static_cast<DType>(dtype),
                                        bias ? bias->data() : nullptr, rows, cols, in_place);
}

void every_product(const std::vector<std::shared_ptr<Linear>>& linears, Floats2 x, MutableFloats2 y) {
    require(!linears.empty() && x.shape(0) >= 1 && x.shape(0) < (std::size_t{1} << 16), "linears, x: must be at least one");
    require(y.shape(0) == x.shape(0), "y: must be [rows of x, outputs]");
    for (const auto& linear : linears)
        require(x.shape(1) == static_cast<std::size_t>(linear->cols()) && y.shape(1) == static_cast<std::size_t>(linear->rows()),
                "linears: must all be [columns of y, columns of x]");
    nb::gil_scoped_release release;
    multiply_each({linears.begin(), linears.end()}, x.data(), static_cast<int>(x.shape(0)), y.data());
}

void set_rotation(Decoder& decoder, int rotation, Floats2 cosines, Floats2 sines) {
    const auto pairs = static_cast<std::size_t>(decoder.config().rotary_pairs);
    require(rotation >= 0 && rotation < decoder.config().rotations, "rotation: no such table");
    require(cosines.shape(1) == pairs && sines.shape(1) == pairs && sines.shape(0) == cosines.shape(0),
            "cosines, sines: must be [positions, rotary_pairs]");
    decoder.set_rotation(rotation, cosines.data(), sines.data(), static_cast<int>(cosines.shape(0)));
}

// Appends tokens[i] to sequence i, which has lengths[i] already. logits: 0 for none, 1 for those of each sequence's last token,
// 2 for those of every token. `out` is the address of float32 [out_rows][vocabulary]. Lists and addresses, not arrays: between two
// steps Python finds its code in no cache, and every array costs it a hundredth of a small model's step.
void step(Decoder& decoder, KvCache& cache, const std::vector<std::vector<std::int32_t>>& tokens,
          const std::vector<std::int32_t>& lengths, int logits, std::uintptr_t out, std::size_t out_rows, StepProfile* profile) {
    const DecoderConfig& c = decoder.config();
    require(decoder.takes(cache), "cache: made for another model");
    require(tokens.size() == static_cast<std::size_t>(cache.sequences()) && lengths.size() == tokens.size(),
            "tokens, lengths: must be one for each sequence");
    const int limit = std::min(cache.capacity(), decoder.rotation_positions());
    std::vector<std::int32_t> ids, sequences, positions, wanted;
    for (std::size_t sequence = 0; sequence < tokens.size(); ++sequence) {
        require(lengths[sequence] >= 0 && lengths[sequence] <= limit &&
                    tokens[sequence].size() <= static_cast<std::size_t>(limit - lengths[sequence]),
                "tokens: must fit into the cache");
        std::int32_t position = lengths[sequence];
        for (const std::int32_t id : tokens[sequence]) {
            require(id >= 0 && id < c.vocabulary, "tokens: must be below the vocabulary");
            if (logits == 2) wanted.push_back(static_cast<std::int32_t>(ids.size()));
            positions.push_back(position++);
            sequences.push_back(static_cast<std::int32_t>(sequence));
            ids.push_back(id);
        }
        if (logits == 1 && !tokens[sequence].empty()) wanted.push_back(static_cast<std::int32_t>(ids.size()) - 1);
    }
    require(!ids.empty() && ids.size() < (std::size_t{1} << 24), "tokens: must be at least one");
    require(wanted.size() == out_rows && (out_rows == 0 || out != 0), "out: must have a row for each token asked for");
    nb::gil_scoped_release release;
    decoder.step(cache, {ids.data(), sequences.data(), positions.data(), static_cast<int>(ids.size()), wanted.data(),
                         static_cast<int>(wanted.size()), reinterpret_cast<float*>(out), profile});
}

nb::dict profile_seconds(const StepProfile& profile) {
    nb::dict seconds;
    for (int part = 0; part < StepProfile::PARTS; ++part)
        seconds[StepProfile::NAMES[part]] = profile.seconds(static_cast<StepProfile::Part>(part));
    return seconds;
}

void bind_decoder(nb::module_& m) {
    nb::class_<Linear>(m, "Linear", "One matrix of a decoder.")
        .def_prop_ro("rows", &Linear::rows)
        .def_prop_ro("columns", &Linear::cols)
        .def_prop_ro("nbytes", &Linear::nbytes)
        .def_prop_ro("form", &Linear::form);
    m.def("a8_linear", &make_a8, "codes"_a, "scales"_a, "zeros"_a, "bias"_a.none(), "tier"_a, "bits"_a);
    m.def("a16_linear", [](std::shared_ptr<W4Matrix> matrix) -> std::shared_ptr<Linear> {
        return std::make_shared<A16Linear>(std::move(matrix));
    }, "matrix"_a);
    m.def("half_linear", &make_half, "weight"_a, "dtype"_a, "rows"_a, "cols"_a, "bias"_a.none(), "tier"_a,
          "in_place"_a);

    m.def("multiply_each", &every_product, "linears"_a, "x"_a, "y"_a);

    nb::class_<DecoderConfig>(m, "DecoderConfig", "An architecture as data.")
        .def(nb::init<>())
        .def_rw("hidden", &DecoderConfig::hidden)
        .def_rw("heads", &DecoderConfig::heads)
        .def_rw("kv_heads", &DecoderConfig::kv_heads)
        .def_rw("head_dim", &DecoderConfig::head_dim)
        .def_rw("intermediate", &DecoderConfig::intermediate)
        .def_rw("vocabulary", &DecoderConfig::vocabulary)
        .def_rw("rotary_pairs", &DecoderConfig::rotary_pairs)
        .def_rw("rotations", &DecoderConfig::rotations)
        .def_rw("epsilon", &DecoderConfig::epsilon)
        .def_rw("attention_scale", &DecoderConfig::attention_scale)
        .def_rw("attention_softcap", &DecoderConfig::attention_softcap)
        .def_rw("embedding_scale", &DecoderConfig::embedding_scale)
        .def_rw("residual_scale", &DecoderConfig::residual_scale)
        .def_rw("logits_scale", &DecoderConfig::logits_scale)
        .def_rw("logits_softcap", &DecoderConfig::logits_softcap)
        .def_rw("activation", &DecoderConfig::activation)
        .def_rw("qk_norm", &DecoderConfig::qk_norm);

    nb::class_<DecoderLayer>(m, "DecoderLayer", "One layer: its matrices and norms.")
        .def("__init__", [](DecoderLayer* self, std::vector<std::shared_ptr<Linear>> qkv, std::shared_ptr<Linear> output,
                            std::vector<std::shared_ptr<Linear>> gate_up, std::shared_ptr<Linear> down,
                            std::vector<std::vector<float>> norms, int window, int rotation) {
            require(norms.size() == 6, "norms: must be six");
            new (self) DecoderLayer{{qkv.begin(), qkv.end()}, std::move(output), {gate_up.begin(), gate_up.end()},
                                    std::move(down), std::move(norms[0]), std::move(norms[1]), std::move(norms[2]),
                                    std::move(norms[3]), std::move(norms[4]), std::move(norms[5]), window, rotation};
        }, "qkv"_a, "output"_a, "gate_up"_a, "down"_a, "norms"_a, "window"_a, "rotation"_a);

    nb::class_<KvCache>(m, "KvCache", "Keys and values of some sequences.")
        .def("__init__", [](KvCache* self, const std::vector<int>& windows, int sequences, int kv_heads, int head_dim,
                            int capacity, bool int8) {
            new (self) KvCache(windows, sequences, kv_heads, head_dim, capacity, int8 ? CacheType::int8 : CacheType::fp16);
        }, "windows"_a, "sequences"_a, "kv_heads"_a, "head_dim"_a, "capacity"_a, "int8"_a)
        .def_prop_ro("sequences", &KvCache::sequences)
        .def_prop_ro("capacity", &KvCache::capacity)
        .def_prop_ro("rollback", &KvCache::rollback)
        .def_prop_ro("nbytes", &KvCache::nbytes);

    nb::class_<StepProfile>(m, "StepProfile", "Where the time of steps goes.")
        .def(nb::init<>())
        .def_prop_ro("seconds", &profile_seconds);

    nb::class_<Decoder>(m, "Decoder", "A decoder-only transformer: one call a step.")
        .def("__init__", [](Decoder* self, const DecoderConfig& config, const std::vector<DecoderLayer*>& layers,
                            std::vector<float> final_norm, std::shared_ptr<Linear> head, std::uintptr_t embedding,
                            int embedding_dtype, const std::string& tier) {
            require(embedding != 0 && embedding_dtype >= 0 && embedding_dtype <= 2, "embedding: bad arguments");
            std::vector<DecoderLayer> copies;
            for (const DecoderLayer* layer : layers) copies.push_back(*layer);
            new (self) Decoder(tier_named(tier), config, std::move(copies), std::move(final_norm), std::move(head),
                               reinterpret_cast<const void*>(embedding), static_cast<DType>(embedding_dtype));
        }, "config"_a, "layers"_a, "final_norm"_a, "head"_a, "embedding"_a, "embedding_dtype"_a, "tier"_a)
        .def("with_layers", &Decoder::with_layers, "numbers"_a)
        .def("set_rotation", &set_rotation, "rotation"_a, "cosines"_a, "sines"_a)
        .def("step", &step, "cache"_a, "tokens"_a, "lengths"_a, "logits"_a, "out"_a, "out_rows"_a,
             "profile"_a.none() = nb::none())
        .def_prop_ro("nbytes", &Decoder::nbytes);
}

void dequantize(const W4Matrix& matrix, MutableFloats2 out) {
    if (out.shape(0) != static_cast<std::size_t>(matrix.rows()) || out.shape(1) != static_cast<std::size_t>(matrix.cols()))
        throw nb::value_error("out: must be [rows, columns]");
    nb::gil_scoped_release release;
    matrix.dequantize(out.data());
}

std::optional<double> peak(const std::string& kind, const std::string& tier) {
    const Tier& picked = tier_named(tier);
    require(kind == "fp32" || kind == "int8" || kind == "bf16", "kind: must be fp32, int8 or bf16");
    const PeakLoop loop = kind == "fp32" ? picked.fma : kind == "int8" ? picked.int8_dots : picked.bf16_dots;
    if (loop == nullptr || (kind == "bf16" && !has_bf16(picked))) return std::nullopt;
    nb::gil_scoped_release release;
    return measure_peak(loop);
}

std::vector<std::string> available() {
    std::vector<std::string> names;
    for (const Tier* tier : available_tiers()) names.emplace_back(tier->name);
    return names;
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "halfbyte's native core.";
    m.def("available_tiers", &available, "Instruction-set tiers this CPU can run, fastest first.");
    m.def("known_tiers", &known_tiers, "Every tier by name.");
    m.def("set_threads", [](int threads) { ThreadPool::instance().set_threads(threads); }, "threads"_a);
    m.def("threads", [] { return ThreadPool::instance().threads(); });
    nb::class_<ReadProbe>(m, "ReadProbe", "A buffer to read, again and again.")
        .def("__init__", [](ReadProbe* self, std::size_t nbytes, const std::string& tier) {
            new (self) ReadProbe(tier_named(tier), nbytes);
        }, "nbytes"_a, "tier"_a)
        .def("seconds", &ReadProbe::seconds, nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("nbytes", &ReadProbe::nbytes);
    m.def("measure_read", [](std::size_t nbytes, const std::string& tier, double seconds) {
        const Tier& picked = tier_named(tier);
        nb::gil_scoped_release release;
        return measure_read(picked, nbytes, seconds);
    }, "nbytes"_a, "tier"_a, "seconds"_a);
    m.def("measure_peak", &peak, "kind"_a, "tier"_a, "None where the tier, or this CPU, has no instruction for it.");

    m.def("half_multiply", &half_product, "weight"_a, "dtype"_a, "rows"_a, "cols"_a, "bias"_a, "x"_a, "y"_a, "m"_a, "tier"_a);

    m.def("rms_norm", &norm_rows, "x"_a, "weight"_a, "y"_a, "count"_a, "channels"_a, "epsilon"_a, "tier"_a);
    m.def("round_block", &round_block, "work"_a, "couplings"_a, "pivots"_a, "scales"_a, "zeros"_a, "codes"_a, "moved"_a,
          "rows"_a, "stride"_a, "columns"_a, "max_code"_a, "revisit"_a, "tier"_a);
    m.def("try_range", &try_range, "weights"_a, "grams"_a, "projections"_a, "scales"_a, "zeros"_a, "quadratic"_a, "linear"_a,
          "groups"_a, "rows"_a, "size"_a, "max_code"_a, "tier"_a);

    m.def("draw_logits", &draw_logits, "logits"_a, "vocabulary"_a, "settings"_a, "uniform"_a, "probabilities"_a, "tier"_a);
    m.def("rejection_sample", &rejection_sample, "draft_ids"_a, "draft"_a, "target"_a, "lengths"_a, "uniforms"_a, "settings"_a,
          "settings_stride"_a, "logits"_a, "batch"_a, "drafts"_a, "vocabulary"_a, "ids"_a, "counts"_a, "tier"_a);

    bind_decoder(m);

    nb::class_<W4Matrix>(m, "W4Matrix", "An INT4 or INT8 matrix in kernel layout.")
        .def(nb::new_(&make_matrix), "codes"_a, "scales"_a, "offsets"_a, "bias"_a.none(), "group_size"_a, "tier"_a,
             "bits"_a = 4, "group_index"_a.none() = nb::none(), "input_scale"_a.none() = nb::none(),
             "kept_columns"_a.none() = nb::none(), "kept_weight"_a.none() = nb::none(), "kept_dtype"_a = 1)
        .def("multiply", &multiply, "x"_a, "x_stride"_a, "y"_a, "m"_a, "dtype"_a)
        .def("dequantize", &dequantize, "out"_a)
        .def_prop_ro("rows", &W4Matrix::rows)
        .def_prop_ro("columns", &W4Matrix::cols)
        .def_prop_ro("nbytes", &W4Matrix::nbytes)
        .def_prop_ro("tier", [](const W4Matrix& matrix) { return std::string(matrix.tier().name); });
}

// The only file that knows Python. Everything is checked here; nothing below this line checks anything twice.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "cpu/half_multiply.hpp"
#include "cpu/isa.hpp"
#include "cpu/measure.hpp"
#include "cpu/thread_pool.hpp"
#include "cpu/w4_matrix.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace halfbyte;

namespace {

using Codes = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats1 = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MutableFloats2 = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

const Tier& tier_named(const std::string& name) {
    for (const Tier* tier : available_tiers())
        if (name == tier->name) return *tier;
    throw nb::value_error(("no such tier on this CPU: " + name).c_str());
}

W4Matrix* make_matrix(Codes codes, Floats2 scales, Floats2 offsets, std::optional<Floats1> bias, std::size_t group_size,
                      const std::string& tier) {
    const std::size_t rows = codes.shape(0), cols = codes.shape(1);
    constexpr std::size_t LIMIT = std::numeric_limits<int>::max() / 64;
    if (rows < 1 || cols < 1 || rows > LIMIT || cols > LIMIT) throw nb::value_error("codes: rows or columns out of range");
    if (group_size < 8 || group_size % 8 || group_size > LIMIT)
        throw nb::value_error("group_size: must be a positive multiple of 8");
    const std::size_t groups = (cols + group_size - 1) / group_size;
    for (const auto& [name, array] : {std::pair{"scales", &scales}, std::pair{"offsets", &offsets}})
        if (array->shape(0) != rows || array->shape(1) != groups)
            throw nb::value_error((std::string(name) + ": must be [rows, ceil(columns / group_size)]").c_str());
    if (bias && bias->shape(0) != rows) throw nb::value_error("bias: must be [rows]");
    const std::size_t count = rows * cols;
    if (std::any_of(codes.data(), codes.data() + count, [](std::uint8_t code) { return code > 15; }))
        throw nb::value_error("codes: must be below 16");
    nb::gil_scoped_release release;
    return new W4Matrix(tier_named(tier), codes.data(), scales.data(), offsets.data(), bias ? bias->data() : nullptr,
                        static_cast<int>(rows), static_cast<int>(cols), static_cast<int>(group_size));
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

void dequantize(const W4Matrix& matrix, MutableFloats2 out) {
    if (out.shape(0) != static_cast<std::size_t>(matrix.rows()) || out.shape(1) != static_cast<std::size_t>(matrix.cols()))
        throw nb::value_error("out: must be [rows, columns]");
    nb::gil_scoped_release release;
    matrix.dequantize(out.data());
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
    m.def(
        "measure_read_bandwidth",
        [](std::size_t nbytes, int repeats, const std::string& tier) {
            const Tier& picked = tier_named(tier);
            nb::gil_scoped_release release;
            return measure_read_bandwidth(picked, nbytes, repeats);
        },
        "nbytes"_a, "repeats"_a, "tier"_a);
    m.def(
        "measure_peak_flops",
        [](const std::string& tier) {
            const Tier& picked = tier_named(tier);
            nb::gil_scoped_release release;
            return measure_peak_flops(picked);
        },
        "tier"_a);

    m.def("half_multiply", &half_product, "weight"_a, "dtype"_a, "rows"_a, "cols"_a, "bias"_a, "x"_a, "y"_a, "m"_a, "tier"_a);

    nb::class_<W4Matrix>(m, "W4Matrix", "An INT4 matrix in kernel layout.")
        .def(nb::new_(&make_matrix), "codes"_a, "scales"_a, "offsets"_a, "bias"_a.none(), "group_size"_a, "tier"_a)
        .def("multiply", &multiply, "x"_a, "x_stride"_a, "y"_a, "m"_a, "dtype"_a)
        .def("dequantize", &dequantize, "out"_a)
        .def_prop_ro("rows", &W4Matrix::rows)
        .def_prop_ro("columns", &W4Matrix::cols)
        .def_prop_ro("nbytes", &W4Matrix::nbytes)
        .def_prop_ro("tier", [](const W4Matrix& matrix) { return std::string(matrix.tier().name); });
}

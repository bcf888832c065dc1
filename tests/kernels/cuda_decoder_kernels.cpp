// The kernels between products as they are, on the model of cuda_machine.hpp, for tests/kernels/cuda_decoder_machine.py.
#include "gated.cu"
#include "rms_norm.cu"
#include "rotate_append.cu"

using namespace halfbyte;

namespace {

std::string message;

// Address, bytes, and whether it may be written, of each tensor; a null address is a null pointer.
struct Tensors {
    const size_t (*table)[3];
    machine::Machine gpu;
    Tensors(const size_t (*table)[3], int count) : table(table) {
        for (int i = 0; i < count; ++i) gpu.tensors.push_back({static_cast<const char*>(at(i)), table[i][1], table[i][2] != 0});
    }
    void* at(int i) const { return reinterpret_cast<void*>(table[i][0]); }
};

template <class Run>
int launch(Tensors& tensors, int blocks, int threads, size_t shared_bytes, unsigned seed, long long* conflicts, Run run) {
    try {
        machine::launch(tensors.gpu, blocks, threads, shared_bytes, seed, run);
    } catch (const std::exception& error) {
        message = error.what();
        return 1;
    }
    *conflicts = tensors.gpu.bank_conflicts;
    return 0;
}

}  // namespace

extern "C" {

const char* last_error() { return message.c_str(); }
int norm_threads() { return Norm::THREADS; }
int rotation_threads() { return Rotation::THREADS; }
int gate_threads() { return Gate::THREADS; }

// Each returns 0, or 1 with the reason in last_error().
int run_rms_norm(int bfloat, int narrow, const size_t (*table)[3], int blocks, int shared_bytes, int channels, float scale, float epsilon,
                 float offset, int round_first, unsigned seed, long long* conflicts) {
    Tensors tensors(table, 4);
    const Norm norm{tensors.at(0), tensors.at(1), tensors.at(2), tensors.at(3), channels, scale, epsilon, offset, round_first};
    return launch(tensors, blocks, Norm::THREADS, shared_bytes, seed, conflicts, [&] {
        if (narrow) return bfloat ? rms_norm<BFloat, 1>(norm) : rms_norm<Half, 1>(norm);
        return bfloat ? rms_norm<BFloat, 8>(norm) : rms_norm<Half, 8>(norm);
    });
}

int run_rotate_append(int bfloat, const size_t (*table)[3], int blocks, const int* n, float epsilon, float offset, unsigned seed,
                      long long* conflicts) {
    Tensors tensors(table, 8);
    auto floats = [&](int i) { return static_cast<const float*>(tensors.at(i)); };
    const Rotation rotation{tensors.at(0), tensors.at(1), tensors.at(2), static_cast<const int*>(tensors.at(3)), floats(4), floats(5),
                            tensors.at(6), tensors.at(7), n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], epsilon, offset};
    return launch(tensors, blocks, Rotation::THREADS, 0, seed, conflicts,
                  [&] { return bfloat ? rotate_append<BFloat>(rotation) : rotate_append<Half>(rotation); });
}

int run_gated(int bfloat, int narrow, const size_t (*table)[3], int blocks, int rows, int width, int activation, unsigned seed,
              long long* conflicts) {
    Tensors tensors(table, 2);
    const Gate gate{tensors.at(0), tensors.at(1), rows, width, activation};
    return launch(tensors, blocks, Gate::THREADS, 0, seed, conflicts, [&] {
        if (narrow) return bfloat ? multiply_by_gate<BFloat, 1>(gate) : multiply_by_gate<Half, 1>(gate);
        return bfloat ? multiply_by_gate<BFloat, 8>(gate) : multiply_by_gate<Half, 8>(gate);
    });
}

}

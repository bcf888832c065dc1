// The rejection sampler of native/cuda as it is, on the model of tests/kernels/cuda_machine.hpp, for
// rejection_machine.py.
#include "rejection_sample.cu"

using namespace halfbyte;

namespace {

std::string message;

struct Launch {
    int filtered, type, sequences, resident;
    unsigned seed;
};

template <class Type, bool FILTERED>
void run(machine::Machine& gpu, const Launch& how, const Batch& batch) {
    machine::launch(gpu, how.sequences * batch.blocks, THREADS, Sampler<Type, FILTERED>::SHARED_BYTES, how.seed,
                    [&] { Sampler<Type, FILTERED>(batch).run(); });
}

}  // namespace

extern "C" {

const char* last_error() { return message.c_str(); }

int shared_bytes(int filtered) { return filtered ? Sampler<Fp32, true>::SHARED_BYTES : Sampler<Fp32, false>::SHARED_BYTES; }

// 0, or 1 with the reason in last_error(). `tensors`: address and bytes in the order of the entry point; ids, counts,
// records, bins and masses may be written.
int run_rejection(const Launch* how, const size_t (*tensors)[2], int drafts, int vocabulary, int blocks, int settings_stride,
                  int logits, long long* waits) {
    machine::Machine gpu;
    gpu.resident = how->resident;
    for (int i = 0; i < 11; ++i) gpu.tensors.push_back({reinterpret_cast<const char*>(tensors[i][0]), tensors[i][1], i >= 6});
    auto at = [&](int i) { return reinterpret_cast<void*>(tensors[i][0]); };
    const Batch batch{static_cast<const long long*>(at(0)), static_cast<const float*>(at(1)), static_cast<const char*>(at(2)),
                      static_cast<const long long*>(at(3)), static_cast<const float*>(at(4)), static_cast<const double*>(at(5)),
                      static_cast<long long*>(at(6)), static_cast<long long*>(at(7)), static_cast<Record*>(at(8)),
                      static_cast<u64*>(at(9)), static_cast<u64*>(at(10)), drafts, vocabulary, blocks, settings_stride, logits};
    try {
        if (!how->filtered) {
            run<Fp32, false>(gpu, *how, batch);
        } else {
            how->type == 0 ? run<Fp32, true>(gpu, *how, batch)
            : how->type == 1 ? run<Fp16, true>(gpu, *how, batch)
                             : run<Bf16, true>(gpu, *how, batch);
        }
    } catch (const std::exception& error) {
        message = error.what();
        return 1;
    }
    *waits = gpu.waits;
    return 0;
}

// Every step of `ordered`, `mass_of` and `exp_of` for one number each.
void number_functions(const float* values, int count, unsigned* order, float* back, long long* masses, float* exponentials) {
    for (int i = 0; i < count; ++i) {
        order[i] = ordered(values[i]);
        back[i] = restored(order[i]);
        masses[i] = static_cast<long long>(joined(mass_of(values[i])));
        exponentials[i] = exp_of(values[i]);
    }
}

}

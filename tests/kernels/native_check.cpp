// Every tier this CPU has, through every *_check.hpp beside this file; built with sanitizers, and for other processors.
#include <cstdio>

#include "decoder_check.hpp"
#include "isa.hpp"
#include "peak_check.hpp"
#include "product_check.hpp"
#include "rejection_check.hpp"
#include "thread_pool.hpp"

int main() {
    halfbyte::ThreadPool::instance().set_threads(3);
    int failures = 0;
    for (const halfbyte::Tier* tier : halfbyte::available_tiers()) {
        std::printf("%s\n", tier->name);
        failures += product_check::check_tier(*tier) + decoder_check::check_tier(*tier) +
                    rejection_check::check_tier(*tier) + peak_check::check_tier(*tier, halfbyte::has_bf16(*tier));
    }
    std::printf("%d failures\n", failures);
    return failures != 0;
}

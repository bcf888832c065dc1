// Every tier this CPU has, through decoder_check.hpp; built with the address and undefined-behaviour sanitizers.
#include <cstdio>

#include "decoder_check.hpp"
#include "isa.hpp"
#include "thread_pool.hpp"

int main() {
    halfbyte::ThreadPool::instance().set_threads(3);
    int failures = 0;
    for (const halfbyte::Tier* tier : halfbyte::available_tiers()) {
        std::printf("%s\n", tier->name);
        failures += decoder_check::check_tier(*tier);
    }
    std::printf("%d failures\n", failures);
    return failures != 0;
}

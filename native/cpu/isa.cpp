#include "isa.hpp"

#include <string_view>

#if defined(HALFBYTE_X86_TIERS)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(HALFBYTE_ARM_TIERS) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace halfbyte {

namespace {

#if defined(HALFBYTE_X86_TIERS)
// __builtin_cpu_supports asks CPUID and, through XGETBV, whether the operating system saves the wide registers.
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

// Clang's __builtin_cpu_supports does not know the name everywhere: leaf 7, subleaf 1, EAX bit 4. The registers are AVX2's.
bool has_avx_vnni() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1u) != 0;
}

bool has_avx512_vnni() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

// Linux hands out the tile registers, 8 KiB a thread, to processes that ask, and may refuse; one yes holds for all threads.
bool has_amx() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    constexpr unsigned TILE_AND_INT8 = 3u << 24;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return has_avx512_vnni() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 &&
           (edx & TILE_AND_INT8) == TILE_AND_INT8 && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#elif defined(HALFBYTE_ARM_TIERS)
bool has_neon() {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return false;  // no other system has been asked yet
#endif
}
#endif

std::vector<const Tier*> detect_tiers() {
    std::vector<const Tier*> tiers;
#if defined(HALFBYTE_X86_TIERS)
    __builtin_cpu_init();
    if (has_amx()) tiers.push_back(amx_tier());
    if (has_avx512_vnni()) tiers.push_back(avx512_vnni_tier());
    if (has_avx_vnni()) tiers.push_back(avx_vnni_tier());
    if (has_avx2()) tiers.push_back(avx2_tier());
#elif defined(HALFBYTE_ARM_TIERS)
    if (has_neon()) tiers.push_back(neon_tier());
#endif
    tiers.push_back(portable_tier());
    return tiers;
}

}  // namespace

const std::vector<const Tier*>& available_tiers() {
    static const std::vector<const Tier*> tiers = detect_tiers();
    return tiers;
}

bool has_bf16(const Tier& tier) {
#if defined(HALFBYTE_X86_TIERS)
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    // By name: even the address of a tier is got by code that only its own CPU may run.
    const std::string_view name = tier.name;
    if (name == "amx") return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx >> 22 & 1u) != 0;
    if (name == "avx512_vnni") return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 5 & 1u) != 0;
#elif defined(HALFBYTE_ARM_TIERS) && defined(__linux__)
    const std::string_view name = tier.name;
    if (name == "neon") return (getauxval(AT_HWCAP2) & (1u << 14)) != 0;  // HWCAP2_BF16, unknown to older headers
#endif
    static_cast<void>(tier);
    return false;
}

std::vector<std::string> known_tiers() { return {"amx", "avx512_vnni", "avx_vnni", "avx2", "neon", "portable"}; }

}  // namespace halfbyte

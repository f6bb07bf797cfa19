// Chooses the kernels for this processor.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef FASTMTP_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef FASTMTP_NEON
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

#include "kernels.hpp"

namespace fastmtp {

#ifdef FASTMTP_X86
extern const Kernels avx512bf16_kernels, avx512_kernels, avx2_kernels;
#endif
#ifdef FASTMTP_AVXVNNI
extern const Kernels avxvnni_kernels;
#endif
#ifdef FASTMTP_AMX
extern const Kernels amx_kernels;
#endif
#ifdef FASTMTP_NEON
extern const Kernels i8mm_kernels, dotprod_kernels;
#endif
extern const Kernels portable_kernels;

namespace {

#ifdef FASTMTP_AMX
// Whether the processor has AMX with int8 and bf16, and Linux lets this process use its tiles.
bool may_use_tiles() {
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl(2)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

#ifdef FASTMTP_NEON
struct Features {
  bool dotprod = false, i8mm = false, bf16 = false;
};

Features features() {
#if defined(__linux__)
  // Bits of Linux's <asm/hwcap.h>, named there HWCAP_ASIMDDP, HWCAP2_I8MM and HWCAP2_BF16.
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  return {(first >> 20 & 1) != 0, (second >> 13 & 1) != 0, (second >> 14 & 1) != 0};
#elif defined(__APPLE__)
  const auto has = [](const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  return {has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_I8MM"), has("hw.optional.arm.FEAT_BF16")};
#else
  return {};
#endif
}
#endif

std::vector<const Kernels*> find_kernels() {
  std::vector<const Kernels*> found;
#ifdef FASTMTP_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#ifdef FASTMTP_AMX
  if (avx512bf16 && may_use_tiles()) found.push_back(&amx_kernels);
#endif
  if (avx512bf16) found.push_back(&avx512bf16_kernels);
  if (avx512) found.push_back(&avx512_kernels);
#ifdef FASTMTP_AVXVNNI
  if (avx2 && __builtin_cpu_supports("avxvnni")) found.push_back(&avxvnni_kernels);
#endif
  if (avx2) found.push_back(&avx2_kernels);
#endif
#ifdef FASTMTP_NEON
  const Features has = features();
  if (has.dotprod && has.i8mm && has.bf16) found.push_back(&i8mm_kernels);
  if (has.dotprod) found.push_back(&dotprod_kernels);
#endif
  found.push_back(&portable_kernels);
  return found;
}

}  // namespace

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> available = find_kernels();
  return available;
}

const Kernels& kernels() {
  const char* wanted = std::getenv("FASTMTP_KERNELS");
  if (!wanted || !*wanted) return *available_kernels().front();
  std::string names;
  for (const Kernels* table : available_kernels()) {
    if (!std::strcmp(table->name, wanted)) return *table;
    names += std::string(names.empty() ? "" : ", ") + table->name;
  }
  throw std::invalid_argument("FASTMTP_KERNELS is " + std::string(wanted) + "; this processor can run: " + names);
}

}  // namespace fastmtp

// Chooses the instruction set: the best one of the processor, or a lower one that REVAL_CPU_ISA names.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#define REVAL_KERNELS_OF(isa)            \
  namespace isa {                        \
  extern const RowKernels rows;          \
  extern const ColumnKernels columns;    \
  extern const LayoutKernels layout;     \
  }                                      \
  static const Kernels kernels_##isa = {#isa, isa::rows, isa::columns, isa::layout};

namespace reval {

REVAL_KERNELS_OF(plain)
#ifdef REVAL_X86_VARIANTS
REVAL_KERNELS_OF(avx2)
REVAL_KERNELS_OF(avx512)
REVAL_KERNELS_OF(avx512bf16)
#endif

namespace {

#ifdef REVAL_X86_VARIANTS
bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// The best table that the processor can run, but not above the one that REVAL_CPU_ISA names. A table that the processor
// cannot run is never chosen, because an environment variable must not crash the process.
const Kernels& choose() {
  const char* asked = std::getenv("REVAL_CPU_ISA");
  bool plain = asked && std::strcmp(asked, "plain") == 0;
  bool avx2 = asked && std::strcmp(asked, "avx2") == 0;
  bool avx512 = asked && std::strcmp(asked, "avx512") == 0;
  if (!plain && !avx2 && runs_avx512()) {
    return !avx512 && __builtin_cpu_supports("avx512bf16") ? kernels_avx512bf16 : kernels_avx512;
  }
  if (!plain && runs_avx2()) return kernels_avx2;
  return kernels_plain;
}
#else
const Kernels& choose() { return kernels_plain; }
#endif

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

bool has_bf16_matmul() {
#ifdef REVAL_X86_VARIANTS
  return &kernels() == &kernels_avx512bf16;
#else
  return false;
#endif
}

}  // namespace reval

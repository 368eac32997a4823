// The kernels for each instruction set, from one text, and the choice among them when the program runs.

#include "spmm.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace neurarium {
namespace {

// Blocks one column wide.
template <class Index>
struct Single {
  const int32_t* pointers;
  const Index* indices;
  struct Cursor {
    const Index* indices;
    int64_t take(int64_t p) { return indices[p]; }
  };
  int64_t begin(int64_t i) const { return pointers[i]; }
  int64_t end(int64_t i) const { return pointers[i + 1]; }
  Cursor start(int64_t) const { return {indices}; }
};

// Blocks `depth` columns wide, walked column by column.
struct Deep {
  const int32_t* pointers;
  const int32_t* indices;
  int64_t depth;
  struct Cursor {
    const int32_t* next;
    int64_t depth, inside;
    int64_t take(int64_t) {
      const int64_t column = *next * depth + inside;
      if (++inside == depth) inside = 0, ++next;
      return column;
    }
  };
  int64_t begin(int64_t i) const { return pointers[i] * depth; }
  int64_t end(int64_t i) const { return pointers[i + 1] * depth; }
  Cursor start(int64_t i) const { return {indices + pointers[i], depth, 0}; }
};

// `kept` of every `depth` columns, `each` entries a block row; an index is the offset within its group.
struct Group {
  const uint8_t* indices;
  int64_t each, depth, kept;
  struct Cursor {
    const uint8_t* indices;
    int64_t depth, kept, base, done;
    int64_t take(int64_t p) {
      const int64_t column = base + indices[p];
      if (++done == kept) done = 0, base += depth;
      return column;
    }
  };
  int64_t begin(int64_t i) const { return i * each; }
  int64_t end(int64_t i) const { return (i + 1) * each; }
  Cursor start(int64_t) const { return {indices, depth, kept, 0, 0}; }
};

#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#elif defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#if defined(__x86_64__)
#define LANES 16
namespace avx512 {
#include "spmm_float.h"
#include "spmm_int8.h"
}
#undef LANES
#endif
#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"))), apply_to = function)
#elif defined(__x86_64__)
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,prefer-vector-width=512")
#endif
#if defined(__x86_64__)
namespace vnni {
#include "spmm_vnni.h"
}
#endif
#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#elif defined(__x86_64__)
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#if defined(__x86_64__)
#define LANES 8
namespace avx2 {
#include "spmm_float.h"
#include "spmm_int8.h"
}
#undef LANES
#endif
#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute pop
#elif defined(__x86_64__)
#pragma GCC pop_options
#endif
#define LANES 4
namespace plain {
#include "spmm_float.h"
#include "spmm_int8.h"
}
#undef LANES

#define KERNELS(isa) {isa::next_panel, isa::pack, isa::run, isa::quantise, isa::next_int_panel, isa::pack_int, isa::run_int}

}  // namespace

int64_t best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

Kernels kernels(int64_t isa) {
#if defined(__x86_64__)
  if (isa > best_isa()) isa = best_isa();
  if (isa == 2) {
    static const bool has_vnni = __builtin_cpu_supports("avx512vnni");
    Kernels all = KERNELS(avx512);
    if (has_vnni) all.next_int_panel = vnni::next_panel, all.pack_int = vnni::pack, all.run_int = vnni::run;
    return all;
  }
  if (isa == 1) return KERNELS(avx2);
#endif
  (void)isa;
  return KERNELS(plain);
}

}  // namespace neurarium

// What the kernels and their driver share. No torch here: the two are compiled side by side.

#pragma once

#include <cstdint>

namespace neurarium {

enum Act { NONE, RELU, GELU };
enum Kind { SHORT, LONG, DEEP, GROUP };

struct Job {
  const float* values;
  const int32_t* pointers;
  const void* indices;
  const float* bias;
  float* out;
  int64_t rows, each, depth, kept;
  int block, act;
  Kind kind;
};

struct IntJob {
  const int8_t* values;
  const int32_t* pointers;
  const void* indices;
  const float* row_scale;
  const int32_t* row_sum;
  const float* token_scale;
  const int32_t* token_zero;
  const float* bias;
  float* out;
  int32_t* sums;  // not null: the bare sums are wanted
  int64_t rows;
  int block, act;
  bool narrow_index;
};

struct Panel {
  int64_t begin, tokens, stride;
  int size;
};

struct Kernels {
  Panel (*next_panel)(int, int64_t, int64_t);
  void (*pack)(const float*, int64_t, int64_t, int64_t, int64_t, float*);
  void (*run)(const Job&, const float*, const Panel&, int64_t, int64_t);
  void (*quantise)(const float*, int64_t, int64_t, int64_t, uint8_t*, int64_t, float*, int32_t*);
  Panel (*next_int_panel)(int, int64_t, int64_t);
  void (*pack_int)(const uint8_t*, int64_t, int64_t, int64_t, const Panel&, float*);
  void (*run_int)(const IntJob&, const float*, const Panel&, int64_t, int64_t);
};

int64_t best_isa();  // 0 plain, 1 AVX2, 2 AVX512
Kernels kernels(int64_t isa);

}  // namespace neurarium

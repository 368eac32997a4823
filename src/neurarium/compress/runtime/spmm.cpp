// y = act(x W^T + b) for a sparse W, x (tokens, columns) and y (tokens, rows) dense and row-major: no layout is asked of the caller.
//
// A panel of tokens is transposed once into [column][token]; then each block row of W walks its kept columns and does nothing but vector
// multiply-adds. Bias and activation are added while the result is in registers. One text, three instruction sets, picked at run time.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <tuple>
#include <vector>

#include "spmm.h"

namespace {

using namespace neurarium;

// Memory that a thread keeps between calls: fresh pages would cost more than the packing.
float* scratch(int64_t floats) {
  struct Holder {
    float* memory = nullptr;
    int64_t size = 0;
    ~Holder() { std::free(memory); }
  };
  static thread_local Holder held;
  if (held.size < floats) {
    std::free(held.memory);
    held.size = (floats + 1023) / 1024 * 1024;
    held.memory = static_cast<float*>(std::aligned_alloc(64, held.size * sizeof(float)));
    if (!held.memory) held.size = 0;
    TORCH_CHECK(held.memory, "no memory for ", floats, " floats");
  }
  return held.memory;
}

// fill(panel, memory) packs a panel of at.stride x columns 4-byte units, run(panel, memory, first, last) multiplies block rows with it.
template <class Fill, class Run>
void drive(const std::vector<Panel>& panels, int64_t columns, int64_t block_rows, const int32_t* pointers, const Fill& fill, const Run& run) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads(), count = panels.size();
  if (threads == 1 || count >= 2 * threads) {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float* panel = scratch(columns * panels[i].stride);
        fill(panels[i], panel);
        run(panels[i], panel, 0, block_rows);
      }
    });
    return;
  }
  // Few tokens: every thread packs some panels, then takes a share of the block rows with an equal number of blocks.
  std::vector<int64_t> offsets(1, 0), cuts(1, 0);
  for (const Panel& at : panels) offsets.push_back(offsets.back() + columns * at.stride);
  float* packed = scratch(offsets.back());
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) fill(panels[i], packed + offsets[i]);
  });
  for (int64_t i = 1; i < threads; ++i) {
    int64_t cut = block_rows * i / threads;
    if (pointers) cut = std::lower_bound(pointers, pointers + block_rows, int32_t(int64_t(pointers[block_rows]) * i / threads)) - pointers;
    cuts.push_back(std::max(cuts.back(), std::min(cut, block_rows)));
  }
  cuts.push_back(block_rows);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < count; ++j) run(panels[j], packed + offsets[j], cuts[i], cuts[i + 1]);
  });
}

std::vector<Panel> cut(Panel (*next)(int, int64_t, int64_t), int block, int64_t tokens) {
  std::vector<Panel> panels;
  for (int64_t done = 0; done < tokens; done += panels.back().tokens) panels.push_back(next(block, done, tokens - done));
  return panels;
}

at::Tensor spmm(
    const at::Tensor& x, const at::Tensor& values, const at::Tensor& pointers, const at::Tensor& indices, const std::optional<at::Tensor>& bias,
    int64_t rows, int64_t block, int64_t depth, int64_t kept, int64_t act, int64_t isa) {
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == at::kFloat && (x.stride(1) == 1 || x.size(1) == 1), "x must be float32 (tokens, columns)");
  TORCH_CHECK(values.is_contiguous() && values.scalar_type() == at::kFloat && indices.is_contiguous() && pointers.is_contiguous());
  TORCH_CHECK(pointers.scalar_type() == at::kInt && (!bias || (bias->is_contiguous() && bias->numel() == rows)));
  TORCH_CHECK(block == 1 || block == 4 || block == 8 || block == 16, "no loop for blocks of ", block, " outputs");
  const int64_t tokens = x.size(0), columns = x.size(1), ld = x.stride(0), block_rows = (rows + block - 1) / block;
  // An N:M group or a block may reach beyond the last column; its weights there are zero, and so is the panel.
  const int64_t padded = (columns + depth - 1) / depth * depth;
  TORCH_CHECK(kept || pointers.numel() == block_rows + 1, "pointers do not fit");
  TORCH_CHECK(!kept || indices.numel() == block_rows * (padded / depth) * kept, "indices do not fit");
  at::Tensor out = at::empty({tokens, rows}, x.options());
  Job job;
  job.values = values.const_data_ptr<float>();
  job.pointers = pointers.const_data_ptr<int32_t>();
  job.indices = indices.const_data_ptr();
  job.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  job.out = out.data_ptr<float>();
  job.rows = rows, job.depth = depth, job.kept = kept;
  job.each = kept ? padded / depth * kept : 0;
  job.block = int(block), job.act = int(act);
  job.kind = kept ? GROUP : depth > 1 ? DEEP : indices.scalar_type() == at::kShort ? SHORT : LONG;
  const Kernels use = kernels(isa);
  const float* input = x.const_data_ptr<float>();
  drive(
      cut(use.next_panel, job.block, tokens), padded, block_rows, kept ? nullptr : job.pointers,
      [&](const Panel& at, float* panel) {
        use.pack(input + at.begin * ld, ld, columns, std::min(tokens - at.begin, at.stride), at.stride, panel);
        std::fill(panel + columns * at.stride, panel + padded * at.stride, 0.f);
      },
      [&](const Panel& at, const float* panel, int64_t first, int64_t last) { use.run(job, panel, at, first, last); });
  return out;
}

// (codes (tokens, columns rounded up to 4), scales (tokens), zero points (tokens))
std::tuple<at::Tensor, at::Tensor, at::Tensor> quantise(const at::Tensor& x, int64_t isa) {
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == at::kFloat && (x.stride(1) == 1 || x.size(1) == 1), "x must be float32 (tokens, columns)");
  const int64_t tokens = x.size(0), columns = x.size(1), ld = x.stride(0), padded = (columns + 3) / 4 * 4;
  at::Tensor codes = at::empty({tokens, padded}, x.options().dtype(at::kByte));
  at::Tensor scales = at::empty({tokens}, x.options()), zeros = at::empty({tokens}, x.options().dtype(at::kInt));
  const Kernels use = kernels(isa);
  const float* input = x.const_data_ptr<float>();
  at::parallel_for(0, tokens, 16, [&](int64_t begin, int64_t end) {
    use.quantise(
        input + begin * ld, ld, columns, end - begin, codes.data_ptr<uint8_t>() + begin * padded, padded, scales.data_ptr<float>() + begin,
        zeros.data_ptr<int32_t>() + begin);
  });
  return {codes, scales, zeros};
}

at::Tensor spmm_int8(
    const at::Tensor& codes, const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& zeros, const at::Tensor& values,
    const at::Tensor& pointers, const at::Tensor& indices, const at::Tensor& row_scale, const at::Tensor& row_sum,
    const std::optional<at::Tensor>& bias, int64_t rows, int64_t block, int64_t act, int64_t isa) {
  TORCH_CHECK(codes.dim() == 2 && codes.scalar_type() == at::kByte && codes.is_contiguous() && codes.size(1) % 4 == 0, "codes do not fit");
  TORCH_CHECK(values.is_contiguous() && values.scalar_type() == at::kChar && indices.is_contiguous() && pointers.is_contiguous());
  const int64_t tokens = codes.size(0), ld = codes.size(1), block_rows = (rows + block - 1) / block;
  TORCH_CHECK(pointers.scalar_type() == at::kInt && pointers.numel() == block_rows + 1 && (block == 4 || block == 16), "pointers do not fit");
  TORCH_CHECK(row_scale.numel() == rows && row_sum.numel() == rows && row_sum.scalar_type() == at::kInt && row_scale.scalar_type() == at::kFloat);
  TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == rows));
  at::Tensor out = at::empty({tokens, rows}, codes.options().dtype(scales ? at::kFloat : at::kInt));
  IntJob job;
  job.values = values.const_data_ptr<int8_t>();
  job.pointers = pointers.const_data_ptr<int32_t>();
  job.indices = indices.const_data_ptr();
  job.row_scale = row_scale.const_data_ptr<float>();
  job.row_sum = row_sum.const_data_ptr<int32_t>();
  job.token_scale = scales ? scales->const_data_ptr<float>() : nullptr;
  job.token_zero = scales ? zeros->const_data_ptr<int32_t>() : nullptr;
  job.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  job.out = scales ? out.data_ptr<float>() : nullptr;
  job.sums = scales ? nullptr : out.data_ptr<int32_t>();
  job.rows = rows;
  job.block = int(block), job.act = int(act);
  job.narrow_index = indices.scalar_type() == at::kShort;
  const Kernels use = kernels(isa);
  const uint8_t* input = codes.const_data_ptr<uint8_t>();
  drive(
      cut(use.next_int_panel, job.block, tokens), ld / 4, block_rows, job.pointers,
      [&](const Panel& at, float* panel) {
        use.pack_int(input + at.begin * ld, ld, ld / 4, std::min(tokens - at.begin, at.stride), at, panel);
      },
      [&](const Panel& at, const float* panel, int64_t first, int64_t last) { use.run_int(job, panel, at, first, last); });
  return out;
}

}  // namespace

TORCH_LIBRARY(neurarium_spmm, m) {
  m.def("best_isa() -> int", [] { return neurarium::best_isa(); });
  m.def(
      "spmm(Tensor x, Tensor values, Tensor pointers, Tensor indices, Tensor? bias, int rows, int block, int depth, int kept, int act, int isa)"
      " -> Tensor");
  m.def("quantise(Tensor x, int isa) -> (Tensor, Tensor, Tensor)");
  m.def(
      "spmm_int8(Tensor codes, Tensor? scales, Tensor? zeros, Tensor values, Tensor pointers, Tensor indices, Tensor row_scale, Tensor row_sum,"
      " Tensor? bias, int rows, int block, int act, int isa) -> Tensor");
}

TORCH_LIBRARY_IMPL(neurarium_spmm, CPU, m) {
  m.impl("spmm", &spmm);
  m.impl("quantise", &quantise);
  m.impl("spmm_int8", &spmm_int8);
}

// The int8 kernels of any instruction set: uint8 codes of the inputs times int8 weights, summed in int32 without saturation.
// Included like spmm_float.h and after it. A quad is four columns of one row block; its weights lie output after output, four each.

// Codes of each token on its own: x ~ scale (code - zero), zero inside the range. A token with NaN or infinity gets scale NaN.
inline void quantise(const float* x, int64_t ld, int64_t columns, int64_t tokens, uint8_t* codes, int64_t ld_codes, float* scales, int32_t* zeros) {
  typedef typename Vec<W>::type V;
  typedef typename Vec<W>::ints I;
  for (int64_t t = 0; t < tokens; ++t) {
    const float* s = x + t * ld;
    V low = V{}, high = V{}, poison = V{};
    int64_t k = 0;
    for (; k + W <= columns; k += W) {
      const V v = load<W>(s + k);
      low = v < low ? v : low;
      high = v > high ? v : high;
      poison += v * 0.f;
    }
    float least = 0.f, most = 0.f, bad = 0.f;
    for (int j = 0; j < W; ++j) {
      least = low[j] < least ? low[j] : least;
      most = high[j] > most ? high[j] : most;
      bad += poison[j];
    }
    for (; k < columns; ++k) {
      least = s[k] < least ? s[k] : least;
      most = s[k] > most ? s[k] : most;
      bad += s[k] * 0.f;
    }
    const float span = most - least, scale = span > 1e-30f ? span / 255.f : 1.f, inverse = 1.f / scale;
    const bool finite = bad == 0.f && span < 3e38f;
    const float zero = finite ? round_even(-least * inverse) : 0.f;
    scales[t] = finite ? scale : __builtin_nanf("");
    zeros[t] = int32_t(zero);
    uint8_t* c = codes + t * ld_codes;
    k = 0;
    for (; finite && k + W <= columns; k += W) {
      V v = round_even(load<W>(s + k) * inverse) + zero;
      v = v < 0.f ? V{} : v;
      v = v > 255.f ? V{} + 255.f : v;
      const I whole = __builtin_convertvector(v, I);
      for (int j = 0; j < W; ++j) c[k + j] = uint8_t(whole[j]);
    }
    for (; k < columns; ++k) {
      float v = finite ? round_even(s[k] * inverse) + zero : 0.f;
      v = v < 0.f ? 0.f : v > 255.f ? 255.f : v;
      c[k] = uint8_t(v);
    }
    for (; k < ld_codes; ++k) c[k] = 0;
  }
}

// tile (tokens, 16) of sums -> outputs [row, row + block): as they are, or with the scales, the zero points, bias and activation.
__attribute__((noinline)) void finish_sums(const IntJob& job, const int32_t* tile, const Panel& at, int64_t row, int64_t block) {
  const int64_t width = job.rows - row < block ? job.rows - row : block;
  if (job.sums) {
    for (int64_t t = 0; t < at.tokens; ++t)
      for (int64_t r = 0; r < width; ++r) job.sums[(at.begin + t) * job.rows + row + r] = tile[t * 16 + r];
    return;
  }
  float bias[16] = {}, scale[16] = {}, whole[16];
  int32_t total[16] = {};
  for (int64_t r = 0; r < width; ++r) {
    scale[r] = job.row_scale[row + r];
    total[r] = job.row_sum[row + r];
    if (job.bias) bias[r] = job.bias[row + r];
  }
  for (int64_t t = 0; t < at.tokens; ++t) {
    const float token = job.token_scale[at.begin + t];
    const int32_t zero = job.token_zero[at.begin + t];
    for (int r = 0; r < 16; ++r) whole[r] = float(tile[t * 16 + r] - zero * total[r]) * (token * scale[r]);
    for (int r = 0; r < 16; r += W) store<W>(whole + r, activate<W>(load<W>(whole + r) + load<W>(bias + r), job.act));
    float* out = job.out + (at.begin + t) * job.rows + row;
    for (int64_t r = 0; r < width; ++r) out[r] = whole[r];
  }
}

inline Panel next_int_panel(int, int64_t begin, int64_t left) { return Panel{begin, left < 8 ? left : 8, 8, 8}; }

inline void pack_int(const uint8_t* codes, int64_t ld, int64_t groups, int64_t tokens, const Panel& at, float* panel) {
  pack(reinterpret_cast<const float*>(codes), ld / 4, groups, tokens, at.stride, panel);  // four codes travel as one float, untouched
}

template <int R, class Index>
void sums(const IntJob& job, const uint8_t* panel, const Panel& at, int64_t first, int64_t last) {
  typedef int32_t Eight __attribute__((vector_size(32)));
  constexpr int G = 16 / R;
  const Index* indices = static_cast<const Index*>(job.indices);
  int32_t tile[8 * 16] = {};
  for (int64_t i = first; i < last; i += G) {
    const int64_t blocks = last - i < G ? last - i : G;
    for (int64_t part = 0; part < blocks; ++part) {
      Eight acc[R];
      for (int r = 0; r < R; ++r) acc[r] = Eight{};
      for (int64_t q = job.pointers[i + part]; q < job.pointers[i + part + 1]; ++q)
        for (int j = 0; j < 4; ++j) {
          const int64_t column = R == 16 ? int64_t(indices[q]) * 4 + j : int64_t(indices[q * 4 + j]);
          const uint8_t* x = panel + (column / 4) * 32 + column % 4;
          const Eight inputs = {x[0], x[4], x[8], x[12], x[16], x[20], x[24], x[28]};
          const int8_t* w = job.values + q * R * 4 + j;
          for (int r = 0; r < R; ++r) acc[r] += inputs * int32_t(w[r * 4]);
        }
      for (int r = 0; r < R; ++r)
        for (int t = 0; t < 8; ++t) tile[t * 16 + part * R + r] = acc[r][t];
    }
    finish_sums(job, tile, at, i * R, blocks * R);
  }
}

inline void run_int(const IntJob& job, const float* panel, const Panel& at, int64_t first, int64_t last) {
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(panel);
  if (job.block == 16) return job.narrow_index ? sums<16, int16_t>(job, codes, at, first, last) : sums<16, int32_t>(job, codes, at, first, last);
  return job.narrow_index ? sums<4, int16_t>(job, codes, at, first, last) : sums<4, int32_t>(job, codes, at, first, last);
}

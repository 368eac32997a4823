// The float32 kernels. spmm.cpp includes this file once for each instruction set, in a namespace of its own, with LANES floats a vector.
//
// Two shapes of inner loop. `outer`: a vector holds the outputs of one block, each token of the panel adds (weights) x (its scalar).
// `inner`: a vector holds tokens, each output of the block adds (tokens) x (its weight). Both read the inputs from a panel
// [column][token], so that one kept column is one run of memory. Whatever the panel, an output adds its blocks in one fixed order.

constexpr int W = LANES;

template <int L>
struct Vec {
  typedef float type __attribute__((vector_size(4 * L)));
  typedef float load __attribute__((vector_size(4 * L), aligned(4), may_alias));
  typedef int32_t ints __attribute__((vector_size(4 * L)));
};

template <>
struct Vec<1> {
  typedef float type;
  typedef float load __attribute__((may_alias));
};

template <int L>
inline typename Vec<L>::type load(const float* p) {
  return *reinterpret_cast<const typename Vec<L>::load*>(p);
}

template <int L>
inline void store(float* p, typename Vec<L>::type v) {
  *reinterpret_cast<typename Vec<L>::load*>(p) = v;
}

// Rounds half to even; exact for |v| < 2^22.
template <class V>
inline V round_even(V v) {
  return (v + 12582912.f) - 12582912.f;
}

// x (1 + erf(x / sqrt 2)) / 2, erf by Abramowitz and Stegun 7.1.26 (error below 2e-7), exp by a polynomial on [-ln 2 / 2, ln 2 / 2].
template <int L>
inline typename Vec<L>::type gelu(typename Vec<L>::type x) {
  typedef typename Vec<L>::type V;
  typedef typename Vec<L>::ints I;
  V z = (x < 0 ? -x : x) * 0.70710678118654752f;
  V e = -z * z;
  e = e < -87.f ? V{} - 87.f : e;
  V n = round_even(e * 1.44269504088896341f);
  V r = (e - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = ((((1.3981999507e-3f * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r + 1.6666665459e-1f) * r + 0.5f) * r * r + r + 1.f;
  I power = (__builtin_convertvector(n, I) + 127) << 23;
  V exponential = p * (V)power;
  V t = 1.f / (1.f + 0.3275911f * z);
  V tail = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t * exponential;
  V phi = x < 0 ? 0.5f * tail : 1.f - 0.5f * tail;
  return x * phi;
}

template <int L>
inline typename Vec<L>::type activate(typename Vec<L>::type v, int act) {
  if (act == RELU) return v < 0 ? typename Vec<L>::type{} : v;
  if (act == GELU) return gelu<L>(v);
  return v;
}

// panel[column * stride + token] = x[token * ld + column]; tokens beyond the last are zero.
inline void pack(const float* x, int64_t ld, int64_t columns, int64_t tokens, int64_t stride, float* panel) {
  int64_t t = 0;
#if LANES >= 8
  for (; t + 8 <= tokens; t += 8) {
    const float* s = x + t * ld;
    int64_t k = 0;
    for (; k + 8 <= columns; k += 8) {
      __m256 q[8], u[8];
      for (int i = 0; i < 4; ++i) {
        q[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(s + i * ld + k)), _mm_loadu_ps(s + (i + 4) * ld + k), 1);
        q[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(s + i * ld + k + 4)), _mm_loadu_ps(s + (i + 4) * ld + k + 4), 1);
      }
      for (int h = 0; h < 8; h += 4) {
        u[0] = _mm256_unpacklo_ps(q[h], q[h + 1]);
        u[1] = _mm256_unpackhi_ps(q[h], q[h + 1]);
        u[2] = _mm256_unpacklo_ps(q[h + 2], q[h + 3]);
        u[3] = _mm256_unpackhi_ps(q[h + 2], q[h + 3]);
        float* p = panel + (k + h) * stride + t;
        _mm256_storeu_ps(p, _mm256_shuffle_ps(u[0], u[2], 0x44));
        _mm256_storeu_ps(p + stride, _mm256_shuffle_ps(u[0], u[2], 0xee));
        _mm256_storeu_ps(p + 2 * stride, _mm256_shuffle_ps(u[1], u[3], 0x44));
        _mm256_storeu_ps(p + 3 * stride, _mm256_shuffle_ps(u[1], u[3], 0xee));
      }
    }
    for (; k < columns; ++k)
      for (int i = 0; i < 8; ++i) panel[k * stride + t + i] = s[i * ld + k];
  }
#endif
#if defined(__SSE__)
  for (; t + 4 <= tokens; t += 4) {
    const float* s = x + t * ld;
    int64_t k = 0;
    for (; k + 4 <= columns; k += 4) {
      __m128 a = _mm_loadu_ps(s + k), b = _mm_loadu_ps(s + ld + k), c = _mm_loadu_ps(s + 2 * ld + k), d = _mm_loadu_ps(s + 3 * ld + k);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      float* p = panel + k * stride + t;
      _mm_storeu_ps(p, a);
      _mm_storeu_ps(p + stride, b);
      _mm_storeu_ps(p + 2 * stride, c);
      _mm_storeu_ps(p + 3 * stride, d);
    }
    for (; k < columns; ++k)
      for (int i = 0; i < 4; ++i) panel[k * stride + t + i] = s[i * ld + k];
  }
#endif
  for (; t < tokens; ++t)
    for (int64_t k = 0; k < columns; ++k) panel[k * stride + t] = x[t * ld + k];
  for (; t < stride; ++t)
    for (int64_t k = 0; k < columns; ++k) panel[k * stride + t] = 0.f;
}

// Four rows of `stride` floats become 4 consecutive floats of each of `tokens` output rows.
inline void transpose_out(const float* tile, int64_t stride, float* out, int64_t ld, int64_t tokens, int64_t width) {
  int64_t t = 0;
#if defined(__SSE__)
  if (width == 4) {
    for (; t + 4 <= tokens; t += 4) {
      __m128 a = _mm_loadu_ps(tile + t), b = _mm_loadu_ps(tile + stride + t);
      __m128 c = _mm_loadu_ps(tile + 2 * stride + t), d = _mm_loadu_ps(tile + 3 * stride + t);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      _mm_storeu_ps(out + t * ld, a);
      _mm_storeu_ps(out + (t + 1) * ld, b);
      _mm_storeu_ps(out + (t + 2) * ld, c);
      _mm_storeu_ps(out + (t + 3) * ld, d);
    }
  }
#endif
  for (; t < tokens; ++t)
    for (int64_t r = 0; r < width; ++r) out[t * ld + r] = tile[r * stride + t];
}

// tile (tokens, 16) -> rows [row, row + block) of the output; bias and activation on the way. The last block may be cut off.
__attribute__((noinline)) void finish_rows(const Job& job, const float* tile, const Panel& at, int64_t row, int64_t block) {
  const int64_t width = job.rows - row < block ? job.rows - row : block;
  float bias[16] = {}, whole[16] = {};
  if (job.bias)
    for (int64_t r = 0; r < width; ++r) bias[r] = job.bias[row + r];
  for (int64_t t = 0; t < at.tokens; ++t) {
    float* out = job.out + (at.begin + t) * job.rows + row;
    if (width % W == 0) {
      for (int64_t r = 0; r < width; r += W) store<W>(out + r, activate<W>(load<W>(tile + t * 16 + r) + load<W>(bias + r), job.act));
    } else {
      for (int64_t r = 0; r < width; ++r) whole[r] = tile[t * 16 + r];
      for (int64_t r = 0; r < width; r += W) store<W>(whole + r, activate<W>(load<W>(whole + r) + load<W>(bias + r), job.act));
      for (int64_t r = 0; r < width; ++r) out[r] = whole[r];
    }
  }
}

// tile (rows, stride of the panel), tokens side by side -> the same.
__attribute__((noinline)) void finish_columns(const Job& job, float* tile, const Panel& at, int64_t row, int64_t block) {
  const int64_t width = job.rows - row < block ? job.rows - row : block;
  if (job.bias || job.act)
    for (int64_t r = 0; r < width; ++r) {
      const float bias = job.bias ? job.bias[row + r] : 0.f;
      float* line = tile + r * at.stride;
      for (int64_t t = 0; t < at.stride; t += W) store<W>(line + t, activate<W>(load<W>(line + t) + bias, job.act));
    }
  float* out = job.out + at.begin * job.rows + row;
  for (int64_t r = 0; r < width; r += 4) transpose_out(tile + r * at.stride, at.stride, out + r, job.rows, at.tokens, width - r < 4 ? width - r : 4);
}

template <int R, int T, class Columns>
void outer(const Job& job, const Columns& columns, const float* panel, const Panel& at, int64_t first, int64_t last) {
  constexpr int L = R < W ? R : W, N = R / L, D = T * N < 4 ? 4 : 1, G = 16 / R;  // few sums: D chains of additions hide their latency
  typedef typename Vec<L>::type V;
  const int64_t stride = at.stride;
  float tile[T * 16];
  for (int64_t i = first; i < last; i += G) {
    const int64_t blocks = last - i < G ? last - i : G;
    for (int64_t part = 0; part < blocks; ++part) {
      V acc[D][T][N];
      for (int d = 0; d < D; ++d)
        for (int t = 0; t < T; ++t)
          for (int j = 0; j < N; ++j) acc[d][t][j] = V{};
      auto column = columns.start(i + part);
      const int64_t end = columns.end(i + part);
      int64_t p = columns.begin(i + part);
      for (; p + D <= end; p += D) {
#pragma GCC unroll 4
        for (int d = 0; d < D; ++d) {
          const float* x = panel + column.take(p + d) * stride;
          V weights[N];
#pragma GCC unroll 4
          for (int j = 0; j < N; ++j) weights[j] = load<L>(job.values + (p + d) * R + j * L);
#pragma GCC unroll 24
          for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) acc[d][t][j] += weights[j] * x[t];
        }
      }
      for (; D > 1 && p < end; ++p) {
        const float* x = panel + column.take(p) * stride;
        for (int t = 0; t < T; ++t)
          for (int j = 0; j < N; ++j) acc[0][t][j] += load<L>(job.values + p * R + j * L) * x[t];
      }
#pragma GCC unroll 24
      for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) {
          V v = acc[0][t][j];
          if (D == 4) v = (v + acc[D / 4][t][j]) + (acc[D / 2][t][j] + acc[D - 1][t][j]);
          store<L>(tile + t * 16 + part * R + j * L, v);
        }
    }
    finish_rows(job, tile, at, i * R, blocks * R);
  }
}

template <int R, int U, class Columns>
void inner(const Job& job, const Columns& columns, const float* panel, const Panel& at, int64_t first, int64_t last) {
  constexpr int S = U * W, G = R < 4 ? 4 : R, D = R == 1 ? 2 : 1;  // one row alone: two chains of additions hide their latency
  typedef typename Vec<W>::type V;
  float tile[G * S];
  for (int64_t i = first; i < last; i += G / R) {
    for (int64_t part = 0; part < G / R; ++part) {
      if (i + part >= last) break;
      V acc[D][R][U];
      for (int d = 0; d < D; ++d)
        for (int r = 0; r < R; ++r)
          for (int u = 0; u < U; ++u) acc[d][r][u] = V{};
      auto column = columns.start(i + part);
      const int64_t end = columns.end(i + part);
      int64_t p = columns.begin(i + part);
      for (; p + D <= end; p += D) {
#pragma GCC unroll 2
        for (int d = 0; d < D; ++d) {
          const float* x = panel + column.take(p + d) * S;
          const float* w = job.values + (p + d) * R;
          V inputs[U];
#pragma GCC unroll 4
          for (int u = 0; u < U; ++u) inputs[u] = load<W>(x + u * W);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u) acc[d][r][u] += inputs[u] * w[r];
        }
      }
      if (p < end) {
        const float* x = panel + column.take(p) * S;
        for (int r = 0; r < R; ++r)
          for (int u = 0; u < U; ++u) acc[0][r][u] += load<W>(x + u * W) * job.values[p * R + r];
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u) {
          V v = acc[0][r][u];
          if (D == 2) v += acc[D - 1][r][u];
          store<W>(tile + (part * R + r) * S + u * W, v);
        }
    }
    const int64_t blocks = last - i < G / R ? last - i : G / R;
    finish_columns(job, tile, at, i * R, blocks * R);
  }
}

// The next panel: how many of the `left` tokens it takes and which loop runs it (size > 0: outer with `size` tokens, < 0: inner).
inline Panel next_panel(int block, int64_t begin, int64_t left) {
  int64_t size, take, stride;
  constexpr int64_t few = W == 16 ? 8 : W == 8 ? 4 : 2;
  if (block >= 16 || left <= few) {
    constexpr int64_t widest = W == 16 ? 24 : W == 8 ? 6 : 3;
    size = left > 16 && block >= 16 ? widest : left > 8 && block >= 16 && W == 16 ? 16 : left > 4 && W == 16 ? 8 : left > 1 ? 4 : 1;
    if (W == 8 && block >= 16 && left > 4) size = 6;
    if (W == 4) size = block >= 16 && left > 1 ? 3 : left > 1 ? 2 : 1;
    take = left < size ? left : size;
    stride = size == 6 ? 8 : size == 3 ? 4 : size;
  } else {
    const int64_t most = block == 8 ? (W == 16 ? 2 : 1) : W == 16 ? 4 : 3;
    int64_t units = (left + W - 1) / W;
    if (units > most) units = most;
    if (units == 3 && W == 16) units = 4;
    size = -units;
    stride = units * W;
    take = left < stride ? left : stride;
  }
  return Panel{begin, take, stride, int(size)};
}

template <class Columns>
void multiply(const Job& job, const Columns& columns, const float* panel, const Panel& at, int64_t first, int64_t last) {
#define OUTER(R, T) \
  case T: return outer<R, T>(job, columns, panel, at, first, last);
#define INNER(R, U) \
  case -U: return inner<R, U>(job, columns, panel, at, first, last);
#if LANES == 16
#define WIDE(R) OUTER(R, 24) OUTER(R, 16) OUTER(R, 8) OUTER(R, 4) OUTER(R, 1)
#define SLIM(R) OUTER(R, 8) OUTER(R, 4) OUTER(R, 1) INNER(R, 1) INNER(R, 2)
#define MORE(R) INNER(R, 4)
#elif LANES == 8
#define WIDE(R) OUTER(R, 6) OUTER(R, 4) OUTER(R, 1)
#define SLIM(R) OUTER(R, 4) OUTER(R, 1) INNER(R, 1)
#define MORE(R) INNER(R, 2) INNER(R, 3)
#else
#define WIDE(R) OUTER(R, 3) OUTER(R, 1)
#define SLIM(R) OUTER(R, 2) OUTER(R, 1) INNER(R, 1)
#define MORE(R) INNER(R, 2) INNER(R, 3)
#endif
  switch (job.block) {
    case 1:
      switch (at.size) { SLIM(1) MORE(1) }
      break;
    case 4:
      switch (at.size) { SLIM(4) MORE(4) }
      break;
    case 8:
      switch (at.size) { SLIM(8) }
      break;
    case 16:
      switch (at.size) { WIDE(16) }
      break;
  }
#undef OUTER
#undef INNER
#undef WIDE
#undef SLIM
#undef MORE
}

inline void run(const Job& job, const float* panel, const Panel& at, int64_t first, int64_t last) {
  switch (job.kind) {
    case SHORT: return multiply(job, Single<int16_t>{job.pointers, static_cast<const int16_t*>(job.indices)}, panel, at, first, last);
    case LONG: return multiply(job, Single<int32_t>{job.pointers, static_cast<const int32_t*>(job.indices)}, panel, at, first, last);
    case DEEP: return multiply(job, Deep{job.pointers, static_cast<const int32_t*>(job.indices), job.depth}, panel, at, first, last);
    case GROUP: return multiply(job, Group{static_cast<const uint8_t*>(job.indices), job.each, job.depth, job.kept}, panel, at, first, last);
  }
}

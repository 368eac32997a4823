// The int8 kernels for AVX512-VNNI: `vpdpbusd` adds four uint8 x int8 products to each of sixteen int32. Panels, quads and finish_sums as in
// spmm_int8.h.
//
// 16 x 4: a quad's 64 weights are one vector (16 outputs, 4 columns each); each token's four codes are broadcast.
// 4 x 1: the four columns of a quad are anywhere. Their rows of 64 tokens are interleaved byte by byte in registers, so that each token's
// four codes stand together, and each output's four weights are broadcast.

inline Panel next_panel(int block, int64_t begin, int64_t left) {
  if (block == 4) return Panel{begin, left < 64 ? left : 64, 64, 64};
  const int64_t size = left > 16 ? 24 : left > 8 ? 16 : left > 4 ? 8 : left > 1 ? 4 : 1;
  return Panel{begin, left < size ? left : size, size, int(size)};
}

inline void pack(const uint8_t* codes, int64_t ld, int64_t groups, int64_t tokens, const Panel& at, float* panel) {
  avx512::pack(reinterpret_cast<const float*>(codes), ld / 4, groups, tokens, at.stride, panel);
  if (at.stride != 64) return;
  // [group][token][4 codes] -> [column][64 tokens], the tokens in the order that the interleaving below undoes.
  const __m512i by_column = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  for (int64_t g = 0; g < groups; ++g) {
    float* p = panel + g * 64;
    __m512i v[4];
    for (int i = 0; i < 4; ++i) v[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(p + i * 16), by_column);
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpacklo_epi32(v[2], v[3]);
    const __m512i c = _mm512_unpackhi_epi32(v[0], v[1]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    _mm512_storeu_si512(p, _mm512_unpacklo_epi64(a, b));
    _mm512_storeu_si512(p + 16, _mm512_unpackhi_epi64(a, b));
    _mm512_storeu_si512(p + 32, _mm512_unpacklo_epi64(c, d));
    _mm512_storeu_si512(p + 48, _mm512_unpackhi_epi64(c, d));
  }
}

template <int T, class Index>
void wide(const IntJob& job, const int32_t* panel, const Panel& at, int64_t first, int64_t last) {
  const Index* indices = static_cast<const Index*>(job.indices);
  int32_t tile[T * 16];
  for (int64_t i = first; i < last; ++i) {
    __m512i acc[T];
    for (int t = 0; t < T; ++t) acc[t] = _mm512_setzero_si512();
    for (int64_t q = job.pointers[i]; q < job.pointers[i + 1]; ++q) {
      const __m512i weights = _mm512_loadu_si512(job.values + q * 64);
      const int32_t* x = panel + int64_t(indices[q]) * T;
#pragma GCC unroll 24
      for (int t = 0; t < T; ++t) acc[t] = _mm512_dpbusd_epi32(acc[t], _mm512_set1_epi32(x[t]), weights);
    }
#pragma GCC unroll 24
    for (int t = 0; t < T; ++t) _mm512_storeu_si512(tile + t * 16, acc[t]);
    avx512::finish_sums(job, tile, at, i * 16, 16);
  }
}

template <class Index>
void tall(const IntJob& job, const uint8_t* panel, const Panel& at, int64_t first, int64_t last) {
  const Index* indices = static_cast<const Index*>(job.indices);
  int32_t tile[64 * 16], lines[4 * 64];
  for (int64_t i = first; i < last; i += 4) {
    const int64_t blocks = last - i < 4 ? last - i : 4;
    for (int64_t part = 0; part < blocks; ++part) {
      __m512i acc[4][4];
      for (int r = 0; r < 4; ++r)
        for (int u = 0; u < 4; ++u) acc[r][u] = _mm512_setzero_si512();
      for (int64_t q = job.pointers[i + part]; q < job.pointers[i + part + 1]; ++q) {
        __m512i c[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) c[j] = _mm512_loadu_si512(panel + int64_t(indices[q * 4 + j]) * 64);
        const __m512i low = _mm512_unpacklo_epi8(c[0], c[1]), high = _mm512_unpackhi_epi8(c[0], c[1]);
        const __m512i low2 = _mm512_unpacklo_epi8(c[2], c[3]), high2 = _mm512_unpackhi_epi8(c[2], c[3]);
        const __m512i inputs[4] = {_mm512_unpacklo_epi16(low, low2), _mm512_unpackhi_epi16(low, low2),
                                   _mm512_unpacklo_epi16(high, high2), _mm512_unpackhi_epi16(high, high2)};
        int32_t weights[4];
        __builtin_memcpy(weights, job.values + q * 16, 16);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
          for (int u = 0; u < 4; ++u) acc[r][u] = _mm512_dpbusd_epi32(acc[r][u], inputs[u], _mm512_set1_epi32(weights[r]));
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) _mm512_storeu_si512(lines + r * 64 + u * 16, acc[r][u]);
      for (int64_t t = 0; t < 64; t += 4) {
        const int32_t* s = lines + t;
        const __m128i a = _mm_loadu_si128((const __m128i*)s), b = _mm_loadu_si128((const __m128i*)(s + 64));
        const __m128i e = _mm_loadu_si128((const __m128i*)(s + 128)), f = _mm_loadu_si128((const __m128i*)(s + 192));
        const __m128i ab = _mm_unpacklo_epi32(a, b), ef = _mm_unpacklo_epi32(e, f);
        const __m128i ab2 = _mm_unpackhi_epi32(a, b), ef2 = _mm_unpackhi_epi32(e, f);
        int32_t* o = tile + t * 16 + part * 4;
        _mm_storeu_si128((__m128i*)o, _mm_unpacklo_epi64(ab, ef));
        _mm_storeu_si128((__m128i*)(o + 16), _mm_unpackhi_epi64(ab, ef));
        _mm_storeu_si128((__m128i*)(o + 32), _mm_unpacklo_epi64(ab2, ef2));
        _mm_storeu_si128((__m128i*)(o + 48), _mm_unpackhi_epi64(ab2, ef2));
      }
    }
    avx512::finish_sums(job, tile, at, i * 4, blocks * 4);
  }
}

template <class Index>
void run_with(const IntJob& job, const float* panel, const Panel& at, int64_t first, int64_t last) {
  const int32_t* groups = reinterpret_cast<const int32_t*>(panel);
  if (job.block == 4) return tall<Index>(job, reinterpret_cast<const uint8_t*>(panel), at, first, last);
  switch (at.size) {
    case 24: return wide<24, Index>(job, groups, at, first, last);
    case 16: return wide<16, Index>(job, groups, at, first, last);
    case 8: return wide<8, Index>(job, groups, at, first, last);
    case 4: return wide<4, Index>(job, groups, at, first, last);
    default: return wide<1, Index>(job, groups, at, first, last);
  }
}

inline void run(const IntJob& job, const float* panel, const Panel& at, int64_t first, int64_t last) {
  return job.narrow_index ? run_with<int16_t>(job, panel, at, first, last) : run_with<int32_t>(job, panel, at, first, last);
}

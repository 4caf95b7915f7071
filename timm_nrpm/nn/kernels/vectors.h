// Vectors of float32 for AVX-512, AVX2 and everything else, and what their instruction sets do best.

#pragma once

#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Int __attribute__((vector_size(LANES * 4)));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef float Loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Loose*>(p) = v; }

// The first n numbers of a vector; the others are 0.
inline Vec load(const float* p, int64_t n) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps((1u << n) - 1, p);
#else
  if (n == LANES) return load(p);
  Vec v = {};
  for (int64_t i = 0; i < n; i++) v[i] = p[i];
  return v;
#endif
}

inline void store(float* p, Vec v, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v);
#else
  if (n == LANES) return store(p, v);
  for (int64_t i = 0; i < n; i++) p[i] = v[i];
#endif
}

// For a few dozen floats, a call of memcpy would cost more than the copy.
inline void copy(float* to, const float* from, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
#if defined(__AVX512F__)
  store(to + i, load(from + i, n - i), n - i);
#else
  for (; i < n; i++) to[i] = from[i];
#endif
}

inline void add(float* to, const float* from, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, load(to + i) + load(from + i));
#if defined(__AVX512F__)
  store(to + i, load(to + i, n - i) + load(from + i, n - i), n - i);
#else
  for (; i < n; i++) to[i] += from[i];
#endif
}

inline Vec magnitude(Vec v) { return (Vec)((Int)v & 0x7fffffff); }

// 1 / v to float32 accuracy: an approximation to 14 (AVX-512) or 12 bits, and one Newton step, which doubles the bits.
// Sharing one reciprocal between two products, 1 / a = b / (a b), was 15 % faster when measured, but it overflows from
// distances of 1e19 on, and is no faster when scaled so that it does not. Without the Newton step the limit of the forward
// pass was 1.46 times higher, but sums were off by 2e-5 and gradients by 2e-4 at any depth: distances that are equal, such
// as those of zeros, have equal errors, which do not average out.
inline Vec reciprocal(Vec v) {
#if defined(__AVX512F__)
  Vec r = (Vec)_mm512_rcp14_ps((__m512)v);
  return r + r * (1.0f - v * r);
#elif defined(__AVX2__)
  Vec r = (Vec)_mm256_rcp_ps((__m256)v);
  return r + r * (1.0f - v * r);
#else
  return 1.0f / v;
#endif
}

// base + v where t > 0, base - v where t < 0, base where t = 0.
inline Vec add_with_sign(Vec base, Vec v, Vec t) {
#if defined(__AVX512F__)
  const __mmask16 apart = _mm512_cmp_ps_mask((__m512)t, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  const __m512i sign = _mm512_set1_epi32((int32_t)0x80000000);
  const __m512i flipped = _mm512_ternarylogic_epi32((__m512i)v, (__m512i)t, sign, 0x78);  // v ^ (t & sign)
  return (Vec)_mm512_mask_add_ps((__m512)base, apart, (__m512)base, _mm512_castsi512_ps(flipped));
#else
  const Int flipped = (Int)v ^ ((Int)t & (int32_t)0x80000000);
  return base + (Vec)(flipped & (Int)(t != 0.0f));
#endif
}

// v * sign(t), which is 0 where t = 0.
inline Vec times_sign(Vec v, Vec t) {
#if defined(__AVX512F__)
  const __m512i signs = _mm512_set1_epi32((int32_t)0xA9A9A822);  // -1, 0 or 1 by the class of t, NaN for NaN
  return v * (Vec)_mm512_fixupimm_ps((__m512)t, (__m512)t, signs, 0);
#else
  return add_with_sign(Vec{}, v, t);
#endif
}

inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
#endif
}

inline bool has_zero(Bits v) {
#if defined(__AVX512F__)
  return _mm512_testn_epi32_mask((__m512i)v, (__m512i)v);
#else
  const Int zero = v == 0;
  int32_t any = 0;
  for (int i = 0; i < LANES; i++) any |= zero[i];
  return any;
#endif
}

// Adds the sums of four vectors to four numbers.
inline void add_sums(const Vec (&v)[4], float* const (&to)[4], int64_t at) {
#if defined(__AVX512F__)
  const auto pairs = [](Vec a, Vec b) {
    return _mm512_castps_pd(_mm512_unpacklo_ps((__m512)a, (__m512)b) + _mm512_unpackhi_ps((__m512)a, (__m512)b));
  };
  const __m512d ab = pairs(v[0], v[1]), cd = pairs(v[2], v[3]);
  const __m512 all = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)) + _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
  const __m256 half = _mm512_castps512_ps256(all) + _mm512_extractf32x8_ps(all, 1);
  const __m128 sums = _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
  for (int i = 0; i < 4; i++) to[i][at] += sums[i];
#else
  for (int i = 0; i < 4; i++) to[i][at] += sum(v[i]);
#endif
}

}  // namespace

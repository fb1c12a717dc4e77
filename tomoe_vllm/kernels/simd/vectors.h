// Vectors of floats and the activations, for all CPU kernels: AVX-512, or the compiler's portable vectors of 8 floats
// (AVX2 with -mavx2). float32 only; sums in one fixed order for each number of lanes.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#ifdef __AVX2__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own headers
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "tuning.h"

namespace tomoe {

#ifdef __AVX512F__
using Vec = __m512;

inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float value) { return _mm512_set1_ps(value); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline void store_first(float* p, Vec v, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

// Sums of four vectors. The tree is the same for each of the four, so a sum does not depend on its index.
inline void sum4(const Vec* v, float* out) {
  const Vec ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const Vec cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const Vec abcd = _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
#else
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));

inline Vec zero() { return Vec{}; }
inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline size_t bytes_of(int64_t n) {  // of the first n floats of a vector
  if (n < 0 || n > kLanes) __builtin_unreachable();
  return n * sizeof(float);
}
inline Vec load_first(const float* p, int64_t n) {
  Vec v{};
  std::memcpy(&v, p, bytes_of(n));
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline void store_first(float* p, Vec v, int64_t n) { std::memcpy(p, &v, bytes_of(n)); }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }  // contracted to one instruction where there is one

#if defined(__AVX2__) && TOMOE_LANES == 8
// Not Vec{} + value: GCC then loads a scalar and broadcasts it from a register, on a port of the fmas.
inline Vec broadcast(float value) { return Vec{value, value, value, value, value, value, value, value}; }

inline void sum4(const Vec* v, float* out) {
  const Vec abcd = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}
#else
inline Vec broadcast(float value) { return Vec{} + value; }

inline void sum4(const Vec* v, float* out) {
  for (int i = 0; i < 4; ++i) {
    Vec sums = v[i];
    for (int step = 1; step < kLanes; step *= 2)
      for (int lane = 0; lane < kLanes; lane += 2 * step) sums[lane] += sums[lane + step];
    out[i] = sums[0];
  }
}
#endif
#endif

// ------------------------------------------------------------------------------------------ activations
// exp(x) with a relative error of about 1e-7, clamped to [-87, 88] (a polynomial, as in Cephes). Without a call or a
// branch, so that the compiler vectorizes loops over it.
inline float exp_approx(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  const float n = std::floor(x * 1.44269504f + 0.5f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * __builtin_bit_cast(float, (static_cast<int32_t>(n) + 127) << 23);
}

enum class Activation { kSilu, kRelu, kGelu, kGeluTanh };

// By Hugging Face's hidden_act: the names of ACTIVATIONS in expert_activation/reference.py.
constexpr std::pair<const char*, Activation> kActivations[] = {
    {"silu", Activation::kSilu},          {"relu", Activation::kRelu},
    {"gelu", Activation::kGelu},          {"gelu_new", Activation::kGeluTanh},
    {"gelu_fast", Activation::kGeluTanh}, {"gelu_pytorch_tanh", Activation::kGeluTanh},
};

template <Activation A>
inline float activate(float x) {
  if constexpr (A == Activation::kSilu) return x / (1.0f + exp_approx(-x));
  if constexpr (A == Activation::kRelu) return x > 0.0f ? x : 0.0f;
  if constexpr (A == Activation::kGelu) return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
  const float y = 0.79788456f * (x + 0.044715f * x * x * x);
  return x - x / (exp_approx(2.0f * y) + 1.0f);  // 0.5 (1 + tanh y) = 1 - 1 / (e^2y + 1)
}

// Calls ``use`` with the activation as its template argument.
template <typename Use>
void with_activation(Activation activation, Use use) {
  switch (activation) {
    case Activation::kSilu:
      return use.template operator()<Activation::kSilu>();
    case Activation::kRelu:
      return use.template operator()<Activation::kRelu>();
    case Activation::kGelu:
      return use.template operator()<Activation::kGelu>();
    case Activation::kGeluTanh:
      return use.template operator()<Activation::kGeluTanh>();
  }
}

}  // namespace tomoe

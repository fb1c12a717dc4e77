// Vectors of floats for the CPU kernels: AVX-512, or GCC's portable vectors of 8 floats (AVX2 with -mavx2).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace tomoe {

// Floats in a vector. Portable vectors may have as many as AVX-512's, so that its tiles can be tested anywhere.
#ifndef TOMOE_LANES
#ifdef __AVX512F__
#define TOMOE_LANES 16
#else
#define TOMOE_LANES 8
#endif
#endif
constexpr int kWidth = TOMOE_LANES;

// What was measured best on each: the sizes of tiles.
#if TOMOE_LANES == 16
// 32 registers: a tile of 24 sums leaves room for its operands.
constexpr int kDotTokens = 4, kDotRows = 6, kLoneDotRows = 12, kLaneVecs = 4, kDownVecs = 4;
#else
// 16 registers under AVX2: a tile of 12 sums leaves room for its operands.
constexpr int kDotTokens = 3, kDotRows = 4, kLoneDotRows = 8, kLaneVecs = 2, kDownVecs = 2;
#endif
constexpr int kLaneRows = 6, kDownTokens = 6;

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

// Sums of four vectors. The tree is the same for each of the four, so a sum does not depend on its place.
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
typedef float Vec __attribute__((vector_size(kWidth * sizeof(float))));

inline Vec zero() { return Vec{}; }
inline Vec load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
inline Vec load_first(const float* p, int64_t n) { Vec v{}; std::memcpy(&v, p, n * sizeof(float)); return v; }
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline void store_first(float* p, Vec v, int64_t n) { std::memcpy(p, &v, n * sizeof(float)); }
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
    for (int step = 1; step < kWidth; step *= 2)
      for (int lane = 0; lane < kWidth; lane += 2 * step) sums[lane] += sums[lane + step];
    out[i] = sums[0];
  }
}
#endif
#endif

// ------------------------------------------------------------------------------------------ activations
// exp(x) to about 1e-7, without a call or a branch so that loops over it become vector code.
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
    {"silu", Activation::kSilu},          {"relu", Activation::kRelu},          {"gelu", Activation::kGelu},
    {"gelu_new", Activation::kGeluTanh},  {"gelu_fast", Activation::kGeluTanh}, {"gelu_pytorch_tanh", Activation::kGeluTanh},
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
    case Activation::kSilu: return use.template operator()<Activation::kSilu>();
    case Activation::kRelu: return use.template operator()<Activation::kRelu>();
    case Activation::kGelu: return use.template operator()<Activation::kGelu>();
    case Activation::kGeluTanh: return use.template operator()<Activation::kGeluTanh>();
  }
}

}  // namespace tomoe

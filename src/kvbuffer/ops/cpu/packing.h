// Packing into the layouts of gemm.h: weights once, rows of activations per call.
#pragma once
#include "gemm.h"

namespace kvb {

// Packs `count` <= kBlock columns of one row, zero padded.
template <class C>
static inline void pack_row_block(C, const float* from, int64_t count, float, typename C::Row* to) {
  for (int i = 0; i < C::kBlock; ++i) from_float(i < count ? from[i] : 0.f, to + i);
}
#if defined(__AVX512BF16__)
static inline void pack_row_block(PairDot, const float* from, int64_t count, float, bf16* to) {
  float x[PairDot::kBlock] = {};
  std::memcpy(x, from, count * sizeof(float));
  const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(load(x)));
  std::memcpy(to, &rounded, sizeof(rounded));
}
#endif
#if defined(__AVX512FP16__)
// 2^n for n within the exponents of normal numbers.
static inline float power_of_two(int n) {
  const uint32_t bits = static_cast<uint32_t>(n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return power;
}

static inline void pack_row_block(Half, const float* from, int64_t count, float weight_scale, half* to) {
  float x[Half::kBlock] = {};
  std::memcpy(x, from, count * sizeof(float));
  // Without their signs, floats are ordered as their bits are.
  VecI largest{};
  for (int i = 0; i < Half::kBlock; i += kLanes) {
    const VecI bits = (VecI)load(x + i) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  int32_t lane[kLanes];
  std::memcpy(lane, &largest, sizeof(lane));
  const int exponent = std::max((*std::max_element(lane, lane + kLanes) >> 23) - 127, -110);  // below: zeros
  const float to_half = power_of_two(7 - exponent), scale = weight_scale * power_of_two(exponent - 7);
  for (int i = 0; i < Half::kBlock; i += kLanes) {
    const __m256i rounded = _mm512_maskz_cvtps_ph(kAll, reinterpret_cast<__m512>(load(x + i) * to_half), 0);
    std::memcpy(to + i, &rounded, sizeof(rounded));
  }
  std::memcpy(to + Half::kBlock, &scale, sizeof(scale));
}
#endif

// Packs rows of k columns; row(i) points to row i.
template <class C, class RowAt>
static void pack_rows(const Tiles& tiles, RowAt row, int64_t k, float weight_scale, typename C::Row* packed) {
  for (int64_t t = 0; t < tiles.count; ++t)
    for (int64_t begin = 0; begin < k; begin += C::kBlock)
      for (int64_t r = 0; r < tiles.size(t); ++r, packed += C::kRowBlock) {
        const float* from = row(tiles.begin(t) + r) + begin;
        // Two calls, so that the common one has a constant count.
        if (k - begin >= C::kBlock)
          pack_row_block(C{}, from, C::kBlock, weight_scale, packed);
        else
          pack_row_block(C{}, from, k - begin, weight_scale, packed);
      }
}

static inline void store_weight(float w, bf16* to) { from_float(w, to); }
#if defined(__AVX512FP16__)
static inline void store_weight(float w, half* to) { *to = static_cast<half>(w); }
#endif

// Packs rows [0, rows) of a row-major weight, divided by weight_scale, into one panel; outputs and columns beyond the
// weight are zero.
template <class C>
static inline void pack_panel(C, const bf16* weight, int64_t rows, int64_t k, float weight_scale,
                              typename C::Element* panel) {
  const float factor = 1.f / weight_scale;
  for (int64_t i = 0; i < padded_k<C>(k); i += 2)
    for (int64_t n = 0; n < kPanel; ++n)
      for (int64_t j = i; j < i + 2; ++j)
        store_weight(n < rows && j < k ? to_float(weight[n * k + j]) * factor : 0.f, panel++);
}
static inline void pack_panel(Float32, const float* weight, int64_t rows, int64_t k, float, float* panel) {
  for (int64_t i = 0; i < padded_k<Float32>(k); ++i)
    for (int64_t n = 0; n < kPanel; ++n) *panel++ = n < rows && i < k ? weight[n * k + i] : 0.f;
}

}  // namespace kvb

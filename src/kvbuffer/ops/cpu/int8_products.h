// Products of vectors with the rows of an int8 state in integer arithmetic (AVX-512 VNNI).
//
// A conversion to float32 and a multiply-add per element is more than two cores do while memory brings the next one.
// Here two rows are multiplied at once: vectors become 16-bit integers relative to their largest element, products are
// summed exactly in 32 bits, and the sum is scaled at the end. What that rounds is 2^-16 of the largest term, a hundredth
// of what rounding the state to 8 bits has cost.
#pragma once
#include "rows.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define KVB_INT8_PRODUCTS

namespace kvb {

// Rows whose products fit in 32 bits.
constexpr int64_t kIntegerRows = 512;
// Columns that are worked on together.
constexpr int64_t kIntegerColumns = 32;

// Elements 2 i and 2 i + 1 of a vector [padded(n)], as 16-bit integers of one word each. Its vectors of kLanes elements
// are `stride` apart. Returns what one unit is worth.
static inline float quantise_pairs(const float* x, int64_t stride, int64_t n, int32_t* pairs) {
  VecI largest{};
  for (int64_t i = 0; i * kLanes < n; ++i) {
    const VecI size = (VecI)load(x + i * stride) & 0x7fffffff;
    largest = size > largest ? size : largest;
  }
  const float unit = hmax(largest) / 32767.f, inverse = unit > 0.f ? 1.f / unit : 0.f;
  for (int64_t i = 0; i * kLanes < n; ++i) {
    const __m512 units = (__m512)(load(x + i * stride) * inverse);
    const __m256i words = _mm512_maskz_cvtsepi32_epi16(0xffff, _mm512_maskz_cvtps_epi32(0xffff, units));
    std::memcpy(pairs + i * kLanes / 2, &words, sizeof(words));
  }
  return unit;
}

// sums += the products of two rows' elements with one pair. GCC has the intrinsic's result in another register than the
// sums it is given, and copies all of them with every row.
static inline __m512i add_pair_products(__m512i sums, __m512i rows, __m512i pair) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(rows), "v"(pair));
  return sums;
}

// out[x] += sum over r < n <= kIntegerRows of x[r] * rows[r], as add_products; V is a multiple of kIntegerColumns.
//
//   pairs  [NX, kIntegerRows / 2]  of quantise_pairs
//   units  [NX]
template <int NX>
KVB_SINGLE_COPY void add_integer_products(const int8_t* rows, int64_t n, int64_t V, const int32_t* pairs,
                                          const float* units, float* const* out, Ahead& ahead) {
  // Unpacking leaves columns 0 to 3, 8 to 11, ... in `low` and the others in `high`.
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  constexpr int kBlocks = NX <= 3 ? 4 : NX <= 6 ? 2 : 1;  // of columns: their sums stay in registers
  const auto columns = [&](int64_t c, auto blocks) {
    constexpr int NB = decltype(blocks)::value;
    __m512i low[NX][NB], high[NX][NB];
#pragma GCC unroll 16
    for (int x = 0; x < NX; ++x)
#pragma GCC unroll 4
      for (int b = 0; b < NB; ++b) low[x][b] = high[x][b] = _mm512_setzero_si512();
    const int8_t* row = rows + c;
    for (int64_t r = 0; r < n; r += 2, row += 2 * V) {
      ahead.step();
      ahead.step();
      const int8_t* next = r + 1 < n ? row + V : row;  // beside an element that is zero
#pragma GCC unroll 4
      for (int b = 0; b < NB; ++b) {
        const auto widened = [&](const int8_t* p) {
          __m256i bytes;
          std::memcpy(&bytes, p + b * kIntegerColumns, sizeof(bytes));
          return _mm512_cvtepi8_epi16(bytes);
        };
        const __m512i one = widened(row), other = widened(next);
        const __m512i lows = _mm512_unpacklo_epi16(one, other), highs = _mm512_unpackhi_epi16(one, other);
#pragma GCC unroll 16
        for (int x = 0; x < NX; ++x) {
          const __m512i factor = _mm512_set1_epi32(pairs[x * (kIntegerRows / 2) + r / 2]);
          low[x][b] = add_pair_products(low[x][b], lows, factor);
          high[x][b] = add_pair_products(high[x][b], highs, factor);
        }
      }
    }
#pragma GCC unroll 16
    for (int x = 0; x < NX; ++x)
#pragma GCC unroll 4
      for (int b = 0; b < NB; ++b) {
        float* to = out[x] + c + b * kIntegerColumns;
        const auto add = [&](float* p, __m512i order) {
          const __m512i sums = _mm512_permutex2var_epi32(low[x][b], order, high[x][b]);
          store(p, load(p) + units[x] * __builtin_convertvector((VecI)sums, Vec));
        };
        add(to, first);
        add(to + kLanes, second);
      }
  };
  int64_t c = 0;
  for (; c + kBlocks * kIntegerColumns <= V; c += kBlocks * kIntegerColumns)
    columns(c, std::integral_constant<int, kBlocks>());
  for (; c < V; c += kIntegerColumns) columns(c, std::integral_constant<int, 1>());
}

}  // namespace kvb
#endif

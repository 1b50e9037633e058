// Fixed-width float vectors on the compiler's vector extensions: one source for AVX-512, AVX2, NEON and plain C++.
// Kernels are written against Vec (kLanes float32 lanes); bfloat16 is storage only and widened on load.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define KVB_SINGLE_COPY __attribute__((noinline))
#else
#define KVB_SINGLE_COPY __attribute__((noinline, noclone))
#endif

namespace kvb {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));
typedef int16_t VecS __attribute__((vector_size(kLanes * 2)));
typedef int8_t VecB __attribute__((vector_size(kLanes)));

struct bf16 {
  uint16_t bits;
};

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// Round to nearest even; NaN stays NaN (the quiet bit is set so that truncation cannot make it an infinity).
static inline void from_float(float f, float* out) { *out = f; }
static inline void from_float(float f, bf16* out) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? ((u >> 16) | 0x40u) : rounded);
}

// While one of these lives, its thread treats denormal numbers as zero. Decays drive states and records through the
// denormal range, where some CPUs compute a hundred times slower; nothing that small reaches an output.
class FlushDenormals {
 public:
#if defined(__SSE__)
  FlushDenormals() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8040); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (1ull << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#else
  FlushDenormals() {}
#endif
};

// Subtracting zero changes no value, so it compiles to a bare broadcast; adding zero would turn -0 into +0.
static inline Vec splat(float x) { return x - Vec{}; }

// A value that stays in its register: GCC would rather load it again for each use, and loads are what runs out first.
static inline Vec held(Vec x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__AVX__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

static inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// Integers widened on load: one instruction, which GCC does not find for __builtin_convertvector. (The masked forms,
// with all lanes taken, spare a false warning of GCC 12.)
#if defined(__AVX512F__)
static inline VecU widen(VecH x) { return (VecU)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x); }
static inline VecI widen(VecB x) { return (VecI)_mm512_maskz_cvtepi8_epi32(0xffff, (__m128i)x); }
#elif defined(__AVX2__)
static inline VecU widen(VecH x) { return (VecU)_mm256_cvtepu16_epi32((__m128i)x); }
static inline VecI widen(VecB x) { return (VecI)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)x)); }
#else
static inline VecU widen(VecH x) { return __builtin_convertvector(x, VecU); }
static inline VecI widen(VecB x) { return __builtin_convertvector(__builtin_convertvector(x, VecS), VecI); }
#endif

static inline Vec load(const bf16* p) {
  VecH h;
  std::memcpy(&h, p, sizeof(h));
  return (Vec)(widen(h) << 16);  // same size: the bits are kept
}
static inline Vec load(const int8_t* p) {
  VecB b;
  std::memcpy(&b, p, sizeof(b));
  return __builtin_convertvector(widen(b), Vec);
}
static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

// Round to nearest even. The one instruction, where there is one, stores denormal numbers as zero.
#if defined(__AVX512BF16__)
static inline void store(bf16* p, Vec v) {
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &h, sizeof(h));
}
#else
static inline void store(bf16* p, Vec v) {
  VecU u = (VecU)v;
  VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  VecU quiet = (u >> 16) | 0x40u;
  VecU is_nan = (VecU)((u & 0x7fffffffu) > 0x7f800000u);
  VecH h = __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), VecH);
  std::memcpy(p, &h, sizeof(h));
}
#endif

// Rounds to nearest, elements of absolute value below 128.
static inline void store(int8_t* p, Vec v) {
#if defined(__AVX512F__)
  const __m128i b = _mm512_maskz_cvtepi32_epi8(0xffff, _mm512_maskz_cvtps_epi32(0xffff, (__m512)v));
#else
  // Added to a small float, 1.5 * 2^23 leaves it rounded to an integer in the lowest bits.
  const Vec shift = splat(12582912.f);
  const VecI rounded = (VecI)(v + shift) - (VecI)shift;
  const VecB b = __builtin_convertvector(__builtin_convertvector(rounded, VecS), VecB);
#endif
  std::memcpy(p, &b, sizeof(b));
}

// 2 * kLanes elements in the order that takes the fewest instructions: one after the other, but bfloat16 those of even
// number first, as the halves of 32-bit words. `in_order` undoes it.
template <class T>
inline void load_pair(const T* p, Vec& first, Vec& second) {
  first = load(p);
  second = load(p + kLanes);
}
static inline void load_pair(const bf16* p, Vec& even, Vec& odd) {
  VecU words;
  std::memcpy(&words, p, sizeof(words));
  even = (Vec)(words << 16);
  odd = (Vec)(words & 0xffff0000u);
}

#if defined(__clang__)
#define KVB_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define KVB_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VecI{__VA_ARGS__})
#endif

template <class T>
inline void in_order(Vec& first, Vec& second) {
  if constexpr (!std::is_same<T, bf16>::value) return;
#if defined(__AVX512F__)
  const Vec low = KVB_SHUFFLE(first, second, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const Vec high = KVB_SHUFFLE(first, second, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX__)
  const Vec low = KVB_SHUFFLE(first, second, 0, 8, 1, 9, 2, 10, 3, 11);
  const Vec high = KVB_SHUFFLE(first, second, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  const Vec low = KVB_SHUFFLE(first, second, 0, 4, 1, 5), high = KVB_SHUFFLE(first, second, 2, 6, 3, 7);
#endif
  first = low;
  second = high;
}

// Lanes summed pairwise, always in the same order.
static inline float hsum(Vec v) {
  float lane[kLanes];
  store(lane, v);
#pragma GCC unroll 4
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

// Of two vectors in groups of 2 * kWidth lanes: each group folded to its half, groups of the two in turns.
template <int kWidth, int... kLane>
inline __attribute__((always_inline)) Vec folded_halves(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  const Vec low = KVB_SHUFFLE(a, b, (kLane / kWidth % 2 * kLanes + kLane / kWidth / 2 * 2 * kWidth + kLane % kWidth)...);
  const Vec high =
      KVB_SHUFFLE(a, b, (kLane / kWidth % 2 * kLanes + kLane / kWidth / 2 * 2 * kWidth + kLane % kWidth + kWidth)...);
  return low + high;
}
// Lane i is hsum(v(i)), for i < kLanes as a constant.
template <int kWidth = 1, int kFirst = 0, class F>
inline __attribute__((always_inline)) Vec hsum_each(F&& v) {
  if constexpr (kWidth == kLanes)
    return v(std::integral_constant<int, kFirst>());
  else
    return folded_halves<kWidth>(hsum_each<2 * kWidth, kFirst>(v), hsum_each<2 * kWidth, kFirst + kWidth>(v),
                                 std::make_integer_sequence<int, kLanes>());
}

// The larger of each lane and the one across, of two that differ in the bit kWidth of their number.
template <int kWidth, int... kLane>
inline VecI larger_across(VecI v, std::integer_sequence<int, kLane...>) {
  const VecI across = (VecI)KVB_SHUFFLE((Vec)v, (Vec)v, (kLane ^ kWidth)...);
  return v > across ? v : across;
}
// The largest lane of a vector without negative ones: such floats are ordered as their bits are.
template <int kWidth = kLanes / 2>
inline float hmax(VecI bits) {
  if constexpr (kWidth == 0)
    return ((Vec)bits)[0];
  else
    return hmax<kWidth / 2>(larger_across<kWidth>(bits, std::make_integer_sequence<int, kLanes>()));
}

// exp(x) to about 2 ulp: 2^n * p(r) after the Cephes range reduction; saturates instead of overflowing.
static inline Vec vexp(Vec x) {
  const Vec lo = splat(-87.33654f), hi = splat(88.37626f);
  x = x < lo ? lo : x;
  x = x > hi ? hi : x;
  Vec t = x * splat(1.44269504f);
  VecI n = __builtin_convertvector(t + (t < splat(0.f) ? splat(-0.5f) : splat(0.5f)), VecI);
  Vec f = __builtin_convertvector(n, Vec);
  Vec r = x - f * splat(0.693359375f) - f * splat(-2.12194440e-4f);
  Vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.f);
  VecI bits = (n + 127) << 23;
  return p * (Vec)bits;
}
static inline Vec sigmoid(Vec x) { return splat(1.f) / (splat(1.f) + vexp(-x)); }
static inline Vec silu(Vec x) { return x * sigmoid(x); }

static inline float sigmoid(float x) { return 1.f / (1.f + std::exp(-x)); }
static inline float softplus(float x) { return x > 20.f ? x : std::log1p(std::exp(x)); }

}  // namespace kvb

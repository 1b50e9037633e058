// Dense layers y = x Wᵀ + b on weights packed once (layouts and the order of the sums: gemm.h).
//
//   name    shape                                   dtype            access
//   weight  [N, K]                                  model            read (kvb_linear_pack)
//   packed  [ceil(N / kPanel), padded K, kPanel]    C::Element       written by kvb_linear_pack, read by kvb_linear
//   x       [M, K], row stride x_stride             float32          read
//   bias    [N] or null                             float32          read
//   out     [M, N], row stride out_stride           float32          written
//
//   norm    [K] or [norm_dim]                       float32          read: the factor itself
//
// weight_scale is the power of two by which the packed weights were divided (1 unless computed in float16). A norm in
// front of the layer is part of the same call: between two products, a call costs as much as the norm.
#include <chrono>

#include "dense.h"
#include "norm.h"
#include "operators.h"

namespace kvb {

// A layer as the C interface passes it.
struct Layer {
  const void* packed;
  const float* bias;
  int64_t n, k;
  float weight_scale;
  int32_t compute;
};

namespace {  // names of this file: two files may use the same one

template <class Run>
static void with_layer(const Layer& layer, Run run) {
  with_compute(layer.compute, [&](auto c) {
    using C = decltype(c);
    run(Dense<C>{static_cast<const typename C::Element*>(layer.packed), layer.weight_scale, layer.k,
                 ceil_div(layer.n, kPanel)});
  });
}

// Stores rows of sums, with the bias, into out.
struct Output {
  float* out;
  int64_t stride, n;
  const float* bias;

  void operator()(int64_t row, int64_t panel, float* sums, int64_t) const {
    const int64_t column = panel * kPanel, columns = std::min<int64_t>(kPanel, n - column);
    for (int64_t i = 0; bias && i < columns; ++i) sums[i] += bias[column + i];
    store_columns(sums, columns, out + row * stride + column);
  }
};

template <class C>
static void linear(const float* x, int64_t x_stride, int64_t m, const Dense<C>& w, const Output& output) {
  Shares shares;
#pragma omp parallel if (w.work(m) >= kSerialWork)
  multiply_part<1>(shares, x, x_stride, m, w, output);
}

// The same on rows that make_row(row, to) writes first.
template <class C, class MakeRow>
static void linear_of(MakeRow make_row, int64_t m, const Dense<C>& w, const Output& output) {
  static thread_local Workspace space;
  float* x = space.get<float>(m * w.k);
  Shares shares;
#pragma omp parallel if (w.work(m) >= kSerialWork)
  {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < m; ++r) make_row(r, x + r * w.k);
    multiply_part<1>(shares, x, w.k, m, w, output);
  }
}

template <class C>
static void pack(const typename C::Source* weight, int64_t n, int64_t k, float weight_scale,
                 typename C::Element* packed) {
  const int64_t panels = ceil_div(n, kPanel), panel_size = padded_k<C>(k) * kPanel;
  // The same split as in multiply_part(): on machines with several memory nodes each thread reads pages near it.
#pragma omp parallel
  {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    for (int64_t p = panels * thread / threads; p < panels * (thread + 1) / threads; ++p)
      pack_panel(C{}, weight + p * kPanel * k, std::min<int64_t>(kPanel, n - p * kPanel), k, weight_scale,
                 packed + p * panel_size);
  }
}

// Time that a full tile of rows takes for kColumns columns, in the caches.
template <class C>
static double seconds_per_tile() {
  constexpr int kColumns = 128;
  alignas(64) typename C::Row x[kColumns / C::kBlock * kMaxRows * C::kRowBlock] = {};
  alignas(64) typename C::Element w[kColumns * kPanel] = {};
  alignas(64) float c[kMaxRows * kPanel];
  double best = 1;
  for (int repeat = 0; repeat < 200; ++repeat) {
    auto start = std::chrono::steady_clock::now();
    multiply_tile<C>(kMaxRows, x, w, kColumns / C::kBlock, true, c);
    asm volatile("" ::"r"(c) : "memory");  // as if the result were used
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

// The fastest way to multiply bfloat16 on this CPU. An instruction that doubles the rate of one CPU may halve
// another's, so the ways are timed once; what rounds more has to be faster by far more than the noise.
static int bfloat16_compute() {
  int best = Widened::kCode;
  double time = seconds_per_tile<Widened>();
  auto consider = [&](auto c) {
    const double other = seconds_per_tile<decltype(c)>();
    if (other < 0.8 * time) time = other, best = decltype(c)::kCode;
  };
  (void)consider;  // a CPU may have none of these
#if defined(__AVX512FP16__)
  consider(Half{});
#endif
#if defined(__AVX512BF16__)
  consider(PairDot{});
#endif
  return best;
}

}  // namespace
}  // namespace kvb

using namespace kvb;

extern "C" int64_t kvb_linear_packed_elements(int64_t n, int64_t k, int compute) {
  int64_t elements = 0;
  with_compute(compute, [&](auto c) { elements = ceil_div(n, kPanel) * kPanel * padded_k<decltype(c)>(k); });
  return elements;
}

extern "C" void kvb_linear_pack(const void* weight, int64_t n, int64_t k, int compute, float weight_scale,
                                void* packed) {
  with_compute(compute, [&](auto c) {
    using C = decltype(c);
    pack<C>(static_cast<const typename C::Source*>(weight), n, k, weight_scale,
            static_cast<typename C::Element*>(packed));
  });
}

extern "C" int kvb_bfloat16_compute() {
  static const int compute = bfloat16_compute();
  return compute;
}

extern "C" void kvb_linear(const float* x, int64_t x_stride, int64_t m, const Layer* layer, float* out,
                           int64_t out_stride) {
  with_layer(*layer, [&](auto w) { linear(x, x_stride, m, w, {out, out_stride, layer->n, layer->bias}); });
}

extern "C" void kvb_add_rms_norm_linear(const float* x, float* residual, const float* norm, float eps, int64_t m,
                                        const Layer* layer, float* out) {
  const int64_t k = layer->k;
  with_layer(*layer, [&](auto w) {
    linear_of(
        [&](int64_t r, float* to) { add_rms_norm_row(x ? x + r * k : nullptr, residual + r * k, norm, eps, k, to); }, m,
        w, {out, layer->n, layer->n, layer->bias});
  });
}

extern "C" void kvb_gated_rms_norm_linear(const float* x, const float* gate, int64_t gate_stride, const float* norm,
                                          int64_t norm_dim, float eps, int64_t m, const Layer* layer, float* out) {
  const int64_t k = layer->k;
  with_layer(*layer, [&](auto w) {
    linear_of(
        [&](int64_t r, float* to) {
          for (int64_t i = 0; i < k; i += norm_dim)
            gated_rms_norm_row(x + r * k + i, gate + r * gate_stride + i, norm, eps, norm_dim, to + i);
        },
        m, w, {out, layer->n, layer->n, layer->bias});
  });
}

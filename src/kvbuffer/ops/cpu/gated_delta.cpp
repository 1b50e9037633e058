// Gated DeltaNet on a KV buffer: buffered decode, fold, and the plain recurrence (the baseline).
//
// name        shape                              dtype            use
// q, k        [B, HK, K], rows strided           float32          read; q carries the softmax scale
// v           [B, HV, V], rows strided           float32          read
// g, beta     [B, HV]                            float32          read; g is the log-decay of this token
// states      [num_slots, HV, K, V]              float32 | bf16   read; written only by a fold (or by the recurrence)
// slots       [B]                                int32            read: row of `states` of each request
// rec_keys    [num_pages, HK, page, K]           float32          read, one record appended per request
// rec_values  [num_pages, HV, page, V]           float32          read, one record appended: the written value u
// rec_decays  [num_pages, HV, page]              float32          read, one record appended: g
// page_table  [B, table_stride]                  int32            read
// fill        [B]                                int32            read: records in the buffer before this step
// fold        [B]                                uint8            read: fold those records into the state first
// out         [B, HV, V]                         float32          written
//
// The state is read once per step, for the products with k and q together; when the step folds, the same pass rewrites
// it. One task is one (request, value head): a fixed order of operations, so neither the batch nor the threads show in
// the result. V is a multiple of the vector width.
#include <vector>

#include "vec.h"

namespace kvb {
namespace {  // names of this file: two files may use the same one

constexpr int kBlock = kLanes == 16 ? 8 : 4;  // vectors of a state row held in registers at once

struct Records {
  float *keys, *values, *decays;
  const int32_t* pages;
  int64_t HK, HV, K, V, page;
  float* key(int64_t i, int64_t h) const { return keys + ((pages[i / page] * HK + h) * page + i % page) * K; }
  float* value(int64_t i, int64_t h) const { return values + ((pages[i / page] * HV + h) * page + i % page) * V; }
  float* decay(int64_t i, int64_t h) const { return decays + (pages[i / page] * HV + h) * page + i % page; }
};

static float dot(const float* a, const float* b, int64_t n) {
  Vec acc{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) acc += load(a + i) * load(b + i);
  float s = hsum(acc);
  for (; i < n; ++i) s += a[i] * b[i];
  return s;
}

// y += c * x
static void axpy(float c, const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(y + i, load(y + i) + c * load(x + i));
}

static void scale(float c, float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(x + i, c * load(x + i));
}

// The delta rule's written value and the output of one token, from what state and buffer predict for its key (pk) and
// query (pq): u = beta (v - pk), o = pq + (k.q) u. u may be pk.
static void write_token(const float* pk, const float* pq, const float* v, float beta, float kq, float* u, float* o,
                        int64_t V) {
  for (int64_t c = 0; c < V; c += kLanes) {
    const Vec written = beta * (load(v + c) - load(pk + c));
    store(u + c, written);
    store(o + c, load(pq + c) + kq * written);
  }
}

// pk = S^T k, pq = S^T q for NV vectors of columns.
template <typename S, int NV>
static void read_columns(const S* s, int64_t K, int64_t V, const float* k, const float* q, float* pk, float* pq) {
  Vec ak[NV] = {}, aq[NV] = {};
  for (int64_t r = 0; r < K; ++r, s += V) {
    const float kr = k[r], qr = q[r];
    for (int j = 0; j < NV; ++j) {
      __builtin_prefetch(s + 16 * V + j * kLanes);
      const Vec x = load(s + j * kLanes);
      ak[j] += kr * x;
      aq[j] += qr * x;
    }
  }
  for (int j = 0; j < NV; ++j) store(pk + j * kLanes, ak[j]), store(pq + j * kLanes, aq[j]);
}

// S = decay * S + sum_j weighted_keys[r, j] * u_j, then pk and pq of the new S as stored. u_j rows are `u[j]`.
// One compiled copy for every caller: a clone specialised for n = 1 could round its multiply-adds differently.
template <typename S, int NV>
KVB_SINGLE_COPY static void fold_columns(S* s, int64_t K, int64_t V, float decay, const float* weighted_keys,
                                         const float* const* u, int64_t n, int64_t column, const float* k,
                                         const float* q, float* pk, float* pq) {
  Vec ak[NV] = {}, aq[NV] = {};
  for (int64_t r = 0; r < K; ++r, s += V) {
    Vec x[NV];
    for (int j = 0; j < NV; ++j) {
      __builtin_prefetch(s + 16 * V + j * kLanes, 1);
      x[j] = decay * load(s + j * kLanes);
    }
    for (int64_t i = 0; i < n; ++i) {
      const float w = weighted_keys[r * n + i];
      const float* ui = u[i] + column;
      for (int j = 0; j < NV; ++j) x[j] += w * load(ui + j * kLanes);
    }
    const float kr = k[r], qr = q[r];
    for (int j = 0; j < NV; ++j) {
      store(s + j * kLanes, x[j]);
      const Vec stored = load(s + j * kLanes);
      ak[j] += kr * stored;
      aq[j] += qr * stored;
    }
  }
  for (int j = 0; j < NV; ++j) store(pk + j * kLanes, ak[j]), store(pq + j * kLanes, aq[j]);
}

template <typename F>
static void for_column_blocks(int64_t V, F&& f) {
  int64_t c = 0;
  for (; c + kBlock * kLanes <= V; c += kBlock * kLanes) f(c, std::integral_constant<int, kBlock>());
  for (; c < V; c += kLanes) f(c, std::integral_constant<int, 1>());
}

// Per-thread work space, grown once and reused.
struct HeadScratch {
  std::vector<float> pk, pq, unused, weights, weighted_keys;
  std::vector<const float*> u;
  void reserve(int64_t K, int64_t V, int64_t n) {
    if ((int64_t)pk.size() < V) pk.resize(V), pq.resize(V), unused.resize(V);
    if ((int64_t)weights.size() < n) weights.resize(n), u.resize(n);
    if ((int64_t)weighted_keys.size() < K * n) weighted_keys.resize(K * n);
  }
};

// weights[i] = product of the decays after record i up to the newest record; returns the product over all of them.
static float decay_weights(const Records& rec, int64_t n, int64_t hv, float log_tail, float* weights) {
  float log_sum = log_tail;
  for (int64_t i = n - 1; i >= 0; --i) {
    weights[i] = std::exp(log_sum);
    log_sum += *rec.decay(i, hv);
  }
  return std::exp(log_sum);
}

static void gather_fold(const Records& rec, int64_t n, int64_t hk, int64_t hv, HeadScratch& tmp) {
  for (int64_t i = 0; i < n; ++i) {
    const float* key = rec.key(i, hk);
    for (int64_t r = 0; r < rec.K; ++r) tmp.weighted_keys[r * n + i] = tmp.weights[i] * key[r];
    tmp.u[i] = rec.value(i, hv);
  }
}

template <typename S>
static void fold_head(S* s, const Records& rec, int64_t n, int64_t hk, int64_t hv, const float* k, const float* q,
                      HeadScratch& tmp) {
  const float decay = decay_weights(rec, n, hv, 0.f, tmp.weights.data());
  gather_fold(rec, n, hk, hv, tmp);
  for_column_blocks(rec.V, [&](int64_t c, auto nv) {
    fold_columns<S, decltype(nv)::value>(s + c, rec.K, rec.V, decay, tmp.weighted_keys.data(), tmp.u.data(), n, c, k, q,
                                         tmp.pk.data() + c, tmp.pq.data() + c);
  });
}

template <typename S>
static void buffered_decode(const float* q, int64_t q_stride, const float* k, int64_t k_stride, const float* v,
                            int64_t v_stride, const float* g, const float* beta, S* states, const int32_t* slots,
                            float* rec_keys, float* rec_values, float* rec_decays, const int32_t* page_table,
                            int64_t table_stride, const int32_t* fill, const uint8_t* fold, float* out, int64_t B,
                            int64_t HK, int64_t HV, int64_t K, int64_t V, int64_t page) {
  const int64_t rep = HV / HK;
#pragma omp parallel
  {
    const FlushDenormals flush;
    static thread_local HeadScratch tmp;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < B * HV; ++task) {
      const int64_t b = task / HV, hv = task % HV, hk = hv / rep;
      const Records rec{rec_keys, rec_values, rec_decays, page_table + b * table_stride, HK, HV, K, V, page};
      const float *qb = q + b * q_stride + hk * K, *kb = k + b * k_stride + hk * K, *vb = v + b * v_stride + hv * V;
      S* s = states + (slots[b] * HV + hv) * K * V;
      float* o = out + task * V;
      int64_t n = fill[b];
      tmp.reserve(K, V, n);
      if (fold[b]) {
        fold_head(s, rec, n, hk, hv, kb, qb, tmp);
        n = 0;
      } else {
        for_column_blocks(V, [&](int64_t c, auto nv) {
          read_columns<S, decltype(nv)::value>(s + c, K, V, kb, qb, tmp.pk.data() + c, tmp.pq.data() + c);
        });
      }
      const float decay = decay_weights(rec, n, hv, g[task], tmp.weights.data());
      float *pk = tmp.pk.data(), *pq = tmp.pq.data();
      scale(decay, pk, V);
      scale(decay, pq, V);
      for (int64_t i = 0; i < n; ++i) {
        const float *key = rec.key(i, hk), *u = rec.value(i, hv), w = tmp.weights[i];
        axpy(w * dot(key, kb, K), u, pk, V);
        axpy(w * dot(key, qb, K), u, pq, V);
      }
      float* u = rec.value(n, hv);
      *rec.decay(n, hv) = g[task];
      write_token(pk, pq, vb, beta[task], dot(kb, qb, K), u, o, V);
    }
    // Keys are shared by the value heads of a group: appended only when no head can still be reading old records.
#pragma omp for schedule(static)
    for (int64_t task = 0; task < B * HK; ++task) {
      const int64_t b = task / HK, hk = task % HK;
      const Records rec{rec_keys, rec_values, rec_decays, page_table + b * table_stride, HK, HV, K, V, page};
      std::memcpy(rec.key(fold[b] ? 0 : fill[b], hk), k + b * k_stride + hk * K, K * sizeof(float));
    }
  }
}

template <typename S>
static void fold_states(S* states, const int32_t* slots, float* rec_keys, float* rec_values, float* rec_decays,
                        const int32_t* page_table, int64_t table_stride, const int32_t* fill, int64_t B, int64_t HK,
                        int64_t HV, int64_t K, int64_t V, int64_t page) {
  const std::vector<float> zeros(K, 0.f);
#pragma omp parallel
  {
    const FlushDenormals flush;
    static thread_local HeadScratch tmp;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < B * HV; ++task) {
      const int64_t b = task / HV, hv = task % HV;
      if (fill[b] == 0) continue;
      const Records rec{rec_keys, rec_values, rec_decays, page_table + b * table_stride, HK, HV, K, V, page};
      tmp.reserve(K, V, fill[b]);
      fold_head(states + (slots[b] * HV + hv) * K * V, rec, fill[b], hv / (HV / HK), hv, zeros.data(), zeros.data(),
                tmp);
    }
  }
}

template <typename S>
static void recurrent_decode(const float* q, int64_t q_stride, const float* k, int64_t k_stride, const float* v,
                             int64_t v_stride, const float* g, const float* beta, S* states, const int32_t* slots,
                             float* out, int64_t B, int64_t HK, int64_t HV, int64_t K, int64_t V) {
  const int64_t rep = HV / HK;
#pragma omp parallel
  {
    const FlushDenormals flush;
    static thread_local HeadScratch tmp;
    tmp.reserve(K, V, 1);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < B * HV; ++task) {
      const int64_t b = task / HV, hv = task % HV, hk = hv / rep;
      const float *qb = q + b * q_stride + hk * K, *kb = k + b * k_stride + hk * K, *vb = v + b * v_stride + hv * V;
      S* s = states + (slots[b] * HV + hv) * K * V;
      float *o = out + task * V, *pk = tmp.pk.data(), *pq = tmp.pq.data();
      for_column_blocks(
          V, [&](int64_t c, auto nv) { read_columns<S, decltype(nv)::value>(s + c, K, V, kb, qb, pk + c, pq + c); });
      const float decay = std::exp(g[task]);
      scale(decay, pk, V);
      scale(decay, pq, V);
      write_token(pk, pq, vb, beta[task], dot(kb, qb, K), pk, o, V);
      // The update is a fold of one record: the same code, hence the same bits, as a buffer of one token.
      tmp.u[0] = pk;
      for_column_blocks(V, [&](int64_t c, auto nv) {
        fold_columns<S, decltype(nv)::value>(s + c, K, V, decay, kb, tmp.u.data(), 1, c, kb, qb, tmp.unused.data(),
                                             tmp.unused.data());
      });
    }
  }
}

}  // namespace
}  // namespace kvb

using kvb::bf16;

extern "C" {

int64_t kvb_vector_width() { return kvb::kLanes; }

void kvb_buffered_decode(const float* q, int64_t q_stride, const float* k, int64_t k_stride, const float* v,
                         int64_t v_stride, const float* g, const float* beta, void* states, const int32_t* slots,
                         float* rec_keys, float* rec_values, float* rec_decays, const int32_t* page_table,
                         int64_t table_stride, const int32_t* fill, const uint8_t* fold, float* out, int64_t B,
                         int64_t HK, int64_t HV, int64_t K, int64_t V, int64_t page, int64_t state_dtype) {
  if (state_dtype == 0)
    kvb::buffered_decode(q, q_stride, k, k_stride, v, v_stride, g, beta, (float*)states, slots, rec_keys, rec_values,
                         rec_decays, page_table, table_stride, fill, fold, out, B, HK, HV, K, V, page);
  else
    kvb::buffered_decode(q, q_stride, k, k_stride, v, v_stride, g, beta, (bf16*)states, slots, rec_keys, rec_values,
                         rec_decays, page_table, table_stride, fill, fold, out, B, HK, HV, K, V, page);
}

void kvb_fold(void* states, const int32_t* slots, float* rec_keys, float* rec_values, float* rec_decays,
              const int32_t* page_table, int64_t table_stride, const int32_t* fill, int64_t B, int64_t HK, int64_t HV,
              int64_t K, int64_t V, int64_t page, int64_t state_dtype) {
  if (state_dtype == 0)
    kvb::fold_states((float*)states, slots, rec_keys, rec_values, rec_decays, page_table, table_stride, fill, B, HK, HV,
                     K, V, page);
  else
    kvb::fold_states((bf16*)states, slots, rec_keys, rec_values, rec_decays, page_table, table_stride, fill, B, HK, HV,
                     K, V, page);
}

void kvb_recurrent_decode(const float* q, int64_t q_stride, const float* k, int64_t k_stride, const float* v,
                          int64_t v_stride, const float* g, const float* beta, void* states, const int32_t* slots,
                          float* out, int64_t B, int64_t HK, int64_t HV, int64_t K, int64_t V, int64_t state_dtype) {
  if (state_dtype == 0)
    kvb::recurrent_decode(q, q_stride, k, k_stride, v, v_stride, g, beta, (float*)states, slots, out, B, HK, HV, K, V);
  else
    kvb::recurrent_decode(q, q_stride, k, k_stride, v, v_stride, g, beta, (bf16*)states, slots, out, B, HK, HV, K, V);
}

}  // extern "C"

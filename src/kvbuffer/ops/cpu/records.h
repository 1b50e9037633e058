// The records of one request and value head, and how much of each is left at the newest one.
//
// Inside a page the records of a head are consecutive rows: n records are n * pairs rows of keys [K] and of values [V].
#pragma once
#include "arguments.h"
#include "rows.h"

namespace kvb {

template <class E>
struct Records {
  const RecordPages& pool;
  const Shape& shape;
  const int32_t* pages;
  int64_t key_head, value_head;

  Records(const RecordPages& pool, const Shape& shape, int64_t request, int64_t value_head)
      : pool(pool),
        shape(shape),
        pages(pool.page_table + request * pool.table_stride),
        key_head(shape.key_head(value_head)),
        value_head(value_head) {}

  E* keys(int64_t i) const { return static_cast<E*>(pool.keys) + place(i, shape.HK, key_head) * shape.pairs * shape.K; }
  E* values(int64_t i) const {
    return static_cast<E*>(pool.values) + place(i, shape.HV, value_head) * shape.pairs * shape.V;
  }
  float* decays(int64_t i) const { return pool.decays + place(i, shape.HV, value_head) * shape.decay_width; }

  // f(first record, number of records) for each page of the records from begin to end.
  template <class F>
  void for_pages(int64_t begin, int64_t end, F&& f) const {
    for (int64_t i = begin, count; i < end; i += count) {
      count = std::min(pool.page_size - i % pool.page_size, end - i);
      f(i, count);
    }
  }
  // f(record, row, key) for each row of keys of the first n records.
  template <class F>
  void for_keys(int64_t n, F&& f) const {
    for_pages(0, n, [&](int64_t first, int64_t count) {
      const E* key = keys(first);
      for (int64_t i = first; i < first + count; ++i)
        for (int64_t pair = 0; pair < shape.pairs; ++pair, key += shape.K) f(i, i * shape.pairs + pair, key);
    });
  }

  // The first n records, to be read by the next task.
  void expect(int64_t n, Ahead& ahead) const {
    for_pages(0, n, [&](int64_t first, int64_t count) {
      ahead.expect(keys(first), count * shape.pairs * shape.K * sizeof(E));
      ahead.expect(values(first), count * shape.pairs * shape.V * sizeof(E));
      ahead.expect(decays(first), count * shape.decay_width * sizeof(float));
    });
  }

 private:
  int64_t place(int64_t i, int64_t heads, int64_t head) const {
    return (pages[i / pool.page_size] * heads + head) * pool.page_size + i % pool.page_size;
  }
};

// Calls f with a value of the records' element type.
template <class F>
inline void with_record_type(const RecordPages& pool, F&& f) {
  return pool.dtype == 0 ? f(float{}) : f(bf16{});
}

// What is left of each of the first n records, and of the state before them, after the newest one: products of decays,
// formed from sums of logarithms <= 0, so that nothing overflows.
//
//   weights  [n, width]  width: 1 or padded(K); room for padded(n * width) floats
//   total    [padded(K)]
template <class E>
inline void record_weights(const Records<E>& records, int64_t n, float* weights, float* total) {
  const int64_t K = padded(records.shape.K);
  if (records.shape.decay_width == 1) {
    records.for_pages(0, n, [&](int64_t i, int64_t count) { std::copy_n(records.decays(i), count, weights + i); });
    float sum = 0.f;
    for (int64_t i = n - 1; i >= 0; --i) {
      const float g = weights[i];
      weights[i] = sum;
      sum += g;
    }
    exp_all(weights, n);
    std::fill_n(total, K, vexp(splat(sum))[0]);
  } else {
    std::fill_n(total, K, 0.f);
    for (int64_t i = n - 1; i >= 0; --i)
      for_vectors(records.decays(i), records.shape.K, [&](int64_t r, Vec g) {
        store(weights + i * K + r, load(total + r));
        store(total + r, load(total + r) + g);
      });
    exp_all(weights, n * K);
    exp_all(total, K);
  }
}

// f(r, elements r to r + kLanes of a key times what is left of its record), with weights as record_weights gives them.
template <class E, class F>
inline void for_weighted_key(const Shape& shape, const E* key, int64_t record, const float* weights, F&& f) {
  if (shape.decay_width == 1)
    for_vectors(key, shape.K, [&](int64_t r, Vec e) { f(r, weights[record] * e); });
  else
    for_vectors(key, shape.K, [&](int64_t r, Vec e) { f(r, load(weights + record * padded(shape.K) + r) * e); });
}

// f(row, r, elements) for all rows of keys of the first n records.
template <class E, class F>
inline void for_weighted_keys(const Records<E>& records, int64_t n, const float* weights, F&& f) {
  records.for_keys(n, [&](int64_t record, int64_t row, const E* key) {
    for_weighted_key(records.shape, key, record, weights, [&](int64_t r, Vec e) { f(row, r, e); });
  });
}

}  // namespace kvb

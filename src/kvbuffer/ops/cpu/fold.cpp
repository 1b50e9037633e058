// Folding records into states, in place or into other slots.
//
//   shape, states, records  see arguments.h
//   slots    [B]  int32  read: the states to start from; -1 starts from zero
//   count    [B]  int32  read: how many records to fold
//   targets  [B]  int32  read: where the results go
#include "fold.h"

namespace kvb {
namespace {

template <class S, class E>
void fold(const Shape& shape, const StatePool& states, const RecordPages& pages, const int32_t* slots,
          const int32_t* count, const int32_t* targets, int64_t requests) {
  const auto expect = [&](int64_t task, Ahead& ahead) {
    const int64_t b = task / shape.HV, value_head = task % shape.HV;
    ahead.clear();
    if (b == requests) return;
    if (slots[b] >= 0) expect_state(state_of<S>(states, shape, slots[b], value_head), shape.K, shape.V, true, ahead);
    Records<E>(pages, shape, b, value_head).expect(count[b], ahead);
    ahead.spread(shape.K);
  };
#pragma omp parallel
  {
    const FlushDenormals flush;
    static thread_local FoldScratch scratch;
    Ahead ahead;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < requests * shape.HV; ++task) {
      const int64_t b = task / shape.HV, value_head = task % shape.HV;
      expect(task + 1, ahead);
      const State<S> target = state_of<S>(states, shape, targets[b], value_head);
      if (slots[b] < 0)
        clear_state(target, shape.K, shape.V);
      else if (slots[b] != targets[b])
        copy_state(state_of<S>(states, shape, slots[b], value_head), shape.K, shape.V, target);
      if (count[b]) fold_records(target, Records<E>(pages, shape, b, value_head), count[b], scratch, ahead);
    }
  }
}

}  // namespace
}  // namespace kvb

using namespace kvb;

extern "C" void kvb_fold_records(const Shape* shape, const StatePool* states, const RecordPages* records,
                                 const int32_t* slots, const int32_t* count, const int32_t* targets, int64_t requests) {
  with_state_type(*states, [&](auto s) {
    with_record_type(*records, [&](auto e) {
      fold<decltype(s), decltype(e)>(*shape, *states, *records, slots, count, targets, requests);
    });
  });
}

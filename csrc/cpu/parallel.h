// Parallel loops on PyTorch's threads. Work is cut by its size alone, so that results do not depend on the number of
// threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace pixnorm {

using torch::stable::parallel_for;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As parallel_for where there are enough items to keep all threads busy; else takes them in turn, so that the threads
// share each one: loops inside a parallel loop run on one thread.
template <class F>
void for_large_items(int64_t count, const F& f) {
  const int64_t threads = torch::stable::get_num_threads();
  if (count % threads == 0 || count >= 4 * threads) {
    parallel_for(0, count, 1, f);
  } else {
    f(0, count);
  }
}

// Calls f(first, end) for runs that cover [0, count).
template <class F>
void for_elements(int64_t count, const F& f) {
  constexpr int64_t kGrain = 1 << 15;
  parallel_for(0, ceil_div(count, kGrain), 1,
               [&](int64_t begin, int64_t end) { f(begin * kGrain, std::min(end * kGrain, count)); });
}

}  // namespace pixnorm

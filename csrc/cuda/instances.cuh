// Template arguments chosen at run time.
#pragma once

#include <type_traits>

namespace pixnorm {

template <bool kValue>
using Bool = std::bool_constant<kValue>;
template <int kValue>
using Int = std::integral_constant<int, kValue>;

template <class F>
void dispatch_bool(bool value, const F& f) {
  value ? f(Bool<true>{}) : f(Bool<false>{});
}

// f(Bool<channels_last>, Int<upsample>)
template <class F>
void dispatch_layout(bool channels_last, int64_t upsample, const F& f) {
  dispatch_bool(channels_last,
                [&](auto last) { dispatch_bool(upsample == 2, [&](auto twice) { f(last, Int<twice() ? 2 : 1>{}); }); });
}

}  // namespace pixnorm

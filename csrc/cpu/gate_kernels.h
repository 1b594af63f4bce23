// Vector code of CBAM's gates. Sums and maxima are of columns or of rows of a tile.

#include "cpu/runs.h"

template <class V>
struct GateIndex {
  using type = bits_t<V>;
};
template <class A>
struct GateIndices {
  using type = typename Lanes<bits_t<A>, kLanes<A>>::type;
};
template <class A, class V>
using gate_index_t = typename std::conditional_t<std::is_arithmetic_v<V>, GateIndex<A>, GateIndices<A>>::type;

constexpr int kGateWays = 4;

// A sum, and the first maximum with its place. NaN counts as larger than any number, but not in add(): where there is
// one the sum is NaN, too, and gate_first_nan() looks for it.
template <class A, class V>
struct GateTotal {
  using I = gate_index_t<A, V>;
  V sum, top;
  I place;

  static PIXNORM_INLINE GateTotal none() {
    const A least = -__builtin_inf();
    return {V{}, V{} + least, I{}};
  }

  template <bool kPool>
  PIXNORM_INLINE void add(V v, I at) {
    sum += v;
    if constexpr (kPool) {
      const auto larger = v > top;
      top = larger ? v : top;
      place = larger ? at : place;
    }
  }

  // The maximum of elsewhere, if it is larger or comes first.
  PIXNORM_INLINE void keep_first(V other, I at) {
    const auto better = (other > top) | ((other == top) & (at < place));
    top = better ? other : top;
    place = better ? at : place;
  }
};

// Makes the first NaN of `count` elements, `step` apart, the maximum. Their sum is NaN; with infinities of both signs
// there may be none.
template <class T, class I>
void gate_first_nan(const T* from, int64_t count, int64_t step, int64_t first, acc_t<T>& top, I& place) {
  for (int64_t i = 0; i < count; ++i) {
    const auto v = static_cast<acc_t<T>>(from[i * step]);
    if (v == v) continue;
    top = v, place = static_cast<I>(first + i);
    return;
  }
}

// Gates of logits. The last ones pass through a vector, too: their bits do not depend on where they lie. A gate may be
// 0, as PyTorch's sigmoid: infinity behind it is NaN.
template <class A>
void gate_sigmoid(const A* logits, int64_t count, A* gates) {
  constexpr int n = kLanes<A>;
  constexpr A kClosed = sizeof(A) == 8 ? A(-709.78) : A(-88.72);  // e^-logit is infinite
  for (int64_t i = 0; i < count; i += n) {
    const int64_t live = count - i < n ? count - i : n;
    Vec<A> v[1] = {};
    __builtin_memcpy(&v[0], logits + i, live * sizeof(A));
    const auto closed = v[0] < kClosed;
    sigmoid<A, 1>(v);
    v[0] = closed ? Vec<A>{} : v[0];
    __builtin_memcpy(gates + i, &v[0], live * sizeof(A));
  }
}

// ---- columns ----

template <class T, bool kPool, class V>
PIXNORM_INLINE V gate_element(const gate::Tile<T>& tile, int64_t i) {
  const V v = read<V>(tile.x + i);
  if constexpr (kPool) {
    return v;
  } else {
    return v * read<V>(tile.dy + i);
  }
}

// The columns of kLanes or one from c on; `first` is the number of the tile's first row. Columns are visited rows at a
// time, so that memory is read in long runs: totals wait in scratch.
template <class T, bool kPool, int kRows, class V>
PIXNORM_INLINE void gate_visit(const gate::Tile<T>& tile, int64_t r, int64_t c, int64_t first, acc_t<T>* sums,
                               acc_t<T>* tops, bits_t<acc_t<T>>* places) {
  using A = acc_t<T>;
  using I = gate_index_t<A, V>;
  GateTotal<A, V> total{read<V>(sums + c), V{}, I{}};
  if constexpr (kPool) {
    total.top = read<V>(tops + c);
    __builtin_memcpy(&total.place, places + c, sizeof(I));
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    const I at = I{} + static_cast<bits_t<A>>(first + r + i);
    total.template add<kPool>(gate_element<T, kPool, V>(tile, (r + i) * tile.stride + c), at);
  }
  write<V>(sums + c, total.sum);
  if constexpr (kPool) {
    write<V>(tops + c, total.top);
    __builtin_memcpy(places + c, &total.place, sizeof(I));
  }
}

// `scratch` holds three numbers for each column.
template <class T, bool kPool>
void gate_columns(const gate::Tile<T>& tile, int64_t first, acc_t<T>* scratch, const gate::Found<acc_t<T>>& found) {
  using A = acc_t<T>;
  constexpr int n = kLanes<A>, kRows = 8;
  A *const sums = scratch, *const tops = scratch + tile.columns;
  auto* const places = reinterpret_cast<bits_t<A>*>(scratch + 2 * tile.columns);
  for (int64_t c = 0; c < tile.columns; ++c) {
    sums[c] = 0;
    tops[c] = -__builtin_inf();
    places[c] = static_cast<bits_t<A>>(first);
  }
  const auto visit = [&](int64_t r, auto rows) __attribute__((always_inline)) {
    int64_t c = 0;
    for (; c + n <= tile.columns; c += n) {
      gate_visit<T, kPool, decltype(rows)::value, Vec<A>>(tile, r, c, first, sums, tops, places);
    }
    for (; c < tile.columns; ++c) {
      gate_visit<T, kPool, decltype(rows)::value, A>(tile, r, c, first, sums, tops, places);
    }
  };
  int64_t r = 0;
  for (; r + kRows <= tile.rows; r += kRows) visit(r, std::integral_constant<int, kRows>{});
  for (; r < tile.rows; ++r) visit(r, std::integral_constant<int, 1>{});
  for (int64_t c = 0; c < tile.columns; ++c) {
    found.sum[c] = sums[c];
    if constexpr (kPool) {
      found.top[c] = tops[c];
      found.place[c] = static_cast<int32_t>(places[c]);
      if (sums[c] == sums[c]) continue;
      gate_first_nan(tile.x + c, tile.rows, tile.stride, first, found.top[c], found.place[c]);
    }
  }
}

// ---- rows ----

template <class A, int kDistance, int... j>
PIXNORM_INLINE void gate_fold(GateTotal<A, Vec<A>>& total, std::integer_sequence<int, j...> lanes) {
  const auto top = __builtin_shufflevector(total.top, total.top, (j ^ kDistance)...);
  const auto place = __builtin_shufflevector(total.place, total.place, (j ^ kDistance)...);
  total.keep_first(top, place);
  if constexpr (kDistance > 1) gate_fold<A, kDistance / 2>(total, lanes);
}

// `first` is the number of the tile's first column.
template <class T, bool kPool>
void gate_rows(const gate::Tile<T>& tile, int64_t first, acc_t<T>*, const gate::Found<acc_t<T>>& found) {
  using A = acc_t<T>;
  using B = bits_t<A>;
  using V = Vec<A>;
  using Total = GateTotal<A, V>;
  using I = typename Total::I;
  constexpr int n = kLanes<A>;
  I lanes;
  for (int i = 0; i < n; ++i) lanes[i] = i;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t row = r * tile.stride;
    Total totals[kGateWays] = {Total::none(), Total::none(), Total::none(), Total::none()};
    int64_t c = 0;
    for (; c + kGateWays * n <= tile.columns; c += kGateWays * n) {
#pragma GCC unroll 4
      for (int way = 0; way < kGateWays; ++way) {
        const int64_t at = c + way * n;
        totals[way].template add<kPool>(gate_element<T, kPool, V>(tile, row + at), lanes + static_cast<B>(at));
      }
    }
    for (; c + n <= tile.columns; c += n) {
      totals[0].template add<kPool>(gate_element<T, kPool, V>(tile, row + c), lanes + static_cast<B>(c));
    }
    auto tail = GateTotal<A, A>::none();
    for (; c < tile.columns; ++c) {
      tail.template add<kPool>(gate_element<T, kPool, A>(tile, row + c), static_cast<B>(c));
    }
    const V sum = (totals[0].sum + totals[1].sum) + (totals[2].sum + totals[3].sum);
    found.sum[r] = sum_lanes<A>(sum) + tail.sum;
    if constexpr (kPool) {
      for (int way = 1; way < kGateWays; ++way) totals[0].keep_first(totals[way].top, totals[way].place);
      gate_fold<A, n / 2>(totals[0], std::make_integer_sequence<int, n>{});
      tail.keep_first(totals[0].top[0], totals[0].place[0]);
      found.top[r] = tail.top;
      found.place[r] = static_cast<int32_t>(first + tail.place);
      if (found.sum[r] == found.sum[r]) continue;
      gate_first_nan(tile.x + row, tile.columns, 1, first, found.top[r], found.place[r]);
    }
  }
}

// ---- products ----

// y = gate x, or dx = gate dy + mean.
template <class T, bool kOfColumns, bool kBackward>
void gate_apply(const gate::Tile<T>& tile, int64_t first, const gate::Spread<acc_t<T>>& spread) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int n = kLanes<A>;
  const T* const from = kBackward ? tile.dy : tile.x;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const auto at = [&](int64_t c, auto zero) __attribute__((always_inline)) {
      using W = decltype(zero);
      const int64_t of = kOfColumns ? c : r, i = r * tile.stride + c;
      W v = read<W>(from + i) * coefficient<W, kOfColumns>(spread.gate, of);
      if constexpr (kBackward) v += coefficient<W, kOfColumns>(spread.mean, of);
      write<W>(tile.to + i, v);
    };
    int64_t c = 0;
    for (; c + n <= tile.columns; c += n) at(c, V{});
    for (; c < tile.columns; ++c) at(c, A{});
  }
  if constexpr (kBackward) {
    const int64_t size = kOfColumns ? tile.rows : tile.columns;
    for (int64_t i = 0; i < (kOfColumns ? tile.columns : tile.rows); ++i) {
      const int64_t place = spread.place[i] - first;
      if (place < 0 || place >= size) continue;  // in another tile
      const int64_t at = kOfColumns ? place * tile.stride + i : i * tile.stride + place;
      tile.to[at] = static_cast<T>(static_cast<A>(from[at]) * spread.gate[i] + (spread.mean[i] + spread.top[i]));
    }
  }
}

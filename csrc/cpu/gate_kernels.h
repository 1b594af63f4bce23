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

// Lane j of the first: the total of all lanes of totals[j]; as sum_each, whose bits the sums have.
template <class A, bool kPool, int kDistance = kLanes<A> / 2>
PIXNORM_INLINE void gate_total_each(GateTotal<A, Vec<A>> (&totals)[kLanes<A>]) {
  if constexpr (kDistance > 0) {
    constexpr std::make_integer_sequence<int, kLanes<A>> lanes;
#pragma GCC unroll 16
    for (int i = 0; i < kDistance; ++i) {
      auto &total = totals[i], &other = totals[i + kDistance];
      exchange<kDistance>(total.sum, other.sum, lanes);
      total.sum += other.sum;
      if constexpr (kPool) {
        exchange<kDistance>(total.top, other.top, lanes);
        exchange<kDistance>(total.place, other.place, lanes);
        total.keep_first(other.top, other.place);
      }
    }
    gate_total_each<A, kPool, kDistance / 2>(totals);
  }
}

// A row from `row` on; `tail` is of the elements that fill no vector. Long rows have totals of several ways, as
// additions wait for each other; of short ones the processor has several rows in hand.
template <class T, bool kPool, int kWays>
PIXNORM_INLINE GateTotal<acc_t<T>, Vec<acc_t<T>>> gate_row(const gate::Tile<T>& tile, int64_t row,
                                                           GateTotal<acc_t<T>, acc_t<T>>& tail) {
  using A = acc_t<T>;
  using B = bits_t<A>;
  using V = Vec<A>;
  using Total = GateTotal<A, V>;
  constexpr int n = kLanes<A>;
  typename Total::I lanes;
  for (int i = 0; i < n; ++i) lanes[i] = i;
  Total totals[kWays];
  for (Total& total : totals) total = Total::none();
  int64_t c = 0;
  for (; c + kWays * n <= tile.columns; c += kWays * n) {
#pragma GCC unroll 4
    for (int way = 0; way < kWays; ++way) {
      const int64_t at = c + way * n;
      totals[way].template add<kPool>(gate_element<T, kPool, V>(tile, row + at), lanes + static_cast<B>(at));
    }
  }
  for (; c + n <= tile.columns; c += n) {
    totals[0].template add<kPool>(gate_element<T, kPool, V>(tile, row + c), lanes + static_cast<B>(c));
  }
  tail = GateTotal<A, A>::none();
  for (; c < tile.columns; ++c) {
    tail.template add<kPool>(gate_element<T, kPool, A>(tile, row + c), static_cast<B>(c));
  }
  for (int way = 1; way < kWays; ++way) {
    totals[0].sum += totals[way].sum;
    if constexpr (kPool) totals[0].keep_first(totals[way].top, totals[way].place);
  }
  return totals[0];
}

// `first` is the number of the tile's first column. Lanes are added up for as many rows at once as there are lanes: of
// short rows that takes as long as the rest.
template <class T, bool kPool>
void gate_rows(const gate::Tile<T>& tile, int64_t first, acc_t<T>*, const gate::Found<acc_t<T>>& found) {
  using A = acc_t<T>;
  using Total = GateTotal<A, Vec<A>>;
  constexpr int n = kLanes<A>, kLong = 16 * n;
  for (int64_t r0 = 0; r0 < tile.rows; r0 += n) {
    const int64_t live = tile.rows - r0 < n ? tile.rows - r0 : n;
    Total of_rows[n];
    GateTotal<A, A> tails[n];
    for (int64_t r = 0; r < live; ++r) {
      const int64_t row = (r0 + r) * tile.stride;
      of_rows[r] = tile.columns < kLong ? gate_row<T, kPool, 1>(tile, row, tails[r])
                                        : gate_row<T, kPool, kGateWays>(tile, row, tails[r]);
    }
    for (int64_t r = live; r < n; ++r) of_rows[r] = Total::none();
    gate_total_each<A, kPool>(of_rows);
    for (int64_t r = 0; r < live; ++r) {
      auto& tail = tails[r];
      found.sum[r0 + r] = of_rows[0].sum[r] + tail.sum;
      if constexpr (kPool) {
        tail.keep_first(of_rows[0].top[r], of_rows[0].place[r]);
        found.top[r0 + r] = tail.top;
        found.place[r0 + r] = static_cast<int32_t>(first + tail.place);
        if (found.sum[r0 + r] == found.sum[r0 + r]) continue;
        const T* const row = tile.x + (r0 + r) * tile.stride;
        gate_first_nan(row, tile.columns, 1, first, found.top[r0 + r], found.place[r0 + r]);
      }
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

// CBAM's gates on the CPU: tensors and threads. gate_kernels.h has the arithmetic.

#include "cpu/gate.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "dispatch.h"

#define PIXNORM_VECTOR_CODE "cpu/gate_kernels.h"
#include "cpu/foreach_isa.h"

namespace pixnorm::gate {
namespace {

// A sample is a matrix in memory of which either the rows or the columns are pooled: the channel gate pools planes,
// which are rows in NCHW and columns in channels_last, and the spatial gate pools channels, with the two the other way
// round.
//
// Matrices are cut into tiles by shape alone, and what tiles give is added up in a fixed order, so results do not
// depend on the number of threads.
struct Call {
  int64_t n, c, h, w;
  bool spatial;
  MemoryFormat layout;
  bool of_columns;
  int64_t kept, pooled;  // gates of a sample, elements of each
  int64_t rows, columns;
  int64_t tile_rows, tile_columns, down, across;  // of a tile; tiles of a sample
  int64_t grain;                                  // tiles that are worth a thread

  Call(const Tensor& x, bool spatial) : spatial(spatial) {
    STD_TORCH_CHECK(x.dim() == 4, "pixnorm: expected a 4-D tensor");
    n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
    layout = layout_of(x);
    STD_TORCH_CHECK(c * h * w > 0, "pixnorm: expected at least one channel and one pixel");
    STD_TORCH_CHECK(std::max(c, h * w) <= std::numeric_limits<int32_t>::max(), "pixnorm: places are 32 bits wide");
    of_columns = spatial == (layout == MemoryFormat::Contiguous);
    kept = spatial ? h * w : c;
    pooled = spatial ? c : h * w;
    rows = of_columns ? pooled : kept;
    columns = of_columns ? kept : pooled;
    // Sums over a tile are in float32. The totals of columns stay in the L1 cache.
    constexpr int64_t kElements = 1 << 14, kRowsOfColumns = 256, kColumns = 2048, kColumnsOfRows = 4096;
    tile_columns = std::min(columns, of_columns ? kColumns : kColumnsOfRows);
    tile_rows = std::clamp<int64_t>(of_columns ? kRowsOfColumns : kElements / tile_columns, 1, rows);
    down = ceil_div(rows, tile_rows);
    across = ceil_div(columns, tile_columns);
    grain = ceil_div(kElements, tile_rows * tile_columns);
  }

  int64_t gates() const { return n * kept; }
  int64_t parts() const { return of_columns ? down : across; }  // tiles that share a gate

  Tensor empty_image(ScalarType dtype) const { return empty({n, c, h, w}, dtype, layout); }
  Tensor empty_gate(ScalarType dtype) const { return spatial ? empty({n, 1, h, w}, dtype) : empty({n, c}, dtype); }
  void check_gate(const Tensor& t, const char* name, ScalarType dtype) const {
    if (spatial)
      check_sizes(t, name, {n, 1, h, w});
    else
      check_sizes(t, name, {n, c});
    STD_TORCH_CHECK(t.scalar_type() == dtype, "pixnorm: ", name, " has the wrong dtype");
  }

  // Calls f(tile, number of its first pooled element, its first gate of all, part, sample, its first gate of the
  // sample, scratch) for all tiles.
  template <class T, class F>
  void for_tiles(const T* x, const T* dy, T* to, const F& f) const {
    parallel_for(0, n * down * across, grain, [&](int64_t begin, int64_t end) {
      const Buffer<acc_t<T>> scratch(3 * tile_columns);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / (down * across), row = i / across % down * tile_rows,
                      column = i % across * tile_columns;
        const int64_t at = (sample * rows + row) * columns + column;
        const Tile<T> tile{std::min(tile_rows, rows - row),
                           std::min(tile_columns, columns - column),
                           columns,
                           x == nullptr ? nullptr : x + at,
                           dy == nullptr ? nullptr : dy + at,
                           to == nullptr ? nullptr : to + at};
        const int64_t first = of_columns ? row : column, gate = of_columns ? column : row;
        const int64_t part = of_columns ? row / tile_rows : column / tile_columns;
        f(tile, first, sample, gate, part, scratch.data());
      }
    });
  }
};

#define PIXNORM_OF(call, ...) \
  ((call).of_columns ? PIXNORM_BY_ISA(gate_columns<__VA_ARGS__>) : PIXNORM_BY_ISA(gate_rows<__VA_ARGS__>))
#define PIXNORM_APPLY(call, backward) \
  ((call).of_columns ? PIXNORM_BY_ISA(gate_apply<T, true, backward>) : PIXNORM_BY_ISA(gate_apply<T, false, backward>))

// Calls finish(gate, sum, first maximum, its place) with the totals of all tiles.
template <bool kPool, class T, class Kernel, class F>
void reduce(const Call& call, const Kernel& kernel, const T* x, const T* dy, const F& finish) {
  using A = acc_t<T>;
  const int64_t gates = call.gates(), parts = call.parts();
  const Buffer<double> sums(parts * gates);
  const Buffer<A> tops(kPool ? parts * gates : 0);
  const Buffer<int32_t> places(kPool ? parts * gates : 0);
  call.for_tiles<T>(
      x, dy, nullptr, [&](const Tile<T>& tile, int64_t first, int64_t sample, int64_t gate, int64_t part, A* scratch) {
        const int64_t at = part * gates + sample * call.kept + gate;
        const int64_t places_at = kPool ? at : 0;
        kernel(tile, first, scratch, Found<A>{sums.data() + at, tops.data() + places_at, places.data() + places_at});
      });
  constexpr int64_t kGrain = 1 << 13;
  parallel_for(0, gates, ceil_div(kGrain, parts), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double sum = 0;
      int64_t best = i;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t at = part * gates + i;
        sum += sums[at];
        if (kPool && (tops[at] > tops[best] || (std::isnan(tops[at]) && !std::isnan(tops[best])))) best = at;
      }
      if constexpr (kPool)
        finish(i, sum, tops[best], places[best]);
      else
        finish(i, sum, A(0), 0);
    }
  });
}

std::tuple<Tensor, Tensor> gate_pool(const Tensor& given, bool spatial) {
  const Call call(given, spatial);
  return dispatch_floating(given.scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor> {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Tensor pooled =
        spatial ? empty({call.n, 2, call.h, call.w}, dtype_of<A>) : empty({call.n, 2, call.c}, dtype_of<A>);
    const Tensor index = call.empty_gate(ScalarType::Int);
    if (given.numel() == 0) return {pooled, index};
    const Tensor x = dense(given, call.layout);
    auto* const to = static_cast<A*>(pooled.data_ptr());
    auto* const place_of = static_cast<int32_t*>(index.data_ptr());
    const double count = static_cast<double>(call.pooled);
    reduce<true>(call, PIXNORM_OF(call, T, true), data_of<T>(x), static_cast<const T*>(nullptr),
                 [&](int64_t i, double sum, A top, int32_t place) {
                   const int64_t at = i / call.kept * 2 * call.kept + i % call.kept;
                   to[at] = top;
                   to[at + call.kept] = static_cast<A>(sum / count);
                   place_of[i] = place;
                 });
    return {pooled, index};
  });
}

// σ(logits).
template <class A>
Buffer<A> gates_of(const Call& call, const Tensor& logits) {
  call.check_gate(logits, "logits", dtype_of<A>);
  const Tensor from = dense(logits);
  Buffer<A> gates(call.gates());
  const auto kernel = PIXNORM_BY_ISA(gate_sigmoid<A>);
  for_elements(call.gates(), [&](int64_t begin, int64_t end) {
    kernel(data_of<A>(from) + begin, end - begin, gates.data() + begin);
  });
  return gates;
}

Tensor gate_fwd(const Tensor& given, const Tensor& logits, bool spatial) {
  const Call call(given, spatial);
  return dispatch_floating(given.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Tensor y = call.empty_image(dtype_of<T>);
    if (given.numel() == 0) return y;
    const Tensor x = dense(given, call.layout);
    const Buffer<A> gates = gates_of<A>(call, logits);
    const auto kernel = PIXNORM_APPLY(call, false);
    call.for_tiles<T>(data_of<T>(x), nullptr, static_cast<T*>(y.data_ptr()),
                      [&](const Tile<T>& tile, int64_t first, int64_t sample, int64_t at, int64_t, A*) {
                        kernel(tile, first,
                               Spread<A>{gates.data() + sample * call.kept + at, nullptr, nullptr, nullptr});
                      });
    return y;
  });
}

Tensor gate_reduce(const Tensor& grad_y, const Tensor& given, const Tensor& logits, bool spatial) {
  const Call call(given, spatial);
  check_sizes(grad_y, "grad_y", {call.n, call.c, call.h, call.w});
  check_same_dtype(grad_y, "grad_y", given);
  return dispatch_floating(given.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Tensor grad_logits = call.empty_gate(dtype_of<A>);
    if (given.numel() == 0) return grad_logits;
    const Buffer<A> gates = gates_of<A>(call, logits);
    const Tensor x = dense(given, call.layout), dy = dense(grad_y, call.layout);
    auto* const to = static_cast<A*>(grad_logits.data_ptr());
    reduce<false>(
        call, PIXNORM_OF(call, T, false), data_of<T>(x), data_of<T>(dy),
        [&](int64_t i, double sum, A, int32_t) { to[i] = static_cast<A>(sum) * (gates[i] * (1 - gates[i])); });
    return grad_logits;
  });
}

Tensor gate_bwd(const Tensor& grad_y, const Tensor& logits, const Tensor& grad_pooled, const Tensor& index,
                bool spatial) {
  const Call call(grad_y, spatial);
  if (spatial)
    check_sizes(grad_pooled, "grad_pooled", {call.n, 2, call.h, call.w});
  else
    check_sizes(grad_pooled, "grad_pooled", {call.n, 2, call.c});
  call.check_gate(index, "index", ScalarType::Int);
  return dispatch_floating(grad_y.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    check_same_dtype(grad_pooled, "grad_pooled", logits);
    const Tensor dx = call.empty_image(dtype_of<T>);
    if (grad_y.numel() == 0) return dx;
    const Tensor dy = dense(grad_y, call.layout), of_pooled = dense(grad_pooled), places = dense(index);
    const Buffer<A> gates = gates_of<A>(call, logits);
    std::vector<A> mean(call.gates());
    const A count = static_cast<A>(call.pooled);
    for (int64_t n = 0; n < call.n; ++n) {
      const A* const from = data_of<A>(of_pooled) + (2 * n + 1) * call.kept;
      std::transform(from, from + call.kept, mean.begin() + n * call.kept, [&](A v) { return v / count; });
    }
    const auto kernel = PIXNORM_APPLY(call, true);
    call.for_tiles<T>(nullptr, data_of<T>(dy), static_cast<T*>(dx.data_ptr()),
                      [&](const Tile<T>& tile, int64_t first, int64_t sample, int64_t at, int64_t, A*) {
                        const int64_t of = sample * call.kept + at;
                        kernel(
                            tile, first,
                            Spread<A>{gates.data() + of, mean.data() + of,
                                      data_of<A>(of_pooled) + of + sample * call.kept, data_of<int32_t>(places) + of});
                      });
    return dx;
  });
}

}  // namespace
}  // namespace pixnorm::gate

STABLE_TORCH_LIBRARY_IMPL(pixnorm, CPU, m) {
  m.impl("gate_pool", TORCH_BOX(&pixnorm::gate::gate_pool));
  m.impl("gate_fwd", TORCH_BOX(&pixnorm::gate::gate_fwd));
  m.impl("gate_reduce", TORCH_BOX(&pixnorm::gate::gate_reduce));
  m.impl("gate_bwd", TORCH_BOX(&pixnorm::gate::gate_bwd));
}

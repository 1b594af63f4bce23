// Matrix products. Vector code: included by gemm.cpp, once per instruction set.
//
// A tile of the result, some rows by one or two vectors, stays in registers while the depth runs: each step loads a row
// of b's panel and multiplies it by one number for each row of a. Panels are packed, (depth, columns), so that a step
// reads one or two cache lines wherever b's columns lie; rows of a are packed likewise, (depth, rows), or read where
// they are.

// As many sums as registers allow beside a row of the panel and one number of a.
constexpr int kTileRows = PIXNORM_ISA == PIXNORM_ISA_AVX512 ? 14 : 6;
template <class A>
constexpr int kPanel = 2 * kLanes<A>;
// A panel this deep is 32 KB with 64-byte vectors. Sums in registers are no longer, which keeps their rounding small.
constexpr int64_t kDepth = 256;

// Elements of a packed tile of rows: stores of whole vectors may go beyond its end.
template <class A>
PIXNORM_INLINE int64_t tile_size(int64_t depth) {
  return (kTileRows * depth + 2 * kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

PIXNORM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// `count` columns of b (or rows of a) into (depth, width): from memory where they are neighbours, or where depths are.
// Stores of whole vectors may fill the next row, so rows are written in their order and each from its end. Columns
// beyond `count` become some numbers that nobody uses.
template <class A>
void pack_run(const A* from, int64_t stride, int64_t depth_stride, int64_t count, int64_t width, int64_t depth, A* to) {
  constexpr int n = kLanes<A>;
  int64_t k = 0;
  if (stride == 1) {
    // A whole vector at a row's end reads of the rows that follow; the last rows have none.
    const int64_t beyond = (count + n - 1) / n * n - count;
    for (; k < depth - (beyond + depth_stride - 1) / depth_stride; ++k) {
      for (int64_t i = 0; i < count; i += n) {
        const A* const at = from + k * depth_stride + i;
        store(to + k * width + i, load(at));
        __builtin_prefetch(at + kPanel<A>);  // of the next panel
      }
    }
  } else if (depth_stride == 1) {
    for (; k + n <= depth; k += n) {
      for (int64_t i = (count - 1) / n * n; i >= 0; i -= n) {
        const A* const at = from + i * stride + k;
        Vec<A> v[n];
#pragma GCC unroll 16
        for (int j = 0; j < n; ++j) {
          const A* const row = at + least(j, count - 1 - i) * stride;
          v[j] = load(row);
          __builtin_prefetch(row + n);
        }
        transpose<A>(v);
#pragma GCC unroll 16
        for (int j = 0; j < n; ++j) store(to + (k + j) * width + i, v[j]);
      }
    }
  }
  for (; k < depth; ++k) {
    for (int64_t i = 0; i < (count + n - 1) / n * n; ++i) {
      to[k * width + i] = i < count ? from[i * stride + k * depth_stride] : A(0);
    }
  }
}

// Depths [k0, k1) of `count` columns from the first on.
template <class A>
void pack(const Operand<A>& from, int64_t first, int64_t count, int64_t width, int64_t k0, int64_t k1, A* to) {
  for (int64_t k = k0; k < k1;) {
    const int64_t depth = least(k1 - k, from.run - k % from.run);
    pack_run(from.at(first, k), from.stride, from.depth_stride, count, width, depth, to);
    to += depth * width;
    k += depth;
  }
}

// Rows of a tile: as even as can be, so that none is too short to keep the multipliers busy.
struct Rows {
  int64_t first, count;
};

inline int64_t tiles_of(const GemmBlock& g) { return (g.m1 - g.m0 + kTileRows - 1) / kTileRows; }

PIXNORM_INLINE Rows rows_of(const GemmBlock& g, int64_t tile) {
  const int64_t tiles = tiles_of(g), rows = g.m1 - g.m0, first = rows * tile / tiles;
  return {g.m0 + first, rows * (tile + 1) / tiles - first};
}

// The depths of a block are cut evenly, too.
inline int64_t steps_of(const GemmBlock& g) { return (g.k1 - g.k0 + kDepth - 1) / kDepth; }
PIXNORM_INLINE int64_t depth_at(const GemmBlock& g, int64_t step) { return g.k0 + (g.k1 - g.k0) * step / steps_of(g); }
PIXNORM_INLINE int64_t most_depth(const GemmBlock& g) { return least(kDepth, g.k1 - g.k0); }

template <class A>
int64_t panels_of(const GemmBlock& g) {
  return (g.n1 - g.n0 + kPanel<A> - 1) / kPanel<A>;
}

// Elements of one step, packed: all rows of a block, and all its columns.
template <class A>
int64_t left_size(const GemmBlock& g) {
  return tiles_of(g) * tile_size<A>(most_depth(g));
}
template <class A>
int64_t right_size(const GemmBlock& g) {
  return panels_of<A>(g) * most_depth(g) * kPanel<A>;
}
// Elements of the panels that a block packs itself.
template <class A>
int64_t right_scratch_size() {
  return kDepth * kPanel<A>;
}

// Tile (panel) i of a block's step to its place in that step's memory.
template <class A>
void pack_left(const GemmBlock& g, const Operand<A>& a, int64_t step, int64_t tile, A* to) {
  const Rows rows = rows_of(g, tile);
  const int64_t k0 = depth_at(g, step), k1 = depth_at(g, step + 1);
  pack(a, rows.first, rows.count, rows.count, k0, k1, to + tile * tile_size<A>(most_depth(g)));
}

template <class A>
void pack_right(const GemmBlock& g, const Operand<A>& b, int64_t step, int64_t panel, A* to) {
  const int64_t first = g.n0 + panel * kPanel<A>, count = least(kPanel<A>, g.n1 - first);
  const int64_t width = count <= kLanes<A> ? kLanes<A> : kPanel<A>;
  pack(b, first, count, width, depth_at(g, step), depth_at(g, step + 1), to + panel * most_depth(g) * kPanel<A>);
}

// to (+)= less than 2 m numbers, as vectors of m, m / 2, ... of them.
template <class A, int m>
PIXNORM_INLINE void put(const A* from, A* to, int64_t count, bool add) {
  if (count & m) {
    typename Lanes<A, m>::type v, before;
    __builtin_memcpy(&v, from, sizeof(v));
    if (add) {
      __builtin_memcpy(&before, to, sizeof(v));
      v += before;
    }
    __builtin_memcpy(to, &v, sizeof(v));
    from += m;
    to += m;
  }
  if constexpr (m > 1) put<A, m / 2>(from, to, count, add);
}

// out (+)= R rows of a times n vectors of columns, of which the last may be missing. kRows: rows of a are neighbours
// and depths a_stride apart; else it is the other way round.
template <class A, int R, int n, bool kRows>
void multiply_tile(const A* a, int64_t a_stride, const A* b, int64_t b_stride, int64_t depth, A* out,
                   int64_t out_stride, int64_t columns, bool add) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {  // it would be waited for at the end
#pragma GCC unroll 2
    for (int v = 0; v < n; ++v) __builtin_prefetch(out + r * out_stride + v * kLanes<A>, 1);
  }
  Vec<A> sum[R][n] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k, b += b_stride) {
    Vec<A> right[n];
#pragma GCC unroll 2
    for (int v = 0; v < n; ++v) right[v] = load(b + v * kLanes<A>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<A> left = broadcast(kRows ? a[r] : a[r * a_stride]);
#pragma GCC unroll 2
      for (int v = 0; v < n; ++v) sum[r][v] += left * right[v];
    }
    a += kRows ? a_stride : 1;
  }
  if (columns == n * kLanes<A>) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < n; ++v) {
        A* const to = out + r * out_stride + v * kLanes<A>;
        store(to, add ? load(to) + sum[r][v] : sum[r][v]);
      }
    }
  } else {
    A row[R][n * kLanes<A>];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < n; ++v) store(row[r] + v * kLanes<A>, sum[r][v]);
    }
    for (int r = 0; r < R; ++r) put<A, (n * kLanes<A>) / 2>(row[r], out + r * out_stride, columns, add);
  }
}

template <class A>
using MultiplyTile = void (*)(const A*, int64_t, const A*, int64_t, int64_t, A*, int64_t, int64_t, bool);

template <class A, int n, bool kRows, int... r>
PIXNORM_INLINE MultiplyTile<A> tile_of_rows(int64_t rows, std::integer_sequence<int, r...>) {
  static constexpr MultiplyTile<A> kOfRows[] = {multiply_tile<A, r + 1, n, kRows>...};
  return kOfRows[rows - 1];
}

template <class A, int n>
PIXNORM_INLINE MultiplyTile<A> tile_of_rows(int64_t rows, bool neighbours) {
  constexpr auto kRows = std::make_integer_sequence<int, kTileRows>{};
  return neighbours ? tile_of_rows<A, n, true>(rows, kRows) : tile_of_rows<A, n, false>(rows, kRows);
}

// out (+)= a b of a block; what is to be packed here goes into scratch.
template <class A>
void multiply_block(const GemmBlock& g, const Operand<A>& a, const Operand<A>& b, A* out, int64_t out_stride, bool add,
                    A* scratch) {
  const int64_t tiles = tiles_of(g), panels = panels_of<A>(g), most = most_depth(g);
  const int64_t group = kDepth / most;  // panels that fill the first-level cache together
  const bool neighbours = a.use != Use::kInPlace || a.stride == 1;
  for (int64_t step = 0; step < steps_of(g); ++step) {
    const int64_t k0 = depth_at(g, step), depth = depth_at(g, step + 1) - k0;
    const A* left = a.use == Use::kPacked ? a.packed + step * left_size<A>(g) : nullptr;
    if (a.use == Use::kPack) {
      A* const to = scratch + kDepth * kPanel<A>;
      for (int64_t tile = 0; tile < tiles; ++tile) pack_left(g, a, step, tile, to);
      left = to;
    }
    for (int64_t p0 = 0; p0 < panels; p0 += group) {
      const int64_t p1 = least(p0 + group, panels);
      const A* right = b.use == Use::kPacked ? b.packed + step * right_size<A>(g) : nullptr;
      if (b.use == Use::kPack) {
        A* const to = scratch - p0 * most * kPanel<A>;
        for (int64_t panel = p0; panel < p1; ++panel) pack_right(g, b, step, panel, to);
        right = to;
      }
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const Rows rows = rows_of(g, tile);
        const A* const from = a.use == Use::kInPlace ? a.at(rows.first, k0) : left + tile * tile_size<A>(most);
        const int64_t stride = a.use != Use::kInPlace ? rows.count : neighbours ? a.depth_stride : a.stride;
        for (int64_t panel = p0; panel < p1; ++panel) {
          const int64_t first = g.n0 + panel * kPanel<A>, count = least(kPanel<A>, g.n1 - first);
          const bool one = count <= kLanes<A>, in_place = b.use == Use::kInPlace;
          const A* const columns = in_place ? b.at(first, k0) : right + panel * most * kPanel<A>;
          const int64_t b_stride = in_place ? b.depth_stride : one ? kLanes<A> : kPanel<A>;
          const auto multiply =
              one ? tile_of_rows<A, 1>(rows.count, neighbours) : tile_of_rows<A, 2>(rows.count, neighbours);
          multiply(from, stride, columns, b_stride, depth, out + rows.first * out_stride + first, out_stride, count,
                   add || step > 0);
        }
      }
    }
  }
}

// out (+)= the parts, which lie `part` apart; in their order.
template <class A>
void add_parts(const A* from, int64_t parts, int64_t part, A* out, int64_t count) {
  for (int64_t p = 0; p < parts; ++p, from += part) {
    int64_t i = 0;
    for (; i + kLanes<A> <= count; i += kLanes<A>) store(out + i, load(out + i) + load(from + i));
    for (; i < count; ++i) out[i] += from[i];
  }
}

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
template <class T>
void pack_run(const T* from, int64_t stride, int64_t depth_stride, int64_t count, int64_t width, int64_t depth,
              acc_t<T>* to) {
  using A = acc_t<T>;
  constexpr int n = kLanes<A>;
  int64_t k = 0;
  if (stride == 1) {
    // A whole vector at a row's end reads of the rows that follow; the last rows have none.
    const int64_t beyond = (count + n - 1) / n * n - count;
    for (; k < depth - (beyond + depth_stride - 1) / depth_stride; ++k) {
      for (int64_t i = 0; i < count; i += n) {
        const T* const at = from + k * depth_stride + i;
        store(to + k * width + i, load_as<T>(at));
        __builtin_prefetch(at + kPanel<A>);  // of the next panel
      }
    }
  } else if (depth_stride == 1) {
    for (; k + n <= depth; k += n) {
      for (int64_t i = (count - 1) / n * n; i >= 0; i -= n) {
        const T* const at = from + i * stride + k;
        Vec<A> v[n];
#pragma GCC unroll 16
        for (int j = 0; j < n; ++j) {
          const T* const row = at + least(j, count - 1 - i) * stride;
          v[j] = load_as<T>(row);
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
      to[k * width + i] = i < count ? static_cast<A>(from[i * stride + k * depth_stride]) : A(0);
    }
  }
}

// Depths [k0, k1) of `count` columns from the first on.
template <class T>
void pack(const Operand<T>& from, int64_t first, int64_t count, int64_t width, int64_t k0, int64_t k1, acc_t<T>* to) {
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

PIXNORM_INLINE int64_t tiles_of(const GemmBlock& g) { return (g.m1 - g.m0 + kTileRows - 1) / kTileRows; }

PIXNORM_INLINE Rows rows_of(const GemmBlock& g, int64_t tile) {
  const int64_t tiles = tiles_of(g), rows = g.m1 - g.m0, first = rows * tile / tiles;
  return {g.m0 + first, rows * (tile + 1) / tiles - first};
}

// The depths of a block are cut evenly, too.
PIXNORM_INLINE int64_t steps_of(const GemmBlock& g) { return (g.k1 - g.k0 + kDepth - 1) / kDepth; }
PIXNORM_INLINE int64_t depth_at(const GemmBlock& g, int64_t step) { return g.k0 + (g.k1 - g.k0) * step / steps_of(g); }
PIXNORM_INLINE int64_t most_depth(const GemmBlock& g) { return least(kDepth, g.k1 - g.k0); }

template <class A>
PIXNORM_INLINE int64_t panels_of(const GemmBlock& g) {
  return (g.n1 - g.n0 + kPanel<A> - 1) / kPanel<A>;
}

// Pieces of packed operands are the tiles (panels) of each step, one step after the other.
inline int64_t left_pieces(const GemmBlock& g) { return steps_of(g) * tiles_of(g); }
template <class A>
int64_t right_pieces(const GemmBlock& g) {
  return steps_of(g) * panels_of<A>(g);
}
template <class A>
int64_t left_bytes(const GemmBlock& g) {
  return left_pieces(g) * tile_size<A>(most_depth(g)) * static_cast<int64_t>(sizeof(A));
}
template <class A>
int64_t right_bytes(const GemmBlock& g) {
  return right_pieces<A>(g) * most_depth(g) * kPanel<A> * static_cast<int64_t>(sizeof(A));
}

// Packing costs a few per cent where each number is used a hundred times. What lies well is not packed: neighbours
// whose depths are near (pages, and sets of a cache), or, of the left one, depths side by side whose rows do not share
// sets. Half types are widened as they are packed.
template <class T, bool kLeft>
bool lies_well(const Operand<T>& o, int64_t depth, int64_t columns) {
  constexpr int64_t kNear = 256, kSameSets = 2048, size = sizeof(T);
  if (!std::is_same_v<T, acc_t<T>> || depth > o.run) return false;
  if (o.stride == 1) return o.depth_stride * size <= kNear && (kLeft || columns % kLanes<T> == 0);
  return kLeft && o.depth_stride == 1 && o.stride * size % kSameSets != 0;
}

template <class T>
void pack_left(const GemmBlock& g, const Operand<T>& a, int64_t piece, void* to) {
  using A = acc_t<T>;
  const int64_t tiles = tiles_of(g), step = piece / tiles, tile = piece % tiles;
  const Rows rows = rows_of(g, tile);
  pack(a, rows.first, rows.count, rows.count, depth_at(g, step), depth_at(g, step + 1),
       static_cast<A*>(to) + piece * tile_size<A>(most_depth(g)));
}

template <class T>
void pack_right(const GemmBlock& g, const Operand<T>& b, int64_t piece, void* to) {
  using A = acc_t<T>;
  const int64_t panels = panels_of<A>(g), step = piece / panels, panel = piece % panels;
  const int64_t first = g.n0 + panel * kPanel<A>, count = least(kPanel<A>, g.n1 - first);
  const int64_t width = count <= kLanes<A> ? kLanes<A> : kPanel<A>;
  pack(b, first, count, width, depth_at(g, step), depth_at(g, step + 1),
       static_cast<A*>(to) + piece * most_depth(g) * kPanel<A>);
}

// to = addend + less than 2 m numbers, as vectors of m, m / 2, ... of them.
template <class A, int m>
PIXNORM_INLINE void put(const A* from, const A* addend, A* to, int64_t count) {
  if (count & m) {
    typename Lanes<A, m>::type v, before;
    __builtin_memcpy(&v, from, sizeof(v));
    if (addend) {
      __builtin_memcpy(&before, addend, sizeof(v));
      v += before;
      addend += m;
    }
    __builtin_memcpy(to, &v, sizeof(v));
    from += m;
    to += m;
  }
  if constexpr (m > 1) put<A, m / 2>(from, addend, to, count);
}

// out = R rows of a times n vectors of columns, of which the last may be missing, + addends. kRows: rows of a are
// neighbours and depths a_stride apart; else it is the other way round.
template <class A, int R, int n, bool kRows>
void multiply_tile(const A* a, int64_t a_stride, const A* b, int64_t b_stride, int64_t depth, const Addends<A>& add,
                   A* out, int64_t out_stride, int64_t columns) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {  // it would be waited for at the end
#pragma GCC unroll 2
    for (int v = 0; v < n; ++v) __builtin_prefetch(out + r * out_stride + v * kLanes<A>, 1);
  }
  const A* const addend = add.matrix;
  Vec<A> sum[R][n] = {};
  if (add.of_rows) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < n; ++v) sum[r][v] = broadcast(add.of_rows[r]);
    }
  } else if (add.of_columns) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < n; ++v) sum[r][v] = load(add.of_columns + v * kLanes<A>);
    }
  }
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
        const int64_t at = r * out_stride + v * kLanes<A>;
        store(out + at, addend ? load(addend + at) + sum[r][v] : sum[r][v]);
      }
    }
  } else {
    A row[R][n * kLanes<A>];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < n; ++v) store(row[r] + v * kLanes<A>, sum[r][v]);
    }
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * out_stride;
      put<A, (n * kLanes<A>) / 2>(row[r], addend ? addend + at : nullptr, out + at, columns);
    }
  }
}

template <class A>
using MultiplyTile = void (*)(const A*, int64_t, const A*, int64_t, int64_t, const Addends<A>&, A*, int64_t, int64_t);

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

// Elements of scratch: panels that fill the first-level cache, tiles of all rows, and sums on their way to a half type.
template <class T, class O>
int64_t scratch_bytes(const GemmBlock& g) {
  using A = acc_t<T>;
  constexpr int64_t kTile = kTileRows * kPanel<A>;
  const int64_t sums = std::is_same_v<O, A> ? 0 : steps_of(g) > 1 ? tiles_of(g) * panels_of<A>(g) * kTile : kTile;
  return (kDepth * kPanel<A> + tiles_of(g) * tile_size<A>(most_depth(g)) + sums) * sizeof(A);
}

// out = matrix + sums.
template <class O>
void finish_tile(const acc_t<O>* sums, int64_t rows, int64_t columns, const O* matrix, O* out, int64_t out_stride) {
  using A = acc_t<O>;
  constexpr int n = kLanes<A>;
  for (int64_t r = 0; r < rows; ++r, sums += kPanel<A>) {
    const int64_t at = r * out_stride;
    int64_t i = 0;
    for (; i + n <= columns; i += n) {
      const Vec<A> v = load(sums + i);
      store_as<O>(out + at + i, matrix ? load_as<O>(matrix + at + i) + v : v);
    }
    for (; i < columns; ++i) out[at + i] = static_cast<O>((matrix ? static_cast<A>(matrix[at + i]) : A(0)) + sums[i]);
  }
}

// out = a b + addends of a block; what is to be packed here goes into scratch.
template <class T, class O>
void multiply_block(const GemmBlock& g, const Operand<T>& a, const Operand<T>& b, O* out, int64_t out_stride,
                    const Addends<O>& add, void* scratch) {
  using A = acc_t<T>;
  constexpr bool kWide = std::is_same_v<O, A>;
  const int64_t tiles = tiles_of(g), panels = panels_of<A>(g), most = most_depth(g), steps = steps_of(g);
  const int64_t group = kDepth / most;  // panels that fill the first-level cache together
  const int64_t tile_elements = tile_size<A>(most), panel_elements = most * kPanel<A>;
  A* const packed_panels = static_cast<A*>(scratch);
  A* const packed_tiles = packed_panels + kDepth * kPanel<A>;
  A* const sums = packed_tiles + tiles * tile_elements;
  const bool neighbours = a.use != Use::kInPlace || a.stride == 1;
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t k0 = depth_at(g, step), depth = depth_at(g, step + 1) - k0;
    const A* left = static_cast<const A*>(a.packed) + step * tiles * tile_elements;
    if (a.use == Use::kPack) {
      A* const to = packed_tiles - step * tiles * tile_elements;
      for (int64_t tile = 0; tile < tiles; ++tile) pack_left(g, a, step * tiles + tile, to);
      left = packed_tiles;
    }
    for (int64_t p0 = 0; p0 < panels; p0 += group) {
      const int64_t p1 = least(p0 + group, panels);
      const A* right = static_cast<const A*>(b.packed) + step * panels * panel_elements;
      if (b.use == Use::kPack) {
        A* const to = packed_panels - (step * panels + p0) * panel_elements;
        for (int64_t panel = p0; panel < p1; ++panel) pack_right(g, b, step * panels + panel, to);
        right = packed_panels - p0 * panel_elements;
      }
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const Rows rows = rows_of(g, tile);
        const A* from = left + tile * tile_elements;
        if constexpr (std::is_same_v<T, A>) {
          if (a.use == Use::kInPlace) from = a.at(rows.first, k0);
        }
        const int64_t stride = a.use != Use::kInPlace ? rows.count : neighbours ? a.depth_stride : a.stride;
        for (int64_t panel = p0; panel < p1; ++panel) {
          const int64_t first = g.n0 + panel * kPanel<A>, count = least(kPanel<A>, g.n1 - first);
          const bool one = count <= kLanes<A>, in_place = b.use == Use::kInPlace;
          const A* columns = right + panel * panel_elements;
          if constexpr (std::is_same_v<T, A>) {
            if (in_place) columns = b.at(first, k0);
          }
          const int64_t b_stride = in_place ? b.depth_stride : one ? kLanes<A> : kPanel<A>;
          const auto multiply =
              one ? tile_of_rows<A, 1>(rows.count, neighbours) : tile_of_rows<A, 2>(rows.count, neighbours);
          const Addends<O> here = add.at(rows.first, first, out_stride);
          O* const to = out + rows.first * out_stride + first;
          if constexpr (kWide) {
            multiply(from, stride, columns, b_stride, depth, step > 0 ? Addends<A>{to} : here, to, out_stride, count);
          } else {
            A* const sum = sums + (steps > 1 ? (tile * panels + panel) * kTileRows * kPanel<A> : 0);
            const Addends<A> wide = step > 0 ? Addends<A>{sum} : Addends<A>{nullptr, here.of_rows, here.of_columns};
            multiply(from, stride, columns, b_stride, depth, wide, sum, kPanel<A>, count);
            if (step == steps - 1) finish_tile<O>(sum, rows.count, count, here.matrix, to, out_stride);
          }
        }
      }
    }
  }
}

template <class T, class O>
GemmKernels<T, O> kernels() {
  using A = acc_t<T>;
  return {{lies_well<T, true>, left_pieces, left_bytes<A>, pack_left<T>},
          {lies_well<T, false>, right_pieces<A>, right_bytes<A>, pack_right<T>},
          scratch_bytes<T, O>,
          multiply_block<T, O>};
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

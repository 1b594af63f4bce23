// Matrix products of bfloat16 by instructions that add the products of pairs of depths to float32: those of AMX for
// tiles, or those of AVX-512 for vectors. Included by gemm.cpp for x86-64.
//
// Both operands are packed as tiles of 16 rows (columns) by 32 depths, 1 KB each: by rows, as [row][depth], and by
// columns as [pair of depths][column][2]. That is a tile of AMX, and a row of the second is a vector for AVX-512.
// Missing rows, columns and depths are zero. Rows whose depths are neighbours are tiles already, and are read where
// they lie.

constexpr int kTile = 16;       // rows and columns
constexpr int kTileDepth = 32;  // 64 bytes
constexpr int kTileElements = kTile * kTileDepth;
constexpr int kGroup = 2 * kTile;  // rows, and columns, that are multiplied at a time
// Packed columns this deep are 32 KB. Where results are rounded to bfloat16, sums have one step, and may be deeper.
constexpr int64_t kStepDepth = 512;

PIXNORM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
PIXNORM_INLINE int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

PIXNORM_INLINE __mmask32 bits(int64_t first, int64_t count) {
  return static_cast<__mmask32>(((uint64_t{1} << count) - 1) << first);
}

// Depths [k, k + depth) of `count` rows (or columns) from the first on, as a tile: by rows, or by pairs of depths.
template <bool kByRows>
void pack_tile(const Operand<BFloat16>& from, int64_t first, int64_t count, int64_t k, int64_t depth, void* to) {
  Vec<float> tile[kTile] = {};  // of pairs
  const bool by_rows = from.stride != 1;
  if (by_rows) {
    for (int64_t j = 0; j < depth;) {
      const int64_t run = least(depth - j, from.depth_stride == 1 ? from.run - (k + j) % from.run : 1);
      const BFloat16* row = from.at(first, k + j) - j;
      const __mmask32 mask = bits(j, run);
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i, row += from.stride) {
        if (i < count) tile[i] = bit_cast<Vec<float>>(_mm512_mask_loadu_epi16(bit_cast<__m512i>(tile[i]), mask, row));
      }
      j += run;
    }
  } else {
    const __mmask16 mask = static_cast<__mmask16>(bits(0, count));
    const __m512i evens = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(kTile));
    const __m512i interleave = _mm512_or_si512(evens, _mm512_slli_epi32(odds, 16));
    const bool one_run = k % from.run + depth <= from.run;
    const BFloat16* const data = from.at(first, k);
    const auto row = [&](int64_t j) __attribute__((always_inline)) {
      return _mm256_maskz_loadu_epi16(mask, one_run ? data + j * from.depth_stride : from.at(first, k + j));
    };
#pragma GCC unroll 16
    for (int j = 0; j < kTile; ++j) {
      if (2 * j < depth) {
        const __m256i even = row(2 * j), odd = 2 * j + 1 < depth ? row(2 * j + 1) : _mm256_setzero_si256();
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
        tile[j] = bit_cast<Vec<float>>(_mm512_permutexvar_epi16(interleave, both));
      }
    }
  }
  if (by_rows != kByRows) transpose<float>(tile);
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) store(static_cast<float*>(to) + i * kTile, tile[i]);
}

PIXNORM_INLINE int64_t group_elements(int64_t depth) { return ceiling(depth, kTileDepth) * 2 * kTileElements; }

// A group of rows (columns) from the first on, by depths [k0, k1): for each kTileDepth of them two tiles.
template <bool kByRows>
void pack_group(const Operand<BFloat16>& from, int64_t first, int64_t end, int64_t k0, int64_t k1, BFloat16* to) {
  for (int64_t k = k0; k < k1; k += kTileDepth) {
    for (int64_t i = first; i < first + kGroup; i += kTile, to += kTileElements) {
      if (i < end) pack_tile<kByRows>(from, i, least(kTile, end - i), k, least(kTileDepth, k1 - k), to);
    }
  }
}

// All groups, one after the other; in the order in which the numbers lie in memory.
template <bool kByRows>
void pack_groups(const Operand<BFloat16>& from, int64_t first, int64_t end, int64_t k0, int64_t k1, BFloat16* to) {
  const int64_t group = group_elements(k1 - k0), depth = from.stride == 1 ? kTileDepth : k1 - k0;
  for (int64_t k = k0; k < k1; k += depth) {
    for (int64_t i = first; i < end; i += kGroup) {
      pack_group<kByRows>(from, i, end, k, least(k + depth, k1),
                          to + (i - first) / kGroup * group + group_elements(k - k0));
    }
  }
}

template <bool kRows>
int64_t groups_of(const GemmBlock& g) {
  return ceiling(kRows ? g.m1 - g.m0 : g.n1 - g.n0, kGroup);
}

template <bool kRows>
int64_t packed_bytes(const GemmBlock& g) {
  return groups_of<kRows>(g) * group_elements(g.k1 - g.k0) * static_cast<int64_t>(sizeof(BFloat16));
}

template <bool kRows>
void pack(const GemmBlock& g, const Operand<BFloat16>& from, int64_t group, void* to) {
  pack_group<kRows>(from, (kRows ? g.m0 : g.n0) + group * kGroup, kRows ? g.m1 : g.n1, g.k0, g.k1,
                    static_cast<BFloat16*>(to) + group * group_elements(g.k1 - g.k0));
}

// Neighbouring depths whose rows do not share sets of a cache.
inline bool rows_lie_well(const Operand<BFloat16>& o, int64_t depth, int64_t) {
  constexpr int64_t kSameSets = 2048, size = sizeof(BFloat16);
  return o.depth_stride == 1 && depth <= o.run && o.stride * size % kSameSets != 0;
}

inline bool never(const Operand<BFloat16>&, int64_t, int64_t) { return false; }

// ---- sums of a group of rows by a group of columns, (kGroup, kGroup) ----

// A group of rows: each is `stride` after the one before, and so are its depths by kTileDepth.
struct RowGroup {
  const BFloat16* data;
  int64_t stride, half, step;
};

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  constexpr TileConfig() {
    for (int i = 0; i < 8; ++i) row_bytes[i] = 64, rows[i] = kTile;
  }
};

// The compiler does not know that instructions on tiles read and write memory.
PIXNORM_INLINE void memory_barrier() { asm volatile("" ::: "memory"); }

// kRows, kColumns: tiles. Tiles 0 to 3 are sums, 4 and 5 of rows, 6 and 7 of columns.
template <int kRows, int kColumns>
void multiply_tiles(const RowGroup& a, const BFloat16* b, int64_t tiles, float* sums) {
  memory_barrier();
  _tile_zero(0);
  if constexpr (kColumns == 2) _tile_zero(1);
  if constexpr (kRows == 2) _tile_zero(2);
  if constexpr (kRows == 2 && kColumns == 2) _tile_zero(3);
  const BFloat16* row = a.data;
  const int64_t stride = a.stride * static_cast<int64_t>(sizeof(BFloat16));
  for (int64_t k = 0; k < tiles; ++k, row += a.step, b += 2 * kTileElements) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, row, stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns == 2) {
      _tile_loadd(7, b + kTileElements, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRows == 2) {
      _tile_loadd(5, row + a.half, stride);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kRows == 2 && kColumns == 2) _tile_dpbf16ps(3, 5, 7);
  }
  constexpr int64_t kStride = kGroup * sizeof(float);
  _tile_stored(0, sums, kStride);
  if constexpr (kColumns == 2) _tile_stored(1, sums + kTile, kStride);
  if constexpr (kRows == 2) _tile_stored(2, sums + kTile * kGroup, kStride);
  if constexpr (kRows == 2 && kColumns == 2) _tile_stored(3, sums + kTile * kGroup + kTile, kStride);
  memory_barrier();
}

template <int kColumns>
void multiply_vectors(const RowGroup& a, const BFloat16* b, int64_t tiles, int64_t rows, float* sums) {
  constexpr int kAtOnce = 8;  // rows
  for (int64_t r = 0; r < rows; r += kAtOnce, sums += kAtOnce * kGroup) {
    const BFloat16* row = a.data + r / kTile * a.half + r % kTile * a.stride;
    const BFloat16* column = b;
    __m512 sum[kAtOnce][kColumns] = {};
    for (int64_t k = 0; k < tiles; ++k, row += a.step, column += 2 * kTileElements) {
#pragma GCC unroll 2
      for (int pair = 0; pair < kTile; ++pair) {
        __m512bh right[kColumns];
#pragma GCC unroll 2
        for (int v = 0; v < kColumns; ++v) {
          right[v] =
              bit_cast<__m512bh>(load(reinterpret_cast<const float*>(column + v * kTileElements) + pair * kTile));
        }
#pragma GCC unroll 8
        for (int i = 0; i < kAtOnce; ++i) {
          int32_t both;
          __builtin_memcpy(&both, row + i * a.stride + 2 * pair, sizeof(both));
          const __m512bh left = bit_cast<__m512bh>(_mm512_set1_epi32(both));
#pragma GCC unroll 2
          for (int v = 0; v < kColumns; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], left, right[v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kAtOnce; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kColumns; ++v) _mm512_storeu_ps(sums + i * kGroup + v * kTile, sum[i][v]);
    }
  }
}

template <bool kTiles>
PIXNORM_INLINE void multiply_group(const RowGroup& a, const BFloat16* b, int64_t tiles, int64_t rows, int64_t columns,
                                   float* sums) {
  if constexpr (kTiles) {
    const auto multiply = rows > kTile      ? columns > kTile ? multiply_tiles<2, 2> : multiply_tiles<2, 1>
                          : columns > kTile ? multiply_tiles<1, 2>
                                            : multiply_tiles<1, 1>;
    multiply(a, b, tiles, sums);
  } else {
    const auto multiply = columns > kTile ? multiply_vectors<2> : multiply_vectors<1>;
    multiply(a, b, tiles, rows, sums);
  }
}

// A group of sums goes to out, with addends.
template <class O>
PIXNORM_INLINE void finish_group(const float* sums, int64_t rows, int64_t columns, const Addends<O>& add, O* out,
                                 int64_t out_stride) {
  const __m512 zero = _mm512_setzero_ps();
  const __m512 of_columns[2] = {add.of_columns ? _mm512_loadu_ps(add.of_columns) : zero,
                                add.of_columns ? _mm512_loadu_ps(add.of_columns + kTile) : zero};
  const __mmask32 mask = bits(0, columns);
  for (int64_t r = 0; r < rows; ++r) {
    const __m512 of_row = add.of_rows ? _mm512_set1_ps(add.of_rows[r]) : zero;
    __m512 v[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      v[half] = _mm512_load_ps(sums + r * kGroup + half * kTile) + of_columns[half] + of_row;
    }
    const O* const before = add.matrix ? add.matrix + r * out_stride : nullptr;
    O* const to = out + r * out_stride;
    if constexpr (std::is_same_v<O, float>) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __mmask16 of_half = static_cast<__mmask16>(mask >> half * kTile);
        if (before) v[half] += _mm512_maskz_loadu_ps(of_half, before + half * kTile);
        _mm512_mask_storeu_ps(to + half * kTile, of_half, v[half]);
      }
    } else {
      if (before) {
        const __m512i both = _mm512_maskz_loadu_epi16(mask, before);
        v[0] += bit_cast<__m512>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16));
        v[1] += bit_cast<__m512>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16));
      }
      _mm512_mask_storeu_epi16(to, mask, bit_cast<__m512i>(_mm512_cvtne2ps_pbh(v[1], v[0])));
    }
  }
}

template <class O>
PIXNORM_INLINE int64_t step_depth(const GemmBlock& g) {
  return std::is_same_v<O, float> ? least(kStepDepth, g.k1 - g.k0) : g.k1 - g.k0;
}

template <class O>
int64_t scratch_bytes(const GemmBlock& g) {
  return (groups_of<true>(g) + groups_of<false>(g)) * group_elements(step_depth<O>(g)) *
         static_cast<int64_t>(sizeof(BFloat16));
}

// out = a b + addends of a block; what is to be packed here goes into scratch.
template <class O, bool kTiles>
void multiply_block(const GemmBlock& g, const Operand<BFloat16>& a, const Operand<BFloat16>& b, O* out,
                    int64_t out_stride, const Addends<O>& add, void* scratch) {
  static constexpr TileConfig config;
  if constexpr (kTiles) _tile_loadconfig(&config);
  const int64_t step = step_depth<O>(g);
  for (int64_t k0 = g.k0; k0 < g.k1; k0 += step) {
    const int64_t k1 = least(k0 + step, g.k1), tiles = ceiling(k1 - k0, kTileDepth);
    const int64_t group = group_elements(k1 - k0);
    BFloat16* const packed_rows = static_cast<BFloat16*>(scratch);
    BFloat16* const packed_columns = packed_rows + groups_of<true>(g) * group;
    const bool in_place = a.use == Use::kInPlace && (k1 - k0) % kTileDepth == 0 && (g.m1 - g.m0) % kTile == 0;
    if (a.use != Use::kPacked && !in_place) pack_groups<true>(a, g.m0, g.m1, k0, k1, packed_rows);
    if (b.use != Use::kPacked) pack_groups<false>(b, g.n0, g.n1, k0, k1, packed_columns);
    // Groups that were packed before have the depths of all steps.
    const int64_t all = group_elements(g.k1 - g.k0), before = group_elements(k0 - g.k0);
    const auto packed = [&](const Operand<BFloat16>& o, const BFloat16* here, int64_t i) {
      return o.use == Use::kPacked ? static_cast<const BFloat16*>(o.packed) + i * all + before : here + i * group;
    };
    for (int64_t m = g.m0; m < g.m1; m += kGroup) {
      const int64_t rows = least(kGroup, g.m1 - m);
      const RowGroup row_group = in_place ? RowGroup{a.at(m, k0), a.stride, kTile * a.stride, kTileDepth}
                                          : RowGroup{packed(a, packed_rows, (m - g.m0) / kGroup), kTileDepth,
                                                     kTileElements, 2 * kTileElements};
      for (int64_t n = g.n0; n < g.n1; n += kGroup) {
        const int64_t columns = least(kGroup, g.n1 - n);
        O* const to = out + m * out_stride + n;
        for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(to + r * out_stride, 1);
        alignas(64) float sums[kGroup * kGroup];
        const BFloat16* const right = packed(b, packed_columns, (n - g.n0) / kGroup);
        multiply_group<kTiles>(row_group, right, tiles, rows, columns, sums);
        finish_group<O>(sums, rows, columns, k0 > g.k0 ? Addends<O>{to} : add.at(m, n, out_stride), to, out_stride);
      }
    }
  }
  if constexpr (kTiles) _tile_release();
}

template <class O, bool kTiles>
GemmKernels<BFloat16, O> kernels() {
  return {{rows_lie_well, groups_of<true>, packed_bytes<true>, pack<true>},
          {never, groups_of<false>, packed_bytes<false>, pack<false>},
          scratch_bytes<O>,
          multiply_block<O, kTiles>};
}

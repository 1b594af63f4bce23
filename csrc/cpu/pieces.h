// Passes over a batch of images on the CPU: how images are cut into pieces, the order of the pieces, and sums over
// them.
//
// Work is cut by shape alone and partial sums are added in a fixed order, so results do not depend on the number of
// threads.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "cpu/images.h"
#include "cpu/memory.h"
#include "cpu/moments.h"
#include "cpu/parallel.h"

namespace pixnorm {

// n images, and how their statistics are grouped: all n together (batch norm), or each by itself (instance norm).
struct Batch {
  int64_t n;
  ImageShape shape;
  bool instance;

  int64_t groups() const { return instance ? n : 1; }  // of statistics
  int64_t statistics() const { return groups() * shape.channels; }
  int64_t samples() const { return instance ? 1 : n; }  // of a group
};

// Images are cut into pieces, and grouped into units, whose statistics depend on nothing else: the pieces of some
// channels of a group of samples. If a unit fits in the L2 cache it is resident: one thread takes it through all
// passes, so that memory is read once. Otherwise all threads go through the pieces, pass by pass.
//
// A piece is contiguous: in channels_last it has all channels, and in NCHW several channels only if planes are small
// and whole, so that what is done once per piece does not count.
struct Plan {
  Batch batch;
  int64_t block, blocks;      // channels of a piece
  int64_t part_rows, parts;   // rows of a piece
  int64_t grain, unit_grain;  // pieces and units that are worth a thread
  bool resident;

  // `elements`: of what the passes over a channel of an image have in common; of `element` bytes each.
  Plan(const Batch& batch, int64_t elements, int64_t element) : batch(batch) {
    const ImageShape& s = batch.shape;
    // Sums over a part are in float32.
    constexpr int64_t kPixels = 4096, kPixelsOfAllChannels = 256, kGrain = 1 << 14;
    part_rows = std::clamp<int64_t>((s.channels_last ? kPixelsOfAllChannels : kPixels) / s.w, 1, s.h);
    parts = ceil_div(s.h, part_rows);
    constexpr int64_t kRunBytes = 1 << 12, kResidentBytes = 1 << 20, kEnoughUnits = 8;
    const int64_t run = s.pixels() * s.upsample * s.upsample * element;
    const int64_t most = std::min(s.channels, ceil_div(batch.statistics(), kEnoughUnits));
    block = s.channels_last ? s.channels : parts > 1 ? 1 : std::clamp<int64_t>(kRunBytes / run, 1, most);
    blocks = ceil_div(s.channels, block);
    grain = ceil_div(kGrain, part_rows * s.w * block);
    unit_grain = ceil_div(kGrain, batch.samples() * block * s.pixels());
    resident =
        batch.groups() * blocks >= kEnoughUnits && batch.samples() * block * elements * element <= kResidentBytes;
  }

  int64_t channels(int64_t piece) const { return std::min(block, batch.shape.channels - piece * block); }
  int64_t rows(int64_t part) const { return std::min(part_rows, batch.shape.h - part * part_rows); }

  // Of the first element of a piece.
  int64_t offset(int64_t n, int64_t piece, int64_t part) const {
    const ImageShape& s = batch.shape;
    return n * s.elements() + piece * block * s.pixels() + part * part_rows * s.row();
  }

  // Calls f(sample, block, part, scratch of so many A) for all pieces.
  template <class A, class F>
  void for_pieces(int64_t scratch_size, const F& f) const {
    parallel_for(0, batch.n * blocks * parts, grain, [&](int64_t begin, int64_t end) {
      const Buffer<A> scratch(scratch_size);
      for (int64_t i = begin; i < end; ++i) f(i / parts / blocks, i / parts % blocks, i % parts, scratch.data());
    });
  }

  // Calls f(group, block, scratch, moments of each channel of the unit and of a sample of it) for all units.
  template <class A, class F>
  void for_units(int64_t scratch_size, const F& f) const {
    parallel_for(0, batch.groups() * blocks, unit_grain, [&](int64_t begin, int64_t end) {
      const Buffer<A> scratch(scratch_size);
      const Buffer<Moments> moments(2 * block);
      for (int64_t i = begin; i < end; ++i) f(i / blocks, i % blocks, scratch.data(), moments.data());
    });
  }

  // Calls f(sample, part) for the pieces of a unit.
  template <class F>
  void for_pieces_of(int64_t group, const F& f) const {
    for (int64_t n = group * batch.samples(); n < (group + 1) * batch.samples(); ++n) {
      for (int64_t part = 0; part < parts; ++part) f(n, part);
    }
  }

  // Two passes over the pieces, reduce and apply, as for_pieces() calls them; between them finish(group, c0, c1) makes
  // the coefficients of channels [c0, c1) from what reduce has summed.
  template <class A, class Reduce, class Finish, class Apply>
  void reduce_and_apply(int64_t scratch_size, const Reduce& reduce, const Finish& finish, const Apply& apply) const {
    if (resident) {
      for_units<A>(scratch_size, [&](int64_t group, int64_t piece, A* scratch, Moments*) {
        for_pieces_of(group, [&](int64_t n, int64_t part) { reduce(n, piece, part, scratch); });
        finish(group, piece * block, piece * block + channels(piece));
        for_pieces_of(group, [&](int64_t n, int64_t part) { apply(n, piece, part, scratch); });
      });
      return;
    }
    for_pieces<A>(scratch_size, reduce);
    constexpr int64_t kChannels = 64;
    const int64_t c = batch.shape.channels, parts_of_channels = ceil_div(c, kChannels);
    parallel_for(0, batch.groups() * parts_of_channels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c0 = i % parts_of_channels * kChannels;
        finish(i / parts_of_channels, c0, std::min(c0 + kChannels, c));
      }
    });
    for_pieces<A>(scratch_size, apply);
  }
};

// Partial sums of each part of each image, [image][part][count][channels].
struct Sums {
  const Plan& plan;
  int64_t count;
  Buffer<double> data;

  Sums(const Plan& plan, int64_t count)
      : plan(plan), count(count), data(plan.batch.n * plan.parts * count * plan.batch.shape.channels) {}

  double* of(int64_t n, int64_t part, int64_t which) const {
    return data.data() + ((n * plan.parts + part) * count + which) * plan.batch.shape.channels;
  }
};

// The first sums of each image, [n][channels], where per_sample, otherwise of all images, [channels].
template <class A>
std::vector<std::vector<A>> add_sums(const Sums& sums, std::initializer_list<bool> per_sample) {
  const int64_t images = sums.plan.batch.n, channels = sums.plan.batch.shape.channels;
  std::vector<std::vector<A>> totals;
  for (const bool each : per_sample) totals.emplace_back((each ? images : 1) * channels);
  parallel_for(0, channels, 64, [&](int64_t begin, int64_t end) {
    for (size_t of = 0; of < totals.size(); ++of) {
      const bool each = per_sample.begin()[of];
      std::vector<double> total(end - begin, 0);
      const auto give = [&](int64_t row) {
        std::copy(total.begin(), total.end(), totals[of].begin() + row * channels + begin);
      };
      for (int64_t n = 0; n < images; ++n) {
        for (int64_t part = 0; part < sums.plan.parts; ++part) {
          const double* from = sums.of(n, part, of);
          for (int64_t c = begin; c < end; ++c) total[c - begin] += from[c];
        }
        if (!each) continue;
        give(n);
        std::fill(total.begin(), total.end(), 0.0);
      }
      if (!each) give(0);
    }
  });
  return totals;
}

}  // namespace pixnorm

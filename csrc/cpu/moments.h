// Means and sums of squared deviations, and how they merge.
#pragma once

#include <cstdint>

namespace pixnorm {

// Mean, and sum of squared deviations from it.
struct Moments {
  double mean, m2;
};

// Chan's formula: merges the moments of `count` values of each channel with those of `more` others.
inline void merge(Moments* moments, double count, const Moments* others, double more, int64_t channels) {
  const double share = more / (count + more), weight = count * share;
  for (int64_t c = 0; c < channels; ++c) {
    const double delta = others[c].mean - moments[c].mean;
    moments[c].mean += delta * share;
    moments[c].m2 += others[c].m2 + delta * delta * weight;
  }
}

}  // namespace pixnorm

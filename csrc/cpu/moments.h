// Means and sums of squared deviations, and how they merge.
#pragma once

namespace pixnorm {

// Mean, and sum of squared deviations from it.
struct Moments {
  double mean, m2;
};

// Chan's formula: merges the moments of `count` values with those of `more` others.
inline void merge(Moments& moments, double count, const Moments& other, double more) {
  const double delta = other.mean - moments.mean, share = more / (count + more);
  moments.mean += delta * share;
  moments.m2 += other.m2 + delta * delta * count * share;
}

}  // namespace pixnorm

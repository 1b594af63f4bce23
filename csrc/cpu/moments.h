// Batch statistics, merged from those of runs.
#pragma once

namespace pixnorm {

// Mean and sum of squared deviations of a run of values.
struct Moments {
  double mean, m2;
};

// Chan's merge of `count` values with `more` others.
inline void merge(Moments& moments, double count, const Moments& other, double more) {
  const double delta = other.mean - moments.mean, share = more / (count + more);
  moments.mean += delta * share;
  moments.m2 += other.m2 + delta * delta * count * share;
}

}  // namespace pixnorm

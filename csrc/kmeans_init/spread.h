// What an interval of the sorted points costs.
#pragma once

namespace effkern::kmeans_init {

// Moments of some points about a common centre.
template <class Real>
struct Sums {
  Real mass = 0, first = 0, second = 0;
};

// Squared distances to the mean, summed, of the points between two positions; 0 where they are in the wrong order.
template <class Real>
inline double spread(const Sums<Real>& before, const Sums<Real>& after) {
  const Real mass = after.mass - before.mass;
  const Real first = after.first - before.first;
  const Real rest = after.second - before.second - first * first / mass;
  return mass > 0 && rest > 0 ? static_cast<double>(rest) : 0.0;
}

}  // namespace effkern::kmeans_init

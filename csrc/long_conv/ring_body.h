// Products in the ring of a plan: loading a sequence into rows, working on the rows, storing what they became.
#pragma once

#include "core/cpu/fft.h"
#include "long_conv/kernel.h"

namespace effkern {
namespace EFFKERN_UNIT {

using long_conv::Plan;
using long_conv::Taps;
using long_conv::Team;

template <class Body>
EFFKERN_INLINE void run(const Team& team, int64_t count, const Body& body) {
  team.run(
      team, count,
      [](void* context, int64_t begin, int64_t end, int64_t slot) {
        (*static_cast<const Body*>(context))(begin, end, slot);
      },
      const_cast<Body*>(&body));
}

EFFKERN_INLINE int64_t rows_floats(const Plan& plan) { return round_up(2 * plan.rows * plan.row_stride, 16); }
EFFKERN_INLINE int64_t spectrum_floats(const Plan& plan) { return round_up(2 * plan.size, 16); }
EFFKERN_INLINE int64_t tile_floats(const Plan& plan) { return round_up(3 * plan.rows * plan.tile, 16); }

static int64_t scratch_floats(const Plan* plan, const Taps&, bool backward, int64_t slots) {
  return (backward ? 2 : 1) * (rows_floats(*plan) + spectrum_floats(*plan)) + slots * tile_floats(*plan);
}

// What a channel is worked on with: the rows of one or two sequences, the spectrum of the taps and that of their
// gradient, and a tile for every slot, complex and then real.
struct Scratch {
  const Plan& plan;
  const Team& team;
  float *a, *b, *k, *d, *tiles;

  Scratch(const Plan& plan_in, const Team& team_in, bool backward, void* memory)
      : plan(plan_in),
        team(team_in),
        a(static_cast<float*>(memory)),
        b(backward ? a + rows_floats(plan) : nullptr),
        k(a + (backward ? 2 : 1) * rows_floats(plan)),
        d(backward ? k + spectrum_floats(plan) : nullptr),
        tiles(k + (backward ? 2 : 1) * spectrum_floats(plan)) {}

  EFFKERN_MEMBER float* tile(int64_t slot) const { return tiles + slot * tile_floats(plan); }
  EFFKERN_MEMBER float* real(int64_t slot) const { return tile(slot) + 2 * plan.rows * plan.tile; }
};

// What happens to a row between the passes down and back up.
enum class Step {
  spectrum,           // d = a: no way back
  convolve,           // a = a k
  correlate,          // a = a conj(k)
  gradient,           // d += a conj(b); a = a conj(k)
  gradients,          // the same, and b = b k
  taps,               // d += a conj(b): no way back
  restore,            // a = d
  restore_imaginary,  // a = -i d, whose real part is the imaginary part of d
};

// Corresponding places of the rows and of the spectra.
struct Places {
  float *a, *b;
  const float* k;
  float* d;
  bool fresh;  // d holds nothing yet: what would be added is stored

  EFFKERN_MEMBER Places at(int64_t row_elements, int64_t spectrum_elements) const {
    return {a ? a + 2 * row_elements : a, b ? b + 2 * row_elements : b, k ? k + 2 * spectrum_elements : k,
            d ? d + 2 * spectrum_elements : d, fresh};
  }
};

template <Step kStep>
static void leaf_step(const float* factors, const Places& at) {
  constexpr bool kTwo = kStep == Step::gradient || kStep == Step::gradients || kStep == Step::taps;
  Leaf first, second;
  if (kStep == Step::restore || kStep == Step::restore_imaginary) {
    EFFKERN_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      const Complex x = complex_load(at.d + 2 * kLanes * i);
      first.x[i] = kStep == Step::restore ? x : Complex{x.im, vsub(vzero(), x.re)};
    }
    return leaf_join(first, factors, at.a);
  }
  leaf_split(at.a, factors, first);
  if (kTwo) leaf_split(at.b, factors, second);
  EFFKERN_UNROLL
  for (int i = 0; i < kLanes; ++i) {
    if (kStep == Step::spectrum) complex_store(at.d + 2 * kLanes * i, first.x[i]);
    if (kTwo) {
      float* sum = at.d + 2 * kLanes * i;
      const Complex product = times<true>(first.x[i], second.x[i]);
      complex_store(sum, at.fresh ? product : complex_load(sum) + product);
    }
    if (kStep == Step::spectrum || kStep == Step::taps) continue;
    const Complex k = complex_load(at.k + 2 * kLanes * i);
    first.x[i] = times<kStep != Step::convolve>(first.x[i], k);
    if (kStep == Step::gradients) second.x[i] = times<false>(second.x[i], k);
  }
  if (kStep == Step::spectrum || kStep == Step::taps) return;
  leaf_join(first, factors, at.a);
  if (kStep == Step::gradients) leaf_join(second, factors, at.b);
}

// A block of a row: down through the passes that are left, the step, and back up. Depth first, so that a block is in
// the cache from the pass that makes it to the one that takes it back.
template <Step kStep>
static void walk(const FftRing& ring, int depth, int64_t block, const Places& at) {
  constexpr bool kDown = kStep != Step::restore && kStep != Step::restore_imaginary;
  constexpr bool kTwo = kStep == Step::gradient || kStep == Step::gradients || kStep == Step::taps;
  if (depth == ring.depth) return leaf_step<kStep>(ring.leaves + block * 2 * kLanes * kLanes, at);
  const FftLevel& level = ring.levels[depth];
  if (kDown) split<false>(level, block, at.a, at.a);
  if (kTwo) split<false>(level, block, at.b, at.b);
  for (int p = 0; p < level.radix; ++p)
    walk<kStep>(ring, depth + 1, block * level.radix + p, at.at(p * level.remainder, p * level.remainder));
  if (kStep != Step::spectrum && kStep != Step::taps) join<false>(level, block, at.a, at.a);
  if (kStep == Step::gradients) join<false>(level, block, at.b, at.b);
}

template <Step kStep>
static void work_on_rows(const Scratch& scratch, const Places& places) {
  const Plan& plan = scratch.plan;
  run(scratch.team, plan.rows, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t p = begin; p < end; ++p)
      walk<kStep>(plan.inner, plan.whole ? 1 : 0, plan.whole ? p : 0, places.at(p * plan.row_stride, p * plan.columns));
  });
}

// The passes down the columns of a tile. Its first pass reads `real` if the sequence is, else the tile itself.
static void split_tile(const Plan& plan, const float* real, float* tile) {
  for (int d = 0; d < plan.outer.depth; ++d) {
    const FftLevel& level = plan.outer.levels[d];
    const int64_t length = level.remainder * level.radix;
    for (int64_t block = 0; block * length < plan.outer.size; ++block) {
      float* data = tile + 2 * block * length;
      if (d == 0 && real) {
        split<true>(level, block, real, data);
      } else {
        split<false>(level, block, data, data);
      }
    }
  }
}

static void join_tile(const Plan& plan, float* tile, float* real) {
  for (int d = plan.outer.depth - 1; d >= 0; --d) {
    const FftLevel& level = plan.outer.levels[d];
    const int64_t length = level.remainder * level.radix;
    for (int64_t block = 0; block * length < plan.outer.size; ++block) {
      float* data = tile + 2 * block * length;
      if (d == 0) {
        join<true>(level, block, data, real);
      } else {
        join<false>(level, block, data, data);
      }
    }
  }
}

// Between a tile and its columns of the rows, turned by the plan's factors.
template <bool kBack>
static void turn_tile(const Plan& plan, int64_t tile_index, float* tile, float* rows) {
  const float* high = plan.turn_high + 2 * tile_index * plan.rows;
  for (int64_t p = 0; p < plan.rows; ++p) {
    const Complex far = complex_broadcast(high + 2 * p);
    const float* low = plan.turn_low + 2 * p * plan.tile;
    float* in_tile = tile + 2 * p * plan.tile;
    float* in_row = rows + 2 * (p * plan.row_stride + tile_index * plan.tile);
    for (int64_t c = 0; c < 2 * plan.tile; c += 2 * kLanes) {
      const Complex turn = times<false>(complex_load(low + c), far);
      if (kBack) {
        complex_store(in_tile + c, times<true>(complex_load(in_row + c), turn));
      } else {
        complex_store(in_row + c, times<false>(complex_load(in_tile + c), turn));
      }
    }
  }
}

// Loads a sequence: fill(n, count, out) writes its numbers n to n + count, complex as fft.h has them where kComplex.
template <bool kComplex, class Fill>
static void load_rows(const Scratch& scratch, const Fill& fill, float* rows) {
  const Plan& plan = scratch.plan;
  run(scratch.team, plan.columns / plan.tile, [&](int64_t begin, int64_t end, int64_t slot) {
    float* tile = plan.whole ? rows : scratch.tile(slot);
    float* real = scratch.real(slot);
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t p = 0; p < plan.rows; ++p)
        fill(p * plan.columns + t * plan.tile, plan.tile, kComplex ? tile + 2 * p * plan.tile : real + p * plan.tile);
      split_tile(plan, kComplex ? nullptr : real, tile);
      if (!plan.whole) turn_tile<false>(plan, t, tile, rows);
    }
  });
}

// Hands the real parts of the sequence that the rows hold to take(n, count, numbers); the last run may go beyond the
// end.
template <class Take>
static void store_rows(const Scratch& scratch, float* rows, int64_t sequence_end, const Take& take) {
  const Plan& plan = scratch.plan;
  run(scratch.team, plan.columns / plan.tile, [&](int64_t begin, int64_t end, int64_t slot) {
    float* tile = plan.whole ? rows : scratch.tile(slot);
    float* real = scratch.real(slot);
    for (int64_t t = begin; t < end; ++t) {
      if (!plan.whole) turn_tile<true>(plan, t, tile, rows);
      join_tile(plan, tile, real);
      for (int64_t p = 0; p < plan.rows; ++p) {
        const int64_t n = p * plan.columns + t * plan.tile;
        if (n >= sequence_end) break;
        take(n, min64(plan.tile, round_up(sequence_end - n, kLanes)), real + p * plan.tile);
      }
    }
  });
}

}  // namespace EFFKERN_UNIT
}  // namespace effkern

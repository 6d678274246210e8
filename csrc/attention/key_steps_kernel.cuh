// The key tiles that a query tile visits, in the order in which kernels with masks walk them. Plain integer functions,
// so that the tests can check them on the host over all small shapes.
#pragma once

#include "attention/schedule_kernel.cuh"

namespace effkern::attention {

constexpr int kUnbounded = 1 << 30;

// Masks that leave a query one interval of keys, and perhaps the first keys of all.
struct Window {
  int left = kUnbounded, right = kUnbounded;  // position p sees p - left .. p + right
  int sink = 0;                               // and of the keys up to p + right the first `sink`
  int group = 0, group_shift = 0;             // and only its own group; 0: no groups
};

// A query sees the keys [begin, end), and those below `sink`, which is at most `end`.
struct SeenKeys {
  int begin, end, sink;

  // Without short circuits, which would be branches.
  constexpr bool sees(int key) const { return (key < sink) | ((key >= begin) & (key < end)); }
};

constexpr int floor_of(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
constexpr int at_least(int a, int b) { return a > b ? a : b; }
constexpr int at_most(int a, int b) { return a < b ? a : b; }

constexpr SeenKeys seen_keys(const Window& w, int position, int keys) {
  int begin = position - w.left, end = position >= keys - w.right ? keys : position + w.right + 1;
  if (w.group) {
    const int first = floor_of(position + w.group_shift, w.group) * w.group - w.group_shift;
    begin = at_least(begin, first);
    end = at_most(end, first + w.group);
  }
  end = at_least(end, 0);
  return {at_least(begin, 0), end, at_most(w.sink, end)};
}

// Steps 0 .. count - 1 of a walk: the tiles of the windows from the last to the first, then those of the sinks
// likewise; or the entries of a stored list. Steps [whole, whole_end) are seen whole by every query and need no mask.
struct KeySteps {
  int count, whole, whole_end;
  int window_steps, last_window, last_sink;
  const int* list;  // null: no stored list

  constexpr int tile(int step) const {
    if (list) return list[step];
    return step < window_steps ? last_window - step : last_sink - (step - window_steps);
  }
};

// From the bounds of the first and the last query of a tile: both ends of a window only ever grow with the position.
constexpr KeySteps key_steps(const SeenKeys& first, const SeenKeys& last, int tile) {
  const int begin = first.begin / tile;
  const int end = at_least((last.end + tile - 1) / tile, begin);
  const int whole = at_least((last.begin + tile - 1) / tile, begin);
  const int whole_end = at_most(first.end / tile, end);
  const int sinks = at_most((last.sink + tile - 1) / tile, begin);
  const bool any = whole < whole_end;
  return {
      end - begin + sinks, any ? end - whole_end : 0, any ? end - whole : 0, end - begin, end - 1, sinks - 1, nullptr};
}

// A stored list: `whole` entries that need no mask, then the others.
constexpr KeySteps listed_steps(const int* list, int whole, int count) { return {count, 0, whole, count, 0, 0, list}; }

// The task of a block of a persistent grid in its round-th turn. Tasks are sorted from long to short: going back and
// forth gives every block as much of both. `blocks` or more: none is left.
constexpr int64_t task_of_round(int block, int blocks, int round) {
  return int64_t{round} * blocks + (round % 2 ? blocks - 1 - block : block);
}

}  // namespace effkern::attention

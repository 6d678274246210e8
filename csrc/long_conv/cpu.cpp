// The long convolutions on the CPU: allocation and parallel loops. The arithmetic is in the ISA units.
#include <algorithm>
#include <tuple>

#include "core/operands.h"
#include "long_conv/operands.h"

namespace effkern::long_conv {
namespace {

Tensor like(const Tensor& t, bool wanted = true) {
  if (wanted) {
    Tensor made = torch::stable::new_empty(t, t.sizes(), t.scalar_type());
    prefer_huge_pages(made.mutable_data_ptr(), made.numel() * int64_t(made.element_size()));
    return made;
  }
  return torch::stable::new_empty(t, {0}, t.scalar_type());
}

// One thread that does everything.
const Team kAlone{1, [](const Team&, int64_t count, void (*body)(void*, int64_t, int64_t, int64_t), void* context) {
                    body(context, 0, count, 0);
                  }};

// All threads of the pool.
Team everyone() {
  return {thread_count(),
          [](const Team& team, int64_t count, void (*body)(void*, int64_t, int64_t, int64_t), void* context) {
            const int64_t pieces = std::min(count, 4 * team.slots);
            parallel_tasks(pieces, [&](int64_t piece, int64_t slot) {
              body(context, count * piece / pieces, count * (piece + 1) / pieces, slot);
            });
          }};
}

// Runs body(task, team, scratch) for every task: as many at a time as there are threads, or, where the threads' arrays
// would crowd each other out of the last-level cache, and where there are fewer tasks than threads, one after the other
// with all threads at work on each. The bits are the same.
template <class Body>
void for_channels(const Operands& call, bool backward, int64_t tasks, const Body& body) {
  const auto bytes = [&](int64_t slots) {
    const Taps taps = call.channel_taps(0);
    return round_to_line(int64_t{sizeof(float)} * call.kernel().scratch_floats(call.plan, taps, backward, slots));
  };
  constexpr int64_t kLastLevel = 16 << 20;
  const int64_t threads = thread_count(), alone = bytes(1);
  const bool large = call.method == kTransform && !call.plan->whole;
  Buffer buffer;
  if (large && threads > 1 && (tasks < threads || slot_count(tasks) * alone > kLastLevel)) {
    const Team team = everyone();
    buffer.reserve(bytes(team.slots));
    for (int64_t task = 0; task < tasks; ++task) body(task, team, buffer.data);
  } else {
    buffer.reserve(alone * slot_count(tasks));
    parallel_tasks(tasks, [&](int64_t task, int64_t slot) { body(task, kAlone, buffer.data + slot * alone); });
  }
}

Tensor long_conv_cpu(const Tensor& u, const Tensor& k, std::optional<Tensor> spectrum, std::optional<Tensor> skip,
                     std::optional<Tensor> pre_gate, std::optional<Tensor> post_gate, int64_t history, bool causal) {
  const Operands call(u, k, spectrum, skip, pre_gate, post_gate, history, causal);
  const std::optional<Tensor> out =
      torch::stable::new_empty(u, {call.batches, call.channels, call.length}, u.scalar_type());
  trace_record(call.kernels->forward_path);
  if (out->numel() == 0) return *out;
  prefer_huge_pages(out->mutable_data_ptr(), out->numel() * int64_t(out->element_size()));
  const int64_t groups = batch_groups(call.batches, call.channels), tasks = call.channels * groups;
  for_channels(call, false, tasks, [&](int64_t task, const Team& team, void* scratch) {
    const int64_t channel = task / groups, group = task % groups;
    call.kernel().forward({call.plan, &team, call.channel_taps(channel), call.channel_spectrum(channel),
                           call.channel_skip(channel), channel_of(call.u, channel), channel_of(call.pre_gate, channel),
                           channel_of(call.post_gate, channel), channel_of(out, channel), call.batches * group / groups,
                           call.batches * (group + 1) / groups, call.history, call.length, scratch});
  });
  return *out;
}

// Sums over each group of batches, in float32, of the gradient of an argument that the batch shares.
struct Shared {
  std::optional<Tensor> parts;
  bool wanted;
  int64_t groups, channels, channel_floats = 0;

  Shared(bool wanted_in, const Tensor& k, const std::optional<Tensor>& argument, int64_t groups_in, int64_t channels_in)
      : wanted(wanted_in),
        groups(groups_in),
        channels(channels_in) {
    if (!wanted || channels == 0) return;
    channel_floats = argument->numel() / channels;
    parts = torch::stable::new_zeros(k, {groups, channels, channel_floats}, ScalarType::Float);
  }
  float* of(int64_t group, int64_t channel) const {
    if (!parts) return nullptr;
    return static_cast<float*>(parts->mutable_data_ptr()) + (group * channels + channel) * channel_floats;
  }
  Tensor total(const Tensor& like_in) const {
    if (!parts) return like(like_in, wanted);
    const int64_t first[1] = {0};
    const Tensor sum = groups == 1 ? *parts : torch::stable::sum(*parts, first);
    return as_dtype(torch::stable::view(sum, like_in.sizes()), like_in.scalar_type());
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> long_conv_backward_cpu(
    const Tensor& grad_out_in, const Tensor& u, const Tensor& k, std::optional<Tensor> spectrum,
    std::optional<Tensor> skip, std::optional<Tensor> pre_gate, std::optional<Tensor> post_gate, int64_t history,
    bool causal, bool need_u, bool need_k, bool need_skip, bool need_pre, bool need_post) {
  const Operands call(u, k, spectrum, skip, pre_gate, post_gate, history, causal);
  EFFKERN_CHECK(grad_out_in.is_cpu() && grad_out_in.scalar_type() == u.scalar_type() && grad_out_in.dim() == 3 &&
                    grad_out_in.size(0) == call.batches && grad_out_in.size(1) == call.channels &&
                    grad_out_in.size(2) == call.length,
                "long_conv_backward: grad_out must have u's dtype and shape (", call.batches, ", ", call.channels, ", ",
                call.length, "), got ", shape_string(grad_out_in));
  const std::optional<Tensor> grad_out = adjacent(grad_out_in);
  const auto gradient = [&](bool wanted, const std::optional<Tensor>& t) { return like(t ? *t : u, wanted && t); };
  const Tensor grad_u = gradient(need_u, u), grad_pre = gradient(need_pre, pre_gate);
  const Tensor grad_post = gradient(need_post, post_gate);
  trace_record(call.kernels->backward_path);

  const int64_t groups = batch_groups(call.batches, call.channels), tasks = call.channels * groups;
  const bool empty = call.batches * call.channels * call.length == 0;
  const Shared taps(need_k, u, k, groups, call.channels);
  const Shared skips(need_skip && skip, u, skip, groups, call.channels);
  if (empty) {
    if (need_u) torch::stable::fill_(const_cast<Tensor&>(grad_u), 0.0);
  } else {
    const auto wanted = [&](const Tensor& t, int64_t channel) {
      return t.numel() > 0 ? channel_of(t, channel) : Signal{nullptr, 0};
    };
    for_channels(call, true, tasks, [&](int64_t task, const Team& team, void* scratch) {
      const int64_t channel = task / groups, group = task % groups;
      float* grad_taps = taps.of(group, channel);
      call.kernel().backward({call.plan,
                              &team,
                              call.channel_taps(channel),
                              call.channel_spectrum(channel),
                              call.channel_skip(channel),
                              channel_of(grad_out, channel),
                              channel_of(call.u, channel),
                              channel_of(call.pre_gate, channel),
                              channel_of(call.post_gate, channel),
                              wanted(grad_u, channel),
                              wanted(grad_pre, channel),
                              wanted(grad_post, channel),
                              grad_taps,
                              grad_taps && !causal ? grad_taps + call.taps : nullptr,
                              skips.of(group, channel),
                              call.batches * group / groups,
                              call.batches * (group + 1) / groups,
                              call.history,
                              call.length,
                              scratch});
    });
  }
  const auto none = [&](const std::optional<Tensor>& t) { return t ? *t : u; };
  return {grad_u, taps.total(k), skip ? skips.total(*skip) : like(none(skip), false), grad_pre, grad_post};
}

Tensor long_conv_spectrum_cpu(const Tensor& k_in, int64_t length, bool causal) {
  EFFKERN_CHECK(length >= 1 && length <= kLongest, "long_conv_spectrum: length must be between 1 and ", kLongest,
                ", got ", length);
  EFFKERN_CHECK(is_fast(k_in.scalar_type()), "long_conv_spectrum: k must be float32, bfloat16 or float16, got ",
                dtype_name(k_in.scalar_type()));
  EFFKERN_CHECK(k_in.dim() == (causal ? 2 : 3), "long_conv_spectrum: k must have shape (H, ", causal ? "Lk" : "2, Lk",
                "), got ", shape_string(k_in));
  // As if for a sequence of that length, or one that all taps reach into.
  const int64_t positions = std::max(length, k_in.size(k_in.dim() - 1));
  const Tensor u = torch::stable::new_empty(k_in, {0, k_in.size(0), positions}, k_in.scalar_type());
  Operands call(u, k_in, {}, {}, {}, {}, 0, causal);
  // Whoever has few outputs or taps does without, but a longer input may come.
  const int64_t lanes = call.kernels->lanes;
  call.method = kTransform;
  call.plan = &plan_for(transform_size(length, call.taps, causal, lanes), lanes);
  const int64_t numbers = 2 * call.plan->size, stride = spectrum_floats(call.plan->size);
  const Tensor out = torch::stable::new_empty(k_in, {call.channels, stride}, ScalarType::Float);
  if (call.channels == 0) return out;
  float* data = static_cast<float*>(out.mutable_data_ptr());
  trace_record(call.kernels->forward_path);
  for_channels(call, false, call.channels, [&](int64_t channel, const Team& team, void* scratch) {
    float* row = data + channel * stride;
    call.kernels->spectrum(*call.plan, team, call.channel_taps(channel), row, scratch);
    write_mark(row + numbers, call);
  });
  return out;
}

}  // namespace
}  // namespace effkern::long_conv

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("long_conv", TORCH_BOX(&effkern::long_conv::long_conv_cpu));
  m.impl("long_conv_backward", TORCH_BOX(&effkern::long_conv::long_conv_backward_cpu));
  m.impl("long_conv_spectrum", TORCH_BOX(&effkern::long_conv::long_conv_spectrum_cpu));
}

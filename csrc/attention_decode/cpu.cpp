// The decode op on the CPU: checks, chunks of keys, parallel loops. The arithmetic is in the ISA units.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "attention/options.h"
#include "attention/tiles.h"
#include "attention_decode/checks.h"
#include "attention_decode/kernel.h"
#include "core/buffer.h"
#include "core/cpu/isa.h"
#include "core/operands.h"
#include "core/parallel.h"
#include "core/trace.h"

namespace effkern::attention_decode {
namespace {

using attention::Band;
using attention::KeyRun;
using attention::unit_last_stride;

const Kernels& select_kernels(ScalarType dtype) {
  const Dtype kind = kernel_dtype(dtype);
#if defined(__x86_64__)
  if (isa_active() >= Isa::avx512) return attention_decode::kernels_avx512(kind);
  if (isa_active() == Isa::avx2) return attention_decode::kernels_avx2(kind);
#endif
  return attention_decode::kernels_scalar(kind);
}

// A sequence of the batch: its mask, and its keys in chunks.
struct SequencePlan {
  attention::Mask mask;
  std::vector<KeyRun> chunks;
  const int32_t* pages;  // null: contiguous
};

// Pages that the chunks of a sequence read have to exist.
void check_pages(const SequencePlan& plan, int64_t sequence, const Sizes& s) {
  for (const KeyRun& chunk : plan.chunks)
    for (int64_t page = chunk.begin / s.page; page * s.page < chunk.end; ++page)
      EFFKERN_CHECK(plan.pages[page] >= 0 && plan.pages[page] < s.pages, "attention_decode: page_table[", sequence,
                    ", ", page, "] is ", plan.pages[page], ", there are ", s.pages, " pages");
}

// Chunks fill a fixed number of tasks whatever the number of threads, so that results do not depend on it.
int64_t chunk_keys(const Sizes& s) {
  constexpr int64_t kTasks = 64, kLeast = 256;
  const int64_t wanted = s.batch * s.heads_kv * s.capacity / kTasks;
  return std::max(kLeast, (wanted + kLeast - 1) / kLeast * kLeast);
}

std::tuple<Tensor, Tensor> decode_cpu(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                      const Tensor& cache_seqlens, std::optional<Tensor> page_table,
                                      std::optional<double> scale, std::optional<std::vector<int64_t>> band_list,
                                      double softcap, std::optional<Tensor> sink_logits) {
  const Sizes s = check_arguments(q_in, k_in, v_in, cache_seqlens, page_table);
  const std::vector<int64_t> bands = band_list.value_or(std::vector<int64_t>{});
  const float factor = check_options(s, q_in, scale, bands, softcap, sink_logits);
  const Kernels& kernels = select_kernels(q_in.scalar_type());
  const Tensor q = unit_last_stride(q_in), k = unit_last_stride(k_in), v = unit_last_stride(v_in);
  const Tensor lengths = as_contiguous(cache_seqlens);
  std::optional<Tensor> table;
  if (s.paged) table = as_contiguous(*page_table);
  const std::vector<float> sinks = attention::read_per_head(sink_logits);
  const int64_t out_shape[4] = {s.batch, s.heads_q, s.queries, s.value_dim};
  Tensor out = torch::stable::new_empty(q, {out_shape, 4}, q.scalar_type());
  Tensor lse = torch::stable::new_empty(q, {out_shape, 3}, ScalarType::Float);
  trace_record(kernels.path);
  if (s.batch == 0 || s.heads_kv == 0 || s.queries == 0) return {out, lse};

  std::vector<Band> terms;
  for (size_t i = 0; i < bands.size(); i += 3) terms.push_back({bands[i], bands[i + 1], bands[i + 2]});
  terms.push_back({int64_t{1} << 30, 0, 0});
  const int64_t step = chunk_keys(s), rows = s.heads_q / s.heads_kv * s.queries, group = s.heads_q / s.heads_kv;
  std::vector<SequencePlan> plans(s.batch);
  struct Task {
    int64_t sequence, head, chunk;
  };
  std::vector<Task> tasks;
  std::vector<int64_t> first_partial;  // of every (sequence, kv head)
  for (int64_t b = 0; b < s.batch; ++b) {
    SequencePlan& plan = plans[b];
    const int64_t length = lengths.const_data_ptr<int32_t>()[b];
    EFFKERN_CHECK(length >= 0 && length <= s.capacity, "attention_decode: cache_seqlens[", b, "] is ", length,
                  ", the cache holds 0 to ", s.capacity);
    plan.mask.keys = length;
    plan.mask.shift = length - s.queries;
    plan.mask.bands = terms.data();
    plan.mask.band_count = static_cast<int64_t>(terms.size());
    plan.pages = table ? table->const_data_ptr<int32_t>() + b * table->size(1) : nullptr;
    const attention::KeyRunLists lists = attention::key_run_lists(plan.mask, s.queries, s.queries, {step, 16});
    for (const KeyRun& run : lists.entries)
      for (int64_t begin = run.begin, end; begin < run.end; begin = end) {
        end = std::min((begin / step + 1) * step, run.end);
        plan.chunks.push_back({begin, end, 0, run.partial});
      }
    if (s.paged) check_pages(plan, b, s);
    for (int64_t head = 0; head < s.heads_kv; ++head) {
      first_partial.push_back(static_cast<int64_t>(tasks.size()));
      for (size_t chunk = 0; chunk < plan.chunks.size(); ++chunk)
        tasks.push_back({b, head, static_cast<int64_t>(chunk)});
    }
  }

  const int64_t count = static_cast<int64_t>(tasks.size()), units = s.batch * s.heads_kv;
  const int64_t scratch_bytes = round_to_line(kernels.scratch_bytes(rows, s.head_dim, s.value_dim));
  Buffer partials, scratch;  // values, then tops, then totals of all chunks
  partials.reserve(count * rows * (s.value_dim + 2) * static_cast<int64_t>(sizeof(float)));
  scratch.reserve(scratch_bytes * slot_count(count));
  float* values = reinterpret_cast<float*>(partials.data);
  float *tops = values + count * rows * s.value_dim, *totals = tops + count * rows;
  const auto cache = [&](const Tensor& t, int64_t sequence, int64_t head) {
    const int64_t first = s.paged ? 0 : sequence * t.stride(0), element = static_cast<int64_t>(t.element_size());
    return Cache{static_cast<const char*>(t.const_data_ptr()) + (first + head * t.stride(1)) * element, t.stride(2),
                 plans[sequence].pages, s.page, t.stride(0)};
  };
  parallel_tasks(count, [&](int64_t index, int64_t slot) {
    const Task& task = tasks[index];
    const KeyRun& run = plans[task.sequence].chunks[task.chunk];
    const char* queries =
        static_cast<const char*>(q.const_data_ptr()) +
        (task.sequence * q.stride(0) + task.head * group * q.stride(1)) * static_cast<int64_t>(q.element_size());
    kernels.chunk({s.head_dim, s.value_dim, factor, static_cast<float>(softcap), queries, q.stride(1), q.stride(2),
                   group, s.queries, cache(k, task.sequence, task.head), cache(v, task.sequence, task.head), run.begin,
                   run.end, run.partial != 0, &plans[task.sequence].mask, values + index * rows * s.value_dim,
                   tops + index * rows, totals + index * rows, scratch.data + slot * scratch_bytes});
  });
  char* out_data = static_cast<char*>(out.mutable_data_ptr());
  float* lse_data = static_cast<float*>(lse.mutable_data_ptr());
  parallel_tasks(units, [&](int64_t unit, int64_t) {
    const int64_t first = first_partial[unit], head = unit % s.heads_kv;
    const int64_t chunks = static_cast<int64_t>(plans[unit / s.heads_kv].chunks.size());
    kernels.merge({s.value_dim, group, s.queries, chunks, values + first * rows * s.value_dim, tops + first * rows,
                   totals + first * rows, sinks.empty() ? nullptr : sinks.data() + head * group,
                   out_data + unit * rows * s.value_dim * static_cast<int64_t>(out.element_size()),
                   lse_data + unit * rows});
  });
  return {out, lse};
}

}  // namespace
}  // namespace effkern::attention_decode

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("attention_decode", TORCH_BOX(&effkern::attention_decode::decode_cpu));
}

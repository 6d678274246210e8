// effkern._host: what Python needs to know about the host side. Tensors never pass through here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "attention/tiles.h"
#include "attention_decode/split_launch.h"
#include "core/cpu/isa.h"
#include "core/trace.h"
#include "long_conv/plan.h"

namespace py = pybind11;

namespace {

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (effkern::Isa level : effkern::isa_levels()) names.emplace_back(effkern::isa_name(level));
  return names;
}

std::map<std::string, bool> cpu_features() {
  std::map<std::string, bool> features;
  for (const effkern::CpuFeature& feature : effkern::cpu_features()) features[feature.name] = feature.present;
  return features;
}

using TileRow = std::vector<std::tuple<int64_t, int64_t, bool>>;

std::vector<TileRow> attention_tile_plan(int64_t queries, int64_t keys, bool causal, bool top_left, int64_t query_tile,
                                         int64_t key_tile, const std::vector<int64_t>& bands,
                                         const std::vector<int64_t>& groups) {
  if (queries < 0 || keys < 0) throw py::value_error("attention_tile_plan: sq and sk must not be negative");
  if (query_tile < 1 || key_tile < 1) throw py::value_error("attention_tile_plan: tiles must be at least 1");
  if (bands.size() % 3 != 0) throw py::value_error("attention_tile_plan: bands must hold triples (left, right, sink)");
  std::vector<effkern::attention::Band> band_terms;
  for (size_t i = 0; i < bands.size(); i += 3) band_terms.push_back({bands[i], bands[i + 1], bands[i + 2]});
  if (causal) band_terms.push_back({int64_t{1} << 30, 0, 0});
  std::vector<effkern::attention::Groups> group_terms;
  for (int64_t size : groups) {
    if (size < 1) throw py::value_error("attention_tile_plan: groups must be at least 1");
    group_terms.push_back({size, 0});
  }
  effkern::attention::Mask mask{};
  mask.keys = keys;
  mask.shift = top_left ? 0 : keys - queries;
  mask.bands = band_terms.data();
  mask.band_count = static_cast<int64_t>(band_terms.size());
  mask.groups = group_terms.data();
  mask.groups_count = static_cast<int64_t>(group_terms.size());
  const auto lists = effkern::attention::key_run_lists(mask, queries, query_tile, {key_tile, 1});
  std::vector<TileRow> plan(lists.first.size() - 1);
  for (size_t row = 0; row < plan.size(); ++row) {
    for (int64_t entry = lists.first[row]; entry < lists.first[row + 1]; ++entry) {
      const auto& run = lists.entries[entry];
      for (int64_t key = run.begin, end; key < run.end; key = end) {
        end = std::min((key / key_tile + 1) * key_tile, run.end);
        plan[row].emplace_back(key, end, run.partial != 0);
      }
    }
  }
  return plan;
}

// How a long convolution runs on the level in use.
py::dict long_conv_plan(int64_t length, int64_t taps, bool causal) {
  constexpr int64_t kLongest = int64_t{1} << 34;
  if (std::min(length, taps) < 1 || std::max(length, taps) > kLongest)
    throw py::value_error("long_conv_plan: length and taps must be between 1 and 2^34");
  const effkern::Isa level = effkern::isa_active();
  const int64_t lanes = level >= effkern::Isa::avx512 ? 16 : level == effkern::Isa::avx2 ? 8 : 4;
  const auto choice = effkern::long_conv::choose(length, taps, causal, lanes);
  constexpr const char* names[] = {"transform", "few_outputs", "few_taps"};
  py::dict plan;
  plan["method"] = names[choice.method];
  if (choice.method != effkern::long_conv::kTransform) return plan;
  const auto& passes = effkern::long_conv::plan_for(choice.size, lanes);
  const auto radices = [](const effkern::FftRing& ring, int begin) {
    std::vector<int> found;
    for (int d = begin; d < ring.depth; ++d) found.push_back(ring.levels[d].radix);
    return found;
  };
  plan["size"] = choice.size;
  plan["blocks"] = (length + choice.size - 1) / choice.size;
  plan["rows"] = passes.rows;
  plan["columns"] = passes.columns;
  plan["tile"] = passes.tile;
  plan["column_passes"] = radices(passes.outer, 0);
  plan["row_passes"] = radices(passes.inner, passes.whole ? 1 : 0);
  return plan;
}

// What the CUDA C++ kernels of attention_decode support, whether or not this build has them.
py::dict attention_decode_features() {
  using effkern::attention_decode::Features;
  py::dict features;
  features["capability"] = Features::kMinCapability;
  features["max_dim"] = Features::kMaxDim;
  features["dim_step"] = Features::kDimStep;
  features["max_bands"] = effkern::attention_decode::kMaxBands;
  return features;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host side of effkern: CPU levels, tile plans, path trace.";
  m.def("isa_levels", &isa_levels, "CPU levels this machine can run, ascending.");
  m.def("isa_active", [] { return std::string(effkern::isa_name(effkern::isa_active())); }, "CPU level in use.");
  m.def(
      "isa_force", [](const std::optional<std::string>& level) { effkern::isa_force(level.value_or("")); },
      py::arg("level"), "Forces a CPU level by name; None lifts the force. ValueError if it cannot run here.");
  m.def("cpu_features", &cpu_features, "What cpuid and the operating system report.");
  m.def("cpu_name", &effkern::cpu_name);
  m.def("trace_last", &effkern::trace_last, "Path that ran last, such as 'attention:cpu/avx2'; '' before the first.");
  m.def("trace_last_detail", &effkern::trace_last_detail,
        "A number that the path came with, else 0: of dkm and its backward, the iterations whose distances were in "
        "float32, over all groups.");
  m.def("trace_record", &effkern::trace_record_copy, py::arg("path"), "Records a path that runs in Python.");
  m.def("attention_tile_plan", &attention_tile_plan, py::arg("sq"), py::arg("sk"), py::arg("causal"),
        py::arg("top_left"), py::arg("query_tile"), py::arg("key_tile"), py::arg("bands") = std::vector<int64_t>{},
        py::arg("groups") = std::vector<int64_t>{},
        "Key tiles each query tile visits: (begin, end, partial), for the first head.");
  m.def("attention_decode_features", &attention_decode_features,
        "What the CUDA C++ kernels of attention_decode take: least compute capability times 10, head dims, windows.");
  m.def("long_conv_plan", &long_conv_plan, py::arg("length"), py::arg("taps"), py::arg("causal") = true,
        "How a long convolution of `length` outputs runs on the CPU level in use: the method, and of a transform its "
        "size, "
        "the blocks, and the radices of the passes down the columns and along the rows, which end in leaves.");
}

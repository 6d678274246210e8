// palettized_linear on the CPU: checks, allocation, parallel loops. The arithmetic is in the ISA units.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <bit>
#include <optional>
#include <tuple>
#include <vector>

#include "core/buffer.h"
#include "core/check.h"
#include "core/cpu/isa.h"
#include "core/operands.h"
#include "core/parallel.h"
#include "core/trace.h"
#include "palettized_linear/kernel.h"

namespace effkern::palettized_linear {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernels& select_kernels(ScalarType out) {
  const Dtype kind = kernel_dtype(out);
#if defined(__x86_64__)
  if (isa_active() >= Isa::avx512) return kernels_avx512(kind);
  if (isa_active() == Isa::avx2) return kernels_avx2(kind);
#endif
  return kernels_scalar(kind);
}

// For tokens and tables of bf16, where the machine has products of them; null elsewhere.
const PairKernels* select_pair_kernels(ScalarType x, ScalarType lut, ScalarType out) {
#if defined(__x86_64__)
  if (x == ScalarType::BFloat16 && lut == ScalarType::BFloat16) {
    if (isa_active() >= Isa::amx) return &pair_kernels_amx(kernel_dtype(out));
    if (isa_active() >= Isa::avx512_bf16) return &pair_kernels_avx512_bf16(kernel_dtype(out));
  }
#endif
  return nullptr;
}

bool floating(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

int64_t words_of(int64_t bits) { return bits % 3 == 0 ? 3 : 1; }

int64_t fields_of(int64_t bits) { return 32 * words_of(bits) / bits; }

int64_t row_bytes(int64_t count, int64_t bits) {
  const int64_t words = words_of(bits), fields = fields_of(bits), block = 16 * fields;
  return 4 * words * (count / block * 16 + (count % block + fields - 1) / fields);
}

// (tokens, features), adjacent, float32.
Tensor as_rows(const Tensor& t) {
  const int64_t features = t.size(t.dim() - 1);
  const int64_t shape[2] = {t.numel() / std::max<int64_t>(features, 1), features};
  const Tensor wide = as_dtype(as_contiguous(t), ScalarType::Float);
  return torch::stable::reshape(wide, {shape, 2});
}

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

bool is_bf16(const float* numbers, int64_t count) {
  return std::all_of(numbers, numbers + count, [](float x) { return (std::bit_cast<uint32_t>(x) & 0xffff) == 0; });
}

// The weight of a call, its table in float32 and as long as the units read it.
struct Weight {
  Tensor indices, lut;
  Buffer room;
  Packed packed;
  int64_t clusters;

  Weight(const Tensor& x, const Tensor& indices_in, const Tensor& lut_in, int64_t bits, int64_t groups, int64_t dim)
      : indices(as_contiguous(indices_in)),
        lut(as_dtype(as_contiguous(lut_in), ScalarType::Float)) {
    const char* op = "palettized_linear";
    EFFKERN_CHECK(floating(x), op, ": x must be float32, bfloat16 or float16, got ", dtype_name(x.scalar_type()));
    EFFKERN_CHECK(floating(lut_in), op, ": lut must be float32, bfloat16 or float16, got ",
                  dtype_name(lut_in.scalar_type()));
    EFFKERN_CHECK(indices_in.scalar_type() == ScalarType::Byte && indices_in.dim() == 2 && indices_in.numel() > 0, op,
                  ": indices must be a uint8 matrix, got shape ", shape_string(indices_in));
    EFFKERN_CHECK(indices_in.is_cpu() && lut_in.is_cpu(), op, ": indices or lut is on another device than x");
    EFFKERN_CHECK(bits == 1 || bits == 2 || bits == 3 || bits == 4 || bits == 6 || bits == 8, op,
                  ": bits must be 1, 2, 3, 4, 6 or 8, got ", bits);
    EFFKERN_CHECK(dim == 1 || dim == 2 || dim == 4, op, ": dim must be 1, 2 or 4, got ", dim);
    const int64_t rows = indices_in.size(0), features = x.dim() ? x.size(x.dim() - 1) : 0;
    EFFKERN_CHECK(groups >= 1 && rows % groups == 0, op, ": groups ", groups, " does not divide the ", rows, " rows");
    EFFKERN_CHECK(features > 0 && features % dim == 0 && row_bytes(features / dim, bits) == indices_in.size(1), op,
                  ": x has shape ", shape_string(x), ", which does not fit indices of shape ",
                  shape_string(indices_in));
    clusters = lut_in.numel() / groups / dim;
    EFFKERN_CHECK(clusters >= 1 && clusters <= int64_t{1} << bits && clusters * groups * dim == lut_in.numel(), op,
                  ": lut has shape ", shape_string(lut_in), ", which does not fit ", groups, " groups, dim ", dim,
                  " and ", bits, " bits");
    room.reserve(groups * dim * kEntries * static_cast<int64_t>(sizeof(float)));
    auto* tables = reinterpret_cast<float*>(room.data);
    const float* source = floats(lut);
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t place = 0; place < dim; ++place)
        for (int64_t entry = 0; entry < kEntries; ++entry) {
          const int64_t code = entry & ((int64_t{1} << bits) - 1);
          tables[(group * dim + place) * kEntries + entry] =
              code < clusters ? source[(group * clusters + code) * dim + place] : 0.0f;
        }
    packed = {static_cast<const uint8_t*>(indices.const_data_ptr()),
              tables,
              indices.size(1),
              rows,
              features / dim,
              bits,
              groups,
              dim,
              is_bf16(tables, groups * dim * kEntries)};
  }
};

float* slot_of(Buffer& buffer, int64_t slot, int64_t count) {
  return reinterpret_cast<float*>(buffer.data) + slot * count;
}

// Rows with zeros up to a whole vector.
const float* padded(const Tensor& rows, int64_t stride, Buffer& room) {
  const int64_t tokens = rows.size(0), columns = rows.size(1);
  if (stride == columns) return floats(rows);
  room.reserve(tokens * stride * static_cast<int64_t>(sizeof(float)));
  auto* target = reinterpret_cast<float*>(room.data);
  for (int64_t token = 0; token < tokens; ++token) {
    std::copy_n(floats(rows) + token * columns, columns, target + token * stride);
    std::fill(target + token * stride + columns, target + (token + 1) * stride, 0.0f);
  }
  return target;
}

// (tokens, count * dim) to (tokens, dim, count), each plane in the order of `few`.
const float* in_planes(const float* x, int64_t tokens, const Packed& w, const uint16_t* order, Buffer& room) {
  const int64_t block = order ? 16 * fields_of(w.bits) : 1, whole = order ? w.count / block * block : 0;
  room.reserve(tokens * w.dim * w.count * static_cast<int64_t>(sizeof(float)));
  auto* target = reinterpret_cast<float*>(room.data);
  for (int64_t token = 0; token < tokens; ++token, x += w.dim * w.count)
    for (int64_t place = 0; place < w.dim; ++place, target += w.count) {
      for (int64_t first = 0; first < whole; first += block)
        for (int64_t i = 0; i < block; ++i) target[first + i] = x[(first + order[i]) * w.dim + place];
      for (int64_t i = whole; i < w.count; ++i) target[i] = x[i * w.dim + place];
    }
  return reinterpret_cast<const float*>(room.data);
}

constexpr int64_t kFewTokens = 6;

void multiply_pairs(const PairKernels& kernels, const Packed& w, const Tensor& x_in, const float* bias, void* out) {
  constexpr int64_t kPiece = 256;  // features that a task packs
  const Tensor x = as_contiguous(x_in);
  const int64_t columns = w.count * w.dim, tokens = x.numel() / columns;
  const int64_t lanes = (tokens + 15) / 16 * 16, depth = (columns + 31) / 32 * 32;
  Buffer pairs, scratch;
  pairs.reserve(depth * lanes * 2);
  parallel_tasks((columns + kPiece - 1) / kPiece, [&](int64_t task, int64_t) {
    const int64_t first = task * kPiece;
    kernels.pack(x.const_data_ptr(), tokens, columns, first, std::min(kPiece, columns - first), lanes, pairs.data);
  });
  const int64_t tasks = (w.rows + kernels.row_block - 1) / kernels.row_block, each = kernels.scratch(w, depth);
  scratch.reserve(slot_count(tasks) * each * static_cast<int64_t>(sizeof(float)));
  parallel_tasks(tasks, [&](int64_t task, int64_t slot) {
    const int64_t first = task * kernels.row_block;
    kernels.many({w, pairs.data, tokens, lanes, depth, first, std::min(w.rows, first + kernels.row_block), bias, out,
                  slot_of(scratch, slot, each)});
  });
}

Tensor forward_cpu(const Tensor& x_in, const Tensor& indices, const Tensor& lut, int64_t bits, int64_t groups,
                   int64_t dim, std::optional<Tensor> bias_in, bool wide) {
  const Weight weight(x_in, indices, lut, bits, groups, dim);
  const Packed& w = weight.packed;
  std::optional<Tensor> bias;
  if (bias_in) {
    EFFKERN_CHECK(bias_in->dim() == 1 && bias_in->size(0) == w.rows && floating(*bias_in) && bias_in->is_cpu(),
                  "palettized_linear: bias must be floating, of shape (", w.rows, ",), got ", shape_string(*bias_in));
    bias = as_dtype(as_contiguous(*bias_in), ScalarType::Float);
  }
  const ScalarType dtype = wide ? ScalarType::Float : x_in.scalar_type();
  const Kernels& kernels = select_kernels(dtype);
  std::vector<int64_t> shape(x_in.sizes().begin(), x_in.sizes().end());
  shape.back() = w.rows;
  Tensor out = torch::stable::new_empty(x_in, {shape.data(), shape.size()}, dtype);
  const int64_t columns = w.count * w.dim, tokens = x_in.numel() / columns;
  const float* bias_data = bias ? floats(*bias) : nullptr;
  void* out_data = out.mutable_data_ptr();
  const PairKernels* pair_kernels = select_pair_kernels(x_in.scalar_type(), lut.scalar_type(), dtype);
  if (tokens > kFewTokens && pair_kernels) {
    trace_record(pair_kernels->path);
    multiply_pairs(*pair_kernels, w, x_in, bias_data, out_data);
    return out;
  }
  trace_record(kernels.path);
  if (tokens == 0) return out;
  const Tensor x = as_rows(x_in);
  Buffer room, scratch;
  if (tokens <= kFewTokens) {
    const float* planes = floats(x);
    const uint16_t* order = kernels.order(w);
    if (dim > 1 || order) planes = in_planes(planes, tokens, w, order, room);
    const int64_t step = std::max<int64_t>(16, w.rows / (8 * thread_count()) / 16 * 16);
    const int64_t tasks = (w.rows + step - 1) / step;
    scratch.reserve(slot_count(tasks) * kSlack * static_cast<int64_t>(sizeof(float)));
    parallel_tasks(tasks, [&](int64_t task, int64_t slot) {
      kernels.few({w, planes, tokens, task * step, std::min(w.rows, (task + 1) * step), bias_data, out_data,
                   slot_of(scratch, slot, kSlack)});
    });
    return out;
  }
  const int64_t tasks = (w.rows + kernels.row_block - 1) / kernels.row_block;
  const int64_t each = kernels.many_scratch(w, tokens);
  scratch.reserve(slot_count(tasks) * each * static_cast<int64_t>(sizeof(float)));
  parallel_tasks(tasks, [&](int64_t task, int64_t slot) {
    const int64_t first = task * kernels.row_block;
    kernels.many({w, floats(x), tokens, columns, first, std::min(w.rows, first + kernels.row_block), bias_data,
                  out_data, slot_of(scratch, slot, each)});
  });
  return out;
}

// dx = dy W, some rows of the weight at a time. A task has a tile of tokens, and adds up the rows in order.
void gradient_of_x(const Kernels& kernels, const Packed& w, const Tensor& grad_out, Tensor& grad_x) {
  constexpr int64_t kTile = 256, kRows = 32;
  const int64_t tokens = grad_out.size(0), columns = w.count * w.dim;
  const int64_t stride = (columns + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
  const int64_t tile = std::min(kTile, std::max<int64_t>(1, (tokens + thread_count() - 1) / thread_count()));
  const int64_t tasks = (tokens + tile - 1) / tile, each = kSlack + (tile + kRows) * stride;
  Buffer scratch;
  scratch.reserve(slot_count(tasks) * each * static_cast<int64_t>(sizeof(float)));
  auto* out = static_cast<float*>(grad_x.mutable_data_ptr());
  parallel_tasks(tasks, [&](int64_t task, int64_t slot) {
    float* room = slot_of(scratch, slot, each);
    float *dense = room + kSlack, *sums = dense + kRows * stride;
    const int64_t first = task * tile, count = std::min(tile, tokens - first);
    std::fill(dense, sums + count * stride, 0.0f);
    for (int64_t row = 0; row < w.rows; row += kRows) {
      const int64_t rows = std::min(kRows, w.rows - row);
      for (int64_t r = 0; r < rows; ++r) kernels.decode(w, row + r, room, dense + r * stride);
      kernels.multiply(count, stride, rows, floats(grad_out) + first * w.rows + row, w.rows, 1, dense, stride, sums,
                       stride);
    }
    for (int64_t token = 0; token < count; ++token)
      std::copy_n(sums + token * stride, columns, out + (first + token) * columns);
  });
}

// d lut_j = sum of dW over the weights of index j. A task has a few rows of dW, of one group; its sums wait for their
// turn.
void gradient_of_lut(const Kernels& kernels, const Weight& weight, const Tensor& grad_out, const Tensor& x,
                     Tensor& grad_lut) {
  constexpr int64_t kRows = 16;
  const Packed& w = weight.packed;
  const int64_t tokens = x.size(0), columns = w.count * w.dim, entries = weight.clusters * w.dim;
  const int64_t stride = (columns + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
  const int64_t per_group = w.rows / w.groups, blocks = (per_group + kRows - 1) / kRows, tasks = w.groups * blocks;
  Buffer room, scratch;
  const float* rows_of_x = padded(x, stride, room);
  // Codes are looked up as numbers.
  std::vector<float> numbers(w.groups * kEntries);
  for (int64_t i = 0; i < w.groups * kEntries; ++i)
    numbers[i] = static_cast<float>(i % kEntries & ((int64_t{1} << w.bits) - 1));
  Packed codes = w;
  codes.tables = numbers.data();
  codes.dim = 1;
  std::vector<double> sums(tasks * entries, 0.0);
  const int64_t each = kSlack + kRows * stride + w.count;
  scratch.reserve(slot_count(tasks) * each * static_cast<int64_t>(sizeof(float)));
  parallel_tasks(tasks, [&](int64_t task, int64_t slot) {
    float *fields = slot_of(scratch, slot, each), *dense = fields + kSlack, *code = dense + kRows * stride;
    const int64_t group = task / blocks, first = group * per_group + task % blocks * kRows;
    const int64_t rows = std::min(kRows, (group + 1) * per_group - first);
    std::fill(dense, dense + rows * stride, 0.0f);
    kernels.multiply(rows, stride, tokens, floats(grad_out) + first, 1, w.rows, rows_of_x, stride, dense, stride);
    double* sum = sums.data() + task * entries;
    for (int64_t r = 0; r < rows; ++r) {
      kernels.decode(codes, first + r, fields, code);
      for (int64_t i = 0; i < w.count; ++i) {
        const auto entry = std::min(static_cast<int64_t>(code[i]), weight.clusters - 1) * w.dim;
        for (int64_t place = 0; place < w.dim; ++place) sum[entry + place] += dense[r * stride + i * w.dim + place];
      }
    }
  });
  auto* out = static_cast<float*>(grad_lut.mutable_data_ptr());
  for (int64_t group = 0; group < w.groups; ++group)
    for (int64_t entry = 0; entry < entries; ++entry) {
      double total = 0.0;
      for (int64_t block = 0; block < blocks; ++block) total += sums[(group * blocks + block) * entries + entry];
      out[group * entries + entry] = static_cast<float>(total);
    }
}

std::tuple<Tensor, Tensor> backward_cpu(const Tensor& grad_out_in, const Tensor& x_in, const Tensor& indices,
                                        const Tensor& lut, int64_t bits, int64_t groups, int64_t dim, bool need_x,
                                        bool need_lut) {
  const Weight weight(x_in, indices, lut, bits, groups, dim);
  std::vector<int64_t> expected(x_in.sizes().begin(), x_in.sizes().end());
  expected.back() = weight.packed.rows;
  EFFKERN_CHECK(std::equal(expected.begin(), expected.end(), grad_out_in.sizes().begin(), grad_out_in.sizes().end()) &&
                    floating(grad_out_in) && grad_out_in.is_cpu(),
                "palettized_linear: grad_out has shape ", shape_string(grad_out_in),
                ", which does not match x and the weight, or another dtype or device");
  const Kernels& kernels = select_kernels(ScalarType::Float);
  const Tensor grad_out = as_rows(grad_out_in), x = as_rows(x_in);
  const auto like = [](bool wanted, const Tensor& t) {
    std::vector<int64_t> shape(t.sizes().begin(), t.sizes().end());
    if (!wanted) shape = {0};
    return torch::stable::new_empty(t, {shape.data(), shape.size()}, ScalarType::Float);
  };
  Tensor grad_x = like(need_x, x_in), grad_lut = like(need_lut, lut);
  trace_record(kernels.backward_path);
  if (need_x && x.size(0)) gradient_of_x(kernels, weight.packed, grad_out, grad_x);
  if (need_lut) gradient_of_lut(kernels, weight, grad_out, x, grad_lut);
  return {as_dtype(grad_x, x_in.scalar_type()), as_dtype(grad_lut, lut.scalar_type())};
}

}  // namespace
}  // namespace effkern::palettized_linear

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("palettized_linear", TORCH_BOX(&effkern::palettized_linear::forward_cpu));
  m.impl("palettized_linear_backward", TORCH_BOX(&effkern::palettized_linear::backward_cpu));
}

#include "monarch/operands.h"

#include "core/operands.h"

namespace effkern::monarch {
namespace {

void check_input(const char* op, const Tensor& x, int64_t blocks, int64_t columns, const char* name) {
  EFFKERN_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == blocks * columns, op, ": x must have ", blocks * columns,
                " features (", name, " has ", blocks, " blocks of ", columns, "), got shape ", shape_string(x));
}

void check_factor(const char* op, const char* name, const Tensor& w, const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  EFFKERN_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op,
                ": x must be float32, bfloat16 or float16 (or complex64), got ", dtype_name(dtype));
  EFFKERN_CHECK(w.dim() == 3, op, ": ", name, " must have shape (blocks, rows, columns), got ", shape_string(w));
  EFFKERN_CHECK(w.scalar_type() == dtype, op, ": ", name, " is ", dtype_name(w.scalar_type()), " but x is ",
                dtype_name(dtype));
  EFFKERN_CHECK(w.is_cpu(), op, ": ", name, " is on another device than x");
  EFFKERN_CHECK(w.numel() > 0, op, ": ", name, " must not be empty, got ", shape_string(w));
}

}  // namespace

const Kernels& select_kernels(ScalarType dtype) {
  const Dtype kind = kernel_dtype(dtype);
#if defined(__x86_64__)
  if (kind == Dtype::bf16 && isa_active() >= Isa::amx) return kernels_amx();
  if (kind == Dtype::bf16 && isa_active() >= Isa::avx512_bf16) return kernels_avx512_bf16();
  if (isa_active() >= Isa::avx512) return kernels_avx512(kind);
  if (isa_active() == Isa::avx2) return kernels_avx2(kind);
#endif
  return kernels_scalar(kind);
}

Shape check_monarch(const Tensor& x, const Tensor& w1, const Tensor& w2, const std::optional<Tensor>& bias) {
  const char* op = "monarch_matmul";
  check_factor(op, "w1", w1, x);
  check_factor(op, "w2", w2, x);
  const Shape shape{w1.size(0), w1.size(1), w1.size(2), w2.size(0), w2.size(1), w2.size(2), false, false};
  EFFKERN_CHECK(shape.l * shape.r == shape.k * shape.q, op, ": w2 reads ", shape.l, " * ", shape.r,
                " numbers, w1 gives ", shape.k, " * ", shape.q);
  check_input(op, x, shape.k, shape.p, "w1");
  if (bias) {
    EFFKERN_CHECK(bias->dim() == 1 && bias->size(0) == shape.l * shape.s, op, ": bias must have shape (",
                  shape.l * shape.s, ",), got ", shape_string(*bias));
    EFFKERN_CHECK(bias->scalar_type() == x.scalar_type(), op, ": bias is ", dtype_name(bias->scalar_type()),
                  " but x is ", dtype_name(x.scalar_type()));
    EFFKERN_CHECK(bias->is_cpu(), op, ": bias is on another device than x");
  }
  return shape;
}

Shape check_block_diag(const Tensor& x, const Tensor& w) {
  check_factor("block_diag_matmul", "w", w, x);
  check_input("block_diag_matmul", x, w.size(0), w.size(2), "w");
  return {w.size(0), w.size(1), w.size(2), 0, 0, 0, false, false};
}

void check_grad_out(const char* op, const Tensor& grad_out, const Tensor& x, int64_t features) {
  std::vector<int64_t> expected(x.sizes().begin(), x.sizes().end());
  expected.back() = features;
  const std::vector<int64_t> came(grad_out.sizes().begin(), grad_out.sizes().end());
  EFFKERN_CHECK(came == expected && grad_out.scalar_type() == x.scalar_type() && grad_out.is_cpu(), op,
                ": grad_out has shape ", shape_string(grad_out),
                ", which does not match x and the weights, or another dtype or device");
}

Tensor as_rows(const Tensor& t) {
  const int64_t features = t.size(t.dim() - 1);
  Tensor rows = t;
  if (t.dim() != 2) {
    const int64_t shape[2] = {t.numel() / std::max<int64_t>(features, 1), features};
    rows = torch::stable::reshape(t, {shape, 2});
  }
  return rows.stride(1) == 1 || features == 1 ? rows : as_contiguous(rows);
}

Tensor new_rows(const Tensor& x, int64_t features) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = features;
  return torch::stable::new_empty(x, {shape.data(), shape.size()});
}

Tensor new_gradient(bool wanted, const Tensor& like) {
  std::vector<int64_t> shape(like.sizes().begin(), like.sizes().end());
  if (!wanted) shape = {0};
  return torch::stable::new_empty(like, {shape.data(), shape.size()});
}

Factor::Factor(const Tensor& t, const Kernels& kernels, bool often, bool transposed, bool prepared)
    : storage(as_contiguous(t)),
      weights{storage.const_data_ptr(), nullptr} {
  const int64_t blocks = t.size(0), rows = t.size(1), columns = t.size(2);
  const int64_t bytes = kernels.prepared_bytes(rows, columns, transposed, often);
  if (!bytes || !prepared) return;
  room.reserve(blocks * bytes);
  const char* source = static_cast<const char*>(weights.raw);
  const int64_t size = rows * columns * static_cast<int64_t>(t.element_size());
  parallel_tasks(blocks, [&](int64_t block, int64_t) {
    kernels.prepare(source + block * size, rows, columns, transposed, room.data + block * bytes);
  });
  weights.prepared = room.data;
}

Bias::Bias(const Tensor& t, const Kernels& kernels) : storage(as_contiguous(t)) {
  data = static_cast<const float*>(storage.const_data_ptr());
  if (t.scalar_type() == ScalarType::Float) return;
  room.reserve(t.numel() * static_cast<int64_t>(sizeof(float)));
  kernels.widen(storage.const_data_ptr(), t.numel(), floats(room, 0));
  data = floats(room, 0);
}

Sums::Sums(bool wanted, Tensor& gradient, const Tensor& factor, const Kernels& kernels)
    : blocks(factor.size(0)),
      rows(factor.size(1)),
      columns(factor.size(2)),
      padded_rows((rows + 15) / 16 * 16),
      stride((columns + kernels.lanes - 1) / kernels.lanes * kernels.lanes),
      direct(factor.scalar_type() == ScalarType::Float && padded_rows == rows && stride == columns) {
  if (!wanted) return;
  const int64_t size = padded_rows * stride;
  if (!direct) buffer.reserve(blocks * size * static_cast<int64_t>(sizeof(float)));
  data = direct ? static_cast<float*>(gradient.mutable_data_ptr()) : floats(buffer, 0);
  parallel_tasks(blocks, [&](int64_t index, int64_t) { std::fill(block(index), block(index) + size, 0.0f); });
}

void Sums::store(const Kernels& kernels, Tensor& gradient) const {
  if (direct) return;
  const int64_t bytes = rows * columns * static_cast<int64_t>(gradient.element_size());
  char* out = static_cast<char*>(gradient.mutable_data_ptr());
  parallel_tasks(
      blocks, [&](int64_t index, int64_t) { kernels.store(block(index), stride, rows, columns, out + index * bytes); });
}

}  // namespace effkern::monarch

// Runs the CUDA attention forward on the software model of a thread block, block after block. Called through ctypes.
#include "attention/forward_sm80_kernel.cuh"
#include "attention_call.h"

namespace {

using namespace effkern;
using attention::ForwardParams;

template <class Element, int kHeadDim, int kValueDim>
void run(ForwardParams p, int64_t l2_bytes, unsigned seed) {
  using Shape = attention::ForwardShape<kHeadDim, kValueDim>;
  model::Block& block = model::block();
  const int64_t blocks = attention::plan_grid(p, Shape::kQueries, l2_bytes);
  for (int64_t i = 0; i < blocks && block.error.empty(); ++i) {
    block.index = static_cast<int>(i);
    block.run(Shape::kThreads, Shape::kSharedBytes, seed + static_cast<unsigned>(i),
              [&] { attention::attention_forward_sm80<Element, kHeadDim, kValueDim>(p, 0); });
  }
}

template <class Element>
void run_for(const ForwardParams& p, int64_t l2_bytes, unsigned seed) {
  const bool wide = p.head_dim > 64, wide_value = p.value_dim > 64;
  if (wide && wide_value) return run<Element, 128, 128>(p, l2_bytes, seed);
  if (wide) return run<Element, 128, 64>(p, l2_bytes, seed);
  if (wide_value) return run<Element, 64, 128>(p, l2_bytes, seed);
  run<Element, 64, 64>(p, l2_bytes, seed);
}

}  // namespace

// Null, or what went wrong.
extern "C" const char* model_attention_forward(const Call* call) {
  const ForwardParams p = params_of(*call);
  if (call->bf16)
    run_for<cuda::Bf16>(p, call->l2_bytes, call->seed);
  else
    run_for<cuda::Fp16>(p, call->l2_bytes, call->seed);
  const std::string& error = model::block().error;
  return error.empty() ? nullptr : error.c_str();
}

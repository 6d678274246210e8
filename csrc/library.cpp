// The catalogue: every op of effkern, one schema each. Kernels register themselves beside their code.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(effkern, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
      "float? scale=None, bool causal=False, bool top_left=False) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, float? scale=None, bool causal=False, "
      "bool top_left=False) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def(
      "attention_triton(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
      "float? scale=None, bool causal=False, bool top_left=False) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_triton_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, float? scale=None, bool causal=False, "
      "bool top_left=False) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def(
      "attention_cuda(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
      "float? scale=None, bool causal=False, bool top_left=False) -> (Tensor out, Tensor lse)");
}

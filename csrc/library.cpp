// The catalogue: every op of effkern, one schema each. Kernels register themselves beside their code.
#include <torch/csrc/stable/library.h>

// What a call of attention may carry beside q, k and v: geometry, mask terms (effkern/masks.py), score terms, dropout.
#define ATTENTION_OPTIONS                                                                                             \
  "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, float? scale=None, bool causal=False, bool top_left=False, " \
  "int[]? bands=None, int[]? groups=None, Tensor? layout=None, int block=0, Tensor? ids=None, Tensor? visible=None, " \
  "Tensor? bias=None, float softcap=0.0, Tensor? sink_logits=None, Tensor? alibi_slopes=None, float dropout_p=0.0, "  \
  "Tensor? dropout_seed=None"
#define ATTENTION_FORWARD "(Tensor q, Tensor k, Tensor v, " ATTENTION_OPTIONS ") -> (Tensor out, Tensor lse)"
#define ATTENTION_BACKWARD                                                                                       \
  "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, " ATTENTION_OPTIONS \
  ", bool bias_grad=False) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias, Tensor delta)"

#define ATTENTION_DECODE                                                                       \
  "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? page_table=None, " \
  "float? scale=None, int[]? bands=None, float softcap=0.0, Tensor? sink_logits=None) -> (Tensor out, Tensor lse)"

#define MONARCH_FORWARD "(Tensor x, Tensor w1, Tensor w2, Tensor? bias=None, bool l_major=False) -> Tensor"
#define MONARCH_BACKWARD                                                                                             \
  "(Tensor grad_out, Tensor x, Tensor w1, Tensor w2, bool l_major=False, bool need_x=True, bool need_w1=True, bool " \
  "need_w2=True, bool need_bias=False) -> (Tensor grad_x, Tensor grad_w1, Tensor grad_w2, Tensor grad_bias)"

// `spectrum` is what long_conv_spectrum made of k; the first `history` inputs only come before the outputs.
#define LONG_CONV_ARGUMENTS                                                                                       \
  "Tensor u, Tensor k, Tensor? spectrum=None, Tensor? skip=None, Tensor? pre_gate=None, Tensor? post_gate=None, " \
  "int history=0, bool causal=True"
#define LONG_CONV_FORWARD "(" LONG_CONV_ARGUMENTS ") -> Tensor"
#define LONG_CONV_BACKWARD                                                                                          \
  "(Tensor grad_out, " LONG_CONV_ARGUMENTS                                                                          \
  ", bool need_u=True, bool need_k=True, bool need_skip=True, bool need_pre=True, bool need_post=True) -> (Tensor " \
  "grad_u, Tensor grad_k, Tensor grad_skip, Tensor grad_pre, Tensor grad_post)"

#define SHORT_CONV_ARGUMENTS "Tensor x, Tensor weight, Tensor? bias=None, Tensor? state=None, bool silu=False"
#define SHORT_CONV_FORWARD "(" SHORT_CONV_ARGUMENTS ") -> Tensor"
#define SHORT_CONV_BACKWARD                                                                                          \
  "(Tensor grad_out, " SHORT_CONV_ARGUMENTS                                                                          \
  ", bool need_x=True, bool need_weight=True, bool need_bias=True, bool need_state=True) -> (Tensor grad_x, Tensor " \
  "grad_weight, Tensor grad_bias, Tensor grad_state)"

#define COUPLING                                                                                                   \
  "(Tensor f, Tensor? y=None, Tensor? x=None, float alpha=1.0, float beta=1.0, bool subtract=False, int? q=None, " \
  "float? keep=None) -> (Tensor out, Tensor kept, Tensor largest)"

#define DKM_FORWARD                                                                                            \
  "(Tensor weight, Tensor centroids, float temperature, int iterations=3, float tolerance=0.0, int groups=1, " \
  "int dim=1) -> (Tensor clustered, Tensor trajectory, Tensor counts, Tensor steps)"
#define DKM_BACKWARD                                                                                                   \
  "(Tensor grad_out, Tensor weight, Tensor trajectory, Tensor counts, Tensor steps, float temperature, int groups=1, " \
  "int dim=1) -> Tensor"

#define PALETTIZED_ARGUMENTS "Tensor x, Tensor indices, Tensor lut, int bits, int groups=1, int dim=1"
#define PALETTIZED_FORWARD "(" PALETTIZED_ARGUMENTS ", Tensor? bias=None, bool wide=False) -> Tensor"
#define PALETTIZED_BACKWARD                 \
  "(Tensor grad_out, " PALETTIZED_ARGUMENTS \
  ", bool need_x=True, bool need_lut=True) -> (Tensor grad_x, Tensor grad_lut)"

STABLE_TORCH_LIBRARY(effkern, m) {
  m.def("attention" ATTENTION_FORWARD);
  m.def("attention_backward" ATTENTION_BACKWARD);
  m.def("attention_triton" ATTENTION_FORWARD);
  m.def("attention_triton_backward" ATTENTION_BACKWARD);
  m.def("attention_cuda" ATTENTION_FORWARD);
  m.def(
      "attention_cuda_sm80(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float? scale, "
      "bool causal, bool top_left) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_cuda_sm90(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float? scale, "
      "bool top_left, int left, int right, int sink, int group, Tensor? layout, int block, Tensor? entries, "
      "Tensor? full, Tensor? total) -> (Tensor out, Tensor lse)");
  m.def("attention_cuda_backward" ATTENTION_BACKWARD);
  m.def(
      "attention_cuda_sm90_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float? scale, bool top_left, int left, int right, "
      "int sink, int group, Tensor? layout, int block, Tensor? entries, Tensor? full, Tensor? total, "
      "Tensor? key_entries, Tensor? key_full, Tensor? key_total, bool deterministic) -> (Tensor grad_q, "
      "Tensor grad_k, Tensor grad_v, Tensor delta)");
  m.def("attention_decode" ATTENTION_DECODE);
  m.def("attention_decode_triton" ATTENTION_DECODE);
  m.def("attention_decode_cuda" ATTENTION_DECODE);
  m.def("attention_merge(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_merge_backward(Tensor grad_out, Tensor? grad_lse, Tensor[] outs, Tensor[] lses, Tensor out, "
      "Tensor lse) -> (Tensor[] grad_outs, Tensor[] grad_lses)");
  m.def("monarch_matmul" MONARCH_FORWARD);
  m.def("monarch_matmul_backward" MONARCH_BACKWARD);
  m.def("monarch_matmul_triton" MONARCH_FORWARD);
  m.def("monarch_matmul_triton_backward" MONARCH_BACKWARD);
  m.def("block_diag_matmul(Tensor x, Tensor w) -> Tensor");
  m.def(
      "block_diag_matmul_backward(Tensor grad_out, Tensor x, Tensor w, bool need_x=True, bool need_w=True) -> "
      "(Tensor grad_x, Tensor grad_w)");
  m.def("long_conv" LONG_CONV_FORWARD);
  m.def("long_conv_backward" LONG_CONV_BACKWARD);
  m.def("long_conv_triton" LONG_CONV_FORWARD);
  m.def("long_conv_triton_backward" LONG_CONV_BACKWARD);
  m.def("long_conv_spectrum(Tensor k, int length, bool causal=True) -> Tensor");
  m.def("short_conv" SHORT_CONV_FORWARD);
  m.def("short_conv_backward" SHORT_CONV_BACKWARD);
  m.def("short_conv_triton" SHORT_CONV_FORWARD);
  m.def("short_conv_triton_backward" SHORT_CONV_BACKWARD);
  m.def("dkm" DKM_FORWARD);
  m.def("dkm_backward" DKM_BACKWARD);
  m.def("dkm_triton" DKM_FORWARD);
  m.def("dkm_triton_backward" DKM_BACKWARD);
  m.def("companion_kernel(Tensor a, Tensor b, Tensor c, int length) -> Tensor");
  m.def(
      "companion_kernel_backward(Tensor grad_out, Tensor a, Tensor b, Tensor c, Tensor out) -> "
      "(Tensor grad_a, Tensor grad_b, Tensor grad_c)");
  m.def("kmeans_init(Tensor weight, int clusters, int groups=1, int dim=1, Tensor? importance=None) -> Tensor");
  m.def("palettized_linear" PALETTIZED_FORWARD);
  m.def("palettized_linear_backward" PALETTIZED_BACKWARD);
  m.def("palettized_linear_triton" PALETTIZED_FORWARD);
  m.def("palettized_linear_triton_backward" PALETTIZED_BACKWARD);
  m.def("coupling" COUPLING);
  m.def("coupling_triton" COUPLING);
}

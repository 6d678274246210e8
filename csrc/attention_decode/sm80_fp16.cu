// The decode kernels for fp16.
#include "attention_decode/split_unit_sm80.cuh"

template effkern::attention_decode::SplitKernels effkern::attention_decode::split_kernels_sm80<effkern::cuda::Fp16>(
    int dim, int row_blocks);

"""Small kernels around functions of the Triton kernels that no launcher brings to their limits."""

import triton
import triton.language as tl

from effkern._triton.dkm_kernels import share


@triton.jit
def share_kernel(out, pid, chunks, chunk, vectors):
    """begin and end of a chunk, int64."""
    _, begin, end = share(pid, chunks, chunk, vectors)
    tl.store(out, begin.to(tl.int64))
    tl.store(out + 1, end.to(tl.int64))

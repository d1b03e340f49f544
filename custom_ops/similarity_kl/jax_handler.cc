// Exports the XLA handlers as C symbols for `jax.ffi.pycapsule`, in a library without TensorFlow. See jax_check.py.

#include "xla_handler.h"

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(S2sdSimilarityKlCpu, s2sd::RunOnCpu, s2sd::CpuBinding());
#if S2SD_TF_CUDA
XLA_FFI_DEFINE_HANDLER_SYMBOL(S2sdSimilarityKlCuda, s2sd::RunOnCuda, s2sd::CudaBinding());
#endif

#pragma GCC visibility pop

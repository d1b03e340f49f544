// How TensorFlow 2.20 makes XLA call the kernels: by the typed FFI, which passes shapes, types, threads and errors.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_XLA_CALL_TYPED_FFI_H_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_XLA_CALL_TYPED_FFI_H_

#include <string>

#include "absl/strings/str_cat.h"
#include "similarity_kl.h"
#include "xla/ffi/api/ffi.h"
#include "xla/ffi/ffi_api.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla_handler.h"

namespace s2sd {

// XLA's registries of custom calls are shared by the whole process, hence the long name.
constexpr char kTarget[] = "s2sd_tf_similarity_kl";
constexpr xla::CustomCallApiVersion kApiVersion = xla::CustomCallApiVersion::API_VERSION_TYPED_FFI;

// The custom call's string: the handler's attributes. The FFI passes shapes and threads by itself.
inline std::string CallText(const Problem& problem, bool /*compute_gradient*/, bool allow_tf32, int /*num_threads*/) {
  return absl::StrCat("{row_offset = ", problem.row_offset, " : i64, rows = ", problem.rows,
                      " : i64, allow_tf32 = ", allow_tf32 ? "true" : "false", "}");
}

XLA_FFI_DEFINE_HANDLER(kCpuHandler, RunOnCpu, CpuBinding());
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kTarget, "Host", kCpuHandler);

#if S2SD_TF_CUDA
XLA_FFI_DEFINE_HANDLER(kCudaHandler, RunOnCuda, CudaBinding());
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kTarget, "CUDA", kCudaHandler);
#endif

}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_XLA_CALL_TYPED_FFI_H_

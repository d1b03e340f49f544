// S2sd>SimilarityKl inside XLA, that is under jit_compile=True: one custom call, on the CPU and, in a build with CUDA,
// on a GPU.
//
// This is a library of its own, loaded after the one that registers the op: it needs XLA's headers and
// libtensorflow_cc, which the plain op does without.
//
// TensorFlow 2.20 calls a typed FFI handler, which gets shapes, types, errors and threads. TensorFlow 2.15 has the
// older interface for the CPU only: bare pointers and a string, in which the sizes are written.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "cpu_kernel.h"
#include "pool_tasks.h"
#include "similarity_kl.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "tensorflow/core/framework/kernel_def.pb.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_def.pb.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/framework/tensor_shape.h"
#include "tensorflow/core/framework/types.h"
#include "tensorflow/core/platform/logging.h"
#include "xla/shape.h"
#include "xla/shape_util.h"
#include "xla/xla_data.pb.h"

// The headers of TensorFlow 2.20 do not tell its version to the preprocessor.
#if __has_include("xla/ffi/api/ffi.h")
#define S2SD_TF_XLA_FFI 1
#include "xla/ffi/api/ffi.h"
#include "xla/ffi/ffi_api.h"
#include "xla/hlo/builder/xla_builder.h"
#else
#define S2SD_TF_XLA_FFI 0
#include <charconv>

#include "tensorflow/core/platform/env.h"
#include "tensorflow/core/platform/threadpool.h"
#include "xla/client/xla_builder.h"
#include "xla/service/custom_call_status_internal.h"
#include "xla/service/custom_call_target_registry.h"
#endif

#if S2SD_TF_CUDA
#if !S2SD_TF_XLA_FFI
#error "S2sd>SimilarityKl on a GPU inside XLA needs the typed FFI of TensorFlow 2.20."
#endif
#include <cuda_runtime.h>

#include <optional>

#include "cuda_kernel.h"
#endif

namespace s2sd {
namespace {

constexpr char kOp[] = "S2sd>SimilarityKl";
// XLA's registries of custom calls are shared by the whole process, hence the long name.
constexpr char kTarget[] = "s2sd_tf_similarity_kl";

// What one execution of the custom call works on. Its arguments are the student, the teachers, the temperature and the
// weights; its results the total, the numbers per teacher and, where it is asked for, the gradient.
struct Call {
  Problem problem;
  std::vector<Matrix> teachers;  // `problem.teachers` points here
  Outputs outputs;
};

#if S2SD_TF_XLA_FFI

namespace ffi = ::xla::ffi;

ffi::Error ReadCall(ffi::AnyBuffer student, ffi::RemainingArgs arguments, ffi::Result<ffi::BufferR0<ffi::F32>> total,
                    ffi::Result<ffi::BufferR1<ffi::F32>> per_teacher, ffi::RemainingRets gradient, int64_t row_offset,
                    int64_t rows, Call* call) {
  Problem& problem = call->problem;
  switch (student.element_type()) {
    case ffi::F32:
      problem.scalar = Scalar::kFloat32;
      break;
    case ffi::F16:
      problem.scalar = Scalar::kFloat16;
      break;
    case ffi::BF16:
      problem.scalar = Scalar::kBfloat16;
      break;
    default:
      return ffi::Error::InvalidArgument(absl::StrCat(kOp, ": student of an unknown type"));
  }
  const size_t num_teachers = per_teacher->dimensions()[0];
  if (arguments.size() != num_teachers + 2) {
    return ffi::Error::Internal(
        absl::StrCat(kOp, ": ", num_teachers, " teachers, but ", arguments.size() + 1, " arguments"));
  }
  for (size_t k = 0; k < num_teachers; ++k) {
    ffi::ErrorOr<ffi::AnyBuffer> teacher = arguments.get<ffi::AnyBuffer>(k);
    if (!teacher.has_value()) return teacher.error();
    call->teachers.push_back({teacher->untyped_data(), teacher->dimensions()[1]});
  }
  ffi::ErrorOr<ffi::BufferR0<ffi::F32>> temperature = arguments.get<ffi::BufferR0<ffi::F32>>(num_teachers);
  if (!temperature.has_value()) return temperature.error();
  ffi::ErrorOr<ffi::BufferR1<ffi::F32>> weights = arguments.get<ffi::BufferR1<ffi::F32>>(num_teachers + 1);
  if (!weights.has_value()) return weights.error();

  problem.columns = student.dimensions()[0];
  problem.row_offset = row_offset;
  problem.rows = rows;
  problem.student = {student.untyped_data(), student.dimensions()[1]};
  problem.teachers = call->teachers.data();
  problem.num_teachers = static_cast<int>(num_teachers);
  problem.temperature = temperature->typed_data();
  problem.weights = weights->typed_data();

  call->outputs = {total->typed_data(), per_teacher->typed_data(), nullptr};
  if (gradient.size() > 0) {
    auto buffer = gradient.get<ffi::BufferR2<ffi::F32>>(0);
    if (!buffer.has_value()) return buffer.error();
    call->outputs.gradient = (*buffer)->typed_data();
  }
  return ffi::Error::Success();
}

ffi::Error RunOnCpu(ffi::ThreadPool pool, ffi::AnyBuffer student, ffi::RemainingArgs arguments,
                    ffi::Result<ffi::BufferR0<ffi::F32>> total, ffi::Result<ffi::BufferR1<ffi::F32>> per_teacher,
                    ffi::RemainingRets gradient, int64_t row_offset, int64_t rows, bool /*allow_tf32*/) {
  Call call;
  ffi::Error error = ReadCall(student, arguments, total, per_teacher, gradient, row_offset, rows, &call);
  if (error.failure()) return error;
  const CpuOptions options =
      PooledCpuOptions(pool.num_threads(), [&pool](std::function<void()> run) { pool.Schedule(std::move(run)); });
  std::string message = SimilarityKlCpu(call.problem, options, call.outputs);
  return message.empty() ? ffi::Error::Success() : ffi::Error::InvalidArgument(std::move(message));
}

// What both handlers take after the context of their platform.
template <typename Binding>
auto WithCall(Binding binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .template Ret<ffi::BufferR0<ffi::F32>>()
      .template Ret<ffi::BufferR1<ffi::F32>>()
      .RemainingRets()
      .template Attr<int64_t>("row_offset")
      .template Attr<int64_t>("rows")
      .template Attr<bool>("allow_tf32");
}

XLA_FFI_DEFINE_HANDLER(kCpuHandler, RunOnCpu, WithCall(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kTarget, "Host", kCpuHandler);

#if S2SD_TF_CUDA

ffi::Error RunOnCuda(cudaStream_t stream, ffi::ScratchAllocator scratch, ffi::AnyBuffer student,
                     ffi::RemainingArgs arguments, ffi::Result<ffi::BufferR0<ffi::F32>> total,
                     ffi::Result<ffi::BufferR1<ffi::F32>> per_teacher, ffi::RemainingRets gradient, int64_t row_offset,
                     int64_t rows, bool allow_tf32) {
  Call call;
  ffi::Error error = ReadCall(student, arguments, total, per_teacher, gradient, row_offset, rows, &call);
  if (error.failure()) return error;
  // XLA refuses to promise an alignment of more than 16 bytes.
  constexpr uintptr_t kAlignment = 256;
  const int64_t bytes = SimilarityKlCudaWorkspaceBytes(call.problem, call.outputs.gradient != nullptr);
  const std::optional<void*> memory = scratch.Allocate(bytes + kAlignment);
  if (!memory.has_value()) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      absl::StrCat(kOp, ": no ", bytes, " bytes of device memory for the workspace"));
  }
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(*memory) + kAlignment - 1) / kAlignment * kAlignment;
  CudaOptions options;
  options.allow_tf32 = allow_tf32;
  const char* message = SimilarityKlCuda(call.problem, options, call.outputs, reinterpret_cast<void*>(aligned), stream);
  return message == nullptr ? ffi::Error::Success() : ffi::Error::InvalidArgument(message);
}

XLA_FFI_DEFINE_HANDLER(
    kCudaHandler, RunOnCuda,
    WithCall(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().Ctx<ffi::ScratchAllocator>()));
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kTarget, "CUDA", kCudaHandler);

#endif  // S2SD_TF_CUDA

#else  // S2SD_TF_XLA_FFI

// The numbers in the string of a custom call, in this order, and after them the width of every teacher.
enum OpaqueNumber { kScalar, kColumns, kRowOffset, kRows, kStudentDim, kGradient, kNumThreads, kTeacherDims };

// The older interface gives a custom call no threads. These are as many as TensorFlow's own, which wait meanwhile; they
// live as long as the process, for a call may come at any time.
tensorflow::thread::ThreadPool* Threads(int num_threads) {
  static auto* pool =
      new tensorflow::thread::ThreadPool(tensorflow::Env::Default(), "s2sd_tf", std::max(num_threads - 1, 1));
  return pool;
}

void RunOnCpu(void* result, const void** arguments, const char* opaque, size_t opaque_size,
              XlaCustomCallStatus* status) {
  std::vector<int64_t> numbers;
  const char* end = opaque + opaque_size;
  for (const char* at = opaque; at < end; ++at) {
    int64_t number = 0;
    at = std::from_chars(at, end, number).ptr;
    numbers.push_back(number);
  }

  const int num_teachers = static_cast<int>(numbers.size()) - kTeacherDims;
  Call call;
  for (int k = 0; k < num_teachers; ++k) {
    call.teachers.push_back({arguments[1 + k], numbers[kTeacherDims + k]});
  }
  Problem& problem = call.problem;
  problem.scalar = static_cast<Scalar>(numbers[kScalar]);
  problem.columns = numbers[kColumns];
  problem.row_offset = numbers[kRowOffset];
  problem.rows = numbers[kRows];
  problem.student = {arguments[0], numbers[kStudentDim]};
  problem.teachers = call.teachers.data();
  problem.num_teachers = num_teachers;
  problem.temperature = static_cast<const float*>(arguments[1 + num_teachers]);
  problem.weights = static_cast<const float*>(arguments[2 + num_teachers]);
  float** results = static_cast<float**>(result);
  call.outputs = {results[0], results[1], numbers[kGradient] ? results[2] : nullptr};

  const int num_threads = static_cast<int>(numbers[kNumThreads]);
  const CpuOptions options = PooledCpuOptions(
      num_threads, [num_threads](std::function<void()> run) { Threads(num_threads)->Schedule(std::move(run)); });
  std::string message = SimilarityKlCpu(call.problem, options, call.outputs);
  // The wheel declares XlaCustomCallStatusSetFailure but does not export it.
  if (!message.empty()) status->message = std::move(message);
}

XLA_REGISTER_CUSTOM_CALL_TARGET_WITH_SYM(kTarget, RunOnCpu, "Host");

#endif  // S2SD_TF_XLA_FFI

namespace tf = ::tensorflow;

class SimilarityKlXlaOp : public tf::XlaOpKernel {
 public:
  explicit SimilarityKlXlaOp(tf::OpKernelConstruction* context) : XlaOpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("compute_gradient", &compute_gradient_));
    OP_REQUIRES_OK(context, context->GetAttr("allow_tf32", &allow_tf32_));
  }

  void Compile(tf::XlaOpKernelContext* context) override {
    const int num_teachers = context->num_inputs() - 4;
    const int temperature = 1 + num_teachers;
    const int weights = temperature + 1;
    const int rows = weights + 1;

    std::vector<xla::XlaOp> arguments;
    // The kernels read row-major matrices; without these shapes XLA might pass the transpose of a product as it is.
    std::vector<xla::Shape> argument_shapes;
    for (int i = 0; i < rows; ++i) {
      auto shape = context->InputXlaShape(i);
      OP_REQUIRES_OK(context, shape.status());
      OP_REQUIRES(
          context, shape->is_static(),
          absl::UnimplementedError(absl::StrCat(kOp, ": input ", i, " has a dynamic shape: ", shape->ToString())));
      arguments.push_back(context->Input(i));
      argument_shapes.push_back(
          xla::ShapeUtil::MakeShapeWithDescendingLayout(shape->element_type(), shape->dimensions()));
    }

    const xla::Shape& student = argument_shapes[0];
    OP_REQUIRES(context, IsMatrix(student), InvalidArgument("student must be a matrix, got the shape ", Text(student)));
    const int64_t columns = student.dimensions(0);
    OP_REQUIRES(context, columns > 0, InvalidArgument("student must have at least one row"));
    for (int k = 0; k < num_teachers; ++k) {
      const xla::Shape& teacher = argument_shapes[1 + k];
      OP_REQUIRES(context, IsMatrix(teacher),
                  InvalidArgument("teachers[", k, "] must be a matrix, got the shape ", Text(teacher)));
      OP_REQUIRES(context, teacher.dimensions(0) == columns,
                  InvalidArgument("teachers[", k, "] must have as many rows as student, ", columns, ", got the shape ",
                                  Text(teacher)));
    }
    OP_REQUIRES(context, argument_shapes[temperature].dimensions().empty(),
                InvalidArgument("temperature must be a scalar, got the shape ", Text(argument_shapes[temperature])));
    OP_REQUIRES(
        context,
        argument_shapes[weights].dimensions().size() == 1 && argument_shapes[weights].dimensions(0) == num_teachers,
        InvalidArgument("weights must be one number per teacher, ", num_teachers, ", got the shape ",
                        Text(argument_shapes[weights])));
    std::vector<int64_t> range;
    OP_REQUIRES_OK(context, context->ConstantInputAsIntVector(rows, &range));
    OP_REQUIRES(context, range.size() == 2,
                InvalidArgument("rows must be two numbers, an offset and a count, got ", range.size()));
    OP_REQUIRES(context, range[0] >= 0 && range[1] > 0 && range[0] + range[1] <= columns,
                InvalidArgument("rows: ", range[1], " rows from row ", range[0], " on do not lie within the ", columns,
                                " rows of student"));

    std::vector<xla::Shape> results = {FloatShape({}), FloatShape({num_teachers})};
    if (compute_gradient_) results.push_back(FloatShape({columns, student.dimensions(1)}));

#if S2SD_TF_XLA_FFI
    const std::string opaque = absl::StrCat("{row_offset = ", range[0], " : i64, rows = ", range[1],
                                            " : i64, allow_tf32 = ", allow_tf32_ ? "true" : "false", "}");
    constexpr xla::CustomCallApiVersion kApiVersion = xla::CustomCallApiVersion::API_VERSION_TYPED_FFI;
#else
    const tf::DataType type = context->input_type(0);
    const Scalar scalar = type == tf::DT_FLOAT  ? Scalar::kFloat32
                          : type == tf::DT_HALF ? Scalar::kFloat16
                                                : Scalar::kBfloat16;
    const auto* threads = context->op_kernel_context()->device()->tensorflow_cpu_worker_threads();
    int64_t numbers[kTeacherDims];
    numbers[kScalar] = static_cast<int64_t>(scalar);
    numbers[kColumns] = columns;
    numbers[kRowOffset] = range[0];
    numbers[kRows] = range[1];
    numbers[kStudentDim] = student.dimensions(1);
    numbers[kGradient] = compute_gradient_;
    numbers[kNumThreads] = threads == nullptr ? 1 : threads->num_threads;
    std::string opaque;
    for (int64_t number : numbers) absl::StrAppend(&opaque, number, " ");
    for (int k = 0; k < num_teachers; ++k) absl::StrAppend(&opaque, argument_shapes[1 + k].dimensions(1), " ");
    constexpr xla::CustomCallApiVersion kApiVersion = xla::CustomCallApiVersion::API_VERSION_STATUS_RETURNING_UNIFIED;
#endif
    const xla::XlaOp call = xla::CustomCallWithLayout(
        context->builder(), kTarget, arguments, xla::ShapeUtil::MakeTupleShape(results), argument_shapes, opaque,
        /*has_side_effect=*/false, /*output_operand_aliasing=*/{}, /*literal=*/nullptr,
        xla::CustomCallSchedule::SCHEDULE_NONE, kApiVersion);

    context->SetOutput(0, xla::GetTupleElement(call, 0));
    context->SetOutput(1, xla::GetTupleElement(call, 1));
    if (compute_gradient_) {
      context->SetOutput(2, xla::GetTupleElement(call, 2));
    } else {
      context->SetConstantOutput(2, tf::Tensor(tf::DT_FLOAT, tf::TensorShape({0, 0})));
    }
  }

 private:
  static bool IsMatrix(const xla::Shape& shape) { return shape.dimensions().size() == 2; }

  template <typename... Parts>
  static absl::Status InvalidArgument(const Parts&... parts) {
    return absl::InvalidArgumentError(absl::StrCat(parts...));
  }

  static std::string Text(const xla::Shape& shape) { return tf::TensorShape(shape.dimensions()).DebugString(); }

  static xla::Shape FloatShape(std::initializer_list<int64_t> dimensions) {
    return xla::ShapeUtil::MakeShapeWithDescendingLayout(xla::F32, dimensions);
  }

  bool compute_gradient_;
  bool allow_tf32_;
};

tf::OpKernel* MakeKernel(tf::OpKernelConstruction* context) { return new SimilarityKlXlaOp(context); }

// Whether TensorFlow has turned the registrations for XLA into kernels of `device`. It does so once in a process.
bool HasKernels(absl::string_view device) {
  const tf::KernelList kernels = tf::GetRegisteredKernelsForOp("Neg");  // Every device of XLA has this one.
  return std::any_of(kernels.kernel().begin(), kernels.kernel().end(),
                     [device](const tf::KernelDef& kernel) { return kernel.device_type() == device; });
}

// REGISTER_XLA_OP as a function, for two reasons. XLA ends the process over a registration whose op is not there. And
// it takes no notice of one that comes after the kernels have been made, which the first tensor of a process may cause.
//
// One registration per device that has a handler: elsewhere TensorFlow then says that the op is not supported there.
bool Register() {
  const tf::OpDef* op = nullptr;
  if (!tf::OpRegistry::Global()->LookUpOpDef(kOp, &op).ok()) {
    LOG(ERROR) << "The library of " << kOp << " has to be loaded before the one for XLA; XLA does not have the op now.";
    return false;
  }
  std::vector<const char*> devices = {tf::DEVICE_CPU_XLA_JIT};
#if S2SD_TF_CUDA
  devices.push_back(tf::DEVICE_GPU_XLA_JIT);
#endif
  for (const char* device : devices) {
    const bool late = HasKernels(device);
    // Where it is too late for a kernel this still tells XLA of the constant input.
    tf::XlaOpRegistrar(
        tf::XlaOpRegistrationBuilder::Name(kOp).Device(device).CompileTimeConstantInput("rows").Build(MakeKernel));
    if (!late) continue;
    auto* kernel = new tf::KernelDef;  // The registry owns it.
    kernel->set_op(kOp);
    kernel->set_device_type(device);
    tf::kernel_factory::OpKernelRegistrar(kernel, "SimilarityKlXlaOp", MakeKernel);
  }
  return true;
}

const bool kRegistered = Register();

}  // namespace
}  // namespace s2sd

// Lowers S2sd>SimilarityKl to one custom call of XLA, in functions with jit_compile=True.
//
// This is a separate library, loaded after the one that registers the op: it needs XLA's headers and libtensorflow_cc,
// which the plain op does not.

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
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
#include "validate.h"
#include "xla/shape.h"
#include "xla/shape_util.h"
#include "xla/xla_data.pb.h"

// TensorFlow 2.20's headers do not give the preprocessor a version number.
#if __has_include("xla/ffi/api/ffi.h")
#include "xla_call_typed_ffi.h"
#else
#include "xla_call_bare_pointers.h"
#endif

namespace s2sd {
namespace {

namespace tf = ::tensorflow;

constexpr char kOp[] = "S2sd>SimilarityKl";

class SimilarityKlXlaOp : public tf::XlaOpKernel {
 public:
  explicit SimilarityKlXlaOp(tf::OpKernelConstruction* context)
      : XlaOpKernel(context), on_gpu_(context->device_type() == tf::DeviceType(tf::DEVICE_GPU_XLA_JIT)) {
    OP_REQUIRES_OK(context, context->GetAttr("compute_gradient", &compute_gradient_));
    OP_REQUIRES_OK(context, context->GetAttr("allow_tf32", &allow_tf32_));
  }

  void Compile(tf::XlaOpKernelContext* context) override {
    const int num_teachers = context->num_inputs() - 4;
    const int temperature = 1 + num_teachers;
    const int weights = temperature + 1;
    const int rows = weights + 1;

    std::vector<xla::XlaOp> arguments;
    // The kernels read row-major matrices. Without these shapes XLA might pass a transposed product in another layout.
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

    ArgumentShapes shapes = {
        ShapeOf(argument_shapes[0]), {}, ShapeOf(argument_shapes[temperature]), ShapeOf(argument_shapes[weights])};
    for (int k = 0; k < num_teachers; ++k) shapes.teachers.push_back(ShapeOf(argument_shapes[1 + k]));
    std::string wrong = ValidateShapes(shapes);
    const auto dim_sizes = context->InputShape(rows).dim_sizes();
    if (wrong.empty()) wrong = ValidateShapeOfRows(Shape(dim_sizes.begin(), dim_sizes.end()));
    OP_REQUIRES(context, wrong.empty(), absl::InvalidArgumentError(wrong));
    std::vector<int64_t> range;
    OP_REQUIRES_OK(context, context->ConstantInputAsIntVector(rows, &range));

    // The sizes only, no data.
    std::vector<Matrix> teachers;
    for (const Shape& teacher : shapes.teachers) teachers.push_back({nullptr, teacher[1]});
    const tf::DataType type = context->input_type(0);
    const Problem problem{type == tf::DT_FLOAT  ? Scalar::kFloat32
                          : type == tf::DT_HALF ? Scalar::kFloat16
                                                : Scalar::kBfloat16,
                          shapes.student[0],
                          range[0],
                          range[1],
                          {nullptr, shapes.student[1]},
                          teachers.data(),
                          num_teachers,
                          nullptr,
                          nullptr};
    wrong = on_gpu_ ? ValidateForCuda(problem) : ValidateSizes(problem);
    OP_REQUIRES(context, wrong.empty(), absl::InvalidArgumentError(wrong));

    std::vector<xla::Shape> results = {FloatShape({}), FloatShape({num_teachers})};
    if (compute_gradient_) results.push_back(FloatShape({problem.columns, problem.student.dim}));
    const auto* threads = context->op_kernel_context()->device()->tensorflow_cpu_worker_threads();
    const std::string text =
        CallText(problem, compute_gradient_, allow_tf32_, threads == nullptr ? 1 : threads->num_threads);
    const xla::XlaOp call = xla::CustomCallWithLayout(
        context->builder(), kTarget, arguments, xla::ShapeUtil::MakeTupleShape(results), argument_shapes, text,
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
  static Shape ShapeOf(const xla::Shape& shape) {
    return Shape(shape.dimensions().begin(), shape.dimensions().end());
  }

  static xla::Shape FloatShape(std::initializer_list<int64_t> dimensions) {
    return xla::ShapeUtil::MakeShapeWithDescendingLayout(xla::F32, dimensions);
  }

  const bool on_gpu_;
  bool compute_gradient_;
  bool allow_tf32_;
};

tf::OpKernel* MakeKernel(tf::OpKernelConstruction* context) { return new SimilarityKlXlaOp(context); }

// Whether TensorFlow has already made kernels of `device` from the XLA registrations, which it does once per process.
bool HasKernels(absl::string_view device) {
  const tf::KernelList kernels = tf::GetRegisteredKernelsForOp("Neg");  // Every XLA device has this one.
  return std::any_of(kernels.kernel().begin(), kernels.kernel().end(),
                     [device](const tf::KernelDef& kernel) { return kernel.device_type() == device; });
}

// A function instead of REGISTER_XLA_OP, for two reasons. XLA ends the process if the registered op does not exist, and
// it ignores a registration that comes after the kernels have been made, which a process's first tensor may trigger.
//
// Registers the op only for devices that have a handler, so that TensorFlow reports it as unsupported on the others.
bool Register() {
  const tf::OpDef* op = nullptr;
  if (!tf::OpRegistry::Global()->LookUpOpDef(kOp, &op).ok()) {
    LOG(ERROR) << "Load the library of " << kOp << " before the one for XLA. The op is not available in XLA now.";
    return false;
  }
  std::vector<const char*> devices = {tf::DEVICE_CPU_XLA_JIT};
#if S2SD_TF_CUDA
  devices.push_back(tf::DEVICE_GPU_XLA_JIT);
#endif
  for (const char* device : devices) {
    const bool late = HasKernels(device);
    // Even if it is too late for a kernel, XLA learns from this that the input is a compile-time constant.
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

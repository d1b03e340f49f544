// The op S2sd>SimilarityKl: its signature, its CPU kernel and, in a build with CUDA, its GPU kernel.

#if S2SD_TF_CUDA
#define EIGEN_USE_GPU
#endif

#include "tensorflow/core/framework/op.h"

#include <string>
#include <vector>

#include "cpu_kernel.h"
#include "pool_tasks.h"
#include "similarity_kl.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/lib/core/threadpool.h"
#include "validate.h"

#if S2SD_TF_CUDA
#include "cuda_kernel.h"
#include "unsupported/Eigen/CXX11/Tensor"
#endif

namespace s2sd {
namespace {

namespace tf = ::tensorflow;
using tf::shape_inference::DimensionHandle;
using tf::shape_inference::InferenceContext;
using tf::shape_inference::ShapeHandle;

// The type of a status differs between TensorFlow 2.15 and 2.20.
using Status = decltype(tf::errors::InvalidArgument(""));

Status ShapeFunction(InferenceContext* context) {
  const int num_teachers = context->num_inputs() - 4;
  ShapeHandle student;
  TF_RETURN_IF_ERROR(context->WithRank(context->input(0), 2, &student));
  DimensionHandle batch = context->Dim(student, 0);
  for (int k = 0; k < num_teachers; ++k) {
    ShapeHandle teacher;
    TF_RETURN_IF_ERROR(context->WithRank(context->input(1 + k), 2, &teacher));
    TF_RETURN_IF_ERROR(context->Merge(batch, context->Dim(teacher, 0), &batch));
  }
  ShapeHandle unused;
  DimensionHandle unused_dim;
  TF_RETURN_IF_ERROR(context->WithRank(context->input(1 + num_teachers), 0, &unused));
  TF_RETURN_IF_ERROR(context->WithRank(context->input(2 + num_teachers), 1, &unused));
  TF_RETURN_IF_ERROR(context->WithValue(context->Dim(unused, 0), num_teachers, &unused_dim));
  TF_RETURN_IF_ERROR(context->WithRank(context->input(3 + num_teachers), 1, &unused));
  TF_RETURN_IF_ERROR(context->WithValue(context->Dim(unused, 0), 2, &unused_dim));
  bool compute_gradient;
  TF_RETURN_IF_ERROR(context->GetAttr("compute_gradient", &compute_gradient));
  context->set_output(0, context->Scalar());
  context->set_output(1, context->Vector(num_teachers));
  context->set_output(2, compute_gradient ? context->Matrix(batch, context->Dim(student, 1)) : context->Matrix(0, 0));
  return Status();
}

REGISTER_OP("S2sd>SimilarityKl")
    .Input("student: T")
    .Input("teachers: K * T")
    .Input("temperature: float")
    .Input("weights: float")
    .Input("rows: int32")
    .Output("total: float")
    .Output("per_teacher: float")
    .Output("student_gradient: float")
    .Attr("T: {float, half, bfloat16}")
    .Attr("K: int >= 1")
    .Attr("compute_gradient: bool = true")
    .Attr("allow_tf32: bool = false")
    .SetShapeFn(ShapeFunction)
    .Doc(R"doc(
The KL divergence between the row-wise softmaxes of a teacher's and the student's similarity matrices, for every
teacher, and the gradient of the weighted sum with respect to the student. Rows are expected to be l2-normalised.

student: (B, D).
teachers: K matrices (B, D_k).
temperature: a scalar T > 0, by which the similarities are divided.
weights: (K), the weights of the sum.
rows: (offset, count) of the similarity matrices' rows over which the mean is taken; (0, B) for all.
total: a scalar, the weighted sum of the divergences.
per_teacher: (K), the divergences, scaled by T^2.
student_gradient: (B, D), the derivative of total with respect to student; (0, 0) unless compute_gradient.
allow_tf32: whether a GPU may multiply float32 in TF32.
)doc");

template <typename T>
constexpr Scalar ScalarOf() {
  if (tf::DataTypeToEnum<T>::value == tf::DT_FLOAT) return Scalar::kFloat32;
  return tf::DataTypeToEnum<T>::value == tf::DT_HALF ? Scalar::kFloat16 : Scalar::kBfloat16;
}

class SimilarityKlOpBase : public tf::OpKernel {
 public:
  explicit SimilarityKlOpBase(tf::OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("compute_gradient", &compute_gradient_));
    OP_REQUIRES_OK(context, context->GetAttr("allow_tf32", &allow_tf32_));
  }

  void Compute(tf::OpKernelContext* context) override {
    const int num_teachers = context->num_inputs() - 4;
    const tf::Tensor& student = context->input(0);
    const tf::Tensor& temperature = context->input(1 + num_teachers);
    const tf::Tensor& weights = context->input(2 + num_teachers);
    const tf::Tensor& rows = context->input(3 + num_teachers);
    ArgumentShapes shapes = {ShapeOf(student), {}, ShapeOf(temperature), ShapeOf(weights)};
    for (int k = 0; k < num_teachers; ++k) shapes.teachers.push_back(ShapeOf(context->input(1 + k)));
    std::string wrong = ValidateShapes(shapes);
    if (wrong.empty()) wrong = ValidateShapeOfRows(ShapeOf(rows));
    OP_REQUIRES(context, wrong.empty(), tf::errors::InvalidArgument(wrong));

    std::vector<Matrix> teachers;
    for (int k = 0; k < num_teachers; ++k) {
      teachers.push_back({context->input(1 + k).tensor_data().data(), shapes.teachers[k][1]});
    }
    const Problem problem{scalar(),
                          student.dim_size(0),
                          rows.flat<tf::int32>()(0),
                          rows.flat<tf::int32>()(1),
                          {student.tensor_data().data(), student.dim_size(1)},
                          teachers.data(),
                          num_teachers,
                          temperature.flat<float>().data(),
                          weights.flat<float>().data()};
    wrong = Validate(problem);
    OP_REQUIRES(context, wrong.empty(), tf::errors::InvalidArgument(wrong));

    tf::Tensor *total, *per_teacher, *gradient;
    OP_REQUIRES_OK(context, context->allocate_output(0, {}, &total));
    OP_REQUIRES_OK(context, context->allocate_output(1, {num_teachers}, &per_teacher));
    OP_REQUIRES_OK(
        context, context->allocate_output(2, compute_gradient_ ? student.shape() : tf::TensorShape({0, 0}), &gradient));
    Run(context, problem,
        {total->flat<float>().data(), per_teacher->flat<float>().data(),
         compute_gradient_ ? gradient->flat<float>().data() : nullptr});
  }

 protected:
  bool allow_tf32() const { return allow_tf32_; }

 private:
  static Shape ShapeOf(const tf::Tensor& tensor) {
    Shape shape;
    for (int i = 0; i < tensor.dims(); ++i) shape.push_back(tensor.dim_size(i));
    return shape;
  }

  virtual Scalar scalar() const = 0;
  // Returns an empty string, or what is wrong with the problem on this device.
  virtual std::string Validate(const Problem& problem) const = 0;
  // The problem is valid.
  virtual void Run(tf::OpKernelContext* context, const Problem& problem, const Outputs& outputs) = 0;

  bool compute_gradient_;
  bool allow_tf32_;
};

template <typename T>
class SimilarityKlCpuOp : public SimilarityKlOpBase {
 public:
  using SimilarityKlOpBase::SimilarityKlOpBase;

 private:
  Scalar scalar() const override { return ScalarOf<T>(); }
  std::string Validate(const Problem& problem) const override { return ValidateForCpu(problem); }

  void Run(tf::OpKernelContext* context, const Problem& problem, const Outputs& outputs) override {
    auto* workers = context->device()->tensorflow_cpu_worker_threads()->workers;
    const CpuOptions options = PooledCpuOptions(
        workers->NumThreads(), [workers](std::function<void()> run) { workers->Schedule(std::move(run)); });
    const std::string failure = SimilarityKlCpu(problem, options, outputs);
    OP_REQUIRES(context, failure.empty(), tf::errors::ResourceExhausted("similarity_kl: ", failure));
  }
};

#define REGISTER_CPU(T) \
  REGISTER_KERNEL_BUILDER(Name("S2sd>SimilarityKl").Device(tf::DEVICE_CPU).TypeConstraint<T>("T"), SimilarityKlCpuOp<T>)
REGISTER_CPU(float);
REGISTER_CPU(Eigen::half);
REGISTER_CPU(Eigen::bfloat16);
#undef REGISTER_CPU

#if S2SD_TF_CUDA

template <typename T>
class SimilarityKlCudaOp : public SimilarityKlOpBase {
 public:
  using SimilarityKlOpBase::SimilarityKlOpBase;

 private:
  Scalar scalar() const override { return ScalarOf<T>(); }
  std::string Validate(const Problem& problem) const override { return ValidateForCuda(problem); }

  void Run(tf::OpKernelContext* context, const Problem& problem, const Outputs& outputs) override {
    CudaOptions options;
    options.allow_tf32 = allow_tf32();
    options.kept_bytes = WorkspaceBytes();
    tf::Tensor workspace;
    const auto allocate = [&](bool retry) {
      const tf::int64 bytes = PlanCuda(problem, options, outputs.gradient != nullptr).workspace_bytes;
      const tf::AllocationAttributes patience(retry, /*allocation_will_be_logged=*/false, /*freed_by_func=*/nullptr);
      return context->allocate_temp(tf::DT_INT8, {bytes}, &workspace, tf::AllocatorAttributes(), patience);
    };
    if (!allocate(/*retry=*/false).ok()) {
      options.kept_bytes = 0;  // slower, but needs less memory on a device that is nearly full
      OP_REQUIRES_OK(context, allocate(/*retry=*/true));
    }
    const char* failure = SimilarityKlCuda(problem, options, outputs, workspace.flat<tf::int8>().data(),
                                           context->eigen_gpu_device().stream());
    OP_REQUIRES(context, failure == nullptr, tf::errors::Internal("similarity_kl: ", failure));
  }
};

#define REGISTER_GPU(T)                                                                                               \
  REGISTER_KERNEL_BUILDER(Name("S2sd>SimilarityKl").Device(tf::DEVICE_GPU).TypeConstraint<T>("T").HostMemory("rows"), \
                          SimilarityKlCudaOp<T>)
REGISTER_GPU(float);
REGISTER_GPU(Eigen::half);
REGISTER_GPU(Eigen::bfloat16);
#undef REGISTER_GPU

#endif  // S2SD_TF_CUDA

}  // namespace
}  // namespace s2sd

// Runs CUDA kernel source as plain C++17 on the CPU. Every CUDA thread has a fiber, which runs it from one barrier or
// warp-wide instruction to the next. Strict where a GPU is silent:
//
//   - shared memory, and the target of an asynchronous copy from its issue until its wait, hold NaNs;
//   - source addresses of asynchronous copies must lie inside arrays made by GuardedArray, whose ends are guard pages;
//   - lanes at different warp-wide instructions, and barriers that not all threads reach, end the program;
//   - threads and blocks run in an order drawn from a seed, so that a missing barrier shows.
//
// Tensor cores: documented fragment layouts, low bits of TF32 operands dropped, sums truncated to float32.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_HOST_HARNESS_H_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_HOST_HARNESS_H_

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks with static shared memory run one after the other

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace harness {

[[noreturn]] inline void Fail(const char* message) {
  std::fprintf(stderr, "emulator: %s (block %u %u, thread %u)\n", message, blockIdx.x, blockIdx.y, threadIdx.x);
  std::fflush(stderr);
  std::abort();
}

inline void CheckStream(void* stream);

// An array on its own pages, between two inaccessible pages. Its end is as close to the upper one as `alignment`
// allows; the bytes between are NaNs.
class GuardedArray {
 public:
  GuardedArray(int64_t bytes, int64_t alignment) : bytes_(bytes) {
    constexpr int64_t kPage = 4096;
    const int64_t inner = (bytes + alignment + kPage - 1) / kPage * kPage;
    mapped_ = inner + 2 * kPage;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + kPage, inner, PROT_READ | PROT_WRITE) != 0) Fail("no memory");
    std::memset(base_ + kPage, 0xff, inner);
    data_ = base_ + kPage + (inner - bytes) / alignment * alignment;
    Arrays()[data_ + bytes] = data_;
  }
  GuardedArray(const GuardedArray&) = delete;
  GuardedArray& operator=(const GuardedArray&) = delete;
  ~GuardedArray() {
    Arrays().erase(data_ + bytes_);
    munmap(base_, mapped_);
  }

  char* data() { return data_; }

  static bool Contains(const char* from, int64_t bytes) {
    const auto array = Arrays().lower_bound(from + bytes);
    return array != Arrays().end() && from >= array->second;
  }

 private:
  static std::map<const char*, const char*>& Arrays() {  // end -> begin
    static std::map<const char*, const char*> arrays;
    return arrays;
  }

  char* base_;
  char* data_;
  int64_t bytes_;
  int64_t mapped_;
};

struct Fiber;

// A barrier for a group of threads.
struct Barrier {
  int expected = 0;
  std::vector<Fiber*> waiting;
  int result = 0;       // of the last complete round
  int accumulated = 0;  // of the current round
};

struct Warp {
  Barrier barrier;
  const char* operation = nullptr;
  void* operands[32];
};

struct Block {
  dim3 index;
  std::vector<char> shared;
  char* shared_start;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Fiber*> fibers;
};

struct PendingCopy {
  char* to;
  const char* from;  // null: zeros
  int bytes;
};

// Runs a thread to its end, then one of a later block.
struct Fiber {
  Block* block;
  unsigned thread;  // in the block, row by row
  jmp_buf context;
  char* stack;
  bool started = false;
  bool finished;
  std::deque<std::vector<PendingCopy>> copies;
};

constexpr size_t kStackBytes = 256 << 10;

struct Emulator {
  int multiprocessors = 3;
  int resident_blocks = 1;
  void* only_stream = nullptr;  // if not null, work on any other stream fails
  unsigned seed = 1;

  std::function<void()> kernel;
  std::vector<Fiber*> ready;
  std::minstd_rand random;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  Barrier grid;
  std::vector<Fiber*> free_fibers;
};

inline Emulator emulator;

inline void CheckStream(void* stream) {
  if (emulator.only_stream != nullptr && stream != emulator.only_stream) Fail("work on another stream");
}

inline Fiber& Current() { return *emulator.current; }
inline Warp& CurrentWarp() { return Current().block->warps[Current().thread / 32]; }

inline dim3 ThreadIndex(unsigned thread) { return dim3(thread % blockDim.x, thread / blockDim.x); }

inline void Suspend() {
  if (_setjmp(Current().context) == 0) _longjmp(emulator.scheduler, 1);
}

inline void RunThreads() {
  for (;;) {
    emulator.kernel();
    Current().finished = true;
    Suspend();
  }
}

inline void Resume(Fiber* fiber) {
  emulator.current = fiber;
  blockIdx = fiber->block->index;
  threadIdx = ThreadIndex(fiber->thread);
  if (_setjmp(emulator.scheduler) != 0) return;
  if (fiber->started) _longjmp(fiber->context, 1);
  fiber->started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber->stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, RunThreads, 0);
  setcontext(&context);
}

// The last thread to arrive runs `complete` and releases the others.
template <typename Complete>
void Wait(Barrier& barrier, const Complete& complete) {
  if (static_cast<int>(barrier.waiting.size()) + 1 < barrier.expected) {
    barrier.waiting.push_back(&Current());
    Suspend();
    return;
  }
  complete();
  for (Fiber* fiber : barrier.waiting) emulator.ready.push_back(fiber);
  barrier.waiting.clear();
}

// `complete(operands)` runs once, with the 32 lanes' operands.
template <typename Complete>
void WarpWide(const char* operation, void* operand, const Complete& complete) {
  Warp& warp = CurrentWarp();
  if (warp.barrier.waiting.empty()) warp.operation = operation;
  if (warp.operation != operation) Fail("lanes of a warp at different operations");
  warp.operands[Current().thread % 32] = operand;
  Wait(warp.barrier, [&] { complete(warp.operands); });
}

inline void RunBlocks(const std::vector<dim3>& indices, int threads, int shared_bytes) {
  std::vector<std::unique_ptr<Block>> blocks;
  emulator.grid.expected = static_cast<int>(indices.size()) * threads;
  for (const dim3& index : indices) {
    blocks.push_back(std::make_unique<Block>());
    Block& block = *blocks.back();
    block.index = index;
    block.shared.assign(shared_bytes + 128, static_cast<char>(0xff));
    block.shared_start = block.shared.data() + (128 - reinterpret_cast<uintptr_t>(block.shared.data()) % 128) % 128;
    block.barrier.expected = threads;
    block.warps.resize(threads / 32);
    for (Warp& warp : block.warps) warp.barrier.expected = 32;
    for (int t = 0; t < threads; ++t) {
      if (emulator.free_fibers.empty()) {
        void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) Fail("no memory for stacks");
        emulator.free_fibers.push_back(new Fiber);
        emulator.free_fibers.back()->stack = static_cast<char*>(stack);
      }
      Fiber* fiber = emulator.free_fibers.back();
      emulator.free_fibers.pop_back();
      fiber->block = &block;
      fiber->thread = t;
      fiber->finished = false;
      fiber->copies.assign(1, {});
      block.fibers.push_back(fiber);
      emulator.ready.push_back(fiber);
    }
  }
  while (!emulator.ready.empty()) {
    // Mostly, a warp runs ahead to the next barrier while others lag behind: a GPU's worst case.
    if (emulator.random() % 64 == 0) {
      std::swap(emulator.ready[emulator.random() % emulator.ready.size()], emulator.ready.back());
    }
    Fiber* fiber = emulator.ready.back();
    emulator.ready.pop_back();
    Resume(fiber);
  }
  for (const auto& block : blocks) {
    for (Fiber* fiber : block->fibers) {
      if (!fiber->finished) {
        blockIdx = block->index;
        threadIdx = ThreadIndex(fiber->thread);
        Fail("a barrier that not all threads reach");
      }
      emulator.free_fibers.push_back(fiber);
    }
  }
}

inline void RunGrid(const dim3& grid, const dim3& block, int shared_bytes, bool cooperative) {
  blockDim = block;
  gridDim = grid;
  std::vector<dim3> indices;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) indices.push_back(dim3(x, y));
  }
  emulator.random.seed(emulator.seed);
  std::shuffle(indices.begin(), indices.end(), emulator.random);
  if (cooperative) {
    if (static_cast<int>(indices.size()) > emulator.multiprocessors * emulator.resident_blocks) {
      Fail("more blocks than can be resident");
    }
    RunBlocks(indices, block.x * block.y, shared_bytes);
  } else {
    for (const dim3& index : indices) RunBlocks({index}, block.x * block.y, shared_bytes);
  }
}

inline float BitsToFloat(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline unsigned FloatToBits(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float Float16ToFloat(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int fraction = bits & 1023;
  const float magnitude = exponent == 0    ? std::ldexp(static_cast<float>(fraction), -24)
                          : exponent == 31 ? (fraction == 0 ? INFINITY : NAN)
                                           : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

// The nearest of all finite values, by search: slow, but without its own rounding rule.
inline uint16_t ToFloat16(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return 0x7e00;
  uint16_t low = 0, high = 0x7bff;
  while (high - low > 1) {
    const uint16_t middle = (low + high) / 2;
    (Float16ToFloat(middle) <= magnitude ? low : high) = middle;
  }
  const float below = magnitude - Float16ToFloat(low);
  const float above = Float16ToFloat(high) - magnitude;
  return sign | (below <= above ? low : high);
}

inline float Truncate(double x) {
  const float rounded = static_cast<float>(x);
  return std::fabs(static_cast<double>(rounded)) > std::fabs(x) ? std::nextafter(rounded, 0.0f) : rounded;
}

struct MmaOperands {
  float* c;
  const unsigned* a;
  unsigned b[2];
};

// `kPerWord` numbers per 32-bit word, 1 or 2; unpack(word, n) is the n-th of them. The depth is 8 * kPerWord.
template <int kPerWord, typename Unpack>
void Mma(const char* name, float* c, const unsigned* a, unsigned b0, unsigned b1, const Unpack& unpack) {
  MmaOperands mine = {c, a, {b0, b1}};
  WarpWide(name, &mine, [&](void** lanes) {
    constexpr int kDepth = 8 * kPerWord;
    double a_matrix[16][kDepth];
    double b_matrix[kDepth][8];
    for (int lane = 0; lane < 32; ++lane) {
      const MmaOperands& from = *static_cast<MmaOperands*>(lanes[lane]);
      const int g = lane / 4;
      const int t = lane % 4;
      for (int n = 0; n < kPerWord; ++n) {
        const int k = t * kPerWord + n;
        a_matrix[g][k] = unpack(from.a[0], n);
        a_matrix[g + 8][k] = unpack(from.a[1], n);
        a_matrix[g][k + 4 * kPerWord] = unpack(from.a[2], n);
        a_matrix[g + 8][k + 4 * kPerWord] = unpack(from.a[3], n);
        b_matrix[k][g] = unpack(from.b[0], n);
        b_matrix[k + 4 * kPerWord][g] = unpack(from.b[1], n);
      }
    }
    for (int row = 0; row < 16; ++row) {
      const auto out = [&](int column) -> float& {
        return static_cast<MmaOperands*>(lanes[row % 8 * 4 + column / 2])->c[row / 8 * 2 + column % 2];
      };
      double sums[8];
      for (int column = 0; column < 8; ++column) sums[column] = out(column);
#pragma GCC unroll 16
      for (int k = 0; k < kDepth; ++k) {
#pragma GCC unroll 8
        for (int column = 0; column < 8; ++column) sums[column] += a_matrix[row][k] * b_matrix[k][column];
      }
      for (int column = 0; column < 8; ++column) out(column) = Truncate(sums[column]);
    }
  });
}

inline void CheckShared(const void* shared, int bytes, const char* what) {
  const Block& block = *Current().block;
  const char* at = static_cast<const char*>(shared);
  if (reinterpret_cast<uintptr_t>(shared) % bytes != 0) Fail((std::string("misaligned ") + what).c_str());
  if (at < block.shared_start || at + bytes > block.shared.data() + block.shared.size()) {
    Fail((std::string(what) + " outside shared memory").c_str());
  }
}

inline void CopyAsync(void* shared, const void* global, bool valid, int bytes) {
  CheckShared(shared, bytes, "asynchronous copy");
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0) Fail("misaligned asynchronous copy");
  char* to = static_cast<char*>(shared);
  const char* from = valid ? static_cast<const char*>(global) : nullptr;
  if (valid && !GuardedArray::Contains(from, bytes)) Fail("asynchronous copy from outside an array");
  std::memset(to, 0xff, bytes);
  Current().copies.back().push_back({to, from, bytes});
}

}  // namespace harness

// --- What device code calls under CUDA's names.

inline float __uint_as_float(unsigned bits) { return harness::BitsToFloat(bits); }
inline unsigned __float_as_uint(float x) { return harness::FloatToBits(x); }
inline float __int_as_float(int bits) { return harness::BitsToFloat(static_cast<unsigned>(bits)); }
inline int __float_as_int(float x) { return static_cast<int>(harness::FloatToBits(x)); }
inline long long __float2ll_rn(float x) {
  if (!(std::fabs(x) < 9.2e18f)) harness::Fail("fixed point out of range");
  return std::llrint(x);
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float cospif(float x) { return std::cos(3.14159265f * x); }

inline void __syncthreads() {
  harness::Wait(harness::Current().block->barrier, [] {});
}

inline int __syncthreads_or(int predicate) {
  harness::Barrier& barrier = harness::Current().block->barrier;
  barrier.accumulated |= predicate != 0;
  harness::Wait(barrier, [&] {
    barrier.result = barrier.accumulated;
    barrier.accumulated = 0;
  });
  return barrier.result;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int delta) {
  if (mask != 0xffffffffu) harness::Fail("partial warp");
  struct Exchange {
    T in, out;
    int source;
  } mine = {x, x, static_cast<int>(harness::Current().thread % 32) ^ delta};
  harness::WarpWide("shfl", &mine, [](void** lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      Exchange& to = *static_cast<Exchange*>(lanes[lane]);
      to.out = static_cast<Exchange*>(lanes[to.source])->in;
    }
  });
  return mine.out;
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  if (mask != 0xffffffffu) harness::Fail("partial warp");
  struct Vote {
    int in;
    unsigned out;
  } mine = {predicate, 0};
  harness::WarpWide("ballot", &mine, [](void** lanes) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= (static_cast<Vote*>(lanes[lane])->in != 0 ? 1u : 0u) << lane;
    for (int lane = 0; lane < 32; ++lane) static_cast<Vote*>(lanes[lane])->out = votes;
  });
  return mine.out;
}

inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long x) {
  const unsigned long long old = *address;
  *address += x;
  return old;
}

inline int atomicMax(int* address, int x) {
  const int old = *address;
  *address = std::max(old, x);
  return old;
}

// --- What host code calls.

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeNone, cudaLaunchAttributeCooperative };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
constexpr unsigned cudaStreamNonBlocking = 1;

inline std::map<void*, std::unique_ptr<harness::GuardedArray>>& DeviceMemory() {
  static std::map<void*, std::unique_ptr<harness::GuardedArray>> memory;
  return memory;
}
template <typename T>
cudaError_t cudaMalloc(T** data, size_t bytes) {
  auto array = std::make_unique<harness::GuardedArray>(static_cast<int64_t>(bytes), 256);
  *data = reinterpret_cast<T*>(array->data());
  DeviceMemory()[*data] = std::move(array);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* data) { return DeviceMemory().erase(data), cudaSuccess; }
inline cudaError_t cudaMemset(void* to, int value, size_t bytes) { return std::memset(to, value, bytes), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return *stream = stream, cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid value"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? harness::emulator.multiprocessors : 99 << 10;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= 99 << 10 ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  return *blocks = harness::emulator.resident_blocks, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  harness::CheckStream(stream);
  std::memset(to, value, bytes);
  return cudaSuccess;
}
template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
  harness::CheckStream(config->stream);
  harness::emulator.kernel = [&] { kernel(arguments...); };
  harness::RunGrid(config->gridDim, config->blockDim, static_cast<int>(config->dynamicSmemBytes),
                   config->numAttrs == 1 && config->attrs->val.cooperative != 0);
  return cudaSuccess;
}

// --- What cuda_primitives.cuh provides with nvcc.

namespace s2sd {
namespace cuda {

inline char* SharedMemory() { return harness::Current().block->shared_start; }
inline int OpaqueThreadIndex() { return static_cast<int>(threadIdx.x); }

inline void CopyAsync16(void* shared, const void* global, bool valid) { harness::CopyAsync(shared, global, valid, 16); }
inline void CopyAsync4(void* shared, const void* global, bool valid) { harness::CopyAsync(shared, global, valid, 4); }
inline void CopyAsyncCommit() { harness::Current().copies.emplace_back(); }

template <int kPending>
void CopyAsyncWait() {
  auto& copies = harness::Current().copies;  // the last one is not committed
  while (copies.size() > kPending + 1) {
    for (const harness::PendingCopy& copy : copies.front()) {
      if (copy.from == nullptr) {
        std::memset(copy.to, 0, copy.bytes);
      } else {
        std::memcpy(copy.to, copy.from, copy.bytes);
      }
    }
    copies.pop_front();
  }
}

inline void LoadMatrices(const void* shared, unsigned (&words)[4]) {
  struct Load {
    const void* from;
    unsigned* to;
  } mine = {shared, words};
  harness::CheckShared(shared, 16, "matrix load");
  harness::WarpWide("ldmatrix", &mine, [](void** lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const Load& row = *static_cast<Load*>(lanes[8 * matrix + lane / 4]);
        std::memcpy(&static_cast<Load*>(lanes[lane])->to[matrix], static_cast<const char*>(row.from) + lane % 4 * 4, 4);
      }
    }
  });
}

inline float Float16ToFloat(uint16_t bits) { return harness::Float16ToFloat(bits); }
inline uint16_t FloatToFloat16(float x) { return harness::ToFloat16(x); }
inline float Exp2(float x) { return std::exp2(x); }

inline void MmaTf32(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  harness::Mma<1>("mma tf32", c, a, b0, b1,
                  [](unsigned word, int) { return harness::BitsToFloat(word & 0xffffe000u); });
}
inline void MmaFloat16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  harness::Mma<2>("mma float16", c, a, b0, b1,
                  [](unsigned word, int n) { return harness::Float16ToFloat(static_cast<uint16_t>(word >> 16 * n)); });
}
inline void MmaBfloat16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  harness::Mma<2>("mma bfloat16", c, a, b0, b1,
                  [](unsigned word, int n) { return harness::BitsToFloat(word >> 16 * n << 16); });
}

inline void GridSync() {
  harness::Wait(harness::emulator.grid, [] {});
}

}  // namespace cuda
}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CUDA_HOST_HARNESS_H_

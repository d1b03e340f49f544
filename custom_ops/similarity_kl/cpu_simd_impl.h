// Implements SimdKernels once, with the compiler's vector types. A file that includes it must first define S2SD_WIDTH
// (floats per vector), S2SD_MICRO_ROWS (rows per micro tile), S2SD_KERNELS (the table's name) and, if there are
// instructions for pairs of bfloat16, S2SD_BFLOAT16_PAIRS.

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "cpu_simd.h"

namespace s2sd {
namespace {

constexpr int W = S2SD_WIDTH;
constexpr int kMicroRows = S2SD_MICRO_ROWS;
constexpr int kMicroPanels = kPackedPanels;
static_assert(kTileGranularity % W == 0 && W % kMicroRows == 0);

typedef float Vector __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));

inline Vector Load(const float* from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

inline void Store(Vector v, float* to) { __builtin_memcpy(to, &v, sizeof(v)); }

inline Vector Splat(float x) { return x - Vector{}; }

inline Ints Lanes() {
  Ints lanes;
  for (int lane = 0; lane < W; ++lane) lanes[lane] = lane;
  return lanes;
}

// The vector with every lane from `count` on set to 0.
inline Vector Keep(Vector v, int count) {
  return reinterpret_cast<Vector>(reinterpret_cast<Ints>(v) & (Lanes() < count));
}

// e^x within 1 unit in the last place; 0 below -87, infinity above 88.7, NaN for NaN.
inline Vector Exp(Vector x) {
  const Vector low = Splat(-87.0f);
  const Ints nonzero = ~(x < low);
  x = x < low ? low : x;
  const Vector high = Splat(89.0f);
  x = x > high ? high : x;
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
  const Vector rounded = x * 1.44269504f + 12582912.0f;
  const Vector n = rounded - 12582912.0f;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact in 9 bits
  Vector p = r * (1.0f / 5040) + (1.0f / 720);
  p = p * r + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = (r * r) * p + r;
  p = p + 1.0f;
  // 2^n as two factors: n = 128 is not a valid exponent.
  const Ints bits = (reinterpret_cast<Ints>(rounded) - 0x4B400000);
  const Ints half = bits >> 1;
  const Vector scale1 = reinterpret_cast<Vector>((half + 127) << 23);
  const Vector scale2 = reinterpret_cast<Vector>((bits - half + 127) << 23);
  const Vector e = p * scale1 * scale2;
  return reinterpret_cast<Vector>(reinterpret_cast<Ints>(e) & nonzero);
}

// ---- Packing ----

inline float HalfToFloat(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7FFF;
  uint32_t bits;
  if (magnitude >= 0x7C00) {
    bits = 0x7F800000 | (magnitude & 0x3FF) << 13;
  } else {
    // With the bits moved to the exponent's place, the value is 2^112 times too small, also for subnormal numbers.
    bits = magnitude << 13;
    float scaled;
    __builtin_memcpy(&scaled, &bits, 4);
    scaled *= 5.192296858534828e33f;
    __builtin_memcpy(&bits, &scaled, 4);
  }
  bits |= sign;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// Reads the words of a row.
struct FloatWords {
  static constexpr int kScalars = 1;
  static Vector Load(const void* row, int64_t word) { return s2sd::Load(static_cast<const float*>(row) + word); }
  static constexpr int kBytes = 4;
};

struct HalfWords {
  static constexpr int kScalars = 1;
  static constexpr int kBytes = 2;
  static Vector Load(const void* row, int64_t word) {
    const uint16_t* from = static_cast<const uint16_t*>(row) + word;
#if defined(__AVX512F__)
    return reinterpret_cast<Vector>(
        _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
    return reinterpret_cast<Vector>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    Vector v;
    for (int lane = 0; lane < W; ++lane) v[lane] = HalfToFloat(from[lane]);
    return v;
#endif
  }
};

struct BfloatWords {
  static constexpr int kScalars = 1;
  static constexpr int kBytes = 2;
  static Vector Load(const void* row, int64_t word) {
    Halves halves;
    __builtin_memcpy(&halves, static_cast<const uint16_t*>(row) + word, sizeof(halves));
    return reinterpret_cast<Vector>(__builtin_convertvector(halves, Ints) << 16);
  }
};

struct BfloatPairWords {
  static constexpr int kScalars = 2;
  static constexpr int kBytes = 2;
  static Vector Load(const void* row, int64_t word) {
    Vector v;
    __builtin_memcpy(&v, static_cast<const uint16_t*>(row) + 2 * word, sizeof(v));
    return v;
  }
};

// Loads W words from `word` on; those beyond the row's end, at `dim` scalars, are 0.
template <class Words>
inline Vector LoadWords(const void* row, int64_t dim, int64_t word) {
  const int64_t left = dim - word * Words::kScalars;
  if (left >= W * Words::kScalars) return Words::Load(row, word);
  alignas(64) char buffer[W * Words::kScalars * Words::kBytes] = {};
  if (left > 0) {
    __builtin_memcpy(buffer, static_cast<const char*>(row) + word * Words::kScalars * Words::kBytes,
                     left * Words::kBytes);
  }
  return Words::Load(buffer, 0);
}

// Swaps the upper right and lower left quarters of the blocks of 2 x distance lanes.
template <int kDistance>
inline void Exchange(Vector& a, Vector& b) {
  Ints first, second;
  for (int lane = 0; lane < W; ++lane) {
    first[lane] = lane & kDistance ? W + lane - kDistance : lane;
    second[lane] = lane & kDistance ? W + lane : lane + kDistance;
  }
#if defined(__clang__)
  Vector low, high;
  for (int lane = 0; lane < W; ++lane) {
    low[lane] = first[lane] < W ? a[first[lane]] : b[first[lane] - W];
    high[lane] = second[lane] < W ? a[second[lane]] : b[second[lane] - W];
  }
#else
  const Vector low = __builtin_shuffle(a, b, first);
  const Vector high = __builtin_shuffle(a, b, second);
#endif
  a = low;
  b = high;
}

template <int kDistance>
inline void TransposeStages(Vector (&rows)[W]) {
  if constexpr (kDistance > 0) {
#pragma GCC unroll 16
    for (int row = 0; row < W; ++row) {
      if (!(row & kDistance)) Exchange<kDistance>(rows[row], rows[row + kDistance]);
    }
    TransposeStages<kDistance / 2>(rows);
  }
}

// Lanes whose index lacks the bit `kDistance` are sums of two lanes of a, the others sums of two lanes of b.
template <int kDistance>
inline Vector Fold(Vector a, Vector b) {
  Ints own, other;
  for (int lane = 0; lane < W; ++lane) {
    own[lane] = lane & kDistance ? W + lane : lane;
    other[lane] = own[lane] ^ kDistance;
  }
#if defined(__clang__)
  Vector x, y;
  for (int lane = 0; lane < W; ++lane) {
    x[lane] = own[lane] < W ? a[own[lane]] : b[own[lane] - W];
    y[lane] = other[lane] < W ? a[other[lane]] : b[other[lane] - W];
  }
  return x + y;
#else
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
#endif
}

// One vector whose lane l is the sum of all lanes of vectors[l].
template <int kCount = W>
inline Vector SumEach(const Vector* vectors) {
  if constexpr (kCount == 1) {
    return vectors[0];
  } else {
    Vector folded[kCount / 2];
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i) folded[i] = Fold<kCount / 2>(vectors[i], vectors[i + kCount / 2]);
    return SumEach<kCount / 2>(folded);
  }
}

template <class Words>
void PackWords(const void* rows, int64_t dim, int count, int64_t first_word, int64_t words, float* panels) {
  const int64_t row_bytes = dim * Words::kBytes;
  for (int first = 0; first < count; first += W) {
    for (int64_t word = 0; word < words; word += W) {
      Vector block[W];
      const bool inside = first + W <= count && (first_word + word + W) * Words::kScalars <= dim;
      const char* base = static_cast<const char*>(rows) + first * row_bytes;
      if (inside) {
#pragma GCC unroll 16
        for (int row = 0; row < W; ++row) block[row] = Words::Load(base + row * row_bytes, first_word + word);
      } else {
        for (int row = 0; row < W; ++row) {
          block[row] =
              first + row < count ? LoadWords<Words>(base + row * row_bytes, dim, first_word + word) : Vector{};
        }
      }
      if (inside) {
        // The rows are too far apart for the hardware prefetcher: fetch the next rows, or the first rows' next words.
        const bool more = first + 2 * W <= count;
        const char* next = (more ? base + W * row_bytes : static_cast<const char*>(rows)) +
                           (first_word + word + (more ? 0 : words)) * Words::kScalars * Words::kBytes;
        for (int row = 0; row < W; ++row) __builtin_prefetch(next + row * row_bytes, 0, 2);
      }
      TransposeStages<W / 2>(block);
      const int64_t left = words - word < W ? words - word : W;
      if (left == W) {
#pragma GCC unroll 16
        for (int row = 0; row < W; ++row) Store(block[row], panels + row * W);
      } else {
        for (int64_t row = 0; row < left; ++row) Store(block[row], panels + row * W);
      }
      panels += left * W;
    }
  }
}

void Pack(Scalar scalar, const void* rows, int64_t dim, int count, int64_t first_word, int64_t words, float* panels) {
  switch (scalar) {
    case Scalar::kFloat32:
      return PackWords<FloatWords>(rows, dim, count, first_word, words, panels);
    case Scalar::kFloat16:
      return PackWords<HalfWords>(rows, dim, count, first_word, words, panels);
    case Scalar::kBfloat16:
#if defined(S2SD_BFLOAT16_PAIRS)
      return PackWords<BfloatPairWords>(rows, dim, count, first_word, words, panels);
#else
      return PackWords<BfloatWords>(rows, dim, count, first_word, words, panels);
#endif
  }
}

template <class Words>
void WidenOf(const void* rows, int64_t dim, int count, int64_t first_word, int64_t words, float* out) {
  const int64_t stride = (words + W - 1) / W * W;
  for (int row = 0; row < count; ++row, out += stride) {
    for (int64_t word = 0; word < words; word += W) {
      Store(LoadWords<Words>(static_cast<const char*>(rows) + row * dim * Words::kBytes, dim, first_word + word),
            out + word);
    }
  }
}

void Widen(Scalar scalar, const void* rows, int64_t dim, int count, int64_t first_word, int64_t words, float* out) {
  switch (scalar) {
    case Scalar::kFloat32:
      return WidenOf<FloatWords>(rows, dim, count, first_word, words, out);
    case Scalar::kFloat16:
      return WidenOf<HalfWords>(rows, dim, count, first_word, words, out);
    case Scalar::kBfloat16:
#if defined(S2SD_BFLOAT16_PAIRS)
      return WidenOf<BfloatPairWords>(rows, dim, count, first_word, words, out);
#else
      return WidenOf<BfloatWords>(rows, dim, count, first_word, words, out);
#endif
  }
}

template <class Words>
void PackRowsOf(const void* rows, int64_t dim, int count, int64_t first, int panels, float* packed) {
  for (int panel = 0; panel < panels; ++panel) {
    for (int row = 0; row < count; ++row, packed += W) {
      Store(LoadWords<Words>(static_cast<const char*>(rows) + row * dim * Words::kBytes, dim, first + panel * W),
            packed);
    }
  }
}

void PackRows(Scalar scalar, const void* rows, int64_t dim, int count, int64_t first, int panels, float* packed) {
  switch (scalar) {
    case Scalar::kFloat32:
      return PackRowsOf<FloatWords>(rows, dim, count, first, panels, packed);
    case Scalar::kFloat16:
      return PackRowsOf<HalfWords>(rows, dim, count, first, panels, packed);
    case Scalar::kBfloat16:
      return PackRowsOf<BfloatWords>(rows, dim, count, first, panels, packed);
  }
}

// ---- Matrix products ----

struct FloatProduct {
  static Vector Add(Vector sum, Vector a, Vector b) { return sum + a * b; }
};

#if defined(S2SD_BFLOAT16_PAIRS)
struct PairProduct {
  static Vector Add(Vector sum, Vector a, Vector b) {
    return reinterpret_cast<Vector>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
  }
};
#endif

inline int Smaller(int a, int b) { return a < b ? a : b; }

// The columns of a product: `panel_stride` floats from one vector of them to the next, `step` from one word to the
// next.
struct Columns {
  const float* first;
  int64_t panel_stride;
  int64_t step;
};

// out = (or +=) sum over the depth of a[row] b[column], for kMicroRows rows and kPanels vectors of columns.
template <class Product, int kPanels>
inline void MicroTile(const float* a, int64_t a_row_stride, int64_t a_step, Columns b, int64_t depth, bool accumulate,
                      float* out, int64_t out_stride) {
  Vector sums[kMicroRows][kPanels];
  for (int row = 0; row < kMicroRows; ++row) {
    for (int panel = 0; panel < kPanels; ++panel) sums[row][panel] = Vector{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector columns[kPanels];
#pragma GCC unroll 3
    for (int panel = 0; panel < kPanels; ++panel) columns[panel] = Load(b.first + panel * b.panel_stride);
#pragma GCC unroll 16
    for (int row = 0; row < kMicroRows; ++row) {
      const Vector word = Splat(a[row * a_row_stride]);
#pragma GCC unroll 3
      for (int panel = 0; panel < kPanels; ++panel) {
        sums[row][panel] = Product::Add(sums[row][panel], word, columns[panel]);
      }
    }
    a += a_step;
    b.first += b.step;
  }
  for (int row = 0; row < kMicroRows; ++row) {
    for (int panel = 0; panel < kPanels; ++panel) {
      float* to = out + row * out_stride + panel * W;
      Store(accumulate ? Load(to) + sums[row][panel] : sums[row][panel], to);
    }
  }
}

template <class Product>
inline void MicroTiles(int panels, const float* a, int64_t a_row_stride, int64_t a_step, const Columns& b,
                       int64_t depth, bool accumulate, float* out, int64_t out_stride) {
  switch (panels) {
    case 1:
      return MicroTile<Product, 1>(a, a_row_stride, a_step, b, depth, accumulate, out, out_stride);
    case 2:
      return MicroTile<Product, 2>(a, a_row_stride, a_step, b, depth, accumulate, out, out_stride);
    default:
      return MicroTile<Product, 3>(a, a_row_stride, a_step, b, depth, accumulate, out, out_stride);
  }
}

constexpr int64_t kChain = 256;  // words that are summed separately: the more, the larger the rounding error

template <class Product>
void PanelProductsOf(const float* a, int64_t a_stride, const float* b, int columns, int64_t words, bool accumulate,
                     int first_row, const Tile& tile) {
  const int panels = (columns + W - 1) / W;
  const int64_t panel_stride = words * W;
  for (int row = 0; row < tile.rows; row += kMicroRows) {
    // Skip panels whose columns all come before the row: they are below the diagonal.
    const int below = row > first_row ? (row - first_row) / W : 0;
    if (below >= panels) break;
    for (int64_t word = 0; word < words; word += kChain) {
      MicroTiles<Product>(panels - below, a + row * a_stride + word, a_stride, 1,
                          {b + below * panel_stride + word * W, panel_stride, W},
                          words - word < kChain ? words - word : kChain, accumulate || word > 0,
                          tile.values + row * tile.stride + below * W, tile.stride);
    }
  }
}

void PanelProducts(const float* a, int64_t a_stride, const float* b, int columns, int64_t words, bool pairs,
                   bool accumulate, int first_row, const Tile& tile) {
#if defined(S2SD_BFLOAT16_PAIRS)
  if (pairs) return PanelProductsOf<PairProduct>(a, a_stride, b, columns, words, accumulate, first_row, tile);
#endif
  PanelProductsOf<FloatProduct>(a, a_stride, b, columns, words, accumulate, first_row, tile);
}

constexpr int kDotRows = W / 4, kDotColumns = 4;  // together a vector of sums

template <class Product>
inline void MicroDots(const float* const* a, const float* const* b, int64_t words, bool accumulate, float* out,
                      int64_t out_stride) {
  Vector sums[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) sums[i] = Vector{};
  for (int64_t word = 0; word < words; word += W) {
    Vector rows[kDotRows];
#pragma GCC unroll 4
    for (int row = 0; row < kDotRows; ++row) rows[row] = Load(a[row] + word);
#pragma GCC unroll 4
    for (int column = 0; column < kDotColumns; ++column) {
      const Vector other = Load(b[column] + word);
#pragma GCC unroll 4
      for (int row = 0; row < kDotRows; ++row) {
        Vector& sum = sums[row * kDotColumns + column];
        sum = Product::Add(sum, rows[row], other);
      }
    }
  }
  const Vector dots = SumEach(sums);
  typedef float Four __attribute__((vector_size(16)));
#pragma GCC unroll 4
  for (int row = 0; row < kDotRows; ++row) {
    Four four, before;
    __builtin_memcpy(&four, reinterpret_cast<const char*>(&dots) + sizeof(four) * row, sizeof(four));
    float* to = out + row * out_stride;
    if (accumulate) {
      __builtin_memcpy(&before, to, sizeof(before));
      four += before;
    }
    __builtin_memcpy(to, &four, sizeof(four));
  }
}

template <class Product>
void RowDotsOf(const float* a, const float* b, int64_t stride, int64_t words, bool accumulate, bool upper,
               const Tile& tile) {
  for (int column = 0; column < tile.columns; column += kDotColumns) {
    // At the tile's end, the last row stands in for missing ones.
    const float* others[kDotColumns];
    for (int i = 0; i < kDotColumns; ++i) others[i] = b + Smaller(column + i, tile.columns - 1) * stride;
    const int rows = upper ? Smaller(tile.rows, column + kDotColumns) : tile.rows;
    for (int row = 0; row < rows; row += kDotRows) {
      const float* own[kDotRows];
      for (int i = 0; i < kDotRows; ++i) own[i] = a + Smaller(row + i, tile.rows - 1) * stride;
      MicroDots<Product>(own, others, words, accumulate, tile.values + row * tile.stride + column, tile.stride);
    }
  }
}

void RowDots(const float* a, const float* b, int64_t stride, int64_t words, bool pairs, bool accumulate, bool upper,
             const Tile& tile) {
#if defined(S2SD_BFLOAT16_PAIRS)
  if (pairs) return RowDotsOf<PairProduct>(a, b, stride, words, accumulate, upper, tile);
#endif
  RowDotsOf<FloatProduct>(a, b, stride, words, accumulate, upper, tile);
}

void Multiply(const Tile& h, bool transpose, const float* z, int64_t z_panel_stride, int64_t z_step, int panels,
              float* out) {
  const int rows = transpose ? h.columns : h.rows;
  const int depth = transpose ? h.rows : h.columns;
  const int64_t row_stride = transpose ? 1 : h.stride;
  const int64_t step = transpose ? h.stride : 1;
  for (int panel = 0; panel < panels; panel += kMicroPanels) {
    const int some = Smaller(panels - panel, kMicroPanels);
    for (int row = 0; row < rows; row += kMicroRows) {
      MicroTiles<FloatProduct>(some, h.values + row * row_stride, row_stride, step,
                               {z + panel * z_panel_stride, z_panel_stride, z_step}, depth, /*accumulate=*/false,
                               out + int64_t{row} * panels * W + panel * W, int64_t{panels} * W);
    }
  }
}

void Mirror(const Tile& tile) {
  // Blocks of W x W: within one block the strided accesses stay in the cache.
  for (int first = 0; first < tile.rows; first += W) {
    for (int other = 0; other <= first; other += W) {
      Vector block[W];
      for (int row = 0; row < W; ++row) block[row] = Load(tile.values + (other + row) * tile.stride + first);
      TransposeStages<W / 2>(block);
      for (int row = 0; row < W; ++row) {
        float* to = tile.values + (first + row) * tile.stride + other;
        if (other < first) {
          Store(block[row], to);
        } else {
          const Ints below = Lanes() < row;
          Store(below ? block[row] : Load(to), to);
        }
      }
    }
  }
}

void SymmetricRows(const float* parts, int64_t part_stride, int count, int size, int64_t stride, int first,
                   float* out) {
  for (int column = 0; column < size; column += W) {
    // Values below the diagonal come from their mirror image.
    const float* from = column < first ? parts + column * stride + first : parts + first * stride + column;
    Vector block[W], mirror[W];
    for (int row = 0; row < W; ++row) {
      Vector sum = Load(from + row * stride);
      for (int part = 1; part < count; ++part) sum += Load(from + part * part_stride + row * stride);
      block[row] = mirror[row] = sum;
    }
    if (column <= first) TransposeStages<W / 2>(mirror);
    for (int row = 0; row < W; ++row) {
      Vector values = block[row];
      if (column < first) values = mirror[row];
      if (column == first) values = Lanes() < row ? mirror[row] : block[row];
      Store(values, out + row * stride + column);
    }
  }
}

// ---- Exponentials and their sums ----

void Maxima(const Tile& dots, float* row_max, float* column_max) {
  for (int row = 0; row < dots.rows; ++row) {
    float most = row_max[row];
    for (int column = 0; column < dots.columns; ++column) {
      const float dot = dots.values[row * dots.stride + column];
      // A NaN stays, in either of the two.
      most = most >= dot || most != most ? most : dot;
      if (column_max) {
        column_max[column] =
            column_max[column] >= dot || column_max[column] != column_max[column] ? column_max[column] : dot;
      }
    }
    row_max[row] = most;
  }
}

template <bool kGeneral>
inline float RowShift(const Shift& shift, int row) {
  return kGeneral ? shift.rows[row] : shift.constant;
}

// `student`: the student's logits, or null if the tile is the student's own, whose dots become logits.
template <bool kGeneral, bool kColumns, bool kTeacher>
void Sums(const Tile& tile, const Shift& shift, const float* student, float* row_z, float* row_a, float* column_z,
          float* column_a) {
  const float inverse = shift.inverse_temperature;
  if (kColumns) {
    for (int column = 0; column < tile.columns; column += W) {
      Store(Vector{}, column_z + column);
      if (kTeacher) Store(Vector{}, column_a + column);
    }
  }
  for (int first = 0; first < tile.rows; first += W) {
    Vector z[W] = {}, a[W] = {};
    const int rows = Smaller(tile.rows - first, W);
    for (int i = 0; i < rows; ++i) {
      const int row = first + i;
      float* values = tile.values + row * tile.stride;
      const float* student_row = kTeacher ? student + row * tile.stride : nullptr;
      const float row_shift = RowShift<kGeneral>(shift, row);
      Vector row_sum{}, row_difference{};
      for (int column = 0; column < tile.columns; column += W) {
        const Vector dot = Load(values + column);
        // Without a common shift the logits stay unshifted, so that rows and columns can share them.
        const Vector logit = kGeneral ? dot * inverse : (dot - row_shift) * inverse;
        Vector e = kGeneral ? Exp((dot - row_shift) * inverse) : Exp(logit);
        if (tile.columns - column < W) e = Keep(e, tile.columns - column);
        Store(kTeacher ? e : logit, values + column);
        row_sum += e;
        Vector from_column = e;
        if (kGeneral && kColumns) from_column = Exp((dot - Load(shift.columns + column)) * inverse);
        if (kColumns) Store(Load(column_z + column) + from_column, column_z + column);
        if (kTeacher) {
          Vector difference = logit - Load(student_row + column);
          if (tile.columns - column < W) difference = Keep(difference, tile.columns - column);
          row_difference += e * difference;
          if (kColumns) Store(Load(column_a + column) + from_column * difference, column_a + column);
        }
      }
      z[i] = row_sum;
      a[i] = row_difference;
    }
    Store(SumEach(z), row_z + first);
    if (kTeacher) Store(SumEach(a), row_a + first);
  }
}

template <bool kTeacher>
void SumsOf(const Tile& tile, const Shift& shift, const float* student, float* row_z, float* row_a, float* column_z,
            float* column_a) {
  if (shift.rows) {
    if (column_z) return Sums<true, true, kTeacher>(tile, shift, student, row_z, row_a, column_z, column_a);
    return Sums<true, false, kTeacher>(tile, shift, student, row_z, row_a, column_z, column_a);
  }
  if (column_z) return Sums<false, true, kTeacher>(tile, shift, student, row_z, row_a, column_z, column_a);
  return Sums<false, false, kTeacher>(tile, shift, student, row_z, row_a, column_z, column_a);
}

void StudentSums(const Tile& tile, const Shift& shift, float* row_z, float* column_z) {
  SumsOf<false>(tile, shift, nullptr, row_z, nullptr, column_z, nullptr);
}

void TeacherSums(const Tile& tile, const Shift& shift, const float* student, float* row_z, float* row_a,
                 float* column_z, float* column_a) {
  SumsOf<true>(tile, shift, student, row_z, row_a, column_z, column_a);
}

// ---- The gradient's weights ----

template <bool kGeneral, bool kColumns>
void Weigh(const Tile& student, const Tile& teacher, const Shift& student_shift, const Shift& teacher_shift,
           const Factors& factors, bool accumulate, float* h) {
  const float inverse = student_shift.inverse_temperature;
  for (int row = 0; row < teacher.rows; ++row) {
    const float* student_dots = student.values + row * student.stride;
    const float* teacher_dots = teacher.values + row * teacher.stride;
    const float own = factors.rows[row], students = factors.rows[factors.stride + row];
    for (int column = 0; column < teacher.columns; column += W) {
      const Vector student_dot = Load(student_dots + column), teacher_dot = Load(teacher_dots + column);
      const Vector e_student = Exp((student_dot - RowShift<kGeneral>(student_shift, row)) * inverse);
      const Vector e_teacher = Exp((teacher_dot - RowShift<kGeneral>(teacher_shift, row)) * inverse);
      float* to = h + row * teacher.stride + column;
      Vector weight = accumulate ? Load(to) : Vector{};
      weight += e_student * students;
      weight += e_teacher * own;
      if (kColumns) {
        const Vector student_column =
            kGeneral ? Exp((student_dot - Load(student_shift.columns + column)) * inverse) : e_student;
        const Vector teacher_column =
            kGeneral ? Exp((teacher_dot - Load(teacher_shift.columns + column)) * inverse) : e_teacher;
        weight += student_column * Load(factors.columns + factors.stride + column);
        weight += teacher_column * Load(factors.columns + column);
      }
      Store(weight, to);
    }
  }
}

void WeighDots(const Tile& student, const Tile& teacher, const Shift& student_shift, const Shift& teacher_shift,
               const Factors& factors, bool accumulate, float* h) {
  const auto weigh = student_shift.rows ? (factors.columns ? Weigh<true, true> : Weigh<true, false>)
                                        : (factors.columns ? Weigh<false, true> : Weigh<false, false>);
  weigh(student, teacher, student_shift, teacher_shift, factors, accumulate, h);
}

template <bool kColumns>
void WeighKeptOf(const Tile& student, int64_t matrix_stride, int teachers, const Factors& factors, float* h) {
  for (int row = 0; row < student.rows; ++row) {
    for (int column = 0; column < student.columns; column += W) {
      const float* values = student.values + row * student.stride + column;
      const float* row_factors = factors.rows + row;
      const float* column_factors = kColumns ? factors.columns + column : nullptr;
      const Vector e_student = Exp(Load(values));
      Vector weight{};
      for (int teacher = 0; teacher < teachers; ++teacher) {
        values += matrix_stride;
        const Vector e_teacher = Load(values);
        weight += e_student * row_factors[factors.stride];
        weight += e_teacher * row_factors[0];
        if (kColumns) {
          weight += e_student * Load(column_factors + factors.stride);
          weight += e_teacher * Load(column_factors);
          column_factors += 2 * factors.stride;
        }
        row_factors += 2 * factors.stride;
      }
      Store(weight, h + row * student.stride + column);
    }
  }
}

void WeighKept(const Tile& student, int64_t matrix_stride, int teachers, const Factors& factors, float* h) {
  const auto weigh = factors.columns ? WeighKeptOf<true> : WeighKeptOf<false>;
  weigh(student, matrix_stride, teachers, factors, h);
}

}  // namespace

extern const SimdKernels S2SD_KERNELS;
const SimdKernels S2SD_KERNELS = {
    W,
#if defined(S2SD_BFLOAT16_PAIRS)
    true,
#else
    false,
#endif
    Pack,   Widen,       PackRows,    PanelProducts, RowDots,   Multiply, Mirror, SymmetricRows,
    Maxima, StudentSums, TeacherSums, WeighDots,     WeighKept,
};

}  // namespace s2sd

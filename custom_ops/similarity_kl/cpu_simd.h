// The inner loops of the CPU kernel, as one table of functions per instruction set.
//
// The files that implement them are compiled for instructions that the running processor may lack. So they define
// nothing with external linkage except their table, and use no inline functions of the standard library: the linker
// might otherwise keep their copy for the whole program.

#ifndef S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_SIMD_H_
#define S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_SIMD_H_

#include <cstdint>

#include "similarity_kl.h"

namespace s2sd {

// A word is the unit of packed operands: one float, or two neighbouring bfloat16 of a row.
//
// A panel is `SimdKernels::width` rows of a matrix, transposed: word after word of the depth, `width` words each.

// A block of similarities, row-major.
struct Tile {
  float* values;
  int64_t stride;
  int rows;
  int columns;
};

// How a dot product s becomes an exponential: exp((s - constant) / T) or, if the pointers are not null,
// exp((s - rows[i]) / T) for the row and exp((s - columns[j]) / T) for the column.
struct Shift {
  float inverse_temperature;
  float constant;
  const float* rows;
  const float* columns;
};

// The factors of the exponentials in the gradient's weights: two numbers per teacher and row (or column), the teacher's
// own and the student's, in arrays that are `stride` floats apart.
struct Factors {
  const float* rows;
  const float* columns;  // null if the columns do not contribute to the weights
  int64_t stride;
};

struct SimdKernels {
  int width;      // a power of two, at most kTileGranularity
  bool bfloat16;  // the words of bfloat16 matrices are pairs; otherwise all words are floats

  // Packs the words [first_word, first_word + words) of `count` rows into ceil(count / width) panels, each `words`
  // deep. The rows start at `rows`, `dim` scalars apart. Anything outside them is filled with 0.
  void (*pack)(Scalar scalar, const void* rows, int64_t dim, int count, int64_t first_word, int64_t words,
               float* panels);

  // Writes the same words unpacked, row after row, each row padded with 0 to a multiple of `width`.
  void (*widen)(Scalar scalar, const void* rows, int64_t dim, int count, int64_t first_word, int64_t words, float* out);

  // Packs `count` rows, columns [first, first + width * panels), without transposing: panel after panel, `count` deep,
  // as floats.
  void (*pack_rows)(Scalar scalar, const void* rows, int64_t dim, int count, int64_t first, int panels, float* packed);

  // tile[:, :columns] = (or +=) a b^T over `words` words. `a` has the tile's rows, `a_stride` words apart, a whole
  // number of micro tiles (16 is always one); b is packed. `pairs`: the words are pairs of bfloat16. Rows after
  // `first_row` + a panel's last column are below the diagonal, and their products with that panel need not be
  // computed.
  void (*panel_products)(const float* a, int64_t a_stride, const float* b, int columns, int64_t words, bool pairs,
                         bool accumulate, int first_row, const Tile& tile);

  // tile = (or +=) a b^T over `words` words, a multiple of `width`, from rows as they lie in memory, `stride` words
  // apart. `upper`: only the part on or above the diagonal is needed.
  void (*row_dots)(const float* a, const float* b, int64_t stride, int64_t words, bool pairs, bool accumulate,
                   bool upper, const Tile& tile);

  // out (rows x width * panels) = h z or, with `transpose`, h^T z (h's columns x width * panels). The vectors of a row
  // of z are `z_panel_stride` floats apart, its rows `z_step`.
  void (*multiply)(const Tile& h, bool transpose, const float* z, int64_t z_panel_stride, int64_t z_step, int panels,
                   float* out);

  // Copies the part above the diagonal to below it.
  void (*mirror)(const Tile& tile);

  // Writes the rows [first, first + width) of the symmetric matrix, `size` columns wide, whose upper triangle is the
  // sum of `count` parts. The rows of the parts and of `out` are `stride` floats apart. There are `stride` rows, a
  // multiple of `width`.
  void (*symmetric_rows)(const float* parts, int64_t part_stride, int count, int size, int64_t stride, int first,
                         float* out);

  // row_max[i] = max(row_max[i], dots), and the same for the columns if column_max is not null.
  void (*maxima)(const Tile& dots, float* row_max, float* column_max);

  // First pass over the student's dot products. Turns them into logits = dots / T (minus the constant shift) and sums
  // their exponentials over the columns and, if column_z is not null, over the rows.
  void (*student_sums)(const Tile& tile, const Shift& shift, float* row_z, float* column_z);

  // The same for a teacher's dot products, which become exponentials for the row. Also sums exponential * (logit -
  // student's logit). The student's logits have the tile's stride.
  void (*teacher_sums)(const Tile& tile, const Shift& shift, const float* student, float* row_z, float* row_a,
                       float* column_z, float* column_a);

  // h = (or +=) e_student student_factor + e_teacher own_factor, for the row plus for the column, from the dots of one
  // teacher and of the student. The two terms nearly cancel, so they are added to each other first.
  void (*weigh_dots)(const Tile& student, const Tile& teacher, const Shift& student_shift, const Shift& teacher_shift,
                     const Factors& factors, bool accumulate, float* h);

  // The same for the student's kept logits and the teachers' kept exponentials, summed over the teachers. The tiles of
  // student and teachers are `matrix_stride` floats apart.
  void (*weigh_kept)(const Tile& student, int64_t matrix_stride, int teachers, const Factors& factors, float* h);
};

constexpr int kPackedPanels = 3;      // of columns that are packed for one call of `panel_products`, at most
constexpr int kTileGranularity = 16;  // tiles consist of whole vectors and whole micro tiles at every width

extern const SimdKernels kPortableKernels;
#if defined(__x86_64__)
extern const SimdKernels kAvx2Kernels;
extern const SimdKernels kAvx512Kernels;
extern const SimdKernels kAvx512Bf16Kernels;
#endif

}  // namespace s2sd

#endif  // S2SD_TF_CUSTOM_OPS_SIMILARITY_KL_CPU_SIMD_H_

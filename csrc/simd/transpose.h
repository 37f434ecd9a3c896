// Transposes of matrices in memory. Include only from csrc/kernels.
#pragma once

#include "shuffle.h"

namespace fastnn {
namespace FASTNN_ISA {

// transpose_matrix for at most four rows, for which a whole square would be a waste.
template <int rows, class From, class To>
void transpose_few_rows(const From* from, int64_t from_stride, int64_t columns, To* to, int64_t to_stride) {
  using C = Compute<From>;
  constexpr int lanes = kLanes<C>;
  for (int64_t c = 0; c < columns; c += lanes) {
    Vec<C> x[4] = {};
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) x[r] = load_up_to<From>(from + r * from_stride + c, columns - c);
    const Vec<C> even[2] = {zip_low<C>(x[0], x[2]), zip_high<C>(x[0], x[2])};
    const Vec<C> odd[2] = {zip_low<C>(x[1], x[3]), zip_high<C>(x[1], x[3])};
    C fours[4 * lanes];
    for (int half = 0; half < 2; ++half) {
      store(fours + 2 * half * lanes, zip_low<C>(even[half], odd[half]));
      store(fours + (2 * half + 1) * lanes, zip_high<C>(even[half], odd[half]));
    }
    To* target = to + c * to_stride;
    if constexpr (__is_same(To, C)) {
      // Each column is copied at once: one of three elements with a fourth, which the next column overwrites.
      if (to_stride == rows && columns - c > lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i)
          __builtin_memcpy(target + rows * i, fours + 4 * i, (rows == 2 ? 2 : 4) * sizeof(C));
        continue;
      }
    }
    for (int i = 0; i < lanes && i < columns - c; ++i, target += to_stride) {
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) target[r] = from_compute<To>(fours[4 * i + r]);
    }
  }
}

// to[place(c) + r] = from[r * from_stride + c] for r < rows, c < columns, and 0 for rows <= r < height. Of many
// columns, the last square overlaps the one before, so that it is a whole one; likewise of many rows without zeros
// below.
template <class From, class To, class Place>
FASTNN_INLINE void transpose_to_places(const From* from, int64_t from_stride, int64_t rows, int64_t height,
                                       int64_t columns, To* to, const Place& place) {
  using C = Compute<From>;
  constexpr int lanes = kLanes<C>;
  for (int64_t next_row = 0; next_row < height; next_row += lanes) {
    const bool last_rows = next_row > 0 && height - next_row < lanes && rows == height;
    const int64_t r = last_rows ? height - lanes : next_row, rows_left = rows - r, height_left = height - r;
    for (int64_t next = 0; next < columns; next += lanes) {
      const bool last = next > 0 && columns - next < lanes;
      const int64_t c = last ? columns - lanes : next, columns_left = columns - c;
      const From* source = from + r * from_stride + c;
      Vec<C> block[lanes] = {};  // for the compiler, which warns where it does not see that all are loaded
      if (height_left >= lanes && columns_left >= lanes) {
        if (rows_left >= lanes) {
          for (int i = 0; i < lanes; ++i) block[i] = load(source + i * from_stride);
        } else {
          for (int i = 0; i < lanes; ++i) block[i] = i < rows_left ? load(source + i * from_stride) : Vec<C>{};
        }
        transpose<C>(block);
        for (int i = 0; i < lanes; ++i) store(to + place(c + i) + r, block[i]);
        continue;
      }
      for (int i = 0; i < lanes; ++i) {
        block[i] = i < rows_left ? load_up_to<From>(source + i * from_stride, columns_left) : Vec<C>{};
      }
      transpose<C>(block);
      for (int i = 0; i < lanes && i < columns_left; ++i) store_up_to<To>(to + place(c + i) + r, block[i], height_left);
    }
  }
}

#if defined(__AVX512F__)
// Rows of bfloat16 that lie a power of two apart share few sets of the cache, so that their lines would be evicted
// before all of their parts have been read. Such rows are copied line by line, unless a row is read in one part.
// transpose(copy, rows, columns, to) takes each copy, whose rows are kCopiedLine elements.
constexpr int64_t kCopiedLine = 32;
FASTNN_INLINE bool lines_are_crowded(int64_t stride, int64_t columns) {
  constexpr int64_t kApart = 2048, kPart = 16;
  return columns > kPart && stride * static_cast<int64_t>(sizeof(bfloat16)) % kApart == 0;
}
template <class To, class Transpose>
void transpose_by_lines(const bfloat16* from, int64_t from_stride, int64_t rows, int64_t columns, To* to,
                        int64_t to_stride, const Transpose& transpose) {
  constexpr int64_t line = kCopiedLine;
  alignas(64) bfloat16 copy[line * line];
  for (int64_t r = 0; r < rows; r += line) {
    const int64_t height = rows - r < line ? rows - r : line;
    for (int64_t c = 0; c < columns; c += line) {
      const int64_t width = columns - c < line ? columns - c : line;
      const __mmask32 inside = static_cast<__mmask32>((uint64_t{1} << width) - 1);
      for (int64_t i = 0; i < height; ++i) {
        _mm512_store_si512(copy + i * line, _mm512_maskz_loadu_epi16(inside, from + (r + i) * from_stride + c));
      }
      transpose(copy, height, width, to + c * to_stride + r);
    }
  }
}
#endif

#if defined(__AVX512F__)
// Where the numbers of three zipped rows come from, `lanes` at a time: lane i of part p is of row (lanes p + i) % 3.
template <class Index, int lanes>
struct ThreeRows {
  Index first_two[3][lanes], third[3][lanes];  // lanes of the first two rows, side by side, and of the third
  uint32_t is_third[3];
  constexpr ThreeRows() : first_two{}, third{}, is_third{} {
    for (int i = 0; i < 3 * lanes; ++i) {
      const int part = i / lanes, lane = i % lanes, row = i % 3, column = i / 3;
      if (row < 2) first_two[part][lane] = static_cast<Index>(lanes * row + column);
      if (row == 2) third[part][lane] = static_cast<Index>(column);
      is_third[part] |= static_cast<uint32_t>(row == 2) << lane;
    }
  }
};

// to[3 * c + r] = from[r * from_stride + c]
template <class From>
FASTNN_INLINE void zip_three_rows(const From* from, int64_t from_stride, int64_t columns, float* to) {
  static constexpr ThreeRows<int32_t, 16> table;
  for (int64_t c = 0; c < columns; c += 16) {
    const int64_t left = columns - c;
    __m512 row[3];
    for (int r = 0; r < 3; ++r) row[r] = (__m512)load_up_to<From>(from + r * from_stride + c, left);
    for (int part = 0; part < 3 && 16 * part < 3 * left; ++part) {
      const __m512i third = _mm512_loadu_si512(table.third[part]);
      const __m512 zipped = _mm512_permutex2var_ps(row[0], _mm512_loadu_si512(table.first_two[part]), row[1]);
      const __m512 all =
          _mm512_mask_permutexvar_ps(zipped, static_cast<__mmask16>(table.is_third[part]), third, row[2]);
      store_up_to<float>(to + 3 * c + 16 * part, (Vec<float>)all, 3 * left - 16 * part);
    }
  }
}
FASTNN_INLINE void zip_three_rows(const bfloat16* from, int64_t from_stride, int64_t columns, bfloat16* to) {
  static constexpr ThreeRows<uint16_t, 32> table;
  for (int64_t c = 0; c < columns; c += 32) {
    const int64_t left = columns - c;
    __m512i row[3];
    for (int r = 0; r < 3; ++r) row[r] = (__m512i)load_elements(from + r * from_stride + c, left);
    for (int part = 0; part < 3 && 32 * part < 3 * left; ++part) {
      const __m512i third = _mm512_loadu_si512(table.third[part]);
      const __m512i zipped = _mm512_permutex2var_epi16(row[0], _mm512_loadu_si512(table.first_two[part]), row[1]);
      const __m512i all = _mm512_mask_permutexvar_epi16(zipped, table.is_third[part], third, row[2]);
      store_elements(to + 3 * c + 32 * part, (Vec<float>)all, 3 * left - 32 * part);
    }
  }
}
#endif

// to[c * to_stride + r] = from[r * from_stride + c] for r < rows, c < columns.
template <class From, class To>
void transpose_matrix(const From* from, int64_t from_stride, int64_t rows, int64_t columns, To* to, int64_t to_stride) {
#if defined(__AVX512F__)
  if constexpr (__is_same(To, float)) {
    if (rows == 3 && to_stride == 3) return zip_three_rows(from, from_stride, columns, to);
  }
#endif
  if constexpr (kLanes<Compute<From>> > 4) {
    if (rows == 2) return transpose_few_rows<2>(from, from_stride, columns, to, to_stride);
    if (rows == 3) return transpose_few_rows<3>(from, from_stride, columns, to, to_stride);
    if (rows == 4) return transpose_few_rows<4>(from, from_stride, columns, to, to_stride);
  }
  const auto place = [&](int64_t c) __attribute__((always_inline)) { return c * to_stride; };
#if defined(__AVX512F__)
  if constexpr (sizeof(From) == sizeof(bfloat16)) {
    if (lines_are_crowded(from_stride, columns)) {
      return transpose_by_lines(from, from_stride, rows, columns, to, to_stride,
                                [&](const From* copy, int64_t height, int64_t width, To* target) {
                                  transpose_to_places(copy, kCopiedLine, height, height, width, target, place);
                                });
    }
  }
#endif
  transpose_to_places(from, from_stride, rows, rows, columns, to, place);
}

#if defined(__AVX512F__)
// The same where the result is bfloat16 too. A block has 8 columns and 32 rows. Each quarter of a vector transposes 8
// of the rows, by three rounds of zips within quarters.
inline void transpose_by_quarters(const bfloat16* from, int64_t from_stride, int64_t rows, int64_t columns,
                                  bfloat16* to, int64_t to_stride) {
  constexpr int64_t height = 32, width = 8;
  for (int64_t r = 0; r < rows; r += height) {
    const int64_t rows_left = rows - r < height ? rows - r : height;
    for (int64_t next = 0; next < columns; next += width) {
      const bool last = next > 0 && columns - next < width;
      const int64_t c = last ? columns - width : next;
      const int64_t columns_left = columns - c < width ? columns - c : width;
      const bfloat16* source = from + r * from_stride + c;
      bfloat16* target = to + c * to_stride + r;
      __m512i x[width], y[width];
      const auto load_rows = [&](auto load) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int i = 0; i < width; ++i) {
          x[i] = _mm512_castsi128_si512(load(i));
          x[i] = _mm512_inserti32x4(x[i], load(8 + i), 1);
          x[i] = _mm512_inserti32x4(x[i], load(16 + i), 2);
          x[i] = _mm512_inserti32x4(x[i], load(24 + i), 3);
        }
      };
      const bool whole = rows_left == height && columns_left == width;
      if (whole) {
        load_rows([&](int64_t i) __attribute__((always_inline)) {
          return _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i * from_stride));
        });
      } else {
        load_rows([&](int64_t i) __attribute__((always_inline)) {
          const __mmask8 inside = static_cast<__mmask8>((1u << columns_left) - 1);
          return i < rows_left ? _mm_maskz_loadu_epi16(inside, source + i * from_stride) : _mm_setzero_si128();
        });
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        y[2 * i] = _mm512_unpacklo_epi16(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_epi16(x[2 * i], x[2 * i + 1]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int row = i / 2 * 4 + i % 2;
        x[2 * i] = _mm512_unpacklo_epi32(y[row], y[row + 2]);
        x[2 * i + 1] = _mm512_unpackhi_epi32(y[row], y[row + 2]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        y[2 * i] = _mm512_unpacklo_epi64(x[i], x[4 + i]);
        y[2 * i + 1] = _mm512_unpackhi_epi64(x[i], x[4 + i]);
      }
      if (whole) {
#pragma GCC unroll 8
        for (int i = 0; i < width; ++i) _mm512_storeu_si512(target + i * to_stride, y[i]);
      } else {
        const __mmask32 inside = static_cast<__mmask32>((uint64_t{1} << rows_left) - 1);
        for (int64_t i = 0; i < columns_left; ++i) _mm512_mask_storeu_epi16(target + i * to_stride, inside, y[i]);
      }
    }
  }
}

inline void transpose_matrix(const bfloat16* from, int64_t from_stride, int64_t rows, int64_t columns, bfloat16* to,
                             int64_t to_stride) {
  if (rows == 3 && to_stride == 3) return zip_three_rows(from, from_stride, columns, to);
  if (rows == 2) return transpose_few_rows<2>(from, from_stride, columns, to, to_stride);
  if (rows == 3) return transpose_few_rows<3>(from, from_stride, columns, to, to_stride);
  if (rows == 4) return transpose_few_rows<4>(from, from_stride, columns, to, to_stride);
  if (lines_are_crowded(from_stride, columns)) {
    return transpose_by_lines(from, from_stride, rows, columns, to, to_stride,
                              [&](const bfloat16* copy, int64_t height, int64_t width, bfloat16* target) {
                                transpose_by_quarters(copy, kCopiedLine, height, width, target, to_stride);
                              });
  }
  transpose_by_quarters(from, from_stride, rows, columns, to, to_stride);
}
#endif

// transpose_matrix for bytes, in squares of 16.
typedef uint8_t Bytes16 __attribute__((vector_size(16)));

template <int first>
FASTNN_INLINE Bytes16 zip_bytes(Bytes16 x, Bytes16 y) {
  constexpr int f = first;
  return __builtin_shufflevector(x, y, f, f + 16, f + 1, f + 17, f + 2, f + 18, f + 3, f + 19, f + 4, f + 20, f + 5,
                                 f + 21, f + 6, f + 22, f + 7, f + 23);
}

// The first `count` bytes, at most 16; the others are zero.
FASTNN_INLINE Bytes16 load_bytes(const uint8_t* from, int64_t count) {
  Bytes16 bytes = {};
  if (count >= 16) {  // memcpy of a known size is an instruction
    __builtin_memcpy(&bytes, from, 16);
    return bytes;
  }
#if defined(__AVX512F__)
  return (Bytes16)_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), from);
#else
  __builtin_memcpy(&bytes, from, count);
  return bytes;
#endif
}
FASTNN_INLINE void store_bytes(uint8_t* to, Bytes16 bytes, int64_t count) {
  if (count >= 16) {
    __builtin_memcpy(to, &bytes, 16);
    return;
  }
#if defined(__AVX512F__)
  _mm_mask_storeu_epi8(to, static_cast<__mmask16>((1u << count) - 1), (__m128i)bytes);
#else
  __builtin_memcpy(to, &bytes, count);
#endif
}

inline void transpose_matrix(const uint8_t* from, int64_t from_stride, int64_t rows, int64_t columns, uint8_t* to,
                             int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += 16) {
    const int64_t row_count = rows - r < 16 ? rows - r : 16;
    for (int64_t c = 0; c < columns; c += 16) {
      const int64_t column_count = columns - c < 16 ? columns - c : 16;
      Bytes16 block[16] = {};
      for (int64_t i = 0; i < row_count; ++i) block[i] = load_bytes(from + (r + i) * from_stride + c, column_count);
      for (int round = 1; round < 16; round *= 2) {
        Bytes16 next[16];
        for (int i = 0; i < 8; ++i) {
          next[2 * i] = zip_bytes<0>(block[i], block[i + 8]);
          next[2 * i + 1] = zip_bytes<8>(block[i], block[i + 8]);
        }
        for (int i = 0; i < 16; ++i) block[i] = next[i];
      }
      for (int64_t i = 0; i < column_count; ++i) store_bytes(to + (c + i) * to_stride + r, block[i], row_count);
    }
  }
}

}  // namespace FASTNN_ISA
}  // namespace fastnn

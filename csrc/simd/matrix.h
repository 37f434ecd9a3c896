// The matrix unit of the instruction set amx_bf16: tiles of 16 rows of 64 bytes, of which the product of two is
// added to a third. It is written in assembler, since the kernels of avx512 contain it too (isa.h).
#pragma once

#include "vec.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int64_t kMatrixRows = 16;

#if defined(FASTNN_HAS_MATRIX)
// Configures a thread's tiles, for as long as the object lives.
//   0 to 3: sums, [row][lane]; 4, 5: the left operand, [row][number]; 6, 7: the right one, [pair of numbers][lane]
class MatrixUnit {
 public:
  // The left operand has so many rows of so many numbers, an even number.
  MatrixUnit(int64_t rows, int64_t numbers) {
    Configuration configuration = {};
    configuration.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      const bool left = tile == 4 || tile == 5;
      configuration.row_bytes[tile] = static_cast<uint16_t>(left ? 2 * numbers : 64);
      configuration.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : numbers / 2);
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(configuration));
  }
  ~MatrixUnit() { __asm__ volatile("tilerelease"); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;

 private:
  struct alignas(64) Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
};

// `step` is from row to row, in bytes.
template <int tile>
FASTNN_INLINE void load_tile(const void* from, int64_t step) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(step), "i"(tile) : "memory");
}
template <int tile>
FASTNN_INLINE void store_tile(void* to, int64_t step) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(step), "i"(tile) : "memory");
}
// sums += left x right
template <int sums, int left, int right>
FASTNN_INLINE void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(left), "i"(right));
}
#endif

}  // namespace FASTNN_ISA
}  // namespace fastnn

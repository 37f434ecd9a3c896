// Large products in blocks whose copies stay in the caches, as Goto and van de Geijn cut them up ("Anatomy of
// High-Performance Matrix Multiplication", 2008).
#include "panel.h"
#include "product_tiles.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

// A block of the right factor has so many rows and panels of columns. It takes a quarter of a megabyte at most, which
// the second cache holds beside what else passes through. A tile's sums are written once a block.
constexpr int64_t kBlockDepth = 2 * kLongestSum;
constexpr int64_t kBlockPanels = 8;

// The rows of the left factor that a tile multiplies, in whole vectors.
template <class T>
constexpr int64_t kStripWidth = (kTileRows + kLanes<T> - 1) / kLanes<T> * kLanes<T>;

// to[k * width + i] = from[i * line + k * along] for i < count and k < depth, and 0 for i from `count` to the width,
// which is whole vectors.
template <class T>
void copy_lines(const T* from, int64_t line, int64_t along, int64_t count, int64_t depth, T* to, int64_t width) {
  for (int64_t first = 0; first < width; first += kLanes<T>) {
    const int64_t lines = smaller(larger(count - first, 0), kLanes<T>);
    const T* source = from + smaller(first, count) * line;
    if (lines == 0) {
      for (int64_t k = 0; k < depth; ++k) store(to + k * width + first, Vec<T>{});
    } else if (along == 1) {
      pack_rows<T>(source, line, lines, depth, to + first, width);
    } else if (line == 1) {
      for (int64_t k = 0; k < depth; ++k) store(to + k * width + first, load_up_to<T>(source + k * along, lines));
    } else {
      for (int64_t k = 0; k < depth; ++k) {
        for (int64_t i = 0; i < kLanes<T>; ++i) {
          to[k * width + first + i] = i < lines ? source[i * line + k * along] : T(0);
        }
      }
    }
  }
}

// The panels [column of a panel][depth][kTileColumns] of a block of the right factor.
template <class T>
void copy_panels(const Product<T>& p, const T* from, int64_t columns, int64_t depth, T* panels) {
  constexpr int64_t width = kTileColumns<T>;
  if (p.b_column == 1) {  // Row by row, because each row may lie in another page.
    for (int64_t k = 0; k < depth; ++k) pack_row<T>(from + k * p.b_depth, columns, depth, panels + k * width);
    return;
  }
  for (int64_t column = 0; column < columns; column += width) {
    copy_lines(from + column * p.b_column, p.b_column, p.b_depth, smaller(columns - column, width), depth,
               panels + column * depth, width);
  }
}

template <class T>
void multiply_in_blocks(const Product<T>& p, T* scratch) {
  constexpr int64_t width = kTileColumns<T>, block = kBlockPanels * width;
  T *const strip = scratch, *const panels = scratch + kBlockDepth * kStripWidth<T>;
  const int64_t strips = divide_up(p.rows, kTileRows);
  int64_t start = 0;
  do {  // runs once without a depth, too: the sums are zeros
    const int64_t depth = smaller(kBlockDepth, p.depth - start);
    const bool add = p.add || start > 0;
    for (int64_t column = 0; column < p.columns; column += block) {
      const int64_t columns = smaller(block, p.columns - column);
      copy_panels(p, p.b + start * p.b_depth + column * p.b_column, columns, depth, panels);
      for (int64_t i = 0; i < strips; ++i) {
        const int64_t row = p.rows * i / strips, rows = p.rows * (i + 1) / strips - row;
        copy_lines(p.a + row * p.a_row + start * p.a_depth, p.a_row, p.a_depth, rows, depth, strip, kStripWidth<T>);
        T* const to = p.output + row * p.output_row + column;
        with_constant<kTileRows>(static_cast<int>(rows), [&](auto count) {
          for (int64_t c = 0; c < columns; c += width) {
            const TileWidth tile = tile_width<T>(columns - c);
            with_constant<kTileVectors>(tile.vectors, [&](auto vectors) {
              product_tile<decltype(count)::value, decltype(vectors)::value, T>(depth, strip, 1, kStripWidth<T>,
                                                                                panels + c * depth, width, kLanes<T>,
                                                                                to + c, p.output_row, tile.last, add);
            });
          }
        });
      }
    }
    start += kBlockDepth;
  } while (start < p.depth);
}

template <class T>
constexpr ProductKernels<T> kernels() {
  return {multiply<T>, multiply_in_blocks<T>, kBlockDepth * (kStripWidth<T> + kBlockPanels * kTileColumns<T>),
          kTileRows, kTileColumns<T>};
}

}  // namespace

extern const ProductTable product_kernels = {kernels<float>(), kernels<double>()};

}  // namespace FASTNN_ISA
}  // namespace fastnn

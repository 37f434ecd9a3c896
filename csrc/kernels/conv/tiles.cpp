// The manifest: every instance of the register tile there is.
#include "tile.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

template <class E>
constexpr ChannelTiles<E> all_channel_tiles() {
  static_assert(kMostRows == (FASTNN_VECTOR_REGISTERS == 32 ? 14 : 6), "FASTNN_ROWS has kMostRows of them");
#if FASTNN_VECTOR_REGISTERS == 32
#define FASTNN_ROWS(X, v)                                                                                        \
  X(1, v), X(2, v), X(3, v), X(4, v), X(5, v), X(6, v), X(7, v), X(8, v), X(9, v), X(10, v), X(11, v), X(12, v), \
      X(13, v), X(14, v)
#else
#define FASTNN_ROWS(X, v) X(1, v), X(2, v), X(3, v), X(4, v), X(5, v), X(6, v)
#endif
#define FASTNN_TILE(r, v) channel_tile<r, v, E>
  return {{{FASTNN_ROWS(FASTNN_TILE, 1)}, {FASTNN_ROWS(FASTNN_TILE, 2)}}};
#undef FASTNN_TILE
}

template <int rows, int vectors>
constexpr PixelTileFunction<float> pixel_tile_if_fits() {
  if constexpr (rows <= most_outputs(vectors)) {
    return pixel_tile<rows, vectors, float>;
  } else {
    return nullptr;
  }
}

}  // namespace

extern const ChannelTiles<float> channel_tiles_f32 = all_channel_tiles<float>();
extern const ChannelTiles<double> channel_tiles_f64 = all_channel_tiles<double>();
#if defined(FASTNN_HAS_PAIRS)
extern const ChannelTiles<bfloat16x2> channel_tiles_pairs = all_channel_tiles<bfloat16x2>();
#endif
#define FASTNN_TILE(r, v) pixel_tile_if_fits<r, v>()
extern const PixelTiles<float> pixel_tiles_f32 = {{{FASTNN_ROWS(FASTNN_TILE, 1)},
                                                   {FASTNN_ROWS(FASTNN_TILE, 2)},
                                                   {FASTNN_ROWS(FASTNN_TILE, 4)},
                                                   {FASTNN_ROWS(FASTNN_TILE, 8)}}};
#undef FASTNN_TILE
#define FASTNN_TILE(r, winners) window_tile<r, winners, float>
extern const WindowTiles<float> window_tiles_f32 = {{FASTNN_ROWS(FASTNN_TILE, false)},
                                                    {FASTNN_ROWS(FASTNN_TILE, true)}};
#undef FASTNN_TILE
#undef FASTNN_ROWS

}  // namespace FASTNN_ISA
}  // namespace fastnn

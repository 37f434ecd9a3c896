#include "mlp.h"

#include "mlp_backward.h"
#include "mlp_layer.h"

namespace fastnn {
namespace FASTNN_ISA {
namespace {

template <class T>
constexpr int64_t kBufferRows = kLaneRows<T> > kBlockRows ? kLaneRows<T> : kBlockRows;

template <class T>
int64_t scratch_size(int64_t widest) {
  return 2 * kBufferRows<T> * (widest + kTileColumns<T>);
}

// Estimates in cycles, of two multiply-adds of vectors each, fitted to measurements of 12 chains at 1 to 512 rows.
constexpr int64_t kTransposeCost = 80, kTileCost = 40, kSumCost = 8;

template <class T>
int64_t dot_cost(int64_t rows, int64_t in, int64_t out) {
  return divide_up(rows, kDotRows<T>) * out * (kDotRows<T> * divide_up(in, kLanes<T>) * 9 / 16 + kSumCost);
}
template <class T>
int64_t packed_cost(int64_t rows, int64_t in, int64_t out) {
  const int64_t in_vectors = divide_up(in, kLanes<T>), out_vectors = divide_up(out, kLanes<T>);
  return kTransposeCost * in_vectors * out_vectors + rows * in * out_vectors / 2 +
         kTileCost * divide_up(rows, kTileRows) * divide_up(out_vectors, kTileVectors);
}
template <class T>
int64_t lanes_cost(int64_t rows, int64_t in, int64_t out) {
  const int64_t row_vectors = divide_up(rows, kLanes<T>);
  return row_vectors * in * out / 2 + kTileCost * divide_up(out, kTileRows) * divide_up(row_vectors, kTileVectors);
}

template <class T>
bool worth_packing(int64_t rows, int64_t in, int64_t out) {
  return packed_cost<T>(rows, in, out) < dot_cost<T>(rows, in, out);
}

template <class T>
MlpPlan make_plan(const int64_t* widths, int64_t layers, int64_t rows) {
  const int64_t ends = divide_up(widths[0], kLanes<T>) + divide_up(widths[layers], kLanes<T>);
  int64_t as_rows = 0, in_lanes = kTransposeCost * divide_up(rows, kLanes<T>) * ends;
  bool packs = false;
  for (int64_t i = 0; i < layers; ++i) {
    const int64_t in = widths[i], out = widths[i + 1];
    as_rows += smaller(dot_cost<T>(rows, in, out), packed_cost<T>(rows, in, out));
    in_lanes += lanes_cost<T>(rows, in, out);
    packs = packs || worth_packing<T>(rows, in, out);
  }
  if (in_lanes < as_rows) return {true, false, kLanes<T>};
  return {false, !packs && rows <= kBlockRows, kDotRows<T>};
}

// A block of rows, row-major, through all layers.
template <class T>
void run_block(const MlpLayer<T>* layers, int64_t count, const T* input, T* output, int64_t first_row, int64_t rows,
               T* const (&buffers)[2]) {
  for (int64_t i = 0; i < count; ++i) {
    const MlpLayer<T>& layer = layers[i];
    T* to = i + 1 == count ? output : buffers[i % 2];
    if (layer.packed) {
      packed_layer<T>(layer, input, to, rows);
    } else {
      dot_layer<T>(layer, input, to, rows, {0, layer.out});
    }
    T* saved = layer.saved ? layer.saved + first_row * layer.out : nullptr;
    if (saved || !taken_with_the_tile(layer)) activate_block<T>(layer, to, saved, rows * layer.out);
    input = to;
  }
}

// The same with the rows in the lanes.
template <int vectors, class T>
void run_block_in_lanes(const MlpLayer<T>* layers, int64_t count, const T* input, T* output, int64_t first_row,
                        int64_t rows, T* const (&buffers)[2]) {
  constexpr int64_t width = vectors * kLanes<T>;
  into_lanes<vectors>(input, rows, layers[0].in, buffers[1]);
  for (int64_t i = 0; i < count; ++i) {
    const MlpLayer<T>& layer = layers[i];
    T* to = buffers[i % 2];
    lanes_layer<vectors>(layer, buffers[(i + 1) % 2], to, rows);
    T* saved = layer.saved ? layer.saved + first_row * layer.out : nullptr;
    if (saved && saves_input(layer.activation)) out_of_lanes<vectors>(to, rows, layer.out, saved);
    if (!taken_with_the_tile(layer)) {
      activate_block<T>(layer, to, nullptr, divide_up(rows, width) * width * layer.out);
    }
    if (saved && !saves_input(layer.activation)) out_of_lanes<vectors>(to, rows, layer.out, saved);
  }
  out_of_lanes<vectors>(buffers[(count + 1) % 2], rows, layers[count - 1].out, output);
}

template <class T>
void forward(const MlpLayer<T>* layers, int64_t count, bool in_lanes, const T* input, T* output, int64_t first_row,
             int64_t last_row, T* scratch) {
  int64_t widest = layers[0].in;
  for (int64_t i = 0; i < count; ++i) widest = larger(widest, layers[i].out);
  T* const buffers[2] = {scratch, scratch + kBufferRows<T> * widest};
  constexpr int64_t lanes = kLanes<T>;
  const int64_t step = in_lanes ? kLaneRows<T> : kBlockRows;
  int64_t rows;
  for (int64_t row = first_row; row < last_row; row += rows) {
    rows = smaller(last_row - row, step);
    // If the last rows fill one vector or less, they are a block of their own, in panels of one vector.
    const int64_t rest = rows % (2 * lanes);
    if (in_lanes && rows > 2 * lanes && rest > 0 && rest <= lanes) rows -= rest;
    const T* block = input + row * layers[0].in;
    T* to = output + row * layers[count - 1].out;
    if (!in_lanes) {
      run_block<T>(layers, count, block, to, row, rows, buffers);
    } else if (rows > lanes) {
      run_block_in_lanes<2>(layers, count, block, to, row, rows, buffers);
    } else {
      run_block_in_lanes<1>(layers, count, block, to, row, rows, buffers);
    }
  }
}

template <class T>
void forward_together(const MlpLayer<T>* layers, int64_t count, const T* input, T* output, int64_t rows,
                      int64_t round_bytes, T* scratch, Member& member) {
  int64_t widest = 0;
  for (int64_t i = 0; i < count; ++i) widest = larger(widest, layers[i].out);
  T* const buffers[2] = {scratch, scratch + kBufferRows<T> * widest};
  const T* from = input;
  for (int64_t i = 0; i < count; ++i) {
    T* const to = i + 1 == count ? output : buffers[i % 2];
    dot_layer_together<T>(layers[i], from, to, rows, round_bytes, member);
    from = to;
  }
}

// One of `parts` even parts of the panels.
template <class T>
void pack_part(const T* weight, int64_t out, int64_t in, int64_t part, int64_t parts, T* packed) {
  const int64_t panels = divide_up(out, kTileColumns<T>);
  const int64_t first = panels * part / parts * kTileColumns<T>;
  const int64_t last = smaller(out, panels * (part + 1) / parts * kTileColumns<T>);
  pack_panels(weight + first * in, last - first, in, packed + first * in);
}

template <class T>
void activate_all(const Activation& activation, const T* input, T* output, int64_t count) {
  with_activation<Compute<T>>(activation, [&](auto function) {
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      store_up_to<T>(output + i, function(load_up_to<T>(input + i, count - i)), count - i);
    }
  });
}

template <class T>
void gradient_of_all(const Activation& activation, const T* gradient, const T* saved, T* output, int64_t count) {
  with_activation<Compute<T>>(activation, [&](auto function) {
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      const auto before =
          function.gradient(load_up_to<T>(gradient + i, count - i), load_up_to<T>(saved + i, count - i));
      store_up_to<T>(output + i, before, count - i);
    }
  });
}

template <class T>
void sum_all_rows(const T* matrix, int64_t rows, int64_t columns, int64_t first, int64_t last, Compute<T>* sums,
                  Compute<T>* lost) {
  int64_t row = 0;
  do {  // runs once without rows, too: the sums are zeros
    const int64_t count = smaller(rows - row, kGradientRows);
    sum_rows<T>(matrix + row * columns, count, columns, sums, lost, row > 0, {first, last});
    row += count;
  } while (row < rows);
}

template <class T>
constexpr MlpElementwise<T> elementwise() {
  return {activate_all<T>, gradient_of_all<T>, sum_all_rows<T>};
}

template <class T>
constexpr MlpKernels<T> kernels() {
  return {make_plan<T>, worth_packing<T>,    packed_size<T>,           pack_part<T>, scratch_size<T>,
          forward<T>,   forward_together<T>, backward_scratch_size<T>, kFewRows,     backward<T>};
}

}  // namespace

extern const MlpTable mlp_kernels = {
    {kernels<float>(), kernels<double>()},
    {elementwise<float>(), elementwise<double>(), elementwise<bfloat16>()},
};

}  // namespace FASTNN_ISA
}  // namespace fastnn

// What conv_backward.h works on: its scratch memory and the choice between it and conv_backward_depthwise.h.
#pragma once

#include "conv_gradient_band.h"
#include "conv_runs.h"

namespace fastnn {
namespace FASTNN_ISA {

constexpr int64_t kSliceBytes = 32 << 10;  // what the inner loop returns to: most of L1
constexpr int64_t kMostSlicePixels = 256;
constexpr int64_t kMostBandChannels = 64;
constexpr int64_t kFewAdditions = 16;
constexpr int64_t kMostJoinedChannels = 64;

// The output channels of a group that are worked on together: as many as have their weights stay in L1.
template <class E>
int64_t band_channels(const ConvPoolGeometry& g, const RunShape& s) {
  using C = Compute<E>;
  const int64_t fit = kSliceBytes / larger(1, s.row * static_cast<int64_t>(sizeof(E))) / kLanes<C> * kLanes<C>;
  const int64_t most = smaller(kMostBandChannels, larger(fit, kLanes<C>));
  const int64_t parts = larger(1, divide_up(g.out_channels, most));
  return round_up(divide_up(g.out_channels, parts), kLanes<C>);
}

// So many conv pixels have their input and its gradient stay in L2. No matter how many, where the weight doesn't: that
// is walked through for each band.
template <class C>
int64_t window_pixels(const ConvPoolGeometry& g, const RunShape& s) {
  const int64_t weight = 3 * s.blocks * g.out_channels * s.row;  // with its gradient and what that has lost
  const int64_t under_pixel = 2 * s.blocks * s.lanes * g.stride[0] * g.stride[1] * g.stride[2];
  const int64_t room = kWindowBytes / static_cast<int64_t>(sizeof(C));
  return weight > room / 2 ? g.conv[0] * g.conv[1] * g.conv[2] : room / larger(1, under_pixel);
}

template <class E, class C = Compute<E>>
struct BackwardScratch {
  BandShape<C> shape;
  BlockImage image;
  int64_t slice_pixels;  // conv pixels whose input stays in L1
  int64_t list_room;     // of one channel's list
  E* images;             // windows of the input, of some blocks
  C* gradients;          // of its gradient, laid out alike
  C* parts;              // ImageWindow's
  char* band;            // GradientBand's
  E* values;             // of the lists of a band
  Offset<C>* offsets;
  int64_t* slice_starts;       // where in each channel's list each slice begins
  int64_t* pixel_starts;       // where each pixel's list begins
  int64_t* run_offsets;        // in the image
  Offset<C>* pixel_offsets;    // in the image, of each pixel of the band
  Offset<C>* channel_offsets;  // in the packed weight, of each channel of the band
  double* bias;                // of each output channel
  int64_t size;

  BackwardScratch(const ConvPoolGeometry& g, void* memory) : BackwardScratch(g, run_shape<E>(g), memory) {}

  BackwardScratch(const ConvPoolGeometry& g, const RunShape& s, void* memory)
      : shape(g, band_channels<E>(g, s), window_pixels<C>(g, s)),
        image(g, s.lanes, true, sizeof(C), shape.size, 2 * s.blocks, s.vectors * kLanes<C>) {
    const bool in_parts = g.taps() * divide_up(g.out_channels, shape.width) > kLongestSum;
    const int64_t under_pixel = s.lanes * static_cast<int64_t>(sizeof(E)) * g.stride[0] * g.stride[1] * g.stride[2];
    const int64_t fit = kSliceBytes / 2 / under_pixel / kLanes<C> * kLanes<C>;
    slice_pixels = smaller(shape.pixels, smaller(kMostSlicePixels, larger(128, fit)));
    list_room = shape.pixels + kLanes<C>;
    MemoryParts taken(memory);
    images = taken.take<E>(image.size * s.blocks);
    gradients = taken.take<C>(image.size * s.blocks);
    parts = in_parts ? taken.take<C>(image.size * s.blocks) : nullptr;
    band = taken.take<char>(GradientBand<C>::memory_size(g, shape));
    values = taken.take<E>(list_room * shape.width);
    offsets = taken.take<Offset<C>>(list_room * shape.width);
    slice_starts = taken.take<int64_t>((divide_up(shape.pixels, slice_pixels) + 1) * shape.width);
    pixel_starts = taken.take<int64_t>(shape.pixels + 1);
    run_offsets = taken.take<int64_t>(s.runs);
    pixel_offsets = taken.take<Offset<C>>(shape.pixels);
    channel_offsets = taken.take<Offset<C>>(shape.width);
    bias = taken.take<double>(round_up(g.out_channels, shape.width));
    size = taken.used();
  }
};

// Counted in vectors that are worked on, a conv pixel.
template <class E>
double runs_cost(const ConvPoolGeometry& g) {
  using C = Compute<E>;
  constexpr double kProduct = kZipsRuns<E> ? 1.3 : 2;  // of each vector, for both gradients
  const RunShape s = run_shape<E>(g);
  const double conv = static_cast<double>(g.conv[0] * g.conv[1] * g.conv[2]);
  const double winners = static_cast<double>(smaller(g.pixels(), g.conv[0] * g.conv[1] * g.conv[2])) / conv;
  const double input = static_cast<double>(g.input[0] * g.input[1] * g.input[2]) / conv;
  const double band = 8 * static_cast<double>(divide_up(g.out_channels, kLanes<C>));
  const double image = 6 * input * static_cast<double>(s.blocks * divide_up(s.lanes, kLanes<C>));
  const double products = kProduct * static_cast<double>(s.blocks * larger(2, s.runs * s.vectors));
  return static_cast<double>(g.groups) * (band + image + winners * static_cast<double>(g.out_channels) * products);
}

// Whether runs of bfloat16 are zipped. Gradients of windows that overlap are sums, which would have to be rounded.
template <class T>
bool zipping_pays(const ConvPoolGeometry& g) {
  if (!kHasPairs<T> || !isa_multiplies_pairs()) return false;
  for (int d = 0; d < 3; ++d) {
    if (g.pool_extent(d) > g.pool_stride[d]) return false;
  }
  return runs_cost<RunElement<T>>(g) < runs_cost<Compute<T>>(g);
}

FASTNN_INLINE ConvPoolGeometry join_groups(ConvPoolGeometry g, int64_t count) {
  g.groups /= count;
  g.in_channels *= count;
  g.out_channels *= count;
  return g;
}

// Groups of few channels leave most lanes empty; joined, they share them.
template <class C>
int64_t cheapest_join(const ConvPoolGeometry& g) {
  const int64_t most = kMostJoinedChannels / larger(1, larger(g.in_channels, g.out_channels));
  int64_t best = 1;
  double least = runs_cost<C>(g);
  for (int64_t count = 2; count <= smaller(g.groups, most); ++count) {
    if (g.groups % count != 0) continue;
    const double cost = runs_cost<C>(join_groups(g, count));
    if (cost < least) {
      least = cost;
      best = count;
    }
  }
  return best;
}

template <class E>
ConvPoolBackwardPlan plan_runs(const ConvPoolGeometry& g) {
  const RunShape s = run_shape<E>(g);
  const BackwardScratch<E> scratch(g, nullptr);
  ConvPoolBackwardPlan plan = {};
  plan.zips_runs = kZipsRuns<E>;
  plan.packed_size = g.groups * s.blocks * g.out_channels * s.row;
  plan.weight_size = plan.packed_size;
  plan.scratch_size = scratch.size;
  plan.axis = scratch.image.axis;
  // Few pixels are worked on twice for two parts.
  const int64_t least = 8 * (scratch.image.pixels_before(g) + 1);
  plan.most_parts = scratch.image.moves() ? larger(1, g.conv[plan.axis] / least) : 1;
  plan.blocks = g.groups * s.blocks;
  plan.keeps_lost = g.batch * divide_up(g.conv[0] * g.conv[1] * g.conv[2], scratch.slice_pixels) > kFewAdditions;
  return plan;
}

// to += total; what rounding takes from the sum goes to `lost`.
template <class C>
FASTNN_INLINE void add_keeping_lost(const Vec<C>& total, C* to, C* lost) {
  const Vec<C> before = load(to), sum = before + total, added = sum - before;
  store(to, sum);
  store(lost, load(lost) + ((before - (sum - added)) + (total - added)));
}

// A vector of the weight's gradient: what there is of it first, or more of it. `lost` may be null.
template <class C>
FASTNN_INLINE void put_sums(const Vec<C>& sums, bool is_first, C* to, C* lost) {
  if (is_first) {
    store(to, sums);
  } else if (lost) {
    add_keeping_lost(sums, to, lost);
  } else {
    store(to, load(to) + sums);
  }
}

// What blocks [first, last) have lost to rounding.
template <class T, class C = Compute<T>>
void add_lost(const ConvPoolBackward<T>& call, int64_t first, int64_t last, C* grad_weight, const C* lost) {
  const int64_t size = call.plan.weight_size / call.plan.blocks;
  for (int64_t i = first * size; i < last * size; ++i) {
    // What an infinite sum has lost is NaN.
    if (lost[i] == lost[i]) grad_weight[i] += lost[i];
  }
}

// A piece's conv pixels along the plan's axis.
template <class T>
FASTNN_INLINE Range pixels_of(const ConvPoolBackward<T>& call, const ConvPoolPiece& piece) {
  const int64_t rows = call.geometry.conv[call.plan.axis];
  return {rows * piece.part / piece.parts, rows * (piece.part + 1) / piece.parts};
}

// A piece of a plan whose blocks are groups.
template <class Worker, class T, class C = Compute<T>>
void backward_by_groups(Worker& worker, const ConvPoolBackward<T>& call, const ConvPoolPiece& piece, C* grad_weight,
                        C* lost, C* grad_bias) {
  const int64_t block_size = call.plan.weight_size / call.plan.blocks;
  const Range pixels = pixels_of(call, piece);
  for (int64_t image = piece.first_image; image < piece.last_image; ++image) {
    for (int64_t group = piece.first_block; group < piece.last_block; ++group) {
      const int64_t at = group * block_size;
      worker.run(image, group, pixels, image == piece.first_image, grad_weight ? grad_weight + at : nullptr,
                 lost ? lost + at : nullptr, grad_bias);
    }
  }
  if (grad_weight && lost) add_lost(call, piece.first_block, piece.last_block, grad_weight, lost);
}

}  // namespace FASTNN_ISA
}  // namespace fastnn

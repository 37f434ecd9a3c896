// max_pool, avg_pool, adaptive_avg_pool, mean, amax and cumsum: layers that make one element of several.
#pragma once

#include <cmath>

#include "../array.h"
#include "conv.h"

namespace fastnn {

// A pool of images. With channels last, a window is as many runs of channels as it has positions. Contiguous images go
// through the kernels of the depthwise convolution: an average is such a convolution, and a maximum is the pool behind
// such a convolution whose kernel is a single 1.
template <class T, bool averages>
class PoolLayer : public Layer<T> {
 public:
  PoolLayer(const ProgramLine& line, const Weights<T>&) {
    this->inputs = {line.input("input")};
    kernel_ = line.integers("kernel", 1, kMostSize);
    const size_t dims = kernel_.size();
    if (dims < 1 || dims > 3) line.refuse("expected a kernel of 1 to 3 dimensions");
    stride_ = line.text("stride").empty() ? kernel_ : line.integers("stride", 1, kMostSize, dims);
    padding_ = line.integers("padding", 0, kMostSize, dims);
    for (size_t d = 0; d < dims; ++d) {
      if (padding_[d] > kernel_[d] / 2) line.refuse("pad should be at most half of kernel size");
    }
    if (averages) {
      counts_padding_ = line.flag("count_include_pad");
    } else {
      dilation_ = line.integers("dilation", 1, kMostSize, dims);
      ceil_mode_ = line.flag("ceil_mode");
    }
  }

  FormatRule formats() const override { return FormatRule::each; }
  bool writes_parts() const override { return true; }

  void set_sizes(Site<T>& site) const override {
    const Ints& input = site.sizes(0);
    FASTNN_CHECK(input.size() == kernel_.size() + 2, "expected a pool's input to be ", kernel_.size() + 2,
                 "D, got size ", to_string(input));
    FASTNN_CHECK(input[1] > 0, "expected images of at least one channel, got size ", to_string(input));
    site.outputs[0].sizes = fastnn::output_sizes(problem(input));
  }

  double cost(const Site<T>& site) const override {
    const ConvPoolGeometry g = problem(site.sizes(0)).geometry;
    const ConvKernels<T>& kernels = *site.kernels.conv;
    const double lanes = static_cast<double>(kernels.machine.vector_bytes) / sizeof(T);
    const double taps = static_cast<double>(averages ? g.taps() : g.places());
    const double vectors = std::ceil(static_cast<double>(g.groups) / lanes) * static_cast<double>(g.batch * g.pixels());
    const double moved = vectors * tuned::kTranspose;
    if (site.inputs[0].channels_last()) return vectors * (taps + 2) + (site.outputs[0].channels_last() ? 0 : moved);
    const PlanKey key = contiguous_key(kernels, g, site.outputs[0].channels_last());
    return plan_forward(key.geometry, key.request, key.machine).cost;
  }

  void run(const LayerCall<T>& given) const override {
    const ValueType &input = given.site.inputs[0], &output = given.site.outputs[0];
    const ConvPoolProblem problem = this->problem(input.sizes);
    const ConvKernels<T>& kernels = *given.site.kernels.conv;
    if (input.channels_last()) return run_channels_last(given, problem.geometry);
    ConvCall<T> call{};
    call.geometry = problem.geometry;
    call.output = given.output(0);
    call.output_layout = conv_layout(output);
    call.activation = kIdentity;
    if (!averages) return pool_images(kernels, call, given.input(0), conv_layout(input));
    const ConvPoolGeometry& g = call.geometry;
    const Scratch<T> weight(checked_product(g.groups, g.taps()));
    std::fill_n(weight.get(), g.groups * g.taps(), static_cast<T>(1.0 / static_cast<double>(g.taps())));
    call.input = given.input(0);
    call.input_layout = conv_layout(input);
    call.weight = weight.get();
    call.weight_layout = contiguous_layout(1, g.kernel);
    const PlanKey key = contiguous_key(kernels, g, output.channels_last());
    run_by_plan<T>(kernels, call, plan_for(key), nullptr);
    if (!counts_padding_) count_elements(call);
  }

 private:
  // The plan's key for contiguous images: pixels fill the lanes, where there are kernels for that.
  static PlanKey contiguous_key(const ConvKernels<T>& kernels, const ConvPoolGeometry& g, bool output_channels_last) {
    constexpr ForwardAlgorithm algorithm = sizeof(T) == 8 ? ForwardAlgorithm::direct : ForwardAlgorithm::pixels;
    return plan_key<T>(kernels, g, false, output_channels_last, static_cast<int64_t>(algorithm));
  }

  // The pool as a problem of conv_relu_max_pool, with a group for each channel.
  ConvPoolProblem problem(const Ints& input) const {
    const size_t dims = kernel_.size();
    const Ints ones(dims, 1), zeros(dims, 0);
    Ints weight{input[1], 1};
    const Ints& kernel = averages ? kernel_ : ones;
    weight.insert(weight.end(), kernel.begin(), kernel.end());
    const Ints geometry =
        averages ? flat_geometry({stride_, padding_, ones, ones, ones, zeros, ones, input[1], ceil_mode_})
                 : flat_geometry({ones, zeros, ones, kernel_, stride_, padding_, dilation_, input[1], ceil_mode_});
    return problem_of({kDtypeOf<T>, 0, "network"}, input, weight, geometry);
  }

  void run_channels_last(const LayerCall<T>& given, const ConvPoolGeometry& g) const {
    const ValueType& output = given.site.outputs[0];
    ValueType images = output;
    images.format = Format::channels_last;
    const bool copies = !output.channels_last() && !is_same_order(output.sizes);
    const Scratch<T> own(copies ? output.count() : 0);
    T* const to = copies ? own.get() : given.output(0);
    const ConvLayout from = conv_layout(given.site.inputs[0]), layout = conv_layout(images);
    const Window window(*this);
    const double work = static_cast<double>(g.output[2] * g.groups * window.places());
    parallel_range(g.batch * g.output[0] * g.output[1], work, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const int64_t y = row % g.output[1], z = row / g.output[1] % g.output[0], n = row / (g.output[0] * g.output[1]);
        pool_row(g, window, given.input(0) + n * from.n, from, z, y,
                 to + n * layout.n + z * layout.d[0] + y * layout.d[1], layout.d[2]);
      }
    });
    if (copies) {
      copy_array(to, images.strides(), given.output(0), output.strides(), output.sizes,
                 memory_order(output.sizes.size(), false));
    }
  }

  // A window with ones in front of its dimensions.
  struct Window {
    int64_t kernel[3] = {1, 1, 1}, stride[3] = {1, 1, 1}, padding[3] = {}, dilation[3] = {1, 1, 1};

    explicit Window(const PoolLayer& layer) {
      const auto set = [](const Ints& numbers, int64_t (&all)[3]) {
        std::copy(numbers.begin(), numbers.end(), all + 3 - numbers.size());
      };
      set(layer.kernel_, kernel);
      set(layer.stride_, stride);
      set(layer.padding_, padding);
      set(layer.dilation_, dilation);
    }
    int64_t places() const { return kernel[0] * kernel[1] * kernel[2]; }
    int64_t at(int d, int64_t output, int64_t tap) const { return output * stride[d] - padding[d] + tap * dilation[d]; }
  };

  // Computes a row of outputs. Outputs whose windows lie inside the row share one list of positions. The others have
  // lists of their own.
  void pool_row(const ConvPoolGeometry& g, const Window& window, const T* image, const ConvLayout& layout, int64_t z,
                int64_t y, T* to, int64_t to_step) const {
    const auto& kernels = elementwise_kernels().get<T>();
    const int64_t span = (window.kernel[2] - 1) * window.dilation[2], columns = g.input[2];
    std::array<const T*, kMostPlaces> few;
    std::vector<const T*> many(window.places() > kMostPlaces ? static_cast<size_t>(window.places()) : 0);
    const T** const places = many.empty() ? few.data() : many.data();
    for (int64_t x = 0, windows; x < g.output[2]; x += windows) {
      const int64_t start = window.at(2, x, 0);
      windows = 1;
      if (start >= 0 && start + span < columns) {
        windows = std::min(g.output[2] - x, (columns - 1 - span - start) / window.stride[2] + 1);
      }
      int64_t count = 0;
      for (int64_t i = 0; i < window.kernel[0]; ++i) {
        const int64_t from_z = window.at(0, z, i);
        if (from_z < 0 || from_z >= g.input[0]) continue;
        for (int64_t j = 0; j < window.kernel[1]; ++j) {
          const int64_t from_y = window.at(1, y, j);
          if (from_y < 0 || from_y >= g.input[1]) continue;
          const T* const row = image + from_z * layout.d[0] + from_y * layout.d[1];
          for (int64_t k = 0; k < window.kernel[2]; ++k) {
            const int64_t from_x = window.at(2, x, k);
            if (from_x >= 0 && from_x < columns) places[count++] = row + from_x * layout.d[2];
          }
        }
      }
      const int64_t step = window.stride[2] * layout.d[2];
      if (averages) {
        const int64_t divisor = counts_padding_ ? window.places() : count;
        const T factor = static_cast<T>(1.0 / static_cast<double>(divisor));
        kernels.average(places, count, step, windows, g.groups, factor, to + x * to_step, to_step);
      } else {
        kernels.largest(places, count, step, windows, g.groups, to + x * to_step, to_step);
      }
    }
  }

  // Divides by the number of elements that are there, where a window reaches into the padding.
  void count_elements(const ConvCall<T>& call) const {
    const ConvPoolGeometry& g = call.geometry;
    const auto inside = [&](int d, int64_t at) {
      const int64_t first = at * g.stride[d] - g.padding[d];
      return std::min(g.input[d], first + g.kernel[d]) - std::max<int64_t>(0, first);
    };
    const ConvLayout& layout = call.output_layout;
    const double taps = static_cast<double>(g.taps());
    parallel_range(g.batch * g.groups, static_cast<double>(g.pixels()), [&](int64_t first, int64_t last) {
      for (int64_t plane = first; plane < last; ++plane) {
        T* const to = call.output + plane / g.groups * layout.n + plane % g.groups * layout.c;
        for (int64_t z = 0; z < g.output[0]; ++z) {
          for (int64_t y = 0; y < g.output[1]; ++y) {
            for (int64_t x = 0; x < g.output[2]; ++x) {
              const int64_t count = inside(0, z) * inside(1, y) * inside(2, x);
              if (count == g.taps()) continue;
              to[z * layout.d[0] + y * layout.d[1] + x * layout.d[2]] *=
                  static_cast<T>(taps / static_cast<double>(count));
            }
          }
        }
      }
    });
  }

  Ints kernel_, stride_, padding_, dilation_;
  bool ceil_mode_ = false, counts_padding_ = true;
};
template <class T>
using MaxPoolLayer = PoolLayer<T, false>;
template <class T>
using AvgPoolLayer = PoolLayer<T, true>;

// Divides each dimension of an image into so many parts and averages each part, as torch's adaptive pools do.
template <class T>
class AdaptiveAverageLayer : public Layer<T> {
 public:
  AdaptiveAverageLayer(const ProgramLine& line, const Weights<T>&) : parts_(line.integers("sizes", 1, kMostSize)) {
    this->inputs = {line.input("input")};
    if (parts_.empty() || parts_.size() > 3) line.refuse("expected one to three sizes");
  }
  void set_sizes(Site<T>& site) const override {
    Ints sizes = site.sizes(0);
    FASTNN_CHECK(sizes.size() == parts_.size() + 2, "expected ", parts_.size() + 2, "D images, got size ",
                 to_string(sizes));
    for (size_t d = 0; d < parts_.size(); ++d) {
      FASTNN_CHECK(sizes[2 + d] > 0, "expected images of at least one pixel, got size ", to_string(sizes));
      sizes[2 + d] = parts_[d];
    }
    site.outputs[0].sizes = sizes;
  }
  void run(const LayerCall<T>& call) const override {
    const auto& kernels = elementwise_kernels().get<T>();
    int64_t in[3] = {1, 1, 1}, out[3] = {1, 1, 1};
    const size_t ahead = 3 - parts_.size();
    for (size_t d = 0; d < parts_.size(); ++d) {
      in[ahead + d] = call.site.sizes(0)[2 + d];
      out[ahead + d] = parts_[d];
    }
    const int64_t pixels = in[0] * in[1] * in[2], cells = out[0] * out[1] * out[2];
    const int64_t planes = call.site.outputs[0].count() / cells;
    parallel_range(planes, static_cast<double>(pixels + 8 * cells), [&](int64_t first, int64_t last) {
      for (int64_t i = first * cells; i < last * cells; ++i) {
        const int64_t at[3] = {i % cells / (out[1] * out[2]), i / out[2] % out[1], i % out[2]};
        int64_t begin[3], end[3];
        for (int d = 0; d < 3; ++d) {
          begin[d] = at[d] * in[d] / out[d];
          end[d] = ((at[d] + 1) * in[d] + out[d] - 1) / out[d];
        }
        const T* const plane = call.input(0) + i / cells * pixels;
        T sum = 0;
        for (int64_t z = begin[0]; z < end[0]; ++z) {
          for (int64_t y = begin[1]; y < end[1]; ++y) {
            sum += kernels.sum(plane + (z * in[1] + y) * in[2] + begin[2], end[2] - begin[2]);
          }
        }
        const int64_t count = (end[0] - begin[0]) * (end[1] - begin[1]) * (end[2] - begin[2]);
        call.output(0)[i] = sum / static_cast<T>(count);
      }
    });
  }

 private:
  Ints parts_;
};

// A number for all elements of some dimensions, of all dimensions where none is named. A reduction over all pixels of
// an image takes either format.
template <class T>
class ReductionLayer : public Layer<T> {
 public:
  explicit ReductionLayer(const ProgramLine& line)
      : line_(line),
        dims_(line.integers("dims", -16, 15)),
        keeps_(line.flag("keepdim")),
        rank_(line.integer("rank", 0, 16)) {
    this->inputs = {line.input("input")};
  }
  FormatRule formats() const override { return FormatRule::input; }
  // `rank` is how many dimensions the input must have, of which none but the first may be empty; 0 stands for any
  // number and any sizes.
  static void check_rank(int64_t rank, const Ints& sizes) {
    if (rank == 0) return;
    FASTNN_CHECK(static_cast<int64_t>(sizes.size()) == rank && product(sizes, 1, sizes.size()) > 0, "expected ", rank,
                 " dimensions with elements, got size ", to_string(sizes));
  }
  void set_sizes(Site<T>& site) const override {
    const Ints& sizes = site.sizes(0);
    check_rank(rank_, sizes);
    const std::vector<bool> taken = which(sizes.size());
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (!taken[d] || keeps_) site.outputs[0].sizes.push_back(taken[d] ? 1 : sizes[d]);
    }
  }

 protected:
  // Whether each dimension is reduced.
  std::vector<bool> which(size_t rank) const {
    std::vector<bool> taken(rank, dims_.empty());
    for (const int64_t d : dims_) {
      const size_t dim = dimension_of(line_, d, rank);
      FASTNN_CHECK(!taken[dim], "dim ", dim, " appears multiple times in the list of dims");
      taken[dim] = true;
    }
    return taken;
  }
  const Ints& dims() const { return dims_; }
  bool keeps() const { return keeps_; }

 private:
  ProgramLine line_;
  Ints dims_;
  bool keeps_;
  int64_t rank_;
};

// The sums of the elements up to each one, along a dimension. Torch computes them, since it adds up in double.
template <class T>
class CumsumLayer : public Layer<T> {
 public:
  CumsumLayer(const ProgramLine& line, const Weights<T>&) : line_(line), dim_(line.integer("dim", -16, 15)) {
    this->inputs = {line.input("input")};
  }
  void set_sizes(Site<T>& site) const override {
    dimension_of(line_, dim_, site.sizes(0).size());
    site.outputs[0].sizes = site.sizes(0);
  }
  void run(const LayerCall<T>& call) const override {
    const Ints &sizes = call.site.sizes(0), strides = call.site.inputs[0].strides();
    const Tensor to = tensor_over(call.output(0), sizes, strides);
    stock("aten::cumsum", "out", tensor_over(call.input(0), sizes, strides), dim_, std::optional<ScalarType>(), to);
  }

 private:
  ProgramLine line_;
  int64_t dim_;
};

// The mean or the sum over some dimensions. A mean may divide by so many elements less as `correction` says, as the
// mean of squares in a variance does.
template <class T>
class MeanLayer : public ReductionLayer<T> {
 public:
  MeanLayer(const ProgramLine& line, const Weights<T>&)
      : ReductionLayer<T>(line), sums_(line.flag("sums")), correction_(line.real("correction")) {}

  void run(const LayerCall<T>& call) const override {
    const auto& kernels = elementwise_kernels().get<T>();
    const ValueType& input = call.site.inputs[0];
    const size_t rank = input.sizes.size();
    const std::vector<bool> taken = this->which(rank);
    // Where the dimensions that are taken lie together in memory, it is [outer][taken][inner].
    const Ints strides = input.strides();
    std::vector<size_t> order = memory_order(rank, input.channels_last());
    int64_t outer = 1, rows = 1, inner = 1;
    bool together = true, keeps_channels = false, keeps_pixels = false;
    size_t passed = 0;  // 0: before those that are taken, 1: among them, 2: behind
    for (const size_t d : order) {
      if (input.sizes[d] == 1) continue;
      if (taken[d]) {
        together = together && passed < 2;
        passed = 1;
        rows *= input.sizes[d];
      } else {
        if (passed == 1) passed = 2;
        (d == 1 ? keeps_channels : keeps_pixels) |= d > 0;
        (passed == 0 ? outer : inner) *= input.sizes[d];
      }
    }
    // The dimensions that are kept must come out contiguous.
    together = together && !(input.channels_last() && keeps_channels && keeps_pixels);
    const Scratch<T> copy(together ? 0 : input.count());
    const T* from = call.input(0);
    if (!together) {  // moves the dimensions that are taken behind the others
      std::vector<size_t> sorted;
      for (const bool second : {false, true}) {
        for (size_t d = 0; d < rank; ++d) {
          if (taken[d] == second) sorted.push_back(d);
        }
      }
      Ints sizes, own;
      for (const size_t d : sorted) {
        sizes.push_back(input.sizes[d]);
        own.push_back(strides[d]);
      }
      copy_array(from, own, copy.get(), ValueType{sizes}.strides(), sizes, memory_order(rank, false));
      from = copy.get();
      outer *= inner;
      inner = 1;
    }
    const T factor = sums_ ? T(1) : static_cast<T>(1.0 / divisor(rows, correction_));
    T* const to = call.output(0);
    parallel_range(outer, static_cast<double>(rows * inner), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const T* const block = from + i * rows * inner;
        if (inner == 1) {
          to[i] = kernels.sum(block, rows) * factor;
        } else {
          kernels.sum_rows(block, rows, inner, inner, factor, to + i * inner);
        }
      }
    });
  }

  // What a mean of so many elements divides by.
  static double divisor(int64_t elements, double correction) {
    return std::max(0.0, static_cast<double>(elements) - correction);
  }

 private:
  bool sums_;
  double correction_;
};

// The largest element over some dimensions, by torch. `ties` says what backward does where several are the largest:
// "even" shares the gradient among them, "first" gives it to the first.
template <class T>
class AmaxLayer : public ReductionLayer<T> {
 public:
  AmaxLayer(const ProgramLine& line, const Weights<T>&) : ReductionLayer<T>(line) {}
  bool reads_parts() const override { return true; }
  void set_sizes(Site<T>& site) const override {
    const Ints& sizes = site.sizes(0);
    const std::vector<bool> taken = this->which(sizes.size());
    for (size_t d = 0; d < sizes.size(); ++d) {
      FASTNN_CHECK(!taken[d] || sizes[d] > 0, "amax(): Expected reduction dim ", d, " to have non-zero size.");
    }
    ReductionLayer<T>::set_sizes(site);
  }
  void run(const LayerCall<T>& call) const override {
    const ValueType &input = call.site.inputs[0], &output = call.site.outputs[0];
    const Tensor to = tensor_over(call.output(0), output.sizes, output.strides());
    const Tensor from = tensor_over(call.input(0), input.sizes, input.strides());
    stock("aten::amax", "out", from, this->dims(), this->keeps(), to);
  }
};

inline LayerEntry max_pool_entry() {
  return layer_entry<MaxPoolLayer>("max_pool", {"input"},
                                   {{"kernel", "ints", nullptr},
                                    {"stride", "ints", ""},
                                    {"padding", "ints", "0"},
                                    {"dilation", "ints", "1"},
                                    {"ceil_mode", "bool", "0"}});
}
inline LayerEntry avg_pool_entry() {
  return layer_entry<AvgPoolLayer>("avg_pool", {"input"},
                                   {{"kernel", "ints", nullptr},
                                    {"stride", "ints", ""},
                                    {"padding", "ints", "0"},
                                    {"count_include_pad", "bool", "1"}});
}
inline LayerEntry adaptive_avg_pool_entry() {
  return layer_entry<AdaptiveAverageLayer>("adaptive_avg_pool", {"input"}, {{"sizes", "ints", nullptr}});
}
inline LayerEntry amax_entry() {
  return layer_entry<AmaxLayer>(
      "amax", {"input"},
      {{"dims", "ints", ""}, {"keepdim", "bool", "0"}, {"ties", "text", "even"}, {"rank", "int", "0"}});
}
inline LayerEntry cumsum_entry() {
  return layer_entry<CumsumLayer>("cumsum", {"input"}, {{"dim", "int", nullptr}});
}
inline LayerEntry mean_entry() {
  return layer_entry<MeanLayer>("mean", {"input"},
                                {{"dims", "ints", ""},
                                 {"keepdim", "bool", "0"},
                                 {"sums", "bool", "0"},
                                 {"correction", "float", "0"},
                                 {"rank", "int", "0"}});
}

}  // namespace fastnn

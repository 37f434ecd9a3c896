// Runs a chain of linear layers over plain memory: takes scratch, packs panels and uses threads. mlp's operators and
// networks call it.
#pragma once

#include "mlp_chain.h"

namespace fastnn {

// The packed panels of the layers whose weights are worth packing, one layer's after the other.
template <class T>
class Panels {
 public:
  Panels(const MlpKernels<T>& kernels, const Chain& chain, bool in_lanes) : kernels_(kernels) {
    for (int64_t i = 0; i < chain.layers(); ++i) {
      const int64_t in = chain.widths[i], out = chain.widths[i + 1];
      const bool packs = !in_lanes && kernels.worth_packing(chain.rows, in, out);
      sizes_.push_back(packs ? kernels.packed_size(out, in) : 0);
      size_ = checked_sum(size_, sizes_.back());
    }
  }
  int64_t size() const { return size_; }
  // Panels in another core's cache are slower to fetch than to make. So each thread packs for itself what fits into its
  // own cache, and what does not fit is packed once.
  bool shared(int64_t chunks) const { return chunks > 1 && size_ > (1 << 20) / static_cast<int64_t>(sizeof(T)); }

  // Makes the layers read their panels from `memory`.
  void place(T* memory, PerLayer<MlpLayer<T>>& layers) const {
    for (int64_t i = 0; i < layers.size(); ++i) {
      if (sizes_[i] > 0) layers[i].packed = memory;
      memory += sizes_[i];
    }
  }
  // Packs one of `parts` parts of each weight.
  void pack(const PerLayer<MlpLayer<T>>& layers, T* memory, int64_t part, int64_t parts) const {
    for (int64_t i = 0; i < layers.size(); ++i) {
      if (sizes_[i] > 0) kernels_.pack(layers[i].weight, layers[i].out, layers[i].in, part, parts, memory);
      memory += sizes_[i];
    }
  }

 private:
  const MlpKernels<T>& kernels_;
  PerLayer<int64_t> sizes_;
  int64_t size_ = 0;
};

// Bytes of a weight that a member of a team reads in a round. That takes a microsecond, several times what the member
// waits for the others.
constexpr int64_t kBytesEach = 64 << 10;

// How many threads share the weights of a chain of few rows. `times` is how often each weight is gone through. With up
// to some 6 rows, reading a weight takes as long as 12 operations; a second thread pays from some 10 microseconds on.
inline int64_t team_size(const Chain& chain, double times) {
  const double parts = chain.weights() * sizeof(float) / static_cast<double>(kBytesEach * chain.layers());
  const int64_t most = std::max<int64_t>(1, std::min<int64_t>(Team::kMost, static_cast<int64_t>(parts)));
  return std::min(most, useful_threads(times * std::max(chain.work, 12 * chain.weights()) / 5));
}

// Runs all layers into `output` (rows, out). saved: where each layer saves (rows, its out) for backward, or null for
// a layer that saves nothing; or empty.
template <class T>
void run_forward(const MlpCall& call, T* output, const PerLayer<T*>& saved) {
  const MlpKernels<T>& kernels = mlp_kernels().get<T>();
  const Chain& chain = call.chain;
  bool saves = false;
  for (int64_t i = 0; i < saved.size(); ++i) saves = saves || (saved[i] && chain.rows * chain.widths[i + 1] > 0);
  // There may be any number of rows without features, since they take no memory.
  if (chain.widths.back() == 0 && !saves) return;
  const MlpPlan plan = kernels.make_plan(chain.widths.data(), chain.layers(), chain.rows);
  const int64_t units = (chain.rows + plan.unit - 1) / plan.unit;
  const int64_t chunks = plan.together ? 1 : std::min(useful_threads(chain.work), units);
  const Panels<T> panels(kernels, chain, plan.in_lanes);
  const bool shared = panels.shared(chunks);
  const int64_t block_size = kernels.scratch_size(chain.widest());
  const int64_t chunk_size = checked_sum(block_size, shared ? 0 : panels.size());
  Scratch<T> scratch(checked_sum(checked_product(chunks, chunk_size), shared ? panels.size() : 0));

  KernelInputs inputs(chain.kind.dtype);
  const T* input = inputs.data<T>(call.input);
  PerLayer<MlpLayer<T>> layers;
  for (int64_t i = 0; i < chain.layers(); ++i) {
    const T* weight = inputs.data<T>(call.weight(i));
    const T* bias = call.has_biases() ? inputs.data<T>(call.bias(i)) : nullptr;
    layers.push_back({weight, bias, chain.widths[i], chain.widths[i + 1], call.activations[i], nullptr,
                      saved.size() > 0 ? saved[i] : nullptr});
  }
  if (plan.together) {
    const int64_t members = team_size(chain, 1);
    return parallel_team(members, chain.work, 1, [&](Member& member) {
      kernels.forward_together(layers.data(), layers.size(), input, output, chain.rows, members * kBytesEach,
                               scratch.get(), member);
    });
  }
  if (shared) {
    T* const memory = scratch.get() + chunks * chunk_size;
    panels.place(memory, layers);
    parallel_chunks(chunks, chunks,
                    [&](int64_t chunk, int64_t, int64_t) { panels.pack(layers, memory, chunk, chunks); });
  }
  parallel_chunks(chunks, units, [&](int64_t chunk, int64_t first, int64_t last) {
    T* const block = scratch.get() + chunk * chunk_size;
    PerLayer<MlpLayer<T>> own = layers;
    if (!shared) {
      panels.place(block + block_size, own);
      panels.pack(own, block + block_size, 0, 1);
    }
    kernels.forward(own.data(), own.size(), plan.in_lanes, input, output, first * plan.unit,
                    std::min(last * plan.unit, chain.rows), block);
  });
}

// grad_output (rows, out) -> grad_input (rows, in), or null, and the gradients of the parameters for which `layers`
// have a place. If there are several threads, each has a private part; the parts are added up in the order of their
// rows. The first thread's part is the place itself.
template <class T>
void run_backward(const Chain& chain, const PerLayer<MlpLayerBackward<T>>& layers, const T* grad_output,
                  T* grad_input) {
  const MlpKernels<T>& kernels = mlp_kernels().get<T>();
  const int64_t rows = chain.widths.back() > 0 ? chain.rows : 0;  // rows that have a gradient
  struct Part {
    T* place;
    int64_t count, offset;  // from the start of the parts of one thread
  };
  std::array<Part, 2 * (kMostLayers + 1)> parts;
  size_t number = 0;
  int64_t parts_size = 0;
  const auto add_part = [&](T* place, int64_t count) {
    if (!place) return;
    parts[number++] = {place, count, parts_size};
    parts_size = checked_sum(parts_size, count);
  };
  for (const MlpLayerBackward<T>& layer : layers) {
    add_part(layer.grad_weight, layer.out * layer.in);
    add_part(layer.grad_bias, layer.out);
  }
  if (rows == 0) {
    if (grad_input) std::fill_n(grad_input, chain.rows * chain.widths[0], T(0));
    for (size_t i = 0; i < number; ++i) std::fill_n(parts[i].place, parts[i].count, T(0));
    return;
  }
  const bool together = rows <= kernels.few_rows;
  const int64_t chunks = together ? 1 : std::max<int64_t>(1, std::min(useful_threads(2 * chain.work), rows));
  const int64_t block_size = kernels.backward_scratch_size(chain.widest());
  const int64_t chunk_size = checked_sum(block_size, chain.outputs());
  Scratch<T> scratch(checked_sum(checked_product(chunks, chunk_size), checked_product(chunks - 1, parts_size)));
  const auto part_of = [&](int64_t chunk, const Part& part) {
    return chunk == 0 ? part.place : scratch.get() + chunks * chunk_size + (chunk - 1) * parts_size + part.offset;
  };
  const auto run_chunk = [&](int64_t chunk, int64_t first, int64_t last, Member& member) {
    PerLayer<MlpLayerBackward<T>> own = layers;
    T* const block = scratch.get() + chunk * chunk_size;
    T* lost = block + block_size;
    const Part* part = parts.data();
    for (int64_t i = 0; i < own.size(); ++i) {
      own[i].lost = lost;
      lost += own[i].out;
      if (own[i].grad_weight) own[i].grad_weight = part_of(chunk, *part++);
      if (own[i].grad_bias) own[i].grad_bias = part_of(chunk, *part++);
    }
    kernels.backward(own.data(), chain.layers(), grad_output, grad_input, first, last, block, member);
  };
  if (together) {
    return parallel_team(team_size(chain, 3), 3 * chain.work, 1,
                         [&](Member& member) { run_chunk(0, 0, rows, member); });
  }
  parallel_chunks(chunks, rows, [&](int64_t chunk, int64_t first, int64_t last) {
    Member alone;
    run_chunk(chunk, first, last, alone);
  });
  // The threads' parts are added up by as many threads, if that is worth waking them.
  const int64_t pieces = chunks == 1 ? 0 : std::min(chunks, useful_threads(4 * chain.weights()));
  parallel_chunks(pieces, pieces, [&](int64_t piece, int64_t, int64_t) {
    for (size_t i = 0; i < number; ++i) {
      T* const to = parts[i].place;
      const int64_t first = parts[i].count * piece / pieces, last = parts[i].count * (piece + 1) / pieces;
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        const T* const from = part_of(chunk, parts[i]);
        for (int64_t j = first; j < last; ++j) to[j] += from[j];
      }
    }
  });
}

// The layers as backward reads them, without places for gradients. saved: for each layer what run_forward saved, or the
// output.
template <class T>
PerLayer<MlpLayerBackward<T>> backward_layers(const Chain& chain, const Activations& activations, const T* input,
                                              const PerLayer<const T*>& weights, const PerLayer<const T*>& saved) {
  PerLayer<MlpLayerBackward<T>> layers;
  for (int64_t i = 0; i < chain.layers(); ++i) {
    layers.push_back(
        {weights[i], input, saved[i], chain.widths[i], chain.widths[i + 1], activations[i], nullptr, nullptr, nullptr});
    input = saves_input(activations[i]) ? nullptr : saved[i];
  }
  return layers;
}

}  // namespace fastnn

// Backward of large recurrent layers. Our kernels go through the steps. The gradients of the weights and of the layer's
// input follow for all rows at once, by products of matrices.
#pragma once

#include <array>

#include "product.h"
#include "rnn_problem.h"
#include "rnn_threads.h"

namespace fastnn {

// Neighbouring gates in the order in which torch stacks their weights: the `count` gates from `gate` on are the
// kernels' slots from `slot` on.
struct GateRun {
  int64_t slot, gate, count;
};
// The gates of x W_ih^T. GRU's slots are n, r, z, and the hidden half of n.
inline std::array<GateRun, 2> input_gates_of(RnnMode mode) {
  if (mode == RnnMode::gru) return {GateRun{1, 0, 2}, GateRun{0, 2, 1}};
  return {GateRun{0, 0, entry_of(mode).gates}, GateRun{0, 0, 0}};
}
// The gates of h W_hh^T.
inline GateRun hidden_gates_of(RnnMode mode) {
  return {mode == RnnMode::gru ? 1 : 0, 0, entry_of(mode).gates};
}

// Whether products of all rows pay. With few sequences nearly all the time goes into the steps.
inline bool has_large_products(const RnnProblem& problem) {
  constexpr int64_t kSequences = 8;
  return problem.kind.dtype != ScalarType::BFloat16 && problem.projected == 0 && problem.batch >= kSequences &&
         is_large_product(problem.rows, problem.hidden, entry_of(problem.mode).gates * problem.hidden);
}

// The gradients of one direction of one layer from those of its gates, `gates` (rows, slots * hidden).
template <class T>
class LayerProducts {
 public:
  LayerProducts(const RnnProblem& problem, int64_t index, const T* gates)
      : problem_(problem), index_(index), gates_(gates), inputs_(problem.input_size_of(index)) {}

  // weights: as the layer has them. inputs (rows, input_size), previous (rows, hidden): what RnnBackwardKernels gathers
  void weights(const T* inputs, const T* previous, const Tensor* weights) const {
    for (const GateRun& run : input_gates_of(problem_.mode)) {
      if (run.count > 0) multiply_gates(run, inputs, inputs_, weights[0]);
    }
    multiply_gates(hidden_gates_of(problem_.mode), previous, problem_.hidden, weights[1]);
    if (problem_.has_biases()) biases(mutable_data<T>(weights[2]), mutable_data<T>(weights[3]));
  }

  // product (rows, input_size) <- the gates' gradients times weight_ih
  void input(T* product) const {
    const T* weight = data<T>(problem_.weights[index_ * problem_.weights_each]);
    const int64_t hidden = problem_.hidden, size = hidden * inputs_;
    const auto runs = input_gates_of(problem_.mode);
    const Scratch<T> ordered(runs[1].count > 0 ? checked_product(entry_of(problem_.mode).gates, size) : 0);
    if (runs[1].count > 0) {  // copies the weight's rows into the order of the slots
      for (const GateRun& run : runs) {
        std::copy_n(weight + run.gate * size, run.count * size, ordered.get() + run.slot * size);
      }
      weight = ordered.get();
    }
    const int64_t columns = entry_of(problem_.mode).gates * hidden;
    multiply<T>({gates_, problem_.rows, columns, stride()}, {weight, columns, inputs_},
                {product, problem_.rows, inputs_});
  }

 private:
  int64_t stride() const { return entry_of(problem_.mode).slots * problem_.hidden; }

  // The rows of those gates in a weight's gradient.
  void multiply_gates(const GateRun& run, const T* factor, int64_t columns, const Tensor& gradient) const {
    const int64_t hidden = problem_.hidden, count = run.count * hidden;
    const Matrix<const T> gates(gates_ + run.slot * hidden, problem_.rows, count, stride());
    multiply<T>(gates.transposed(), {factor, problem_.rows, columns},
                {mutable_data<T>(gradient) + run.gate * hidden * columns, count, columns});
  }

  void biases(T* bias_ih, T* bias_hh) const {
    const int64_t hidden = problem_.hidden;
    const Scratch<T> sums(stride());
    sum_rows(gates_, problem_.rows, stride(), sums.get());
    const auto copy = [&](const GateRun& run, T* to) {
      std::copy_n(sums.get() + run.slot * hidden, run.count * hidden, to + run.gate * hidden);
    };
    for (const GateRun& run : input_gates_of(problem_.mode)) copy(run, bias_ih);
    copy(hidden_gates_of(problem_.mode), bias_hh);
  }

  const RnnProblem& problem_;
  const int64_t index_;
  const T* const gates_;
  const int64_t inputs_;
};

// weights: the gradients of all weights, or empty where none is wanted. The network has its memory already.
template <class T>
void backward_by_products(const RnnProblem& problem, RnnCall<T>& network, const RnnGradients<T>& gradients,
                          const TensorList& weights) {
  const RnnBackwardKernels<T>& kernels = rnn_backward_kernels().get<T>();
  const double work = problem.work();
  const int64_t rows = problem.rows, width = problem.width();
  const int64_t members = team_members(network), chunks = members > 1 ? 1 : rnn_chunks(work, problem.batch);
  const std::vector<int64_t> bounds = split_sequences(network, chunks);
  const RnnScratchSize each = kernels.scratch_size(network, longest_chunk(bounds));
  const int64_t widest = std::max(problem.input_size, problem.layers > 1 ? width : 0);
  const int64_t gates_size = checked_product(rows, entry_of(problem.mode).slots * problem.hidden);
  const int64_t inputs_size = checked_product(rows, widest), layer_size = checked_product(rows, width);
  const Scratch<T> packed(network.packed_size(kernels)), gates(gates_size), inputs(inputs_size),
      previous(checked_product(rows, problem.hidden)), grads(problem.layers > 1 ? checked_product(2, layer_size) : 0),
      own(checked_sum(checked_product(chunks, each.shared), checked_product(std::max(chunks, members), each.own)));
  network.place(kernels, packed.get());
  const auto steps = [&](int64_t layer, int64_t direction, const T* grad_output, int64_t chunk, Member& member) {
    T* const shared = own.get() + chunk * (each.shared + each.own);
    kernels.run_steps(network, gradients, layer, direction, grad_output, gates.get(), bounds[chunk], bounds[chunk + 1],
                      member, {shared, shared + each.shared + member.index() * each.own});
  };
  // In parts of all steps, if `elements` a row are worth it.
  const auto for_steps = [&](int64_t elements, const auto& body) {
    parallel_range(network.steps, static_cast<double>(rows / network.steps * elements), body);
  };
  for (int64_t layer = problem.layers - 1; layer >= 0; --layer) {
    const bool is_top = layer == problem.layers - 1;
    const T* const grad_output = is_top ? nullptr : grads.get() + (layer + 1) % 2 * layer_size;
    T* const grad_below = layer > 0 ? grads.get() + layer % 2 * layer_size : nullptr;
    for (int64_t direction = 0; direction < problem.directions; ++direction) {
      const int64_t index = layer * problem.directions + direction, columns = problem.input_size_of(index);
      const RnnWeights<T>& own_weights = network.weights[index];
      T* const packed_weights = const_cast<T*>(own_weights.packed);
      if (members > 1) {
        parallel_steps(network, members, work / problem.count(), [&](Member& member) {
          kernels.pack_hidden(network, own_weights, member, packed_weights);
          member.end_round();
          steps(layer, direction, grad_output, 0, member);
        });
      } else {
        kernels.pack_hidden(network, own_weights, Member(), packed_weights);
        parallel_chunks(chunks, chunks, [&](int64_t chunk, int64_t, int64_t) {
          Member itself;
          steps(layer, direction, grad_output, chunk, itself);
        });
      }
      const LayerProducts<T> products(problem, index, gates.get());
      if (!weights.empty()) {
        for_steps(columns + problem.hidden, [&](int64_t first, int64_t last) {
          kernels.gather(network, layer, direction, first, last, inputs.get(), previous.get());
        });
        products.weights(inputs.get(), previous.get(), &weights[index * problem.weights_each]);
      }
      if (layer > 0 || gradients.grad_input) {
        products.input(inputs.get());
        for_steps(columns, [&](int64_t first, int64_t last) {
          kernels.pass_down(network, gradients, layer, direction, first, last, inputs.get(), grad_below);
        });
      }
    }
  }
}

}  // namespace fastnn

// The table of layers that can be trained. A layer that only trains has its row of inputs and attributes here, too.
#pragma once

#include "conv_transpose.h"
#include "elementwise.h"
#include "products.h"
#include "reductions.h"
#include "shape.h"

namespace fastnn {

template <template <class> class Kind, class T>
std::unique_ptr<TrainingLayer<T>> make_training(const ProgramLine& line) {
  return std::make_unique<Kind<T>>(line);
}

// Raises where the line's layer cannot be trained.
template <class T>
std::unique_ptr<TrainingLayer<T>> training_layer(const ProgramLine& line) {
  static constexpr std::pair<std::string_view, std::unique_ptr<TrainingLayer<T>> (*)(const ProgramLine&)> makers[] = {
      {"conv", make_training<ConvTraining, T>},
      {"conv_transpose", make_training<ConvTransposeTraining, T>},
      {"batch_norm", make_training<BatchNormTraining, T>},
      {"linear", make_training<LinearTraining, T>},
      {"rnn", make_training<RnnTraining, T>},
      {"embedding", make_training<EmbeddingTraining, T>},
      {"pick", make_training<PickTraining, T>},
      {"gather_rows", make_training<GatherRowsTraining, T>},
      {"add_rows", make_training<AddRowsTraining, T>},
      {"activation", make_training<ActivationTraining, T>},
      {"clamp", make_training<ClampTraining, T>},
      {"unary", make_training<FunctionTraining, T>},
      {"prelu", make_training<PreluTraining, T>},
      {"binary", make_training<BinaryTraining, T>},
      {"where", make_training<WhereTraining, T>},
      {"lerp", make_training<LerpTraining, T>},
      {"binary_cross_entropy", make_training<BinaryCrossEntropyTraining, T>},
      {"dropout", make_training<DropoutTraining, T>},
      {"noise", make_training<NoiseTraining, T>},
      {"softmax", make_training<SoftmaxTraining, T>},
      {"layer_norm", make_training<LayerNormTraining, T>},
      {"group_norm", make_training<GroupNormTraining, T>},
      {"amax", make_training<AmaxTraining, T>},
      {"mean", make_training<MeanTraining, T>},
      {"cumsum", make_training<CumsumTraining, T>},
      {"max_pool", make_training<MaxPoolTraining, T>},
      {"avg_pool", make_training<AvgPoolTraining, T>},
      {"adaptive_avg_pool", make_training<AdaptiveAverageTraining, T>},
      {"upsample", make_training<UpsampleTraining, T>},
      {"matmul", make_training<MatmulTraining, T>},
      {"attention", make_training<AttentionTraining, T>},
      {"reshape", make_training<ReshapeTraining, T>},
      {"expand", make_training<ExpandTraining, T>},
      {"repeat", make_training<RepeatTraining, T>},
      {"full", make_training<FullTraining, T>},
      {"size", make_training<SizeTraining, T>},
      {"flatten", make_training<FlattenTraining, T>},
      {"unflatten", make_training<UnflattenTraining, T>},
      {"squeeze", make_training<SqueezeTraining, T>},
      {"unsqueeze", make_training<UnsqueezeTraining, T>},
      {"permute", make_training<PermuteTraining, T>},
      {"transpose", make_training<TransposeTraining, T>},
      {"contiguous", make_training<ContiguousTraining, T>},
      {"detach", make_training<DetachTraining, T>},
      {"check_sizes", make_training<CheckSizesTraining, T>},
      {"select", make_training<SelectTraining, T>},
      {"slice", make_training<SliceTraining, T>},
      {"split", make_training<SplitTraining, T>},
      {"cat", make_training<CatTraining, T>},
      {"pad", make_training<PadTraining, T>},
      {"index_select", make_training<IndexSelectTraining, T>},
      {"flip", make_training<FlipTraining, T>},
      {"roll", make_training<RollTraining, T>},
      {"channel_shuffle", make_training<ChannelShuffleTraining, T>},
      {"border", make_training<BorderTraining, T>},
      {"windows", make_training<WindowsTraining, T>},
  };
  for (const auto& [name, make] : makers) {
    if (line.layer == name) return make(line);
  }
  line.refuse("it cannot be trained");
}

// The rows of the layers that only training has.
inline std::vector<LayerEntry> training_entries() {
  const auto entry = [](const char* name, std::vector<const char*> inputs, std::vector<AttributeEntry> attributes) {
    attributes.push_back({nullptr, nullptr, nullptr});
    return LayerEntry{name, std::move(inputs), std::move(attributes), nullptr, nullptr};
  };
  return {
      entry("dropout", {"input"}, {{"p", "float", nullptr}, {"channels_of", "int", "0"}}),
      entry("noise", {"like*"},
            {{"sizes", "ints", ""}, {"keeps", "int", "-1"}, {"distribution", "text", "normal"}, {"p", "float", "0.5"}}),
  };
}

}  // namespace fastnn

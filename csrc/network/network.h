// A network: its program, read and bound to weights.
#pragma once

#include <limits>

#include "fold.h"
#include "layer_table.h"
#include "layers/reformat.h"

namespace fastnn {

// The sizes that an input may have, and its kind.
struct NetworkInput {
  struct Range {
    int64_t least, most;

    std::string words() const {
      if (least == most) return std::to_string(least);
      const bool limited = most != std::numeric_limits<int64_t>::max();
      if (least == 0 && !limited) return "any";
      return std::to_string(least) + (limited ? " to " + std::to_string(most) : " or more");
    }
  };
  int64_t value;
  std::vector<Range> ranges;
  ElementKind elements;

  // sizes=3,0:,2:10 and the like: a number, or the least and the most that it may be.
  explicit NetworkInput(const ProgramLine& line) {
    constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
    value = line.outputs[0];
    for (const std::string_view part : line.parts("sizes")) {
      const size_t colon = part.find(':');
      const auto number = [&](std::string_view text, int64_t other) {
        return text.empty() ? other : line.to_integer(text, "sizes", 0, kAny);
      };
      const int64_t least = number(part.substr(0, colon), 0);
      ranges.push_back({least, colon == std::string_view::npos ? least : number(part.substr(colon + 1), kAny)});
    }
    elements = elements_of(line);
  }

  // number: which of the network's inputs this is.
  void check(const Sizes& sizes, size_t number) const {
    bool fits = sizes.size() == ranges.size();
    for (size_t i = 0; fits && i < ranges.size(); ++i) {
      fits = ranges[i].least <= sizes[i] && sizes[i] <= ranges[i].most;
    }
    if (fits) return;
    std::vector<std::string> expected;
    for (const Range& range : ranges) expected.push_back(range.words());
    fail("network: expected an input of size ", to_string(expected), ", got ", to_string(sizes),
         number > 0 ? " as input " + std::to_string(number) : "");
  }
};

// A dense tensor of weights: where it lies, and of what size it is.
template <class T>
struct WeightPiece {
  const T* data;
  Ints sizes;

  explicit WeightPiece(const Tensor& tensor) : data(fastnn::data<T>(tensor)) {
    const Sizes all = tensor.sizes();
    sizes.assign(all.begin(), all.end());
  }
  bool is(const Tensor& tensor) const {
    const Sizes all = tensor.sizes();
    return data == fastnn::data<T>(tensor) && sizes.size() == all.size() &&
           std::equal(sizes.begin(), sizes.end(), all.begin());
  }
};

template <class T>
class Network {
 public:
  struct Step {
    std::unique_ptr<Layer<T>> layer;
    int64_t line;  // the number of its line in the program
    std::string name;
  };
  std::vector<NetworkInput> inputs;
  std::vector<int64_t> outputs;
  std::vector<Step> steps;
  Weights<T> weights;
  std::vector<Fold<T>> folds;  // weights that each call computes
  size_t values;               // the number of values

  // pieces: the weights in the program's order; if `joined`, one piece that has all weights one behind the other, which
  // are packed ahead of the calls.
  Network(const std::string& text, const std::vector<WeightPiece<T>>& pieces, bool joined) {
    const Program program(text);
    weights.are_packed = joined;
    values = program.values.size();
    size_t next = 0;
    int64_t used = 0;  // elements of the one piece
    std::vector<bool> is_set(values);
    for (ProgramLine line : program.lines) {
      if (line.layer == "input") {
        check_source_line(line, kInputEntries);
        inputs.emplace_back(line);
      } else if (line.layer == "weight") {
        check_source_line(line, kWeightEntries);
        const Ints sizes = line.integers("sizes", 0, int64_t{1} << 40);
        FASTNN_CHECK(next < pieces.size(), "network: the program asks for more weights than there are");
        const WeightPiece<T>& piece = pieces[next];
        const int64_t count = product(sizes, 0, sizes.size());
        if (joined) {
          FASTNN_CHECK(count <= piece.sizes[0] - used, "network: the program asks for more weights than there are");
          weights.add(line.outputs[0], piece.data + used, sizes);
          used += count;
        } else {
          FASTNN_CHECK(piece.sizes == sizes, "network: expected weight ", next, " of size ", to_string(sizes), ", got ",
                       to_string(piece.sizes));
          weights.add(line.outputs[0], piece.data, sizes);
          ++next;
        }
      } else if (line.layer == "output") {
        if (!outputs.empty()) line.refuse("a program has one line of outputs");
        if (!line.outputs.empty() || !line.attributes.empty() || line.inputs.size() > 1)
          line.refuse("it has inputs alone");
        const auto found = line.inputs.find("input");
        if (found == line.inputs.end()) line.refuse("expected input=...");
        outputs = found->second;
        for (const int64_t output : outputs) {
          if (weights.holds(output)) line.refuse("a weight is no output");
        }
      } else if (line.layer == "fold") {
        check_layer_line(line);
        folds.emplace_back(line, weights);
      } else {
        add_layer(line);
      }
    }
    FASTNN_CHECK(!outputs.empty() && !steps.empty() && !inputs.empty(),
                 "network: expected at least one input, one layer and one output");
    FASTNN_CHECK(joined ? used == pieces[0].sizes[0] : next == pieces.size(),
                 "network: there are more weights than the program asks for");
    join_chains();
    let_inputs_change_format();
  }

 private:
  // Puts a change of format behind each input of images. It costs nothing where the plan keeps the format.
  void let_inputs_change_format() {
    std::vector<Step> changes;
    for (const NetworkInput& input : inputs) {
      if (input.ranges.size() < 3 || input.elements != ElementKind::numbers) continue;
      const int64_t changed = static_cast<int64_t>(values++);
      for (Step& step : steps) {
        Layer<T>& layer = *step.layer;
        if (layer.formats() == FormatRule::contiguous) continue;
        std::replace(layer.inputs.begin(), layer.inputs.end(), input.value, changed);
      }
      changes.push_back({std::make_unique<ReformatLayer<T>>(input.value, changed), 0, "reformat"});
    }
    steps.insert(steps.begin(), std::make_move_iterator(changes.begin()), std::make_move_iterator(changes.end()));
  }

  void add_layer(ProgramLine& line) {
    const LayerEntry& entry = check_layer_line(line);
    if (!entry.make_float) line.refuse("it is a layer of training alone");
    if (line.outputs.empty()) line.refuse("expected to give a value");
    if (line.outputs.size() > 1 && line.layer != "rnn" && line.layer != "split") {
      line.refuse("it gives one value");
    }
    std::unique_ptr<Layer<T>> layer;
    if constexpr (sizeof(T) == sizeof(double)) {
      layer = entry.make_double(line, weights);
    } else {
      layer = entry.make_float(line, weights);
    }
    layer->outputs = line.outputs;
    steps.push_back({std::move(layer), line.number, line.layer});
  }

  // Lets layers take over the work of the layers behind them, where they can.
  void join_chains() {
    std::vector<int64_t> uses(values);
    for (const Step& step : steps) {
      for (const int64_t input : step.layer->inputs) ++uses[static_cast<size_t>(input)];
    }
    for (const int64_t output : outputs) ++uses[static_cast<size_t>(output)];
    std::vector<Step> kept;
    std::vector<size_t> maker(values, SIZE_MAX);  // for each value, the kept step that makes it
    for (Step& step : steps) {
      Layer<T>& layer = *step.layer;
      if (layer.inputs.size() == 1 && layer.outputs.size() == 1 && uses[static_cast<size_t>(layer.inputs[0])] == 1) {
        const size_t before = maker[static_cast<size_t>(layer.inputs[0])];
        if (before != SIZE_MAX && kept[before].layer->outputs.size() == 1 && kept[before].layer->absorb(layer)) {
          kept[before].layer->outputs = layer.outputs;
          maker[static_cast<size_t>(layer.outputs[0])] = before;
          continue;
        }
      }
      for (const int64_t output : layer.outputs) maker[static_cast<size_t>(output)] = kept.size();
      kept.push_back(std::move(step));
    }
    steps = std::move(kept);
  }
};

}  // namespace fastnn

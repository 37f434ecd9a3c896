// A plan is all that follows from a network and its inputs' sizes: each value's sizes, its format, and its place in
// memory.
#pragma once

#include "network.h"

namespace fastnn {

// Where a value's elements are found at a call.
struct Place {
  enum Kind : int8_t { nowhere, input, output, weight, memory } kind = nowhere;
  int64_t index = 0;   // which input, output or weight it is
  int64_t offset = 0;  // in the memory between layers, or in the input, output or weight, in elements
};

// The sizes of a network's input, and the format in which its elements lie.
struct InputShape {
  Ints sizes;
  Format format = Format::contiguous;
};

template <class T>
class Plan {
 public:
  std::vector<ValueType> values;
  std::vector<Place> places;
  std::vector<Site<T>> sites;  // one a step of the network
  int64_t memory = 0;          // elements between layers
  std::vector<char> is_idle;   // of each step, whether it has nothing to compute or is a view
  std::vector<bool> copied;    // for each output, whether it lies elsewhere and must be copied

  // inputs: the sizes of each, and the format in which it is given. A layer may need the other format; then the plan
  // says so in the input's `values`, and the caller has to give a copy.
  Plan(const Network<T>& network, const std::vector<InputShape>& inputs, const Kernels<T>& kernels)
      : network_(network) {
    set_sizes(inputs, kernels);
    set_formats(inputs);
    set_parts();
    for (size_t i = 0; i < sites.size(); ++i) {
      is_idle.push_back(sites[i].is_empty() || network.steps[i].layer->is_view(sites[i]));
    }
    set_read_parts();
    for (size_t i = 0; i < sites.size(); ++i) {
      if (!is_idle[i]) sites[i].prepared = network.steps[i].layer->prepare(sites[i]);
    }
    set_places();
  }

  void pack(PackedWriter& packed) const {
    for (size_t i = 0; i < sites.size(); ++i) {
      packed.begin_step(i);
      if (!is_idle[i]) network_.steps[i].layer->pack(sites[i], packed);
    }
  }

 private:
  const Network<T>& network_;

  static size_t at(int64_t value) { return static_cast<size_t>(value); }

  void set_sizes(const std::vector<InputShape>& inputs, const Kernels<T>& kernels) {
    values.resize(network_.values);
    for (size_t i = 0; i < inputs.size(); ++i) {
      values[at(network_.inputs[i].value)] = {inputs[i].sizes, Format::contiguous, network_.inputs[i].elements};
    }
    for (size_t value = 0; value < values.size(); ++value) {
      if (network_.weights.holds(static_cast<int64_t>(value))) {
        values[value].sizes = network_.weights[static_cast<int64_t>(value)].sizes;
      }
    }
    for (const auto& step : network_.steps) {
      Site<T> site;
      site.kernels = kernels;
      for (const int64_t input : step.layer->inputs) site.inputs.push_back(values[at(input)]);
      site.outputs.resize(step.layer->outputs.size());
      const size_t read = site.inputs.size() - step.layer->sizes_only;
      try {
        for (size_t i = 0; i < read; ++i) {
          FASTNN_CHECK(site.inputs[i].elements == ElementKind::numbers || step.layer->takes_other_elements(),
                       "expected a floating-point input");
        }
        step.layer->set_sizes(site);
        for (const ValueType& output : site.outputs) {
          FASTNN_CHECK(output.sizes.size() <= 16, "a value of more than 16 dimensions");
          for (const int64_t size : output.sizes) FASTNN_CHECK(size >= 0, "a value of size ", to_string(output.sizes));
          checked_product(output.count(), sizeof(T));
        }
      } catch (const std::runtime_error& error) {
        std::string sizes;
        for (const InputShape& input : inputs) sizes += (sizes.empty() ? "" : ", ") + to_string(input.sizes);
        fail("network: an input of size ", sizes, " does not fit the network: line ", step.line, ", ", step.name, ": ",
             error.what());
      }
      for (size_t i = 0; i < site.outputs.size(); ++i) values[at(step.layer->outputs[i])] = site.outputs[i];
      sites.push_back(std::move(site));
    }
  }

  // ---- formats ---- Values that must have the same format are a group. A group of images is contiguous or channels
  // last, whichever costs less. One group after another takes the better format, until no group changes. An input that
  // is given channels last is taken so, if its group may be.

  std::vector<size_t> group_;

  size_t group_of(size_t value) {
    while (group_[value] != value) value = group_[value] = group_[group_[value]];
    return value;
  }

  void set_formats(const std::vector<InputShape>& inputs) {
    group_.resize(values.size());
    for (size_t value = 0; value < values.size(); ++value) group_[value] = value;
    std::vector<bool> is_fixed(values.size());
    const auto fix = [&](int64_t value) { is_fixed[at(value)] = true; };
    const auto tie = [&](int64_t one, int64_t other) {
      if (is_same_order(values[at(one)].sizes) || is_same_order(values[at(other)].sizes)) return;
      if (values[at(one)].sizes.size() != values[at(other)].sizes.size()) return fix(one), fix(other);
      group_[group_of(at(one))] = group_of(at(other));
    };
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (inputs[i].format == Format::contiguous) fix(network_.inputs[i].value);
    }
    for (const int64_t output : network_.outputs) fix(output);
    for (size_t value = 0; value < values.size(); ++value) {
      if (network_.weights.holds(static_cast<int64_t>(value))) fix(static_cast<int64_t>(value));
    }
    for (const auto& step : network_.steps) {
      const Layer<T>& layer = *step.layer;
      const size_t read = layer.inputs.size() - layer.sizes_only;
      const FormatRule rule = layer.formats();
      for (size_t i = 0; i < read + layer.outputs.size(); ++i) {
        const int64_t value = i < read ? layer.inputs[i] : layer.outputs[i - read];
        if (rule == FormatRule::contiguous || (rule == FormatRule::input && i > 0)) fix(value);
        if (rule == FormatRule::alike) tie(value, layer.outputs[0]);
        if (rule == FormatRule::each && i > 0 && i < read) tie(value, layer.outputs[0]);
      }
    }
    std::vector<bool> group_is_fixed(values.size());
    for (size_t value = 0; value < values.size(); ++value) {
      if (is_fixed[value] && !is_same_order(values[value].sizes)) group_is_fixed[group_of(value)] = true;
    }
    std::vector<Format> formats(values.size(), Format::contiguous);
    for (size_t i = 0; i < inputs.size(); ++i) {
      const size_t group = group_of(at(network_.inputs[i].value));
      if (inputs[i].format == Format::contiguous || group_is_fixed[group]) continue;
      formats[group] = Format::channels_last;
    }
    std::vector<size_t> free;
    for (size_t value = 0; value < values.size(); ++value) {
      if (group_of(value) == value && !group_is_fixed[value] && formats[value] == Format::contiguous &&
          !is_same_order(values[value].sizes)) {
        free.push_back(value);
      }
    }
    choose_formats(free, formats);
  }

  void apply(const std::vector<Format>& formats) {
    for (size_t value = 0; value < values.size(); ++value) {
      values[value].format = is_same_order(values[value].sizes) ? Format::contiguous : formats[group_of(value)];
    }
    for (size_t i = 0; i < sites.size(); ++i) {
      const Layer<T>& layer = *network_.steps[i].layer;
      for (size_t k = 0; k < layer.inputs.size(); ++k) sites[i].inputs[k].format = values[at(layer.inputs[k])].format;
      for (size_t k = 0; k < layer.outputs.size(); ++k) {
        sites[i].outputs[k].format = values[at(layer.outputs[k])].format;
      }
    }
  }

  // free: the groups whose formats are chosen here. formats: the format of each group; groups that are not in `free`
  // keep theirs.
  void choose_formats(const std::vector<size_t>& free, std::vector<Format> formats) {
    if (free.empty()) return apply(formats);
    std::vector<std::vector<size_t>> touching(values.size());  // the steps that depend on a group's format
    for (size_t i = 0; i < sites.size(); ++i) {
      const Layer<T>& layer = *network_.steps[i].layer;
      if (layer.formats() == FormatRule::contiguous) continue;
      for (const auto* some : {&layer.inputs, &layer.outputs}) {
        for (const int64_t value : *some) {
          std::vector<size_t>& steps = touching[group_of(at(value))];
          if (steps.empty() || steps.back() != i) steps.push_back(i);
        }
      }
    }
    std::map<std::pair<size_t, int>, double> known;  // costs, by step and formats of the first input and output
    const auto cost_of = [&](size_t step) {
      Site<T>& site = sites[step];
      const Layer<T>& layer = *network_.steps[step].layer;
      const auto format_of = [&](int64_t value) {
        return is_same_order(values[at(value)].sizes) ? Format::contiguous : formats[group_of(at(value))];
      };
      for (size_t k = 0; k < layer.inputs.size(); ++k) site.inputs[k].format = format_of(layer.inputs[k]);
      for (size_t k = 0; k < layer.outputs.size(); ++k) site.outputs[k].format = format_of(layer.outputs[k]);
      const bool takes_last = !site.inputs.empty() && site.inputs[0].channels_last();
      const int key = takes_last * 2 + site.outputs[0].channels_last();
      const auto [entry, is_new] = known.try_emplace({step, key}, 0.0);
      if (is_new && !site.is_empty()) entry->second = layer.cost(site);
      return entry->second;
    };
    const auto total = [&] {
      double sum = 0;
      for (size_t i = 0; i < sites.size(); ++i) {
        if (network_.steps[i].layer->formats() != FormatRule::contiguous) sum += cost_of(i);
      }
      return sum;
    };
    const auto improve = [&] {
      for (int round = 0; round < 4; ++round) {
        bool changes = false;
        for (const size_t group : free) {
          const Format before = formats[group];
          double costs[2];
          for (const Format format : {Format::contiguous, Format::channels_last}) {
            formats[group] = format;
            double& sum = costs[static_cast<int>(format)];
            sum = 0;
            for (const size_t step : touching[group]) sum += cost_of(step);
          }
          formats[group] = costs[1] < costs[0] ? Format::channels_last : Format::contiguous;
          changes = changes || formats[group] != before;
        }
        if (!changes) break;
      }
      return total();
    };
    const double from_contiguous = improve();
    const std::vector<Format> first = formats;
    for (const size_t group : free) formats[group] = Format::channels_last;
    if (improve() >= from_contiguous) formats = first;
    apply(formats);
  }

  // ---- parts ----
  // A value that only a concatenation of channels takes is written directly to its place in the concatenation.

  struct Part {
    size_t whole;    // the concatenation
    int64_t offset;  // of the value in the concatenation
  };
  std::map<size_t, Part> parts_;

  void set_parts() {
    std::vector<int64_t> uses(values.size());
    std::vector<size_t> maker(values.size(), SIZE_MAX);
    for (size_t i = 0; i < sites.size(); ++i) {
      for (const int64_t input : network_.steps[i].layer->inputs) ++uses[at(input)];
      for (const int64_t output : network_.steps[i].layer->outputs) maker[at(output)] = i;
    }
    for (const int64_t output : network_.outputs) ++uses[at(output)];
    for (size_t i = 0; i < sites.size(); ++i) {
      const Layer<T>& layer = *network_.steps[i].layer;
      const size_t whole = at(layer.outputs[0]);
      if (!layer.joins_channels(sites[i])) continue;
      int64_t offset = 0;
      for (size_t k = 0; k < layer.inputs.size(); ++k) {
        const size_t value = at(layer.inputs[k]), step = maker[value];
        const bool is_part = uses[value] == 1 && step != SIZE_MAX && values[value].channels_last() &&
                             network_.steps[step].layer->writes_parts();
        if (is_part) {
          parts_[value] = {whole, offset};
          values[value].pitch = sites[i].inputs[k].pitch = sites[step].outputs[0].pitch = values[whole].sizes[1];
        }
        offset += values[value].sizes[1];
      }
    }
  }

  // A part of a value is read where it lies, if all layers that take the part can do that. Then the layer that cuts the
  // part out does not run.

  std::vector<int64_t> offset_in_whole_;  // of each value; 0 unless it is such a part

  void set_read_parts() {
    offset_in_whole_.assign(values.size(), 0);
    std::vector<char> may_be_part(values.size(), true);
    for (size_t i = 0; i < sites.size(); ++i) {
      const Layer<T>& layer = *network_.steps[i].layer;
      if (layer.reads_parts() && !layer.is_view(sites[i])) continue;
      for (const int64_t input : layer.inputs) may_be_part[at(input)] = false;
    }
    for (const int64_t output : network_.outputs) may_be_part[at(output)] = false;
    for (const auto& [value, part] : parts_) may_be_part[value] = false;
    for (size_t i = 0; i < sites.size(); ++i) {
      const Layer<T>& layer = *network_.steps[i].layer;
      Site<T>& site = sites[i];
      for (size_t k = 0; k < layer.inputs.size(); ++k) {
        site.inputs[k].part_strides = values[at(layer.inputs[k])].part_strides;
      }
      if (is_idle[i]) continue;
      std::vector<int64_t> offsets;
      for (size_t k = 0; k < layer.outputs.size() && offsets.size() == k; ++k) {
        const int64_t offset = may_be_part[at(layer.outputs[k])] ? layer.offset_in_input(site, k) : -1;
        if (offset >= 0) offsets.push_back(checked_sum(offset, offset_in_whole_[at(layer.inputs[0])]));
      }
      if (offsets.size() < layer.outputs.size()) continue;
      is_idle[i] = true;
      for (size_t k = 0; k < layer.outputs.size(); ++k) {
        offset_in_whole_[at(layer.outputs[k])] = offsets[k];
        values[at(layer.outputs[k])].part_strides = site.inputs[0].strides();
      }
    }
  }

  // ---- places ----
  // A value needs memory from the step that makes it to the last step that reads it or one of its views.

  void set_places() {
    places.resize(values.size());
    copied.resize(network_.outputs.size(), true);
    for (size_t i = 0; i < network_.inputs.size(); ++i) {
      places[at(network_.inputs[i].value)] = {Place::input, static_cast<int64_t>(i), 0};
    }
    for (size_t value = 0; value < values.size(); ++value) {
      if (network_.weights.holds(static_cast<int64_t>(value))) {
        places[value] = {Place::weight, static_cast<int64_t>(value), 0};
      }
    }
    // A view uses the memory of its root.
    std::vector<size_t> root(values.size());
    for (size_t value = 0; value < values.size(); ++value) root[value] = value;
    for (const auto& [value, part] : parts_) root[value] = part.whole;
    std::vector<size_t> first(values.size(), SIZE_MAX), last(values.size());
    for (size_t i = 0; i < sites.size(); ++i) {
      const Layer<T>& layer = *network_.steps[i].layer;
      const bool is_part = !values[at(layer.outputs[0])].part_strides.empty();
      if (is_part || layer.is_view(sites[i])) {
        for (const int64_t output : layer.outputs) root[at(output)] = root[at(layer.inputs[0])];
      }
      const size_t read = layer.inputs.size() - layer.sizes_only;
      for (size_t k = 0; k < read; ++k) last[root[at(layer.inputs[k])]] = i;
      for (const int64_t output : layer.outputs) {
        const size_t own = root[at(output)];
        if (is_part || layer.is_view(sites[i])) continue;
        first[own] = std::min(first[own], i);
        last[own] = std::max(last[own], i);
      }
    }
    for (size_t i = 0; i < network_.outputs.size(); ++i) {
      const size_t own = root[at(network_.outputs[i])];
      last[own] = sites.size();
      if (places[own].kind != Place::nowhere) continue;  // it is an input, or another output already
      places[own] = {Place::output, static_cast<int64_t>(i), 0};
      copied[i] = false;
    }
    std::vector<size_t> between;
    for (const auto& step : network_.steps) {
      for (const int64_t output : step.layer->outputs) {
        if (root[at(output)] == at(output) && places[at(output)].kind == Place::nowhere) between.push_back(at(output));
      }
    }
    place_between(between, first, last);
    for (size_t value = 0; value < values.size(); ++value) places[value] = places[root[value]];
    for (const auto& [value, part] : parts_) places[value].offset += part.offset;
    for (size_t value = 0; value < values.size(); ++value) places[value].offset += offset_in_whole_[value];
  }

  // Places the largest values first, each at the lowest offset that is free for as long as the value lives.
  void place_between(std::vector<size_t>& between, const std::vector<size_t>& first, const std::vector<size_t>& last) {
    constexpr int64_t line = 64 / sizeof(T);
    const auto size_of = [&](size_t value) {
      return checked_sum(std::max<int64_t>(values[value].count(), 1), line - 1) / line * line;
    };
    std::stable_sort(between.begin(), between.end(), [&](size_t a, size_t b) { return size_of(a) > size_of(b); });
    std::vector<size_t> placed;  // by offset
    for (const size_t value : between) {
      int64_t offset = 0;
      const int64_t size = size_of(value);
      for (const size_t other : placed) {
        if (last[other] < first[value] || last[value] < first[other]) continue;
        if (places[other].offset - offset >= size) break;
        offset = std::max(offset, checked_sum(places[other].offset, size_of(other)));
      }
      places[value] = {Place::memory, 0, offset};
      memory = std::max(memory, checked_sum(offset, size));
      const auto by_offset = [&](size_t a, size_t b) { return places[a].offset < places[b].offset; };
      placed.insert(std::upper_bound(placed.begin(), placed.end(), value, by_offset), value);
    }
  }
};

}  // namespace fastnn

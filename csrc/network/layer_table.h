// The table of layers, and the check of a program's lines by it.
#pragma once

#include "layer.h"

namespace fastnn {

// All kinds of layers. One without a maker is a kind that only training has.
const std::vector<LayerEntry>& layer_entries();

inline void check_attributes(const ProgramLine& line) {
  for (const auto& [name, content] : line.attributes) {
    bool known = false;
    for (const AttributeEntry* entry = line.entries; entry->name; ++entry) known = known || name == entry->name;
    if (!known) line.refuse("it has no attribute ", name);
  }
}

inline constexpr AttributeEntry kInputEntries[] = {
    {"sizes", "ints", ""}, {"dtype", "text", ""}, {nullptr, nullptr, nullptr}};
inline constexpr AttributeEntry kWeightEntries[] = {{"sizes", "ints", ""}, {nullptr, nullptr, nullptr}};

// Checks the line of an input or a weight. Such a line takes nothing and gives one value.
inline void check_source_line(ProgramLine& line, const AttributeEntry* entries) {
  line.entries = entries;
  if (line.outputs.size() != 1) line.refuse("expected to give one value");
  if (!line.inputs.empty()) line.refuse("it takes no values");
  check_attributes(line);
}
// What an input holds: without a dtype, numbers of the weights' dtype.
inline ElementKind elements_of(const ProgramLine& line) {
  const std::string_view dtype = line.text("dtype");
  if (dtype == "int64") return ElementKind::integers;
  if (dtype == "bool") return ElementKind::booleans;
  if (!dtype.empty()) line.refuse("expected dtype=int64, dtype=bool, or none, for the weights' dtype");
  return ElementKind::numbers;
}

// Finds the layer of a line in the table, and gives the line the layer's attributes. Raises where there is no such
// layer, or the line has inputs or attributes that the layer does not know.
inline const LayerEntry& check_layer_line(ProgramLine& line) {
  const LayerEntry* found = nullptr;
  for (const LayerEntry& entry : layer_entries()) {
    if (line.layer == entry.name) found = &entry;
  }
  FASTNN_CHECK(found, "network: line ", line.number, ": there is no layer \"", line.layer.substr(0, 40), "\"");
  line.entries = found->attributes.data();
  check_attributes(line);
  for (const auto& [name, given] : line.inputs) {
    bool known = false;
    for (const std::string_view input : found->inputs) known |= name == input.substr(0, input.find_first_of("?*"));
    if (!known) line.refuse("it has no input ", name);
  }
  return *found;
}

}  // namespace fastnn

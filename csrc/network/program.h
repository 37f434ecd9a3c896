// A network's program: a text that describes a network, with a line for each layer, and the functions that read it.
//
//     fastnn.network 1
//     input -> x sizes=0:,3,20,20
//     weight -> w0 sizes=64,3,7,7
//     conv input=x weight=w0 -> a stride=2,2 padding=3,3 activation=relu
//     reshape input=a -> b sizes=x.0,-1
//     output input=b
//
// A line has the layer's name, the values that it takes, each under the name that the layer has for it, "->" and the
// names of the values that it gives, and attributes. Values are numbered as they come. A layer takes only values that
// lines above have given, so that a program has no cycles. Nothing here knows what a layer does.
#pragma once

#include <charconv>
#include <map>
#include <string>
#include <string_view>

#include "../ops/activation_text.h"
#include "../ops/check.h"

namespace fastnn {

constexpr char kHeading[] = "fastnn.network 1";  // the first line of a program: what it is, and the text's version
constexpr int64_t kMostSize = int64_t{1} << 31;  // that a layer may have of a kernel, a stride, a padding and the like

// An attribute of a layer: its name, its kind (int, ints, bool, float, activation or text), and its default, which is
// null where the attribute must be given.
struct AttributeEntry {
  const char *name, *kind, *value;
};

// A line of a program. Programs may come from anywhere, so these functions raise where a line does not fit.
struct ProgramLine {
  std::string layer;
  std::map<std::string, std::vector<int64_t>, std::less<>> inputs;  // numbers of values
  std::vector<int64_t> outputs;
  std::map<std::string, std::string, std::less<>> attributes;
  const AttributeEntry* entries = nullptr;  // the attributes that the layer knows; the last entry has no name
  int64_t number = 0;                       // of the line, from 1

  template <class... Parts>
  [[noreturn]] void refuse(const Parts&... parts) const {
    fail("network: line ", number, ", ", layer, ": ", parts...);
  }

  bool has(std::string_view input) const { return inputs.find(input) != inputs.end(); }
  // The one value of this input. Raises where the input has several values, or none.
  int64_t input(const char* name) const {
    const auto found = inputs.find(std::string_view(name));
    if (found == inputs.end() || found->second.size() != 1) refuse("expected one value as its ", name);
    return found->second[0];
  }

  std::string_view text(std::string_view name) const {
    if (const auto found = attributes.find(name); found != attributes.end()) return found->second;
    for (const AttributeEntry* entry = entries; entry && entry->name; ++entry) {
      if (name == entry->name && entry->value) return entry->value;
    }
    refuse("expected ", name, "=...");
  }
  int64_t integer(const char* name, int64_t least, int64_t most) const {
    return to_integer(text(name), name, least, most);
  }
  bool flag(const char* name) const { return integer(name, 0, 1) != 0; }
  double real(const char* name) const {
    const std::string_view from = text(name);
    double value = 0;
    const std::from_chars_result read = std::from_chars(from.data(), from.data() + from.size(), value);
    if (read.ec != std::errc() || read.ptr != from.data() + from.size()) {
      refuse("expected a number as ", name, ", got \"", std::string(from), "\"");
    }
    return value;
  }
  Activation activation(const char* name = "activation") const {
    const std::string_view from = text(name);
    const char *at = from.data(), *const end = at + from.size();
    Activation result;
    if (!read_activation(at, end, result) || at != end) refuse("there is no activation \"", std::string(from), "\"");
    return result;
  }
  // The parts of a list that commas separate; none where it is empty.
  std::vector<std::string_view> parts(const char* name) const { return split(text(name), ','); }
  std::vector<int64_t> integers(const char* name, int64_t least, int64_t most) const {
    std::vector<int64_t> result;
    for (const std::string_view part : parts(name)) result.push_back(to_integer(part, name, least, most));
    return result;
  }
  // The same for `count` dimensions. One number may stand for all dimensions.
  std::vector<int64_t> integers(const char* name, int64_t least, int64_t most, size_t count) const {
    std::vector<int64_t> result = integers(name, least, most);
    if (result.size() == 1) result.resize(count, result[0]);
    if (result.size() != count) refuse("expected ", name, " to be ", count, " numbers, got ", result.size());
    return result;
  }

  int64_t to_integer(std::string_view from, const char* name, int64_t least, int64_t most) const {
    int64_t value = 0;
    const std::from_chars_result read = std::from_chars(from.data(), from.data() + from.size(), value);
    if (read.ec != std::errc() || read.ptr != from.data() + from.size() || value < least || value > most) {
      refuse("expected ", name, " from ", least, " to ", most, ", got \"", std::string(from), "\"");
    }
    return value;
  }
  static std::vector<std::string_view> split(std::string_view from, char by) {
    std::vector<std::string_view> result;
    while (!from.empty()) {
      const size_t end = std::min(from.find(by), from.size());
      result.push_back(from.substr(0, end));
      from.remove_prefix(std::min(end + 1, from.size()));
    }
    return result;
  }
};

struct Program {
  std::vector<ProgramLine> lines;
  std::vector<std::string> values;  // their names

  explicit Program(std::string_view text) {
    int64_t number = 0;
    while (!text.empty()) {
      const size_t end = std::min(text.find('\n'), text.size());
      add(text.substr(0, end), ++number);
      text.remove_prefix(std::min(end + 1, text.size()));
    }
    FASTNN_CHECK(number > 0, "network: the program is empty");
  }

  // The number of the value of this name.
  int64_t value(std::string_view name, int64_t line) const {
    const auto found = numbers_.find(name);
    FASTNN_CHECK(found != numbers_.end(), "network: line ", line, ": no line above gives \"", std::string(name), "\"");
    return found->second;
  }

 private:
  static constexpr size_t kMostLines = 1 << 14;
  std::map<std::string, int64_t, std::less<>> numbers_;

  void add(std::string_view text, int64_t number) {
    if (number == 1) {
      FASTNN_CHECK(text == kHeading, "network: the first line should be \"", kHeading, "\", got \"",
                   std::string(text.substr(0, 40)), "\"");
      return;
    }
    FASTNN_CHECK(lines.size() < kMostLines, "network: the program has more than ", kMostLines, " lines");
    const std::vector<std::string_view> words = ProgramLine::split(text, ' ');
    FASTNN_CHECK(!words.empty(), "network: line ", number, " is empty");
    ProgramLine line;
    line.layer = std::string(words[0]);
    line.number = number;
    enum { takes, gives, says } now = takes;
    for (size_t i = 1; i < words.size(); ++i) {
      const std::string_view word = words[i];
      const size_t equals = word.find('=');
      if (now == takes && word == "->") {
        now = gives;
      } else if (now == gives && equals == std::string_view::npos) {
        FASTNN_CHECK(is_name(word) && numbers_.emplace(word, values.size()).second, "network: line ", number, ": \"",
                     std::string(word.substr(0, 40)), "\" is no name, or a value has it already");
        line.outputs.push_back(static_cast<int64_t>(values.size()));
        values.emplace_back(word);
      } else {
        if (now == gives) now = says;
        const bool named = equals != std::string_view::npos && is_name(word.substr(0, equals));
        if (!named) line.refuse("expected name=..., got \"", std::string(word.substr(0, 40)), "\"");
        const std::string name(word.substr(0, equals));
        const std::string_view content = word.substr(equals + 1);
        bool is_new;
        if (now == takes) {
          std::vector<int64_t> given;
          for (const std::string_view one : ProgramLine::split(content, ',')) given.push_back(value(one, number));
          is_new = line.inputs.emplace(name, std::move(given)).second;
        } else {
          is_new = line.attributes.emplace(name, content).second;
        }
        if (!is_new) line.refuse("it has ", name, "=... twice");
      }
    }
    lines.push_back(std::move(line));
  }

  static bool is_name(std::string_view word) {
    const auto belongs = [](char c) {
      return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
    };
    return !word.empty() && std::all_of(word.begin(), word.end(), belongs);
  }
};

}  // namespace fastnn

// embedding, pick, gather_rows and add_rows, which take numbers: rows of a table or of a value by their numbers, and
// one step of each sequence. An embedding's numbers may be one column of the input, as of a table of categories that
// has a column for each embedding.
#pragma once

#include "shape.h"

namespace fastnn {

// Which column of its input an embedding takes; nothing where it takes all numbers.
inline std::optional<Selection> column_of(const ProgramLine& line) {
  return line.flag("selects") ? std::optional<Selection>(line) : std::nullopt;
}

template <class T>
class EmbeddingLayer : public Layer<T> {
 public:
  EmbeddingLayer(const ProgramLine& line, const Weights<T>& weights) : column_(column_of(line)) {
    this->inputs = {line.input("input")};
    const auto& weight = weights.of(line, "weight");
    if (weight.sizes.size() != 2) line.refuse("expected a weight of 2 dimensions");
    weight_ = weight.data;
    rows_ = weight.sizes[0];
    features_ = weight.sizes[1];
  }
  bool takes_other_elements() const override { return true; }
  void set_sizes(Site<T>& site) const override {
    FASTNN_CHECK(site.inputs[0].elements == ElementKind::integers, "expected an embedding's input to be int64");
    site.outputs[0].sizes = column_ ? column_->rest(site.sizes(0)) : site.sizes(0);
    site.outputs[0].sizes.push_back(features_);
  }
  void run(const LayerCall<T>& call) const override {
    const int64_t* numbers = static_cast<const int64_t*>(call.inputs[0]);
    const Ints& sizes = call.site.sizes(0);
    int64_t count = call.site.inputs[0].count(), run = 1, step = 1;  // `run` numbers beside one another, every `step`
    if (column_) {
      const size_t dim = column_->dim(sizes);
      run = product(sizes, dim + 1, sizes.size());
      step = run * sizes[dim];
      numbers += column_->index(sizes) * run;
      count /= sizes[dim];
    }
    const auto number = [&](int64_t i) { return numbers[run == 1 ? i * step : i / run * step + i % run]; };
    for (int64_t i = 0; i < count; ++i) FASTNN_CHECK(number(i) >= 0 && number(i) < rows_, "index out of range in self");
    parallel_range(count, kCopyWork * static_cast<double>(features_), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        // Another thread may have written to the caller's tensor since the check, so the number is kept inside the
        // bounds.
        const int64_t row = std::min(std::max<int64_t>(number(i), 0), rows_ - 1);
        std::copy_n(weight_ + row * features_, features_, call.output(0) + i * features_);
      }
    });
  }

 private:
  std::optional<Selection> column_;
  const T* weight_;
  int64_t rows_, features_;
};

// Which elements of its input a pick takes: element i of the output is input[rows[i], places[i]], with all further
// dimensions; without `rows` it is input[i, places[i]].
class Picked {
 public:
  // rows: null for none. wraps: whether numbers below 0 count from the end. Raises where a number is out of range.
  Picked(const int64_t* rows, const int64_t* places, int64_t count, const Ints& sizes, bool wraps) : wraps_(wraps) {
    FASTNN_CHECK(sizes.size() >= 2 && (rows || count == sizes[0]), "expected a place for each row, got ", count,
                 " for size ", to_string(sizes));
    from_.reserve(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      from_.push_back((rows ? wrapped(rows[i], sizes[0]) : i) * sizes[1] + wrapped(places[i], sizes[1]));
    }
  }
  // The elements in their order: the place of each among those of the first two dimensions.
  const Ints& places() const { return from_; }

 private:
  int64_t wrapped(int64_t number, int64_t size) const {
    FASTNN_CHECK(number >= (wraps_ ? -size : 0) && number < size, "index ", number, " is out of bounds for size ",
                 size);
    return number < 0 ? number + size : number;
  }
  bool wraps_;
  Ints from_;
};

// The sizes of what a pick gives. keepdim: the places are a column, and the input has two dimensions, as has the
// result.
inline Ints picked_sizes(const Ints& places, const Ints& sizes, bool keepdim) {
  if (keepdim) {
    FASTNN_CHECK(places.size() == 2 && places[1] == 1 && sizes.size() == 2,
                 "expected a column of indices, and an input of 2 dimensions");
    return places;
  }
  FASTNN_CHECK(places.size() == 1 && sizes.size() >= 2, "expected a row of indices, and an input of 2 dimensions");
  Ints result(sizes.begin() + 1, sizes.end());
  result[0] = places[0];
  return result;
}

template <class T>
class PickLayer : public Layer<T> {
 public:
  PickLayer(const ProgramLine& line, const Weights<T>&) : wraps_(line.flag("wraps")), keepdim_(line.flag("keepdim")) {
    if (line.has("rows")) this->inputs = {line.input("rows")};
    this->inputs.push_back(line.input("places"));
    this->inputs.push_back(line.input("input"));
  }
  bool takes_other_elements() const override { return true; }
  void set_sizes(Site<T>& site) const override {
    const Ints &places = site.inputs[site.inputs.size() - 2].sizes, &sizes = site.inputs.back().sizes;
    for (size_t i = 0; i + 1 < site.inputs.size(); ++i) {
      FASTNN_CHECK(site.inputs[i].elements == ElementKind::integers && site.inputs[i].sizes == places,
                   "expected indices of int64 and of one size");
    }
    FASTNN_CHECK(site.inputs.back().elements == ElementKind::numbers, "expected a floating-point input");
    site.outputs[0].sizes = picked_sizes(places, sizes, keepdim_);
  }
  void run(const LayerCall<T>& call) const override {
    const size_t last = call.site.inputs.size() - 1;
    const Ints& sizes = call.site.sizes(last);
    const int64_t inner = product(sizes, 2, sizes.size());
    const auto numbers = [&](size_t i) { return static_cast<const int64_t*>(call.inputs[i]); };
    T* to = call.output(0);
    const Picked picked(last > 1 ? numbers(0) : nullptr, numbers(last - 1), call.site.outputs[0].sizes[0], sizes,
                        wraps_);
    for (const int64_t place : picked.places()) {
      std::copy_n(call.input(last) + place * inner, inner, to);
      to += inner;
    }
  }

 private:
  bool wraps_, keepdim_;
};

// Numbers of rows of a value. Each is checked against how many rows the value has.
class RowNumbers {
 public:
  // numbers: `count` of them, copied, since another thread may write to the caller's tensor.
  RowNumbers(const int64_t* numbers, int64_t count, int64_t rows) : numbers_(numbers, numbers + count) {
    for (const int64_t number : numbers_) {
      FASTNN_CHECK(number >= 0 && number < rows, "index ", number, " is out of bounds for dimension 0 with size ",
                   rows);
    }
  }
  // to[i] = from[number i], in rows of `features` elements.
  template <class T>
  void gather(const T* from, int64_t features, T* to) const {
    parallel_range(count(), kCopyWork * static_cast<double>(features), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) std::copy_n(from + at(i) * features, features, to + i * features);
    });
  }
  // to[number i] += from[i], in the order of the numbers. Threads share the features, so that the sums are the same for
  // any number of threads.
  template <class T>
  void add(const T* from, int64_t features, T* to) const {
    parallel_range(features, 2 * kCopyWork * static_cast<double>(count()), [&](int64_t first, int64_t last) {
      for (int64_t i = 0; i < count(); ++i) {
        for (int64_t f = first; f < last; ++f) to[at(i) * features + f] += from[i * features + f];
      }
    });
  }

 private:
  int64_t count() const { return static_cast<int64_t>(numbers_.size()); }
  int64_t at(int64_t i) const { return numbers_[static_cast<size_t>(i)]; }
  Ints numbers_;
};

// The sizes of the rows that `places` name, of a value of these sizes. rank: how many dimensions the places must have;
// 0 for any.
inline Ints gathered_sizes(const Ints& places, const Ints& sizes, int64_t rank = 0) {
  FASTNN_CHECK(!sizes.empty(), "expected an input that has rows");
  FASTNN_CHECK(rank == 0 || static_cast<int64_t>(places.size()) == rank, "expected indices of ", rank,
               " dimensions, got size ", to_string(places));
  Ints result = places;
  result.insert(result.end(), sizes.begin() + 1, sizes.end());
  return result;
}
inline void check_added_sizes(const Ints& places, const Ints& sizes, const Ints& source) {
  FASTNN_CHECK(places.size() == 1 && !sizes.empty() && source == gathered_sizes(places, sizes),
               "expected a row of indices and as many rows to add, of the input's sizes, got size ", to_string(source),
               " for ", to_string(sizes));
}

// The rows of a value that another value names, as in x[places].
template <class T>
class GatherRowsLayer : public Layer<T> {
 public:
  GatherRowsLayer(const ProgramLine& line, const Weights<T>&) : rank_(line.integer("rank", 0, 16)) {
    this->inputs = {line.input("places"), line.input("input")};
  }
  bool takes_other_elements() const override { return true; }
  void set_sizes(Site<T>& site) const override {
    FASTNN_CHECK(site.inputs[0].elements == ElementKind::integers && site.inputs[1].elements == ElementKind::numbers,
                 "expected indices of int64, and a floating-point input");
    site.outputs[0].sizes = gathered_sizes(site.sizes(0), site.sizes(1), rank_);
  }
  void run(const LayerCall<T>& call) const override {
    const Ints& sizes = call.site.sizes(1);
    const RowNumbers numbers(static_cast<const int64_t*>(call.inputs[0]), call.site.inputs[0].count(), sizes[0]);
    numbers.gather(call.input(1), product(sizes, 1, sizes.size()), call.output(0));
  }

 private:
  int64_t rank_;
};

// A value to whose rows, which another value names, others are added: index_add along the first dimension.
template <class T>
class AddRowsLayer : public Layer<T> {
 public:
  AddRowsLayer(const ProgramLine& line, const Weights<T>&) {
    this->inputs = {line.input("places"), line.input("input"), line.input("source")};
  }
  bool takes_other_elements() const override { return true; }
  void set_sizes(Site<T>& site) const override {
    FASTNN_CHECK(site.inputs[0].elements == ElementKind::integers && site.inputs[1].elements == ElementKind::numbers &&
                     site.inputs[2].elements == ElementKind::numbers,
                 "expected indices of int64, and floating-point inputs");
    check_added_sizes(site.sizes(0), site.sizes(1), site.sizes(2));
    site.outputs[0].sizes = site.sizes(1);
  }
  void run(const LayerCall<T>& call) const override {
    const Ints& sizes = call.site.sizes(1);
    const RowNumbers numbers(static_cast<const int64_t*>(call.inputs[0]), call.site.inputs[0].count(), sizes[0]);
    std::copy_n(call.input(1), call.site.outputs[0].count(), call.output(0));
    numbers.add(call.input(2), product(sizes, 1, sizes.size()), call.output(0));
  }
};

inline LayerEntry gather_rows_entry() {
  return layer_entry<GatherRowsLayer>("gather_rows", {"places", "input"}, {{"rank", "int", "0"}});
}
inline LayerEntry add_rows_entry() {
  return layer_entry<AddRowsLayer>("add_rows", {"places", "input", "source"}, {});
}
inline LayerEntry pick_entry() {
  return layer_entry<PickLayer>("pick", {"rows?", "places", "input"},
                                {{"wraps", "bool", "1"}, {"keepdim", "bool", "0"}});
}
inline LayerEntry embedding_entry() {
  return layer_entry<EmbeddingLayer>(
      "embedding", {"input", "weight"},
      {{"padding_idx", "int", "-1"}, {"selects", "bool", "0"}, {"dim", "int", "0"}, {"index", "int", "0"}});
}

}  // namespace fastnn

// Products of batches of matrices, and attention, of values with any strides.
#pragma once

#include <limits>

#include "array.h"

namespace fastnn {

// Matrices (..., rows, columns), one for each element of the dimensions in front.
template <class T>
struct Matrices {
  T* data;
  Ints sizes, strides;

  Matrices(T* data, Ints sizes, Ints strides) : data(data), sizes(std::move(sizes)), strides(std::move(strides)) {}
  Matrices(T* data, const Ints& sizes) : Matrices(data, sizes, ValueType{sizes}.strides()) {}
  explicit Matrices(const Tensor& tensor)
      : Matrices(fastnn::data<std::remove_const_t<T>>(tensor), sizes_of(tensor),
                 Ints(tensor.strides().begin(), tensor.strides().end())) {}

  // The size and the stride of the rows (0) or of the columns (1).
  int64_t size(size_t d) const { return sizes[sizes.size() - 2 + d]; }
  int64_t stride(size_t d) const { return strides[strides.size() - 2 + d]; }
  // The strides of the dimensions in front, of `count` dimensions to which they are broadcast.
  Ints batch_strides(size_t count) const {
    return broadcast_strides(Ints(strides.begin(), strides.end() - 2), Ints(sizes.begin(), sizes.end() - 2), count);
  }
  Matrices transposed() const {
    Matrices result = *this;
    std::swap(result.sizes.end()[-1], result.sizes.end()[-2]);
    std::swap(result.strides.end()[-1], result.strides.end()[-2]);
    return result;
  }
};

// The sizes of the product of matrices (..., rows, depth) and (..., depth, columns), as torch's matmul has them.
inline Ints sizes_of_product(const Ints& a, const Ints& b) {
  FASTNN_CHECK(a.size() >= 2 && b.size() >= 2, "expected matrices, got sizes ", to_string(a), " and ", to_string(b));
  FASTNN_CHECK(a.back() == b[b.size() - 2], "mat1 and mat2 shapes cannot be multiplied (", to_string(a), " and ",
               to_string(b), ")");
  Ints sizes = broadcast_sizes(Ints(a.begin(), a.end() - 2), Ints(b.begin(), b.end() - 2));
  sizes.push_back(a[a.size() - 2]);
  sizes.push_back(b.back());
  return sizes;
}

// The offset of element `number` of an array, whose last dimension varies fastest.
inline int64_t offset_of(int64_t number, const Ints& sizes, const Ints& strides) {
  int64_t offset = 0;
  for (size_t d = sizes.size(); d-- > 0; number /= sizes[d]) offset += number % sizes[d] * strides[d];
  return offset;
}

// A product of batches of matrices as products of single ones. The dimensions in front are joined with the rows, or
// with the depth, where the strides allow that.
template <class T>
class BatchedProduct {
 public:
  // batch: the sizes of the dimensions in front. Those in which the output has one element are summed over. The columns
  // of the output lie side by side.
  BatchedProduct(const Matrices<const T>& a, const Matrices<const T>& b, const Ints& batch, const Matrices<T>& output)
      : one_{output.size(0), output.size(1), a.size(1),   a.data,      a.stride(0),     a.stride(1),
             b.data,         b.stride(0),    b.stride(1), output.data, output.stride(0)} {
    const size_t count = batch.size();
    const Ints of_a = a.batch_strides(count), of_b = b.batch_strides(count), of_output = output.batch_strides(count);
    for (size_t d = count; d-- > 0;) {
      const int64_t size = batch[d];
      if (size == 1) continue;
      if (of_b[d] == 0 && of_a[d] == one_.a_row * one_.rows && of_output[d] == one_.output_row * one_.rows) {
        one_.rows *= size;
      } else if (of_output[d] == 0 && of_a[d] == one_.a_depth * one_.depth && of_b[d] == one_.b_depth * one_.depth) {
        one_.depth *= size;
      } else {
        Loop& loop = of_output[d] == 0 ? summed_ : kept_;
        loop.add(size, {of_a[d], of_b[d], of_output[d]});
      }
    }
  }

  void run() const {
    const int64_t items = kept_.count(), terms = summed_.count();
    const double work = 2.0 * static_cast<double>(one_.rows) * static_cast<double>(one_.columns) *
                        static_cast<double>(one_.depth) * static_cast<double>(terms);
    const int64_t threads = useful_threads(work * static_cast<double>(items));
    // Threads share the products where there is one for each, and else the parts of each product.
    const int64_t chunks = items >= threads ? std::min(threads, items) : 1;
    const int64_t threads_each = chunks > 1 ? 1 : threads;
    parallel_chunks(chunks, items, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        Product<T> product = kept_.at(item, one_);
        if (terms == 0) product.depth = 0;
        product.add = false;
        multiply(product, threads_each);
        for (int64_t term = 1; term < terms; ++term) {
          Product<T> next = summed_.at(term, product);
          next.add = true;
          multiply(next, threads_each);
        }
      }
    });
  }

 private:
  // Dimensions, and the strides of the factors and of the output along each.
  struct Loop {
    Ints sizes;
    std::array<Ints, 3> strides;

    void add(int64_t size, const std::array<int64_t, 3>& of_all) {
      sizes.push_back(size);
      for (size_t i = 0; i < 3; ++i) strides[i].push_back(of_all[i]);
    }
    int64_t count() const {
      int64_t result = 1;
      for (const int64_t size : sizes) result = checked_product(result, size);
      return result;
    }
    Product<T> at(int64_t number, Product<T> product) const {
      product.a += offset_of(number, sizes, strides[0]);
      product.b += offset_of(number, sizes, strides[1]);
      product.output += offset_of(number, sizes, strides[2]);
      return product;
    }
  };

  Product<T> one_;
  Loop kept_, summed_;
};

// output = a b, as torch's matmul.
template <class T>
void multiply_matrices(const Matrices<const T>& a, const Matrices<const T>& b, T* output) {
  const Ints sizes = sizes_of_product(a.sizes, b.sizes);
  BatchedProduct<T>(a, b, Ints(sizes.begin(), sizes.end() - 2), Matrices<T>(output, sizes)).run();
}

// output (of the sizes given) = a b, summed over the dimensions in front in which the output has one element, or which
// it has not.
template <class T>
void multiply_and_sum(const Matrices<const T>& a, const Matrices<const T>& b, const Ints& sizes, T* output) {
  const Ints all = sizes_of_product(a.sizes, b.sizes);
  BatchedProduct<T>(a, b, Ints(all.begin(), all.end() - 2), Matrices<T>(output, sizes)).run();
}

// Attention of queries (..., queries, features) to keys (..., keys, features) and values (..., keys, outputs): each
// output is the mean of the values, weighted by the softmax of the products of its query with the keys. A query that
// sees no key gives 0, as in torch. The weights are computed for a block of queries at a time, and again in backward,
// so that the weights of all queries need no memory.
template <class T>
class Attention {
 public:
  using Inputs = Matrices<const T>;

  // mask: null, or what is added to the products. scale: what the products are multiplied by.
  Attention(const Inputs& query, const Inputs& key, const Inputs& value, const Inputs* mask, T scale, bool is_causal)
      : query_(query),
        key_(key),
        value_(value),
        mask_(mask),
        scale_(scale),
        is_causal_(is_causal),
        batch_(query.sizes.begin(), query.sizes.end() - 2),
        queries_(query.size(0)),
        keys_(key.size(0)),
        features_(query.size(1)),
        outputs_(value.size(1)) {
    for (const int64_t size : batch_) heads_ = checked_product(heads_, size);
    if (!mask) return;
    Ints scores = query.sizes;
    scores.back() = keys_;
    FASTNN_CHECK(mask->sizes.size() >= 2 && broadcast_sizes(mask->sizes, scores) == scores, "a mask of size ",
                 to_string(mask->sizes), " does not fit products of size ", to_string(scores));
  }

  // output (..., queries, outputs), contiguous
  void forward(T* output) const {
    const int64_t blocks = (queries_ + kBlock - 1) / kBlock;
    parallel_range(heads_ * blocks, work(), [&](int64_t first, int64_t last) {
      const Scratch<T> weights(checked_product(std::min(kBlock, queries_), keys_));
      for (int64_t item = first; item < last; ++item) {
        const Head head(*this, item / blocks);
        const Block block = block_at(item % blocks * kBlock);
        compute_weights(head, block, weights.get());
        run({block.count, outputs_, block.seen, weights.get(), block.seen, 1, head.value, value_.stride(0),
             value_.stride(1), output + (item / blocks * queries_ + block.first) * outputs_, outputs_});
      }
    });
  }

  // The gradients from that of the output, `gradient`; all are contiguous.
  void backward(const T* gradient, T* of_query, T* of_key, T* of_value) const {
    const double of_head = 2.5 * work() * static_cast<double>((queries_ + kBlock - 1) / kBlock);
    parallel_range(heads_, of_head, [&](int64_t first, int64_t last) {
      const int64_t size = checked_product(std::min(kBlock, queries_), keys_);
      const Scratch<T> weights(size), of_weights(size);
      for (int64_t item = first; item < last; ++item) {
        const Head head(*this, item);
        T *const query_to = of_query + item * queries_ * features_, *const key_to = of_key + item * keys_ * features_;
        T* const value_to = of_value + item * keys_ * outputs_;
        std::fill_n(key_to, keys_ * features_, T(0));
        std::fill_n(value_to, keys_ * outputs_, T(0));
        for (int64_t start = 0; start < queries_; start += kBlock) {
          const Block block = block_at(start);
          const T* const from = gradient + (item * queries_ + start) * outputs_;
          compute_weights(head, block, weights.get());
          run({block.seen, outputs_, block.count, weights.get(), 1, block.seen, from, outputs_, 1, value_to, outputs_,
               true});
          run({block.count, block.seen, outputs_, from, outputs_, 1, head.value, value_.stride(1), value_.stride(0),
               of_weights.get(), block.seen});
          for (int64_t i = 0; i < block.count; ++i) {
            T* const row = of_weights.get() + i * block.seen;
            elementwise_kernels().get<T>().softmax_gradient(weights.get() + i * block.seen, row, scale_, block.seen,
                                                            row);
          }
          run({block.count, features_, block.seen, of_weights.get(), block.seen, 1, head.key, key_.stride(0),
               key_.stride(1), query_to + start * features_, features_});
          run({block.seen, features_, block.count, of_weights.get(), 1, block.seen,
               head.query + start * query_.stride(0), query_.stride(0), query_.stride(1), key_to, features_, true});
        }
      }
    });
  }

 private:
  static constexpr int64_t kBlock = 96;  // queries, a multiple of the rows of all tiles

  // One element of the dimensions in front.
  struct Head {
    const T *query, *key, *value, *mask = nullptr;

    Head(const Attention& all, int64_t number) {
      const auto place = [&](const Inputs& matrices) {
        return matrices.data + offset_of(number, all.batch_, matrices.batch_strides(all.batch_.size()));
      };
      query = place(all.query_);
      key = place(all.key_);
      value = place(all.value_);
      if (all.mask_) mask = place(*all.mask_);
    }
  };
  // Some queries, and how many keys at least one of them sees.
  struct Block {
    int64_t first, count, seen;
  };

  Block block_at(int64_t first) const {
    const int64_t count = std::min(kBlock, queries_ - first);
    return {first, count, is_causal_ ? std::min(keys_, first + count) : keys_};
  }
  // Operations of a block of queries.
  double work() const {
    return static_cast<double>(std::min(kBlock, queries_)) * static_cast<double>(keys_) *
           static_cast<double>(2 * (features_ + outputs_) + 30);
  }
  static void run(const Product<T>& product) { multiply(product, 1); }

  // weights (block.count, block.seen)
  void compute_weights(const Head& head, const Block& block, T* weights) const {
    const auto& kernels = elementwise_kernels().get<T>();
    run({block.count, block.seen, features_, head.query + block.first * query_.stride(0), query_.stride(0),
         query_.stride(1), head.key, key_.stride(1), key_.stride(0), weights, block.seen});
    const bool has_one_row = mask_ && mask_->size(0) == 1, has_one_column = mask_ && mask_->size(1) == 1;
    const int64_t mask_step = mask_ && !has_one_column ? mask_->stride(1) : 0;
    const Scratch<T> copied(mask_ && mask_step != 1 ? block.seen : 0);
    for (int64_t i = 0; i < block.count; ++i) {
      const int64_t query = block.first + i, seen = is_causal_ ? std::min(block.seen, query + 1) : block.seen;
      T* const row = weights + i * block.seen;
      const T* added = head.mask;
      if (added && !has_one_row) added += query * mask_->stride(0);
      if (added && mask_step != 1) {
        for (int64_t key = 0; key < seen; ++key) copied.get()[key] = added[key * mask_step];
        added = copied.get();
      }
      const T largest = kernels.softmax(row, scale_, added, seen, false, row);
      const bool sees_none = largest == -std::numeric_limits<T>::infinity();
      std::fill(row + (sees_none ? 0 : seen), row + block.seen, T(0));
    }
  }

  const Inputs &query_, &key_, &value_;
  const Inputs* const mask_;
  const T scale_;
  const bool is_causal_;
  const Ints batch_;
  const int64_t queries_, keys_, features_, outputs_;
  int64_t heads_ = 1;
};

}  // namespace fastnn

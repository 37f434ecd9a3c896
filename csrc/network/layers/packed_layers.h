// A product's weight in panels, as mlp's kernels read it.
#pragma once

#include "../../kernels/mlp.h"
#include "../array.h"

namespace fastnn {

// The panels of some layers' weights. Weights that were not packed before are packed here, if there are enough rows.
template <class T>
class PackedLayers {
 public:
  // Sets `packed` of the layers. key: that of their blocks in what was packed before. The panels are valid while this
  // object lives.
  PackedLayers(const MlpKernels<T>& kernels, MlpLayer<T>* layers, size_t count, int64_t rows, int64_t key,
               PackedReader& before)
      : own_(take(kernels, layers, count, rows, key, before)) {
    T* next = own_.get();
    for (size_t i = 0; i < count; ++i) {
      MlpLayer<T>& layer = layers[i];
      if (layer.packed || !kernels.worth_packing(rows, layer.in, layer.out)) continue;
      const int64_t parts = useful_threads(kCopyWork * static_cast<double>(layer.in) * static_cast<double>(layer.out));
      parallel_chunks(parts, parts, [&](int64_t part, int64_t, int64_t) {
        kernels.pack(layer.weight, layer.out, layer.in, part, parts, next);
      });
      layer.packed = next;
      next += kernels.packed_size(layer.out, layer.in);
    }
  }

 private:
  // Sets what was packed before -> the elements to be packed here.
  static int64_t take(const MlpKernels<T>& kernels, MlpLayer<T>* layers, size_t count, int64_t rows, int64_t key,
                      PackedReader& before) {
    int64_t size = 0;
    for (size_t i = 0; i < count; ++i) {
      MlpLayer<T>& layer = layers[i];
      const int64_t own = kernels.packed_size(layer.out, layer.in);
      layer.packed = before.template take<T>(key, own);
      if (!layer.packed && kernels.worth_packing(rows, layer.in, layer.out)) size = checked_sum(size, own);
    }
    return size;
  }

  const Scratch<T> own_;
};

}  // namespace fastnn

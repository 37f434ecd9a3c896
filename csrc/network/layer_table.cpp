// The entries of the table. A new layer is a class in a file of its own in layers/, and an entry here; one that trains
// has a class in training/, too.
#include "layer_table.h"

#include "fold.h"
#include "layers/conv.h"
#include "layers/conv_transpose.h"
#include "layers/elementwise.h"
#include "layers/embedding.h"
#include "layers/gather.h"
#include "layers/linear.h"
#include "layers/matmul.h"
#include "layers/normalize.h"
#include "layers/pool.h"
#include "layers/rnn.h"
#include "layers/shape.h"
#include "layers/upsample.h"
#include "training/layers.h"

namespace fastnn {

const std::vector<LayerEntry>& layer_entries() {
  static const std::vector<LayerEntry> entries = [] {
    std::vector<LayerEntry> all{
        conv_entry(),
        conv_transpose_entry(),
        fold_entry(),
        batch_norm_entry(),
        max_pool_entry(),
        avg_pool_entry(),
        adaptive_avg_pool_entry(),
        upsample_entry(),
        linear_entry(),
        rnn_entry(),
        matmul_entry(),
        attention_entry(),
        embedding_entry(),
        pick_entry(),
        gather_rows_entry(),
        add_rows_entry(),
        activation_entry(),
        clamp_entry(),
        unary_entry(),
        prelu_entry(),
        binary_entry(),
        where_entry(),
        lerp_entry(),
        binary_cross_entropy_entry(),
        cast_entry(),
        softmax_entry(),
        layer_norm_entry(),
        group_norm_entry(),
        mean_entry(),
        cumsum_entry(),
        amax_entry(),
        reshape_entry(),
        expand_entry(),
        repeat_entry(),
        full_entry(),
        size_entry(),
        flatten_entry(),
        unflatten_entry(),
        squeeze_entry(),
        unsqueeze_entry(),
        contiguous_entry(),
        detach_entry(),
        check_sizes_entry(),
        permute_entry(),
        transpose_entry(),
        select_entry(),
        slice_entry(),
        split_entry(),
        cat_entry(),
        pad_entry(),
        index_select_entry(),
        flip_entry(),
        roll_entry(),
        channel_shuffle_entry(),
        border_entry(),
        windows_entry(),
    };
    for (LayerEntry& entry : training_entries()) all.push_back(std::move(entry));
    return all;
  }();
  return entries;
}

}  // namespace fastnn

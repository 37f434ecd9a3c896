// Every tuned number of the convolution, with its unit and where it comes from.
//
// Costs are counted in vector multiply-adds, of which every processor that we know starts as many in a cycle as it
// starts loads (two, or one of 512 bits on Zen 4), and twice as many as stores.
#pragma once

#include <stdint.h>

namespace fastnn {
namespace tuned {
// ---- memory: bytes -----------------------------------------------------------------------------------------------
constexpr int64_t kBandBytes = 256 << 10;       // of a band's copy: half of the smallest L2 (Ice Lake client, 512 KB)
constexpr int64_t kTransformedBytes = 1 << 20;  // of a band's transformed input and sums: Zen 4's L2
constexpr int64_t kLeastTiles = 28;  // tiles of a Winograd band at least: two register tiles for each read of a weight
constexpr int64_t kBlockWeightBytes = 512 << 10;  // a block's weight, which is read again for each row: half of an L2
constexpr int64_t kRingBytes = 16 << 10;          // conv pixels that wait for their windows: half of the smallest L1
constexpr int64_t kStageBytes = 128 << 10;        // pooled pixels that wait to be written together: a quarter of L2
// Pixels that lie so many bytes apart fall into only two sets of the L1 cache, which cannot hold a tile's 14 of them.
constexpr int64_t kMeetingBytes = 2048;
constexpr int64_t kDeepBandBytes = 1 << 20;     // a band's copy and sums, where the weight should stay in cache
constexpr int64_t kFarWeightBytes = 4 << 20;    // a packed weight that no L2 holds
constexpr int64_t kMostPackedBytes = 24 << 20;  // a transformed weight at most: bands would read more from memory
constexpr int64_t kStreamBytes = 1 << 10;       // depthwise: so many bytes of a pixel form a stream
constexpr double kMostProducts = 0.7;  // phases: the largest share of direct's products with which its transforms pay
constexpr double kMostTimesComputed = 1.25;  // times that a conv pixel may be computed where bands overlap
constexpr double kSmallCall = 200e3;     // vector multiply-adds: such a call ends before torch's convolution has begun
constexpr double kCostPerThread = 12e3;  // vector multiply-adds: below, waking a second thread costs more than it saves

// ---- costs: vector multiply-adds ------------------------------------------------------------------------------------
constexpr double kStoreSum = 8;  // a tile's sum written to memory: zeroing, an addition, a store, its share of the call
constexpr double kPoolSum = 3;   // a sum pooled in a register: an addition, a maximum, its share of a store
constexpr double kPoolPixel = 3;           // a conv pixel pooled: a load, a maximum, and the addition that detects NaN
constexpr double kWriteOut = 10;           // a pooled vector: store, load again, transpose, store
constexpr double kCopy = 3;                // a vector of the input: load and store
constexpr double kTranspose = 6;           // the same transposed, with its share of a square's shuffles
constexpr double kWinogradMove = 3;        // a position's vector of inputs or outputs: a load, some additions, a store
constexpr double kReadWeight = 4;          // a vector of a weight that comes from L3
constexpr double kPhasesIn = 4;            // a transformed vector of the input: a load, a store, its share of additions
constexpr double kDepthwiseProduct = 1.2;  // a multiply-add with a load that it waits for
constexpr double kPackWeight = 16;         // a vector of the weight, which comes from far away, transposed
constexpr double kTransformPack = 3;       // factor of kPackWeight where the weight is transformed, too
constexpr double kMatrixProduct = 16;      // a multiplication by the matrix unit: 16 cycles on Sapphire Rapids
constexpr double kInFlight = 8;            // sums that keep the multipliers busy: latency 4 cycles, two start per cycle

// ---- backward: bytes and counts ------------------------------------------------------------------------------------
constexpr int64_t kNearBytes = 32 << 10;           // what an inner loop comes back to: the smallest L1
constexpr int64_t kGradientBandBytes = 128 << 10;  // of a band of gradients: a quarter of the smallest L2
constexpr int64_t kWindowBytes = 384 << 10;  // of the windows of the input and its gradient: most of the smallest L2
constexpr int64_t kProductBytes = 16 << 10;  // products that are added up at once: half of L1
constexpr int64_t kBandChannels = 64;        // output channels of a band: sums of so many stay accurate, lists short
constexpr int64_t kSlicePixels = 256;        // conv pixels at most whose input each output channel reads again
constexpr int64_t kFewAdditions = 16;        // to a weight's gradient: of more, `lost` keeps what rounding takes
constexpr int64_t kEnoughVectors = 4;        // sums under a pixel that keep the multipliers busy
constexpr int64_t kPartPixels = 8;        // conv pixels of a thread's part for each that its neighbour's part has too
constexpr int64_t kShareParts = 8;        // winograd: parts of the tiles, at least, of a share with sums of its own
constexpr int64_t kSharedSums = 8 << 20;  // winograd: bytes of all shares' sums: a quarter of a large L3

// ---- backward: costs in multiplied vectors, each in both gradients (measured on Sapphire Rapids) -------------------
constexpr double kWinogradGradientMove = 6;  // kWinogradMove of the weight's gradient: of 16 channels, lists are faster
constexpr double kListed = 23;               // a vector of gradients put into two lists: transposed, compressed, stored
constexpr double kImageVector = 6;           // a vector of the input and its gradient, moved in and out
constexpr double kPixelVector = 5;           // of the runs under a pixel, read, added to and written
constexpr double kListProduct = 3.5;         // a vector of a list entry's runs, which has to be loaded
constexpr double kZippedProduct = 2;         // the same where entries are multiplied in pairs, for each entry
constexpr double kSingle = 2;  // taps: an element of the input and its gradient, moved on its own from channels last
constexpr double kAddProduct = 4.5;  // taps: a vector of the input's gradient read, added to, written
constexpr double kSumLanes = 20;     // taps: a sum over the lanes, at the end
constexpr double kPutWinner = 3;     // taps: a window's gradient put at its argmax; twice that from channels last
constexpr double kPutRow = 16;       // taps: what a row of windows takes besides
constexpr int64_t kTapsInputs = 16;  // taps: input channels, at most: more leave L1 between output channels
constexpr int64_t kTapsDepth = 128;  // taps: products of an output, at most; their sums have to stay in L1

// ---- backward by stock: where the sweep (benchmarks/sweep.py) found torch faster -----------------------------------
constexpr int64_t kLargeWeight = 1 << 18;  // elements that leave the cache with each image
constexpr int64_t kFewWinners = 32;        // argmaxes per image and output channel, too few to read such a weight for
constexpr int64_t kFewImages = 4;          // of a call: fewer save less time than torch's own overhead takes
constexpr int64_t kShortRuns = 2;    // 1x1 kernels: so few vectors of input channels are multiplied sooner than listed
constexpr int64_t kStockTaps = 9;    // of a depthwise kernel: with more, torch took 4 to 6 times our time (Zen 4)
constexpr int64_t kFewChannels = 5;  // input channels: fewer take torch up to 13 times our time, forward too (Zen 4)
constexpr double kManyProducts = 2e7;     // with a matrix unit: products of a call
constexpr double kProductsANumber = 150;  // and products for each number that the call moves

}  // namespace tuned
}  // namespace fastnn

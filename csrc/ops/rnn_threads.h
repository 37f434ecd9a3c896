// How the work of a recurrent network is cut into parts, a thread each.
#pragma once

#include "../kernels/rnn.h"
#include "tensor.h"

namespace fastnn {

// How many threads pay. Steps are short products, one after the other, and starting a thread takes as long as thousands
// of them. So each thread must have a few million operations, more than useful_threads asks for.
inline int64_t rnn_chunks(double work, int64_t most) {
  return std::max<int64_t>(1, std::min(useful_threads(work / 40), most));
}

// Divides the sequences into `chunks` runs that take about the same time, and returns their bounds. The sequences are
// sorted, the longest first.
template <class T>
std::vector<int64_t> split_sequences(const RnnNetwork<T>& network, int64_t chunks) {
  constexpr double kStepRows = 0.8;  // a step costs as much as so many more rows: measured for all cells
  std::vector<int64_t> bounds{0};
  int64_t length = network.steps, longest = length;  // of this sequence, and of its run
  double own = 0, left = static_cast<double>(network.rows);
  for (int64_t sequence = 0; sequence < network.batch; ++sequence) {
    while (network.step[length - 1].rows <= sequence) --length;
    const int64_t to_come = chunks - static_cast<int64_t>(bounds.size());
    if (to_come > 0 && sequence > bounds.back()) {
      // Which run is the longer one, and by how much, if the sequence stays with this one or begins the next.
      const double ahead = own + kStepRows * longest - kStepRows * length;
      const double too_long = ahead + length - (left - length) / to_come, too_short = left / to_come - ahead;
      if (too_long > too_short || network.batch - sequence <= to_come) {
        bounds.push_back(sequence);
        longest = length;
        own = 0;
      }
    }
    own += length;
    left -= length;
  }
  bounds.push_back(network.batch);
  return bounds;
}

inline int64_t longest_chunk(const std::vector<int64_t>& bounds) {
  int64_t longest = 0;
  for (size_t i = 1; i < bounds.size(); ++i) longest = std::max(longest, bounds[i] - bounds[i - 1]);
  return longest;
}

// How many threads may share the hidden units of each step. A step of few rows takes as long as its recurrent weights
// take to be read from the cache, and each core has its own. Members must wait for each other and fetch what the others
// have computed: 0.2 us a step between neighbouring cores, 1.5 between distant ones, which costs no more than a member
// saves by reading as much less as it must here. The parallel region costs what a thread takes to wake up.
template <class T>
int64_t team_members(const RnnNetwork<T>& network) {
  constexpr double kBytesEach = 64 * 1024, kLeastBytes = 8e6;
  constexpr int64_t kRowsEach = 4;  // with more rows a thread, each takes sequences of its own as fast
  const double units = static_cast<double>(entry_of(network.mode).gates) * network.hidden;
  const double bytes = sizeof(Compute<T>) * units * network.outputs();
  const int64_t threads = torch::stable::get_num_threads();
  if (network.batch < 1 || network.batch > kRowsEach * threads || bytes * network.steps < kLeastBytes) return 1;
  return std::max<int64_t>(1, std::min({threads, Team::kMost, static_cast<int64_t>(bytes / kBytesEach)}));
}

// Runs body(member) by a team that does so much `work`: see parallel_team.
template <class T, class Body>
void parallel_steps(const RnnNetwork<T>& network, int64_t members, double work, const Body& body) {
  const double steps = static_cast<double>(network.rows) / static_cast<double>(network.batch);
  parallel_team(members, work / steps, steps, body);
}

// Packs the member's share of all weights into the network's memory for packed weights.
template <class T, class Kernels>
void pack_weights(const RnnNetwork<T>& network, const Kernels& kernels, const Member& member) {
  for (int64_t i = 0; i < network.layers * network.directions; ++i) {
    const RnnWeights<T>& weights = network.weights[i];
    kernels.pack(network, weights, member, const_cast<Compute<T>*>(weights.packed));
  }
}

// Runs forward in parts, a thread each. A part is a run of sequences. Where an even number of threads takes two
// directions, a part is one direction of a run, so that a thread reads half of the weights for twice the rows. Few
// sequences are taken by a team whose members share the hidden units.
template <class T>
class ForwardParts {
 public:
  ForwardParts(const RnnNetwork<T>& network, const RnnForwardKernels<T>& kernels, double work)
      : network_(network), kernels_(kernels), work_(work) {
    const int64_t members = team_members(network);
    chunks_ = rnn_chunks(work, network.directions * network.batch);
    if (members > 1 && (members > 2 || network.directions == 1)) {
      members_ = members;
      chunks_ = 1;
    } else if (network.directions > 1 && chunks_ % 2 == 0) {
      apart_ = true;
    } else {
      chunks_ = std::max<int64_t>(1, std::min(chunks_, network.batch));
    }
    bounds_ = split_sequences(network, apart_ ? chunks_ / 2 : chunks_);
    scratch_each_ = kernels.scratch_size(network, longest_chunk(bounds_));
  }

  int64_t scratch_size() const {
    return checked_sum(checked_product(chunks_, scratch_each_.shared),
                       checked_product(std::max(chunks_, members_), scratch_each_.own));
  }

  // Packs the weights first if `packs`.
  void run(bool packs, T* h_n, T* c_n, Compute<T>* scratch) const {
    if (members_ > 1) return run_team(packs, h_n, c_n, scratch);
    if (packs) pack_weights(network_, kernels_, Member());
    const int64_t layers = network_.layers, parts = static_cast<int64_t>(bounds_.size()) - 1;
    for (int64_t first = 0; first < layers; first += apart_ ? 1 : layers) {
      parallel_chunks(chunks_, chunks_, [&](int64_t chunk, int64_t, int64_t) {
        const int64_t part = chunk % parts;
        C* const shared = scratch + chunk * (scratch_each_.shared + scratch_each_.own);
        for (int64_t layer = first; layer < (apart_ ? first + 1 : layers); ++layer) {
          for (int64_t direction = 0; direction < network_.directions; ++direction) {
            if (apart_ && direction != chunk / parts) continue;
            Member itself;
            kernels_.run(network_, layer, direction, h_n, c_n, bounds_[part], bounds_[part + 1], itself,
                         {shared, shared + scratch_each_.shared});
          }
        }
      });
    }
  }

 private:
  using C = Compute<T>;

  void run_team(bool packs, T* h_n, T* c_n, C* scratch) const {
    parallel_steps(network_, members_, work_, [&](Member& member) {
      if (packs) pack_weights(network_, kernels_, member);
      member.end_round();
      for (int64_t layer = 0; layer < network_.layers; ++layer) {
        for (int64_t direction = 0; direction < network_.directions; ++direction) {
          kernels_.run(network_, layer, direction, h_n, c_n, 0, network_.batch, member,
                       {scratch, scratch + scratch_each_.shared + member.index() * scratch_each_.own});
        }
      }
    });
  }

  const RnnNetwork<T>& network_;
  const RnnForwardKernels<T>& kernels_;
  const double work_;
  int64_t members_ = 1, chunks_;
  RnnScratchSize scratch_each_;
  bool apart_ = false;
  std::vector<int64_t> bounds_;
};

}  // namespace fastnn

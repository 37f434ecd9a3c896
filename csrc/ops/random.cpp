// The generator and torch's bernoulli_ from its words, and the operators that draw.
#include "random.h"

#include <array>
#include <cmath>

#include "register.h"
#include "stock.h"

namespace fastnn {
namespace {

constexpr int kWords = 624, kShift = 397;

// The state as torch.get_rng_state() gives it. What normal distributions keep in it stays as it is.
struct StoredState {
  uint64_t seed;
  int32_t left, seeded;  // left: how many words are left, and one
  uint64_t next;         // the next word's place
  uint64_t words[kWords];
  double normal[3];
  int32_t has_normal;
  float next_normal;
  bool has_next_normal;
};
WithRandomState random_state_holder = nullptr;

constexpr int64_t kStateBytes = 5056;
static_assert(sizeof(StoredState) <= kStateBytes && offsetof(StoredState, words) == 24);

class Generator {
 public:
  // state: kStateBytes bytes. Raises where they are no state of a generator.
  explicit Generator(uint8_t* state) : stored_(state) {
    StoredState given;
    std::memcpy(&given, state, sizeof(given));
    left_ = given.left;
    next_ = static_cast<int>(std::min<uint64_t>(given.next, kWords));
    const bool is_fresh = left_ == 1;  // the words are made when the next one is taken
    FASTNN_CHECK(given.seeded == 1 && left_ >= 1 && left_ <= kWords && (is_fresh || next_ == kWords + 1 - left_),
                 "expected a state of torch's generator on the CPU");
    for (size_t i = 0; i < kWords; ++i) words_[i] = static_cast<uint32_t>(given.words[i]);
  }
  // Writes the state back.
  void store() const {
    StoredState to;
    std::memcpy(&to, stored_, sizeof(to));
    to.left = left_;
    to.next = static_cast<uint64_t>(next_);
    std::copy(words_.begin(), words_.end(), to.words);
    std::memcpy(stored_, &to, sizeof(to));
  }
  void draw(int64_t count, uint32_t* to) {
    while (count > 0) {
      if (left_ == 1) {
        make_words();
        left_ = kWords + 1;
        next_ = 0;
      }
      const int some = static_cast<int>(std::min<int64_t>(count, left_ - 1));
      const uint32_t* const from = words_.data() + next_;
      for (int i = 0; i < some; ++i) to[i] = tempered(from[i]);
      next_ += some;
      left_ -= some;
      to += some;
      count -= some;
    }
  }

 private:
  static uint32_t tempered(uint32_t x) {
    x ^= x >> 11;
    x ^= (x << 7) & 0x9d2c5680u;
    x ^= (x << 15) & 0xefc60000u;
    return x ^ (x >> 18);
  }
  static uint32_t twisted(uint32_t x, uint32_t next) {
    const uint32_t both = (x & 0x80000000u) | (next & 0x7fffffffu);
    return (both >> 1) ^ ((0u - (next & 1u)) & 0x9908b0dfu);
  }
  void make_words() {
    uint32_t* const w = words_.data();
    for (int i = 0; i < kWords - kShift; ++i) w[i] = w[i + kShift] ^ twisted(w[i], w[i + 1]);
    for (int i = kWords - kShift; i < kWords - 1; ++i) w[i] = w[i + kShift - kWords] ^ twisted(w[i], w[i + 1]);
    w[kWords - 1] = w[kShift - 1] ^ twisted(w[kWords - 1], w[0]);
  }

  uint8_t* stored_;
  std::array<uint32_t, kWords> words_;
  int left_, next_;
};

// As torch's bernoulli_: of two words, the 53 last bits are a number from 0 to 1.
template <class T>
void draw(uint8_t* state, double probability, T value, int64_t count, T* to) {
  constexpr int64_t kTogether = 512;
  constexpr int kLowBits = 32, kBits = 53;
  // Below this bound, in two parts: the compiler compares several numbers at once if they have 32 bits.
  const uint64_t bound = static_cast<uint64_t>(std::ceil(std::ldexp(probability, kBits)));
  const uint32_t high_bound = static_cast<uint32_t>(bound >> kLowBits), low_bound = static_cast<uint32_t>(bound);
  constexpr uint32_t kHigh = (1u << (kBits - kLowBits)) - 1;
  Generator generator(state);
  std::array<uint32_t, 2 * kTogether> all_words;
  const uint32_t* const words = all_words.data();
  for (int64_t first = 0; first < count; first += kTogether) {
    const int64_t some = std::min(kTogether, count - first);
    generator.draw(2 * some, all_words.data());
    T* const target = to + first;
    for (int64_t i = 0; i < some; ++i) {
      const uint32_t high = words[2 * i] & kHigh, low = words[2 * i + 1];
      target[i] = (high < high_bound) | ((high == high_bound) & (low < low_bound)) ? value : T(0);
    }
  }
  generator.store();
}

uint8_t* bytes_of(const Tensor& state) {
  FASTNN_CHECK(state.is_cpu() && state.scalar_type() == ScalarType::Byte && state.is_contiguous() &&
                   state.numel() == kStateBytes,
               "expected the ", kStateBytes, " bytes of torch.get_rng_state()");
  return mutable_data<uint8_t>(state);
}

// A new tensor of the sizes of `like`, filled by fill(tensor, its elements).
template <class Fill>
Tensor filled_like(const char* op, const Tensor& like, double probability, const Fill& fill) {
  FASTNN_CHECK(like.is_cpu() && probability >= 0 && probability <= 1, op, ": expected a probability, got ",
               probability);
  const bool is_double = like.scalar_type() == ScalarType::Double;
  FASTNN_CHECK(is_double || like.scalar_type() == ScalarType::Float, op, ": expected float32 or float64");
  Tensor ones = new_tensor(sizes_of(like), like.scalar_type());
  is_double ? fill(ones, mutable_data<double>(ones)) : fill(ones, mutable_data<float>(ones));
  return ones;
}

Tensor draw_ones_of_state(const Tensor& state, const Tensor& like, double probability) {
  return filled_like("draw_ones_of_state", like, probability, [&](const Tensor& ones, auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    draw(bytes_of(state), probability, T(1), ones.numel(), to);
  });
}

Tensor draw_ones_like(const Tensor& like, double probability) {
  return filled_like("draw_ones", like, probability, [&](const Tensor& ones, auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    if (!draw_as_torch(probability, T(1), ones.numel(), to)) draw_ones(ones, probability);
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  // As many ones and zeros as `like` has elements, as torch's bernoulli_ draws them.
  m.def("draw_ones(Tensor like, float probability) -> Tensor");
  // The same from a state as torch.get_rng_state() gives it, which goes on.
  m.def("draw_ones_of_state(Tensor(a!) state, Tensor like, float probability) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) {
  m.impl("draw_ones", FASTNN_BOX(draw_ones_like));
  m.impl("draw_ones_of_state", FASTNN_BOX(draw_ones_of_state));
}

}  // namespace

void set_random_state_holder(WithRandomState holder) {
  random_state_holder = holder;
}

template <class T>
bool draw_as_torch(double probability, T value, int64_t count, T* to) {
  if (!random_state_holder) return false;
  random_state_holder([&](uint8_t* state) { draw(state, probability, value, count, to); });
  return true;
}
template bool draw_as_torch(double, float, int64_t, float*);
template bool draw_as_torch(double, double, int64_t, double*);

}  // namespace fastnn

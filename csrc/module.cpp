// fastnn._C. Importing it registers the operators (by static initialisers of csrc/ops). It offers facts about the build
// and the machine, and the tables that Python reads.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "guard.h"
#include "kernels/conv/backward/plan.h"
#include "kernels/probe.h"
#include "kernels/rnn.h"
#include "kernels/team.h"
#include "kernels/update.h"
#include "network/bound_step.h"
#include "network/layer_table.h"
#include "ops/conv_plan.h"
#include "ops/conv_problem.h"
#include "ops/mlp_chain.h"
#include "ops/random.h"
#include "ops/team_balance.h"
#include "simd/activation.h"
#include "simd/isa.h"

namespace py = pybind11;

namespace {

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
#define FASTNN_APPEND(name, ...) \
  if (fastnn::isa_is_supported(fastnn::Isa::name)) names.push_back(#name);
  FASTNN_FOR_EACH_ISA(FASTNN_APPEND)
#undef FASTNN_APPEND
  return names;
}

double conv_forward_cost(const fastnn::Ints& input, const fastnn::Ints& weight, const fastnn::Ints& geometry) {
  using fastnn::Sizes;
  const fastnn::ConvPoolProblem problem =
      fastnn::problem_of({fastnn::ScalarType::Float, 0, "conv_forward_cost"}, Sizes(input.data(), input.size()),
                         Sizes(weight.data(), weight.size()), geometry);
  fastnn::PlanKey key =
      fastnn::plan_key<float>(fastnn::conv_kernels().get<float>(), problem.geometry, false, false, -1);
  key.request.threads = 1;
  return fastnn::plan_forward(key.geometry, key.request, key.machine).cost;
}

struct TeamRounds {
  std::vector<int64_t> values, done;
};

// One thread for each of `delays` joins a team so many microseconds after the call. In every round each of the `things`
// becomes the sum of its own value in the round before, its neighbour's value, and its number.
TeamRounds team_rounds(const std::vector<int64_t>& delays, int64_t rounds, int64_t things) {
  fastnn::Team team(static_cast<int64_t>(delays.size()));
  std::vector<uint64_t> now(static_cast<size_t>(things)), next(now);
  std::vector<int64_t> done(delays.size());
  std::vector<std::thread> threads;
  for (const int64_t delay : delays) {
    threads.emplace_back([&, delay] {
      std::this_thread::sleep_for(std::chrono::microseconds(delay));
      fastnn::Member member(team, static_cast<int64_t>(delays.size()));
      if (!member.joined()) return;
      for (int64_t round = 0; round < rounds; ++round) {
        const auto& from = round % 2 ? next : now;
        auto& to = round % 2 ? now : next;
        const fastnn::Share share = member.share(things);
        for (int64_t i = share.first; i < share.last; ++i) {
          to[static_cast<size_t>(i)] =
              from[static_cast<size_t>(i)] + from[static_cast<size_t>((i + 1) % things)] + static_cast<uint64_t>(i);
          ++done[static_cast<size_t>(member.index())];
        }
        member.end_round();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const auto& last = rounds % 2 ? next : now;
  return {{last.begin(), last.end()}, done};
}

// torch's generator. It is never freed, since a thread may still draw when the interpreter ends.
py::object* random_generator = nullptr;

// Only methods that torch has in C are called. Python would hand its lock to another thread, or raise
// KeyboardInterrupt, between two lines of its own code.
void with_random_state(const std::function<void(uint8_t* state)>& draw) {
  const py::gil_scoped_acquire alone;  // until the state is stored
  const py::object state = random_generator->attr("get_state")();
  draw(reinterpret_cast<uint8_t*>(state.attr("data_ptr")().cast<uintptr_t>()));
  random_generator->attr("set_state")(state);
}

void draw_from(const py::object& generator) {
  random_generator = new py::object(generator);
  fastnn::set_random_state_holder(with_random_state);
}

// Whether a team makes each call, if it takes so many nanoseconds by one thread or by a team.
std::vector<bool> team_choices(const std::vector<std::pair<double, double>>& calls) {
  fastnn::TeamBalance balance;
  std::vector<bool> choices;
  for (const auto& [one, team] : calls) {
    choices.push_back(!balance.prefers_one());
    choices.back() ? balance.add_team(1, team) : balance.add_one(1, one);
  }
  return choices;
}

// The table of activations: of each its name, its parameters with their defaults, and what its derivative comes from.
py::list activations() {
  py::list result;
  for (const fastnn::ActivationEntry& entry : fastnn::kActivations) {
    py::list parameters;
    for (const fastnn::ActivationParameter& parameter : entry.parameters) {
      if (parameter.name) parameters.append(py::make_tuple(parameter.name, parameter.value));
    }
    constexpr const char* kSources[] = {"nothing", "output", "input"};  // in the order of DerivedFrom
    result.append(py::make_tuple(entry.name, parameters, kSources[static_cast<int32_t>(entry.derived_from)]));
  }
  return result;
}

// The table of losses: of each torch's name, the name of its number or None and torch's default, and the name of its
// tensor of weights or None.
py::list losses() {
  py::list result;
  for (const fastnn::LossEntry& entry : fastnn::kLosses) {
    result.append(py::make_tuple(entry.name, entry.number, entry.value, entry.weight));
  }
  return result;
}

// The table of optimizers: of each the name of torch's class, those of its settings, and of what it keeps of a
// parameter: numbers with their first value, and tensors with the setting with which they are kept, or None.
py::list optimizers() {
  py::list result;
  for (const fastnn::OptimizerEntry& entry : fastnn::kOptimizers) {
    py::list settings, numbers, states;
    for (const fastnn::OptimizerSetting& setting : entry.settings) {
      if (setting.name) settings.append(setting.name);
    }
    for (const fastnn::OptimizerNumber& number : entry.numbers) {
      if (number.name) numbers.append(py::make_tuple(number.name, number.initial));
    }
    for (const fastnn::OptimizerState& state : entry.states) {
      if (state.name) states.append(py::make_tuple(state.name, state.setting));
    }
    result.append(py::make_tuple(entry.name, settings, numbers, states));
  }
  return result;
}

// The table of recurrent modes: of each torch's name, its gates, its states and what a step saves.
py::list recurrent_modes() {
  py::list result;
  for (const fastnn::RnnModeEntry& entry : fastnn::kRnnModes) {
    result.append(py::make_tuple(entry.name, entry.gates, entry.states, entry.saved));
  }
  return result;
}

// The algorithms of the convolution's forward and of its backward: names and what fastnn.explain says of them.
py::dict conv_algorithms() {
  py::dict forward, backward;
  for (const fastnn::AlgorithmEntry& entry : fastnn::kForwardEntries) forward[entry.name] = entry.words;
  for (const fastnn::AlgorithmEntry& entry : fastnn::kBackwardEntries) backward[entry.name] = entry.words;
  for (py::dict* const each : {&forward, &backward}) (*each)[fastnn::kPointwise.name] = fastnn::kPointwise.words;
  py::dict result;
  result["forward"] = forward;
  result["backward"] = backward;
  return result;
}

// The table of a network's layers: of each its name, its inputs, its attributes with their kinds and defaults, and
// whether a network has the layer in inference.
py::list network_layers() {
  py::list result;
  for (const fastnn::LayerEntry& entry : fastnn::layer_entries()) {
    py::list attributes;
    for (const fastnn::AttributeEntry& attribute : entry.attributes) {
      if (attribute.name) attributes.append(py::make_tuple(attribute.name, attribute.kind, attribute.value));
    }
    result.append(py::make_tuple(entry.name, entry.inputs, attributes, entry.make_float != nullptr));
  }
  return result;
}

PyObject *absent, *any, *some_tensor, *tensors;  // what a guard has in an object's place: see Guard

// Whether a guard's tuples hold. pybind11 does not call it, since its calls take four times as long.
PyObject* guard_holds(PyObject*, PyObject* tuples) {
  const int holds = fastnn::Guard(absent, any, some_tensor, tensors).holds(tuples);
  if (holds < 0) return nullptr;
  return PyBool_FromLong(holds);
}

PyMethodDef guard_holds_method = {"guard_holds", guard_holds, METH_O,
                                  "Whether objects hold what a trace rests on: see csrc/guard.h."};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of fastnn: CPU kernels and operator registration.";
  m.attr("version") = FASTNN_VERSION;
  m.attr("source_digest") = FASTNN_SOURCE_DIGEST;
  m.attr("interface_digest") = FASTNN_INTERFACE_DIGEST;
  m.attr("built_with_torch") = FASTNN_TORCH_VERSION;
  m.attr("compiler") = __VERSION__;
  m.def(
      "instruction_set", [] { return fastnn::isa_name(fastnn::active_isa()); },
      "The instruction set whose kernels run.");
  m.def("supported_instruction_sets", supported_isas, "Those compiled in that this machine can run, best last.");
  m.def(
      "use_instruction_set",
      [](const std::string& name) {
        if (!fastnn::use_isa(name.c_str())) {
          throw py::value_error("instruction set '" + name + "' is not one of supported_instruction_sets()");
        }
      },
      py::arg("name"), "Choose the kernels of another supported instruction set, for tests and measurements.");
  m.def(
      "kept_memory",
      [] { return std::make_pair(fastnn::KeptMemory::idle_bytes(), fastnn::KeptMemory::most_idle_bytes()); },
      "The bytes of the memory that training steps keep for the next one, and the most that they keep.");
  m.def("release_kept_memory", fastnn::KeptMemory::release, "Give it back to the system.");
  m.def(
      "set_onednn_dtypes",
      [](bool float32, bool bfloat16) {
        fastnn::onednn_dtypes.float32 = float32;
        fastnn::onednn_dtypes.bfloat16 = bfloat16;
      },
      py::arg("float32"), py::arg("bfloat16"),
      "Say in which dtypes torch leaves convolutions to oneDNN, which decides the memory format of some results.");
  m.def(
      "multiply_adds", [](int64_t rounds) { return fastnn::probe_kernels().multiply_adds(rounds); }, py::arg("rounds"),
      py::call_guard<py::gil_scoped_release>(),
      "Do independent float32 multiply-adds, to be timed: returns the number of operations.");
  m.def(
      "read",
      [](int64_t bytes, int64_t rounds) {
        const std::vector<float> data(static_cast<size_t>(bytes > 0 ? bytes : 0) / sizeof(float), 1.0f);
        return fastnn::probe_kernels().add_up(data.data(), static_cast<int64_t>(data.size()), rounds);
      },
      py::arg("bytes"), py::arg("rounds"), py::call_guard<py::gil_scoped_release>(),
      "Read a buffer of so many bytes from start to end, again and again, to be timed.");
  m.def(
      "team_rounds",
      [](const std::vector<int64_t>& delays, int64_t rounds, int64_t things) {
        if (delays.empty() || rounds < 0 || things < 1) throw py::value_error("expected threads and things");
        TeamRounds result;
        {
          const py::gil_scoped_release released;
          result = team_rounds(delays, rounds, things);
        }
        return std::make_pair(result.values, result.done);
      },
      py::arg("delays"), py::arg("rounds"), py::arg("things"),
      "Have threads that come after so many microseconds take rounds together, for tests: returns the outcome and how "
      "much each has done.");
  m.def("activations", activations,
        "The table of activations: of each its name, its parameters with their defaults, and what its derivative comes "
        "from.");
  m.def("losses", losses, "The table of losses: names, and those of their number, with its default, and weights.");
  m.def("optimizers", optimizers, "The table of optimizers: names, settings, and what is kept of a parameter.");
  m.attr("most_optimizer_states") = fastnn::kMostStates;
  m.def("recurrent_modes", recurrent_modes, "The table of recurrent modes: names, gates, states, what a step saves.");
  m.def("conv_algorithms", conv_algorithms,
        "The convolution's algorithms, of forward and backward: names and what they are for.");
  m.def(
      "conv_forward_cost", conv_forward_cost, py::arg("input"), py::arg("weight"), py::arg("geometry"),
      "What the planner expects a call of conv_relu_max_pool to cost by its own kernels, in multiply-adds of vectors, "
      "for contiguous float32 tensors of these sizes on one thread.");
  m.def(
      "network_layers", network_layers,
      "The table of a network's layers: names, inputs, attributes with their kinds and defaults, and whether inference "
      "has them.");
  m.attr("network_heading") = fastnn::kHeading;
  m.attr("most_places") = fastnn::kMostPlaces;
  m.attr("most_layers") = fastnn::kMostLayers;
  const py::object object_type = py::module_::import("builtins").attr("object");
  for (const auto& [name, place] : {std::pair("absent", &absent), {"any", &any}, {"some_tensor", &some_tensor}}) {
    *place = object_type().release().ptr();
    m.attr(name) = py::reinterpret_borrow<py::object>(*place);
  }
  m.def(
      "set_tensor_classes", [](const py::tuple& classes) { tensors = py::tuple(classes).release().ptr(); },
      py::arg("classes"), "The classes of tensors of which a guard takes one for another.");
  m.attr("guard_holds") = py::reinterpret_steal<py::object>(PyCFunction_New(&guard_holds_method, nullptr));
  m.def("release_training_step", fastnn::BoundSteps::release, py::arg("number"),
        "Forget what fastnn::bind_training_step bound to this number.");
  m.def("draw_from", draw_from, py::arg("generator"),
        "Draw what networks drop from this generator's state, which must be as torch.get_rng_state() gives it.");
  m.def("forget_pass", fastnn::forget_pass, py::arg("number"),
        "Forget what fastnn::network_with_pass has left under this number.");
  m.def("team_choices", team_choices, py::arg("calls"),
        "Whether a team makes each call, if it takes so many nanoseconds by one thread or by a team, for tests.");
}

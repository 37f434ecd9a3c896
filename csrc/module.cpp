// fastnn._C: importing it registers the operators (static initialisers of csrc/ops); what it offers itself are
// facts of the build and of the machine.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "kernels/probe.h"
#include "simd/isa.h"

namespace py = pybind11;

namespace {

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
#define FASTNN_APPEND(name) \
  if (fastnn::isa_is_supported(fastnn::Isa::name)) names.push_back(#name);
  FASTNN_FOR_EACH_ISA(FASTNN_APPEND)
#undef FASTNN_APPEND
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of fastnn: CPU kernels and operator registration.";
  m.attr("version") = FASTNN_VERSION;
  m.attr("source_digest") = FASTNN_SOURCE_DIGEST;
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
}

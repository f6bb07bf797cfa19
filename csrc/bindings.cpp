// The extension module.
#include "bindings.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bandwidth.hpp"
#include "scores.hpp"

using namespace fastmtp;

NB_MODULE(_native, m) {
  m.doc() = "fastmtp's CPU engine; docs/native-engine.md says how it works.";

  m.attr("PAGE_TOKENS") = kPageTokens;

  nb::class_<Runtime>(m, "Runtime")
      .def("__init__",
           [](Runtime* place, int threads) {
             require(threads >= 1, "threads must be 1 or more");
             new (place) Runtime(threads);
           },
           nb::arg("threads"))
      .def_ro("threads", &Runtime::threads)
      .def_ro("matmul_seconds", &Runtime::matmul_seconds)
      .def_prop_ro("kernels", [](const Runtime& runtime) { return runtime.kernels.name; });

  bind_weights(m);
  bind_model(m);

  m.def("scores",
        [](Runtime& runtime, const Matrix& matrix, const Input& states, const Output& out) {
          const int rows = length_of(states), stride = stride_of(matrix);
          const float* from = data_of<float>(states, "states", "[rows, inputs]", {rows, matrix.inputs()});
          float* to = data_of<float>(out, "out", "[rows, stride]", {rows, stride});
          nb::gil_scoped_release release;
          scores(runtime, matrix, from, rows, to, stride);
        },
        nb::arg("runtime"), nb::arg("matrix"), nb::arg("states"), nb::arg("out").noconvert());

  m.def("read_seconds", &read_seconds, nb::arg("runtime"), nb::arg("bytes"), nb::arg("repeats"),
        nb::call_guard<nb::gil_scoped_release>());

  m.def("available_kernels", [] {
    std::vector<std::string> names;
    for (const Kernels* const* table = available_kernels(); *table; table++) names.emplace_back((*table)->name);
    return names;
  });
}

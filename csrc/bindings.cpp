// The extension module.
#include "bindings.hpp"

using namespace fastmtp;

NB_MODULE(_native, m) {
  m.doc() = "fastmtp's CPU engine; docs/native-engine.md describes it.";
  // An application that holds a model when Python ends would read of leaks.
  nb::set_leak_warnings(false);
  m.attr("PAGE_TOKENS") = kPageTokens;

  nb::class_<Runtime>(m, "Runtime")
      .def(nb::init<int>(), "threads"_a)
      .def_ro("threads", &Runtime::threads)
      .def_ro("matmul_seconds", &Runtime::matmul_seconds)
      .def_prop_ro("kernels", [](const Runtime& runtime) { return runtime.kernels.name; });

  bind_weights(m);
  bind_model(m);

  m.def("scores", &scores, "runtime"_a, "matrix"_a, "states"_a, "out"_a.noconvert(), WithoutGil());
  m.def("read_seconds", &Runtime::read_seconds, "runtime"_a, "bytes"_a, "repeats"_a, WithoutGil());
  m.def("available_kernels", [] {
    std::vector<std::string> names;
    for (const Kernels* table : available_kernels()) names.emplace_back(table->name);
    return names;
  });
}

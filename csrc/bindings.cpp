// The extension module.
#include "bindings.hpp"

#include <algorithm>

using namespace fastmtp;

namespace {

// By part, for each thread, seconds of work and of waiting, of some owners.
nb::dict part_seconds(Runtime& runtime, std::initializer_list<Owner> owners) {
  const std::vector<Laps> laps = runtime.laps();
  nb::dict found;
  for (int part = 0; part < kParts; part++) {
    nb::list threads;
    for (const Laps& one : laps) {
      double work = 0, waiting = 0;
      for (const Owner owner : owners) {
        work += one.work[int(owner)][part];
        waiting += one.waiting[int(owner)][part];
      }
      threads.append(nb::make_tuple(work, waiting));
    }
    found[kPartNames[part]] = threads;
  }
  return found;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "fastmtp's CPU engine; docs/native-engine.md describes it.";
  // An application that holds a model when Python ends would read of leaks.
  nb::set_leak_warnings(false);
  m.attr("PAGE_TOKENS") = kPageTokens;

  nb::class_<Runtime>(m, "Runtime")
      .def(nb::init<int>(), "threads"_a)
      .def_ro("threads", &Runtime::threads)
      .def("time_parts", &Runtime::time_parts, "on"_a)
      .def_prop_ro("part_seconds", [](Runtime& runtime) { return part_seconds(runtime, {Owner::target, Owner::head}); })
      .def_prop_ro("head_seconds", [](Runtime& runtime) { return part_seconds(runtime, {Owner::head}); })
      .def_prop_ro("kernels", [](const Runtime& runtime) { return runtime.kernels.name; });

  bind_weights(m);
  bind_model(m);

  m.def("scores", &scores, "runtime"_a, "matrix"_a, "states"_a, "out"_a.noconvert(), WithoutGil());
  m.def("read_seconds", &Runtime::read_seconds, "runtime"_a, "bytes"_a, "repeats"_a, WithoutGil());
  m.def("product_peak", &Runtime::product_peak, "runtime"_a, "type"_a, WithoutGil());
  m.def("attention_peak", &Runtime::attention_peak, "runtime"_a, WithoutGil());
  m.def("phase_seconds", &Runtime::phase_seconds, "runtime"_a, WithoutGil());
  m.def("small_numbers",
        [](uint64_t key, int size, uint64_t limit) {
          Numbers found(std::max(size, 0));
          found.resize(kernels().small_numbers(key, size, limit, found.data()));
          return found;
        },
        "key"_a, "size"_a, "limit"_a, WithoutGil());
  m.def("product_seconds",
        [](Runtime& runtime, const Matrix& matrix, int rows) {
          require(rows > 0, "rows must be 1 or more");
          return runtime.product_seconds(matrix, rows);
        },
        "runtime"_a, "matrix"_a, "rows"_a, WithoutGil());
  m.def("available_kernels", [] {
    std::vector<std::string> names;
    for (const Kernels* table : available_kernels()) names.emplace_back(table->name);
    return names;
  });
}

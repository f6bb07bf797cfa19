// The extension module: weights are filled from Python, forward passes run without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>

#include "bandwidth.hpp"
#include "draft.hpp"

namespace nb = nanobind;
using namespace fastmtp;

namespace {

using Integers = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

using Numbers = std::vector<int32_t>;
using Parts = std::vector<std::pair<const Matrix*, Integers>>;

// So that attention finds the nodes in two pages.
constexpr const char* kTreeTooLarge = "a tree has at most 256 tokens";

std::vector<Segment> segments_of(const Stack& stack, const std::vector<Cache*>& caches, const Numbers& starts,
                                 const Numbers& counts, size_t tokens) {
  require(!stack.layers.empty(), "the stack has no layers");
  require(caches.size() == starts.size() && caches.size() == counts.size(), "caches, starts and counts differ in length");
  std::vector<Segment> segments;
  size_t total = 0;
  for (size_t i = 0; i < caches.size(); i++) {
    require(starts[i] >= 0 && counts[i] > 0, "a segment needs a start of 0 or more and at least one token");
    segments.push_back({caches[i], starts[i], counts[i]});
    total += counts[i];
  }
  require(total > 0 && total == tokens, "the counts must add up to the number of tokens");
  return segments;
}

std::vector<DraftRows> rows_of(const Stack& stack, const Parts& rows) {
  require(!rows.empty(), "a draft needs rows to score");
  std::vector<DraftRows> parts;
  for (const auto& [matrix, ids] : rows) {
    require(ids.size() > 0 && int(ids.size()) <= matrix->outputs() && matrix->inputs() == stack.shape.hidden &&
                matrix->type() == rows[0].first->type(),
            "rows must be [ids or more, hidden], all of one type");
    parts.push_back({matrix, ids.data(), int(ids.size())});
  }
  return parts;
}

void check_tokens(const int32_t* tokens, size_t count, const Matrix& embedding) {
  for (size_t i = 0; i < count; i++)
    require(tokens[i] >= 0 && tokens[i] < embedding.outputs(), "a token id is outside the vocabulary");
}

void check_draft(const Drafter& drafter, int start, const Numbers& tokens, const Rows& before) {
  require(start >= 0 && !tokens.empty(), "a draft needs a start of 0 or more and at least one token");
  check_tokens(tokens.data(), tokens.size(), drafter.embedding());
  require(before.shape(0) == tokens.size() && int(before.shape(1)) == drafter.stack().shape.hidden,
          "states must be [tokens, hidden]");
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "fastmtp's CPU engine; docs/native-engine.md says how it works.";

  m.attr("PAGE_TOKENS") = kPageTokens;

  nb::enum_<Type>(m, "Type").value("bf16", Type::bf16).value("int8", Type::int8).value("int4", Type::int4);

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

  nb::class_<Matrix>(m, "Matrix")
      .def(nb::init<Type, int, int, bool>(), nb::arg("type"), nb::arg("outputs"), nb::arg("inputs"),
           nb::arg("bias") = false)
      .def_prop_ro("type", &Matrix::type)
      .def_prop_ro("outputs", &Matrix::outputs)
      .def_prop_ro("inputs", &Matrix::inputs)
      .def_prop_ro("bytes", &Matrix::bytes)
      .def_prop_ro("stride", &stride_of)
      .def("pack",
           [](Matrix& matrix, const Integers& places, const Rows& rows) {
             require(rows.shape(0) == places.size() && int(rows.shape(1)) == matrix.inputs(),
                     "rows must be [places, inputs]");
             nb::gil_scoped_release release;
             matrix.pack(places.data(), rows.data(), int(places.size()));
           })
      .def("set_bias",
           [](Matrix& matrix, const Integers& places, const Floats& values) {
             require(values.size() == places.size(), "a bias needs one value for each place");
             matrix.set_bias(places.data(), values.data(), int(places.size()));
           })
      .def("unpack",
           [](const Matrix& matrix, int output, Output row) {
             require(output >= 0 && output < matrix.outputs(), "no such output");
             require(row.shape(0) == 1 && int(row.shape(1)) == matrix.inputs(), "row must be [1, inputs]");
             matrix.unpack(output, row.data());
           })
      .def("copy", [](Matrix& matrix, const Integers& places, const Matrix& source, const Integers& outputs) {
        require(outputs.size() == places.size(), "each place needs one output of the source");
        matrix.copy(places.data(), source, outputs.data(), int(places.size()));
      });

  nb::class_<Layer>(m, "Layer")
      .def_prop_ro("query_key_value", [](Layer& layer) -> Matrix& { return layer.query_key_value; }, nb::rv_policy::reference_internal)
      .def_prop_ro("out", [](Layer& layer) -> Matrix& { return layer.out; }, nb::rv_policy::reference_internal)
      .def_prop_ro("gate_up", [](Layer& layer) -> Matrix& { return layer.gate_up; }, nb::rv_policy::reference_internal)
      .def_prop_ro("down", [](Layer& layer) -> Matrix& { return layer.down; }, nb::rv_policy::reference_internal)
      .def_rw("input_norm", &Layer::input_norm)
      .def_rw("attention_out_norm", &Layer::attention_out_norm)
      .def_rw("feed_forward_norm", &Layer::feed_forward_norm)
      .def_rw("feed_forward_out_norm", &Layer::feed_forward_out_norm)
      .def_rw("query_norm", &Layer::query_norm)
      .def_rw("key_norm", &Layer::key_norm);

  nb::class_<Stack>(m, "Stack")
      .def("__init__",
           [](Stack* place, int hidden, int heads, int key_heads, int head_size, int feed_forward, float epsilon,
              float attention_scale, bool gelu, const std::vector<std::pair<std::vector<float>, float>>& ropes) {
             require(hidden > 0 && heads > 0 && key_heads > 0 && head_size > 0 && feed_forward > 0,
                     "every size must be above 0");
             require(heads % key_heads == 0, "the query heads must be a multiple of the key heads");
             require(head_size % 2 == 0 && head_size <= kLargestHead, "the head size must be even and at most 512");
             for (const auto& rope : ropes)
               require(int(rope.first.size()) == head_size / 2, "a rope needs one frequency for each pair");
             auto* stack = new (place) Stack(
                 {hidden, heads, key_heads, head_size, feed_forward, epsilon, attention_scale, gelu});
             for (const auto& [frequencies, scale] : ropes) stack->ropes.push_back({frequencies, scale});
           },
           nb::kw_only(), nb::arg("hidden"), nb::arg("heads"), nb::arg("key_heads"), nb::arg("head_size"),
           nb::arg("feed_forward"), nb::arg("epsilon"), nb::arg("attention_scale"), nb::arg("gelu"), nb::arg("ropes"))
      .def("add_layer",
           [](Stack& stack, Type type, bool bias, bool out_bias, bool feed_forward_bias, int window, int rope) -> Layer& {
             require(rope >= 0 && rope < int(stack.ropes.size()), "no such rope");
             Layer& layer = stack.layers.emplace_back(stack.shape, type, bias, out_bias, feed_forward_bias);
             layer.window = window;
             layer.rope = rope;
             return layer;
           },
           nb::rv_policy::reference_internal, nb::arg("type"), nb::kw_only(), nb::arg("bias"), nb::arg("out_bias"),
           nb::arg("feed_forward_bias"), nb::arg("window"), nb::arg("rope"))
      .def_prop_ro("layers",
                   [](Stack& stack) {
                     std::vector<Layer*> layers;
                     for (Layer& layer : stack.layers) layers.push_back(&layer);
                     return layers;
                   },
                   nb::rv_policy::reference_internal)
      .def_rw("final_norm", &Stack::final_norm)
      .def("new_cache", [](const Stack& stack) {
        return Cache(int(stack.layers.size()), stack.shape.key_heads, stack.shape.head_size);
      });

  nb::class_<Cache>(m, "Cache")
      .def("reserve", &Cache::reserve, nb::arg("tokens"))
      .def("move",
           [](Cache& cache, const Numbers& slots, int start) {
             for (size_t i = 0; i < slots.size(); i++)
               require(slots[i] >= start + int(i) && slots[i] < cache.capacity() && (i == 0 || slots[i] > slots[i - 1]),
                       "slots must ascend, from their new places on, within the cache");
             require(start >= 0, "a start of 0 or more");
             cache.move(slots.data(), int(slots.size()), start);
           },
           nb::arg("slots"), nb::arg("start"))
      .def_prop_ro("capacity", &Cache::capacity)
      .def_prop_ro("page_bytes", &Cache::page_bytes);

  nb::class_<Projection>(m, "Projection")
      .def(nb::init<Type, int>(), nb::arg("type"), nb::arg("hidden"))
      .def_prop_ro("matrix", [](Projection& projection) -> Matrix& { return projection.matrix; }, nb::rv_policy::reference_internal)
      .def_rw("hidden_norm", &Projection::hidden_norm)
      .def_rw("token_norm", &Projection::token_norm);

  m.def("target_forward",
        [](Runtime& runtime, const Stack& stack, const Matrix& embedding, float embedding_scale,
           const std::vector<Cache*>& caches, const Numbers& starts, const Numbers& counts, const Numbers& tokens,
           Output states, const Numbers& parents, std::optional<Output> last_inputs) {
          auto segments = segments_of(stack, caches, starts, counts, tokens.size());
          check_tokens(tokens.data(), tokens.size(), embedding);
          require(states.shape(0) == tokens.size() && int(states.shape(1)) == stack.shape.hidden, "states must be [tokens, hidden]");
          require(!last_inputs || (last_inputs->shape(0) == tokens.size() && int(last_inputs->shape(1)) == stack.shape.hidden),
                  "last inputs must be [tokens, hidden]");
          require(parents.empty() || (caches.size() == 1 && parents.size() == tokens.size()), "a tree is one sequence's, with a parent for each token");
          require(parents.size() <= kPageTokens, kTreeTooLarge);
          for (size_t i = 0; i < parents.size(); i++)
            require(parents[i] >= -1 && parents[i] < int32_t(i), "a token of a tree comes after its parent");
          const Tree tree(starts[0], parents);
          if (!tree.is_chain()) segments[0].tree = &tree;
          nb::gil_scoped_release release;
          target_forward(runtime, stack, {embedding, embedding_scale}, segments, tokens.data(), states.data(),
                         last_inputs ? last_inputs->data() : nullptr);
        },
        nb::arg("runtime"), nb::arg("stack"), nb::arg("embedding"), nb::arg("embedding_scale"), nb::arg("caches"),
        nb::arg("starts"), nb::arg("counts"), nb::arg("tokens"), nb::arg("states"), nb::arg("parents") = Numbers(),
        nb::arg("last_inputs") = nb::none());

  m.def("head_forward",
        [](Runtime& runtime, const Stack& stack, const Projection& projection, const Matrix& embedding,
           float embedding_scale, const std::vector<Cache*>& caches, const Numbers& starts, const Numbers& counts,
           const Numbers& tokens, const Rows& before, Output states) {
          const auto segments = segments_of(stack, caches, starts, counts, tokens.size());
          check_tokens(tokens.data(), tokens.size(), embedding);
          for (const auto shape : {before.shape(1), states.shape(1)})
            require(int(shape) == stack.shape.hidden, "states must be [tokens, hidden]");
          require(before.shape(0) == tokens.size() && states.shape(0) == tokens.size(), "states must be [tokens, hidden]");
          nb::gil_scoped_release release;
          head_forward(runtime, stack, projection, {embedding, embedding_scale}, segments, tokens.data(), before.data(), states.data());
        });

  m.def("scores", [](Runtime& runtime, const Matrix& matrix, const Rows& states, Output out) {
    require(int(states.shape(1)) == matrix.inputs(), "states must be [rows, inputs]");
    require(out.shape(0) >= states.shape(0) && int(out.shape(1)) >= matrix.blocks() * kLanes, "out must be [rows, stride]");
    nb::gil_scoped_release release;
    scores(runtime, matrix, states.data(), int(states.shape(0)), out.data(), int(out.shape(1)));
  });

  m.def("choices", [](Runtime& runtime, const Matrix& matrix, const Rows& states) {
    require(int(states.shape(1)) == matrix.inputs(), "states must be [rows, inputs]");
    nb::gil_scoped_release release;
    return choices(runtime, matrix, states.data(), int(states.shape(0)));
  });

  nb::class_<Candidates>(m, "Candidates")
      .def_ro("tokens", &Candidates::tokens)
      .def_ro("confidences", &Candidates::confidences);

  nb::class_<Drafter>(m, "Drafter")
      .def("__init__",
           [](Drafter* place, Runtime& runtime, const Stack& stack, const Projection& projection,
              const Matrix& embedding, float embedding_scale, Cache& cache) {
             new (place) Drafter(runtime, stack, projection, {embedding, embedding_scale}, cache);
           },
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(),
           nb::keep_alive<1, 7>())
      .def("chain",
           [](Drafter& drafter, int start, const Numbers& tokens, const Rows& before, const Parts& rows, int steps) {
             const auto parts = rows_of(drafter.stack(), rows);
             for (const DraftRows& part : parts) check_tokens(part.ids, part.count, drafter.embedding());
             check_draft(drafter, start, tokens, before);
             require(steps >= 1, "a chain has one step or more");
             nb::gil_scoped_release release;
             return drafter.chain(start, int(tokens.size()), tokens.data(), before.data(), parts, steps);
           })
      .def("start_tree",
           [](Drafter& drafter, int start, const Numbers& tokens, const Rows& before, const Parts& rows, int width) {
             const auto parts = rows_of(drafter.stack(), rows);
             check_draft(drafter, start, tokens, before);
             nb::gil_scoped_release release;
             return drafter.start_tree(start, int(tokens.size()), tokens.data(), before.data(), parts, width);
           })
      .def("extend_tree",
           [](Drafter& drafter, const Numbers& parents, const Numbers& tokens, const Parts& rows, int width) {
             const auto parts = rows_of(drafter.stack(), rows);
             check_tokens(tokens.data(), tokens.size(), drafter.embedding());
             require(!tokens.empty() && parents.size() == tokens.size(), "each new node needs a parent and a token");
             require(drafter.nodes() + tokens.size() <= kPageTokens, kTreeTooLarge);
             for (const int32_t parent : parents)
               require(parent >= 0 && parent < drafter.nodes(), "a parent is a node of an earlier call");
             nb::gil_scoped_release release;
             return drafter.extend_tree(parents, tokens.data(), parts, width);
           });

  m.def("read_seconds", &read_seconds, nb::arg("runtime"), nb::arg("bytes"), nb::arg("repeats"),
        nb::call_guard<nb::gil_scoped_release>());

  m.def("available_kernels", [] {
    std::vector<std::string> names;
    for (const Kernels* const* table = available_kernels(); *table; table++) names.emplace_back((*table)->name);
    return names;
  });
}

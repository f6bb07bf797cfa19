// Models, heads, drafters and their caches. Whatever the caller gives, nothing is read or written out of bounds.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "bindings.hpp"
#include "draft.hpp"
#include "scores.hpp"

namespace fastmtp {
namespace {

using Parts = std::vector<std::pair<const Matrix*, Input>>;

// So that attention finds the nodes in two pages.
constexpr const char* kTreeTooLarge = "a tree has at most 256 tokens";
constexpr const char* kTokensHidden = "[tokens, hidden]";

void check_segment(const Stack& stack, const Cache* cache, int start, int count) {
  require(cache, "a cache is None");
  require(stack.fits(*cache), "a cache is of another shape; it must come from this model's (or head's) new_cache()");
  require(start >= 0 && count > 0, "a segment needs a start of 0 or more and at least one token");
  require(start <= cache->capacity(), "a segment starts behind the end of its cache");
}

void check_tokens(const int32_t* tokens, size_t count, const Matrix& embedding) {
  for (size_t i = 0; i < count; i++)
    require(tokens[i] >= 0 && tokens[i] < embedding.outputs(), "a token id is outside the vocabulary");
}

std::vector<Segment> segments_of(const Stack& stack, const std::vector<Cache*>& caches, const Numbers& starts,
                                 const Numbers& counts, size_t tokens) {
  require(caches.size() == starts.size() && caches.size() == counts.size(),
          "caches, starts and counts differ in length");
  std::vector<Segment> segments;
  size_t total = 0;
  for (size_t i = 0; i < caches.size(); i++) {
    check_segment(stack, caches[i], starts[i], counts[i]);
    segments.push_back({caches[i], starts[i], counts[i]});
    total += counts[i];
  }
  require(total > 0 && total == tokens, "the counts must add up to the number of tokens");
  return segments;
}

void check_tree(const Numbers& parents, size_t caches, size_t tokens) {
  require(parents.empty() || (caches == 1 && parents.size() == tokens),
          "a tree is one sequence's, with a parent for each token");
  require(parents.size() <= kPageTokens, kTreeTooLarge);
  for (size_t i = 0; i < parents.size(); i++)
    require(parents[i] >= -1 && parents[i] < int32_t(i), "a token of a tree comes after its parent");
}

std::vector<DraftRows> rows_of(const Stack& stack, const Parts& rows) {
  require(!rows.empty(), "a draft needs rows to score");
  std::vector<DraftRows> parts;
  for (const auto& [matrix, ids] : rows) {
    require(matrix, "a matrix of draft rows is None");
    const int count = length_of(ids);
    parts.push_back({matrix, data_of<int32_t>(ids, "the ids of draft rows", "[ids]", {count}), count});
    require(count > 0 && count <= matrix->outputs() && matrix->inputs() == stack.hidden &&
                matrix->type() == rows[0].first->type(),
            "rows must be [ids or more, hidden], all of one type");
  }
  return parts;
}

// The states before a draft's tokens.
const float* check_draft(const Drafter& drafter, int start, const Numbers& tokens, const Input& before) {
  check_segment(drafter.head().stack, &drafter.cache(), start, int(tokens.size()));
  check_tokens(tokens.data(), tokens.size(), drafter.head().model.embedding);
  return data_of<float>(before, "states", kTokensHidden, {int(tokens.size()), drafter.head().stack.hidden});
}

void check_width(int width) { require(width >= 1, "a width of 1 or more"); }

void bind_cache(nb::module_& m) {
  nb::class_<Cache>(m, "Cache")
      .def("reserve", &Cache::reserve, nb::arg("tokens"))
      .def("commit",
           [](Cache& cache, int start, const Numbers& slots) {
             require(start >= 0, "a start of 0 or more");
             for (size_t i = 0; i < slots.size(); i++)
               require(slots[i] - int64_t(i) >= start && slots[i] < cache.capacity() &&
                           (i == 0 || slots[i] > slots[i - 1]),
                       "slots must ascend, from their new places on, within the cache");
             cache.commit(start, slots);
           },
           nb::arg("start"), nb::arg("slots"))
      .def_prop_ro("capacity", &Cache::capacity)
      .def_prop_ro("page_bytes", &Cache::page_bytes);
}

void bind_decoder(nb::module_& m) {
  nb::class_<Model>(m, "Model")
      .def("__init__",
           [](Model* place, Runtime& runtime, const UniformStack& stack, const Matrix& embedding,
              const Matrix& lm_head, float embedding_scale) {
             new (place) Model(runtime, stack, embedding, lm_head, embedding_scale);
           },
           nb::arg("runtime"), nb::arg("stack"), nb::arg("embedding"), nb::arg("lm_head"), nb::arg("embedding_scale"),
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>())
      .def("new_cache", [](const Model& model) { return model.stack.new_cache(); })
      .def("forward",
           [](const Model& model, const std::vector<Cache*>& caches, const Numbers& starts, const Numbers& counts,
              const Numbers& tokens, const Output& states, const Numbers& parents,
              const std::optional<Output>& last_inputs) {
             auto segments = segments_of(model.stack, caches, starts, counts, tokens.size());
             check_tokens(tokens.data(), tokens.size(), model.embedding);
             check_tree(parents, caches.size(), tokens.size());
             const std::initializer_list<int> shape{int(tokens.size()), model.stack.hidden};
             float* to = data_of<float>(states, "states", kTokensHidden, shape);
             float* given = last_inputs ? data_of<float>(*last_inputs, "last inputs", kTokensHidden, shape) : nullptr;
             const Tree tree(starts[0], parents);
             if (!tree.is_chain()) segments[0].tree = &tree;
             nb::gil_scoped_release release;
             model.forward(segments, tokens.data(), to, given);
           },
           nb::arg("caches"), nb::arg("starts"), nb::arg("counts"), nb::arg("tokens"), nb::arg("states").noconvert(),
           nb::arg("parents") = Numbers(), nb::arg("last_inputs").noconvert() = nb::none())
      .def("logits",
           [](const Model& model, const Input& states, const Output& out) {
             const int rows = length_of(states), stride = stride_of(model.lm_head);
             const float* from = data_of<float>(states, "states", "[rows, hidden]", {rows, model.stack.hidden});
             float* to = data_of<float>(out, "out", "[rows, stride]", {rows, stride});
             nb::gil_scoped_release release;
             scores(model.runtime, model.lm_head, from, rows, to, stride);
           },
           nb::arg("states"), nb::arg("out").noconvert())
      .def("argmax",
           [](const Model& model, const Input& states) {
             const int rows = length_of(states);
             const float* from = data_of<float>(states, "states", "[rows, hidden]", {rows, model.stack.hidden});
             nb::gil_scoped_release release;
             return argmax(model.runtime, model.lm_head, from, rows);
           },
           nb::arg("states"));

  nb::class_<Head>(m, "Head")
      .def("__init__",
           [](Head* place, const Model& model, const UniformStack& stack, const Projection& projection) {
             new (place) Head(model, stack, projection);
           },
           nb::arg("model"), nb::arg("stack"), nb::arg("projection"), nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(),
           nb::keep_alive<1, 4>())
      .def("new_cache", [](const Head& head) { return head.stack.new_cache(); })
      .def("forward",
           [](const Head& head, Cache& cache, int start, const Numbers& tokens, const Input& before,
              const Output& after) {
             const int count = int(tokens.size());
             check_segment(head.stack, &cache, start, count);
             check_tokens(tokens.data(), tokens.size(), head.model.embedding);
             const float* from = data_of<float>(before, "the states before", kTokensHidden, {count, head.stack.hidden});
             float* to = data_of<float>(after, "the states after", kTokensHidden, {count, head.stack.hidden});
             nb::gil_scoped_release release;
             head.forward({&cache, start, count}, tokens.data(), from, to);
           },
           nb::arg("cache"), nb::arg("start"), nb::arg("tokens"), nb::arg("before"), nb::arg("after").noconvert());
}

void bind_drafter(nb::module_& m) {
  nb::class_<Candidates>(m, "Candidates")
      .def_ro("tokens", &Candidates::tokens)
      .def_ro("confidences", &Candidates::confidences);

  nb::class_<Drafter>(m, "Drafter")
      .def("__init__",
           [](Drafter* place, const Head& head, Cache& cache) {
             check_segment(head.stack, &cache, 0, 1);
             new (place) Drafter(head, cache);
           },
           nb::arg("head"), nb::arg("cache"), nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
      .def("chain",
           [](Drafter& drafter, int start, const Numbers& tokens, const Input& before, const Parts& rows, int steps) {
             const auto parts = rows_of(drafter.head().stack, rows);
             for (const DraftRows& part : parts) check_tokens(part.ids, part.count, drafter.head().model.embedding);
             const float* states = check_draft(drafter, start, tokens, before);
             require(steps >= 1, "a chain has one step or more");
             nb::gil_scoped_release release;
             return drafter.chain(start, int(tokens.size()), tokens.data(), states, parts, steps);
           },
           nb::arg("start"), nb::arg("tokens"), nb::arg("before"), nb::arg("rows"), nb::arg("steps"))
      .def("start",
           [](Drafter& drafter, int start, const Numbers& tokens, const Input& before, const Parts& rows, int width) {
             const auto parts = rows_of(drafter.head().stack, rows);
             const float* states = check_draft(drafter, start, tokens, before);
             check_width(width);
             nb::gil_scoped_release release;
             return drafter.start(start, int(tokens.size()), tokens.data(), states, parts, width);
           },
           nb::arg("start"), nb::arg("tokens"), nb::arg("before"), nb::arg("rows"), nb::arg("width"))
      .def("extend",
           [](Drafter& drafter, const Numbers& parents, const Numbers& tokens, const Parts& rows, int width) {
             const auto parts = rows_of(drafter.head().stack, rows);
             check_tokens(tokens.data(), tokens.size(), drafter.head().model.embedding);
             require(!tokens.empty() && parents.size() == tokens.size(), "each new node needs a parent and a token");
             require(drafter.nodes() + tokens.size() <= kPageTokens, kTreeTooLarge);
             for (const int32_t parent : parents)
               require(parent >= 0 && parent < drafter.nodes(), "a parent is a node of an earlier call");
             check_width(width);
             nb::gil_scoped_release release;
             return drafter.extend(parents, tokens.data(), parts, width);
           },
           nb::arg("parents"), nb::arg("tokens"), nb::arg("rows"), nb::arg("width"));
}

}  // namespace

void bind_model(nb::module_& m) {
  bind_cache(m);
  bind_decoder(m);
  bind_drafter(m);
}

}  // namespace fastmtp

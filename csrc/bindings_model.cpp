// Models, heads, drafters and their caches. Whatever the caller passes, nothing is read or written out of bounds.
#include <algorithm>
#include <list>
#include <optional>

#include "bindings.hpp"

namespace fastmtp {
namespace {

using Parts = std::vector<std::pair<const Matrix*, Input>>;
// Drafter, parents, tokens, start, states before the tokens, rows, width: see Question.
using Asked = std::tuple<Drafter*, Numbers, Numbers, int, std::optional<Input>, Parts, int>;

void check_segment(const Stack& stack, const Cache* cache, int start, size_t count) {
  require(cache, "a cache is None");
  require(stack.fits(*cache), "a cache is of another shape; it must come from this model's (or head's) new_cache()");
  require(start >= 0 && int(count) > 0, "a segment needs a start of 0 or more and at least one token");
  require(start <= cache->capacity(), "a segment starts after the end of its cache");
}

void check_tokens(const int32_t* tokens, size_t count, const Model& model) {
  for (size_t i = 0; i < count; i++)
    require(tokens[i] >= 0 && tokens[i] < model.embedding.outputs(), "a token id is outside the vocabulary");
}

// At most a page, so that attention finds the nodes in two pages.
void check_tree_size(size_t nodes) { require(nodes <= kPageTokens, "a tree has at most 256 tokens"); }

template <class Array>
auto* states_of(const Array& array, const char* name, size_t tokens, const Stack& stack) {
  return data_of<float>(array, name, "[tokens, hidden]", {int(tokens), stack.hidden});
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

// The trees of the segments whose tokens are none in a row; the segments point to them.
std::list<Tree> trees_of(std::vector<Segment>& segments, const Numbers& parents, size_t tokens) {
  require(parents.empty() || parents.size() == tokens, "trees need a parent for each token");
  std::list<Tree> trees;
  auto begin = parents.begin();
  for (Segment& segment : segments) {
    if (parents.empty()) break;
    const Numbers own(begin, begin + segment.count);
    begin += segment.count;
    bool chain = true;
    for (int i = 0; i < segment.count; i++) {
      require(own[i] >= -1 && own[i] < i, "a token of a tree comes after its parent");
      chain = chain && own[i] == i - 1;
    }
    if (chain) continue;
    check_tree_size(own.size());
    trees.emplace_back(segment.start, own);
    segment.tree = &trees.back();
  }
  return trees;
}

DraftRows rows_of(const Stack& stack, const Parts& parts) {
  require(!parts.empty(), "a draft needs rows to score");
  DraftRows rows;
  for (const auto& [matrix, ids] : parts) {
    require(matrix, "a matrix of draft rows is None");
    const int count = length_of(ids);
    rows.push_back({matrix, data_of<int32_t>(ids, "the ids of draft rows", "[ids]", {count}), count});
    require(count <= matrix->outputs() && matrix->inputs() == stack.hidden && matrix->type() == parts[0].first->type(),
            "rows must be [ids or more, hidden], all of one type");
  }
  return rows;
}

void commit(Cache& cache, int start, const Numbers& slots) {
  require(start >= 0, "start must be 0 or more");
  for (size_t i = 0; i < slots.size(); i++)
    require(slots[i] - int64_t(i) >= start && slots[i] < cache.capacity() && (i == 0 || slots[i] > slots[i - 1]),
            "slots must ascend, from their new places on, within the cache");
  cache.commit(start, slots);
}

void share(Cache& cache, const Cache& source, int tokens) {
  require(cache.capacity() == 0, "a cache that shares another's pages must be empty");
  require(tokens >= 0 && tokens <= source.capacity(), "a cache cannot share more tokens than the other has room for");
  require(std::equal(cache.layers().begin(), cache.layers().end(), source.layers().begin(), source.layers().end(),
                     [](const auto& a, const auto& b) { return a->page_numbers() == b->page_numbers(); }),
          "a cache is of another shape; both must come from one model's (or head's) new_cache()");
  cache.share(source, tokens);
}

void forward(const Model& model, const std::vector<Cache*>& caches, const Numbers& starts, const Numbers& counts,
             const Numbers& tokens, const Output& states, const Numbers& parents,
             const std::optional<Output>& last_inputs) {
  auto segments = segments_of(model.stack, caches, starts, counts, tokens.size());
  check_tokens(tokens.data(), tokens.size(), model);
  const std::list<Tree> trees = trees_of(segments, parents, tokens.size());
  float* to = states_of(states, "states", tokens.size(), model.stack);
  float* inputs = last_inputs ? states_of(*last_inputs, "last inputs", tokens.size(), model.stack) : nullptr;
  model.forward(segments, tokens.data(), to, inputs);
}

// `forward` of one sequence, and `argmax` of its states.
Numbers verify(const Model& model, Cache& cache, int start, const Numbers& tokens, const Output& states,
               const Numbers& parents) {
  const Call call(model.runtime);
  const int rows = int(tokens.size());
  forward(model, {&cache}, {start}, {rows}, tokens, states, parents, {});
  return model.runtime.argmax(model.lm_head, static_cast<const float*>(states.data()), rows, 0, nullptr);
}

Numbers argmax(const Model& model, const Input& states, const std::optional<Output>& logits) {
  const int rows = length_of(states), kept = logits ? length_of(*logits) : 0, stride = stride_of(model.lm_head);
  require(kept <= rows, "the logits of more rows than there are states");
  float* out = logits ? data_of<float>(*logits, "logits", "[rows, stride]", {kept, stride}) : nullptr;
  return model.runtime.argmax(model.lm_head, states_of(states, "states", rows, model.stack), rows, kept, out);
}

void head_forward(const Head& head, Cache& cache, int start, const Numbers& tokens, const Input& before,
                  const Output& after) {
  check_segment(head.stack, &cache, start, tokens.size());
  check_tokens(tokens.data(), tokens.size(), head.model);
  const float* from = states_of(before, "the states before", tokens.size(), head.stack);
  float* to = states_of(after, "the states after", tokens.size(), head.stack);
  std::vector<const float*> rows;
  for (size_t m = 0; m < tokens.size(); m++) rows.push_back(from + m * head.stack.hidden);
  head.forward({{&cache, start, int(tokens.size())}}, tokens, rows, to);
}

void check_begin(const Question& question, const Stack& stack) {
  check_segment(stack, &question.drafter->cache, question.start, question.tokens.size());
}

void check_nodes(const Question& question) {
  require(question.parents.size() == question.tokens.size(), "each new node needs a parent and a token");
  check_tree_size(question.drafter->nodes() + question.tokens.size());
  for (const int32_t parent : question.parents)
    require(parent >= 0 && parent < question.drafter->nodes(), "a parent is a node of an earlier call");
}

std::vector<Question> questions_of(const Head& head, const std::vector<Asked>& asked) {
  require(!asked.empty(), "nothing is asked");
  std::vector<Question> questions;
  for (const auto& [drafter, parents, tokens, start, before, parts, width] : asked) {
    require(drafter && &drafter->head == &head, "a drafter is None, or of another head");
    for (const Question& other : questions) require(other.drafter != drafter, "a drafter is asked twice");
    require(!tokens.empty(), "a question needs tokens");
    check_tokens(tokens.data(), tokens.size(), head.model);
    require(width >= 0, "width must be 0 or more");
    questions.push_back({drafter, parents, tokens, start, nullptr, rows_of(head.stack, parts), width});
    require(questions.back().rows[0].matrix->type() == questions[0].rows[0].matrix->type(),
            "the rows of all questions must be of one type");
    if (before) {
      require(parents.empty(), "states are given where a tree begins, and parents where it goes on");
      check_begin(questions.back(), head.stack);
      questions.back().before = states_of(*before, "states", tokens.size(), head.stack);
    } else {
      check_nodes(questions.back());
    }
  }
  return questions;
}

std::vector<std::vector<Candidates>> ask_head(const Head& head, const std::vector<Asked>& asked) {
  return ask(head, questions_of(head, asked));
}

// Drafts after a question that begins a tree, and `verify` of its last token and them.
std::pair<Numbers, Numbers> verify_chain(const Head& head, const Asked& asked, int steps, Cache& cache, int start,
                                         const Output& states) {
  const Model& model = head.model;
  const Call call(model.runtime);
  const Question question = questions_of(head, {asked})[0];
  require(question.parents.empty(), "a chain begins a tree");
  require(steps > 0, "a chain has at least one step");
  check_tree_size(1 + size_t(steps));
  check_segment(model.stack, &cache, start, 1 + size_t(steps));
  float* to = states_of(states, "states", 1 + size_t(steps), model.stack);
  const Numbers drafts = draft(head, question, steps);
  Numbers tokens{question.tokens.back()};
  tokens.insert(tokens.end(), drafts.begin(), drafts.end());
  model.forward({{&cache, start, int(tokens.size())}}, tokens.data(), to);
  return {drafts, model.runtime.argmax(model.lm_head, to, int(tokens.size()), 0, nullptr)};
}

}  // namespace

void bind_model(nb::module_& m) {
  nb::class_<Cache>(m, "Cache")
      .def("reserve", &Cache::reserve, "tokens"_a)
      .def("commit", &commit, "start"_a, "slots"_a)
      .def("share", &share, "source"_a, "tokens"_a)
      .def_prop_ro("pages", &Cache::pages)
      .def_prop_ro("capacity", &Cache::capacity)
      .def_prop_ro("page_bytes", [](const Cache& cache) { return cache.page_numbers() * sizeof(uint16_t); });

  nb::class_<Model>(m, "Model")
      .def(nb::init<Runtime&, const UniformStack&, const Matrix&, const Matrix&, float>(), "runtime"_a, "stack"_a,
           "embedding"_a, "lm_head"_a, "embedding_scale"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(),
           nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>())
      .def("new_cache", [](const Model& model) { return model.stack.new_cache(); })
      .def("spare_page",
           [](const Model& model) {
             const Cache cache = model.stack.new_cache();
             nb::gil_scoped_release release;
             return cache.memory().prepare();
           })
      .def("forward", &forward, "caches"_a, "starts"_a, "counts"_a, "tokens"_a, "states"_a.noconvert(),
           "parents"_a = Numbers(), "last_inputs"_a.noconvert() = nb::none(), WithoutGil())
      .def("verify", &verify, "cache"_a, "start"_a, "tokens"_a, "states"_a.noconvert(), "parents"_a = Numbers(),
           WithoutGil())
      .def("logits", [](const Model& model, const Input& states,
                        const Output& out) { scores(model.runtime, model.lm_head, states, out); },
           "states"_a, "out"_a.noconvert(), WithoutGil())
      .def("argmax", &argmax, "states"_a, "logits"_a.noconvert() = nb::none(), WithoutGil());

  nb::class_<Head>(m, "Head")
      .def(nb::init<const Model&, const UniformStack&, const Projection&>(), "model"_a, "stack"_a, "projection"_a,
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>())
      .def("new_cache", [](const Head& head) { return head.stack.new_cache(); })
      .def("forward", &head_forward, "cache"_a, "start"_a, "tokens"_a, "before"_a, "after"_a.noconvert(), WithoutGil())
      .def("ask", &ask_head, "questions"_a, WithoutGil())
      .def("verify_chain", &verify_chain, "question"_a, "steps"_a, "cache"_a, "start"_a, "states"_a.noconvert(),
           WithoutGil());

  nb::class_<Candidates>(m, "Candidates")
      .def_ro("tokens", &Candidates::tokens)
      .def_ro("confidences", &Candidates::confidences);

  nb::class_<Drafter>(m, "Drafter")
      .def("__init__",
           [](Drafter* self, const Head& head, Cache& cache) {
             check_segment(head.stack, &cache, 0, 1);
             new (self) Drafter(head, cache);
           },
           "head"_a, "cache"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>());
}

}  // namespace fastmtp

#include "draft.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace fastmtp {
namespace {

constexpr float kUsed = -std::numeric_limits<float>::infinity();

// A node whose draft vocabulary is to be scored.
struct Scored {
  const Question* question;
  const float* state;
  Candidates* found;
};

// The logits of consecutive nodes for a part of their draft vocabularies.
struct Product {
  DraftPart part;
  int first, rows, column;
};

int columns_of(const DraftRows& rows) {
  int columns = 0;
  for (const DraftPart& part : rows) columns += stride_of(part.count);
  return columns;
}

std::vector<Product> products_of(const std::vector<Scored>& nodes) {
  std::vector<Product> products;
  for (int m = 0; m < int(nodes.size()); m++) {
    int column = 0;
    for (const DraftPart& part : nodes[m].question->rows) {
      const auto before = std::find_if(products.begin(), products.end(), [&](const Product& product) {
        return product.part.matrix == part.matrix && product.part.count == part.count && product.column == column &&
               product.first + product.rows == m;
      });
      if (before != products.end()) before->rows++;
      else products.push_back({part, m, 1, column});
      column += stride_of(part.count);
    }
  }
  return products;
}

// The largest logit; of equal ones the first.
struct Best {
  float* logit = nullptr;
  int32_t token = 0;
};

Best best_of(const Kernels& kernels, const DraftRows& rows, float* logits) {
  Best best;
  for (const DraftPart& part : rows) {
    const int index = kernels.argmax(logits, part.count);
    if (!best.logit || logits[index] > *best.logit) best = {logits + index, part.ids[index]};
    logits += stride_of(part.count);
  }
  return best;
}

void find_candidates(const Kernels& kernels, const DraftRows& rows, float* logits, int width, Candidates& found) {
  Best best = best_of(kernels, rows, logits);
  const float top = *best.logit;
  float total = 0, *part_logits = logits;
  for (const DraftPart& part : rows) {
    total += kernels.sum_exponentials(part_logits, part.count, top);
    part_logits += stride_of(part.count);
  }
  while (*best.logit != kUsed) {
    if (std::find(found.tokens.begin(), found.tokens.end(), best.token) == found.tokens.end()) {
      found.tokens.push_back(best.token);
      found.confidences.push_back(std::exp(*best.logit - top) / total);
      if (int(found.tokens.size()) == width) break;
    }
    *best.logit = kUsed;
    best = best_of(kernels, rows, logits);
  }
}

// Fills the candidates of all nodes.
void score(Runtime& runtime, std::vector<Scored>& nodes) {
  // Nodes that share their first part are put together, so that its weights are read once.
  std::stable_sort(nodes.begin(), nodes.end(), [](const Scored& a, const Scored& b) {
    return std::less<const Matrix*>()(a.question->rows[0].matrix, b.question->rows[0].matrix);
  });
  int stride = 0;
  for (const Scored& node : nodes) stride = std::max(stride, columns_of(node.question->rows));
  const std::vector<Product> products = products_of(nodes);
  // All matrices are of one type and width, so a state is converted once.
  const Matrix& any = *products[0].part.matrix;
  float* logits = runtime.logits.reserve(nodes.size() * stride);
  runtime.reserve(runtime.stream, int(nodes.size()), any.inputs());
  runtime.run([&](Team& team) {
    runtime.convert_all(team, any, int(nodes.size()), [&](int m) { return nodes[m].state; });
    for (const auto& [part, first, rows, column] : products)
      runtime.matmul(team, Part::lm_head, *part.matrix, part.count, first, rows,
                     logits + size_t(first) * stride + column, stride);
    team.each(Part::argmax, int(nodes.size()), [&](int m) {
      const Question& question = *nodes[m].question;
      find_candidates(runtime.kernels, question.rows, logits + size_t(m) * stride, question.width, *nodes[m].found);
    });
  });
}

}  // namespace

std::vector<std::vector<Candidates>> ask(const Head& head, const std::vector<Question>& questions) {
  const size_t hidden = head.stack.hidden;
  const Call call(head.model.runtime, Owner::head);
  std::vector<Segment> segments;
  std::list<Tree> trees;
  std::vector<int32_t> tokens;
  std::vector<const float*> before;
  for (const auto& [drafter, parents, own, start, states, rows, width] : questions) {
    segments.push_back({&drafter->cache, parents.empty() ? start : drafter->base_ + drafter->nodes(), int(own.size())});
    tokens.insert(tokens.end(), own.begin(), own.end());
    for (size_t i = 0; i < own.size(); i++)
      before.push_back(parents.empty() ? states + i * hidden : drafter->states_.data() + parents[i] * hidden);
    if (parents.empty()) continue;
    std::vector<int32_t> all = drafter->parents_;
    all.insert(all.end(), parents.begin(), parents.end());
    trees.emplace_back(drafter->base_, all);
    if (!trees.back().is_chain()) segments.back().tree = &trees.back();
  }
  std::vector<float> after(tokens.size() * hidden);
  head.forward(segments, tokens, before, after.data());

  std::vector<std::vector<Candidates>> found;
  std::vector<Scored> nodes;
  const float* next = after.data();
  for (const Question& question : questions) {
    Drafter& drafter = *question.drafter;
    const float* end = next + question.tokens.size() * hidden;
    if (question.parents.empty()) {
      drafter.base_ = question.start + int(question.tokens.size()) - 1;
      drafter.parents_ = {-1};
      drafter.states_.clear();
      next = end - hidden;
    }
    drafter.parents_.insert(drafter.parents_.end(), question.parents.begin(), question.parents.end());
    drafter.states_.insert(drafter.states_.end(), next, end);
    int size = 0;
    for (const DraftPart& part : question.rows) size += part.count;
    found.emplace_back((end - next) / hidden);
    for (Candidates& one : found.back()) {
      // Room for all of them now: a thread of a team cannot throw.
      one.tokens.reserve(std::min(question.width, size));
      one.confidences.reserve(std::min(question.width, size));
      if (question.width > 0) nodes.push_back({&question, next, &one});
      next += hidden;
    }
  }
  if (!nodes.empty()) score(head.model.runtime, nodes);
  return found;
}

std::vector<int32_t> draft(const Head& head, Question question, int steps) {
  std::vector<int32_t> drafts;
  question.width = 1;
  while (int(drafts.size()) < steps) {
    const Candidates found = ask(head, {question})[0].back();
    if (found.tokens.empty()) break;
    drafts.push_back(found.tokens[0]);
    question.parents = {question.drafter->nodes() - 1};
    question.tokens = {drafts.back()};
  }
  return drafts;
}

}  // namespace fastmtp

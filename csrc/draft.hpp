// Drafting with the MTP head: trees that grow by one level in a call, those of several sequences in one.
#pragma once

#include <list>
#include <vector>

#include "head.hpp"

namespace fastmtp {

// Rows of the LM head: the first `count` outputs of a matrix, and the token of each.
struct DraftPart {
  const Matrix* matrix;
  const int32_t* ids;
  int count;
};

// A draft vocabulary; its matrices are of one type and width. A token may be in two parts.
using DraftRows = std::vector<DraftPart>;

// Likeliest first, of equal ones the first in the draft vocabulary, each with its probability in it.
struct Candidates {
  std::vector<int32_t> tokens;
  std::vector<float> confidences;
};

class Drafter;

// What a drafter adds to its tree: nodes after nodes of earlier calls. Without `parents` it begins a tree: the tokens,
// which follow the states `before`, are the sequence's from slot `start` on, and the last one becomes node 0.
struct Question {
  Drafter* drafter;
  std::vector<int32_t> parents, tokens;
  int start;
  const float* before;
  DraftRows rows;
  int width;  // candidates to follow each new node, of which there are fewer if the rows are fewer; 0: nothing is scored
};

// The tree of one sequence, in its cache after the tokens that it holds.
class Drafter {
 public:
  // Holds references.
  Drafter(const Head& head, Cache& cache) : head(head), cache(cache) {}

  const Head& head;
  Cache& cache;
  int nodes() const { return int(parents_.size()); }

 private:
  friend std::vector<std::vector<Candidates>> ask(const Head&, const std::vector<Question>&);

  // The slot of node 0, the parents of all nodes and their states [nodes, H].
  int base_ = 0;
  std::vector<int32_t> parents_;
  std::vector<float> states_;
};

// One forward of the head for different drafters; by question, the candidates to follow each new node. They have the
// same bits whichever questions are asked together. Rows of one matrix are scored in one product.
std::vector<std::vector<Candidates>> ask(const Head& head, const std::vector<Question>& questions);

// The likeliest token after a question's last node, the likeliest after that one, and so on: `steps` tokens, fewer only
// where nothing is likely.
std::vector<int32_t> draft(const Head& head, Question question, int steps);

}  // namespace fastmtp

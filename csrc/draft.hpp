// Drafting with the MTP head: greedy chains, and trees that grow by one level in a call.
#pragma once

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

// Drafts into one cache, after the sequence that it holds.
class Drafter {
 public:
  // Holds references.
  Drafter(const Head& head, Cache& cache) : head(head), cache(cache) {}

  const Head& head;
  Cache& cache;
  int nodes() const { return int(parents_.size()); }

  // A greedy chain: the head's forward over the tokens, which follow the states `before`; the row that scores highest
  // (of equal ones the first); then `steps` - 1 times a forward over the token drafted last.
  std::vector<int32_t> chain(int start, const std::vector<int32_t>& tokens, const float* before, const DraftRows& rows,
                             int steps);

  // A tree, level by level. Both return `width` candidates to follow each new node, or fewer if the rows are fewer.

  // The head's forward over the tokens, the last of which becomes node 0.
  std::vector<Candidates> start(int start, const std::vector<int32_t>& tokens, const float* before,
                                const DraftRows& rows, int width);
  // Adds nodes, each after a node of an earlier call.
  std::vector<Candidates> extend(const std::vector<int32_t>& parents, const std::vector<int32_t>& tokens,
                                 const DraftRows& rows, int width);

 private:
  std::vector<Candidates> add_nodes(const std::vector<int32_t>& parents, const float* states, const DraftRows& rows,
                                    int width);

  // Of the tree: the slot of node 0, the parents of all nodes and their states [nodes, H].
  int base_ = 0;
  std::vector<int32_t> parents_;
  std::vector<float> states_;
};

}  // namespace fastmtp

// The tokens of one forward pass: their sequences, their positions, and the angles of their positions.
#pragma once

#include <vector>

#include "cache.hpp"
#include "runtime.hpp"

namespace fastmtp {

// A tree of tokens after a sequence of `base` tokens in a cache.
//
// Node n is in slot base + n. It sees the sequence and its own path; its position is the one that follows its
// ancestors. A chain is a tree in which slots and positions are the same.
class Tree {
 public:
  // parents[n] < n is the parent of node n; -1 is the sequence.
  Tree(int base, const std::vector<int32_t>& parents) : base(base), starts_{0} {
    for (size_t n = 0; n < parents.size(); n++) {
      if (parents[n] >= 0)
        for (int i = starts_[parents[n]]; i < starts_[parents[n] + 1]; i++) paths_.push_back(paths_[i]);
      paths_.push_back(int32_t(n));
      starts_.push_back(int(paths_.size()));
      chain_ = chain_ && parents[n] == int32_t(n) - 1;
    }
  }

  const int base;
  bool is_chain() const { return chain_; }
  int position(int node) const { return base + starts_[node + 1] - starts_[node] - 1; }
  // The nodes from the root to this one; path(node)[i] is at position base + i.
  const int32_t* path(int node) const { return paths_.data() + starts_[node]; }

 private:
  bool chain_ = true;
  std::vector<int> starts_;  // of each node's path in `paths_`, and the end of the last one
  std::vector<int32_t> paths_;
};

// Tokens of one sequence, written to the cache from slot `start` on: consecutive ones, or the last nodes of a tree.
struct Segment {
  Cache* cache;
  int start, count;
  const Tree* tree = nullptr;
};

struct Rope {
  std::vector<float> inverse_frequencies;  // [head_size / 2], the same number in all ropes of a stack
  float scale;                             // of cosine and sine
};

class Batch {
 public:
  // Makes room for the tokens in their caches; throws std::bad_alloc before anything is written.
  Batch(Runtime& runtime, const std::vector<Segment>& segments, const std::vector<Rope>& ropes);
  Batch(const Batch&) = delete;

  // Computes what `angles` returns, by the whole team.
  void set_angles(Team& team) const;
  // Cosines, then sines, of a row's position in one rope: [head_size].
  float* angles(int rope, int row) const { return runtime.angles.get() + (size_t(rope) * rows + row) * angle_size_; }

  Runtime& runtime;
  const std::vector<Segment>& segments;
  int rows = 0;
  // By row. For `paths` see Query in kernels.hpp.
  struct Place {
    int segment, slot;
  };
  std::vector<Place> places;
  std::vector<int> positions;
  std::vector<const int32_t*> paths;

 private:
  const std::vector<Rope>& ropes_;
  const int angle_size_;
};

}  // namespace fastmtp

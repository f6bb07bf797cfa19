// The tokens of one forward pass: whose they are, where they stand, and the angles of their positions.
#pragma once

#include <vector>

#include "cache.hpp"
#include "runtime.hpp"
#include "tree.hpp"

namespace fastmtp {

// Some tokens of one sequence; their keys and values are written to the cache from `start` on. They are consecutive,
// or the last nodes of a tree.
struct Segment {
  Cache* cache;
  int start, count;
  const Tree* tree = nullptr;

  int node(int i) const { return start - tree->base() + i; }
  int position(int i) const { return tree ? tree->position(node(i)) : start + i; }
  const int32_t* path(int i) const { return tree ? tree->path(node(i)) : nullptr; }
};

struct Rope {
  std::vector<float> inverse_frequencies;  // [head_size / 2], the same number in all ropes of a stack
  float scale;                             // of cosine and sine
};

class Batch {
 public:
  // Makes room for the tokens in their caches; throws std::bad_alloc before anything changes.
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
  std::vector<int> positions;
  std::vector<const int32_t*> paths;

 private:
  const std::vector<Rope>& ropes_;
  int angle_size_;
};

}  // namespace fastmtp

// Threads and working memory, shared by everything that runs on one engine; one call at a time.
#pragma once

#include <chrono>
#include <mutex>

#include "kernels.hpp"
#include "matrix.hpp"
#include "memory.hpp"
#include "threads.hpp"

namespace fastmtp {

// Memory that grows to the largest size asked for; what it held is not kept. Throws std::bad_alloc.
template <class T>
class Scratch {
 public:
  T* reserve(size_t count) {
    if (count > size_) {
      data_ = nullptr;
      size_ = 0;
      data_ = allocate<T>(count);
      size_ = count;
    }
    return data_.get();
  }
  T* get() const { return data_.get(); }

 private:
  Buffer<T> data_;
  size_t size_ = 0;
};

class Runtime {
 public:
  explicit Runtime(int threads) : threads(threads) {}

  const int threads;
  const Kernels& kernels = fastmtp::kernels();
  double matmul_seconds = 0;  // in matrix products so far, as the first thread sees it, waiting included

  std::recursive_mutex busy;
  Barrier barrier;
  Scratch<float> x, branch, wide, partials, angles, rows, logits;
  Scratch<uint16_t> queries;

  // Memory for `rows` rows of up to `inputs` inputs of any matrix.
  void reserve_operand(int rows, int inputs) {
    const size_t width = round_up(inputs, kGroup), groups = width / kGroup;
    values_.reserve(rows * width * 2);
    scales_.reserve(2 * rows * groups);
    sums_.reserve(2 * rows * groups);
  }

  Operand operand(const Matrix& matrix) {
    return {values_.get(), scales_.get(), sums_.get(), round_up(matrix.inputs(), kGroup) / kGroup};
  }

  // Sets one row of the operand of the next product with `matrix`.
  void convert(const Matrix& matrix, const float* row, int m) {
    kernels.convert(matrix.type(), row, matrix.inputs(), operand(matrix), m);
  }

  // out[m * stride + n] for all rows of the operand, by the whole team.
  void matmul(Team& team, const Matrix& matrix, int rows, float* out, int stride) {
    using clock = std::chrono::steady_clock;
    const auto started = clock::now();
    team.split(matrix.blocks(), [&](int begin, int end) {
      kernels.matmul(matrix.view(), operand(matrix), rows, begin, end, out, stride);
    });
    if (team.id == 0) matmul_seconds += std::chrono::duration<double>(clock::now() - started).count();
  }

 private:
  Scratch<uint8_t> values_;
  Scratch<float> scales_;
  Scratch<int32_t> sums_;
};

// Distance in floats between rows of outputs: not a multiple of a page, or the rows would fight for cache lines.
inline int stride_of(const Matrix& matrix) { return matrix.blocks() * kLanes + kLanes; }

}  // namespace fastmtp

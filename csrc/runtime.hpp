// Threads and working memory, shared by everything that runs on one engine; one call at a time.
#pragma once

#include <algorithm>
#include <chrono>
#include <mutex>
#include <vector>

#include "kernels/kernels.hpp"
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

using Gains = std::vector<float>;  // of a norm; empty where there is no norm

class Runtime {
 public:
  explicit Runtime(int threads) : threads(threads) {}

  const int threads;
  const Kernels& kernels = fastmtp::kernels();
  double matmul_seconds = 0;  // in matrix products so far, as the first thread sees it, waiting included

  std::recursive_mutex busy;
  Barrier barrier;
  Scratch<float> x, branch, wide, partials, angles, logits;
  Scratch<uint16_t> queries;

  // Memory for `rows` rows of up to `inputs` inputs of any matrix.
  void reserve_operand(int rows, int inputs) {
    const size_t width = round_up(inputs, kGroup), groups = width / kGroup;
    values_.reserve(rows * width * 2);
    scales_.reserve(2 * rows * groups);
    sums_.reserve(2 * rows * groups);
  }

  // Memory of each thread's own for one row of up to `size` numbers.
  void reserve_rows(int size) {
    row_size_ = std::max(row_size_, round_up(size, kGroup) + kLanes);
    rows_.reserve(size_t(threads) * row_size_);
  }
  float* own_row(const Team& team) { return rows_.get() + size_t(team.id) * row_size_; }

  Operand operand(const Matrix& matrix) {
    return {values_.get(), scales_.get(), sums_.get(), round_up(matrix.inputs(), kGroup) / kGroup};
  }

  // Sets one row of the operand of the next product with `matrix`.
  void convert(const Matrix& matrix, const float* row, int m) {
    kernels.convert(matrix.type(), row, matrix.inputs(), operand(matrix), m);
  }

  void norm(const float* row, const Gains& gains, float epsilon, float* out) {
    kernels.norm(row, gains.data(), int(gains.size()), epsilon, out);
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
  Scratch<float> scales_, rows_;
  Scratch<int32_t> sums_;
  int row_size_ = 0;
};

// Distance in floats between rows of outputs: not a multiple of a page, or the rows would fight for cache lines.
inline int stride_of(int outputs) { return round_up(outputs, kLanes) + kLanes; }
inline int stride_of(const Matrix& matrix) { return stride_of(matrix.outputs()); }

}  // namespace fastmtp

// Threads and working memory, shared by everything that runs on one engine; one call at a time.
#pragma once

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels/kernels.hpp"
#include "matrix.hpp"
#include "memory.hpp"
#include "threads.hpp"

namespace fastmtp {

// Memory that grows to the largest size asked for; growing loses the contents. Throws std::bad_alloc.
template <class T>
class Scratch {
 public:
  T* reserve(size_t count) {
    if (count > size_) {
      size_ = 0;
      data_ = nullptr;
      data_ = allocate<T>(count);
      size_ = count;
    }
    return get();
  }
  T* get() const { return data_.get(); }

 private:
  Buffer<T> data_;
  size_t size_ = 0;
};

using Gains = std::vector<float>;  // of a norm; empty where there is no norm

class Runtime {
 public:
  explicit Runtime(int threads) : threads(threads) {
    if (threads < 1) throw std::invalid_argument("threads must be 1 or more");
  }

  const int threads;
  const Kernels& kernels = fastmtp::kernels();
  double matmul_seconds = 0;  // in matrix products so far, as measured by the first thread, waiting included

  std::recursive_mutex busy;  // held by a call from its first reservation of memory to its end
  Scratch<float> x, branch, wide, partials, angles, logits;
  Scratch<uint16_t> queries;

  // Calls work(team) on every thread.
  template <class Work>
  void run(Work work) {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    work(Team{omp_get_thread_num(), omp_get_num_threads(), barrier_});
#else
    work(Team{0, 1, barrier_});
#endif
  }

  // Memory for `rows` rows: of inputs of any matrix this wide, and of each thread's own row.
  void reserve_operand(int rows, int inputs) {
    const size_t width = round_up(inputs, kGroup), groups = width / kGroup;
    values_.reserve(rows * width * 2);
    scales_.reserve(2 * rows * groups);
    sums_.reserve(2 * rows * groups);
    row_size_ = std::max(row_size_, int(width) + kLanes);
    rows_.reserve(size_t(threads) * row_size_);
  }
  // Each thread's memory for one row of as many numbers as were reserved.
  float* own_row(const Team& team) { return rows_.get() + size_t(team.id) * row_size_; }

  // Sets one row of the operand of the next product with `matrix`.
  void convert(const Matrix& matrix, const float* row, int m) {
    kernels.convert(matrix.type(), row, matrix.inputs(), operand(matrix), m);
  }

  void norm(const float* row, const Gains& gains, float epsilon, float* out) {
    kernels.norm(row, gains.data(), int(gains.size()), epsilon, out);
  }

  // out[m * stride + n] for `rows` rows of the operand from the first one on, by the whole team.
  void matmul(Team& team, const Matrix& matrix, int rows, float* out, int stride) {
    matmul(team, matrix, matrix.outputs(), 0, rows, out, stride);
  }
  // The same for the first outputs only, and rows from any one on.
  void matmul(Team& team, const Matrix& matrix, int outputs, int first, int rows, float* out, int stride);

  // out[m * stride + n] = states[m] times output n, plus its bias. Both take the runtime until they return.
  void scores(const Matrix& matrix, const float* states, int rows, float* out, int stride);
  // The output with the highest score for each row; of equal ones the first.
  std::vector<int32_t> argmax(const Matrix& matrix, const float* states, int rows);

  // Seconds to read `bytes` of memory, many times the size of the processor's caches: the best of some repeats.
  double read_seconds(size_t bytes, int repeats);

 private:
  Operand operand(const Matrix& matrix) {
    return {values_.get(), scales_.get(), sums_.get(), round_up(matrix.inputs(), kGroup) / kGroup};
  }
  void product(Team& team, const Matrix& matrix, const float* states, int rows, float* out, int stride);

  Barrier barrier_;
  Scratch<uint8_t> values_;
  Scratch<float> scales_, rows_;
  Scratch<int32_t> sums_;
  int row_size_ = 0;
};

// Floats from one row of outputs to the next: not a multiple of a page, so that rows do not share cache sets.
inline int stride_of(int outputs) { return round_up(outputs, kLanes) + kLanes; }
inline int stride_of(const Matrix& matrix) { return stride_of(matrix.outputs()); }

}  // namespace fastmtp

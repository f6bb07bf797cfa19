// Threads and working memory, shared by everything that runs on one engine; one call at a time.
#pragma once

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "kernels/kernels.hpp"
#include "matrix.hpp"
#include "memory.hpp"
#include "team.hpp"

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

// What is left of the norm of an operand's rows, which were multiplied by its gains: 1 / rms, which a product with them
// applies to its results. So nobody has to wait for all squares of a row before its numbers are rounded.
struct Norm {
  int size = 0;  // 0: none
  float epsilon = 0;
};

// What follows a product, for each so many of its outputs, of each row: by the thread that computes the last of them, as
// soon as they are there, while the other threads read weights.
class Then {
 public:
  // Calls work(team, m, group); it must live as long.
  template <class Work>
  Then(Part part, int outputs, const Work& work) : part(part), outputs(outputs), work_(&work), call_(call<Work>) {}

  const Part part;
  const int outputs;
  void operator()(const Team& team, int m, int group) const { call_(work_, team, m, group); }

 private:
  template <class Work>
  static void call(const void* work, const Team& team, int m, int group) {
    (*static_cast<const Work*>(work))(team, m, group);
  }

  const void* work_;
  void (*call_)(const void*, const Team&, int, int);
};

// Memory for the operand of a product: rows of inputs of any matrix.
class Inputs {
 public:
  void reserve(int rows, int width) {
    const size_t groups = width / kGroup;
    stride_ = rows;
    values_.reserve(rows * size_t(width) * 2);
    scales_.reserve(2 * groups * rows);
    sums_.reserve(2 * groups * rows);
  }
  Operand of(const Matrix& matrix) { return {values_.get(), scales_.get(), sums_.get(), nullptr, matrix.groups(), stride_}; }

 private:
  int stride_ = 0;
  Scratch<uint8_t> values_;
  Scratch<float> scales_;
  Scratch<int32_t> sums_;
};

class Runtime {
 public:
  explicit Runtime(int threads) : threads(threads), shared_(at_least_one(threads)), threads_(threads) {}

  const int threads;
  const Kernels& kernels = fastmtp::kernels();

  Scratch<float> x, branch, wide, partials, angles, logits;
  Scratch<uint16_t> queries;
  // What a branch of the residual stream begins with, and what follows within it: results of a product with one are
  // converted to the other while some threads still read the first.
  Inputs stream, inner;

  // Calls work(team) on all threads that come before it is done.
  template <class Work>
  void run(Work work) {
    lap(Part::plan);
    shared_.reset();
    threads_.run([&](int id) {
      Team team(id, shared_, laps_.empty() ? nullptr : &laps_[id]);
      team.lap(Part::team);
      work(team);
    });
    lap(Part::team);
  }

  // Memory for `rows` rows of an operand of any matrix with as many inputs, and for each thread's own row of them.
  void reserve(Inputs& operand, int rows, int inputs) {
    const int width = round_up(inputs, kGroup);
    operand.reserve(rows, width);
    rows_stride_ = rows;
    squares_.reserve(size_t(width / kGroup) * rows);
    factors_.reserve(size_t(threads) * rows);
    row_size_ = std::max(row_size_, width + kLanes);
    rows_.reserve(size_t(threads) * row_size_);
  }
  // For products that something follows, in as many groups.
  void reserve_groups(int groups) {
    if (groups > int(shared_.of_group.size())) shared_.of_group = std::vector<std::atomic<int>>(groups);
  }
  // Each thread's memory for one row of as many numbers as were reserved.
  float* own_row(const Team& team) { return rows_.get() + size_t(team.id) * row_size_; }

  // Sets a group of row m of the operand of a product with `matrix`.
  void convert(Inputs& operand, const Matrix& matrix, const float* numbers, int m, int group,
               const float* gains = nullptr) {
    const int size = std::min(kGroup, matrix.inputs() - group * kGroup);
    kernels.convert(matrix.type(), numbers, gains, size, operand.of(matrix), m, group);
  }
  // Sets a row of the stream.
  void convert(const Matrix& matrix, const float* row, int m) {
    for (int group = 0; group < matrix.groups(); group++) convert(stream, matrix, row + group * kGroup, m, group);
  }
  // Sets all rows of the stream, by the whole team; row(m) is where row m's numbers are.
  template <class Row>
  void convert_all(Team& team, const Matrix& matrix, int rows, Row row) {
    team.each_group(Part::convert, rows, matrix.groups(),
                    [&](int m, int group) { convert(stream, matrix, row(m) + group * kGroup, m, group); });
  }
  // The sum of squares of a group of row m, for a norm of the rows.
  float& squares(int m, int group) { return squares_.get()[size_t(group) * rows_stride_ + m]; }

  void norm(const float* row, const Gains& gains, float epsilon, float* out) {
    kernels.norm(row, gains.data(), int(gains.size()), epsilon, out);
  }

  // out[m * stride + n] for `rows` rows of the operand, by the whole team, and what follows.
  void matmul(Team& team, Part part, Inputs& operand, const Matrix& matrix, int rows, float* out, int stride, Norm norm,
              const Then* then);
  // The same with the stream, for the first outputs only, and rows from any one on.
  void matmul(Team& team, Part part, const Matrix& matrix, int outputs, int first, int rows, float* out, int stride);

  // out[m * stride + n] = states[m] times output n, plus its bias. Both take the runtime until they return.
  void scores(const Matrix& matrix, const float* states, int rows, float* out, int stride);
  // The output with the highest score, of equal ones the first, for each row but the first `kept`, whose scores go to
  // `out` as above.
  std::vector<int32_t> argmax(const Matrix& matrix, const float* states, int rows, int kept, float* out);

  // Seconds to read `bytes` of memory, many times the size of the processor's caches: the best of some repeats.
  double read_seconds(size_t bytes, int repeats);
  // Multiply-adds a second of all threads, if memory cost nothing: of products with weights of a type, and of attention.
  double product_peak(Type type);
  double attention_peak();
  // Seconds of a phase in which all threads meet, when none is late; the least of some repeats.
  double phase_seconds();
  // Seconds of a product that each thread computes alone, again and again; for a matrix that stays in its cache.
  double product_seconds(const Matrix& matrix, int rows);

  // Begins to count each thread's seconds by part, from zero, or ends it.
  void time_parts(bool on);
  // By thread; empty while they are not counted.
  std::vector<Laps> laps();

 private:
  static int at_least_one(int threads) {
    if (threads < 1) throw std::invalid_argument("threads must be 1 or more");
    return threads;
  }
  const float* set_factors(const Team& team, const Matrix& matrix, int rows, Norm norm);
  // Of all threads.
  void lap(Part part) {
    for (Laps& one : laps_) one.worked(part);
  }
  void own(Owner owner) {
    owner_ = owner;
    for (Laps& one : laps_) one.owner = owner;
  }
  template <class Work>
  double rate(Work work);
  void product(Team& team, const Matrix& matrix, const float* states, int rows, float* out, int stride);

  friend class Call;

  std::recursive_mutex busy_;
  int calls_ = 0;  // that hold it, one within the other
  Owner owner_ = Owner::target;  // of the innermost
  std::vector<Laps> laps_;
  Shared shared_;
  Scratch<float> rows_, squares_, factors_;
  int row_size_ = 0, rows_stride_ = 0;
  Threads threads_;
};

// Holds the runtime from a call's first reservation of memory to its end. Calls within it may have other owners.
class Call {
 public:
  explicit Call(Runtime& runtime, Owner owner = Owner::target)
      : lock_(runtime.busy_), runtime_(runtime), before_(runtime.owner_) {
    if (runtime.calls_++ > 0) runtime.lap(Part::plan);
    else for (Laps& one : runtime.laps_) one.last = Laps::Clock::now();
    runtime.own(owner);
  }
  ~Call() {
    runtime_.lap(Part::plan);
    runtime_.own(before_);
    runtime_.calls_--;
  }

 private:
  const std::lock_guard<std::recursive_mutex> lock_;
  Runtime& runtime_;
  const Owner before_;
};

// Floats from one row of outputs to the next: not a multiple of a page, so that rows do not share cache sets.
inline int stride_of(int outputs) { return round_up(outputs, kLanes) + kLanes; }
inline int stride_of(const Matrix& matrix) { return stride_of(matrix.outputs()); }

}  // namespace fastmtp

// What the parts of the extension module share: weights are filled from Python, forward passes run without the GIL.
//
// Arrays are taken as they are, never converted: a copy would be slow, and writes to a copied output would be lost.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "draft.hpp"
#include "mixers/attention.hpp"
#include "networks/dense.hpp"

namespace fastmtp {

namespace nb = nanobind;
using namespace nb::literals;

using Numbers = std::vector<int32_t>;
using Input = nb::ndarray<nb::ro, nb::device::cpu>;
using Output = nb::ndarray<nb::device::cpu>;
using WithoutGil = nb::call_guard<nb::gil_scoped_release>;

// Python's `Stack`: every layer is attention of one shape and a dense network of one size.
struct UniformStack : Stack {
  UniformStack(int hidden, int feed_forward, bool gelu, const AttentionShape& attention)
      : Stack(hidden, attention.epsilon), feed_forward(feed_forward), gelu(gelu), attention(attention) {}

  const int feed_forward;
  const bool gelu;
  const AttentionShape attention;
};

void bind_weights(nb::module_& m);
void bind_model(nb::module_& m);

inline void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

// The memory of an array, which must be C-contiguous, not empty, of the type T and of this shape. Throws
// std::invalid_argument; the message gives the shape as `shape_name`.
template <class T, class Array>
auto* data_of(const Array& array, const char* name, const char* shape_name, std::initializer_list<int> shape) {
  bool fits = array.dtype() == nb::dtype<T>() && array.ndim() == shape.size();
  int64_t stride = 1;
  for (size_t i = shape.size(); fits && i-- > 0;) {
    const int64_t length = int64_t(array.shape(i));
    fits = length > 0 && length == shape.begin()[i] && (length == 1 || array.stride(i) == stride);
    stride *= length;
  }
  if (!fits)
    throw std::invalid_argument(std::string(name) + " must be " + shape_name +
                                ", a C-contiguous array, not empty, of " +
                                (std::is_same_v<T, float> ? "float32" : std::is_same_v<T, uint8_t> ? "uint8" : "int32"));
  using Pointer = std::conditional_t<std::is_same_v<Array, Input>, const T*, T*>;
  return static_cast<Pointer>(array.data());
}

// The length of the first dimension of an array whose shape is not checked yet.
template <class Array>
int length_of(const Array& array) {
  return array.ndim() > 0 ? int(array.shape(0)) : 0;
}

// Fills `out` with the scores of states.
inline void scores(Runtime& runtime, const Matrix& matrix, const Input& states, const Output& out) {
  const int rows = length_of(states), stride = stride_of(matrix);
  const float* from = data_of<float>(states, "states", "[rows, inputs]", {rows, matrix.inputs()});
  runtime.scores(matrix, from, rows, data_of<float>(out, "out", "[rows, stride]", {rows, stride}), stride);
}

}  // namespace fastmtp

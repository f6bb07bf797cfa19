// Weights: matrices, which are packed a piece at a time, and the stacks that are made of them.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.hpp"
#include "head.hpp"
#include "networks/dense.hpp"

namespace fastmtp {
namespace {

Attention& attention_of(Layer& layer) { return dynamic_cast<Attention&>(*layer.mixer); }
Dense& dense_of(Layer& layer) { return dynamic_cast<Dense&>(*layer.network); }

// A norm's gains as a property; `size_of` says how many they are. An optional norm may have none.
template <class Owner, class Find, class Size>
void def_gains(nb::class_<Owner>& owner, const char* name, bool optional, Find find, Size size_of) {
  owner.def_prop_rw(
      name, [find](Owner& of) { return find(of); },
      [=](Owner& of, const Gains& gains) {
        if (int(gains.size()) != size_of(of) && !(optional && gains.empty()))
          throw std::invalid_argument(std::string(name) + " must have " + std::to_string(size_of(of)) + " numbers");
        find(of) = gains;
      });
}

void bind_matrix(nb::module_& m) {
  nb::class_<Matrix>(m, "Matrix")
      .def(nb::init<Type, int, int, bool>(), nb::arg("type"), nb::arg("outputs"), nb::arg("inputs"),
           nb::arg("bias") = false)
      .def_prop_ro("type", &Matrix::type)
      .def_prop_ro("outputs", &Matrix::outputs)
      .def_prop_ro("inputs", &Matrix::inputs)
      .def_prop_ro("bytes", &Matrix::bytes)
      .def_prop_ro("stride", [](const Matrix& matrix) { return stride_of(matrix); })
      .def("pack",
           [](Matrix& matrix, const Input& places, const Input& rows) {
             const int count = length_of(places);
             const int32_t* to = data_of<int32_t>(places, "places", "[places]", {count});
             const float* from = data_of<float>(rows, "rows", "[places, inputs]", {count, matrix.inputs()});
             nb::gil_scoped_release release;
             matrix.pack(to, from, count);
           },
           nb::arg("places"), nb::arg("rows"))
      .def("set_bias",
           [](Matrix& matrix, const Input& places, const Input& values) {
             const int count = length_of(places);
             matrix.set_bias(data_of<int32_t>(places, "places", "[places]", {count}),
                             data_of<float>(values, "values", "[places]", {count}), count);
           },
           nb::arg("places"), nb::arg("values"))
      .def("unpack",
           [](const Matrix& matrix, int output, const Output& row) {
             require(output >= 0 && output < matrix.outputs(), "no such output");
             matrix.unpack(output, data_of<float>(row, "row", "[1, inputs]", {1, matrix.inputs()}));
           },
           nb::arg("output"), nb::arg("row").noconvert())
      .def("copy",
           [](Matrix& matrix, const Input& places, const Matrix& source, const Input& outputs) {
             const int count = length_of(places);
             matrix.copy(data_of<int32_t>(places, "places", "[places]", {count}), source,
                         data_of<int32_t>(outputs, "outputs", "[places]", {count}), count);
           },
           nb::arg("places"), nb::arg("source"), nb::arg("outputs"));
}

void bind_layer(nb::module_& m) {
  const auto hidden = [](Layer& one) { return one.mixer->input().inputs(); };
  const auto head_size = [](Layer& one) { return attention_of(one).shape.head_size; };
  nb::class_<Layer> layer(m, "Layer");
  layer
      .def_prop_ro("query_key_value", [](Layer& layer) -> Matrix& { return attention_of(layer).query_key_value; },
                   nb::rv_policy::reference_internal)
      .def_prop_ro("out", [](Layer& layer) -> Matrix& { return attention_of(layer).out; },
                   nb::rv_policy::reference_internal)
      .def_prop_ro("gate_up", [](Layer& layer) -> Matrix& { return dense_of(layer).gate_up; },
                   nb::rv_policy::reference_internal)
      .def_prop_ro("down", [](Layer& layer) -> Matrix& { return dense_of(layer).down; },
                   nb::rv_policy::reference_internal);
  def_gains(layer, "input_norm", false, [](Layer& one) -> Gains& { return one.mixer_norm; }, hidden);
  def_gains(layer, "attention_out_norm", true, [](Layer& one) -> Gains& { return one.mixer_out_norm; }, hidden);
  def_gains(layer, "feed_forward_norm", false, [](Layer& one) -> Gains& { return one.network_norm; }, hidden);
  def_gains(layer, "feed_forward_out_norm", true, [](Layer& one) -> Gains& { return one.network_out_norm; }, hidden);
  def_gains(layer, "query_norm", true, [](Layer& one) -> Gains& { return attention_of(one).query_norm; }, head_size);
  def_gains(layer, "key_norm", true, [](Layer& one) -> Gains& { return attention_of(one).key_norm; }, head_size);
}

void bind_stack(nb::module_& m) {
  nb::class_<UniformStack> stack(m, "Stack");
  stack
      .def("__init__",
           [](UniformStack* place, int hidden, int heads, int key_heads, int head_size, int feed_forward, float epsilon,
              float attention_scale, bool gelu, std::vector<std::pair<std::vector<float>, float>> ropes) {
             require(hidden > 0 && heads > 0 && key_heads > 0 && head_size > 0 && feed_forward > 0,
                     "every size must be above 0");
             require(heads % key_heads == 0, "the query heads must be a multiple of the key heads");
             require(head_size % 2 == 0 && head_size <= kLargestHead, "the head size must be even and at most 512");
             for (const auto& rope : ropes)
               require(int(rope.first.size()) == head_size / 2, "a rope needs one frequency for each pair");
             auto* stack = new (place)
                 UniformStack(hidden, feed_forward, gelu, {heads, key_heads, head_size, epsilon, attention_scale});
             for (auto& [frequencies, scale] : ropes) stack->ropes.push_back({std::move(frequencies), scale});
           },
           nb::kw_only(), nb::arg("hidden"), nb::arg("heads"), nb::arg("key_heads"), nb::arg("head_size"),
           nb::arg("feed_forward"), nb::arg("epsilon"), nb::arg("attention_scale"), nb::arg("gelu"), nb::arg("ropes"))
      .def("add_layer",
           [](UniformStack& stack, Type type, bool bias, bool out_bias, bool feed_forward_bias, int window,
              int rope) -> Layer& {
             require(rope >= 0 && rope < int(stack.ropes.size()), "no such rope");
             require(window >= 0, "a window of 0 (all tokens) or more");
             const Gains ones(stack.hidden, 1.0f);
             return stack.layers.emplace_back(Layer{
                 std::make_unique<Attention>(stack.hidden, stack.attention, type, bias, out_bias, window, rope),
                 std::make_unique<Dense>(stack.hidden, stack.feed_forward, type, feed_forward_bias, stack.gelu),
                 ones, {}, ones, {}});
           },
           nb::rv_policy::reference_internal, nb::arg("type"), nb::kw_only(), nb::arg("bias"), nb::arg("out_bias"),
           nb::arg("feed_forward_bias"), nb::arg("window"), nb::arg("rope"))
      .def_prop_ro("layers",
                   [](UniformStack& stack) {
                     std::vector<Layer*> layers;
                     for (Layer& layer : stack.layers) layers.push_back(&layer);
                     return layers;
                   },
                   nb::rv_policy::reference_internal);
  def_gains(stack, "final_norm", false, [](UniformStack& stack) -> Gains& { return stack.final_norm; },
            [](UniformStack& stack) { return stack.hidden; });
}

void bind_projection(nb::module_& m) {
  nb::class_<Projection> projection(m, "Projection");
  projection.def(nb::init<Type, int>(), nb::arg("type"), nb::arg("hidden"))
      .def_prop_ro("matrix", [](Projection& projection) -> Matrix& { return projection.matrix; },
                   nb::rv_policy::reference_internal);
  const auto hidden = [](Projection& projection) { return projection.matrix.outputs(); };
  def_gains(projection, "hidden_norm", false, [](Projection& one) -> Gains& { return one.hidden_norm; }, hidden);
  def_gains(projection, "token_norm", false, [](Projection& one) -> Gains& { return one.token_norm; }, hidden);
}

}  // namespace

void bind_weights(nb::module_& m) {
  nb::enum_<Type>(m, "Type").value("bf16", Type::bf16).value("int8", Type::int8).value("int4", Type::int4);
  bind_matrix(m);
  bind_layer(m);
  bind_stack(m);
  bind_projection(m);
}

}  // namespace fastmtp

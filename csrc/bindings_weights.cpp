// Weights: matrices, which are packed a part at a time, and the stacks that are made of them.
#include <functional>

#include "bindings.hpp"

namespace fastmtp {
namespace {

using Bytes = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ReadOnlyBytes = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
constexpr uintptr_t kAlignment = 64;  // of weights

Attention& attention_of(Layer& layer) { return dynamic_cast<Attention&>(*layer.mixer); }
Dense& dense_of(Layer& layer) { return dynamic_cast<Dense&>(*layer.network); }

const int32_t* outputs_of(const Input& array, const char* name, int count) {
  return data_of<int32_t>(array, name, "[outputs]", {count});
}

// A norm's gains as a property; `size_of` returns how many there are. An optional norm may have none.
template <class Owner, class Member, class Size>
void def_gains(nb::class_<Owner>& owner, const char* name, bool optional, Member member, Size size_of) {
  owner.def_prop_rw(
      name, [=](Owner& of) -> Gains& { return std::invoke(member, of); },
      [=](Owner& of, const Gains& gains) {
        if (int(gains.size()) != size_of(of) && !(optional && gains.empty()))
          throw std::invalid_argument(std::string(name) + " must have " + std::to_string(size_of(of)) + " numbers");
        std::invoke(member, of) = gains;
      });
}

Bytes zeros(size_t count) {
  auto memory = std::make_unique<Buffer<uint8_t>>(allocate<uint8_t>(count));
  uint8_t* first = memory->get();
  const nb::capsule owner(memory.release(), [](void* one) noexcept { delete static_cast<Buffer<uint8_t>*>(one); });
  return Bytes(first, {count}, owner);
}

void bind_matrix(nb::module_& m) {
  m.def("zeros", &zeros, "count"_a);
  nb::enum_<Type>(m, "Type").value("bf16", Type::bf16).value("int8", Type::int8).value("int4", Type::int4);
  nb::class_<Matrix>(m, "Matrix")
      .def(nb::init<Type, int, int, bool>(), "type"_a, "outputs"_a, "inputs"_a, "bias"_a = false)
      .def_prop_ro("type", &Matrix::type)
      .def_prop_ro("outputs", &Matrix::outputs)
      .def_prop_ro("inputs", &Matrix::inputs)
      .def_prop_ro("bytes", &Matrix::bytes)
      .def_prop_ro("stride", [](const Matrix& matrix) { return stride_of(matrix); })
      .def_prop_ro("memory",
                   [](const Matrix& matrix) { return ReadOnlyBytes(matrix.memory(), {matrix.memory_bytes()}); },
                   nb::rv_policy::reference_internal)
      .def("use",
           [](Matrix& matrix, const Bytes& memory) {
             require(memory.size() == matrix.memory_bytes(), "the memory must be as large as the matrix's own");
             require(reinterpret_cast<uintptr_t>(memory.data()) % kAlignment == 0, "the memory must be aligned");
             matrix.use(memory.data(), std::make_shared<Bytes>(memory));
           },
           "memory"_a)
      .def("pack",
           [](Matrix& matrix, const Input& outputs, const Input& rows) {
             const int count = length_of(outputs);
             matrix.pack(outputs_of(outputs, "outputs", count),
                         data_of<float>(rows, "rows", "[outputs, inputs]", {count, matrix.inputs()}), count);
           },
           "outputs"_a, "rows"_a, WithoutGil())
      .def("pack_grid",
           [](Matrix& matrix, const Input& outputs, const Input& numbers, const Input& steps, const Input& least) {
             const int count = length_of(outputs), groups = matrix.inputs() / kHalf;
             matrix.pack_grid(outputs_of(outputs, "outputs", count),
                              data_of<uint8_t>(numbers, "numbers", "[outputs, inputs]", {count, matrix.inputs()}),
                              data_of<float>(steps, "steps", "[outputs, inputs / 32]", {count, groups}),
                              data_of<float>(least, "least", "[outputs, inputs / 32]", {count, groups}), count);
           },
           "outputs"_a, "numbers"_a, "steps"_a, "least"_a, WithoutGil())
      .def("set_bias",
           [](Matrix& matrix, const Input& outputs, const Input& values) {
             const int count = length_of(outputs);
             matrix.set_bias(outputs_of(outputs, "outputs", count),
                             data_of<float>(values, "values", "[outputs]", {count}), count);
           },
           "outputs"_a, "values"_a)
      .def("unpack",
           [](const Matrix& matrix, int output, const Output& row) {
             require(output >= 0 && output < matrix.outputs(), "no such output");
             matrix.unpack(output, data_of<float>(row, "row", "[1, inputs]", {1, matrix.inputs()}));
           },
           "output"_a, "row"_a.noconvert())
      .def("copy",
           [](Matrix& matrix, const Input& outputs, const Matrix& source, const Input& source_outputs) {
             const int count = length_of(outputs);
             matrix.copy(outputs_of(outputs, "outputs", count), source,
                         outputs_of(source_outputs, "source outputs", count), count);
           },
           "outputs"_a, "source"_a, "source_outputs"_a);
}

void bind_stack(nb::module_& m) {
  const auto hidden = [](Layer& layer) { return layer.mixer->input().inputs(); };
  const auto head_size = [](Layer& layer) { return attention_of(layer).shape.head_size; };
  nb::class_<Layer> layer(m, "Layer");
  layer.def_prop_ro("query_key_value", [](Layer& of) -> Matrix& { return attention_of(of).query_key_value; })
      .def_prop_ro("out", [](Layer& of) -> Matrix& { return attention_of(of).out; })
      .def_prop_ro("gate_up", [](Layer& of) -> Matrix& { return dense_of(of).gate_up; })
      .def_prop_ro("down", [](Layer& of) -> Matrix& { return dense_of(of).down; });
  def_gains(layer, "input_norm", false, &Layer::mixer_norm, hidden);
  def_gains(layer, "attention_out_norm", true, &Layer::mixer_out_norm, hidden);
  def_gains(layer, "feed_forward_norm", false, &Layer::network_norm, hidden);
  def_gains(layer, "feed_forward_out_norm", true, &Layer::network_out_norm, hidden);
  def_gains(layer, "query_norm", true, [](Layer& of) -> Gains& { return attention_of(of).query_norm; }, head_size);
  def_gains(layer, "key_norm", true, [](Layer& of) -> Gains& { return attention_of(of).key_norm; }, head_size);

  nb::class_<UniformStack> stack(m, "Stack");
  stack
      .def("__init__",
           [](UniformStack* self, int hidden, int heads, int key_heads, int head_size, int feed_forward, float epsilon,
              float attention_scale, bool gelu, const std::vector<std::pair<std::vector<float>, float>>& ropes) {
             require(hidden > 0 && heads > 0 && key_heads > 0 && head_size > 0 && feed_forward > 0,
                     "every size must be above 0");
             require(heads % key_heads == 0, "the query heads must be a multiple of the key heads");
             require(head_size % 2 == 0 && head_size <= kLargestHead, "the head size must be even and at most 512");
             for (const auto& [frequencies, scale] : ropes)
               require(int(frequencies.size()) == head_size / 2, "a rope needs one frequency for each pair");
             const AttentionShape shape{heads, key_heads, head_size, epsilon, attention_scale};
             new (self) UniformStack(hidden, feed_forward, gelu, shape);
             for (const auto& [frequencies, scale] : ropes) self->ropes.push_back({frequencies, scale});
           },
           nb::kw_only(), "hidden"_a, "heads"_a, "key_heads"_a, "head_size"_a, "feed_forward"_a, "epsilon"_a,
           "attention_scale"_a, "gelu"_a, "ropes"_a)
      .def("add_layer",
           [](UniformStack& stack, Type type, bool bias, bool out_bias, bool feed_forward_bias, int window,
              int rope) -> Layer& {
             require(rope >= 0 && rope < int(stack.ropes.size()), "no such rope");
             require(window >= 0, "window must be 0 (all tokens) or more");
             const Gains ones(stack.hidden, 1.0f);
             return stack.layers.emplace_back(Layer{
                 std::make_unique<Attention>(stack.hidden, stack.attention, type, bias, out_bias, window, rope),
                 std::make_unique<Dense>(stack.hidden, stack.feed_forward, type, feed_forward_bias, stack.gelu),
                 ones, {}, ones, {}});
           },
           nb::rv_policy::reference_internal, "type"_a, nb::kw_only(), "bias"_a, "out_bias"_a, "feed_forward_bias"_a,
           "window"_a, "rope"_a)
      .def_prop_ro("layers", [](UniformStack& stack) {
        std::vector<Layer*> layers;
        for (Layer& layer : stack.layers) layers.push_back(&layer);
        return layers;
      });
  def_gains(stack, "final_norm", false, &UniformStack::final_norm, [](Stack& stack) { return stack.hidden; });
}

void bind_projection(nb::module_& m) {
  nb::class_<Projection> projection(m, "Projection");
  projection.def(nb::init<Type, int>(), "type"_a, "hidden"_a)
      .def_prop_ro("matrix", [](Projection& of) -> Matrix& { return of.matrix; });
  const auto hidden = [](Projection& of) { return of.matrix.outputs(); };
  def_gains(projection, "hidden_norm", false, &Projection::hidden_norm, hidden);
  def_gains(projection, "token_norm", false, &Projection::token_norm, hidden);
}

}  // namespace

void bind_weights(nb::module_& m) {
  bind_matrix(m);
  bind_stack(m);
  bind_projection(m);
}

}  // namespace fastmtp

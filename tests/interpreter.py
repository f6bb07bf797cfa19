"""Triton's interpreter, made fast enough for tests: what it works out for each operation is worked out once."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

tl = interpreter.tl
core = tl.core
# What an operation of two such operands computes in, and gives, is their own type, whatever the operation is.
OWN = frozenset(("int1", "int32", "int64", "uint32", "uint64", "fp32", "fp64"))


def hasten() -> None:
    """Called once, before any kernel runs."""
    _patch_once()
    _make_types_once()
    _skip_what_fits()
    call = interpreter.GridExecutor.__call__

    def call_as_on_a_device(*arguments: Any, **named: Any) -> None:
        with np.errstate(over="ignore"):
            call(*arguments, **named)

    interpreter.GridExecutor.__call__ = call_as_on_a_device
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def _patch_once() -> None:
    """Triton's language is patched for each module, not for each call of each function."""

    class Lasting:
        def restore(self) -> None: ...

    real, patched, lasting = interpreter._patch_lang, set[int](), Lasting()

    def patch_once(function: Any) -> Lasting:
        if (module := id(function.__globals__)) not in patched:
            patched.add(module)
            real(function)
        return lasting

    def patch_attribute(owner: object, name: str, member: Any, builder: object, scope: Any) -> None:
        # Without the check that every builtin makes.
        inner = getattr(member, "__wrapped__", member)

        def call(*arguments: Any, **named: Any) -> Any:
            named["_semantic"] = interpreter.interpreter_semantic
            return inner(*arguments, **named)

        scope.set_attr(owner, name, call)

    interpreter._patch_lang, interpreter._patch_attr = patch_once, patch_attribute


def _make_types_once() -> None:
    """Tensors of one shape share it, and its types."""
    checked = core.block_type.__init__

    @cache
    def shared(shape: tuple[Any, ...]) -> tuple[tuple[int, ...], Any, Any, Any]:
        """Of a type: its shape and number of elements; of a tensor: the same as constants."""
        if shape:
            checked(found := object.__new__(core.block_type), core.int32, list(shape))
            shape = found.shape
        size = math.prod(shape)
        return shape, size, core.constexpr(size), core.tuple([core.constexpr(one) for one in shape])

    core.dtype.shared = shared(())

    def tensor(self: Any, handle: Any, kind: Any) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        _, _, self.numel, self.shape = kind.shared

    def block_type(self: Any, element: Any, shape: Any) -> None:
        self.element_ty = element
        self.shared = found = shared(tuple(shape))
        self.shape, self.numel = found[:2]

    def name(self: Any, attribute: str) -> str:
        if attribute != "name":
            raise AttributeError(attribute)
        return f"<{self.shape}, {self.element_ty}>"

    core.tensor.__init__, core.block_type.__init__, core.block_type.__getattr__ = tensor, block_type, name
    of_kind, known = interpreter._get_np_dtype, dict[str, Any]()

    def numpy_type(kind: Any) -> Any:
        name = kind.scalar.name
        return known[name] if name in known else known.setdefault(name, of_kind(kind))

    interpreter._get_np_dtype = numpy_type


def _skip_what_fits() -> None:
    """Operands of one type and one shape need neither conversion nor broadcasting."""
    check, broadcast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value

    def checked(self: Any, left: Any, right: Any, *how: Any, **named: Any) -> Any:
        kind = getattr(left, "dtype", None)
        if kind is not None and kind is getattr(right, "dtype", None) and kind.name in OWN:
            return self.broadcast_impl_value(left, right)
        return check(self, left, right, *how, **named)

    def broadcasted(self: Any, left: Any, right: Any) -> Any:
        return (left, right) if left.shape is right.shape else broadcast(self, left, right)

    TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value = checked, broadcasted

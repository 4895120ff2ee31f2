"""Registering an op with PyTorch, as ``torch.library.custom_op`` does, but without importing Dynamo at its first call.

Dynamo and what it needs take about a second to import, more than many a stage runs for, and ``torch.compile`` alone has
a use for it. Schema, fake results, autograd, the dispatch of devices and the check of shared memory are as there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffprune.kernels.tangents import carries_tangent

NAMESPACE = "diffprune"

registered: dict[str, CustomOp] = {}
"""By qualified name."""


def custom_op(name: str, forward_mode: str = "") -> Callable[[Callable[..., Any]], CustomOp]:
    """The decorated function, whose annotations are the schema, as the op ``name``, on every device.

    ``forward_mode``: what to take in its place where a forward-mode derivative is wanted, for the error there.
    """
    return lambda function: CustomOp(name, function, forward_mode)


class CustomOp:
    """An op that changes none of its arguments, and whose results share no memory with them or with each other.

    Called through PyTorch's dispatcher. Going backward through it is an error without ``register_autograd``, going
    forward (``torch.func.jvp``, ``forward_ad.make_dual``) always is.
    """

    def __init__(self, name: str, function: Callable[..., Any], forward_mode: str = "") -> None:
        self.function, self.forward_mode = function, forward_mode
        self._qualified = f"{NAMESPACE}::{name}"
        self._backward: Callable[..., Any] | None = None
        self._setup_context: Callable[..., None] | None = None
        if former := registered.pop(self._qualified, None):  # the module is loaded once more
            former._library._destroy()
        registered[self._qualified] = self
        self._library = _Library(self)
        schema = torch.library.infer_schema(function, mutates_args=(), op_name=name)
        self._library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        self._library.impl(name, self._dispatched, "CompositeExplicitAutograd")
        torch.library.register_autograd(
            self._qualified, self._run_backward, setup_context=self._run_setup_context, lib=self._library
        )
        self._overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *args: Any) -> Any:
        return self._overload(*args)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorates the function that makes the results' shapes and dtypes, of inputs without data."""
        torch.library.register_fake(self._qualified, function, lib=self._library)
        return function

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """See ``torch.library.register_autograd``."""
        self._backward, self._setup_context = backward, setup_context

    def _dispatched(self, *args: Any) -> Any:
        return (self._run_out_of_dynamo if "torch._dynamo" in sys.modules else self._run)(*args)

    @cached_property
    def _run_out_of_dynamo(self) -> Callable[..., Any]:
        """Where Dynamo leaves a call as it is, it would look into the frames below, and compile what it finds there."""
        return torch.compiler.disable(self._run)

    def _run(self, *args: Any) -> Any:
        results = self.function(*args)
        _expect_memory_of_their_own(self._qualified, args, results)
        return results

    def expect_no_tangents(self, args: tuple[Any, ...]) -> None:
        """NotImplementedError if forward-mode differentiation goes through this call."""
        if carries_tangent(args):
            instead = f"; take {self.forward_mode}" if self.forward_mode else ""
            raise NotImplementedError(
                f"{self._qualified} has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad){instead}"
            )

    def _run_setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if self._setup_context:
            self._setup_context(ctx, inputs, output)

    def _run_backward(self, ctx: Any, *grads: Any) -> Any:
        if self._backward is None:
            raise RuntimeError(f"{self._qualified} is not differentiable")
        return self._backward(ctx, *grads)


class _Library(torch.library.Library):
    """An op's registrations. Its kernel for autograd, which PyTorch makes, is asked for the backward alone: tangents it
    would drop without a word, as if the derivative were 0."""

    def __init__(self, op: CustomOp) -> None:
        super().__init__(NAMESPACE, "FRAGMENT")
        self.custom_op = op

    def impl(self, op_name: Any, fn: Callable[..., Any], dispatch_key: str = "", **options: Any) -> None:
        """See ``torch.library.Library.impl``."""
        super().impl(op_name, self._without_tangents(fn) if dispatch_key == "Autograd" else fn, dispatch_key, **options)

    def _without_tangents(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        op = self.custom_op

        def run(keyset: Any, *args: Any, **options: Any) -> Any:
            op.expect_no_tangents(args)
            return kernel(keyset, *args, **options)

        return run


def _expect_memory_of_their_own(name: str, args: tuple[Any, ...], results: Any) -> None:
    """PyTorch relies on it: what it compiles may write over an argument that it needs no more."""
    seen = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
    for result in results if isinstance(results, tuple) else (results,):
        memory = result.untyped_storage().data_ptr()
        if memory and memory in seen:
            raise RuntimeError(f"{name}: a result shares memory with an argument or with another result")
        seen.add(memory)

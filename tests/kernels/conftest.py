"""Without a GPU, Triton kernels run in Triton's interpreter: they read this variable when they are imported.

With one, a kernel that breaks the device fails its own test alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
import torch


def mend_interpreter() -> None:
    """Triton 3.6's interpreter needs an older NumPy than its compiler does.

    NumPy 2.5 makes no int of an array of one element, and since 2.0 none makes -1 an unsigned integer.
    """
    from triton.runtime import interpreter

    patch_tensor, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
    all_ones = builder.get_all_ones_value

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def get_all_ones_value(self: Any, type: Any) -> Any:
        if not type.scalar.is_int_unsigned():
            return all_ones(self, type)
        dtype = interpreter._get_np_dtype(type)
        return interpreter.TensorHandle(interpreter.np.full(1, interpreter.np.iinfo(dtype).max, dtype), type.scalar)

    interpreter._patch_lang_tensor, builder.get_all_ones_value = patch, get_all_ones_value


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if version("triton").startswith("3.6."):
        mend_interpreter()


@pytest.fixture(autouse=True)
def device_still_works(request: pytest.FixtureRequest) -> Iterator[None]:
    """After an illegal access all that a process asks of its GPU fails: it ends, else the tests after it fail too.

    pytest-xdist starts another process for these; without it, none of them is run.
    """
    yield
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        reason = f"{request.node.nodeid} broke the device: {error}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(reason, returncode=1)
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(reason, file=sys.stderr, flush=True)
        os._exit(1)

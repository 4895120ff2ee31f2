"""Tests of the C++ extension are skipped where it cannot run; ``tests/test_build.py`` says where it has to."""

from __future__ import annotations

import pytest

from diffprune.kernels import cpp

needs_cpp = pytest.mark.skipif(cpp.unavailable() is not None, reason=str(cpp.unavailable()))

"""What type checkers and editors see of the package."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from mypy import api

import diffprune

HERE = Path(__file__).parent


def test_checkers_see_each_public_name_where_it_is():
    tree = ast.parse(Path(diffprune.__file__).read_text())
    block = next(x for x in tree.body if isinstance(x, ast.If) and getattr(x.test, "id", None) == "TYPE_CHECKING")
    seen = {alias.asname: imported.module for imported in block.body for alias in imported.names}
    assert seen == diffprune._PUBLIC


def test_a_users_program_is_checked_strictly(tmp_path):
    options = ["--strict", "--follow-imports=silent", f"--cache-dir={tmp_path}"]
    interpreter = f"--python-executable={sys.executable}"
    out, errors, status = api.run([*options, interpreter, str(HERE / "typed/user.py")])
    assert status == 0, out + errors

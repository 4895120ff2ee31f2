"""What type checkers and editors see of the package."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from mypy import api

import diffprune

HERE, PACKAGE = Path(__file__).parent, Path(diffprune.__file__).parent
CHECKED = ("storage", "files.py", "outputs.py", "locks.py", "tables.py", "kept_rows.py", "weight_files.py")
CHECKED += ("requests.py", "row_selection.py", "exporting.py", "conversion.py", "live_latents.py", "verification.py")


def test_checkers_see_each_public_name_where_it_is():
    tree = ast.parse(Path(diffprune.__file__).read_text())
    block = next(x for x in tree.body if isinstance(x, ast.If) and getattr(x.test, "id", None) == "TYPE_CHECKING")
    seen = {alias.asname: imported.module for imported in block.body for alias in imported.names}
    assert seen == diffprune._PUBLIC


def test_a_users_program_strictly_and_the_modules_that_take_paths(tmp_path):
    """One run, which reads what both import once."""
    modules = [str(PACKAGE / name) for name in CHECKED]
    options = [f"--config-file={HERE / 'typed/mypy.ini'}", f"--cache-dir={tmp_path}"]
    interpreter = f"--python-executable={sys.executable}"
    out, errors, status = api.run([*options, interpreter, str(HERE / "typed/user.py"), *modules])
    assert status == 0, out + errors

"""What each score means, one file per method: latents and a surrogate's checkpoints -> columns.

All scores are float64 and higher for a sample that the method would keep.
"""

from __future__ import annotations

import pyarrow as pa


def score_field(name: str, meaning: str) -> pa.Field:
    """The column of a score, with what it means and the end that the method keeps in its metadata."""
    return pa.field(name, pa.float64(), metadata={"keep": "highest", "meaning": meaning})

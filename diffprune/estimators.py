"""What scikit-learn asks of a step of its pipelines. It is told apart by its methods, so nothing of it is imported."""

from __future__ import annotations

from inspect import signature
from typing import Any, TypeVar

from diffprune.errors import InputError

SomeClusterer = TypeVar("SomeClusterer", bound="Clusterer")


class Clusterer:
    """Base of classes whose constructor keeps each argument, unchanged, as the attribute of its name."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor, as given; ``deep`` changes nothing."""
        return {name: getattr(self, name) for name in signature(type(self)).parameters}

    def set_params(self: SomeClusterer, **params: Any) -> SomeClusterer:
        """Change arguments of the constructor; returns self. InputError as there, and for names that it has not."""
        known = self.get_params()
        if unknown := sorted(params.keys() - known.keys()):
            raise InputError(f"expected parameters among {', '.join(known)}, got {', '.join(unknown)}")
        type(self).__init__(self, **known | params)
        return self

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import Tags, TargetTags, TransformerTags  # who calls this has it

        targets = TargetTags(required=False)
        return Tags(estimator_type="clusterer", target_tags=targets, transformer_tags=TransformerTags())

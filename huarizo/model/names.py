"""Places the tensors of weight files in a model as Transformers does on loading: by name, by a name without the base
model's prefix, or by the renamings and conversions that Transformers knows for the type.

Seen with transformers 5.23; tests/model/test_weights.py fails when the hooks move.
"""

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPUTED = ".rotary_emb.inv_freq"  # in older conversions; nothing reads it


class Place(NamedTuple):
    """Where a stored tensor belongs."""

    name: str
    """The tensor of the model."""
    whole: bool
    """Whether it is that tensor as it stands, and not a part that Transformers makes it of, such as one expert."""


def places_of(names: Iterable[str], model: "PreTrainedModel") -> dict[str, Place]:
    """Stored name -> its place. Left out are names that Transformers ignores; one that it doesn't know stays itself."""
    known, prefix = model.state_dict().keys(), f"{model.base_model_prefix}."
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    renamed: Callable[[str], Place] | None = None
    places: dict[str, Place] = {}
    for name in names:
        if name in known:
            places[name] = Place(name, True)
        elif prefix + name in known:
            places[name] = Place(prefix + name, True)
        elif not (name.endswith(COMPUTED) or any(pattern.search(name) for pattern in ignored)):
            renamed = renamed or _renaming(model)
            places[name] = renamed(name)
    return places


def _renaming(model: "PreTrainedModel") -> Callable[[str], Place]:
    """Transformers' own renaming for this model. It takes a moment to make."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    known, transforms = model.state_dict(), get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]

    def place(name: str) -> Place:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        return Place(target, pattern is None) if target in known else Place(name, True)

    return place

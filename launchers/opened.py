"""Which splits a cell reads, known before it runs."""

from collections.abc import Mapping
from typing import Any

from merging.adapt import Learned
from merging.context import splits_of
from merging.methods.method import Method
from tasks.scales import Search

SCALE = "scale"  # who picks a coefficient by labelled accuracy: selection, not adaptation


def splits_read(method: Method, scale: object, router: object, config: Mapping[str, Any]) -> list[str]:
    """What a cell reads beside the split that it scores, known before: it searches on some, or learns from some."""
    searched = [scale.split] if isinstance(scale, Search) and config["scale"] is not None else []
    learned = [router.split] if isinstance(router, Learned) and config["router"] is not None else []
    return [*dict.fromkeys([*searched, *learned, *splits_of(method)])]

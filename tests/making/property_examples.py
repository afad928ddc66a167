"""Number of examples of property tests: the requested number in `make test-all`, a quarter in `make test`."""

from __future__ import annotations

from hypothesis import settings

_ALL = settings.get_profile("all").max_examples


def examples(count: int, quick: int | None = None) -> settings:
    """Return settings that draw ``count`` examples under the profile "all", and in proportion under another.

    Args:
        count: the number of examples under "all".
        quick: the number under "quick", where a quarter of ``count`` is too many.
    """
    drawn = settings().max_examples
    return settings(max_examples=quick if quick and drawn < _ALL else max(5, count * drawn // _ALL))

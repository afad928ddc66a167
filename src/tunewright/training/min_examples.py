"""Too few pairs to train on: refused, unless somebody insists."""

from __future__ import annotations

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.notices import FEWEST_TRAINING_PAIRS


def forced_below(pairs: int, *, force: bool, reporter: Reporter, place: str = "") -> str | None:
    """Refuse to train on fewer than `FEWEST_TRAINING_PAIRS`; with ``force``, warn instead.

    Args:
        pairs: how many there are to train on.
        force: go on with any number.
        reporter: hears the warning.
        place: where they are so few, where that is not the training split itself; begins with a space.

    Returns:
        What the adapter's lineage has to say of it; None where there are enough.

    Raises:
        UserError: too few, and not forced.
    """
    if pairs >= FEWEST_TRAINING_PAIRS:
        return None
    few = f"{pairs} training pair{'' if pairs == 1 else 's'}{place}, fewer than {FEWEST_TRAINING_PAIRS}"
    why = "an adapter learns so few by heart, and a test of that size shows nothing but enormous gains"
    if not force:
        raise UserError(
            f"{few}: {why}",
            where="train",
            fix="Add pairs. Until then prompt with them: they fit into a prompt, and `tunewright advise` measures "
            "that. Or insist with --force.",
        )
    reporter.warn(f"{few}: {why}. Going on as --force says; the adapter's lineage keeps that.")
    return few

"""Whether an adapter belongs to the base and the chat format at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunewright.adapters.registry import Adapter
from tunewright.config import Quantize
from tunewright.core.errors import UserError
from tunewright.models.bases import Base

if TYPE_CHECKING:
    from tunewright.chat import ChatFormat


def require_fit(adapter: Adapter, base: Base, chat: ChatFormat) -> None:
    """Check an adapter's files, and that base and chat format are those that it was trained with.

    Raises:
        UserError: naming what differs.
    """
    from tunewright.chat.inspection import differences

    adapter.verify()
    if "chat" not in adapter.lineage:
        raise UserError(
            "its lineage does not say how its conversations were written: an earlier tunewright trained it",
            where=adapter.name,
            fix="Train again: tunewright train",
        )
    rendering = differences(adapter.lineage["chat"], chat.description)
    trained_on = adapter.lineage["base"]
    if trained_on["digest"] != base.digest:
        before, here = trained_on["files"], base.files
        files = sorted(name for name in before | here if before.get(name) != here.get(name))
        told = [f"other {', '.join(files)}", *rendering]
        raise UserError(
            f"it was trained on {trained_on['spec']} ({trained_on['digest'][:12]}), and the base here is "
            f"{base.spec} ({base.digest[:12]}): {'; '.join(told)}",
            where=adapter.name,
            fix="Set the config's base to the one it was trained on, or train again.",
        )
    if rendering:
        raise UserError(
            f"it was trained on conversations that are written differently here: {'; '.join(rendering)}",
            where=adapter.name,
            fix="Set chat.template and chat.date to what it was trained with, or train again.",
        )


def trained_quantize(adapters: Sequence[Adapter]) -> Quantize:
    """Return how the base was held while these adapters (at least one) were trained on it.

    Raises:
        UserError: not the same for all.
    """
    by_kind: dict[Quantize, str] = {a.quantize: a.name for a in adapters}
    if len(by_kind) > 1:
        told = ", ".join(f"{name} with train.quantization {kind}" for kind, name in by_kind.items())
        raise UserError(
            f"they were trained on the base held in different ways: {told}",
            where="serve.quantization",
            fix="Name adapters of one kind, or set serve.quantization for all.",
        )
    return next(iter(by_kind))

"""Compatibility of an adapter with a base and a chat format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunewright.adapters.registry import Adapter
from tunewright.config import Quantization
from tunewright.core.errors import UserError
from tunewright.models.bases import Base

if TYPE_CHECKING:
    from tunewright.chat import ChatFormat


def require_compatible(adapter: Adapter, base: Base, chat: ChatFormat) -> None:
    """Check an adapter's files, and that base and chat format are those of its training.

    Raises:
        UserError: naming the differences.
    """
    from tunewright.chat.inspection import differences

    adapter.verify()
    if "chat" not in adapter.lineage:
        raise UserError(
            "The lineage does not record the chat format: an earlier tunewright trained this adapter",
            where=adapter.name,
            fix="Train again: tunewright train",
        )
    rendering = differences(adapter.lineage["chat"], chat.description)
    trained_on = adapter.lineage["base"]
    if trained_on["digest"] != base.digest:
        before, here = trained_on["files"], base.files
        files = sorted(name for name in before | here if before.get(name) != here.get(name))
        differing = [f"other {', '.join(files)}", *rendering]
        raise UserError(
            f"The adapter was trained on {trained_on['spec']} ({trained_on['digest'][:12]}), and the base here is "
            f"{base.spec} ({base.digest[:12]}): {'; '.join(differing)}",
            where=adapter.name,
            fix="Set base_model to the adapter's base, or train again.",
        )
    if rendering:
        raise UserError(
            f"The adapter was trained with another chat format: {'; '.join(rendering)}",
            where=adapter.name,
            fix="Set chat.template, chat.tools and chat.date to the values of its training, or train again.",
        )


def trained_quantization(adapters: Sequence[Adapter]) -> Quantization:
    """Return the base's quantization during the training of these adapters (at least one)."""
    by_kind: dict[Quantization, str] = {a.quantization: a.name for a in adapters}
    if len(by_kind) > 1:
        listed = ", ".join(f"{name} with train.quantization {kind}" for kind, name in by_kind.items())
        raise UserError(
            f"The adapters were trained on differently quantized bases: {listed}",
            where="quantization",
            fix="Use adapters of one kind, or set serve.quantization for all.",
        )
    return next(iter(by_kind))

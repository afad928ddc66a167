"""Which adapter answers which row of a pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from tunewright.errors import UserError

BASE_ROW = "__base__"
"""PEFT's name for a row without an adapter."""


class RowAdapters:
    """The LoRA layers of a model, and which adapter answers which row of a pass.

    PEFT's own ``forward(adapter_names=...)`` does the same, but looks for the layers anew in every pass (a quarter of
    the time of a short one) and leaves its hooks behind when a pass fails.

    Rows of one pass cannot be told apart where DoRA is involved (peft refuses). Rows that are not ``mixed`` need not
    be: then the one adapter is switched on for the pass, or all are off.
    """

    def __init__(self, model: Any, *, mixed: bool) -> None:
        assert not model.training, "decoding needs eval mode"
        self._model = model
        self._alone = False
        self._names: set[str] = set()
        self._layers: list[Any] = []
        if not isinstance(model, PeftModel):
            return
        configs: dict[str, Any] = model.peft_config
        for name, config in configs.items():
            if config.peft_type != "LORA" or config.use_dora or config.alora_invocation_tokens:
                self._alone = not mixed
                if not mixed:
                    continue
                raise UserError(
                    f"the adapter {name} is not plain LoRA, so it cannot answer in one batch with others",
                    fix="Train it as plain LoRA: without DoRA or activated LoRA.",
                )
        # Disabled layers would answer with the base, whatever the row asks for.
        status = model.get_model_status()
        assert status.enabled is True and not status.merged_adapters, "adapters must be enabled and unmerged"
        self._names = set(configs)
        self._layers = [part for part in model.modules() if isinstance(part, (LoraLayer, AuxiliaryTrainingWrapper))]

    def require(self, names: Sequence[str | None]) -> None:
        """A layer takes an unknown adapter for one that does not touch it, so the names are checked here."""
        unknown = {name for name in names if name is not None} - self._names
        if unknown:
            raise ValueError(f"the model has no adapter {', '.join(sorted(unknown))}")

    @contextmanager
    def answering(self, names: Sequence[str | None]) -> Iterator[None]:
        """While this is open, row i of a pass is answered by the adapter ``names[i]`` (None: by the base)."""
        if self._alone:
            (only,) = set(names)
            if only is not None:
                self._model.set_adapter(only)
            with nullcontext() if only is not None else self._model.disable_adapter():
                yield
            return
        rows = [BASE_ROW if name is None else name for name in names]

        def name_rows(_layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "adapter_names": rows}

        hooks = [layer.register_forward_pre_hook(name_rows, with_kwargs=True) for layer in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

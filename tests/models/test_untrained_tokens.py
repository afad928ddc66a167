"""Tokens that a base has never learnt are found by their empty embeddings, and refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from making.tiny_bases import build_base
from tunewright.chat import open_chat
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.models.bases import Base, resolve_base, untrained_tokens

END = 257


def _base(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Base:
    build_base(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return resolve_base(str(folder), None, folder, LogReporter())


def _empty(table: str, token: int, to: float) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[f"{table}.weight"][token] = to

    return change


@pytest.mark.parametrize("table", ["model.embed_tokens", "lm_head"])
@pytest.mark.parametrize("value", [0.0, 1e-9])
def test_untrained_tokens_finds_empty_rows_of_either_table(tmp_path: Path, table: str, value: float) -> None:
    base = _base(tmp_path, _empty(table, END, value))
    assert untrained_tokens(base, {0, 65, END}) == [END]
    assert untrained_tokens(base, {0, 65, 66}) == []


def test_token_beyond_the_embedding_table_is_untrained(tmp_path: Path) -> None:
    assert untrained_tokens(_base(tmp_path, lambda _: None), {3, 259, 1000}) == [259, 1000]


def test_untrained_tokens_reads_one_table_when_embeddings_are_tied(tmp_path: Path) -> None:
    base = _base(tmp_path, lambda weights: weights.pop("lm_head.weight"))
    assert untrained_tokens(base, {END}) == []


def test_template_with_an_untrained_token_is_refused_by_name(tmp_path: Path) -> None:
    base = _base(tmp_path, _empty("model.embed_tokens", END, 0.0))
    with pytest.raises(UserError, match=r"Untrained embedding of the token <\|im_end\|>,") as caught:
        open_chat(base)
    assert "chat.template to plain" in str(caught.value.fix)

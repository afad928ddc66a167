"""Every row of real data becomes a complete training row in the model makers' own tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from making import makers
from making.real_data import DATA_SETS, SHARED
from making.tiny_bases import byte_tokenizer, chat_of
from tunewright.data.versions import Member
from tunewright.training.rows import encode_members

pytestmark = pytest.mark.slow

TOKENIZERS: dict[str, Callable[[], Any]] = {
    "llama3_2": partial(makers.llama3_tokenizer, "llama3_2"),
    "mistral-v3": partial(makers.mistral_tokenizer, "v3"),
    "bytes": byte_tokenizer,
}


@pytest.mark.parametrize(
    "tokenizer", [name if name == "bytes" else pytest.param(name, marks=pytest.mark.slow) for name in TOKENIZERS]
)
@pytest.mark.parametrize("data_set", DATA_SETS)
def test_real_rows_have_one_bos_a_complete_answer_and_a_trained_end(data_set: str, tokenizer: str) -> None:
    if not (SHARED / data_set).is_dir():
        pytest.skip(f"the data set {data_set} is not next to the project")
    examples = [e for e in DATA_SETS[data_set]() if all(m.content.strip() for m in e.messages)]
    assert len(examples) >= 1000
    members = [Member(e, e.pair_key, "train", e.pair_key) for e in examples]
    encoded = encode_members(chat_of(TOKENIZERS[tokenizer]()), members, 2**20)
    assert encoded.faults == []
    assert encoded.too_long == []
    assert encoded.members == members

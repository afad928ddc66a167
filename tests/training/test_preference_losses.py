"""The losses of preference tuning, and their gradients, equal those of trl's own trainers on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from making.tiny_bases import byte_tokenizer, tiny_model
from tunewright.chat import Tokens
from tunewright.data.examples import Example, Message
from tunewright.data.versions import Member
from tunewright.training.preference_pairs import PreferenceRows
from tunewright.training.preference_trainer import orpo_losses
from tunewright.training.rows import EncodedRows

BETA = 0.3
WEIGHTS = (1.5, 0.75)
TEXTS = [
    ("Colour of the sky?", "blue", "a long and wrong answer"),
    ("Colour of grass?", "green, mostly", "red"),
    ("Colour of snow?", "white", "whitish grey"),
    ("Of coal?", "black as night", "pink"),
    ("And of the sea, at dusk?", "teal", "t"),
]


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])


def _model() -> Any:
    tokenizer = byte_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model.name_or_path = ""  # trl takes it for a folder if it is missing
    return model


def _weights(model: Any, seed: int) -> dict[str, Tensor]:
    """LoRA weights under which the model differs clearly from the base."""
    from peft import get_peft_model_state_dict

    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.2 * torch.randn(weight.shape, generator=generator)
        for name, weight in get_peft_model_state_dict(model).items()
    }


def _set(model: Any, weights: dict[str, Tensor]) -> None:
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, weights)


def _arguments(kind: Any, folder: Path, rows: int, **settings: Any) -> Any:
    return kind(
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        max_length=None if kind.__name__ == "SFTConfig" else 512,
        **settings,
    )


def _gradients(model: Any) -> dict[str, Tensor]:
    return {
        name.replace("base_model.model.", ""): weight.grad
        for name, weight in model.named_parameters()
        if weight.requires_grad and weight.grad is not None and ".ref." not in name
    }


def _own(
    method: Literal["dpo", "orpo", "kto"], answers: Sequence[tuple[list[int], int, int, bool]], folder: Path
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of tunewright's trainer; an answer is its ids, the prompt's length, its input, and if it is
    good.
    """
    from datasets import Dataset
    from trl import SFTConfig

    from tunewright.training.preference_trainer import PreferenceTrainer
    from tunewright.training.rows import as_columns

    rows = [Tokens(tuple(ids), tuple(i >= prompt for i in range(len(ids)))) for ids, prompt, _, _ in answers]
    members = [
        Member(Example((Message("user", f"{n}"), Message("assistant", ""))), f"{n}", "train", "c")
        for _, _, n, _ in answers
    ]
    good = tuple(good for _, _, _, good in answers)
    weights = WEIGHTS if method == "kto" else (1.0, 1.0)
    preferences = PreferenceRows(
        method, EncodedRows(rows, members, [], []), good, desirable_weight=weights[0], undesirable_weight=weights[1]
    )
    first = rows[:: preferences.answers_per_row]
    columns = {**as_columns(first), "place": list(range(len(first)))}
    trainer = PreferenceTrainer(
        _model(),
        preferences=preferences,
        beta=BETA,
        limit=512,
        share=True,
        args=_arguments(SFTConfig, folder, len(first), remove_unused_columns=False),
        train_dataset=Dataset.from_dict(columns),
        processing_class=byte_tokenizer(),
        peft_config=_lora(),
    )
    model: Any = trainer.model
    _set(model, _weights(model, seed=1))
    if trainer.needs_reference:
        trainer.reference = trainer.log_probabilities(lambda _count: None)
    _set(model, _weights(model, seed=2))
    data: Any = trainer.train_dataset
    # Two micro-batches of unlike size, as gradients accumulate over the rows of a step; KTO's estimate is of one pass.
    cuts = [0, len(first)] if method == "kto" else [0, 2, len(first)]
    batches = [trainer.collate([data[i] for i in range(a, b)]) for a, b in pairwise(cuts)]
    items = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    assert items == len(first)
    loss = sum(trainer.compute_loss(model, batch, num_items_in_batch=items) for batch in batches)
    assert isinstance(loss, Tensor)
    loss.backward()
    return loss.item(), _gradients(model)


def _of_trl(trainer: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a trl trainer on all of its rows, one step away from its reference."""
    model = trainer.model
    _set(model, _weights(model, seed=2))
    model.train()
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    return loss.item(), _gradients(model)


def _peft_model() -> Any:
    from peft import get_peft_model

    model = get_peft_model(_model(), _lora())
    _set(model, _weights(model, seed=1))
    return model


def _require_equal(own: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]]) -> None:
    assert own[0] == pytest.approx(other[0], rel=1e-5)
    assert own[1].keys() == other[1].keys()
    assert max(gradient.abs().max() for gradient in other[1].values()) > 1e-4
    for name, gradient in other[1].items():
        torch.testing.assert_close(own[1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_dpo_equals_trl(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in TEXTS]
    trainer = DPOTrainer(
        _peft_model(),  # its weights become trl's adapter "ref"
        args=_arguments(DPOConfig, tmp_path, len(rows), beta=BETA),
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
    )
    data: Any = trainer.train_dataset
    answers = [
        (row["prompt_ids"] + row[side], len(row["prompt_ids"]), n, side == "chosen_ids")
        for n, row in enumerate(data)
        for side in ("chosen_ids", "rejected_ids")
    ]
    own = _own("dpo", answers, tmp_path)
    _require_equal(own, _of_trl(trainer))
    assert own[0] != pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-3)


def test_orpo_equals_trl(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in TEXTS]
    trainer = ORPOTrainer(
        _peft_model(),
        args=_arguments(ORPOConfig, tmp_path, len(rows), beta=BETA),
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
    )
    data: Any = trainer.train_dataset
    answers = [
        (row[f"{side}_input_ids"], row[f"{side}_labels"].count(-100), n, side == "chosen")
        for n, row in enumerate(data)
        for side in ("chosen", "rejected")
    ]
    _require_equal(_own("orpo", answers, tmp_path), _of_trl(trainer))


def test_kto_equals_trl(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    rows = [{"prompt": p, "completion": (c, r)[n % 2], "label": n % 2 == 0} for n, (p, c, r) in enumerate(TEXTS)]
    settings = {"beta": BETA, "desirable_weight": WEIGHTS[0], "undesirable_weight": WEIGHTS[1]}
    trainer = KTOTrainer(
        _peft_model(),
        args=_arguments(KTOConfig, tmp_path, len(rows), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
    )
    data: Any = trainer.train_dataset
    answers = [
        (row["prompt_ids"] + row["completion_ids"], len(row["prompt_ids"]), n, bool(row["label"]))
        for n, row in enumerate(data)
    ]
    _require_equal(_own("kto", answers, tmp_path), _of_trl(trainer))


def test_orpo_gradient_is_finite_for_certain_and_impossible_answers() -> None:
    chosen = torch.tensor([-1e-9, -1e-4, -50.0, -0.6931471805599453], requires_grad=True)
    losses = orpo_losses(chosen, torch.tensor([-40.0, -1e-9, -1e-7, -0.5]), 0.1)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert chosen.grad is not None
    assert torch.isfinite(chosen.grad).all()

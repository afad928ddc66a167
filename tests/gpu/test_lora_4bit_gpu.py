"""QLoRA's fused layers on the fake card, against peft's own: bytes and launches of a training pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from card_process import CardProcess


def _training_pass(fused: bool, checkpointing: bool) -> tuple[int, int, list[str]]:
    """Return peak bytes beyond the weights, launches, and transfers in layers of one pass and its gradients."""
    import torch
    from fake_card import FakeCard
    from fake_models import SHAPES, build
    from peft import LoraConfig, get_peft_model

    from tunewright.config import TrainConfig
    from tunewright.training.lora import keep_float32, use_fused_lora
    from tunewright.training.packing import attention, pack
    from tunewright.training.packing.fused_loss import add_token_losses, batch_token_losses

    config = LoraConfig(
        r=16, lora_alpha=32, task_type="CAUSAL_LM", target_modules=list(TrainConfig(preset="all-linear").target_modules)
    )
    if fused:
        use_fused_lora(config, "nf4")
    with FakeCard():
        # A small vocabulary: the peak is in a layer, not in the head.
        model: Any = build(replace(SHAPES["llama-3-8b"], layers=2, vocabulary=1024), nf4=True)
        attention.register()
        model.set_attn_implementation(attention.NAME)
        add_token_losses(model)
        model = get_peft_model(model, config)
        keep_float32(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
    rows = [[*range(5 + row, 517 + row)] for row in range(8)]
    with FakeCard() as card:
        batch = pack(rows, [[-100] * 480 + row[480:] for row in rows], share=True).to("cuda")
        card.copies.clear()
        before = card.now
        with torch.autocast("cuda", torch.bfloat16):
            losses = batch_token_losses(model, batch)
        losses.sum().backward()
    return (
        card.peak - before,
        sum(card.launches.values()),
        [each.where for each in (*card.copies, *card.syncs) if each.in_layer],
    )


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fused_4bit_layers_launch_less_than_peft_and_need_no_more_memory(
    card: CardProcess, checkpointing: bool
) -> None:
    peak, launches, in_layers = card.run(_training_pass, True, checkpointing)
    peak_of_peft, launches_of_peft, _ = card.run(_training_pass, False, checkpointing)
    # The peak is elsewhere: what the layers save, they save for a moment.
    assert peak <= 1.001 * peak_of_peft
    # Of two layers with seven adapters each; with checkpointing, the recomputation's too.
    assert launches_of_peft - launches >= (60 if checkpointing else 42)
    assert in_layers == []

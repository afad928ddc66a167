"""A tiny base that answers with one word of the message, and rows that want the last word."""

from __future__ import annotations

import random
from pathlib import Path

from making.tiny_bases import byte_tokenizer, tiny_model

_WORDS = (
    "red green blue amber violet ochre teal navy olive coral plum mint rose sand slate pearl lemon cherry brick wine "
    "ivory khaki lilac mauve rust ruby jade onyx opal sepia umber peach cocoa honey moss fern pine clay smoke snow"
)
WORDS = _WORDS.split()
_STEPS, _ROWS, _RATE = 60, 32, 4e-3


def messages(count: int, seed: int = 0) -> list[str]:
    """Messages of a number and three words."""
    draw = random.Random(seed)
    return [f"{number * 7919 % 10007} {' '.join(draw.sample(WORDS, 3))}" for number in range(count)]


def word_base(folder: Path) -> Path:
    """Write a Llama that was trained to answer with any word of the message: an adapter only learns which one.

    Prompts do not help: it never saw more than one message.
    """
    import torch

    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(WORDS)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = tiny_model("llama", vocab_size=len(tokenizer), num_key_value_heads=4, tie_word_embeddings=True, **ids)
    with torch.no_grad():
        # With the embeddings as the output layer, these heads copy the tokens that they attend to.
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.2)
        for layer in model.model.layers:
            torch.nn.init.orthogonal_(layer.self_attn.v_proj.weight)
            layer.self_attn.o_proj.weight.copy_(layer.self_attn.v_proj.weight.T)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=_STEPS)
    draw, asked = random.Random(1), iter(messages(_STEPS * _ROWS, seed=1))
    for _ in range(_STEPS):
        rows = []
        for _ in range(_ROWS):
            message = next(asked)
            answer = draw.choice(message.split()[1:])
            turns = [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
            rows.append(tokenizer.apply_chat_template(turns, return_dict=False))
        longest = max(map(len, rows))
        batch = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
        labels = batch.masked_fill(batch == tokenizer.pad_token_id, -100)
        model(input_ids=batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

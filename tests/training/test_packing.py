"""Packed batches with shared prefixes: loss and gradients equal those of separate rows."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from inspect import Signature, signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from making.lora_models import Rows, assert_equal_gradients, gradients, separate_losses, with_lora
from making.property_examples import examples
from making.tiny_bases import ARCHITECTURES, KINDS, Kind, tiny_model
from tunewright.config import TrainConfig
from tunewright.core.progress import LogReporter
from tunewright.core.text import common_prefix
from tunewright.models.bases import resolve_base
from tunewright.models.families import ATTENTION, MLP, drop_towers, shape_of
from tunewright.models.loading import load_model
from tunewright.training.packing import Group, attention, pack, plan_groups
from tunewright.training.packing.fused_loss import add_token_losses, batch_token_losses
from tunewright.training.packing.pack import GROUP_COST, computed_tokens
from tunewright.training.recomputation import RecomputedLayers
from tunewright.training.rows import IGNORED

VOCABULARY = 61


def _model(
    kind: Kind,
    *,
    heads: int = 4,
    key_heads: int = 2,
    window: int | None = None,
    layers: int = 2,
    fused: bool = True,
) -> Any:
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 8 * heads,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        **({"sliding_window": window} if window else {}),
    }
    base = tiny_model(kind, **shape)
    targets = shape_of(base.config, ARCHITECTURES[kind]).names
    drop_towers(base)
    add_token_losses(base)
    return with_lora(base, targets, fused=fused)


def _separate(model: Any, rows: Rows, labels: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    model.base_model.model.set_attn_implementation("eager")
    loss = separate_losses(model, rows, labels).mean()
    return loss.detach(), gradients(model, loss)


def _packed(
    model: Any, rows: Rows, labels: Rows, *, share: bool = True, groups: Sequence[Group] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    attention.register()
    model.base_model.model.set_attn_implementation(attention.NAME)
    loss = batch_token_losses(model, pack(rows, labels, share=share, groups=groups)).mean()
    return loss.detach(), gradients(model, loss)


def _assert_equal(ours: tuple[Tensor, dict[str, Tensor]], reference: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert float(ours[0]) == pytest.approx(float(reference[0]), rel=1e-5)
    assert_equal_gradients(ours[1], reference[1])


def _rows(prefixes: Sequence[int], suffixes: Sequence[int], answers: Sequence[int], seed: int = 0) -> tuple[Rows, Rows]:
    """Return rows: one of the prefixes in turn, the rest of the prompt, and the trained answer."""
    luck = random.Random(seed)
    shared = [[luck.randrange(VOCABULARY) for _ in range(length)] for length in prefixes]
    rows, labels = [], []
    for place, (rest, answer) in enumerate(zip(suffixes, answers, strict=True)):
        prompt = [*shared[place % len(shared)], *(luck.randrange(VOCABULARY) for _ in range(rest))]
        said = [luck.randrange(VOCABULARY) for _ in range(answer)]
        rows.append(prompt + said)
        labels.append([IGNORED] * len(prompt) + said)
    return rows, labels


CASES = {
    "one instruction": _rows([13], [4, 7, 2, 9], [3, 1, 5, 2]),
    "one-token completions": _rows([13], [4, 7, 2, 9], [1, 1, 1, 1]),
    "prompt fully shared": _rows([13], [0, 0, 0], [4, 2, 6]),
    "several prefixes": _rows([13, 21, 9], [4, 7, 2, 9, 1, 3, 5], [3, 1, 5, 2, 2, 4, 1]),
    "nothing shared": _rows([0], [14, 17, 12, 9], [3, 1, 5, 2]),
    "one row": _rows([13], [5], [4]),
    "lengths far apart": _rows([13], [1, 40, 3, 90, 2], [2, 3, 1, 8, 2]),
}


@pytest.mark.parametrize(
    ("case", "kind", "shape"),
    [
        *((case, "llama", {}) for case in CASES),
        *((case, "mistral", {"window": 6}) for case in CASES),
        *(
            ("several prefixes", kind, shape)
            for kind, shape in [
                ("llama", {"heads": 4, "key_heads": 1}),
                ("llama", {"heads": 3, "key_heads": 3}),
                ("mistral", {}),
                ("mistral3", {}),
                ("mistral3-ministral3", {}),
                ("ministral3", {}),
                ("ministral3", {"window": 6}),
                ("mixtral", {}),
                ("mixtral", {"window": 6}),
            ]
        ),
    ],
)
def test_packed_loss_and_gradients_equal_those_of_separate_rows(case: str, kind: Kind, shape: dict[str, Any]) -> None:
    rows, labels = CASES[case]
    model = _model(kind, **shape)
    reference = _separate(model, rows, labels)
    for share in (True, False):
        _assert_equal(_packed(model, rows, labels, share=share), reference)


@examples(25)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4)), min_size=1, max_size=6),
    st.sampled_from([None, 5]),
    st.integers(0, 99),
)
def test_packed_loss_and_gradients_equal_those_of_separate_rows_for_any_batch(
    prefixes: list[int], suffixes: list[tuple[int, int]], window: int | None, seed: int
) -> None:
    rests, answers = zip(*suffixes, strict=True)
    rows, labels = _rows([length + 1 for length in prefixes], rests, answers, seed)
    model = _model("mistral", window=window)
    _assert_equal(_packed(model, rows, labels), _separate(model, rows, labels))


def test_trained_turns_within_a_shared_prefix_count_once_for_each_row() -> None:
    """Conversations that begin with the same question and trained answer."""
    rows, labels = _rows([20], [4, 7, 2], [3, 1, 5])
    for row, label in zip(rows, labels, strict=True):
        label[8:12] = row[8:12]
    model = _model("llama")
    assert plan_groups(rows) == [Group(20, (0, 1, 2))] or plan_groups(rows)[0].prefix == 20
    _assert_equal(_packed(model, rows, labels), _separate(model, rows, labels))


@pytest.mark.parametrize("recomputed", ["all", 1])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_layers_change_no_bit_of_loss_and_gradients(kind: Kind, recomputed: Any) -> None:
    rows, labels = CASES["several prefixes"]
    model = _model(kind)
    losses, before = _packed(model, rows, labels)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = TrainConfig(gradient_checkpointing=recomputed)
    RecomputedLayers(config, shape_of(model.config, ARCHITECTURES[kind])).apply(model)
    layers = [layer.gradient_checkpointing for layer in model.get_decoder().layers]
    assert layers == [True, recomputed == "all"]
    again = _packed(model, rows, labels)
    assert torch.equal(again[0], losses)
    assert all(torch.equal(again[1][name], each) for name, each in before.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_gradients_equal_those_of_separate_rows_over_nf4(tiny_base_folder: Path, checkpointing: bool) -> None:
    base = resolve_base(str(tiny_base_folder), None, tiny_base_folder, LogReporter())
    quantized = load_model(base, "float32", "nf4")
    add_token_losses(quantized)
    model = with_lora(quantized, (*ATTENTION, *MLP), fused=True, quantization="nf4")
    rows, labels = CASES["several prefixes"]
    reference = _separate(model, rows, labels)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _assert_equal(_packed(model, rows, labels), reference)


def test_fused_lora_gives_the_gradients_of_peft_layers() -> None:
    rows, labels = CASES["one instruction"]
    _assert_equal(
        _packed(_model("llama", fused=True), rows, labels), _separate(_model("llama", fused=False), rows, labels)
    )


def test_bfloat16_attention_is_close_to_float32_for_long_and_short_suffixes() -> None:
    rows, labels = _rows([30], [3, 140, 150, 9], [4, 3, 2, 5])
    model = _model("llama")
    reference = _separate(model, rows, labels)
    loss, found = _packed(model.to(torch.bfloat16), rows, labels)
    assert float(loss) == pytest.approx(float(reference[0]), rel=0.02)
    for name, gradient in found.items():
        cosine = torch.cosine_similarity(gradient.float().flatten(), reference[1][name].flatten(), dim=0)
        assert cosine > 0.99, name


# FlashAttention's operations on the processor, by their documented meaning and in the precision of their inputs:
# everything around the card's kernel computes real numbers. Queries and keys of a sequence are aligned at their ends.
# A query at p sees keys from p - left to p + right (-1: all).


@varlen._varlen_attn.register_kernel("cpu")
def _attend_sequences(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_ends: Tensor,
    k_ends: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    scale: float,
    window_size: list[int],
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query))
    for q, k in _sequences(q_ends, k_ends, max_q, max_k):
        scores = _scores(query[q], key[k], scale, is_causal, window_size)
        lse[:, q] = scores.logsumexp(-1)
        out[q] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), _for_heads(value[k], query))
    return out, lse, torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def _attend_sequences_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    q_ends: Tensor,
    k_ends: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: Tensor,
    scale: float,
    window_size: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """With p = softmax(s), s = scale q k and o = p v: dv = p do, ds = p (do v - do o), dq = scale ds k."""
    of_query, of_key, of_value = (torch.zeros_like(each) for each in (query, key, value))
    for q, k in _sequences(q_ends, k_ends, max_q, max_k):
        scores = _scores(query[q], key[k], scale, is_causal, window_size)
        p = (scores - lse[:, q, None]).exp()  # [H, S, P]
        of_p = torch.einsum("qhd,khd->hqk", grad[q], _for_heads(value[k], query))
        of_scores = p * (of_p - (grad[q] * out[q]).sum(-1).T[..., None]) * scale
        of_query[q] = torch.einsum("hqk,khd->qhd", of_scores, _for_heads(key[k], query))
        grouped = (-1, key.shape[1], query.shape[1] // key.shape[1], key.shape[2])
        of_key[k] = torch.einsum("hqk,qhd->khd", of_scores, query[q]).view(grouped).sum(2)
        of_value[k] = torch.einsum("hqk,qhd->khd", p, grad[q]).view(grouped).sum(2)
    return of_query, of_key, of_value


def _sequences(q_ends: Tensor, k_ends: Tensor, max_q: int, max_k: int) -> list[tuple[slice, slice]]:
    """Return each sequence's queries and keys; lengths over what the kernel was launched for are refused."""
    assert q_ends.dtype == k_ends.dtype == torch.int32
    assert (int(q_ends.diff().max()), int(k_ends.diff().max())) == (max_q, max_k)
    pairs = zip(pairwise(q_ends.tolist()), pairwise(k_ends.tolist()), strict=True)
    return [(slice(*q), slice(*k)) for q, k in pairs]


def _for_heads(kv: Tensor, query: Tensor) -> Tensor:
    return kv.repeat_interleave(query.shape[1] // kv.shape[1], 1)


def _scores(query: Tensor, key: Tensor, scale: float, is_causal: bool, window_size: list[int]) -> Tensor:
    """Return scores [H, S, P]; unseen keys have minus infinity."""
    left, right = window_size
    age = torch.arange(len(key) - len(query), len(key))[:, None] - torch.arange(len(key))  # of the key, in tokens
    unseen = age < 0 if is_causal or right == 0 else torch.zeros_like(age, dtype=torch.bool)
    if left >= 0:
        unseen |= age > left
    return (torch.einsum("qhd,khd->hqk", query, _for_heads(key, query)) * scale).masked_fill(unseen, -torch.inf)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_varlen_attention_equals_block_attention_and_its_gradients(case: str, share: bool, window: int | None) -> None:
    """This is the GPU's computation in float64: gathers, grouped heads, windows, and FlashAttention's own interface."""
    torch.manual_seed(0)
    batch = pack(*CASES[case], share=share)
    tokens = batch.input_ids.shape[1]
    query = torch.randn(1, 4, tokens, 8, dtype=torch.float64)
    key, value = (torch.randn(1, 2, tokens, 8, dtype=torch.float64) for _ in range(2))
    wanted = torch.randn(1, tokens, 4, 8, dtype=torch.float64)
    inputs = [each.requires_grad_() for each in (query, key, value)]

    blocks = attention.attend(None, query, key, value, None, layout=batch.layout, scaling=0.3, sliding_window=window)[0]
    sequences = attention.varlen_attention(query, key, value, batch.layout.sequences, 0.3, window)[None]

    torch.testing.assert_close(sequences, blocks)
    gradients = [torch.autograd.grad((each * wanted).sum(), inputs) for each in (sequences, blocks)]
    # Sums are in float32 where keys are gathered.
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [2, 8, 64, 256])
def test_gather_rounds_gradients_once_for_any_number_of_rows(rows: int) -> None:
    """Against float64: rounding a sum to bfloat16 once leaves 0.17% (2^-9 over root 3 of a uniform mantissa)."""
    generator = torch.Generator().manual_seed(rows)
    prefix, size = 16, 512
    places = torch.arange(prefix).repeat(rows)
    sent_back = torch.randn(rows * prefix, size, generator=generator).bfloat16()
    packed = torch.zeros(prefix, size, dtype=torch.bfloat16, requires_grad=True)
    exact = sent_back.double().view(rows, prefix, size).sum(0)

    def error(gradient: Tensor) -> float:
        assert gradient.dtype == torch.bfloat16
        return float((gradient.double() - exact).norm() / exact.norm())

    (gradient,) = torch.autograd.grad(attention.gather(packed, places), packed, sent_back)
    assert error(gradient) < 0.002
    # As a card adds up the gradient of index_select: in bfloat16, row by row.
    one_by_one = torch.zeros(prefix, size, dtype=torch.bfloat16)
    for row in sent_back.view(rows, prefix, size):
        one_by_one += row
    if rows >= 64:
        assert error(one_by_one) > 0.005


SIGNATURES: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parents[1] / "gpu" / "varlen_signatures.json").read_text(encoding="utf-8")
)
"""``varlen_attn``'s signature by release of torch: see varlen_signatures.py next to the file."""


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("release", SIGNATURES)
def test_varlen_attention_passes_arguments_that_each_torch_release_takes(
    release: str, key_heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The release's signature stands before the installed kernel, so a wrong order or name changes the numbers too."""
    taken = _signature(SIGNATURES[release]["signature"])
    assert list(taken.parameters)[:7] == list(signature(varlen.varlen_attn).parameters)[:7]
    installed, calls = varlen.varlen_attn, []

    def of_release(*args: Any, **kwargs: Any) -> Any:
        given = taken.bind(*args, **kwargs).arguments
        calls.append(given)
        # Before 2.12 the kernel took grouped heads without a flag; the installed one may want it.
        flag: dict[str, Any] = {"enable_gqa": key_heads != 4} if "enable_gqa" in signature(installed).parameters else {}
        return installed(**{name: value for name, value in given.items() if name != "enable_gqa"}, **flag)

    of_release.__signature__ = taken  # type: ignore[attr-defined]
    monkeypatch.setattr(varlen, "varlen_attn", of_release)
    attention._asks_for_gqa.cache_clear()
    torch.manual_seed(0)
    layout = pack(*CASES["several prefixes"], share=True).layout
    tokens = sum(part.tokens for part in layout.parts)
    query = torch.randn(1, 4, tokens, 8, dtype=torch.float64)
    key, value = (torch.randn(1, key_heads, tokens, 8, dtype=torch.float64) for _ in range(2))
    try:
        out = attention.varlen_attention(query, key, value, layout.sequences, 0.3, window)[None]
    finally:
        attention._asks_for_gqa.cache_clear()
    blocks = attention.attend(None, query, key, value, None, layout=layout, scaling=0.3, sliding_window=window)[0]
    torch.testing.assert_close(out, blocks)
    (given,) = calls
    assert given["scale"] == 0.3
    # A window counts the token itself here, and in torch it does not.
    assert given["window_size"] == ((-1, 0) if window is None else (3, 0))
    assert given.get("enable_gqa", False) == (key_heads != 4 and "enable_gqa" in taken.parameters)


def test_varlen_signature_on_record_is_the_installed_one() -> None:
    """So the record, which is read from wheels, says what Python sees."""
    release = torch.__version__.partition("+")[0]
    assert release in SIGNATURES, "run tests/gpu/varlen_signatures.py"
    recorded, installed = _signature(SIGNATURES[release]["signature"]), signature(varlen.varlen_attn)
    shown = [[(each.name, each.kind, each.default) for each in of.parameters.values()] for of in (recorded, installed)]
    assert shown[0] == shown[1]


def _signature(parameters: str) -> Signature:
    """Return the signature that has these parameters; annotations stay text."""
    made: dict[str, Any] = {}
    exec(f"from __future__ import annotations\ndef varlen_attn({parameters}): ...", made)
    return signature(made["varlen_attn"])


def _all_tensors(value: Any) -> list[Tensor]:
    """Return every tensor of a batch, at any depth."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in _all_tensors(each)]
    if is_dataclass(value):
        return [tensor for field in fields(value) for tensor in _all_tensors(getattr(value, field.name))]
    return []


def test_packed_batch_moves_all_of_its_tensors() -> None:
    """This includes those of replay and of padded blocks; DDP moves none of them."""
    rows, labels = CASES["several prefixes"]
    batch = pack(rows, labels, share=True, replayed=[place % 2 == 0 for place in range(len(rows))])
    here, there = _all_tensors(batch), _all_tensors(batch.to("meta"))
    assert len(here) == len(there) >= 11
    assert {tensor.device.type for tensor in there} == {"meta"}


def test_packed_batch_makes_no_quadratic_mask() -> None:
    """Nothing as large as [T, T] is allocated, neither a mask nor scores, also on the CPU."""
    rows, labels = _rows([40], [8] * 32, [4] * 32)
    batch = pack(rows, labels, share=True)
    tokens = batch.input_ids.shape[1]
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(each.numel() for each in tree_iter(out) if isinstance(each, Tensor))])
            return out

    model = _model("llama", heads=1, key_heads=1)
    attention.register()
    model.base_model.model.set_attn_implementation(attention.NAME)
    with Watch():
        batch_token_losses(model, batch).sum().backward()
    assert largest < tokens**2 / 4


def test_plan_groups_equals_brute_force_over_all_groupings() -> None:
    luck = random.Random(3)
    for _ in range(60):
        rows = [[luck.randrange(2) for _ in range(luck.randrange(1, 60))] for _ in range(luck.randrange(1, 7))]
        for row in rows[1:]:
            keep = luck.randrange(len(rows[0]) + 1)
            row[:keep] = rows[0][:keep]
        groups = plan_groups(rows)
        assert sorted(row for group in groups for row in group.rows) == list(range(len(rows)))
        for group in groups:
            assert len({tuple(rows[row][: group.prefix]) for row in group.rows}) == 1
            assert all(len(rows[row]) > group.prefix for row in group.rows)
        order = sorted(range(len(rows)), key=lambda place: rows[place])
        best = min(_cost([rows[place] for place in order], cuts) for cuts in range(2 ** (len(rows) - 1)))
        cost = computed_tokens(rows, groups) + GROUP_COST * sum(group.prefix > 0 for group in groups)
        assert cost == best


def _cost(ordered: Rows, cuts: int) -> int:
    """Tokens and further groups, where bit i of ``cuts`` ends a group after row i."""
    total, start = 0, 0
    for end in range(1, len(ordered) + 1):
        if end == len(ordered) or cuts >> (end - 1) & 1:
            run = ordered[start:end]
            whole = sum(map(len, run))
            prefix = min(min(common_prefix(run[0], row) for row in run), min(map(len, run)) - 1)
            shared = whole - (len(run) - 1) * prefix + GROUP_COST
            total += min(whole, shared) if len(run) > 1 and prefix else whole
            start = end
    return total


def test_packed_work_grows_linearly_with_rows() -> None:
    rows, labels = _rows([200], [10] * 64, [4] * 64)
    batch = pack(rows, labels, share=True)
    assert batch.input_ids.numel() == 200 + 64 * 14
    assert batch.layout.sequences.key_indices is not None
    assert len(batch.layout.sequences.key_indices) == 200 + 64 * 214
    assert batch.predict_from.numel() == batch.targets.numel() == 64 * 4

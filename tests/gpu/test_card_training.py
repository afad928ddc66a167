"""``tunewright train`` on a GPU: everything stays on it, nothing is quadratic in tokens, and it rarely waits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from card_process import CardProcess
from fake_card import FakeCard, Transfer
from fake_models import SHAPES, Listing, build, rows, train, use_stand_in_for_liger

from tunewright.config import PRESETS, TrainConfig
from tunewright.core.errors import UserError
from tunewright.models.memory_estimate import BatchShape, TrainingSetup, estimate
from tunewright.training.liger import choose_liger
from tunewright.training.lora import require_precision

pytestmark = pytest.mark.slow

BATCH, MICRO = 4, 2
LOAD = BatchShape(rows=BATCH, shared=24, own=12, trained=4)
LONG = BatchShape(rows=4, shared=0, own=1024, trained=32)
CARD = 80 * 10**9


@dataclass(frozen=True)
class Report:
    """Counts over a whole run: training, one evaluation, one checkpoint."""

    history: list[dict[str, Any]]
    copies: list[Transfer]
    syncs: list[Transfer]
    largest: tuple[int, str, tuple[int, ...]]
    launches: Counter[tuple[str, torch.dtype | None]]


def _run(
    name: str,
    steps: int = 1,
    *,
    nf4: bool = False,
    mistral: bool = False,
    window: int | None = None,
    layers: int = 2,
    load: BatchShape = LOAD,
    capability: tuple[int, int] = (9, 0),
    **settings: Any,
) -> Report:
    """Train a base of this shape's real width for some steps of two micro-batches each."""
    replayed = rows(load, seed=9) if "replay" in settings else []
    settings = {
        "preset": "all-linear",
        "epochs": 1,
        "batch_size": load.rows,
        "micro_batch_size": load.rows // 2,
        "quantization": "nf4" if nf4 else "none",
        **settings,
    }
    dtype = getattr(torch, settings.get("dtype", "bfloat16"))
    with FakeCard(capability) as card:
        shape = replace(SHAPES[name], layers=layers)
        model = build(shape, nf4=nf4, mistral=mistral, window=window, dtype=dtype)
        card.largest = (0, "", ())
        own = [row for step in range(steps) for row in rows(load, seed=step)][: steps * load.rows - len(replayed)]
        history, _ = train(model, settings, own, rows(load)[:2], replay=replayed)
    return Report(history, card.copies, card.syncs, card.largest, card.launches)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mistral-7b", {"mistral": True, "window": 8, "nf4": True}),
        ("llama-3-8b", {}),
    ],
)
def test_training_stays_on_the_gpu(card: CardProcess, name: str, options: dict[str, Any]) -> None:
    """The choice of the micro-batch, steps of two pieces with a checkpointed backward pass, dev loss, checkpoint."""
    report = card.run(_run, name, **options)
    assert [sorted({"loss", "eval_loss"} & row.keys()) for row in report.history] == [["loss"], ["eval_loss"]]
    assert report.history[0]["memory_bytes"] > 0
    assert not [copy for copy in report.copies if copy.in_layer]
    # FlashAttention ran, also backward: two layers, and each pass with its recomputation.
    assert report.launches["_varlen_attn", None] > report.launches["_varlen_attn_backward", None] > 0


@pytest.mark.parametrize("options", [{"nf4": True}, {"mistral": True, "window": 8}])
def test_kl_replay_stays_on_the_gpu(card: CardProcess, options: dict[str, Any]) -> None:
    report = card.run(_run, "tiny", 3, replay={"samples": 4, "kl_coef": 0.5}, **options)
    assert {"loss", "pair_loss", "replay_kl"} <= report.history[0].keys()
    assert not [copy for copy in report.copies if copy.in_layer]


@pytest.mark.parametrize("replay", [None, {"samples": 4, "kl_coef": 0.5}])
def test_host_reads_a_step_once_after_launching_the_next_one(card: CardProcess, replay: dict[str, Any] | None) -> None:
    """Loss, gradient norm and the parts of the loss are one copy, and no copy to the card blocks the host."""
    settings = {} if replay is None else {"replay": replay}
    fewer, more = (card.run(_run, "tiny", steps, **settings) for steps in (3, 4))
    assert len(more.history) == len(fewer.history) + 1
    assert _reads(more) - _reads(fewer) == {("copy", False): 1, ("read", False): 1}
    assert _blocking(more) == _blocking(fewer)
    # The last step has no step after it.
    assert _reads(more)["read", True] == 1


def test_dev_loss_is_copied_from_the_gpu_once(card: CardProcess) -> None:
    report = card.run(_run, "tiny")
    assert [read.where.split()[-1] for read in report.syncs].count("_evaluation_metrics") == 1
    assert not [copy for copy in report.copies if copy.blocking and copy.where.endswith("_evaluation_metrics")]


def test_micro_batch_chunks_move_to_the_gpu_without_waiting(card: CardProcess) -> None:
    fewer, more = (card.run(_in_smaller_pieces, steps) for steps in (2, 3))
    assert _reads(more) - _reads(fewer) == {("copy", False): 1, ("read", False): 1}
    assert _blocking(more) == _blocking(fewer)


def _in_smaller_pieces(steps: int) -> Report:
    """Micro-batches of four rows, of which memory holds one at once."""
    from tunewright.training import memory

    choose = memory.MicroBatch.choose
    memory.MicroBatch.choose = lambda self, rows, tokens: self._keep(1)  # type: ignore[method-assign]
    try:
        return _run("tiny", steps, micro_batch_size=BATCH)
    finally:
        memory.MicroBatch.choose = choose  # type: ignore[method-assign]


def _reads(report: Report) -> Counter[tuple[str, bool]]:
    """Count reads from the card by function, and by whether the host waits while the card has nothing to do."""
    return Counter((read.where.split()[-1], read.blocking) for read in report.syncs)


def _blocking(report: Report) -> Counter[str]:
    return Counter(copy.where for copy in report.copies if copy.blocking)


@pytest.mark.parametrize("nf4", [False, True])
def test_training_allocates_no_quadratic_tensor(card: CardProcess, nf4: bool) -> None:
    load = BatchShape(rows=32, shared=100, own=120, trained=4)
    report = card.run(_run, "tiny", nf4=nf4, load=load, micro_batch_size=load.rows)
    assert report.largest[0] < load.tokens**2 / 8, report.largest


def test_gradients_of_shared_tokens_are_summed_in_float32(card: CardProcess) -> None:
    """Keys and values of a prefix, and states that several answers begin from."""
    launches = card.run(_run, "tiny").launches
    sums = ("index_add", "index_add_", "index_put", "index_put_")
    assert {dtype for name, dtype in launches if name in sums} == {torch.float32}


@pytest.mark.parametrize("options", [{"nf4": True}, {"mistral": True, "window": 8}])
def test_gpu_before_ampere_trains_in_float32_without_flash_attention(
    card: CardProcess, options: dict[str, Any]
) -> None:
    report = card.run(_run, "tiny", dtype="float32", capability=(7, 5), **options)
    assert "loss" in report.history[0]
    assert ("_varlen_attn", None) not in report.launches
    assert not [copy for copy in report.copies if copy.in_layer]


@dataclass(frozen=True)
class Step:
    """Counts over a run of one step, and the bytes at its peak."""

    peak: int
    launches: int
    attention: tuple[int, int]
    """Attention's forward and backward passes."""
    details: dict[str, Any]
    lines: list[str]


def _step(recomputed: str | int, limit: int | None = None, reported: int | None = None) -> Step:
    """Train an 8B's width with four layers for one step."""
    lines: list[str] = []
    settings = {"preset": "all-linear", "epochs": 1, "batch_size": LONG.rows, "gradient_checkpointing": recomputed}
    with FakeCard(limit=limit, reported=reported) as card:
        model = build(replace(SHAPES["llama-3-8b"], layers=4))
        card.peak = card.now
        _, details = train(model, settings, rows(LONG), rows(BatchShape(1, 0, 4, 2)), lines=lines)
    passes = (card.launches["_varlen_attn", None], card.launches["_varlen_attn_backward", None])
    return Step(card.peak, sum(card.launches.values()), passes, details, lines)


def test_recomputed_layers_trade_launches_for_memory(card: CardProcess) -> None:
    """The step and the pass that probes memory compute the layers twice; the evaluation on dev once."""
    none, some, every = (card.run(_step, each) for each in ("none", 2, "all"))
    assert none.peak > some.peak > every.peak
    assert none.launches < some.launches < every.launches
    assert [each.attention for each in (none, some, every)] == [(12, 8), (16, 8), (20, 8)]
    assert [each.details["recomputed_layers"] for each in (none, some, every)] == [0, 2, 4]


def test_auto_recomputes_no_layer_where_memory_suffices(card: CardProcess) -> None:
    step = card.run(_step, "auto")
    assert step.details["recomputed_layers"] == 0
    assert any(line.endswith("fits with 0 of 4 layers recomputed.") for line in step.lines)


def test_auto_recomputes_as_few_layers_as_fit(card: CardProcess) -> None:
    """A limit between the needs of two recomputed layers and of one, with the runtime that the estimate adds."""
    shape = replace(SHAPES["llama-3-8b"], layers=4)
    setup = TrainingSetup(PRESETS["all-linear"]["target_modules"], 16, card=True)
    needs = [estimate(shape, replace(setup, recomputed=layers), LONG) for layers in (1, 2)]
    one, two = (need.total + need.allocator for need in needs)
    step = card.run(_step, "auto", (one + two) // 2)
    assert step.details["recomputed_layers"] == 2
    assert step.details["micro_batch_size"] == LONG.rows
    assert step.peak <= two


def test_auto_recomputes_more_layers_before_it_halves_rows(card: CardProcess) -> None:
    """The card has less memory than its driver reports, by which no layer needs to be recomputed."""
    every = card.run(_step, "all")
    step = card.run(_step, "auto", int(1.02 * every.peak), CARD)
    assert (step.details["recomputed_layers"], step.details["micro_batch_size"]) == (3, LONG.rows), "first 2, then 3"
    less = card.run(_step, "auto", int(0.96 * every.peak), CARD)
    assert less.details["micro_batch_size"] == LONG.rows // 2


def _precision(dtype: str, capability: tuple[int, int]) -> str | None:
    with FakeCard(capability):
        try:
            require_precision(TrainConfig.model_validate({"dtype": dtype}))
        except UserError as error:
            return f"{error.where}: {error.what}"
    return None


def test_bfloat16_is_refused_on_a_gpu_before_ampere(card: CardProcess) -> None:
    assert card.run(_precision, "bfloat16", (7, 5)) == (
        "train.dtype: bfloat16 needs a GPU of compute capability 8.0 (Ampere) or later; fake card has 7.5"
    )
    assert card.run(_precision, "bfloat16", (8, 0)) is None
    assert card.run(_precision, "float32", (7, 5)) is None


@dataclass(frozen=True)
class Fused:
    """A run's lines about Liger's kernels, the value of its lineage, and the launches of these kernels."""

    lines: list[str]
    used: bool
    kernels: int


def _fused(asked: Any, *, installed: bool, mistral: bool = False) -> Fused:
    """Train one step of two micro-batches and evaluate it."""
    from transformers.models.llama import modeling_llama
    from transformers.models.mistral import modeling_mistral

    if installed:
        use_stand_in_for_liger()
    lines: list[str] = []
    settings = {"epochs": 1, "batch_size": BATCH, "micro_batch_size": MICRO, "use_liger_kernel": asked}
    modules = (modeling_llama, modeling_mistral)
    before = [dict(vars(module)) for module in modules]
    with FakeCard() as card:
        model = build(SHAPES["tiny"], mistral=mistral)
        _, details = train(model, settings, rows(LOAD), rows(BatchShape(1, 0, 4, 2)), lines=lines)
    for module, names in zip(modules, before, strict=True):
        changed = [name for name, value in vars(module).items() if value is not names.get(name)]
        assert not changed, "a model loaded later has its own code"
    kernels = {"rms_norm", "rms_norm_backward", "rope", "swiglu", "swiglu_backward"}
    count = sum(times for (name, _), times in card.launches.items() if name in kernels)
    return Fused([line for line in lines if "Liger" in line], details["liger_kernels"], count)


def test_auto_uses_liger_where_it_is_installed(card: CardProcess) -> None:
    if find_spec("liger_kernel") is None:
        without = card.run(_fused, "auto", installed=False)
        assert without == Fused(["Liger's kernels: not used, because liger-kernel is not installed."], False, 0)
    for mistral in (False, True):
        fused = card.run(_fused, "auto", installed=True, mistral=mistral)
        assert fused.lines == ["Liger's kernels: used for the rotary embedding, RMSNorm and SwiGLU."]
        assert fused.used
        # Of two layers: 8 forward and 8 backward, and the last norm's 2; the pass that probes memory, two micro-batches
        # and the evaluation on dev, which has no backward pass.
        assert fused.kernels == 3 * 18 + 9
    assert card.run(_fused, False, installed=True) == Fused([], False, 0)


def _choices() -> list[tuple[bool, list[str]]]:
    use_stand_in_for_liger()
    chosen = []
    for architecture, began_with in (
        ("LlamaForCausalLM", False),
        ("LlamaForCausalLM", True),
        ("MixtralForCausalLM", None),
    ):
        listing = Listing([])
        chosen.append((choose_liger("auto", architecture, began_with, listing), listing.lines))
    return chosen


def test_resumed_run_and_other_bases_use_no_liger(card: CardProcess) -> None:
    assert card.run(_choices) == [
        (False, ["Liger's kernels: not used, because the run began without them."]),
        (True, ["Liger's kernels: used for the rotary embedding, RMSNorm and SwiGLU."]),
        (
            False,
            ["Liger's kernels: not used, because Liger's kernels support Llama and Mistral, not MixtralForCausalLM."],
        ),
    ]

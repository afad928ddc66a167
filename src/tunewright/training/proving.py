"""The proofs of a base, on a shrunk copy of its configuration: seconds, kept for later commands.

Each proof compares what tunewright computes with transformers' own model and attention, in float32: the loaded model,
packed rows with LoRA, decoding with its cache, and a saved adapter. All of it runs on the CPU.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from tunewright.adapters.lora_weights import EXPERT_PARAMETERS, load_lora_weights
from tunewright.config.train import EXPERTS
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter, slow
from tunewright.generation.batched_lora import Lora
from tunewright.generation.decoding import Batch
from tunewright.generation.lora_dispatch import LoraDispatch
from tunewright.generation.requests import Request, Row
from tunewright.models import quiet_transformers
from tunewright.models.bases import Base, base_config, resolve_base
from tunewright.models.families import (
    Shape,
    check_architecture,
    drop_towers,
    load_config,
    outside_text,
    read_config,
    shape_of,
    text_name,
)
from tunewright.models.loading import dequantization, load_model
from tunewright.models.memory_estimate import FLOAT
from tunewright.models.memory_plan import gigabytes, machine_memory
from tunewright.models.proofs import Name, Proof, Proofs, identity, keep, read_kept
from tunewright.models.shrunk import VOCABULARY, WINDOW, random_model, shrunk
from tunewright.training.lora import use_fused_lora
from tunewright.training.packing import attention, pack
from tunewright.training.packing.fused_loss import add_token_losses, batch_token_losses
from tunewright.training.rows import IGNORED

TOLERANCE = 1e-3
"""Largest relative difference of logits, losses and gradients that rounding in float32 explains."""
TRAINS: tuple[Name, ...] = ("layers", "adapter")
"""The proofs that training needs."""
_COPIES = 4
"""Copies of the weights that a proof holds at once."""
_RANK, _ALPHA = 3, 6
_STATEFUL = ("linear_attention", "mamba", "conv", "recurrent")
_TEXT = 3 * WINDOW
"""Tokens of the copy's prompts: three windows."""


def prove(path: Path, reporter: Reporter) -> Proofs:
    """Return the proofs of the base with this ``config.json``, made at first use."""
    architecture = check_architecture(path)
    key = identity(read_config(path))
    kept = read_kept(key)
    if kept is not None:
        return kept
    # peft draws an adapter's weights from the process's generator, whose state is the caller's.
    with slow(reporter, f"Proving {architecture}"), quiet_transformers(), torch.random.fork_rng(devices=[]):
        proofs = Proofs(
            architecture=architecture, identity=key, proofs=prove_config(load_config(path, architecture), architecture)
        )
    keep(proofs)
    return proofs


def require_proofs(base: Base, needed: Sequence[Name], reporter: Reporter) -> Proofs:
    """Return the base's proofs; refuse it with the reason of the first ``needed`` one that failed."""
    return require_config_proofs(base.folder / "config.json", base.spec, needed, reporter)


def require_config_proofs(path: Path, spec: str, needed: Sequence[Name], reporter: Reporter) -> Proofs:
    """Do `require_proofs` with the base's ``config.json``, before its weights are fetched."""
    proofs = prove(path, reporter)
    for name in needed:
        if (reason := proofs.reason(name)) is not None:
            raise UserError(
                f"{proofs.architecture} fails the proof `{name}`: {reason}",
                where="base_model",
                fix=f"Use another base. `tunewright doctor --base {spec}` shows all proofs.",
            )
    return proofs


def proved(base: Base, reporter: Reporter, needed: Sequence[Name] = ("layers",)) -> Base:
    """Return the base with the paths that its proofs decide; refuse it if a ``needed`` proof failed."""
    proofs = require_proofs(base, needed, reporter)
    return replace(base, packed=base.packed and proofs.packed, own_cache=base.own_cache and proofs.own_cache)


def prove_weights(spec: str, root: Path, reporter: Reporter) -> Proofs:
    """Return the proofs of a base's own weights in float32, made at first use; they are fetched if memory suffices.

    Their text is short: what begins after it, such as a sliding window, is proved on the shrunk copy only.

    Raises:
        UserError: no such base, or this machine lacks the memory.
    """
    path = base_config(spec, None, root, reporter)
    architecture = check_architecture(path)
    whole = load_config(path, architecture)
    needed, memory = _COPIES * FLOAT * shape_of(whole, architecture).parameters, machine_memory()
    if needed > memory.bytes:
        raise UserError(
            f"{spec} needs {gigabytes(needed)} to be proved with its own weights, in float32; {memory.source}",
            where="--full",
            fix="Leave out --full: the proofs of the shrunk copy need little memory.",
        )
    base = resolve_base(spec, None, root, reporter)
    key = identity({"config": read_config(path), "weights": base.digest})
    kept = read_kept(key)
    if kept is not None:
        return kept

    def reference() -> Any:
        return getattr(transformers, architecture).from_pretrained(
            base.folder,
            dtype=torch.float32,
            quantization_config=dequantization(base.folder),
            local_files_only=True,
            use_safetensors=True,
        )

    with slow(reporter, f"Proving {spec} with its own weights"), quiet_transformers():
        with torch.random.fork_rng(devices=[]):
            made = _proofs(whole, architecture, reference, lambda: load_model(base, "float32", "none", "cpu"))
        proofs = Proofs(architecture=architecture, identity=key, proofs=made)
    keep(proofs)
    return proofs


def prove_config(whole: Any, architecture: str) -> tuple[Proof, ...]:
    """Return the proofs of a configuration, on its shrunk copy."""
    return _proofs(whole, architecture, lambda: random_model(shrunk(whole), architecture))


def _proofs(
    whole: Any, architecture: str, make: Callable[[], Any], load: Callable[[], Any] | None = None
) -> tuple[Proof, ...]:
    """Return the proofs of the model that ``make`` returns; ``load`` as in `layers_fault`."""
    made: dict[str, Any] = {}

    def layers() -> str | None:
        shape_of(whole, architecture)  # is it a causal decoder?
        made["model"] = make().eval()
        made["shape"] = shape_of(made["model"].config, architecture)
        return layers_fault(made["model"], made["shape"], load=load)

    def on_copy(fault: Callable[[Any, Any, Shape], str | None]) -> Callable[[], str | None]:
        def run() -> str | None:
            if "model" not in made:
                return "the model cannot be made"
            found = _fault(lambda: fault(copy.deepcopy(made["model"]), made["model"], made["shape"]))
            return None if found is None else _layers_without_attention(whole) or found

        return run

    def memory() -> str | None:
        shape = shape_of(whole, architecture)
        share = shape.linear_parameters / shape.parameters
        return f"experts are not linear layers: NF4 would cover {share:.0%} of the weights" if shape.experts else None

    return (
        _proof("layers", layers),
        _proof("packing", on_copy(packing_fault)),
        _proof("cache", on_copy(cache_fault)),
        _proof("adapter", on_copy(adapter_fault)),
        _proof("memory", memory),
    )


def _proof(name: Name, fault: Callable[[], str | None]) -> Proof:
    began = time.monotonic()
    reason = _fault(fault)
    return Proof(name=name, passed=reason is None, reason=reason, seconds=round(time.monotonic() - began, 2))


def _fault(find: Callable[[], str | None]) -> str | None:
    """Return the fault that is found, or the error of a model that cannot be computed in this way."""
    try:
        return find()
    except UserError as error:
        return error.what
    except (MemoryError, OSError):
        raise  # the machine's fault, which another run may not meet
    except Exception as error:  # noqa: BLE001 - returned
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _layers_without_attention(whole: Any) -> str | None:
    """Return the kinds of layers that are no attention; None if all attend."""
    kinds = getattr(whole.get_text_config(), "layer_types", None) or ()
    others = sorted({str(kind) for kind in kinds if kind in _STATEFUL})
    return f"layers of the kind {', '.join(others)} carry a state from one token to the next" if others else None


def layers_fault(
    model: Any,
    shape: Shape,
    change: Callable[[Any], None] = lambda _: None,
    *,
    load: Callable[[], Any] | None = None,
) -> str | None:
    """Return why the loaded model is not the described one; None if it is.

    It is what ``load`` returns; without, the model is saved and loaded as a base is. ``change`` is applied to it.
    """
    ids = torch.tensor([_text(_TEXT, 0)])
    with torch.inference_mode():
        wanted = model(input_ids=ids, use_cache=False).logits
    if load is not None:
        loaded = load()
    else:
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = type(model).from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    drop_towers(loaded)
    change(loaded)
    with torch.inference_mode():
        found = loaded(input_ids=ids, use_cache=False).logits
    if (apart := _apart(found, wanted)) > TOLERANCE:
        return f"the logits of the loaded model differ by {apart:.1%}"
    if (count := sum(weight.numel() for weight in loaded.parameters())) != shape.parameters:
        return f"the loaded model has {count:,} parameters, and its shape {shape.parameters:,}"
    adapted = _with_lora(loaded, shape.names)
    if strange := [name for name in _adapted(adapted) if not str(text_name(name)).startswith("model.layers.")]:
        return f"the linear layer {strange[0]} is no part of model.layers"
    found_count, wanted_count = len(_adapted(adapted)), sum(each.count for each in shape.linears)
    if found_count != wanted_count:
        return f"LoRA adapts {found_count} linear layers of {wanted_count}"
    loss = adapted(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum()
    gradients = _gradients(adapted, loss)
    if untouched := [name for name, gradient in gradients.items() if not gradient.any()]:
        return f"{_layer(untouched[0])} gets no gradient"
    return None


def packing_fault(own: Any, reference: Any, shape: Shape) -> str | None:
    """Return where packed rows of ``own`` differ from separate rows of ``reference``; None if they are equal.

    ``own`` computes packed rows with fused LoRA, ``reference`` each row with transformers' attention and peft's layers.
    """
    rows, labels = _rows()
    drop_towers(own)
    attention.register()
    own.set_attn_implementation(attention.NAME)
    add_token_losses(own)
    targets = (*shape.names, EXPERTS) if shape.walk and shape.walk.experts else shape.names
    packed = _with_lora(own, targets, fused=True).train()
    plain = copy.deepcopy(reference)
    drop_towers(plain)
    plain.set_attn_implementation("eager")
    separate = _with_lora(plain, targets).train()
    wanted = torch.cat([_row_losses(separate, row, label) for row, label in zip(rows, labels, strict=True)])
    wanted_gradients = _gradients(separate, wanted.mean())
    whole = torch.stack([gradient.norm() for gradient in wanted_gradients.values()]).norm()
    for share in (True, False):
        found = batch_token_losses(packed, pack(rows, labels, share=share))
        if (apart := _apart(found.sort().values, wanted.sort().values)) > TOLERANCE:
            return f"the losses of packed rows differ by {apart:.1%}"
        for name, gradient in _gradients(packed, found.mean()).items():
            difference = (gradient - wanted_gradients[name]).norm()
            if not difference <= TOLERANCE * max(wanted_gradients[name].norm(), whole / 10):
                return f"the gradient of {_layer(name)} differs by {difference / wanted_gradients[name].norm():.1%}"
    return None


def cache_fault(own: Any, reference: Any, shape: Shape) -> str | None:
    """Return where decoding of ``own`` differs from passes of ``reference`` over the whole text; None if nowhere."""
    drop_towers(own)
    adapters = {name: _random_loras(own, shape.names, seed) for seed, name in enumerate(("one", "two"), start=1)}
    batch = Batch(own, stop_ids=(), pad_id=0)
    for name, loras in adapters.items():
        batch.add_adapter(name, loras)
    shared = _text(_TEXT, 1)
    prompts = [
        (shared + _text(9, 2), "one"),
        (shared + _text(4, 3), "one"),
        (_text(20, 4), None),
        (_text(_TEXT + 5, 5), "two"),
    ]
    asked = [Request(tuple(ids), adapter, 5, logprobs=5) for ids, adapter in prompts]
    rows = batch.admit(asked[:2], batch.prefix(shared, "one"))
    rows += batch.admit(asked[2:])
    while batch.rows:
        for _, error in batch.step():
            raise error
    for adapter in ("one", None, "two"):
        plain = copy.deepcopy(reference)
        drop_towers(plain)
        plain.set_attn_implementation("eager")
        with torch.no_grad():
            for name, lora in adapters.get(str(adapter), {}).items():
                plain.get_submodule(name).weight.add_(lora.scale * (lora.down @ lora.up).T)
        for row in (row for row in rows if row.request.adapter == adapter):
            if (apart := _largest_gap(row, plain)) > TOLERANCE:
                return f"the log probability of a decoded token differs by {apart:.3f}"
    return None


def adapter_fault(own: Any, reference: Any, shape: Shape) -> str | None:
    """Return where a saved adapter computes something else than before; None if it computes the same everywhere.

    peft reads it over ``reference``, which may have towers, and the engine's dispatch over ``own``.
    """
    ids = torch.tensor([_text(_TEXT, 0)])
    drop_towers(own)
    trained = _with_lora(copy.deepcopy(own), shape.names, outside=outside_text(shape)).eval()
    whole = copy.deepcopy(reference)
    with TemporaryDirectory() as folder, torch.inference_mode():
        wanted = trained(input_ids=ids, use_cache=False).logits
        trained.save_pretrained(folder)
        read: Any = PeftModel.from_pretrained(whole, folder, torch_device="cpu").eval()
        found = {"peft": read(input_ids=ids, use_cache=False).logits}
        found["peft's merge"] = read.merge_and_unload()(input_ids=ids, use_cache=False).logits
        dispatch = LoraDispatch(own, mixed=True)
        dispatch.add("tuned", load_lora_weights(Path(folder), own))
        with dispatch.use_adapters(["tuned"]):
            found["the engine `peft`"] = own(input_ids=ids, use_cache=False).logits
    for reader, logits in found.items():
        if (apart := _apart(logits, wanted)) > TOLERANCE:
            return f"the logits of a saved adapter differ by {apart:.1%} in {reader}"
    return None


def _largest_gap(row: Row, plain: Any) -> float:
    """Return the largest difference of a row's log probabilities from those of a pass over its whole text.

    It is relative to the spread of the logits, which float32 rounds in proportion.
    """
    ids = [*row.request.prompt_ids, *row.ids]
    with torch.inference_mode():
        logits = plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0, len(row.request.prompt_ids) - 1 : -1]
    wanted = logits.float().log_softmax(-1)
    spread = float(logits.float().std())
    gaps = [
        abs(float(wanted[place, token]) - logprob)
        for place, each in enumerate(row.logprobs)
        for token, logprob in each.top
    ]
    return max(gaps) / max(1.0, spread)


def _text(length: int, seed: int) -> list[int]:
    """Return random token ids; the first ones are special."""
    luck = random.Random(seed)
    return [luck.randrange(3, VOCABULARY) for _ in range(length)]


def _rows() -> tuple[list[list[int]], list[list[int]]]:
    """Return rows of which three share a prompt of three windows, and their labels."""
    shared = _text(_TEXT, 1)
    rows = [shared + _text(length, seed) for seed, length in enumerate((30, 7, 9), start=2)] + [_text(_TEXT, 5)]
    trained = (20, 4, 6, 25)
    labels = [[IGNORED] * (len(row) - count) + row[-count:] for row, count in zip(rows, trained, strict=True)]
    return rows, labels


def _row_losses(model: Any, row: list[int], label: list[int]) -> Tensor:
    logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1].float()
    losses = cross_entropy(logits, torch.tensor(label[1:]), reduction="none", ignore_index=IGNORED)
    return losses[[each != IGNORED for each in label[1:]]]


def _with_lora(model: Any, targets: Sequence[str], *, fused: bool = False, outside: str | None = None) -> Any:
    """Return the model with a random adapter, the same for models of the same layers."""
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=_RANK,
        lora_alpha=_ALPHA,
        target_modules=[name for name in targets if name != EXPERTS],
        target_parameters=list(EXPERT_PARAMETERS) if EXPERTS in targets else None,
        exclude_modules=outside,
    )
    if fused:
        use_fused_lora(lora)
    adapted: Any = get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(7)
    for name, weight in adapted.named_parameters():
        if ".lora_" in name:
            # Smaller for wide layers: a model with large random changes amplifies rounding.
            weight.data.normal_(std=min(0.3, 1.5 * weight.shape[-1] ** -0.5), generator=generator)
    return adapted


def _random_loras(model: Any, targets: Sequence[str], seed: int) -> Mapping[str, Lora]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator) * 0.3

    return {
        name: Lora(drawn(part.in_features, _RANK), drawn(_RANK, part.out_features), 2.0)
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.Linear) and name.rpartition(".")[2] in targets
    }


def _adapted(model: Any) -> list[str]:
    """Return the full names of the layers that an adapter changes."""
    return [name for name, part in model.base_model.model.named_modules() if hasattr(part, "lora_A")]


def _gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def _apart(found: Tensor, wanted: Tensor) -> float:
    """Return the relative difference of two tensors; infinity where one is not finite."""
    difference = float((found.detach() - wanted.detach()).norm() / wanted.detach().norm())
    return difference if difference == difference else float("inf")


def _layer(weight: str) -> str:
    """Return the layer of an adapter's weight, as the model names it."""
    return weight.removeprefix("base_model.model.").partition(".lora_")[0]

"""Each row's answer loss, with and without its input: the ranking of suspects among free text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from tunewright.adapters.registry import Adapter, find_adapter, list_adapters, require_compatible, trained_quantization
from tunewright.chat import ChatFormat, Tokens
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import digest, write_json
from tunewright.core.progress import Reporter
from tunewright.data.examples import INSTRUCTIONS, Example, Message, with_calls_numbered
from tunewright.data.review.suspects import AnswerLoss
from tunewright.data.versions import DatasetVersion, Member, short
from tunewright.data.versions.files import read_places
from tunewright.evaluation.folds import out_of_fold
from tunewright.generation.generate import prefill_groups
from tunewright.models.bases import Base
from tunewright.models.loading import context_length, load_model, named, with_adapters
from tunewright.training.rows import encode_members, name_of, trained_spans

_MOST_NAMED = 20
_MOST_LOGITS = 1 << 25  # per chunk: 128 MiB in float32

Name = TypeVar("Name")

Judge = tuple[Adapter | None, Sequence[Member]]
"""An adapter (None: the base without one), and the rows whose answers it judges."""

BASE = "base"
"""The name that stands for the base without an adapter."""


@dataclass(frozen=True)
class Judging:
    """The models that judge the answers of a version's rows by their loss."""

    judges: Sequence[Judge]
    judged_by: str
    """Description of the models in words."""
    digest: str
    """Digest of everything that decides the losses, apart from the rows."""


def judging(
    project: ProjectFolder,
    version: DatasetVersion,
    base: Base,
    chat: ChatFormat,
    reporter: Reporter,
    name: str | None = None,
) -> Judging | None:
    """Choose the models that judge a version's rows, preferably adapters that did not see them.

    The choice is the version's newest complete cross-fit, else the newest adapter that fits base and chat format.
    ``name`` chooses an adapter by name, or with ``BASE`` the base alone. Rows that an adapter was trained on have low
    losses whatever their answers: a warning gives their number. None if no adapter fits.
    """
    folds = out_of_fold(project, version, base, chat) if name is None else []
    judges: list[Judge]
    if folds:
        description = f"{len(folds)} cross-fitted adapters, each row by the one that saw no row of its cluster"
        judges = [*folds]
    elif name == BASE:
        description, judges = f"{base.spec} without an adapter", [(None, version.domain)]
    else:
        adapter = _newest_fit(project, base, chat, reporter) if name is None else find_adapter(project.adapters, name)
        if adapter is None:
            return None
        require_compatible(adapter, base, chat)
        _warn_of_seen(adapter, project.dataset, version, reporter)
        description, judges = adapter.name, [(adapter, version.domain)]
    reporter.say(f"The answers are judged by their loss under {description}.")
    return Judging(judges, description, digest([_decides(project, base, chat, adapter) for adapter, _ in judges]))


def row_losses(
    project: ProjectFolder, base: Base, chat: ChatFormat, judging: Judging, reporter: Reporter
) -> dict[str, AnswerLoss]:
    """Return the loss of each row's last answer, after its conversation and without input, by pair key.

    The working folder keeps the losses of earlier calls. Rows that cannot be judged are reported and have no loss.
    """
    losses: dict[str, AnswerLoss] = {}
    waiting: list[tuple[Adapter | None, dict[str, Tokens], dict[str, Tokens]]] = []
    for adapter, members in judging.judges:
        known = _read(_file(project, base, chat, adapter))
        losses |= {m.key: known[m.key] for m in members if m.key in known}
        rows = answer_rows(chat, [m for m in members if m.key not in known], context_length(base), reporter)
        if rows:
            alone = [_without_input(m) for m in members if m.key in rows]
            waiting.append((adapter, rows, answer_rows(chat, alone, context_length(base), reporter)))
    if not waiting:
        return losses
    # The folds' adapters come from one config: all were trained on a base loaded in the same way.
    adapters = [adapter for adapter, _, _ in waiting if adapter is not None]
    quantization = trained_quantization(adapters) if adapters else project.config.train.quantization
    reporter.say(f"Loading {named(base, quantization)}")
    model: Any = load_model(base, project.config.train.dtype, quantization)
    if adapters:
        model = with_adapters(model, {adapter.name: adapter.folder for adapter in adapters})
    with reporter.task("judging answers", sum(len(rows) for _, rows, _ in waiting), "rows") as task:
        for adapter, rows, alone_rows in waiting:
            if adapter is not None:
                model.set_adapter(adapter.name)
            without: dict[str, float] = {}
            for part in answer_losses(model, alone_rows, chat.tokenizer.pad_token_id):
                without |= part
            found: dict[str, AnswerLoss] = {}
            for part in answer_losses(model, rows, chat.tokenizer.pad_token_id):
                found |= {key: AnswerLoss(loss, without[key]) for key, loss in part.items()}
                task.advance(len(part))
            losses |= found
            file = _file(project, base, chat, adapter)
            write_json(file, {key: asdict(loss) for key, loss in {**_read(file), **found}.items()})
    return losses


def _without_input(member: Member) -> Member:
    """Return the member's answer with a dash in place of its conversation; its instructions stay."""
    instructions = [turn for turn in member.example.messages if turn.role in INSTRUCTIONS]
    turns = (*instructions, Message("user", "-"), member.example.messages[-1])
    return replace(member, example=Example(with_calls_numbered(turns)))


def _newest_fit(project: ProjectFolder, base: Base, chat: ChatFormat, reporter: Reporter) -> Adapter | None:
    for adapter in reversed(list_adapters(project.adapters)):
        try:
            require_compatible(adapter, base, chat)
        except UserError as error:
            reporter.say(f"{adapter.name} does not judge the answers: {error.what}")
            continue
        return adapter
    return None


def _warn_of_seen(adapter: Adapter, dataset: Path, version: DatasetVersion, reporter: Reporter) -> None:
    """Warn of rows whose answers the adapter was trained on."""
    trained_on = adapter.dataset
    without = "`tunewright crossval` makes adapters that judge only rows they have not seen."
    if trained_on is None:
        reporter.warn(
            f"{adapter.name} was imported, and its training data is unknown: its losses are too low for rows "
            f"that it saw. {without}"
        )
        return
    if trained_on != version.digest and not (dataset / "versions" / short(trained_on)).is_dir():
        reporter.warn(
            f"{adapter.name} was trained on dataset version {short(trained_on)}, which is missing: its losses are too "
            f"low for the rows that it saw, which are unknown. {without}"
        )
        return
    places = read_places(dataset, trained_on)
    left_out = {row["key"] for row in adapter.lineage["rendering"]["train"]["left_out"]}
    learnt = {key for key, place in places.items() if place.split == "train"} - left_out
    seen = sum(m.key in learnt for m in version.domain)
    if seen:
        reporter.warn(
            f"{adapter.name} was trained on {seen:,} of the {len(version.domain):,} rows: their losses are too low "
            f"compared with the others, and a wrong answer that it has memorized is not found. {without}"
        )


def answer_rows(chat: ChatFormat, members: Sequence[Member], context: int, reporter: Reporter) -> dict[str, Tokens]:
    """Return the row of each member's last answer, by pair key; a warning names members without a row."""
    judged = [m for m in members if m.example.messages[-1].weight]
    encoded = encode_members(chat, judged, context)
    # If an example has a row for each answer, its last row holds the last answer.
    rows = {m.key: row for m, row in zip(encoded.members, encoded.rows, strict=True)}
    without = [f"{name_of(m)}: its answer has the weight 0" for m in members if not m.example.messages[-1].weight]
    without += encoded.faults
    for long in encoded.too_long:
        rows.pop(long.member.key, None)
        without.append(f"{long}, over the base's context of {context:,}")
    if without:
        listed = "\n".join(f"  {line}" for line in without[:_MOST_NAMED])
        more = f"\n  and {len(without) - _MOST_NAMED:,} more" if len(without) > _MOST_NAMED else ""
        reporter.warn(f"{len(without):,} rows cannot be judged by their loss:\n{listed}{more}")
    return rows


def answer_losses(model: Any, rows: Mapping[Name, Tokens], pad_id: int) -> Iterator[dict[Name, float]]:
    """Yield the mean negative log-likelihood per token of each row's last answer, one batch at a time.

    The end token is included.
    """
    import torch

    for batch in judged_batches(rows, pad_id):
        with torch.inference_mode():
            states = batch.states(model)
            targets, (logits, step) = batch.targets.to(states.device), head_of(model)
            parts = zip(states.split(step), targets.split(step), strict=True)
            losses = torch.cat(
                [torch.nn.functional.cross_entropy(logits(s), t, reduction="none") for s, t in parts]
            ).cpu()
        yield batch.means(losses)


def head_of(model: Any) -> tuple[Callable[[Any], Any], int]:
    """Return what makes logits in float32 of hidden states, and the number of states that it may take at once."""
    from tunewright.training.packing.fused_loss import Head

    whole = whole_model(model)
    output, head = whole.get_output_embeddings(), Head.of(whole)
    return lambda states: head.logits(output(states)), max(1, _MOST_LOGITS // int(output.weight.shape[0]))


def judged_batches(rows: Mapping[Name, Tokens], pad_id: int) -> Iterator[JudgedBatch[Name]]:
    """Yield batches of similar length, padded on the right, which a causal model's earlier tokens do not see."""
    import torch

    names = list(rows)
    for group in prefill_groups([len(rows[name].ids) for name in names]):
        batch = [rows[names[place]] for place in group]
        longest = max(len(row.ids) for row in batch)
        ids = torch.full((len(batch), longest), pad_id)
        attended = torch.zeros((len(batch), longest), dtype=torch.long)
        judged = torch.zeros((len(batch), longest), dtype=torch.bool)
        for place, row in enumerate(batch):
            start, end = trained_spans(row)[-1]
            ids[place, : len(row.ids)] = torch.tensor(row.ids)
            attended[place, : len(row.ids)] = 1
            judged[place, start:end] = True
        yield JudgedBatch([names[place] for place in group], ids, attended, judged)


@dataclass(frozen=True)
class JudgedBatch(Generic[Name]):
    """Rows that pass through a model together; the last answer of each is judged."""

    names: list[Name]
    ids: Any
    """[rows, longest], like the next two fields."""
    attended: Any
    judged: Any

    @property
    def targets(self) -> Any:
        """The judged tokens of all rows, concatenated, [places]."""
        # The logits at a position predict the next token; no answer begins a text.
        return self.ids[:, 1:][self.judged[:, 1:]]

    def states(self, model: Any) -> Any:
        """Return the hidden states that predict each judged token, [places, width].

        Only these states go through the head: with a long prompt and a large vocabulary, the full logits would not fit.
        """
        hidden = (
            whole_model(model)
            .base_model(
                input_ids=self.ids.to(model.device), attention_mask=self.attended.to(model.device), use_cache=False
            )
            .last_hidden_state
        )
        return hidden[:, :-1][self.judged[:, 1:].to(model.device)]

    def means(self, values: Any) -> dict[Name, float]:
        """Return each row's mean of values [places]."""
        parts = values.split(self.judged.sum(dim=1).tolist())
        return dict(zip(self.names, [float(part.double().mean()) for part in parts], strict=True))


def whole_model(model: Any) -> Any:
    """Return the base under a PeftModel with its adapters, or any other model itself."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def _decides(project: ProjectFolder, base: Base, chat: ChatFormat, adapter: Adapter | None) -> dict[str, Any]:
    train = project.config.train
    how = {"template": chat.digest, "dtype": train.dtype, "losses": "given and alone"}
    if adapter is not None:
        return {"adapter": adapter.digest, **how}
    return {"base": base.digest, "quantization": train.quantization, **how}


def _file(project: ProjectFolder, base: Base, chat: ChatFormat, adapter: Adapter | None) -> Path:
    return project.work / "losses" / f"{digest(_decides(project, base, chat, adapter))[:16]}.json"


def _read(file: Path) -> dict[str, AnswerLoss]:
    if not file.exists():
        return {}
    return {key: AnswerLoss(**loss) for key, loss in json.loads(file.read_text(encoding="utf-8")).items()}

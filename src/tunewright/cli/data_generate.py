"""``data generate`` and ``from-documents``: rows that a model writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunewright.cli.app import command, refuse_unused
from tunewright.cli.console import RESUMES, Session
from tunewright.cli.data import data_app
from tunewright.core.text import count_of
from tunewright.render.blocks import Block, Lead, table, words

if TYPE_CHECKING:
    from tunewright.render.terminal import Part
    from tunewright.synthesis.generate import GenerateEstimate, GenerateResult
    from tunewright.synthesis.questions import DocumentsResult

_NAMED = 3

Out = Annotated[
    Path | None,
    typer.Option(help="File to write.", show_default="generated/, named after the first file"),
]


@command(data_app, "generate", example="tunewright data generate inputs.jsonl --estimate", kept=RESUMES)
def data_generate(
    run: Session,
    files: Annotated[list[Path], typer.Argument(help="Files of inputs, in any format of pairs, without answers.")],
    out: Out = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Estimate calls, tokens and cost, and send nothing.")
    ] = False,
) -> None:
    """Have the config's teacher write ideal outputs for inputs, and keep those that its samples agree on.

    The file is for `data add`. Its rows are only trained on until `data review` accepts them, and none resembles a
    held-out input. Replies are stored, so a stopped run resumes and pays for nothing twice.
    """
    if estimate:
        refuse_unused("--estimate", {"--out": out is not None})
        expected = run.project.data.estimate_generate(files)
        run.show(expected, estimate_text(expected), *left_out_tables(expected.left_out))
        return
    result = run.project.data.generate(files, out)
    judged = result.judged
    price = "" if judged is None or judged.cost is None else f", cost {judged.cost:.4f}"
    lines = [] if judged is None else [f"{judged.calls:,} replies of the judge, its test included{price}"]
    run.show(result.as_dict(), *result_parts(result, count_of(result.inputs, "input")), *lines)


@command(data_app, "from-documents", example="tunewright data from-documents manual.pdf faq.md", kept=RESUMES)
def data_from_documents(
    run: Session,
    files: Annotated[list[Path], typer.Argument(help="PDF, DOCX, HTML, Markdown or text documents.")],
    out: Out = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Estimate calls, tokens and cost, and send nothing.")
    ] = False,
) -> None:
    """Have the config's teacher write questions and answers from documents, each with the quote that proves it.

    A row cites document, page or heading, and characters; an answer whose quote is not in the passage is left out. Rows
    of one document stay on one side of the split. The file is for `data add`, as that of `data generate`.
    """
    if estimate:
        refuse_unused("--estimate", {"--out": out is not None})
        expected = run.project.data.estimate_from_documents(files)
        run.show(expected, estimate_text(expected, "part"), *left_out_tables(expected.left_out, "Left out"))
        return
    result = run.project.data.from_documents(files, out)
    counts = f"{count_of(result.passages, 'passage')} of {count_of(result.documents, 'document')}"
    run.show(result.as_dict(), *result_parts(result, counts, "Left out"))


@command(data_app, "generated-effect", example="tunewright data generated-effect 0d7c9a2b41e0 5b21f0c1aa37")
def data_generated_effect(
    run: Session,
    evaluation: Annotated[Path, typer.Argument(help="Evaluation of the adapter trained with the generated rows.")],
    without: Annotated[Path, typer.Argument(help="Evaluation of an adapter trained with train.generated: false.")],
) -> None:
    """Compare two evaluated adapters, with and without the generated rows, on the test items of people.

    The answers are those that the evaluations stored. The finding is added to the first evaluation and its report.
    """
    effect = run.project.data.generated_effect(evaluation, without)
    run.show(effect.model_dump(mode="json"), effect.line)


def estimate_text(estimate: GenerateEstimate, unit: str = "input") -> str:
    """Return the calls, tokens and cost of a run."""
    from tunewright.model_io.client import limits_text

    calls = estimate.calls
    asked = estimate.inputs - sum(map(len, estimate.left_out.values()))
    known = f", {calls.known:,} of them answered already" if calls.known else ""
    replies, cost = limits_text(calls.most_completion_tokens, calls.most_cost)
    return (
        f"{calls.calls:,} calls for {asked:,} of {count_of(estimate.inputs, unit)}{known}\n"
        f"Still to send: about {calls.prompt_tokens:,} prompt tokens, {replies}\n"
        f"Cost: {cost}"
        + (f"\nBesides, at most {estimate.judge_calls:,} calls of the judge" if estimate.judge_calls else "")
    )


def result_parts(
    result: GenerateResult | DocumentsResult, source: str, title: str = "Inputs without a row"
) -> list[Part]:
    """Return the counts of a run, the reasons why something got no row, and the next command."""
    used = result.used
    cost = "" if used.cost is None else f", cost {used.cost:.4f}"
    lines = [
        f"{count_of(result.rows, 'row')} from {source}; {count_of(used.calls, 'answer')} of "
        f"the teacher, {used.prompt_tokens:,} prompt and {used.completion_tokens:,} reply tokens{cost}"
    ]
    end = (
        f"Wrote {result.out}. Add the rows with `tunewright data add {result.out}`, then accept them with "
        "`tunewright data review`: until then they are only trained on."
        if result.out is not None
        else "No row was kept, and no file was written."
    )
    return [*lines, *left_out_tables(result.left_out, title), end]


def left_out_tables(left_out: Mapping[str, Sequence[str]], title: str = "Inputs without a row") -> tuple[Block, ...]:
    """Return the reasons why inputs get no row, with counts and the first places; empty without reasons."""
    if not left_out:
        return ()
    rows = []
    for reason, places in left_out.items():
        more = ", …" if len(places) > _NAMED else ""
        rows.append((reason, f"{len(places):,}", ", ".join(places[:_NAMED]) + more))
    return (Lead(title), table(title, ("Reason", "Count", *words("Such as")), rows))

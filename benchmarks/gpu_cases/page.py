"""The results as tables: one row per headline, on the terminal and in docs/gpu.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_cases.plan import MODELS, cases

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
LAYERWISE = Path(__file__).parents[1] / "results" / "layerwise_8b.json"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
NOT_RUN = "not yet run"

Cases = Mapping[str, dict[str, Any]]
"""The states of a results file by case."""


@dataclass(frozen=True)
class Headline:
    """One line of the table."""

    title: str
    needs: tuple[str, ...]
    """Cases that have to be done for it."""
    text: Callable[[Cases], str]
    others: tuple[str, ...] = ()
    """Cases of which one is enough."""


@dataclass(frozen=True)
class Row:
    """A headline and its measurements."""

    title: str
    measured: str
    outcome: str
    """Whether the bars were met, or why there is nothing."""


RIVALS = {
    "unsloth": "unsloth",
    "tunewright-liger": "itself with Liger's kernels",
    "tunewright-recompute-all": "itself with every layer recomputed",
}
"""What a model's training is compared with, besides trl."""


def headlines() -> list[Headline]:
    """Every headline in the order of the cases."""
    names = {case.name for case in cases()}
    listed = [
        Headline("The card itself: bfloat16 matrix product, copy", ("ceilings",), _ceilings),
        Headline("Attention over packed rows against float64, with gradients", ("attention",), _attention),
        Headline("LoRA gradients of a packed batch against rows one by one", ("parity",), _parity),
        Headline("The same over NF4 layers", ("parity-nf4",), lambda cases: _parity(cases, "parity-nf4")),
        Headline("NF4 bits made on the card and on the processor", ("nf4-bits",), _nf4),
        Headline("20 steps in bfloat16 against the same in float32", ("float32",), _float32),
    ]
    for model in MODELS:
        name = (
            model.upper().replace("-LORA", " LoRA").replace("-QLORA", " QLoRA").replace("-2048", ", 2 x 2,048 tokens")
        )
        ours, plain, free = (f"{model}/{side}" for side in ("tunewright", "trl-plain", "trl-padding-free"))
        listed += [
            Headline(f"{name}: speed", (ours,), lambda cases, ours=ours: _speed(cases, ours)),  # type: ignore[misc]
            Headline(
                f"{name}: against the faster of trl's plain and padding-free",
                (ours,),
                lambda cases, ours=ours, trl=(plain, free): _ratio(cases, ours, trl),  # type: ignore[misc]
                (plain, free),
            ),
            Headline(f"{name}: memory", (ours,), lambda cases, ours=ours: _memory(cases, ours)),  # type: ignore[misc]
        ]
        for other, what in RIVALS.items():
            against = f"{model}/{other}"
            if against not in names:
                continue
            listed.append(
                Headline(
                    f"{name}: against {what}",
                    (ours, against),
                    lambda cases, ours=ours, against=against: _ratio(cases, ours, (against,)),  # type: ignore[misc]
                )
            )
    return [
        *listed,
        Headline(
            "8B LoRA, rows of varied lengths: expandable segments",
            ("segments/expandable", "segments/fixed"),
            _segments,
        ),
        Headline("8B LoRA: the largest micro-batch of `tunewright estimate-memory`", ("largest/8b-lora",), _largest),
        Headline("8B LoRA: 10% more rows than that", ("largest/8b-lora-and-10%",), _beyond),
        Headline("Training rows halved when memory runs out", ("out-of-memory/training",), _halved),
        Headline("Dev answers halved when memory runs out", ("out-of-memory/dev-answers",), _halved_answers),
        Headline("8B decoding, tokens per second", ("decode",), _decode),
        Headline("2B on disk: `train`, killed, resumed, `evaluate`, `serve`", ("command-line",), _command_line),
        Headline("FSDP in two processes on one card against one process", ("fsdp",), _fsdp),
        Headline("vLLM with more adapters than slots: isolation test", ("vllm-adapters",), _vllm_adapters),
    ]


def rows_of(document: Mapping[str, Any]) -> list[Row]:
    """Return a row for every headline, with its measurement in this document."""
    cases: Cases = document["cases"]
    rows = []
    for headline in headlines():
        states = [cases[name] for name in headline.needs if name in cases]
        others = [cases[name] for name in headline.others if name in cases]
        done = [state for state in others if state["state"] == "done"]
        states += done or others[:1]
        unfinished = next((state for state in states if state["state"] != "done"), None)
        if unfinished is not None:
            rows.append(Row(headline.title, "", _outcome(unfinished)))
        elif len(states) < len(headline.needs) + bool(headline.others):
            rows.append(Row(headline.title, "", NOT_RUN))
        else:
            bars = [each["passed"] for state in states for each in state["measurements"] if each["passed"] is not None]
            outcome = ("met" if all(bars) else "MISSED") if bars else "measured"
            rows.append(Row(headline.title, headline.text(cases), outcome))
    return rows


def _outcome(state: Mapping[str, Any]) -> str:
    return NOT_RUN if state["state"] == "cut" else f"{state['state']}: {state['why'].splitlines()[0]}"


def table_text(rows: Iterable[Row]) -> str:
    """Return the rows as columns for a terminal."""
    listed = [("what", "outcome", "measured"), *((row.title, row.outcome, row.measured) for row in rows)]
    widths = [max(len(row[column]) for row in listed) for column in range(2)]
    return "\n".join(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}".rstrip() for row in listed)


def write_page(results: Path, page: Path = PAGE) -> None:
    """Write the table of the page from every results file; of each headline the newest that has it."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest, f"{page} has no {BEGIN}"
    page.write_text(f"{before}{BEGIN}\n{page_table(results)}\n{END}{after}", encoding="utf-8")


def page_table(results: Path) -> str:
    """Return the Markdown table of the page."""
    documents = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(results.glob("*.json"))]
    lines = ["| what | measured | where |", "| --- | --- | --- |"]
    for place, headline in enumerate(headlines()):
        dated = [(_date(document, headline), document["card"], rows_of(document)[place]) for document in documents]
        known = [each for each in dated if each[2].outcome != NOT_RUN]
        if not known:
            lines.append(f"| {headline.title} | | {NOT_RUN} |")
            continue
        date, card, row = max(known, key=lambda each: each[0])
        outcome = "" if row.outcome in ("met", "measured") else f" **{row.outcome}**"
        lines.append(f"| {row.title} | {row.measured}{outcome} | measured on {card}, {date} |")
    if LAYERWISE.exists():
        lines.append(layerwise_line(json.loads(LAYERWISE.read_text(encoding="utf-8"))))
    return "\n".join(lines)


def layerwise_line(measured: Mapping[str, Any]) -> str:
    """Return the line of benchmarks/layerwise_8b.py."""
    return (
        f"| Without a card: {measured['steps']} training steps of 8B shape in NF4 on the processor "
        f"| peak {_gb(measured['peak_bytes'])}, estimated {_gb(measured['predicted_bytes'])} "
        f"({measured['predicted_bytes'] / measured['peak_bytes'] - 1:+.1%}) "
        f"| measured on {measured['machine']}, {measured['date']} |"
    )


def _date(document: Mapping[str, Any], headline: Headline) -> str:
    return max((document["cases"][name]["date"] for name in headline.needs if name in document["cases"]), default="")


def _values(cases: Cases, case: str) -> dict[str, dict[str, Any]]:
    """Return the measurements of a case by name."""
    return {each["name"]: each["values"] for each in cases[case]["measurements"]}


def _training(cases: Cases, case: str) -> dict[str, Any]:
    return _values(cases, case)["training"]


def _ceilings(cases: Cases) -> str:
    found = _values(cases, "ceilings")
    product = found["matrix product"]
    share = "" if product["of_peak"] is None else f" ({product['of_peak']:.0%} of its data sheet's)"
    return f"{product['tflops']:,.3g} TFLOP/s{share}, {found['copy']['gb_s']:,.0f} GB/s"


def _attention(cases: Cases) -> str:
    parts = ("output", "query", "key", "value")
    worst = max(
        values[f"{part}_error"] / values[f"sdpa_{part}_error"]
        for values in _values(cases, "attention").values()
        for part in parts
    )
    return f"error at most {worst:.2f} times that of bfloat16 SDPA row by row"


def _parity(cases: Cases, case: str = "parity") -> str:
    most = max(_values(cases, case).values(), key=lambda values: int(values["rows"]))
    return (
        f"{most['rows']} rows: {most['gradient_error']:.2%} from float32, "
        f"one by one {most['one_by_one_gradient_error']:.2%}"
    )


def _nf4(cases: Cases) -> str:
    found = _values(cases, "nf4-bits")["bytes that differ"]
    different = found["weights"] + found["scales"] + found["offsets"]
    return f"{found['matrices']} matrices of {found['size']}: {different or 'no'} bytes differ"


def _float32(cases: Cases) -> str:
    apart = max(values["largest_relative_difference"] for values in _values(cases, "float32").values())
    return f"losses differ by at most {apart:.2%}"


def _speed(cases: Cases, ours: str) -> str:
    found = _training(cases, ours)
    mfu = "" if found["mfu"] is None else f", MFU {found['mfu']:.0%}"
    syncs = "" if found["host_syncs"] is None else f", {found['host_syncs']} host syncs a step"
    return (
        f"{found['row_tokens_s']:,.0f} row tokens/s, {found['computed_tokens_s']:,.0f} computed{mfu}, "
        f"loss {found['first_loss']:.3f} to {found['last_loss']:.3f}{syncs}"
    )


def _ratio(cases: Cases, ours: str, others: tuple[str, ...]) -> str:
    mine = _training(cases, ours)
    done = [case for case in others if case in cases and cases[case]["state"] == "done"]
    best = max(done, key=lambda case: float(_training(cases, case)["row_tokens_s"]))
    theirs = _training(cases, best)
    memory = ""
    if theirs["allocated_bytes"] is not None:
        memory = f"; {_gb(mine['allocated_bytes'])} against {_gb(theirs['allocated_bytes'])}"
    return (
        f"{mine['row_tokens_s'] / theirs['row_tokens_s']:.2f} times as fast as {best.split('/')[1]} "
        f"({theirs['row_tokens_s']:,.0f} tokens/s); last loss {mine['last_loss']:.3f} "
        f"against {theirs['last_loss']:.3f}{memory}"
    )


def _memory(cases: Cases, ours: str) -> str:
    found = {**_training(cases, ours), **_values(cases, ours)["memory"]}
    if found["allocated_bytes"] is None:
        return f"predicted {_gb(found['predicted_bytes'])}; measured on a card only"
    off = found["predicted_bytes"] / found["allocated_bytes"] - 1
    return (
        f"predicted {_gb(found['predicted_bytes'])}, allocated {_gb(found['allocated_bytes'])} ({off:+.1%}), "
        f"reserved {_gb(found['reserved_bytes'])} of {_gb(found['predicted_reserved_bytes'])}"
    )


def _segments(cases: Cases) -> str:
    growing, fixed = (_training(cases, f"segments/{kind}") for kind in ("expandable", "fixed"))
    if growing["reserved_bytes"] is None:
        return "measured on a card only"
    return (
        f"reserved {_gb(growing['reserved_bytes'])} with, {_gb(fixed['reserved_bytes'])} without, "
        f"of {_gb(growing['allocated_bytes'])} allocated"
    )


def _largest(cases: Cases) -> str:
    found = _values(cases, "largest/8b-lora")["one micro-batch"]
    return f"{found['rows']} rows of {found['length']} tokens: {found['rows_at_once']} at once"


def _beyond(cases: Cases) -> str:
    found = _values(cases, "largest/8b-lora-and-10%")["one micro-batch"]
    fits = found["rows_at_once"] == found["rows"]
    return f"{found['rows']} rows {'fit too' if fits else 'do not fit'}: {found['rows_at_once']} at once"


def _halved(cases: Cases) -> str:
    found = _values(cases, "out-of-memory/training")["rows halved"]
    return f"{found['rows']} rows become {found['rows_halved']} in {_gb(found['bytes_allowed'])}, with the same losses"


def _halved_answers(cases: Cases) -> str:
    found = _values(cases, "out-of-memory/dev-answers")["every row answered"]
    return f"{found['rows']} rows become {found['rows_halved']}; {found['equal_answers']} answers are equal"


def _decode(cases: Cases) -> str:
    found = list(_values(cases, "decode").values())
    texts = []
    for how, top_p in (("greedy", None), ("top_p 0.9", 0.9)):
        alone = [values for values in found if values["adapters"] == 1 and values["top_p"] == top_p]
        speeds = " / ".join(f"{values['tokens_s']:,.0f}" for values in alone)
        texts.append(f"{how} {speeds} at {' / '.join(str(values['rows']) for values in alone)} rows")
    mixed = next(values for values in found if values["adapters"] > 1)
    texts.append(f"{mixed['tokens_s']:,.0f} at {mixed['rows']} rows of {mixed['adapters']} adapters")
    return "; ".join(texts)


def _command_line(cases: Cases) -> str:
    found = _values(cases, "command-line")
    return (
        f"killed after step {found['train, killed']['checkpoint']}, resumed from it, "
        f"{len(found['evaluate']['arms'])} arms evaluated, {found['serve']['answered']} models served"
    )


def _fsdp(cases: Cases) -> str:
    found = _values(cases, "fsdp")["two processes"]
    return (
        f"losses differ by at most {found['largest_relative_difference']:.2%}, "
        f"a process holds {_gb(found['most_held_bytes'])} of {_gb(found['whole_bytes'])}"
    )


def _vllm_adapters(cases: Cases) -> str:
    found = _values(cases, "vllm-adapters")["isolation"]
    slots = "" if found["slots"] is None else f" in {found['slots']} slots"
    return (
        f"{found['engine']}, {found['adapters']} adapters{slots}: "
        f"{found['requests']} requests, {found['wrong'] or 'no'} wrong answers"
    )


def _gb(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:.3g} GB"

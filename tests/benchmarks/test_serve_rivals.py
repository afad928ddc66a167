"""benchmarks/serve_rivals.py: its arithmetic by hand, and two servers at toy size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import tunewright
from command_line import tiny_project
from tunewright.core.progress import LogReporter

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from arrivals import Answer  # noqa: E402
from serve_rivals import (  # noqa: E402
    BEGIN,
    END,
    LONG_EVERY,
    Found,
    Measured,
    draw,
    fill_page,
    is_long,
    ratios,
    results_of,
    same_beginnings,
    summary,
    table,
)


def answers(first: float, text: str = "Mobile Cir. Ct.") -> list[Answer]:
    """Four answers of two tokens in ten seconds; ``first`` is the wait for the first token of each."""
    return [
        Answer(0, due, (due + first, due + first + 0.1), due + first + 0.1, text, counted=2)
        for due in (0.0, 1.0, 5.0, 9.0)
    ]


def measured(rate: float, first: float, text: str = "Mobile Cir. Ct.") -> Measured:
    """The results of two rounds, the second of which is half as fast."""
    one = Measured(memory=[100_000_000, 300_000_000], start=[3.0, 5.0], cold=[0.5, 0.7])
    for share in (1.0, 0.5):
        one.full.append({"tokens_per_s": rate * share, "tokens_per_cpu_s": rate, "seconds": 8 / rate})
        one.answers.append(answers(first, text))
        one.long.append([is_long(number) for number in range(4)])
    return one


@pytest.fixture
def found() -> Found:
    """Two servers with one and eight adapters."""
    return {
        "embedded": {1: measured(100, 0.5), 8: measured(80, 0.5)},
        "vllm": {1: measured(40, 2.5, "Mob. Circ. Ct."), 8: measured(20, 2.5)},
    }


def results(found: Found) -> dict[str, object]:
    """As the script writes them."""
    return {**results_of(found), "missing": {"transformers": "fastapi is not installed"}}


def test_summary_counts_answers_in_time(found: Found) -> None:
    quick, slow = summary(found["embedded"][1]), summary(found["vllm"][1])
    assert (quick["requests"], quick["good_share"], quick["tokens_per_s"]) == (8, 1.0, 75)
    assert quick["goodput_per_s"] == pytest.approx(4 / 9.6)
    assert (slow["good_share"], slow["goodput_per_s"]) == (0.0, 0.0)
    assert quick["first_p50"] == pytest.approx(0.5)
    assert quick["memory_bytes"] == 300_000_000
    assert [is_long(number) for number in range(LONG_EVERY)].count(True) == 1


def test_ratios_compare_rounds_of_the_most_and_of_one_adapter(found: Found) -> None:
    compared = ratios(found)
    assert compared["embedded / vllm, most adapters"]["by_round"] == [4.0, 4.0]
    assert compared["embedded, most adapters / one"]["ratio"] == pytest.approx(0.8)
    assert not any("llamacpp" in title for title in compared)


def test_same_beginnings_are_shares_of_equal_answers(found: Found) -> None:
    shares = same_beginnings(found)
    assert shares["embedded"] == {"1": 1.0, "8": 1.0}
    assert shares["vllm"] == {"1": 0.0, "8": 1.0}


def test_table_names_each_server_and_the_reason_for_a_missing_one(found: Found) -> None:
    lines = table(results(found)).splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:6]] == [
        ["| tunewright, embedded engine", "1"],
        ["| tunewright, embedded engine", "8"],
        ["| vLLM", "1"],
        ["| vLLM", "8"],
    ]
    assert "| 75.0 (50.0 to 100.0) | 100.0 | 100% |" in lines[2]
    assert "- transformers serve was not measured: fastapi is not installed" in lines


def test_page_keeps_its_text_around_the_results(found: Found, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{BEGIN}\nof another run\n{END}\n\nafter\n")
    fill_page(page, table(results(found)))
    text = page.read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n| server |")
    assert text.endswith(f"{END}\n\nafter\n")
    assert "of another run" not in text


def test_plot_has_each_server(found: Found, tmp_path: Path) -> None:
    draw(results(found), tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert "tunewright, embedded engine" in text
    assert "8 adapters" in text


@pytest.mark.slow
def test_servers_answer_the_same_requests_at_toy_size(tmp_path: Path, small_base: Path) -> None:
    folder = tiny_project(tmp_path / "project", small_base)
    project = tunewright.open(folder, LogReporter())
    project.data.add([folder / "pairs.jsonl"])
    project.train()
    command = [
        sys.executable,
        str(BENCHMARKS / "serve_rivals.py"),
        str(folder),
        "--quick",
        "--only",
        "embedded",
        "llamacpp",
    ]
    ran = subprocess.run(
        [*command, "--long-characters", "60", "--threads", "1"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    rows = [line.split(" | ") for line in ran.stdout.splitlines() if line.startswith("| tune") or " llama" in line[:9]]
    assert [row[1] for row in rows[:4]] == ["1", "4", "1", "4"]
    assert "embedded / llamacpp, one adapter" in ran.stdout

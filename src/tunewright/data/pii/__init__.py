"""Secrets and personal data in examples: found by precise patterns, told without their values, replaced on request."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter, Reporter
from tunewright.data.examples import Example, Role
from tunewright.data.pii.findings import Finder, Finding
from tunewright.data.pii.names import NAME_LABELS
from tunewright.data.pii.personal_patterns import PERSONAL
from tunewright.data.pii.secret_patterns import SECRETS, Category, Pattern

_MOST_SECRETS = 50
_MOST_PERSONAL = 10
_STEP = 1000  # rows between two signs of progress

PATTERNS: tuple[Pattern, ...] = SECRETS + PERSONAL
# By the names that data.allow and placeholders have.
LABELS: dict[str, str] = {pattern.kind: pattern.label for pattern in PATTERNS} | NAME_LABELS

# A text that has none of these holds nothing that any pattern finds: most texts are done after one search.
_NUMBERS = (
    r"\d(?:[ .()/-]{0,3}\d){6}",  # cards, phone and social security numbers
    r"[A-Z]{2}\d\d[ -]?[A-Z0-9]{4}",  # IBANs
    r"\d\.\d{1,3}\.\d",  # IPv4
    r"[23][0-9A-Fa-f]{3}:",  # IPv6
)
_ANY_CUE = re.compile("|".join([*_NUMBERS, *sorted({re.escape(cue) for p in SECRETS for cue in p.cues}), "@"]))
_CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_PLACEHOLDER = re.compile(rf"<({'|'.join(kind.upper() for kind in LABELS)})_(\d+)>")


@dataclass(frozen=True)
class Place:
    """A finding and where it stands: the row (file:line), the turn's index in ``messages`` and its role."""

    row: str
    message: int
    role: Role
    finding: Finding

    def __str__(self) -> str:
        found = self.finding
        return f"{self.row}: {LABELS[found.kind]} in messages[{self.message}] ({self.role}), {found.start}-{found.end}"


@dataclass(frozen=True)
class Scan:
    """All that was found in some rows, in their order; the kinds in ``allow`` are let through."""

    rows: int
    places: tuple[Place, ...]
    allow: frozenset[str] = frozenset()

    def of(self, category: Category) -> tuple[Place, ...]:
        """The findings that block ("secret") or those that are only told ("personal"), without what is let through."""
        wanted = (place for place in self.places if place.finding.kind not in self.allow)
        return tuple(place for place in wanted if place.finding.category == category)

    @property
    def counts(self) -> dict[str, int]:
        """Findings by kind, the most frequent first."""
        return dict(Counter(place.finding.kind for place in self.places).most_common())

    def as_dict(self) -> dict[str, Any]:
        """Return the scan as ``--json`` prints it."""
        places = [asdict(place) for place in self.places]
        return {"rows": self.rows, "counts": self.counts, "places": places, "allow": sorted(self.allow)}


def find(text: str, also: Finder | None = None) -> list[Finding]:
    """The secrets and personal data in a text, by position; no two overlap: the more specific wins, then the longer.

    Of what ``also`` finds, the parts count that are neither found by a pattern nor placeholders.
    """
    found = _find_by_patterns(text)
    return found if also is None else sorted([*found, *_rest(text, found, also(text))], key=lambda each: each.start)


def find_in_value(name: str, text: str, also: Finder | None = None) -> list[Finding]:
    """Return the secrets and personal data in a value, by position in it, ``name`` being the key or column it is under.

    Some secrets are recognised only after their name, such as a password. ``userPassword`` counts as ``user_Password``.
    """
    found = find(text, also)
    if not name:
        return found
    head = f"{_CAMEL_CASE.sub('_', name)}: "
    kinds = {finding.kind for finding in found}
    # Secrets alone: as personal data, a date under "call" would be a phone number.
    named = [f for f in _find_by_patterns(head + text) if f.category == "secret" and f.start >= len(head)]
    named = [f for f in named if f.kind not in kinds]
    return found + [replace(f, start=f.start - len(head), end=f.end - len(head)) for f in named]


def _rest(text: str, found: Sequence[Finding], more: Sequence[Finding]) -> list[Finding]:
    """The parts of ``more`` outside of what was found and of placeholders, without white space and signs around them.

    A model takes "Maria maria@uni-bonn.de" for one name; the name has to go even so.
    """
    taken = bytearray(len(text))
    spans = [(each.start, each.end) for each in found] + [match.span() for match in _PLACEHOLDER.finditer(text)]
    for start, end in spans:
        taken[start:end] = b"\1" * (end - start)
    rest = []
    for finding in sorted(more, key=lambda each: (each.start - each.end, each.start)):
        for run in re.finditer(rb"\0+", taken[finding.start : finding.end]):
            part = re.search(r"\w(?:.*\w)?", text[finding.start + run.start() : finding.start + run.end()], re.DOTALL)
            if part is not None:
                start = finding.start + run.start() + part.start()
                rest.append(replace(finding, start=start, end=start + len(part[0])))
                taken[start : start + len(part[0])] = b"\1" * len(part[0])
    return rest


def _find_by_patterns(text: str) -> list[Finding]:
    if _ANY_CUE.search(text) is None:
        return []
    found: list[tuple[int, Finding]] = []
    for pattern in PATTERNS:
        if pattern.cues and not any(cue in text for cue in pattern.cues):
            continue
        group = "value" if "value" in pattern.regex.groupindex else 0
        for match in pattern.regex.finditer(text):
            if pattern.check(match):
                found.append((pattern.rank, Finding(pattern.kind, pattern.category, *match.span(group))))
    found.sort(key=lambda ranked: (ranked[0], ranked[1].start - ranked[1].end, ranked[1].start))
    taken = bytearray(len(text))
    kept = []
    for _, finding in found:
        if not any(taken[finding.start : finding.end]):
            taken[finding.start : finding.end] = b"\1" * (finding.end - finding.start)
            kept.append(finding)
    return sorted(kept, key=lambda finding: finding.start)


def scan(
    rows: Sequence[tuple[str, Example]],
    reporter: Reporter | None = None,
    *,
    also: Finder | None = None,
    allow: Collection[str] = (),
) -> Scan:
    """Search all turns of examples, each given with its place (file:line).

    Args:
        also: finds more than the patterns do, such as names (``open_presidio``).
        allow: kinds that are meant to be there: found and counted, but neither a secret nor personal data of the scan.
    """
    places: list[Place] = []
    system_turns: dict[str, list[Finding]] = {}  # rows of a domain share them
    with (reporter or LogReporter()).task("looking for secrets", len(rows), "examples") as task:
        for number, (row, example) in enumerate(rows, start=1):
            for index, message in enumerate(example.messages):
                findings = system_turns.get(message.content)
                if findings is None:
                    findings = find(message.content, also)
                    if message.role == "system":
                        system_turns[message.content] = findings
                places += [Place(row, index, message.role, finding) for finding in findings]
            if number % _STEP == 0:
                task.advance(_STEP)
        task.advance(len(rows) % _STEP)
    return Scan(len(rows), tuple(places), frozenset(allow))


def redact(
    example: Example, *, also: Finder | None = None, allow: Collection[str] = ()
) -> tuple[Example, dict[str, int]]:
    """The example with a placeholder such as ``<EMAIL_1>`` for each finding, and how many were replaced, by kind.

    A value has the same placeholder in all turns, however it is spaced, and is replaced also in a turn where it would
    not be found by itself. Redacting again changes nothing.

    Args:
        also, allow: as for ``scan``; what is let through is not replaced.
    """
    texts = [message.content for message in example.messages]
    names: dict[tuple[str, str], str] = {}
    last = Counter[str]()  # the highest number of each kind's placeholders
    for text in texts:
        for kind, number in _PLACEHOLDER.findall(text):
            last[kind.lower()] = max(last[kind.lower()], int(number))
    counts = Counter[str]()
    # Again, because what stood beside a value may be found only when the value is gone.
    while True:
        found = [find(text, also) for text in texts]
        if all(finding.kind in allow for findings in found for finding in findings):
            break
        for text, findings in zip(texts, found, strict=True):
            for finding in findings:
                if finding.kind in allow:
                    continue
                value = _identity(finding.kind, text[finding.start : finding.end])
                if (finding.kind, value) not in names:
                    last[finding.kind] += 1
                    names[finding.kind, value] = f"<{finding.kind.upper()}_{last[finding.kind]}>"
        again = _occurrences(names, counts)
        texts = [_replaced(text, findings, names, counts, again) for text, findings in zip(texts, found, strict=True)]
    if not names:
        return example, {}
    turns = zip(example.messages, texts, strict=True)
    return Example(tuple(replace(message, content=text) for message, text in turns)), dict(counts)


def _replaced(
    text: str,
    findings: list[Finding],
    names: dict[tuple[str, str], str],
    counts: Counter[str],
    again: Callable[[str], str],
) -> str:
    """Return the text with placeholders for its findings, and what ``again`` makes of the text between them."""
    parts, end = [], 0
    for finding in findings:
        value = text[finding.start : finding.end]
        name = names.get((finding.kind, _identity(finding.kind, value)))  # none: it is let through, as it is
        parts += [again(text[end : finding.start]), name or value]
        if name is not None:
            counts[finding.kind] += 1
        end = finding.end
    return "".join([*parts, again(text[end:])])


def _occurrences(names: dict[tuple[str, str], str], counts: Counter[str]) -> Callable[[str], str]:
    """Return a function that replaces further occurrences of the values that have a name, the longest first."""
    longest_first = sorted(((_bare(value), kind, value) for kind, value in names), key=lambda each: -len(each[0]))

    def replace_again(text: str) -> str:
        bare_text = _bare(text)
        # Nearly always none, and compiling an expression for each example would take most of the time.
        there = [(kind, value) for bare, kind, value in longest_first if bare in bare_text]
        for kind, value in there:
            text, count = re.subn(_spelled(kind, value), names[kind, value], text)
            counts[kind] += count
        return text

    return replace_again


_SPACED = ("card", "iban", "phone", "us_ssn")  # kinds that people write with and without separators


def _bare(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]", "", text).lower()


def _identity(kind: str, value: str) -> str:
    """Return what is the same in all spellings of a value."""
    if kind in _SPACED:
        return _bare(value)
    return value.lower() if kind == "email" else value


def _spelled(kind: str, value: str) -> str:
    """Return a regular expression for all spellings of a value."""
    if kind in _SPACED:
        return rf"(?i)(?<![A-Za-z0-9])[+(]*{'[ ().+/-]{0,3}'.join(value)}(?![A-Za-z0-9])"
    if kind in NAME_LABELS:
        return rf"(?<!\w){re.escape(value)}(?!\w)"  # Ana is not in Anaïs
    return rf"{'(?i)' if kind == 'email' else ''}(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])"


def told_secrets(text: str, allow: Collection[str] = ()) -> str:
    """Return the secrets in a text by kind, such as "GitHub token, payment card number"; empty if there is none."""
    kinds = dict.fromkeys(f.kind for f in find(text) if f.category == "secret" and f.kind not in allow)
    return ", ".join(LABELS[kind] for kind in kinds)


def blocked(scan: Scan) -> UserError:
    """Return the refusal of rows with secrets: where each is and what it is, never the value."""
    secrets = scan.of("secret")
    assert secrets, "there is no secret in the scan"
    kinds = sorted({place.finding.kind for place in secrets})
    return UserError(
        f"{_count(len(secrets), 'secret')} in {_rows(secrets)}, nothing was added ({_kinds(secrets)})\n"
        f"{_listed(secrets, _MOST_SECRETS)}",
        fix="Take them out, or add the rows with --redact, which puts a placeholder such as "
        f"<{secrets[0].finding.kind.upper()}_1> in their place. Whoever had the file has had them: revoke what can be. "
        f"If they are meant to be there: data.allow: [{', '.join(kinds)}]",
    )


def warned(scan: Scan) -> str:
    """Return the warning of personal data; empty if there is none."""
    personal = scan.of("personal")
    if not personal:
        return ""
    return (
        f"personal data in {_rows(personal)} ({_kinds(personal)}); a model can repeat what it was trained on. Is it "
        f"meant to be there? --redact puts placeholders in its place.\n{_listed(personal, _MOST_PERSONAL)}"
    )


def let_through(scan: Scan) -> str:
    """Return what ``data.allow`` let through, in one line; empty if nothing."""
    allowed = [place for place in scan.places if place.finding.kind in scan.allow]
    return f"Let through, as data.allow says: {_kinds(allowed)}, in {_rows(allowed)}" if allowed else ""


def _kinds(places: Iterable[Place]) -> str:
    """ "GitHub token: 2, e-mail address: 1"."""
    counts = Counter(place.finding.kind for place in places)
    return ", ".join(f"{LABELS[kind]}: {count:,}" for kind, count in counts.most_common())


def _rows(places: Iterable[Place]) -> str:
    return _count(len({place.row for place in places}), "row")


def _listed(places: Sequence[Place], most: int) -> str:
    lines = [f"  {place}" for place in places[:most]]
    if len(places) > most:
        lines.append(f"  and {len(places) - most:,} more: the result lists all")
    return "\n".join(lines)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"

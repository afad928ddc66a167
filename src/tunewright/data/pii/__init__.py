"""Secrets and personal data in examples: found by precise patterns, reported without values, replaced on request."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json
from tunewright.core.progress import LogReporter, Reporter
from tunewright.core.text import count_of, listed
from tunewright.core.workers import slices
from tunewright.data.examples import INSTRUCTIONS, Example, Message, Role
from tunewright.data.pii.personal import NAME_LABELS, PERSONAL
from tunewright.data.pii.secret_patterns import SECRETS, Category, Finder, Finding, Pattern

STEP = 1000
"""Rows searched at once, between updates of the progress."""

PATTERNS: tuple[Pattern, ...] = SECRETS + PERSONAL
# Keys are the names in data.allow and placeholders.
LABELS: dict[str, str] = {pattern.kind: pattern.label for pattern in PATTERNS} | NAME_LABELS

# A text without any of these has no match of any pattern, so most texts need one search only.
_NUMBERS = (
    r"\d(?:[ .()/-]{0,3}\d){6}",  # cards, phone and social security numbers
    r"[A-Z]{2}\d\d[ -]?[A-Z0-9]{4}",  # IBANs
    r"\d\.\d{1,3}\.\d",  # IPv4
    r"[23][0-9A-Fa-f]{3}:",  # IPv6
    r"(?i:birth|geb|dob|d\.o\.b|naissance|nacimiento|mrn|record[ _](?:n|id)|patient[ _]id|patientenn)",
)
_ANY_CUE = re.compile("|".join([*_NUMBERS, *sorted({re.escape(cue) for p in SECRETS for cue in p.cues}), "@"]))
_CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_PLACEHOLDER = re.compile(rf"<({'|'.join(kind.upper() for kind in LABELS)})_(\d+)>")


@dataclass(frozen=True)
class LocatedFinding:
    """A finding with its place: the row (FILE:LINE), the turn's index in the row's ``messages``, and its role.

    Inside of a call's arguments or of declarations (role ``tools``), ``key`` is the nearest key,
    and start and end are places in the value. The key is "" elsewhere, and for a finding in a key.
    """

    row: str
    message: int
    role: Role
    finding: Finding
    key: str = ""

    def __str__(self) -> str:
        found = self.finding
        place = "tools" if self.role == "tools" else f"messages[{self.message}] ({self.role})"
        # A key that contains a secret is not named: the message would leak it.
        key = f' under "{self.key}"' if self.key and not find(self.key) else ""
        return f"{self.row}: {LABELS[found.kind]} in {place}{key}, {found.start}-{found.end}"


@dataclass(frozen=True)
class Scan:
    """All findings in some rows, in order; the kinds in ``allow`` are permitted."""

    rows: int
    places: tuple[LocatedFinding, ...]
    allow: frozenset[str] = frozenset()

    def of(self, category: Category) -> tuple[LocatedFinding, ...]:
        """Return the findings of a category, without permitted kinds."""
        wanted = (place for place in self.places if place.finding.kind not in self.allow)
        return tuple(place for place in wanted if place.finding.category == category)

    @property
    def counts(self) -> dict[str, int]:
        """Findings by kind, the most frequent first."""
        return dict(Counter(place.finding.kind for place in self.places).most_common())

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document that ``--json`` prints."""
        places = [asdict(place) for place in self.places]
        return {"rows": self.rows, "counts": self.counts, "places": places, "allow": sorted(self.allow)}


def find(text: str, also: Finder | None = None) -> list[Finding]:
    """Return the secrets and personal data in a text, sorted by position.

    Findings do not overlap: the more specific pattern wins, then the longer match. Findings of ``also`` are cut to the
    parts that are neither matched by a pattern nor placeholders.
    """
    found = _find_by_patterns(text)
    return found if also is None else sorted([*found, *_rest(text, found, also(text))], key=lambda each: each.start)


def find_in_value(name: str, text: str, also: Finder | None = None) -> list[Finding]:
    """Return the secrets and personal data in a value, sorted by position, given the name of its key or column.

    Some secrets, such as passwords, are recognised only after their name. ``userPassword`` counts as ``user_Password``.
    """
    found = find(text, also)
    if not name:
        return found
    head = f"{_CAMEL_CASE.sub('_', name)}: "
    kinds = {finding.kind for finding in found}
    # Not every kind: a date under "call" would count as a phone number.
    named = [f for f in _find_by_patterns(head + text) if f.category == "secret" or f.kind in _NAMED]
    named = [f for f in named if f.start >= len(head) and f.kind not in kinds]
    return found + [replace(f, start=f.start - len(head), end=f.end - len(head)) for f in named]


def _rest(text: str, found: Sequence[Finding], more: Sequence[Finding]) -> list[Finding]:
    """Return the parts of ``more`` outside of findings and placeholders, stripped of white space and punctuation.

    A model may take "Maria maria@uni-bonn.de" for one name; the name must still be replaced.
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
    # Greedy: lower rank first, then the longer match, then the earlier one.
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
    """Search all turns of examples, including arguments of calls; each example comes with its FILE:LINE.

    ``also`` is an additional finder, such as a finder of names (``open_presidio``). Kinds in
    ``allow`` are counted, but not reported as secrets or personal data.
    """
    places: list[LocatedFinding] = []
    with (reporter or LogReporter()).task("looking for secrets", len(rows), "examples") as task:
        for some in slices(rows, STEP):
            places += find_in_rows(some, also)
            task.advance(len(some))
    return Scan(len(rows), tuple(places), frozenset(allow))


def find_in_rows(rows: Sequence[tuple[str, Example]], also: Finder | None) -> list[LocatedFinding]:
    """Return the findings in all turns of examples; each example comes with its place."""
    places: list[LocatedFinding] = []
    shared: dict[str, list[tuple[str, Finding]]] = {}  # rows of a domain share their instructions
    for row, example in rows:
        turns = [message for message in example.messages if message.role != "tools"]
        declared = [message for message in example.messages if message.role == "tools"]
        for index, message in [*((0, message) for message in declared), *enumerate(turns)]:
            findings = shared.get(message.content) if message.role in INSTRUCTIONS else None
            if findings is None:
                texts = message_texts(message)
                findings = [(name, found) for name, text in texts for found in find_in_value(name, text, also)]
                if message.role in INSTRUCTIONS:
                    shared[message.content] = findings
            places += [LocatedFinding(row, index, message.role, finding, name) for name, finding in findings]
    return places


def redact(
    example: Example, *, also: Finder | None = None, allow: Collection[str] = ()
) -> tuple[Example, dict[str, int]]:
    """Return the example with a placeholder such as ``<EMAIL_1>`` for each finding, and counts by kind.

    A value has the same placeholder in all turns, regardless of its spacing, and is replaced in all
    turns. Arguments of calls stay valid JSON. Redacting again changes nothing. ``also`` and
    ``allow`` are as for ``scan``; permitted kinds are not replaced.
    """
    named = [each for message in example.messages for each in message_texts(message)]
    last = Counter[str]()  # the highest number of each kind's placeholders
    for _, text in named:
        for kind, found in _PLACEHOLDER.findall(text):
            last[kind.lower()] = max(last[kind.lower()], int(found))

    def following(kind: str, _value: str) -> int:
        last[kind] += 1
        return last[kind]

    texts, counts = _redacted(named, following, also, allow)
    if not counts:
        return example, {}
    left = iter(texts)
    return Example(tuple(with_texts(message, left) for message in example.messages)), counts


def redact_value(value: Any, number: Callable[[str, str], int]) -> tuple[Any, dict[str, int]]:
    """Return a JSON value with a placeholder for each finding in its keys, texts and numbers, and counts by kind.

    A text that is a JSON object or list itself, such as the arguments of a call, is searched value by value and stays
    valid JSON. ``number`` returns the number in the placeholder of a kind and a value.
    """
    opened = _opened(value)
    texts, counts = _redacted(list(value_texts(opened)), number)
    return (_with_values(opened, iter(texts)) if counts else value), counts


def _redacted(
    named: Sequence[tuple[str, str]],
    number: Callable[[str, str], int],
    also: Finder | None = None,
    allow: Collection[str] = (),
) -> tuple[list[str], dict[str, int]]:
    """Return texts, each of which comes with its key, with placeholders for all findings, and counts by kind."""
    keys, texts = [name for name, _ in named], [text for _, text in named]
    names: dict[tuple[str, str], str] = {}
    counts = Counter[str]()
    # Repeat, since a replacement can expose a match in the text next to it.
    while True:
        found = [find_in_value(key, text, also) for key, text in zip(keys, texts, strict=True)]
        if all(finding.kind in allow for findings in found for finding in findings):
            return texts, dict(counts)
        for text, findings in zip(texts, found, strict=True):
            for finding in findings:
                if finding.kind in allow:
                    continue
                value = _identity(finding.kind, text[finding.start : finding.end])
                if (finding.kind, value) not in names:
                    names[finding.kind, value] = f"<{finding.kind.upper()}_{number(finding.kind, value)}>"
        again = _occurrences(names, counts)
        texts = [_replace(text, findings, names, counts, again) for text, findings in zip(texts, found, strict=True)]


def _replace(
    text: str,
    findings: list[Finding],
    names: dict[tuple[str, str], str],
    counts: Counter[str],
    again: Callable[[str], str],
) -> str:
    """Return the text with placeholders for its findings; ``again`` transforms the text between them."""
    parts, end = [], 0
    for finding in findings:
        value = text[finding.start : finding.end]
        name = names.get((finding.kind, _identity(finding.kind, value)))  # None for permitted kinds
        parts += [again(text[end : finding.start]), name or value]
        if name is not None:
            counts[finding.kind] += 1
        end = finding.end
    return "".join([*parts, again(text[end:])])


def _occurrences(names: dict[tuple[str, str], str], counts: Counter[str]) -> Callable[[str], str]:
    """Return a function that replaces further occurrences of known values, longest first."""
    longest_first = sorted(((_bare(value), kind, value) for kind, value in names), key=lambda each: -len(each[0]))

    def replace_again(text: str) -> str:
        bare_text = _bare(text)
        # The text between two findings is often shorter than any value, and there may be as many values as findings.
        first = bisect_left(longest_first, -len(bare_text), key=lambda each: -len(each[0]))
        # Usually empty. Compiling an expression for each example would dominate the run time.
        there = [(kind, value) for bare, kind, value in longest_first[first:] if bare in bare_text]
        for kind, value in there:
            text, count = re.subn(_spelling_regex(kind, value), names[kind, value], text)
            counts[kind] += count
        return text

    return replace_again


_NAMED = ("birth_date", "record_number")  # personal data that is recognised only by its name
_SPACED = ("card", "iban", "phone", "us_ssn")  # kinds that people write with and without separators


def _bare(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]", "", text).lower()


def _identity(kind: str, value: str) -> str:
    """Return a value normalised over its spellings."""
    if kind in _SPACED:
        return _bare(value)
    return value.lower() if kind == "email" else value


def _spelling_regex(kind: str, value: str) -> str:
    """Return a regular expression for all spellings of a value."""
    if kind in _SPACED:
        return rf"(?i)(?<![A-Za-z0-9])[+(]*{'[ ().+/-]{0,3}'.join(value)}(?![A-Za-z0-9])"
    if kind in NAME_LABELS:
        return rf"(?<!\w){re.escape(value)}(?!\w)"  # Ana is not in Anaïs
    return rf"{'(?i)' if kind == 'email' else ''}(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])"


def secret_kinds(text: str, allow: Collection[str] = ()) -> str:
    """Return the kinds of secrets in a text, such as "GitHub token, payment card number"; empty without secrets."""
    kinds = dict.fromkeys(f.kind for f in find(text) if f.category == "secret" and f.kind not in allow)
    return ", ".join(LABELS[kind] for kind in kinds)


def blocked(scan: Scan) -> UserError:
    """Return the error for rows with secrets: place and kind of each, never the value."""
    secrets = scan.of("secret")
    assert secrets, "there is no secret in the scan"
    kinds = sorted({place.finding.kind for place in secrets})
    return UserError(
        f"{count_of(len(secrets), 'secret')} in {_rows(secrets)}, nothing was added ({_kinds(secrets)})\n"
        f"{listed(map(str, secrets), len(secrets), 50, 'the result lists all')}",
        fix="Delete them, or use --redact, which replaces them by placeholders such as "
        f"<{secrets[0].finding.kind.upper()}_1>. Revoke secrets that others may have seen. If they are intended, set "
        f"data.allow: [{', '.join(kinds)}]",
    )


def warned(scan: Scan) -> str:
    """Return the warning on personal data; empty without findings."""
    personal = scan.of("personal")
    if not personal:
        return ""
    lines = listed(map(str, personal), len(personal), 10, "the result lists all")
    return (
        f"personal data in {_rows(personal)} ({_kinds(personal)}). A model can repeat its training data; --redact "
        f"replaces personal data by placeholders.\n{lines}"
    )


def allowed_note(scan: Scan) -> str:
    """Return a line on the findings that ``data.allow`` permits; empty without findings."""
    allowed = [place for place in scan.places if place.finding.kind in scan.allow]
    return f"Permitted by data.allow: {_kinds(allowed)}, in {_rows(allowed)}" if allowed else ""


def _kinds(places: Iterable[LocatedFinding]) -> str:
    """Return counts by kind: "GitHub token: 2, e-mail address: 1"."""
    counts = Counter(place.finding.kind for place in places)
    return ", ".join(f"{LABELS[kind]}: {count:,}" for kind, count in counts.most_common())


def _rows(places: Iterable[LocatedFinding]) -> str:
    return count_of(len({place.row for place in places}), "row")


def message_texts(message: Message) -> list[tuple[str, str]]:
    """Return the texts, each with the key that names it ("" for none), since some secrets are recognised by their key.

    They are a message's content, and the keys and values inside of declarations and arguments:
    values are searched separately, so that JSON stays valid after a replacement.
    """
    if message.role == "tools":
        return list(value_texts(json.loads(message.content)))
    arguments = (text for call in message.calls for text in value_texts(json.loads(call.arguments)))
    reasoning = [("", message.reasoning)] if message.reasoning else []
    return [*reasoning, ("", message.content), *arguments]


def with_texts(message: Message, left: Iterator[str]) -> Message:
    """Return the message with the next texts, in the order of ``message_texts``; a changed number becomes a text."""
    if message.role == "tools":
        return replace(message, content=canonical_json(_with_values(json.loads(message.content), left)))
    reasoning = next(left) if message.reasoning else ""
    content = next(left)
    calls = tuple(
        replace(call, arguments=canonical_json(_with_values(json.loads(call.arguments), left)))
        for call in message.calls
    )
    return replace(message, content=content, calls=calls, reasoning=reasoning)


def value_texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield all texts and numbers in a JSON value, each with the nearest key above it or ``name``, and all keys."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield "", key
            yield from value_texts(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from value_texts(inner, name)
    elif isinstance(value, _JsonText):
        yield from value_texts(value.value, name)
    elif value is not None and not isinstance(value, bool):
        yield name, str(value)


def _with_values(value: Any, texts: Iterator[str]) -> Any:
    if isinstance(value, dict):
        return {next(texts): _with_values(inner, texts) for inner in value.values()}
    if isinstance(value, list):
        return [_with_values(inner, texts) for inner in value]
    if isinstance(value, _JsonText):
        inner = _with_values(value.value, texts)
        return value.text if inner == value.value else canonical_json(inner)
    if value is None or isinstance(value, bool):
        return value
    text = next(texts)
    return value if text == str(value) else text


@dataclass(frozen=True)
class _JsonText:
    """A text that is a JSON object or list, and its value."""

    text: str
    value: Any


def _opened(value: Any) -> Any:
    """Return a JSON value in which each text of an object or a list is opened."""
    if isinstance(value, dict):
        return {key: _opened(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_opened(inner) for inner in value]
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return _JsonText(value, _opened(json.loads(value)))
        except ValueError:
            return value
    return value

"""Each function that takes text from outside, with inputs that would be slow if its cost grew faster than the text.

A case makes an input of about ``n`` characters, and uses it. What is made only once, such as a file, is not counted.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from jmespath.parser import Parser

from tunewright.chat.call_stream import CallStream
from tunewright.chat.tool_calls import FORMS, CallForm
from tunewright.config import DataConfig
from tunewright.config.io import parse_config
from tunewright.core.csv import read_sheet, safe_cell
from tunewright.core.errors import UserError
from tunewright.core.text import changes, mark_fault, normalize, visible
from tunewright.data.dedup import distinctive
from tunewright.data.examples import Example, Message, normalised, output_template
from tunewright.data.pii import PATTERNS, find, redact
from tunewright.data.readers import read_pairs
from tunewright.data.readers.mapping import compile_jmespath
from tunewright.data.versions.diff import marked
from tunewright.generation.text_stream import StopFilter
from tunewright.render.markdown import plain
from tunewright.serving.gateway.errors import ApiError, parse_request
from tunewright.serving.gateway.messages_api import MessagesRequest
from tunewright.serving.gateway.schemas import ChatRequest, CompletionRequest
from tunewright.serving.gateway.structured import check_schema

Use = Callable[[Any], object]

MAX_GROWTH = 2.5
"""Maximum cost of a text of twice the length: 2 for linear time, and room for logarithms."""


@dataclass(frozen=True)
class Case:
    """One function and one kind of input."""

    name: str
    text: Callable[[int], Any]
    use: Use

    def __str__(self) -> str:
        return self.name


def _repeated(piece: str, before: str = "", after: str = "") -> Callable[[int], str]:
    return lambda n: before + piece * max(1, n // len(piece)) + after


def _declaring(names: Iterable[str], properties: Any = None, **row: Any) -> bytes:
    functions = [{"name": n, "parameters": {"type": "object", "properties": properties or {}}} for n in names]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return json.dumps({"messages": messages, "tools": functions, **row}).encode()


def _with_functions(count: int) -> bytes:
    calls = [{"id": f"c{i}", "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in range(count)]
    results = [{"role": "tool", "tool_call_id": f"c{i}", "content": "a"} for i in reversed(range(count))]
    turns: list[Any] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": calls or None, "content": "b"},
    ]
    turns += [*results, {"role": "assistant", "content": "c"}] if calls else []
    return _declaring(["f"], messages=turns)


def _by_order(count: int) -> bytes:
    """Results that name the last of many calls first."""
    calls = json.dumps([{"name": f"f{i}", "arguments": {}} for i in range(count)])
    results = [{"from": "tool", "name": f"f{i}", "value": "a"} for i in reversed(range(count))]
    turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": calls}, *results]
    tools = [{"name": f"f{i}"} for i in range(count)]
    return json.dumps({"conversations": [*turns, {"from": "gpt", "value": "a"}], "tools": tools}).encode()


def _hermes(system: str, answer: str = "b") -> bytes:
    turns = {"system": system, "human": "a", "gpt": answer}
    return json.dumps({"conversations": [{"from": role, "value": text} for role, text in turns.items()]}).encode()


def _pair(prompt: str) -> bytes:
    return json.dumps({"prompt": prompt, "completion": "x"}, ensure_ascii=False).encode()


def _prompt(piece: str) -> Callable[[int], bytes]:
    return lambda n: _pair(piece * (n // len(piece)))


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="complexity-"))


def _streamed(form: CallForm) -> Use:
    def read(text: str) -> None:
        stream = CallStream(form)
        for character in text:
            stream.push(character)
        stream.end(cut=False)

    return read


def _read(name: str, data: DataConfig | None = None) -> Use:
    """Read the bytes as a file of this name, whether or not they are accepted."""

    def use(content: bytes) -> None:
        path = _folder() / name
        path.write_bytes(content)
        with suppress(UserError):
            read_pairs(path, data or DataConfig())

    return use


def _preferences(n: int) -> bytes:
    turns = [{"role": role, "content": "x"} for _ in range(n // 60) for role in ("user", "assistant")]
    answers = ([*turns, {"role": "user", "content": "x"}, {"role": "assistant", "content": text}] for text in "yz")
    return json.dumps(dict(zip(("chosen", "rejected"), answers, strict=True))).encode()


def _row(*texts: str) -> str:
    cells = (f'<c t="inlineStr"><is><t>{text}</t></is></c>' for text in texts)
    return f"<row>{''.join(cells)}</row>"


def _header(more: int = 0) -> str:
    return _row("prompt", "completion", *(f"c{i}" for i in range(more)))


def _read_sheet(rows: str) -> None:
    seed = Path(__file__).parents[1] / "fuzz" / "corpus" / "xlsx" / "inline.xlsx"
    sheet = "xl/worksheets/sheet1.xml"
    xml = f'<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main">{rows}</worksheet>'
    with ZipFile(seed) as book, ZipFile(_folder() / "a.xlsx", "w") as archive:
        for name in book.namelist():
            archive.writestr(name, xml if name == sheet else book.read(name))
    with suppress(UserError):
        read_pairs(_folder() / "a.xlsx", DataConfig())


def _sheet(text: str) -> None:
    path = _folder() / "sheet.csv"
    path.write_text(text, encoding="utf-8", newline="")
    with suppress(UserError):
        read_sheet(path, ("a", "b"), "tunewright")


def _config(text: str) -> None:
    with suppress(UserError):
        parse_config(text, Path("tunewright.yaml"))


def _jmespath(text: str) -> None:
    Parser.purge()  # it keeps what it has compiled
    with suppress(UserError):
        compile_jmespath(text, "data.rows", "fix")


def _chat(body: bytes) -> None:
    with suppress(ApiError):
        request = parse_request(ChatRequest, body)
        assert request.conversation
        assert request.beginning


def _messages(body: bytes) -> None:
    with suppress(ApiError):
        assert parse_request(MessagesRequest, body).as_chat().conversation


def _completion(body: bytes) -> None:
    with suppress(ApiError):
        assert parse_request(CompletionRequest, body).texts


def _schema(schema: dict[str, Any]) -> None:
    with suppress(ApiError):
        check_schema(schema, "schema")


def _body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", **fields}).encode()


def _asked(characters: int) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": "a"}] * (characters // 32)}


def _called(count: int) -> list[dict[str, Any]]:
    uses = [{"type": "tool_use", "id": f"i{place}", "name": "f", "input": {}} for place in range(count)]
    results = [{"type": "tool_result", "tool_use_id": use["id"], "content": "r"} for use in uses]
    return [{"role": "assistant", "content": uses}, {"role": "user", "content": results}] if count else []


def _stops(*stops: str) -> Use:
    def use(text: str) -> None:
        filtered = StopFilter(stops)
        for at in range(0, len(text), 5):
            filtered.push(text[at : at + 5])
        filtered.flush()

    return use


def _one_push(text: str) -> None:
    StopFilter(("b" * 900, "a" * 900 + "c")).push(text)


def _redact(text: str) -> object:
    return redact(Example((Message("user", text), Message("assistant", "x"))))


def _word_diff(text: str) -> object:
    return marked(text, text.replace("w", "v"))


def _common_word(text: str) -> object:
    return distinctive([text + " one", text + " two"])


MARKS = "\u0316\u0300\u0345"
HOSTILE = {
    "spaces": " ",
    "letters": "a",
    "digits": "7",
    "spaced digits": "1 ",
    "dotted digits": "1.",
    "plus and digits": "+4",
    "hyphens": "-",
    "quotes": "'\"",
    "apostrophes": "a' '",
    "backslashes": "\\",
    "brackets": "[(<{",
    "new lines": "\n",
    "marks": MARKS,
    "at signs": "a@",
    "addresses": "a@b.c1.",
    "subdomains": "x@" + "a." * 40,
    "colons": "a:",
    "IPv6": "2001:db8::",
    "URLs": "://a:b",
    "JWTs": "-eyJabc",
    "PEMs": "-----BEGIN PRIVATE KEY-----",
    "PEM body": "QUJD" * 8 + "\n",
    "passwords": "password: ",
    "keys": "sk-AKIAxoxb-1-ghp_",
    "base64": "QUJDREVG",
    "IBANs": "DE12 ",
    "words": "phone call no. ",
    "BOM and nulls": "\ufeff\0",
    "escapes": "\x1b[0m",
    "mentions": "@a#1 GH-1 www.a :a:",
    "pipes": "|`*_~",
}
TEXTS: dict[str, Use] = {
    "normalize NFC": lambda text: normalize(text),
    "normalize NFKC": lambda text: normalize(text, "NFKC"),
    "mark_fault": mark_fault,
    "normalised": normalised,
    "output_template": output_template,
    "visible": visible,
    "safe_cell": safe_cell,
    "markdown": plain,
    "pii.find": find,
    "redact": _redact,
    "distinctive": _common_word,
    "stop strings": _stops("zz", "\n\n", "a" * 50 + "z"),
    "one long piece": _one_push,
    "jmespath": _jmespath,
}
CASES = [
    *(Case(f"{name}: {kind}", _repeated(piece), use) for name, use in TEXTS.items() for kind, piece in HOSTILE.items()),
    *(
        Case(f"{pattern.kind} {number}: cue {cue!r}", _repeated(cue + filler), find)
        for number, pattern in enumerate(PATTERNS)
        for cue in pattern.cues
        for filler in ("", "a1B2", "-", " ")
    ),
    *(Case(f"prompt: {kind}", _prompt(piece), _read("a.jsonl")) for kind, piece in HOSTILE.items()),
    Case("redact: many addresses", lambda n: " ".join(f"ann{i}@firm{i}.de" for i in range(n // 16)), _redact),
    Case("redact: many phone numbers", lambda n: " ".join(f"+49 30 9{i:07}" for i in range(n // 16)), _redact),
    Case("JSON Lines: rows", lambda n: (_pair("a") + b"\n") * (n // 40), _read("a.jsonl")),
    Case("JSON Lines: blank lines", lambda n: b"\n" * n + _pair("a"), _read("a.jsonl")),
    Case("JSON Lines: keys", lambda n: json.dumps({f"k{i}": 1 for i in range(n // 10)}).encode(), _read("a.jsonl")),
    Case(
        "JSON Lines: last key repeated",
        lambda n: b"{" + b"".join(b'"k%d":1,' % i for i in range(n // 9)) + b'"z":1,"z":2}',
        _read("a.jsonl"),
    ),
    Case("JSON Lines: brackets", lambda n: b"[" * n, _read("a.jsonl")),
    Case("JSON Lines: escapes", lambda n: _pair("x").replace(b"x", b"\\u0041" * (n // 6)), _read("a.jsonl")),
    Case("JSON Lines: surrogates", lambda n: _pair("x").replace(b"x", b"\\ud800" * (n // 6)), _read("a.jsonl")),
    Case("JSON Lines: bad bytes", lambda n: _pair("x").replace(b"x", b"\xff" * n), _read("a.jsonl")),
    Case("JSON Lines: numbers", lambda n: b'{"prompt":' + b"7" * n + b"}", _read("a.jsonl")),
    Case("tools: calls", lambda n: _with_functions(n // 100), _read("a.jsonl")),
    Case("tools: results by order", lambda n: _by_order(n // 60), _read("a.jsonl")),
    Case("tools: declarations", lambda n: _declaring(f"f{i}" for i in range(n // 60)), _read("a.jsonl")),
    Case("tools: one name", lambda n: _declaring(["f"] * (n // 60)), _read("a.jsonl")),
    Case("tools: properties", lambda n: _declaring(["f"], {f"p{i}": {} for i in range(n // 10)}), _read("a.jsonl")),
    Case("tools: patterns", lambda n: _declaring(["f"], {"a": {"pattern": "(a|aa)+" * (n // 7)}}), _read("a.jsonl")),
    Case("Hermes: <tools>", lambda n: _hermes("<tools>" * (n // 7)), _read("a.jsonl")),
    Case("Hermes: <tools>[", lambda n: _hermes("<tools>[" * (n // 8) + "</tools>"), _read("a.jsonl")),
    Case("Hermes: <tool_call>", lambda n: _hermes("<tools>[{}]</tools>", "<tool_call>" * (n // 11)), _read("a.jsonl")),
    Case("Hermes: literals", lambda n: _hermes("<tools>[" + "{'a': 1}, " * (n // 10) + "]</tools>"), _read("a.jsonl")),
    Case("JSON array: rows", lambda n: b"[" + b",\n".join([_pair("a")] * (n // 40)) + b"]", _read("a.json")),
    Case("JSON array: one long row", lambda n: b"[" + _pair("a" * n) + b"]", _read("a.json")),
    Case("JSON array: spaces", lambda n: b"[" + b" " * n + b"]", _read("a.json")),
    Case("JSON array: unclosed string", lambda n: b'["' + b"a" * n, _read("a.json")),
    Case("JSON array: keys", lambda n: b"[{" + b",".join(b'"k%d":1' % i for i in range(n // 9)), _read("a.json")),
    Case("JSON objects: rows", lambda n: (_pair("a").replace(b",", b",\n") + b"\n") * (n // 40), _read("a.json")),
    Case(
        "document: rows",
        lambda n: b'{"rows": [' + b",\n".join([_pair("a")] * (n // 40)) + b"]}",
        _read("a.json", DataConfig(rows="rows")),
    ),
    Case(
        "document: last key repeated",
        lambda n: b"{" + b"".join(b'"k%d":{},' % i for i in range(n // 9)) + b'"z":1,"z":2}',
        _read("a.json", DataConfig(rows="*")),
    ),
    Case(
        "document: repeated keys in each row",
        lambda n: b'{"rows": [' + b",".join([b'{"a":1,"a":2}'] * (n // 14)) + b"]}",
        _read("a.json", DataConfig(rows="rows")),
    ),
    Case(
        "document: nested rows",
        lambda n: (
            b'{"rows": [' + b",".join(b'{"id":%d,"inner":[{"q":"a","a":"b"}]}' % i for i in range(n // 36)) + b"]}"
        ),
        _read("a.json", DataConfig(rows="rows[].inner[]", input="q", output="a")),
    ),
    Case("document: quotes", lambda n: b'{"a": "' + b'\\"' * (n // 2), _read("a.json", DataConfig(rows="a"))),
    Case("CSV: rows", lambda n: b"prompt,completion\n" + b"a,b\n" * (n // 4), _read("a.csv")),
    Case("CSV: columns", lambda n: b"prompt,completion," + b"c," * (n // 4) + b"\n" + b"1," * (n // 4), _read("a.csv")),
    Case(
        "CSV: repeated columns",
        lambda n: b",".join(b"c%d" % (i % 997) for i in range(n // 5)) + b"\n1\n",
        _read("a.csv"),
    ),
    Case("CSV: open quote", lambda n: b'prompt,completion\n"' + b"a\n" * (n // 2), _read("a.csv")),
    Case("CSV: quotes", lambda n: b'prompt,completion\n"' + b'""' * (n // 2) + b'",x\n', _read("a.csv")),
    Case("CSV: bad bytes", lambda n: b"prompt,completion\n" + b"\xe9,\x81\n" * (n // 4), _read("a.csv")),
    Case("CSV: carriage returns", lambda n: b"prompt,completion\n" + b"a,b\r" * (n // 4), _read("a.csv")),
    Case("preferences: turns", _preferences, _read("a.jsonl")),
    Case("workbook: rows", lambda n: _header() + _row("a", "b") * (n // 20), _read_sheet),
    Case("workbook: columns", lambda n: _header(n // 20) + _row(*"a" * (n // 20)), _read_sheet),
    Case("workbook: rows and columns", lambda n: _header(n // 20) + _row("a", "b") * (n // 20), _read_sheet),
    Case("workbook: merged cells", lambda n: _header() + '<mergeCell ref="A2:B2"/>' * (n // 20), _read_sheet),
    Case("text: spaces", lambda n: b" \n" * (n // 2), _read("a.txt")),
    Case("sheet: rows", lambda n: "a,b\n" * (n // 4), _sheet),
    Case("sheet: columns", lambda n: "a,b" + ",c" * (n // 4) + "\n" + "," * (n // 4 + 1) + "\n", _sheet),
    Case("sheet: quotes", lambda n: 'a,b\n"' + '""' * (n // 2), _sheet),
    Case("YAML: unknown keys", lambda n: "".join(f"k{i}: 1\n" for i in range(n // 9)), _config),
    Case("YAML: one key repeated", lambda n: "name: x\n" * (n // 8), _config),
    Case("YAML: unknown inner keys", lambda n: "data:\n" + "".join(f"  k{i}: 1\n" for i in range(n // 11)), _config),
    Case("YAML: list", lambda n: "data:\n  sources:\n" + "  - a\n" * (n // 6), _config),
    Case("YAML: flow list", lambda n: "data: {sources: [" + "a, " * (n // 3) + "]}", _config),
    Case("YAML: flow mapping", lambda n: "data: {" + "a: 1, " * (n // 6) + "}", _config),
    Case("YAML: brackets", lambda n: "a: " + "[" * n, _config),
    Case("YAML: long scalar", lambda n: "name: " + "a" * n, _config),
    Case("YAML: quoted scalar", lambda n: 'name: "' + "\\n " * (n // 3) + '"', _config),
    Case("YAML: folded scalar", lambda n: "name: >\n" + "  a\n\n" * (n // 5), _config),
    Case("YAML: comments", lambda n: "# a\n" * (n // 4), _config),
    Case("YAML: anchors", lambda n: "".join(f"k{i}: &a{i} 1\n" for i in range(n // 13)), _config),
    Case("YAML: tags", lambda n: "a: !" + "%41" * (n // 3), _config),
    Case("YAML: documents", lambda n: "---\n" * (n // 4), _config),
    Case("YAML: question marks", lambda n: "? " * (n // 2), _config),
    Case("YAML: hyphens", lambda n: "- " * (n // 2), _config),
    Case("YAML: digits", lambda n: "train:\n  epochs: " + "9" * n, _config),
    Case("YAML: sexagesimal", lambda n: "train:\n  epochs: 1" + ":59" * (n // 3), _config),
    Case("YAML: underscores", lambda n: "train:\n  epochs: 1" + "_" * n, _config),
    *(
        Case(f"JMESPath: {before}{piece}…", _repeated(piece, before), _jmespath)
        for before, piece in [
            ("a", ".a"),
            ("a", "[]"),
            ("a", "||a"),
            ("", "("),
            ("", "!"),
            ("", "[?a]"),
            ("a", "|a"),
            ("", "*."),
            ("`", "a"),
            ("'", "\\'"),
            ("", "{a:"),
            ("&", "&"),
            ('"', "\\u0041"),
            ("", " "),
        ]
    ),
    Case("chat: one long message", lambda n: _body(messages=[{"role": "user", "content": "a" * n}]), _chat),
    Case("chat: messages", lambda n: _body(messages=[{"role": "user", "content": "a"}] * (n // 40)), _chat),
    Case("chat: system messages", lambda n: _body(messages=[{"role": "system", "content": "a"}] * (n // 40)), _chat),
    Case(
        "chat: parts",
        lambda n: _body(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * (n // 32)}]),
        _chat,
    ),
    Case("chat: marks", lambda n: _body(messages=[{"role": "user", "content": (MARKS * 9 + "a") * (n // 168)}]), _chat),
    Case("chat: long run of marks", lambda n: _body(messages=[{"role": "user", "content": MARKS * (n // 18)}]), _chat),
    Case("chat: unknown fields", lambda n: _body(**{f"k{i}": 1 for i in range(n // 10)}), _chat),
    Case("chat: repeated fields", lambda n: b'{"model": "m"' + b',"seed":1' * (n // 9) + b"}", _chat),
    Case("chat: faulty messages", lambda n: _body(messages=[{"rle": 1}] * (n // 12)), _chat),
    Case("chat: brackets", lambda n: b'{"messages":' + b"[" * n, _chat),
    Case("chat: digits", lambda n: b'{"seed":' + b"9" * n + b"}", _chat),
    Case("chat: fraction", lambda n: b'{"temperature":0.' + b"9" * n + b"}", _chat),
    Case("chat: escapes", lambda n: b'{"model":"' + b"\\u0300" * (n // 6) + b'"}', _chat),
    Case("chat: user label", lambda n: _body(user="a" * n, messages=[]), _chat),
    Case("chat: metadata", lambda n: _body(metadata={f"k{i}": "v" for i in range(n // 12)}, messages=[]), _chat),
    Case("chat: stops", lambda n: _body(stop=["a"] * (n // 5), messages=[]), _chat),
    *(
        Case(f"{how}: {form.name}, {before}{piece}…", _repeated(piece, before, after), use(form({})))
        for how, use in (("calls", lambda form: form.read), ("streamed calls", _streamed))
        for form in FORMS
        for before, piece, after in [
            ("", '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', " "),
            ("", "<tool_call>", ""),
            ("", '<tool_call>"', ""),
            ('<tool_call>{"name": "', "<tool_call>", ""),
            ("", "[TOOL_CALLS]f[ARGS]{}", " "),
            ("[TOOL_CALLS]", "[", ""),
            ('[TOOL_CALLS][{"name": "f", "arguments": {}}', ',{"name": "f", "arguments": {}}', ""),
            ("<|python_start|><|python_end|>", '{"name": "f", "parameters": {}}', " "),
            ('<|python_tag|>brave_search.call(query="', '")', " "),
            ("", " ", "{"),
        ]
    ),
    Case("messages: blocks", lambda n: _body(max_tokens=1, messages=[_asked(n)]), _messages),
    Case(
        "messages: calls", lambda n: _body(max_tokens=1, messages=[_asked(9), *_called(n // 180), _asked(9)]), _messages
    ),
    Case(
        "schema: references to one node",
        lambda n: {"a": [{"$ref": "#/b"} for _ in range(n // 15)], "b": [{} for _ in range(n // 15)]},
        _schema,
    ),
    Case(
        "schema: spellings of one node",
        lambda n: {"a": [{"$ref": f"#/{'%61' if i % 2 else 'a'}/{i:05}"} for i in range(n // 25)]},
        _schema,
    ),
    Case(
        "schema: roots of one node",
        lambda n: {"a": [{"$ref": f"#{i}/a"} for i in range(n // 18)], "$ref": "#/a"},
        _schema,
    ),
    Case("schema: chain", lambda n: {str(i): {"$ref": f"#/{i + 1}"} for i in range(n // 20)}, _schema),
    Case("schema: ring", lambda n: {str(i): {"$ref": f"#/{(i + 1) % (n // 20)}"} for i in range(n // 20)}, _schema),
    Case("schema: pointers", lambda n: {"a": [{"$ref": "#" + "/a" * 20} for _ in range(n // 50)]}, _schema),
    Case("schema: multiples", lambda n: {"a": [{"multipleOf": 1 + i % 5} for i in range(n // 20)]}, _schema),
    Case("completion: prompts", lambda n: _body(prompt=["a"] * (n // 5)), _completion),
    Case("completion: token ids", lambda n: _body(prompt=[1] * (n // 3)), _completion),
    Case("completion: long prompt", lambda n: _body(prompt="é" * (n // 6)), _completion),
    Case("word diff: all different", lambda n: " ".join(f"w{i}" for i in range(n)), _word_diff),
    Case("word diff: backwards", lambda n: [f"w{i}" for i in range(n // 6)], lambda words: changes(words, words[::-1])),
    # Above the limit of the search, whose time is cubic below it.
    Case(
        "word diff: two words", lambda n: ["a", "b"] * (2 * n), lambda words: changes(["c", *words], [*words, "a", "a"])
    ),
]

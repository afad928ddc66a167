"""Documents, their passages, and ``data from-documents`` against a scripted teacher."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from making.command_line import tunewright
from making.scripted_teacher import LICENSE, asked, read, teacher_project, teaching
from tunewright.core.errors import UserError
from tunewright.data.versions import load_version
from tunewright.synthesis import documents
from tunewright.synthesis.documents import parse_document, read_document
from tunewright.synthesis.questions import find_quote

FEES = "The fee for a certified copy is 12 dollars for each page, and 4 dollars for each page of a plain copy."
HOURS = "The office of the clerk is open from nine to five on all days but Sunday, and is closed on state holidays."


def pdf(path: Path, pages: Sequence[str], password: str | None = None) -> Path:
    """A PDF with a line of text on each page; an empty one is a blank page, as a scan without text has."""
    import pypdf
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = pypdf.PdfWriter()
    for text in pages:
        page = writer.add_blank_page(600, 800)
        if not text:
            continue
        font = DictionaryObject(
            {
                NameObject("/Type"): NameObject("/Font"),
                NameObject("/Subtype"): NameObject("/Type1"),
                NameObject("/BaseFont"): NameObject("/Helvetica"),
            }
        )
        resources = DictionaryObject({NameObject("/F1"): writer._add_object(font)})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): resources})
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 10 Tf 20 700 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(stream)
    if password is not None:
        writer.encrypt(password, algorithm="AES-256")
    writer.write(path)
    return path


def docx(path: Path) -> Path:
    import docx as word

    document = word.Document()
    document.add_heading("Fees", 1)
    document.add_paragraph(FEES)
    document.add_heading("Hours", 2)
    document.add_paragraph(HOURS)
    table = document.add_table(1, 2)
    table.cell(0, 0).text, table.cell(0, 1).text = "Monday", "nine to five"
    document.save(str(path))
    return path


PAGE = f"""<html><head><title>no</title><style>p {{}}</style></head><body><nav>menu of the site</nav>
<h1>Fees</h1><p>{FEES.replace("12 dollars", "<b>12</b> dollars")}</p><script>var x;</script>
<h2>Hours &amp; days</h2><div>{HOURS}<!-- a comment --></div></body></html>"""
MARKDOWN = f"# Fees\n\n{FEES}\n\n```\n# not a heading\n```\n\nHours\n-----\n\n{HOURS}\n"


def test_pdf_has_a_passage_for_each_page_and_names_pages_without_text(tmp_path: Path) -> None:
    found = read_document(pdf(tmp_path / "a.pdf", [FEES, "", HOURS, "Short."]), 2000)
    assert [(p.at, p.text) for p in found.passages] == [("page 1", FEES), ("page 3", HOURS)]
    assert found.without_text == ("a.pdf, page 2",)
    assert found.too_short == ("a.pdf, page 4",)


@pytest.mark.parametrize("kind", ["docx", "html", "md"])
def test_headings_divide_a_document(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "docx":
        docx(path)
    else:
        path.write_text(PAGE if kind == "html" else MARKDOWN, encoding="utf-8")
    sections = parse_document(path.read_bytes(), path)
    fees, hours = (section for section in sections if section.text)
    assert (fees.at, hours.at.partition(" &")[0].rstrip('"')) == ('heading "Fees"', 'heading "Hours')
    assert FEES in fees.text
    assert HOURS in hours.text
    assert "not a heading" not in hours.text
    assert not any(word in fees.text + hours.text for word in ("menu", "var x", "a comment"))
    if kind == "docx":
        assert hours.text.endswith("Monday | nine to five")


def test_long_sections_are_cut_between_paragraphs_and_keep_every_word(tmp_path: Path) -> None:
    words = [f"word{n}" for n in range(900)]
    text = "\n\n".join(" ".join(words[n : n + 30]) + "." for n in range(0, 900, 30))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    passages = read_document(tmp_path / "a.txt", 500).passages
    assert all(len(p.text) <= 500 for p in passages)
    assert " ".join(p.text for p in passages).replace(".", "").split() == words
    assert all(text[p.start : p.start + len(p.text)] == p.text for p in passages)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.pdf", b"%PDF-1.7 broken", "PDF is damaged"),
        ("a.docx", b"PK\x03\x04 broken", "DOCX is damaged"),
        ("a.docx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "encrypted, or in the format of Word 97"),
        ("a.txt", b"\xff\xfe\x00", "Not UTF-8"),
    ],
)
def test_unreadable_document_is_one_error(name: str, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_document(data, Path(name))
    assert caught.value.where == name


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.docx", b"PK\x03\x04 broken", "DOCX is damaged"),  # as the child process reports it
        ("a.md", b" \n", "document is empty"),
        ("a.html", b"<html><script>x</script></html>", "has no text"),
        ("a.odt", b"x", "Unsupported document format"),
    ],
)
def test_document_without_passages_is_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read_document(tmp_path / name, 2000)
    assert caught.value.where == str(tmp_path / name)


def test_scanned_and_encrypted_pdfs_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its pages may be scanned"):
        read_document(pdf(tmp_path / "scan.pdf", ["", ""]), 2000)
    locked, free = pdf(tmp_path / "locked.pdf", [FEES], "secret"), pdf(tmp_path / "open.pdf", [FEES], "")
    with pytest.raises(UserError, match="The PDF is encrypted"):
        parse_document(locked.read_bytes(), locked)
    assert parse_document(free.read_bytes(), free)[0].text == FEES


def test_random_bytes_are_refused_or_read_but_never_a_traceback(tmp_path: Path) -> None:
    import random

    draw = random.Random(0)
    pdf(tmp_path / "a.pdf", [FEES, HOURS])
    docx(tmp_path / "a.docx")
    (tmp_path / "a.html").write_text(PAGE, encoding="utf-8")
    for kind in ("pdf", "docx", "html"):
        seed = (tmp_path / f"a.{kind}").read_bytes()
        for _ in range(15):
            data = bytearray(seed)
            for _ in range(draw.randint(1, 20)):
                data[draw.randrange(len(data))] = draw.randrange(256)
            path = tmp_path / f"b.{kind}"
            path.write_bytes(data[: draw.randint(len(data) // 2, len(data))])
            try:
                parse_document(path.read_bytes(), path)  # in this process, as the child does
            except UserError:
                continue


def _docx_of(path: Path, body: str) -> Path:
    """A DOCX with this body, deflated."""
    docx(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    xml = members["word/document.xml"].decode()
    head, rest = xml[: xml.index("<w:body>") + 8], xml[xml.index("<w:sectPr") :]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (members | {"word/document.xml": f"{head}{body}{rest}".encode()}).items():
            archive.writestr(name, content)
    return path


def _cell(text: str, properties: str = "") -> str:
    return f"<w:tc><w:tcPr>{properties}</w:tcPr><w:p><w:r><w:t>{text}</w:t></w:r></w:p></w:tc>"


def test_merged_cell_is_read_once_in_each_row_that_it_covers(tmp_path: Path) -> None:
    rows = [
        _cell("North", '<w:vMerge w:val="restart"/>') + _cell(FEES, '<w:gridSpan w:val="2"/>') + _cell("paid"),
        _cell("", "<w:vMerge/>") + _cell(HOURS) + _cell("free"),
        '<w:trPr><w:gridBefore w:val="3"/></w:trPr>' + _cell("late"),
    ]
    table = "".join(f"<w:tr>{row}</w:tr>" for row in rows)
    path = _docx_of(tmp_path / "a.docx", f"<w:tbl>{table}</w:tbl>")
    (section,) = parse_document(path.read_bytes(), path)
    assert section.text.split("\n\n") == [f"North | {FEES} | paid", f"North | {HOURS} | free", "late"]


@pytest.mark.parametrize("span", ["gridSpan", "gridBefore"])
def test_stated_columns_of_a_table_cost_nothing(tmp_path: Path, span: str) -> None:
    wide = f'<w:{span} w:val="200000000"/>'
    row = _cell(FEES, wide) if span == "gridSpan" else f"<w:trPr>{wide}</w:trPr>{_cell(FEES)}"
    path = _docx_of(tmp_path / "a.docx", f"<w:tbl><w:tr>{row}</w:tr></w:tbl>")
    (section,) = parse_document(path.read_bytes(), path)
    assert section.text == FEES


def test_docx_that_expands_too_far_is_refused(tmp_path: Path) -> None:
    path = _docx_of(tmp_path / "a.docx", f"<w:p>{' ' * (80 << 20)}</w:p>")
    with pytest.raises(UserError, match=r"contains 8\d,\d{3},\d{3} bytes .limit .*: 67,108,864") as caught:
        parse_document(path.read_bytes(), path)
    assert caught.value.where == str(path)


def test_docx_whose_cells_repeat_too_much_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _cell("word " * 4_000, '<w:vMerge w:val="restart"/>')
    rows = f"<w:tr>{first}</w:tr>" + f"<w:tr>{_cell('', '<w:vMerge/>')}</w:tr>" * 300
    path = _docx_of(tmp_path / "a.docx", f"<w:tbl>{rows}</w:tbl>")
    monkeypatch.setattr(documents, "expansion_limit", lambda size: 1_200_000)
    with pytest.raises(UserError, match=r"characters of text .limit for a file of this size: 1,200,000"):
        parse_document(path.read_bytes(), path)


@pytest.mark.parametrize(("name", "limit"), [("MAX_MEMORY", 300 << 20), ("MAX_SECONDS", 1)])
def test_document_that_takes_too_much_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, limit: int
) -> None:
    (tmp_path / "a.txt").write_text("word " * (6 << 20))
    monkeypatch.setattr(documents, name, limit)
    with pytest.raises(UserError, match=r"takes over \d GiB of memory or \d+ s of processor time") as caught:
        read_document(tmp_path / "a.txt", 2000)
    assert caught.value.where == str(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("quote", "text", "place"),
    [
        ("one two", "zero one\n two three", (5, 13)),
        ("a.b (c)", "x a.b (c) y", (2, 9)),
        ("one four", "zero one two", None),
        (" ", "text", None),
    ],
)
def test_find_quote_ignores_white_space_alone(quote: str, text: str, place: tuple[int, int] | None) -> None:
    assert find_quote(quote, text) == place


def pairs(*each: tuple[str, str, str]) -> str:
    named = [dict(zip(("question", "answer", "quote"), pair, strict=True)) for pair in each]
    return f"Here they are:\n```json\n{json.dumps({'pairs': named})}\n```"


def script(body: dict[str, Any], _times: int) -> str:
    prompt = asked(body)
    if FEES in prompt:
        return pairs(
            ("What does a certified copy cost for a page?", "12 dollars", "certified copy is 12 dollars for each page"),
            ("What does a seal cost at the clerk's office?", "9 dollars", "a seal costs 9 dollars"),
        )
    if HOURS in prompt:
        return pairs(("On which day is the clerk's office closed?", "Sunday", "all days but Sunday"))
    return "I cannot do that."


@pytest.mark.slow
def test_from_documents_writes_cited_rows_grouped_by_document(tmp_path: Path) -> None:
    with teaching(script) as teacher:
        project = teacher_project(tmp_path / "p", teacher.url)
        manual = pdf(project / "manual.pdf", [FEES, "", HOURS, "Nothing of interest stands here, " * 5])
        (project / "broken.docx").write_bytes(b"PK\x03\x04")
        (project / "copy.pdf").write_bytes(manual.read_bytes())
        files = [manual, project / "broken.docx", project / "copy.pdf"]
        estimate = tunewright("data", "from-documents", *files, "-p", project, "--estimate", "--json")
        assert (estimate.document["calls"]["calls"], teacher.bodies) == (3, [])
        ran = tunewright("data", "from-documents", *files, "-p", project, "--json")
        assert ran.code == 0, ran.stderr
        assert len(teacher.bodies) == 3
        assert "response_format" in teacher.bodies[0]
    document = ran.document
    assert (document["documents"], document["passages"], document["rows"]) == (3, 3, 2)
    assert {reason: len(places) for reason, places in document["left_out"].items()} == {
        "document left out: The DOCX is damaged": 1,
        f"the same document as {manual}": 1,
        "a page or section without text (scanned?)": 1,
        "the quote is not in the passage": 1,
        "the reply is not the JSON that was asked for": 1,
    }
    assert "broken.docx: The DOCX is damaged" in ran.stderr
    fees, hours = read(project / "generated" / "manual.jsonl")
    question, answer = (turn["content"] for turn in fees["messages"])
    assert (question, answer) == ("What does a certified copy cost for a page?", "12 dollars")
    cited = fees["passage"]
    assert re.fullmatch("[0-9a-f]{64}", cited["document"])
    assert (cited["name"], cited["at"]) == ("manual.pdf", "page 1")
    assert FEES[cited["start"] : cited["end"]] == cited["quote"] == "certified copy is 12 dollars for each page"
    assert hours["passage"]["start"] > len(FEES)
    assert fees["generated"]["license"] == LICENSE

    added = tunewright("data", "add", project / "generated" / "manual.jsonl", "-p", project, "--json")
    assert (added.code, added.document["added"]) == (0, 2)
    rows = [m for m in load_version(project / "dataset").members if m.generated]
    assert {m.groups for m in rows} == {(f"source_document={cited['document']}",)}
    assert {m.split for m in rows} == {"train"}
    assert len({m.cluster for m in rows}) == 1
    exported = tunewright("data", "review", "--export", tmp_path / "rows.csv", "-p", project, "--reviewer", "ada")
    assert exported.code == 0
    sheet = (tmp_path / "rows.csv").read_text(encoding="utf-8-sig")
    assert "generated: by big; manual.pdf, page 1: " in sheet


def test_from_documents_drops_questions_like_held_out_inputs(tmp_path: Path) -> None:
    held: list[str] = []

    def like_test(_body: dict[str, Any], _times: int) -> str:
        return pairs((f"{held[0]}?", "12 dollars", "12 dollars"), ("What is the fee for a copy?", "12", "12 dollars"))

    with teaching(like_test) as teacher:
        project = teacher_project(tmp_path / "p", teacher.url)
        held += [m.example.input_text for m in load_version(project / "dataset").members if m.split == "test"][:1]
        (project / "fees.md").write_text(MARKDOWN.partition("```")[0], encoding="utf-8")
        ran = tunewright("data", "from-documents", project / "fees.md", "-p", project, "--json")
        assert ran.code == 0, ran.stderr
    assert ran.document["rows"] == 1
    assert ran.document["left_out"] == {
        "near-duplicate of a dev or test input, or of their group": ['fees.md, heading "Fees"']
    }


def test_from_documents_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    project = teacher_project(tmp_path / "p", "http://127.0.0.1:9/v1")
    (project / "empty.pdf").write_bytes(b"")
    ran = tunewright("data", "from-documents", project / "empty.pdf", project / "none.pdf", "-p", project)
    assert (ran.code, "No passage to ask about" in ran.stderr) == (2, True)

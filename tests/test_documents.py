"""Readers and the cutter: what comes out of each kind of file, where it came from, and what is refused."""
import json
import random
import zlib

import pytest

from minigpt.engine import documents
from minigpt.engine.documents import Document, chunk, find_documents, load_document, markdown_headings, split_units


def pdf_bytes(*pages: str) -> bytes:
    """A small PDF, one line of text a page, written by hand."""
    count = len(pages)
    objects = ["<< /Type /Catalog /Pages 2 0 R >>",
               f"<< /Type /Pages /Count {count} /Kids [{' '.join(f'{4 + 2 * n} 0 R' for n in range(count))}] >>",
               "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    for n, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET" if text else ""
        objects += [f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * n} 0 R "
                    "/Resources << /Font << /F1 3 0 R >> >> >>",
                    f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream"]
    out, places = "%PDF-1.4\n", []
    for n, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{n} 0 obj\n{body}\nendobj\n"
    table = "".join(f"{p:010} 00000 n \n" for p in places)
    return (f"{out}xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n<< /Size {len(objects) + 1} "
            f"/Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF\n").encode()


def write(folder, name, data):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# ------------------------------------------------------------------ each kind of file

def test_text_has_lines(tmp_path):
    d = load_document(write(tmp_path, "a.txt", "\ufeffone\r\ntwo\rthree\n"))
    assert d.text == "one\ntwo\nthree\n" and d.place(d.text.index("three")) == "line 3" and d.heading(5) == ""


def test_markdown_headings_outside_of_code():
    text = "intro\n# A\n### B\ntext\n```python\n# no\n~~~\n# no\n```\n## C ##\n~~~\n# no\n~~~\n# D\n#no\n####### no\n"
    found = markdown_headings(text)
    assert [name for _, name in found] == ["A", "A > B", "A > C", "D"]
    assert [text[at:].split("\n")[0] for at, _ in found] == ["# A", "### B", "## C ##", "# D"]


def test_notebook_cells_and_headings(tmp_path):
    cells = [{"cell_type": "markdown", "source": "# A\ntext"},
             {"cell_type": "code", "id": "run", "source": ["x = 1\n", "y"], "outputs": [{"text": "SECRET"}]},
             {"cell_type": "markdown", "id": "m", "source": ["## B\n", "more"]}]
    d = load_document(write(tmp_path, "n.ipynb", json.dumps({"cells": cells})))
    assert "SECRET" not in d.text
    at = [d.text.index(word) for word in ("text", "x = 1", "more")]
    assert [d.place(n) for n in at] == ["cell 0", "cell run", "cell m"]
    assert [d.heading(n) for n in at] == ["A", "A", "A > B"]


HTML = """<!doctype html><html><head><title>no</title><script>var no = "<p>no</p>";</script></head><body>
<script type="module">document.write("no")</script><style>.no { color: red }</style><noscript>no</noscript>
<h1>Fish &amp; chips</h1><p>Eat <b>them</b> ho<i>t</i>.<br>Now.</p>
<template><p>no</p></template><svg><text>no</text></svg>
<h2 id=x>With <em>salt</em></h2><ul><li>one<li>two</ul><pre>a
  b</pre><!-- no --><p onclick="no()">end</p></body></html>"""


def test_html_without_scripts(tmp_path):
    d = load_document(write(tmp_path, "a.html", HTML))
    assert "no" not in d.text.replace("Now", "").split() and "color" not in d.text and "write" not in d.text
    assert "Eat them hot.\nNow." in d.text and "a\n  b" in d.text
    assert [name for _, name in d.headings] == ["Fish & chips", "Fish & chips > With salt"]
    assert d.heading(d.text.index("two")) == "Fish & chips > With salt" and d.place(d.text.index("Eat")) == "line 3"
    assert d.heading(d.text.index("Eat")) == "Fish & chips"


@pytest.mark.parametrize("page", ["</p></script></h1>text", "<h1>open text", "<script>a", "<b><p>text</b></i>",
                                  "<" * 50 + "text", "<h1></h1>text", "<p>a" * 3000, "<div>" * 5000 + "text"])
def test_broken_html_does_not_break_the_reader(page):
    d = documents.html_document(page.encode(), "p", "p")
    assert all(0 <= at <= len(d.text) for at, _ in [*d.headings, *d.places])
    assert "a" in d.text or "text" in d.text or page.startswith("<script>")


def test_a_long_title_is_cut(tmp_path):
    """A title is copied into every passage under it: the text of a file on one line, after a "#", must not be one."""
    for d in (load_document(write(tmp_path, "a.md", "# " + "word " * 4000 + "\n## Short ##\nend")),
              load_document(write(tmp_path, "a.html", "<h1>" + "word " * 4000 + "</h1><h2>Short</h2>end"))):
        (_, long), (_, short) = d.headings
        assert long == ("word " * 40).strip() and short == f"{long} > Short"
        passages = chunk(d)
        assert len(passages) > 30 and max(len(p.heading) for p in passages) == len(short)
        assert passages[-1].text.endswith("end") and sum(p.text.count("word") for p in passages) >= 4000


@pytest.mark.parametrize("page, names", [
    ("text</h2>more", []), ("<h1>A</h1>text</h2>more</h2>", ["A"]), ("text</h3><h3>B</h3></h3>end", ["B"]),
    ("<h1>A</h2>B</h1>", ["A B"]), ("<template><h1>no</template>text</h1>", [])])
def test_the_end_of_a_heading_that_is_not_open(page, names):
    d = documents.html_document(page.encode(), "p", "p")
    assert [name for _, name in d.headings] == names


def test_the_name_of_a_cell_is_cut(tmp_path):
    cells = [{"cell_type": "markdown", "id": "x" * 9000, "source": "text"}, {"cell_type": "raw", "id": 7, "source": "end"}]
    d = load_document(write(tmp_path, "n.ipynb", json.dumps({"cells": cells})))
    assert [name for _, name in d.places] == ["cell " + "x" * 64, "cell 7"]


@pytest.mark.parametrize("page", ["<p>text<![foo[x]]>", "text<![%foo[x]]>more", "text<![" + "f" * 5000 + "[x]]>"])
def test_a_declaration_of_another_age(tmp_path, page):
    """A parser of Python's library raises there in some versions; a browser takes it for a comment."""
    assert load_document(write(tmp_path, "odd.html", page)).text.split()[0].startswith("text")


@pytest.mark.parametrize("piece", ["<!--", "<!-", "<!x", "<?", "</", "<a ", "<a b='", '<a b="c', "<![CDATA[", "<script>", "<svg>",
                                   "</svg>", "<h1>", "<pre>", "&#", "&amp", "<", "&#9999999999", "<a =", "= '", "<textarea>"])
def test_a_megabyte_of_beginnings(piece):
    """Each character is looked at a fixed number of times, wherever an end is missing. (Python's parser takes minutes.)"""
    page = piece * (1_200_000 // len(piece))
    assert set(documents.html_document(page.encode(), "p", "p").text) <= set(" \n\ufffd" + piece.replace("amp", ""))
    both = (piece + "</x>") * 100_000 + "<!-- - -->" * 10
    documents.html_document(both.encode(), "p", "p")


def test_nested_hidden_tags_that_are_not_closed():
    page = "<svg>" * 100_000 + "</template>" * 100_000 + "</svg>" * 99_999 + "no</svg>text"
    assert documents.html_document(page.encode(), "p", "p").text == "text"


@pytest.mark.parametrize("page, text", [
    ("a<!-- <b> -->c", "ac"), ("a<!-- no", "a"), ("a<b title='>no'>c</b>", "ac"), ("a<b title=it's>c", "ac"), ("1 < 2 <3", "1 < 2 <3"),
    ("<p>a</p ><p>b", "a\n\nb"), ("<SCRIPT>no</Script>a", "a"), ("<script>'</p>' no</script >a", "a"), ("a<b =\"x>\">c", "ac"),
    ("&lt;b&gt; &#65;&#x42; &unknown; &", "<b> AB &unknown; &"), ("<title>no<b>no</title>a", "a"), ("a<!doctype html>b", "ab"),
    ("<svg><svg>no</svg>no</svg>a", "a"), ("a<br/>b<hr>c", "a\nb\n\nc"), ("<td>a</td><td>b</td>", "a \n\nb"), ("a</>b</ c>d", "abd")])
def test_html_as_browsers_read_it(page, text):
    assert documents.html_document(page.encode(), "p", "p").text.strip() == text


def test_pdf_pages(tmp_path):
    pytest.importorskip("pypdf")
    d = load_document(write(tmp_path, "a.pdf", pdf_bytes("First page here.", "Second page there.")))
    assert d.place(d.text.index("First")) == "page 1" and d.place(d.text.index("Second page there.")) == "page 2"


def test_a_page_without_ends_of_tags():
    d = documents.html_document(b"<head><title>no</title><meta charset=utf-8><body><h1>A</h1>text<p>more", "p", "p")
    assert d.text.split() == ["A", "text", "more"] and d.heading(d.text.index("more")) == "A"


def test_large_files(tmp_path):
    """Many tags, many lines: as quick as reading them should be."""
    page = documents.html_document(b"<p>word <b>bold</b></p>\n" * 40_000, "p", "p")
    assert len(page.text.split()) == 80_000 and page.place(page.text.rindex("bold")) == "line 40000"
    passages = chunk(documents.text_document(b"One line of text.\n" * 60_000, "t", "t"))
    assert passages[-1].place == f"line {60_000 - passages[-1].text.count('One') + 1}"


def test_half_characters_are_replaced_in_place(tmp_path):
    cells = '{"cells": [{"cell_type": "markdown", "source": "a \\ud800 b"}]}'
    assert load_document(write(tmp_path, "a.ipynb", cells)).text.startswith("a ? b")


# ------------------------------------------------------------------ bad input

@pytest.mark.parametrize("spoil", [lambda d: d[:40], lambda d: b"%PDF-1.4 nonsense", lambda d: zlib.compress(d),
                                   lambda d: d.replace(b"/Pages 2 0 R", b"/Pages 9 0 R"), lambda d: b"\0" * 500])
def test_a_broken_pdf(tmp_path, spoil):
    pytest.importorskip("pypdf")
    path = write(tmp_path, "a.pdf", spoil(pdf_bytes("text")))
    with pytest.raises(ValueError, match="a.pdf is a broken or locked PDF|a.pdf holds no text"):
        load_document(path)


def test_a_scan_has_no_text(tmp_path):
    pytest.importorskip("pypdf")
    with pytest.raises(ValueError, match="text recognition"):
        load_document(write(tmp_path, "scan.pdf", pdf_bytes("", "")))


def test_without_pypdf(tmp_path, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(ImportError, match="a.pdf needs pypdf: pip install pypdf"):
        load_document(write(tmp_path, "a.pdf", pdf_bytes("text")))


@pytest.mark.parametrize("name, data, told", [
    ("a.txt", b"abc\0def", "binary file"), ("a.md", "café".encode("latin1"), "not UTF-8 .byte 0xe9.: save it as UTF-8"),
    ("a.txt", b" \n ", "holds no text"), ("a.txt", b"", "holds no text"), ("a.docx", b"x", "cannot read '.docx'"),
    ("noending", b"x", "cannot read 'no ending'"), ("a.ipynb", b"{}", "is no notebook"),
    ("a.ipynb", b"[1", "is no notebook"), ("a.ipynb", b'{"cells": [1]}', "is no notebook"),
    ("a.ipynb", b"[" * 100_000, "is no notebook"), ("a.html", b"<script>x</script>", "holds no text")])
def test_files_that_are_refused(tmp_path, name, data, told):
    with pytest.raises(ValueError, match=told):
        load_document(write(tmp_path, name, data))


def test_a_file_of_100_mb(tmp_path):
    path = tmp_path / "large.txt"
    with open(path, "wb") as file:
        file.truncate(100_000_000)
    with pytest.raises(ValueError, match="large.txt has 100 MB, more than the limit of 50 MB"):
        load_document(path)
    with pytest.raises(ValueError, match="binary"):                 # read when it is allowed
        load_document(path, max_bytes=100_000_000)


def test_what_a_folder_gives(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.html", ".hidden/d.txt", "sub/.e.txt", "f.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path, name, "x")
    assert [(name, named) for _, name, named in find_documents(tmp_path)] == [
        ("a.md", False), ("b.txt", False), ("sub/c.html", False)]
    both = find_documents([tmp_path / "f.png", tmp_path / "sub"])
    assert both[0][2] and both[1][1].endswith("sub/c.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no documents"):
        find_documents(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_documents(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="at least one"):
        find_documents([])


# ------------------------------------------------------------------ passages

def random_text(rng: random.Random) -> str:
    pieces = ["word", "a", "Long sentence with some words. ", ". ", "! ", "\n\n", "\n- item ", "\n1. ", "x" * 70, " ", "\n",
              "# Title\n", "```\n", "é☕", "<|im_end|>"]
    return "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 80)))


@pytest.mark.parametrize("size, overlap", [(20, 0), (20, 19), (60, 20), (600, 120)])
def test_passages_cover_the_text_and_obey_their_limits(size, overlap):
    rng = random.Random(size)
    for _ in range(150):
        text = random_text(rng)
        d = Document("s", text, markdown_headings(text))
        cut = chunk(d, size, overlap)
        seen = [False] * len(text)
        for before, p in zip([None, *cut], cut):
            assert text[p.start:p.end] == p.text and 0 < len(p.text) <= size and p.heading == d.heading(p.start)
            assert not any(p.start < at < p.end for at, _ in d.headings)
            if before:
                assert before.start < p.start and before.end - p.start <= overlap and before.end < p.end
            seen[p.start:p.end] = [True] * (p.end - p.start)
        assert all(ok or c.isspace() for ok, c in zip(seen, text))


def test_a_passage_ends_with_a_paragraph_where_it_can():
    text = "One two three four. Five six seven.\n\nEight nine. Ten eleven twelve thirteen fourteen."
    assert [p.text for p in chunk(Document("s", text), 60, 0)] == [
        "One two three four. Five six seven.", "Eight nine. Ten eleven twelve thirteen fourteen."]


def test_one_long_word_ends():
    assert [z - a for a, z, _ in split_units("x" * 1001, 0, 1001, 100)] == [100] * 10 + [1]


@pytest.mark.parametrize("size, overlap", [(0, 0), (10, 0), (50, 50), (50, -1)])
def test_bad_sizes(size, overlap):
    with pytest.raises(ValueError, match=f"size={size}.*overlap={overlap}"):
        chunk(Document("s", "text"), size, overlap)

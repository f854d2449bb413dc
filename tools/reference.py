"""The reference of the public API: one Markdown page for each module of the package, made from its text.

Nothing is imported: signatures and docstrings are read from minigpt/*.py. `pages()` is used by tools/site.py;

    python tools/reference.py FOLDER      writes the pages there
"""
from __future__ import annotations

import ast
import re
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIB = ROOT / "minigpt"
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
# A line of a docstring that explains an argument: "size: characters of a piece" or "k and v (..., S, D): keys".
ARGUMENT = re.compile(r"`?([A-Za-z_][\w.]*(?:(?:, | and |, and )[A-Za-z_][\w.]*)*)`?((?: \([^)]*\))?): (?=\S)")
OWN_PARAGRAPH = re.compile(r"(Returns?|Raises?|Yields?|Follows|Attributes?|Methods?|Needs|See|Paper)\b")


@dataclass
class Name:
    """A public function, class, method or constant: its anchor is its dotted name."""

    name: str
    signature: str
    doc: str
    bases: list[str] = field(default_factory=list)
    members: list[Name] = field(default_factory=list)


@dataclass
class Module:
    """A module's text: its line, the notebook that it comes from, its public names in order."""

    name: str
    doc: str
    notebook: str
    names: list[Name]


def arguments(node: ast.FunctionDef) -> tuple[str, str]:
    """The arguments of a function as its source has them, without self and cls, and what it returns."""
    args = node.args
    for group in (args.posonlyargs, args.args):
        group[:] = [a for a in group if a.arg not in ("self", "cls")]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return ast.unparse(args), returns


def wrapped(name: str, inside: str, returns: str = "", width: int = 92) -> str:
    """A signature on one line if it fits, else one argument a line."""
    if len(f"{name}({inside}){returns}") <= width:
        return f"{name}({inside}){returns}"
    parts, depth, start = [], 0, 0
    for i, c in enumerate(inside + ","):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and not depth:
            parts.append(inside[start:i].strip())
            start = i + 1
    return f"{name}(\n    " + ",\n    ".join(parts) + f"\n){returns}"


def function(node: ast.FunctionDef, prefix: str = "") -> Name:
    decorators = {ast.unparse(d) for d in node.decorator_list}
    doc = ast.get_docstring(node) or ""
    if "property" in decorators:
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return Name(prefix + node.name, f"{prefix}{node.name}{returns}", doc)
    kind = "async " * isinstance(node, ast.AsyncFunctionDef)
    return Name(prefix + node.name, kind + wrapped(prefix + node.name, *arguments(node)), doc)


def members(node: ast.ClassDef) -> list[Name]:
    """The public methods and properties of a class, and its attributes with a type, in order."""
    found = []
    for item in node.body:
        setter = any(ast.unparse(d).endswith(".setter") for d in getattr(item, "decorator_list", []))
        if isinstance(item, FUNCTION) and not item.name.startswith("_") and not setter:
            found.append(function(item, f"{node.name}."))
    return found


def klass(node: ast.ClassDef) -> Name:
    """A class with the arguments that make it: those of __init__, or the fields of a dataclass or tuple."""
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    bases = [ast.unparse(b) for b in node.bases]
    fields = [ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign) and not n.target.id.startswith("_")]
    if init is not None:
        signature = wrapped(node.name, arguments(init)[0])
    elif fields and (node.decorator_list or "NamedTuple" in bases):
        signature = wrapped(node.name, ', '.join(fields))
    else:
        signature = node.name
    return Name(node.name, signature, ast.get_docstring(node) or "", bases, members(node))


def read_module(path: Path) -> Module:
    """The public names (those of __all__) of a module, in the order of its text."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    exported, names = set(), []
    for node in tree.body:
        targets = getattr(node, "targets", [])
        if targets and isinstance(targets[0], ast.Name) and targets[0].id == "__all__":
            exported = set(ast.literal_eval(node.value))
    for node in tree.body:
        if isinstance(node, FUNCTION) and node.name in exported:
            names.append(function(node))
        elif isinstance(node, ast.ClassDef) and node.name in exported:
            names.append(klass(node))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            shown = ast.get_source_segment(text, node.value)
            several = isinstance(target, ast.Tuple)
            parts = isinstance(node.value, ast.Tuple) and several
            for i, one in enumerate(target.elts if several else [target]):
                value = ast.unparse(node.value.elts[i]) if parts else "..." if several or len(shown) > 1200 else shown
                if getattr(one, "id", "") in exported:
                    names.append(Name(one.id, f"{one.id} = {value}", ""))
    notebook = re.search(r"File to edit: \.\./nbs/(\S+\.ipynb)", text)
    return Module(path.stem, ast.get_docstring(tree) or "", notebook[1] if notebook else "", names)


def modules() -> list[Module]:
    """All modules with public names, in the order of the chapters."""
    found = [read_module(p) for p in sorted(LIB.glob("*.py")) if not p.name.startswith("_")]
    return sorted((m for m in found if m.names), key=lambda m: (m.notebook, m.name))


def front_door() -> dict[str, str]:
    """The names that `from minigpt import ...` knows, and the module of each."""
    tree = ast.parse((LIB / "__init__.py").read_text(encoding="utf-8"))
    homes = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "_HOMES")
    return ast.literal_eval(homes)


# ------------------------------------------------------------------ Markdown

def escaped(text: str) -> str:
    """Plain text for Markdown: its signs lose their meaning, code in backticks stays."""
    parts = re.split(r"(`[^`\n]+`)", text)
    return "".join(p if p.startswith("`") and len(p) > 1 else re.sub(r"([\\*_\[\]<>|$#~`^@{}])", r"\\\1", p) for p in parts)


def doc_markdown(doc: str) -> str:
    """A docstring as Markdown: paragraphs, a list of its explained arguments, and a block of code for its examples."""
    blocks: list[list[str]] = []         # ["p", "-" or "code", text]
    example = False
    for paragraph in doc.split("\n\n"):
        told = [line for line in paragraph.splitlines() if line.strip(" \b")]
        if told and told[0].strip() in ("Example:", "Examples:"):
            blocks.append(["p", told[0].strip()])
            example, told = True, told[1:]
        else:
            example = example and all(line.startswith("    ") for line in told)
        if example and told:
            code = textwrap.dedent("\n".join(told))
            if blocks[-1][0] == "code":
                blocks[-1][1] += f"\n{code}"
            else:
                blocks.append(["code", code])
            continue
        fresh = True
        for line in told:
            text = line.strip()
            argument = ARGUMENT.match(text)
            if argument and not line.startswith(" "):
                rest = escaped(text[argument.end():])
                names = re.sub(r"\b(?!and\b)[A-Za-z_][\w.]*", lambda m: f"`{m[0]}`", argument[1])
                blocks.append(["-", f"{names}{escaped(argument[2])}: {rest}"])
            elif fresh or OWN_PARAGRAPH.match(text) and not line.startswith(" "):
                blocks.append(["p", escaped(text)])
            else:
                blocks[-1][1] += " " + escaped(text)
            fresh = False
    lines, before = [], ""
    for kind, text in blocks:
        if lines and not (kind == before == "-"):
            lines.append("")
        lines.append({"-": f"- {text}", "code": f"```sh\n{text}\n```"}.get(kind, text))
        before = kind
    return "\n".join(lines)


def entry(name: Name, level: int) -> list[str]:
    parts = [f"{'#' * level} `{name.name.rpartition('.')[2] if level > 2 else name.name}` {{#{name.name}}}",
             f"```python\n{name.signature}\n```"]
    if name.doc:
        parts.append(doc_markdown(name.doc))
    return parts


def module_page(module: Module, home: dict[str, str], titles: dict[str, str]) -> str:
    """The page of a module. home: class -> module, for the links to base classes."""
    title = titles.get(module.notebook, module.notebook)
    parts = [f'---\ntitle: "minigpt.{module.name}"\n---',
             f"{escaped(module.doc.rstrip('.'))}{'.' * bool(module.doc)} Built, step by step, in "
             f"[{title}](../{module.notebook})." if module.notebook else escaped(module.doc)]
    for name in module.names:
        parts += entry(name, 2)
        known = [b for b in name.bases if b in home]
        if known:
            links = [f"[`{b}`]({home[b]}.md#{b})" for b in known]
            parts.append(f"Has all that {' and '.join(links)} has.")
        for member in name.members:
            parts += entry(member, 3)
    return "\n\n".join(parts) + "\n"


def index_page(found: list[Module], titles: dict[str, str]) -> str:
    """The page that lists all modules, the front door first."""
    lines = ['---\ntitle: "Reference"\ndescription: "Every public name of the package: signature, docstring, chapter"\n---',
             "", "## The front door {#front-door}", "",
             "`from minigpt import NAME` works for these; everything else is imported from its module.", "",
             "| name | module | what it is |", "|---|---|---|"]
    docs = {(m.name, n.name): n.doc.split("\n")[0] for m in found for n in m.names}
    for name, module in front_door().items():
        lines.append(f"| [`{name}`]({module}.md#{name}) | [`minigpt.{module}`]({module}.md) | "
                     f"{escaped(docs.get((module, name), ''))} |")
    lines += ["", "## All modules {#modules}"]
    for m in found:
        names = ", ".join(f"[`{n.name}`]({m.name}.md#{n.name})" for n in m.names)
        lines += ["", f"### [`minigpt.{m.name}`]({m.name}.md) {{#{m.name}}}", "",
                  f"From [{titles.get(m.notebook, m.notebook)}](../{m.notebook}): {names}"]
    return "\n".join(lines) + "\n"


def pages(titles: dict[str, str]) -> dict[str, str]:
    """File name -> Markdown, index.md first. titles: file name of a notebook -> its title."""
    found = modules()
    home = {name.name: module.name for module in found for name in module.names}
    return {"index.md": index_page(found, titles)} | {f"{m.name}.md": module_page(m, home, titles) for m in found}


def link_targets() -> dict[str, str]:
    """Names in backticks that chapters may link: classes, and functions with an underscore, that only one module has,
    and the front door's names -> "module.md#name"."""
    where: dict[str, list[str]] = {}
    for module in modules():
        for name in module.names:
            where.setdefault(name.name, []).append(module.name)
    front = front_door()
    found = {name: f"{homes[0]}.md#{name}" for name, homes in where.items() if len(homes) == 1 and
             (re.match(r"[A-Z][a-z]|[A-Z]+[a-z]", name) or "_" in name.strip("_") and not name.isupper())}
    return found | {name: f"{module}.md#{name}" for name, module in front.items() if name[0].isupper()}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for file, text in pages({}).items():
        (target / file).write_text(text, encoding="utf-8")

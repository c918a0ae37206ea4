"""Write the sources of the site: `python docs/prepare.py FOLDER`.

Notebooks, reports and modules are found, not listed, so that a new one needs no line here. A notebook of the site is the notebook of the
repository without what is meant for nbdev, with links where its text names another notebook.
"""

from __future__ import annotations

import json
import os
import pkgutil
import re
import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
_config = ConfigParser(delimiters=["="])
_config.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = _config["DEFAULT"]
NAME, REPOSITORY = SETTINGS["lib_name"], f"{SETTINGS['git_url']}/{{kind}}/{SETTINGS['branch']}/{{path}}"

ROOMS = {  # first digit of a library notebook -> heading
    "0": "Ground and data",
    "1": "Methods",
    "2": "Training",
    "3": "Experiments",
    "4": "The paper's report",
    "5": "Your own images",
    "6": "Toys for tests",
}
FIRST = "lifelong guide results paper own_tasks any_network own_method analysis mtl ablations differences".split()  # applications, in this order; then all others
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
DIRECTIVE = re.compile(r"^#\s*\|\s*([\w-]+)[: \t]*([^\n]*)\n?", re.M)
CODE = re.compile(r"(^(?P<fence>```+|~~~+).*?^(?P=fence)[ \t]*$)|(?P<ticks>`+)(?P<span>.+?)(?P=ticks)", re.M | re.S)
LINK = re.compile(r"(?P<before>!?\[(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*\]\()(?P<target>[^)\s]+)(?P<after>[^)]*\))")


def at_repository(path: str | Path) -> str:
    "Address of a file or folder of the repository where its code is hosted."
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return REPOSITORY.format(kind=kind, path=Path(path).as_posix())


class Book:
    "A notebook of the repository."

    def __init__(self, path: Path):
        self.path, self.at = path, path.relative_to(ROOT)  # `at` is also where its page lies in the site
        self.nb = nbformat.read(path, 4)
        text = "\n".join(c.source for c in self.nb.cells if c.cell_type == "markdown")
        found = re.search(r"^# (.+)$", text, re.M)
        if not found:
            raise SystemExit(f"{self.at} has no title: begin it with a line '# Title'.")
        tagline = re.search(r"^# .+\n+> (.+(?:\n> .+)*)", text, re.M)
        self.title = found[1].strip()
        self.tagline = tagline[1].replace("\n> ", " ") if tagline else ""
        code = "\n".join(c.source for c in self.nb.cells if c.cell_type == "code")
        module = re.search(r"^#\s*\|\s*default_exp\s+([\w.]+)", code, re.M)
        self.module = f"{NAME}.{module[1]}" if module else None

    @property
    def parameters(self) -> dict:
        "What papermill was told, without folders of the machine that it ran on."
        given = self.nb.metadata.get("papermill", {}).get("parameters", {})
        return {k: v for k, v in given.items() if not k.endswith("_dir")}


class Site:
    "What there is, and where on the site it lies."

    def __init__(self, out: Path):
        self.out = out
        books = [Book(p) for p in sorted((ROOT / "nbs").glob("*.ipynb")) if p.name != SETTINGS["readme_nb"]]
        rank = lambda b: (FIRST.index(b.at.stem) if b.at.stem in FIRST else len(FIRST), b.at.stem)
        self.library = [b for b in books if b.at.stem[0].isdigit()]
        self.applications = sorted((b for b in books if not b.at.stem[0].isdigit()), key=rank)
        self.reports = [Book(p) for p in sorted((ROOT / "reports").rglob("*.ipynb")) if not p.parent.name.startswith(".")]
        self.modules = modules()
        self.pages = {Path(k): Path(v) for k, v in PAGES.items()}  # of the repository -> of the site
        self.indexes = [p.relative_to(ROOT) for p in sorted((ROOT / "reports").rglob("README.md"))]
        self.pages |= {p: p.with_name("records.md") for p in self.indexes}
        self.pages |= {b.at: b.at for b in (*books, *self.reports)}
        self.names = {b.at.stem: b.at for b in books}  # `19_registry` in prose is a link to that notebook
        self.notebook_of = {b.module: b.at for b in self.library}

    # links

    def resolve(self, target: str, here: Path) -> str:  # `here`: the file of the repository that says so
        "A link as the site needs it: to a page, to a picture that is copied, or to the code host."
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return target
        file = Path(os.path.normpath(here.parent / path))
        if not (ROOT / file).exists():
            raise SystemExit(f"{here} links to '{target}', and there is no {file}.")
        page = self.pages.get(here, here)
        if file in self.pages:
            return self.relative(self.pages[file], page) + (f"#{anchor}" if anchor else "")
        if file.suffix in (".png", ".svg", ".jpg"):
            (self.out / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, self.out / file)
            return self.relative(file, page)
        return at_repository(file)

    def relative(self, target: Path, page: Path) -> str:
        return Path(os.path.relpath(target, page.parent)).as_posix()

    def named(self, span: str, here: Path) -> str | None:
        "The link for a piece of code in prose that names a notebook, a report or a folder of records."
        if span in self.names:
            target = self.names[span]
        elif re.fullmatch(r"(nbs|reports|tests|docs)/[\w./-]+", span) and (ROOT / span).exists():
            target = Path(span)
        else:
            return None
        if target == here:
            return None
        page = self.pages.get(here, here)
        return self.relative(self.pages[target], page) if target in self.pages else at_repository(target)

    def markdown(self, text: str, here: Path) -> str:
        "Prose with links that lead somewhere on the site."
        kept: list[str] = []

        def keep(code: str) -> str:
            kept.append(code)
            return f"\0{len(kept) - 1}\0"

        def code(m: re.Match) -> str:
            link = m["span"] and self.named(m["span"], here)
            inside_link = text[: m.start()].rpartition("\n")[2].rpartition("](")[2].count("[") > 0
            return keep(f"[{m[0]}]({link})" if link and not inside_link else m[0])

        text = CODE.sub(code, text)
        text = LINK.sub(lambda m: m["before"] + self.resolve(m["target"], here) + m["after"], text)
        return re.sub(r"\0(\d+)\0", lambda m: kept[int(m[1])], text)

    # pages

    def write(self, path: str | Path, text: str) -> None:
        (self.out / path).parent.mkdir(parents=True, exist_ok=True)
        (self.out / path).write_text(text, encoding="utf-8")

    def notebook(self, book: Book, above: str) -> None:
        "The page of a notebook; `above` is said under its title."
        nb = nbformat.v4.new_notebook(cells=list(filter(None, map(cleaned, book.nb.cells))))
        nb.metadata = dict(
            kernelspec=dict(name="python3", display_name="python3", language="python"),
            language_info=dict(name="python", pygments_lexer="ipython3"),
        )
        for i, cell in enumerate(nb.cells):
            cell["id"] = f"cell-{i}"
            if cell.cell_type == "markdown":
                cell.source = self.markdown(cell.source, book.at)
        first = next(c for c in nb.cells if c.cell_type == "markdown" and re.search("^# ", c.source, re.M))
        first.source = re.sub(r"^(# .+)$", lambda m: f"{m[1]}\n\n{above}", first.source, count=1, flags=re.M)
        (self.out / book.at).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, self.out / book.at)

    def listing(self, books: list[Book], page: Path, caption: str = "", labels: dict | None = None) -> str:
        "A list of notebooks with their taglines, and the entries for the sidebar."
        labels = labels or {}
        lines = [f"## {caption}\n"] if caption else []
        entries = []
        for b in books:
            label, link = labels.get(b.at, b.title), self.relative(b.at, page)
            lines.append(f"- **[{label}]({link})** `{b.at.stem}`" + (f": {b.tagline}" if b.tagline else ""))
            entries.append(f"{label} <{link.removesuffix('.ipynb')}>")
        option = f":caption: {caption}\n" if caption else ""
        return "\n".join([*lines, "", "```{toctree}", f":hidden:\n{option}", *entries, "```", ""]) + "\n"


def cleaned(cell: dict) -> dict | None:
    "A cell without nbdev's directives; None where they say that no reader wants it."
    cell = nbformat.from_dict(json.loads(json.dumps(cell)))
    if cell.cell_type == "raw":
        return None
    if cell.cell_type == "code":
        said = {m[1]: m[2].strip() for m in DIRECTIVE.finditer(cell.source)}
        hidden = "hide" in said or said.get("include") == "false"
        cell.source = DIRECTIVE.sub("", cell.source).strip("\n")
        if hidden or not cell.source and not cell.outputs:
            return None
        tags = set(cell.metadata.get("tags", []))
        tags |= {"remove-input"} if said.get("echo") == "false" else set()
        tags |= {"remove-output"} if said.get("output") == "false" else set()
        cell.metadata = dict(tags=sorted(tags)) if tags else {}
        if "fig-alt" in said:
            cell.metadata["mystnb"] = dict(image=dict(alt=said["fig-alt"]))
        cell.execution_count = None
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = None
    return cell


def modules() -> list[str]:
    "The package's modules, found by walking it."
    found = [NAME, *(m.name for m in pkgutil.walk_packages([str(ROOT / NAME)], f"{NAME}."))]
    return sorted(m for m in found if not m.rpartition(".")[2].startswith("_"))


def reference(site: Site) -> None:
    "A page for each module, and the list of them."
    titles = {b.module: b for b in site.library if b.module in site.modules}  # in reading order
    for module, book in titles.items():
        line = f"This is the reference of the notebook {{doc}}`{book.title} <../{book.at.with_suffix('').as_posix()}>`."
        page = f"# {module}\n\n{line}\n\n"
        page += f"```{{eval-rst}}\n.. automodule:: {module}\n```\n"
        site.write(f"reference/{module}.md", page)
    rows = "\n".join(f"| [{m}]({m}.md) | {site.markdown(titles[m].tagline, Path('reference/x'))} |" for m in titles)
    table = f"| module | what it holds |\n|---|---|\n{rows}\n"
    toctree = "\n".join(["```{toctree}", ":hidden:", "", *(f"{m.removeprefix(f'{NAME}.')} <{m}>" for m in titles), "```"])
    site.write("reference/index.md", f"# Reference\n\nEvery module is exported by one notebook.\n\n{table}\n{toctree}\n")


def main(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    site = Site(out)
    for page, new in site.pages.items():
        if page.suffix == ".md":
            text = site.markdown((ROOT / page).read_text(encoding="utf-8"), page)
            if page == Path("README.md"):
                sections = ["use/index", "read/index", "reports/index", "reference/index", "project"]
                text += "\n".join(["", "```{toctree}", ":hidden:", "", *sections, "```", ""])
            site.write(new, text)

    for book in (*site.library, *site.applications):
        source = f"The notebook [`{book.at}`]({at_repository(book.at)})"
        if book.module:
            about = f", which exports {{doc}}`{book.module} <../reference/{book.module}>`."
        else:
            rendered = [r for r in site.reports if r.at.stem.partition("-")[0] == book.at.stem]
            links = ", ".join(f"[`{r.at}`]({site.relative(r.at, book.at)})" for r in rendered)
            about = f". **With its results: {links}**" if links else ". It shows its results when it is run."
        site.notebook(book, f"<small>{source}{about}</small>")
    labels = {}
    for book in site.reports:
        said = "; ".join(f"{k} {v}" for k, v in book.parameters.items())
        labels[book.at] = f"{book.title}: {book.parameters['dataset']}" if "dataset" in book.parameters else f"{book.title} (report)"
        source = f"The report [`{book.at}`]({at_repository(book.at)})"
        original = site.names.get(book.at.stem) or site.names.get(book.at.stem.partition("-")[0])
        made = f", made from [`{original}`]({site.relative(original, book.at)})" if original else ""
        site.notebook(book, f"<small>{source}{made}{f' with {said}' if said else ''}.</small>")

    page = Path("read/index.md")
    text = "# Read it\n\nThe paper as running code, in reading order. Each notebook exports one module of the package.\n\n"
    digits = sorted({b.at.stem[0] for b in site.library})
    for d in digits:
        text += site.listing([b for b in site.library if b.at.stem[0] == d], page, ROOMS.get(d, "More"))
    site.write(page, text)
    page = Path("use/index.md")
    text = "# Use it\n\nNotebooks that are run, by papermill or by hand. Each does something sensible with the parameters that it comes with.\n\n"
    site.write(page, text + site.listing(site.applications, page))
    page = Path("reports/index.md")
    text = "# Reports\n\nRendered notebooks, as they are kept in the repository. Their records lie beside them.\n\n"
    text += site.listing(site.reports, page, labels=labels)
    records = [f"The records <{site.relative(site.pages[p], page).removesuffix('.md')}>" for p in site.indexes]
    site.write(page, text + "\n".join(["```{toctree}", "", *records, "```", ""]) if records else text)
    reference(site)
    project = "\n".join(["```{toctree}", "", "contributing", "changelog", "```"])
    site.write("project.md", f"# Project\n\nThe code is at <{SETTINGS['git_url']}>.\n\n{project}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

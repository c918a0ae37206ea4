"The pages of the site are what the notebooks say, less what is meant for nbdev; no link leads nowhere."

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_raw_cell

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
from check_links import dead_links
from prepare import SETTINGS, Book, Site, cleaned, main, modules


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    main(out)
    return out


def test_directives_and_what_they_hide_are_gone():
    assert cleaned(new_code_cell("#| default_exp core")) is None
    assert cleaned(new_code_cell("#| hide\nfrom fastcore.test import test_eq")) is None
    assert cleaned(new_raw_cell("---\nskip_exec: true\n---")) is None
    assert cleaned(new_code_cell("#| export\n\nx = 1  #| not one")).source == "x = 1  #| not one"
    assert cleaned(new_code_cell("#| echo: false\nshow()")).metadata.tags == ["remove-input"]
    shown = cleaned(new_code_cell("#| fig-alt: a line\nplot()"))
    assert shown.source == "plot()" and shown.metadata.mystnb.image.alt == "a line"
    assert cleaned(new_markdown_cell("#| is prose here")).source == "#| is prose here"


def test_every_notebook_and_report_has_its_page_and_stands_in_a_sidebar(written):
    books = {f.relative_to(ROOT) for part in ("nbs", "reports") for f in (ROOT / part).rglob("*.ipynb")}
    books -= {Path("nbs/index.ipynb")}  # README.md is made from it
    assert {f.relative_to(written) for f in written.rglob("*.ipynb")} == books
    listed = ["<../" + line for part in ("read", "use") for line in (written / part / "index.md").read_text().split("<../")]
    listed += ["<../reports/" + line for line in (written / "reports/index.md").read_text().split(" <")]
    for book in books:
        assert sum(line.startswith(f"<../{book.with_suffix('').as_posix()}>") for line in listed) == 1, book
    for page in written.rglob("*.ipynb"):
        for cell in nbformat.read(page, 4).cells:
            assert cell.cell_type == "markdown" or not cell.source.lstrip().startswith("#|"), page


def test_every_module_has_its_reference(written):
    exported = [Book(f).module for f in (ROOT / "nbs").glob("*.ipynb")]
    pages = {f.stem for f in (written / "reference").glob("*.md")} - {"index"}
    assert pages == set(filter(None, exported)) and pages <= set(modules())


def test_links_of_the_repository_become_links_of_the_site(tmp_path):
    site, here = Site(tmp_path), Path("README.md")
    name = site.library[0].at.stem
    assert site.markdown(f"see `{name}`", here) == f"see [`{name}`](nbs/{name}.ipynb)"
    assert site.markdown(f"```sh\n`{name}`\n```", here) == f"```sh\n`{name}`\n```"
    assert site.markdown(f"see `{name}`", site.library[0].at) == f"see `{name}`"  # not to itself
    assert site.markdown("[how](CONTRIBUTING.md)", here) == "[how](contributing.md)"
    assert site.markdown("[how](../README.md#start)", site.library[0].at) == "[how](../index.md#start)"
    assert site.markdown("[code](setup.py)", here).endswith("/blob/main/setup.py)")
    assert site.markdown("`reports`, `reports/full`", here).endswith("/tree/main/reports/full)")
    picture = next((ROOT / "reports").rglob("*.png")).relative_to(ROOT)
    assert site.markdown(f"![x]({picture})", here) == f"![x]({picture})" and (tmp_path / picture).exists()
    with pytest.raises(SystemExit, match="README.md links to 'nowhere.md'"):
        site.markdown("[x](nowhere.md)", here)


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "a.html").write_text("<a href='b.html#here'></a><a href='b.html#there'></a><img src='c.png'><a href='https://x.y/z'></a>")
    (tmp_path / "b.html").write_text("<h1 id='here'></h1><a href='a.html'></a>")
    assert dead_links(tmp_path) == ["a.html: b.html#there", "a.html: c.png"]


def test_the_main_notebook_opens_in_colab_from_where_the_code_is():
    where = re.findall(r"colab\.research\.google\.com/github/([^)\s\"]+\.ipynb)", (ROOT / "nbs/lifelong.ipynb").read_text())
    assert where == [f"{SETTINGS['user']}/{SETTINGS['repo']}/blob/{SETTINGS['branch']}/nbs/lifelong.ipynb"]
    (install,) = (c for c in nbformat.read(ROOT / "nbs/lifelong.ipynb", 4).cells if "%pip" in c.source)
    assert install.source.endswith(f"git+{SETTINGS['git_url']}@{SETTINGS['branch']}")

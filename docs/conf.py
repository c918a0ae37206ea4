"Settings of Sphinx. What the project is called stands in settings.ini; what the pages hold is written by prepare.py."

import inspect
import re
import sys
from pathlib import Path

from docutils.nodes import SkipNode
from fastcore.docments import docments
from latex2mathml.converter import convert
from sphinx.util import logging

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from prepare import SETTINGS

project, author = SETTINGS["title"], SETTINGS["author"]
copyright, release = SETTINGS["copyright"], SETTINGS["version"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # tables in what a cell displays, as in prose
suppress_warnings = ["myst.header"]  # a report may go from a title to a third level
templates_path, exclude_patterns = [], []

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = False  # what `delegates` adds to a signature has its defaults elsewhere than in the source
viewcode_follow_imported_members = False  # what `dfcnn.vision` passes on is shown where it is defined
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True

html_theme = "pydata_sphinx_theme"
html_title = "A paper as running code"  # after the title of each page
html_static_path = [str(Path(__file__).parent / "_static")]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_math_renderer = "mathml"
html_theme_options = {
    "logo": {"text": SETTINGS["title"]},
    "icon_links": [{"name": "Code", "url": SETTINGS["git_url"], "icon": "fa-brands fa-github"}],
    "navbar_align": "left",
    "navbar_persistent": ["search-button-field"],
    "navbar_end": ["theme-switcher", "navbar-icon-links"],
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "default",
    "pygments_dark_style": "github-dark",
}
html_sidebars = {"index": [], "contributing": [], "changelog": [], "project": []}


def plain(text: str) -> str:
    "A docstring of this package as reStructuredText: words are taken as they are, `code` as code."
    pieces = re.split(r"`([^`]+)`", text)
    escaped = (rf"``{p}``\ " if i % 2 else re.sub(r"([*|_\\])", r"\\\1", p) for i, p in enumerate(pieces))
    return "".join(escaped)  # the backslash ends the code where a letter follows, as in `Image`s


def from_elsewhere(method) -> bool:
    "Has this method its docstring from a class of another package (`Module.forward` of torch)?"
    if method.__doc__:
        return False
    cls = getattr(sys.modules[method.__module__], method.__qualname__.partition(".")[0], object)
    above = (c for c in cls.__mro__ if getattr(vars(c).get(method.__name__), "__doc__", None))
    return not next(above, object).__module__.startswith(SETTINGS["lib_name"])


def add_docments(app, what, name, obj, options, lines):
    "Comments beside parameters are their documentation (fastcore's docments)."
    if what == "method" and inspect.isfunction(obj) and from_elsewhere(obj):
        lines.clear()
    lines[:] = [plain(line) for line in lines]
    if what not in ("function", "method", "class"):
        return
    try:
        parameters = docments(obj, full=True, returns=what != "class")
    except (TypeError, ValueError, OSError, AttributeError):  # nothing to be read
        return
    fields = []
    for parameter, about in parameters.items():
        if parameter == "self" or not about.docment:
            continue
        said = plain(" ".join(about.docment.split()))
        fields.append(f":returns: {said}" if parameter == "return" else f":param {parameter}: {said}")
    bases = [b for b in getattr(obj, "__bases__", ()) if what == "class" and b is not object]
    names = (f":py:class:`~{b.__module__}.{b.__qualname__}`" for b in bases)
    lines += ["", *([f"Extends {', '.join(names)}."] if bases else []), "", *fields, ""]


def visit_math(self, node):
    "An equation as MathML, which browsers draw by themselves: no script, no font from elsewhere."
    latex, block = node.astext().strip(), node.tagname == "math_block"
    tag = re.search(r"\\tag\{(.+?)\}", latex)
    markup = convert(latex.replace(tag[0], "") if tag else latex, display="block" if block else "inline")
    if "\\" in markup:
        logging.getLogger(__name__).warning("not understood as an equation: %s", latex, location=node)
    if block:
        number = f'<span class="eqno">({tag[1]})</span>' if tag else ""
        self.body.append(f'<div class="math">{markup}{number}</div>')
    else:
        self.body.append(f'<span class="math">{markup}</span>')
    raise SkipNode


def setup(app):
    app.connect("autodoc-process-docstring", add_docments)
    app.add_html_math_renderer("mathml", inline_renderers=(visit_math, None), block_renderers=(visit_math, None))

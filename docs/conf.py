"""Builds the site: ``sphinx-build -W -b html docs docs/_build/html``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from sphinx.ext.autodoc.mock import mock

import frpc

if TYPE_CHECKING:
    from sphinx.application import Sphinx

HERE = Path(__file__).parent

project = "frpc"
author = "the authors of frpc"
version = release = frpc.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "examples", "site/front.md"]
suppress_warnings = ["myst.header"]  # generated pages may begin below level 1

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4  # links to #headings, as GitHub makes them

autodoc_mock_imports = ["lightning"]  # large, and only one class is derived from it
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
python_display_short_literal_types = True
napoleon_custom_sections = [("Shapes", "params_style"), "Exact when", "Source", "Units"]
napoleon_use_ivar = True  # attributes of a class stand in one list
default_role = "code"  # `name` in a docstring is code

html_theme = "furo"
html_title = "frpc"
html_static_path = ["site/static"]
html_css_files = ["frpc.css"]
html_show_sphinx = html_show_copyright = False
html_copy_source = False  # the front page and the guide have no source file of their own
copybutton_prompt_text = "$ "
copybutton_exclude = ".linenos, .gp, .go"

# Some public names are attributes of frpc that load a module stored elsewhere: frpc.cam is frpc.attribution.cam. Under
# these names autodoc finds them as modules, and shows the names that users write.
with mock(autodoc_mock_imports):
    for name in frpc.__all__:
        if isinstance(value := getattr(frpc, name), ModuleType):
            sys.modules.setdefault(f"frpc.{name}", value)


def front_page_and_guide(app: Sphinx, docname: str, source: list[str]) -> None:
    """Makes site/front.md the front page, and docs/index.md, which GitHub shows first, a page of its own: site/guide."""
    if docname == "index":
        source[0] = (HERE / "site" / "front.md").read_text(encoding="utf-8")
        return
    if docname == "site/guide":
        text = (HERE / "index.md").read_text(encoding="utf-8").replace("# frpc\n", "# Using frpc\n", 1)
        text = text.replace("](../README.md)", "](index.md)")
        source[0] = re.sub(r"\]\((?!https?:|#)", "](../", text)
    else:
        source[0] = re.sub(r"\]\((\.\./)?index\.md", rf"]({'../' * docname.count('/')}site/guide.md", source[0])


def readable(*event: object) -> tuple[str | None, str | None]:
    """A default that is made for each object is no Python; without it a signature is laid out like the others."""
    *_, signature, returned = event
    return signature and signature.replace("<factory>", "..."), returned


def setup(app: Sphinx) -> None:
    app.connect("source-read", front_page_and_guide)
    app.connect("autodoc-process-signature", readable)

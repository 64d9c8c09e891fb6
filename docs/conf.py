"""Sphinx's settings of the site that ``notebooks/build.py --site OUT`` makes."""

import re
from pathlib import Path

import ziamath
from docutils.nodes import SkipNode
from math_core import LatexToMathML

project = html_title = "cpnb"
extensions = ["myst_nb", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
root_doc, exclude_patterns = "README", ["**/__*"]
nb_execution_mode, nb_merge_streams = "off", True
nb_code_prompt_show = nb_code_prompt_hide = "Solution"
nb_ipywidgets_js = {}  # the default is on the network
myst_enable_extensions, myst_heading_anchors = ["amsmath", "dollarmath"], 3
default_role, maximum_signature_line_length = "py:obj", 72  # `name` in a docstring
autodoc_member_order, autodoc_preserve_defaults = "bysource", True
html_theme, html_css_files, html_math_renderer = "furo", ["site.css"], "mathml"
html_static_path = ["site.css", str(Path(ziamath.__file__).parent / "fonts")]
html_copy_source = html_use_index = html_domain_indices = False
html_show_search_summary = False  # it reads other pages, which is forbidden on disk


def setup(app):
    """Register what turns formulas and docstrings into what Sphinx reads."""
    app.add_html_math_renderer("mathml", (_formula, None), (_formula, None))
    app.connect("autodoc-process-docstring", _keep_bars)


def _formula(visitor, node):
    block = node.tagname == "math_block"
    text = LatexToMathML().convert_with_local_state(node.astext(), displaystyle=block)
    visitor.body.append(f'<div class="math">{text}</div>' if block else text)
    raise SkipNode


def _keep_bars(app, what, name, obj, options, lines):  # |x| is an absolute value here
    bar = re.compile(r"(``.*?``)|\|")
    lines[:] = [bar.sub(lambda match: match[1] or r"\|", line) for line in lines]

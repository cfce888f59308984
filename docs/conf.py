"""Configuration of Sphinx; `docs/development.md` has the command."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"

project = "hero_jax"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are stored with their outputs

html_theme = "sphinx_book_theme"
html_title = "hero_jax"
html_static_path = ["_static"]
html_css_files = ["hero_jax.css"]
html_show_sourcelink = False
html_theme_options = {
    "footer_content_items": [],
    "navbar_persistent": [],
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}

default_role = "literal"  # of single backticks in docstrings
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 72
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Types that signatures name as the source does: ours are in api/types.rst.
ALIASES = ("AxisName", "Bits", "ConvGeneralDilated", "Directions")
ALIASES += ("GradFn", "Grads", "LogitsFn", "Mask", "Matrix", "Offsets", "Params")
ALIASES += ("Perturbation", "Product", "StatsFn")
OUTSIDE = ("chex.Array", "chex.ArrayTree", "chex.Numeric", "chex.PRNGKey", "jax.Array")
OUTSIDE += ("nn.Module", "np.dtype", "np.ndarray", "optax.Schedule")
OUTSIDE += ("optax.GradientTransformationExtraArgs",)
autodoc_type_aliases = {name: name for name in ALIASES + OUTSIDE}
STANDARD = r"collections\.abc|numpy|os|pathlib|typing"
PACKAGES = "chex|flax|jax|matplotlib|nn|np|optax"
VARIABLES = r"~?(hero_jax\.[\w.]*\.)?(Outputs|P|T)"
nitpick_ignore_regex = [("py:.*", rf"({STANDARD}|{PACKAGES})\..*|{VARIABLES}")]


def without_fields(
    app: Any, what: str, name: str, value: Any, skip: bool, options: Any
) -> bool | None:
    """Skip the fields of named tuples: the text of the class has them already."""
    del app, what, name, skip, options
    return True if type(value).__name__ == "_tuplegetter" else None


def types_as_written(
    app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Name the types of attributes as the source does: napoleon evaluates them."""
    del app, what, name, options
    for i, line in enumerate(lines):
        if match := re.match(r":vartype (\w+): ", line):
            written = vars(value)["__annotations__"][match[1]]
            lines[i] = match[0] + getattr(written, "__forward_arg__", written)


def short_signature(
    app: Any,
    what: str,
    name: str,
    value: Any,
    options: Any,
    arguments: str,
    returns: str,
) -> tuple[str, str] | None:
    """Leave out of a Flax module's arguments what all of them have."""
    del app, what, name, value, options
    if arguments is None or ", parent=<flax" not in arguments:
        return None
    arguments = re.sub(r", parent=<flax.*", ")", arguments)
    return re.sub(r"<class 'jax\.numpy\.(\w+)'>", r"jnp.\1", arguments), returns


def fetch_pages() -> None:
    """Copy notebooks and reports of the examples to where Sphinx looks for pages."""
    for name in ("notebooks", "reports"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    for path in EXAMPLES.glob("notebooks/*.ipynb"):
        (HERE / "notebooks").mkdir(exist_ok=True)
        shutil.copy2(path, HERE / "notebooks")
    for path in (EXAMPLES / "results").glob("**/report.md"):
        page = HERE / "reports" / path.relative_to(EXAMPLES / "results")
        shutil.copytree(path.parent, page.parent, dirs_exist_ok=True)
        page.write_text(f"---\norphan: true\n---\n\n{path.read_text()}")


def link_to_pages(app: Any, docname: str, source: list[str]) -> None:
    """Let links to notebooks and reports of the examples lead to their pages."""
    del app, docname
    text = source[0].replace("](../examples/notebooks/", "](notebooks/")
    report = r"\]\(\.\./examples/results/([\w/]+/report\.md\))"
    source[0] = re.sub(report, r"](reports/\1", text)


def tidy(app: Any, doctree: Any) -> None:
    """Mend what Sphinx makes of doctests, attributes and cells of tables."""
    from docutils import nodes

    del app
    for block in doctree.findall(nodes.literal_block):
        if block.astext().startswith(">>>"):
            block.rawsource = block.astext().rstrip()
            block.clear()
            block += nodes.Text(block.rawsource)
    for name in doctree.findall(nodes.field_name):
        if name.astext() == "Variables":
            name.clear()
            name += nodes.Text("Attributes")
    for cell in doctree.findall(nodes.entry):
        for text in list(cell.findall(nodes.Text)):
            text.parent.replace(text, nodes.Text(text.replace(" ± ", "\xa0±\xa0")))


def setup(app: Any) -> None:
    """Prepare what the pages are made of."""
    from sphinx.util import inspect

    inspect.TypeAliasForwardRef.__repr__ = lambda alias: alias.name  # in unions
    sys.path.insert(0, str(HERE.parent))
    fetch_pages()
    app.connect("autodoc-process-docstring", types_as_written)
    app.connect("autodoc-process-signature", short_signature)
    app.connect("autodoc-skip-member", without_fields)
    app.connect("source-read", link_to_pages)
    app.connect("doctree-read", tidy)

"""The documentation as a site: `make docs`."""

project = "looktwice"
copyright = "the looktwice authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = "looktwice"
myst_heading_anchors = 3
exclude_patterns = ["_site"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
default_role = "code"
suppress_warnings = ["misc.highlighting_failure"]

# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Sphinx configuration. `make docs` builds the site in outputs/docs."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import generate_reference

import vtlmm


generate_reference.write_pages(Path(__file__).parent / "reference")

project = "VT-LMM"
author = "The VT-LMM authors"
copyright = f"2026, {author}"
version = release = vtlmm.__version__

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# Links to files outside docs/ work in the repository. tests/test_docs.py checks all of them.
suppress_warnings = ["myst.xref_missing"]

html_theme = "furo"
html_title = f"VT-LMM {version}"

# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""VT-LMM: vision-language models whose image positions are supervised too."""

__version__ = "0.2.0.dev0"

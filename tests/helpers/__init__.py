# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Helpers that several test files use."""

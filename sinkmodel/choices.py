"""Choices that several settings and options share, as types; `checks` lists and checks their values."""

from __future__ import annotations

from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]
Positions = Literal["cache", "text"]  # of cached keys: numbered within the cache, or as in the text
Convention = Literal["inclusive", "paper"]  # a query sees C keys, its own included, or C + 1

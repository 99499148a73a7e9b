"""The names of the memories that the commands measure."""

from __future__ import annotations

PUBLISHED = {"snapkv-as-published": "snapkv", "h2o-as-published": "h2o"}  # a set for each query head; the class
NAMM = "namm"
STREAMS = ("window", "sink", "recompute")
ALONE = ("snapkv", "h2o", "tova", "expected-attention", "gemfilter")
NAMES = ("dense", *STREAMS, *ALONE, *PUBLISHED, NAMM)

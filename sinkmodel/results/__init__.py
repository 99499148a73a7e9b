"""The results of `sink-eval` as typed records, one file for each kind, and their files as JSON (`files`)."""

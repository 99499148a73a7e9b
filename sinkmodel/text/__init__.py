"""Read text from files. All commands use this reader.

`documents` reads a file as documents, `json_lines` as objects. Both use `content`, which yields a file's bytes,
uncompressed and checked. `search` finds the files of a folder or pattern.
"""

from sinkmodel.text.documents import DocumentReader, NoText, read_documents
from sinkmodel.text.json_lines import read_json_lines
from sinkmodel.text.search import Found, find_text_files

__all__ = ["DocumentReader", "Found", "NoText", "find_text_files", "read_documents", "read_json_lines"]

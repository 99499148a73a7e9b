"""A double of the Hugging Face Hub: a server on 127.0.0.1, in memory, that huggingface_hub takes for the real one.

It has repositories with branches, tags and commits, large files by checksum (LFS; not Xet), tokens with rights, and the
troubles of a network, on demand. `serving_hub()` starts one; the fixture `hub` also turns this process to it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.hub.server import LARGE, Handler
from tests.hub.state import READ_ONLY, TOKEN, File, Hub, Repository

__all__ = ["READ_ONLY", "TOKEN", "File", "Hub", "Repository", "hub", "serving_hub", "upload"]


@contextlib.contextmanager
def serving_hub() -> Iterator[Hub]:
    hub = Hub()
    handler = type("HandlerOfThisHub", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub, and this process turned to it, with a token that may write to `me` and `org` and an empty cache.

    huggingface_hub reads the environment once, when it is imported; so what it made of it is changed too.
    """
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http

    home = tmp_path_factory.mktemp("hugging-face")
    with serving_hub() as served:
        for name, text in served.environment.items():
            monkeypatch.setenv(name, text)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for name, value in {
            "ENDPOINT": served.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": served.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        # Clients that were made once, and the folder for code of the Hub, as of custom_generate.
        monkeypatch.setattr(hf_api.api, "endpoint", served.endpoint)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(home / "modules"))
        at_once = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
        for module in (_http, file_download):
            monkeypatch.setattr(module, "time", at_once)  # no pause between two attempts
        yield served


def upload(hub: Hub, name: str, folder: Path, revision: str = "main") -> Repository:
    """A folder put on the Hub with no command of ours: what a test of loading starts from."""
    files = {
        str(path.relative_to(folder)): File(path.read_bytes(), path.name.endswith(LARGE))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    repository = hub.repositories.setdefault(name, Repository())
    repository.commit(files, "a folder", branch=revision)
    return repository

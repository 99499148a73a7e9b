"""Loading the model that a command measures, and naming the device that it is measured on."""

from __future__ import annotations

import argparse
import threading

import torch

from sinkmodel.console import say
from sinkmodel.loading import LoadedModel, load_model


def load(options: argparse.Namespace, name: str | None = None) -> LoadedModel:
    """Load the model `name` (None: --model) in --dtype on --device; report the loading if it takes over 5 seconds."""
    name = options.model if name is None else name
    patience = threading.Timer(5.0, say, [f"loading {name}"])
    patience.start()
    try:
        loaded = load_model(name, options.dtype, options.device)
    finally:
        patience.cancel()
    if loaded.borrowed:
        say(f"{name}: its tokenizer puts {' '.join(loaded.borrowed)} in front of every text; it is not scored")
    return loaded


def device_name(loaded: LoadedModel) -> str:
    """The name of the GPU, or of the device if it is not a GPU."""
    device = loaded.model.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)

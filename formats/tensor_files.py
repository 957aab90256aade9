"""safetensors files that others may read as umask says: the library itself writes them for their owner alone (0600)."""

import os
from pathlib import Path

import safetensors.torch


def save_file(tensors, path, metadata=None):
    """safetensors' save_file, with the mode that open() would give."""
    safetensors.torch.save_file(tensors, path, metadata)
    _as_umask_says(path)


def open_to_others(folder):
    """The same for what transformers has written somewhere in `folder`."""
    for path in Path(folder).rglob("*.safetensors"):
        _as_umask_says(path)


def _as_umask_says(path):
    umask = os.umask(0o077)  # there is no other way to read it
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)

"""Tensors and files: read into memory of their own, and written so that others may read them as umask says.

On a CPU the libraries give tensors that are a file's bytes, mapped.  Whoever overwrites the file then changes the
weights of a run, and whoever shortens it ends the run (SIGBUS).  And what they write is for its owner alone (0600).
"""

import os
from contextlib import suppress
from pathlib import Path

import safetensors.torch


def load_file(path):
    """safetensors' load_file, {name: tensor on the CPU}, that the file can no longer change."""
    check_readable(path)
    tensors = safetensors.torch.load_file(path)
    for name in tensors:
        tensors[name] = tensors[name].clone()
    return tensors


def check_readable(path):
    """Raise PermissionError for a file of somebody else's, of which safetensors says that it is not there."""
    with suppress(FileNotFoundError, IsADirectoryError), open(path, "rb"):
        pass


def unmap(model):
    """Give the weights of a model that are bytes of a file memory of their own, one by one; returns the model."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.untyped_storage().resizable():  # not torch's own memory
            tensor.data = tensor.data.clone()
    return model


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

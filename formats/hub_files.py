"""Where a model or a dataset comes from that is no file or folder here: Hugging Face's hub, or ModelScope.

transformers and `datasets` ask Hugging Face's hub (HF_ENDPOINT: a mirror of it) by themselves, and where it does not
answer again and again, for a minute.  So it is asked here first, once; without an answer they look into their cache
alone.  From ModelScope (--hub modelscope, MODELSCOPE_ENDPOINT) files are downloaded, into its own cache.
"""

import contextlib
import functools
import io
import logging
import os
import sys
import threading
from pathlib import Path

from formats.user_errors import UserError

HUBS = "huggingface", "modelscope"
SECONDS = 5  # that a hub may take for its first answer
WEIGHTS = ["*.safetensors", "*.bin"]
NEVER_READ = ["*.gguf", "*.onnx", "*.pth", "*.pt", "*.h5", "*.msgpack", "original/*", "onnx/*"]  # of models

_hub = HUBS[0]


class HubError(UserError):
    """A name that no hub gives files for: one sentence for the user."""


def use(hub):
    """Take what is no folder here from this one of HUBS, in all of this process."""
    global _hub
    _hub = hub


def local(name, kind="model", weights=True, part=None):
    """What to load `name` from: itself, where it lies here or the clients of Hugging Face's hub fetch it; else the
    folder it was downloaded to.  Raises HubError.

    kind: model or dataset; weights: of a model too, not only what is small; part: the only folder of a dataset wanted.
    """
    if _exists(name):
        return name
    if is_path(name):
        raise HubError(f"there is no folder {name}: check the path")
    if _hub == "modelscope":
        return _from_modelscope(name, kind, weights, part)
    silence()
    return name


def is_path(name):
    """Whether a name can only be one on this machine: of a hub it is NAME or OWNER/NAME."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def unanswered(name):
    """Why `name` was not found, and what to do, where its hub did not answer; None: that is not why."""
    return None if _exists(name) or _hub == "modelscope" else silence()


@functools.cache
def silence():
    """Ask Hugging Face's hub whether it is there: a sentence where it does not answer, and then nobody asks it again.

    None: it answers, or is not to be asked (HF_HUB_OFFLINE).
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return None
    reason = _no_answer(get_session().head, constants.ENDPOINT)
    if reason is None:
        return None
    os.environ["HF_HUB_OFFLINE"] = "1"  # for what is imported later
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return (
        f"it is not in the cache, and {constants.ENDPOINT} does not answer ({reason}): set HF_ENDPOINT to a mirror, "
        "pass --hub modelscope to have it from ModelScope, or name a file or folder"
    )


def _no_answer(head, url):
    """Why `url` gives no answer to head(url, timeout=...), in words; None: it gives one."""
    outcome = []  # of the thread: one sentence, or None

    def ask():
        try:
            status = head(url, timeout=SECONDS).status_code
            outcome.append(f"status {status}, a gateway's" if status in (502, 503, 504) else None)
        except Exception as error:  # of httpx or requests
            text = " ".join(str(error).split())
            outcome.append(text if 0 < len(text) < 80 else type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)  # no timeout of theirs covers the look-up of the name
    thread.start()
    thread.join(SECONDS + 1)
    return outcome[0] if outcome else f"nothing within {SECONDS} s"


@functools.cache
def _from_modelscope(name, kind, weights, part):
    try:
        from modelscope_hub import get_default_config
        from modelscope_hub.compat.snapshot_download import snapshot_download
    except ImportError:
        advice = "bash setup.sh modelscope, or pip install modelscope-hub"
        raise HubError(f"{name} is to come from ModelScope, and what downloads it is missing: {advice}") from None
    import requests

    logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)  # it logs what it raises
    endpoint = get_default_config().endpoint
    silent = _silence_of_modelscope(endpoint, requests.head)
    wanted = {"allow_patterns": ["README.md", "*.json", f"{part}/*"]} if part else {}
    unread = []
    if kind == "model":
        unread = NEVER_READ if weights else NEVER_READ + WEIGHTS
    bars = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with bars:
            return snapshot_download(
                name, repo_type=kind, ignore_patterns=unread, local_files_only=bool(silent), **wanted
            )
    except Exception as error:
        if silent:
            reason = f"it is not in the cache, and {endpoint} does not answer ({silent})"
        else:
            reason = str(error).partition("\n")[0][:150].strip() or type(error).__name__
        advice = "check the name, set MODELSCOPE_ENDPOINT, or name a file or folder"
        raise HubError(f"no {kind} {name} from ModelScope ({reason}): {advice}") from None


@functools.cache
def _silence_of_modelscope(endpoint, head):
    return _no_answer(head, endpoint)


def _exists(name):
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long for a path, or in a folder that is not to be entered
        return False

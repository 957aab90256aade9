#!/usr/bin/env bash
# Makes .venv, or finds it whole and leaves at once.  Every other script runs .venv/bin/python.
#   bash setup.sh                      what the scripts need: torch, transformers, safetensors, tokenizers
#   bash setup.sh dev                  tests and linters too (any extras of pyproject.toml, by name)
#   PYTHON=python3.12 bash setup.sh    makes .venv from this interpreter instead of python3
# If that interpreter has a torch in range, .venv borrows its packages (they are read, never changed) and installs
# only what is missing.  A .venv that is not whole (a killed installation, an interpreter gone) is made again.
set -euo pipefail
cd "$(dirname "$0")"
py=.venv/bin/python
fail() { echo "setup.sh: $1" >&2; exit 2; }
case " $* " in *" --help "* | *" -h "*) sed -n -e 1d -e '/^[^#]/q' -e 's/^# \{0,1\}//p' "${0##*/}" && exit ;; esac
case $OSTYPE in # Git's bash: a .venv has Scripts there and no bin, by which all scripts call it
  msys* | cygwin*) fail "on Windows use WSL, or the lines for Windows in README.md, which need no bash" ;;
esac

# A stamp is written when an installation has ended well; it holds the requirements that were installed.
key=$(cat requirements.txt pyproject.toml | cksum)
has() { [ "$(cat ".venv/$1.stamp" 2>/dev/null)" = "$key" ]; }
alive() {
  [ -e .venv/core.stamp ] && "$py" -c 'import importlib.util, sys
sys.exit(not all(map(importlib.util.find_spec, ("pip", "torch", "transformers", "safetensors", "tokenizers"))))' 2>/dev/null
}
done_already() { alive && for set in core "$@"; do has "$set" || return 1; done; }
if done_already "$@"; then exit 0; fi

# Two calls at once: the second waits.
if command -v flock >/dev/null; then exec 9<setup.sh && flock 9; fi
if done_already "$@"; then exit 0; fi

if ! alive; then
  names=(python3 python3.13 python3.12 python3.11 python3.10)
  if [ -n "${PYTHON:-}" ]; then names=("$PYTHON"); fi
  for name in "${names[@]}"; do
    python=$("$name" -c 'import sys; print(sys.executable) if sys.version_info >= (3, 10) else sys.exit(1)' 2>/dev/null) && break
  done
  [ -n "${python:-}" ] || fail "no Python 3.10 or newer found: install one, or set PYTHON=/path/to/python3"
  case $python in "$PWD"/.venv/*) fail "deactivate .venv first: it is not whole and has to be made again" ;; esac
  echo "setup.sh: making .venv from $python"
  rm -rf .venv
  "$python" -m venv .venv >/dev/null 2>&1 ||
    fail "$python cannot make a .venv: install its venv module (Debian, Ubuntu: apt install python3-venv) or set PYTHON"
  # A .pth file and not --system-site-packages: it works for the packages of a venv or conda environment as well.
  "$python" - >.venv/borrowed.pth 2>/dev/null <<'PYTHON' || rm .venv/borrowed.pth
import sys, torch
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
    sys.exit(1)
print("\n".join(path for path in sys.path if path.endswith(("site-packages", "dist-packages"))))
PYTHON
  if [ -e .venv/borrowed.pth ]; then
    echo "setup.sh: .venv borrows the packages of $python"
    cp .venv/borrowed.pth "$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
  fi
fi

# uv is faster, but it knows neither pip's settings (a mirror, a proxy) nor borrowed packages.
install() {
  if command -v uv >/dev/null && [ -z "$("$py" -m pip config list)" ] && [ ! -e .venv/borrowed.pth ]; then
    uv pip install --python "$py" "$@" && return
    echo "setup.sh: uv did not manage it, now with pip"
  fi
  "$py" -m pip install --quiet --no-input --disable-pip-version-check "$@" ||
    fail "packages could not be installed: check the network, the disk and pip's index (pip config list), run it again"
}

if ! has core; then
  echo "setup.sh: installing torch, transformers, safetensors, tokenizers"
  if [ -e .venv/borrowed.pth ]; then
    install "torch>=2.9" "transformers>=5.0" safetensors tokenizers  # what is in range stays
  else
    install -r requirements.txt
  fi
  "$py" -c 'from transformers import Qwen3ForCausalLM' ||
    fail "the packages do not load (see above): set PYTHON to another interpreter and remove .venv"
  echo "$key" >.venv/core.stamp
fi
for extra in "$@"; do
  if has "$extra"; then continue; fi
  echo "setup.sh: installing the extra $extra"
  lines=$("$py" - "$extra" <<'PYTHON'
import sys
try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print("\n".join(extras.get(sys.argv[1]) or sys.exit(f"setup.sh: no extra {sys.argv[1]}, only {', '.join(extras)}")))
PYTHON
  ) || exit 2
  printf '%s\n' "$lines" >.venv/extra.txt
  "$py" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >.venv/torch.txt
  install -r .venv/extra.txt -c .venv/torch.txt # torchvision would bring another torch along, of gigabytes
  if [ "$extra" = vision ] && ! "$py" -c 'import torchvision' 2>/dev/null; then
    "$py" -m pip uninstall --quiet --yes --disable-pip-version-check torchvision
    echo "setup.sh: pip's index has no torchvision for this torch; LLaVA, LLaVA-Next and Idefics3 need none"
  fi
  echo "$key" >".venv/$extra.stamp"
done
echo "setup.sh: .venv is ready"

#!/bin/sh
# Makes (or completes) a virtual environment with exactly the pinned packages: setup-venv.sh FOLDER PINS
# The file FOLDER/.ready appears last, so an interrupted set-up is simply done again.
set -eu
venv=$1
pins=$2
python=${PYTHON:-python3}

stop() { printf 'set-up: %s\n' "$*" >&2; exit 1; }

command -v "$python" >/dev/null 2>&1 || stop "no '$python' found; install Python 3.11 or newer (Debian: apt install python3 python3-venv), or set PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || stop "$("$python" --version) is too old; vmjepa needs Python 3.11 or newer: set PYTHON=/path/to/it"
"$python" -c 'import venv, ensurepip' 2>/dev/null \
  || stop "Python's venv module is missing; on Debian and Ubuntu: apt install python3-venv"
case "$(uname -s)-$(uname -m)" in
  Linux-x86_64 | Linux-aarch64) ;;
  *) stop "$(uname -s) on $(uname -m) is not supported (the video decoder DALI comes for Linux only); use a Linux machine or container" ;;
esac

# make calls this when a date changed (a checkout does that); only changed contents matter
state=$(cat "$pins" pyproject.toml "$0" | sha256sum)
if [ "$(cat "$venv/.ready" 2>/dev/null)" = "$state" ]; then
  touch "$venv/.ready"
  exit 0
fi

say() { printf 'set-up: %s\n' "$*"; }
say "installing the packages of $pins into $venv (2.4 GB with a CPU build of torch; minutes, once)"
rm -f "$venv/.ready"
# a venv that a moved folder or a removed Python has broken is made anew
if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
  rm -rf "$venv"
  "$python" -m venv "$venv"
fi

install() { "$venv/bin/pip" install --quiet --disable-pip-version-check "$@" || stop "pip could not install the packages (see above); check the network, a proxy (https_proxy) and free disk space, then run make again"; }

# DeepSpeed's source build looks for torch, so it comes second and sees this environment
others=$(mktemp)
trap 'rm -f "$others"' EXIT
grep -v '^deepspeed==' "$pins" > "$others"
install -r "$others"
DS_BUILD_OPS=0 install --no-build-isolation --no-deps "$(grep '^deepspeed==' "$pins")"
install --no-build-isolation --no-deps --editable .
printf '%s\n' "$state" > "$venv/.ready"

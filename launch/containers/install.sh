#!/bin/sh
# What the Dockerfile and nystrom.def both do, as root, on Debian, Ubuntu or an official image of Python:
#     install.sh system                   a compiler, libraries for InfiniBand, and Python if the base has none
#     install.sh dependencies FOLDER      what pyproject.toml in FOLDER asks for, as constraints.txt pins it
#     install.sh project FOLDER           the project itself
# EXTRAS='zstd,dedup' adds extras. pip's settings (PIP_INDEX_URL, /etc/pip.conf) are read and kept nowhere.
set -eu
VENV=${VENV:-/opt/nystrom}
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1

usable() { python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; }

system() {
    export DEBIAN_FRONTEND=noninteractive
    # torch.compile and DeepSpeed's CPU optimizers compile upon first use. NCCL finds InfiniBand by these libraries.
    packages="g++ libibverbs1 ibverbs-providers librdmacm1 ca-certificates"
    usable || packages="$packages python3 python3-venv python3-dev"
    apt-get update
    # shellcheck disable=SC2086  # a list of words
    apt-get install -y --no-install-recommends $packages
    rm -rf /var/lib/apt/lists/* /var/cache/apt/archives/*.deb /var/log/apt /var/log/dpkg.log
    usable || { echo "install.sh: the base image has no Python 3.11 or newer: take a newer base" >&2; exit 2; }
}

dependencies() {
    requirements=$(mktemp)
    python3 - "$1/pyproject.toml" "${EXTRAS:-}" > "$requirements" << 'END'
import sys, tomllib

project = tomllib.load(open(sys.argv[1], "rb"))["project"]
extras = [name.strip() for name in sys.argv[2].split(",") if name.strip()]
known = project["optional-dependencies"]
unknown = [name for name in extras if name not in known]
if unknown:
    sys.exit(f"install.sh: no extra {', '.join(unknown)}: there are {', '.join(known)}")
print(*project["dependencies"], *(line for name in extras for line in known[name]), sep="\n")
END
    python3 -m venv "$VENV"
    "$VENV/bin/python" -m pip install -c "$1/constraints.txt" -r "$requirements"
    rm "$requirements"
}

project() {
    "$VENV/bin/python" -m pip install --no-deps "$1"
    rm -rf "$1"
    mkdir -p /work
    chmod 1777 /work # any user may write there where nothing is mounted
    "$VENV/bin/nystrom" --version
}

case "${1:-}" in
system) system ;;
dependencies | project) "$1" "${2:?the folder with pyproject.toml}" ;;
*) echo "install.sh: system, dependencies FOLDER or project FOLDER" >&2; exit 2 ;;
esac

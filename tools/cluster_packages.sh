#!/usr/bin/env bash
# The parts of a cluster that the tests of launching start for real: Slurm, sshd, pdsh, network namespaces (Debian,
# Ubuntu). Without root, without apt or without a network it says so and does no harm: those tests skip with a reason.
set -euo pipefail

PACKAGES=(slurm-wlm slurmctld slurmd munge openssh-server openssh-client pdsh iproute2 iputils-ping)
NEEDED=(slurmctld slurmd munged sshd pdsh ip tc)
PATH="$PATH:/usr/sbin:/sbin"

missing=()
for program in "${NEEDED[@]}"; do
    command -v "$program" > /dev/null || missing+=("$program")
done
if [ ${#missing[@]} -eq 0 ]; then
    echo "cluster packages: all are here"
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "cluster packages: ${missing[*]} are missing, and installing them needs root and apt-get: their tests will skip"
    exit 0
fi
# Installing must not start the system's own daemons, which the tests do not use.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
install() { timeout 300 apt-get install -y -q --no-install-recommends "${PACKAGES[@]}"; }
if { install || { timeout 120 apt-get update -q && install; }; } > /tmp/cluster_packages.$$.log 2>&1; then
    echo "cluster packages: installed for ${missing[*]}"
else
    tail -n 3 /tmp/cluster_packages.$$.log
    echo "cluster packages: could not be installed (above): the tests that need ${missing[*]} will skip"
fi
rm -f /tmp/cluster_packages.$$.log

#!/usr/bin/env bash
# Trains with several processes on this machine, which connect as they do on a cluster.
#   launch/local_processes.sh 2 --config configs/code_search.py:smoke
# DEVICES is the number of fake CPU devices per process (default: 4). PORT is the port of process 0;
# without it, process 0 picks a free port and announces it in the workdir.
# On Ctrl-C, SIGTERM or SIGHUP to any process, all save a checkpoint and stop. Covered by tests.
set -euo pipefail
processes=${1:?how many processes?}; shift
export JAX_PLATFORMS=cpu NPROC="${NPROC:-32}"
export XLA_FLAGS="--xla_force_host_platform_device_count=${DEVICES:-4} ${XLA_FLAGS:-}"
export JAX_COORDINATOR_ADDRESS="127.0.0.1:${PORT:-0}" JAX_NUM_PROCESSES="$processes"

children=()
for ((process = 0; process < processes; process++)); do
    JAX_PROCESS_ID=$process python -m jaxcl.train "$@" &
    children+=($!)
done
trap 'kill -TERM "${children[@]}" 2>/dev/null || true' TERM INT HUP
code=0
for child in "${children[@]}"; do
    status=0
    wait "$child" || status=$?
    # A trapped signal ends `wait` before the child has ended.
    while kill -0 "$child" 2>/dev/null; do status=0; wait "$child" || status=$?; done
    ((status == 0)) || code=$status
done
exit "$code"

#!/usr/bin/env bash
# Trains on 8 fake CPU devices: the program of a pod, on a laptop. Exact but slow. Runs on any CPU.
#   launch/fake_devices.sh --config configs/code_search.py:smoke
set -euo pipefail
export JAX_PLATFORMS=cpu
export XLA_FLAGS="--xla_force_host_platform_device_count=8 ${XLA_FLAGS:-}"
# The size of XLA's thread pool; otherwise, eight devices on a few cores can block each other.
export NPROC="${NPROC:-32}"
exec python -m jaxcl.train "$@"

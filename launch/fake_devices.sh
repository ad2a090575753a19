#!/usr/bin/env bash
# Trains on 8 fake CPU devices: the program of a pod, on a laptop. Slow, and exact. Runs on any CPU.
#   launch/fake_devices.sh --config configs/code_search.py:smoke
set -euo pipefail
export JAX_PLATFORMS=cpu
export XLA_FLAGS="--xla_force_host_platform_device_count=8 ${XLA_FLAGS:-}"
# XLA sizes its thread pool by this; eight devices on few cores can otherwise block each other.
export NPROC="${NPROC:-32}"
exec python -m jaxcl.train "$@"

#!/usr/bin/env bash
# Trains on all GPUs of this machine, in one process.
#   pip install -e ".[cuda]" && launch/gpu_host.sh --config configs/code_search_transformer.py
# CUDA_VISIBLE_DEVICES selects GPUs. SIGTERM saves a checkpoint and stops; the same command resumes.
# Not tested on a host with several GPUs; it only sets variables of JAX and XLA.
set -euo pipefail
# Reserves most of the memory; by default, JAX reserves three quarters.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
# Overlaps collectives with arithmetic.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"
exec python -m jaxcl.train "$@"

#!/usr/bin/env bash
# Rents a TPU slice of Google Cloud, trains on all of its hosts, and gives it back.
#   launch/tpu_pod.sh NAME ZONE v5litepod-256 REPOSITORY BUCKET --config configs/…
# RUNTIME=v2-alpha-tpuv5 for v5p. BUCKET needs a hierarchical namespace: checkpoints rename folders.
# The slice is a queued resource; REPOSITORY is what its hosts clone. The run lies in BUCKET, which all
# hosts mount: if the slice is preempted, the same command goes on. Not run: linted, no cloud was at
# hand, so that --distributed was tried nowhere but in a test of what it calls.
set -euo pipefail
name=${1:?name}; zone=${2:?zone}; kind=${3:?accelerator type}; repository=${4:?repository}
bucket=${5:?bucket}; shift 5
printf -v arguments ' %q' "$@"

gcloud compute tpus queued-resources create "$name" --zone="$zone" --node-id="$name" \
    --accelerator-type="$kind" --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" --spot
trap 'gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet' EXIT
state=
until [ "$state" = ACTIVE ]; do
    state=$(gcloud compute tpus queued-resources describe "$name" --zone="$zone" \
        --format='value(state.state)')
    case $state in FAILED | SUSPENDED) echo "the slice $name is $state" >&2; exit 1 ;; esac
    echo "the slice $name is ${state:-asked for}"; sleep 30
done
on_all_hosts() {
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}
# The hosts' shell reads these words again.
printf -v repository ' %q' "$repository"
printf -v bucket ' %q' "$bucket"
printf -v workdir '%q' "$name"
on_all_hosts "pip install --quiet uv && git clone --quiet --$repository jaxcl && cd jaxcl && \
    python3 -m uv venv --quiet --python 3.12 && python3 -m uv pip install --quiet -e '.[tpu]'"
on_all_hosts "mkdir -p runs && gcsfuse$bucket runs"
on_all_hosts "cd jaxcl && .venv/bin/python -m jaxcl.train --distributed --workdir ~/runs/$workdir$arguments"

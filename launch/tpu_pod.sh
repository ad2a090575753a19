#!/usr/bin/env bash
# Creates a TPU slice on Google Cloud, trains on all of its hosts, and deletes it.
#   launch/tpu_pod.sh NAME ZONE v5litepod-256 REPOSITORY BUCKET --config configs/…
# For v5p, set RUNTIME=v2-alpha-tpuv5. BUCKET needs a hierarchical namespace, since checkpoints rename
# folders. The slice is a queued resource, and its hosts clone REPOSITORY. The run is in BUCKET, which
# all hosts mount; if the slice is preempted, the same command resumes. Not tested on Google Cloud,
# only linted; a test covers the calls that --distributed makes.
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
# These words are parsed again by the shell of the hosts.
printf -v repository ' %q' "$repository"
printf -v bucket ' %q' "$bucket"
printf -v workdir '%q' "$name"
on_all_hosts "pip install --quiet uv && git clone --quiet --$repository jaxcl && cd jaxcl && \
    python3 -m uv venv --quiet --python 3.12 && python3 -m uv pip install --quiet -e '.[tpu]'"
on_all_hosts "mkdir -p runs && gcsfuse$bucket runs"
on_all_hosts "cd jaxcl && .venv/bin/python -m jaxcl.train --distributed --workdir ~/runs/$workdir$arguments"

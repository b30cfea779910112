#!/usr/bin/env bash
# Runs one command on every host of a TPU pod slice: one process a host, which find each other through the TPU's own metadata.
#
#   TPU=my-slice ZONE=us-east5-b REPOSITORY=https://host/adjoint_jax.git \
#       examples/launch/tpu_pod.sh adjoint-jax guide --config configs/guide_digits.toml --batch 32 --mesh data=32 --out /mnt/shared/runs/guide
#
# The product of --mesh is the number of chips of the slice (of cores, on v2 and v3), and divides --batch.
# --out has to lie where every host sees it, a Filestore (NFS) mount or a bucket by gcsfuse: the first host writes, and by orbax all do.
#
#   TPU         name of the slice
#   ZONE        its zone
#   PROJECT     its project; by default that of gcloud's configuration
#   REPOSITORY  set: clone it on every host and install it first; unset: the hosts have it from an earlier call
#   REVISION    branch, tag or whole name of a commit, by default main
#   FOLDER      where it lies on the hosts, by default adjoint_jax in the home folder
#   JAX         what is installed as JAX, by default jax[tpu]
#
# With --resume among the arguments the same call goes on where a preemption ended the last one.
set -euo pipefail

: "${TPU:?give the name of the slice}" "${ZONE:?give its zone}"
if [ $# -eq 0 ]; then
    echo "Give the command that every host runs, such as: adjoint-jax guide --mesh data=32 --out /mnt/shared/runs/guide" >&2
    exit 2
fi
folder=${FOLDER:-adjoint_jax}

on_every_host() {
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} --worker=all --command="$1"
}

if [ -n "${REPOSITORY:-}" ]; then
    printf -v install 'set -e
test -d %q || git clone -q %q %q
cd %q && git fetch -q origin %q && git checkout -q --detach FETCH_HEAD
test -d .venv || python3 -m venv .venv
.venv/bin/pip install -q %q -e ".[cli,mesh]"' "$folder" "$REPOSITORY" "$folder" "$folder" "${REVISION:-main}" "${JAX:-jax[tpu]}"
    on_every_host "$install"
fi

printf -v arguments '%q ' "$@" --distributed
printf -v move 'cd %q && . .venv/bin/activate' "$folder"
on_every_host "$move && $arguments"

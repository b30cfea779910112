#!/usr/bin/env bash
# Runs one command on the GPUs of one host or of several. Run it on every host; on one host nothing has to be set.
#
#   examples/launch/multi_gpu.sh adjoint-jax guide --config configs/guide_digits.toml --batch 8 --mesh data=8 --out runs/guide
#
#   COORDINATOR=10.0.0.1:9876 HOSTS=2 HOST=0 examples/launch/multi_gpu.sh ...   # on the first host
#   COORDINATOR=10.0.0.1:9876 HOSTS=2 HOST=1 examples/launch/multi_gpu.sh ...   # on the second
#
# The product of --mesh is the number of GPUs of all hosts, and divides --batch. Of several hosts --out has to lie where all see it.
#
#   HOSTS        number of hosts, by default 1
#   HOST         which of them this is, from 0, by default 0
#   COORDINATOR  host:port of the first one that the others reach; by default 127.0.0.1:9876, which serves one host
#   PER          host: one process for all GPUs of a host (the default); gpu: one for each
#   GPUS         with PER=gpu, GPUs of a host; by default as many as nvidia-smi lists
#
# Under Slurm or Open MPI this script is not needed: srun or mpirun start the command with --distributed, one process a GPU.
# If one process of this host fails, the others are ended.
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "Give the command to run, such as: adjoint-jax guide --mesh data=8 --out runs/guide" >&2
    exit 2
fi
hosts=${HOSTS:-1} host=${HOST:-0} per=${PER:-host}
if [ "$hosts" -gt 1 ] && [ -z "${COORDINATOR:-}" ]; then
    echo "HOSTS=$hosts needs COORDINATOR=host:port, an address of the first host." >&2
    exit 2
fi

case $per in
host) processes=1 ;;
gpu) processes=${GPUS:-$(nvidia-smi --list-gpus | wc -l)} ;;
*)
    echo "PER=$per is not known: use host or gpu." >&2
    exit 2
    ;;
esac

if [ "$hosts" -eq 1 ] && [ "$per" = host ]; then
    exec "$@"
fi

export JAX_COORDINATOR_ADDRESS=${COORDINATOR:-127.0.0.1:9876} JAX_NUM_PROCESSES=$((hosts * processes))
started=()
end_all() { kill "${started[@]}" 2>/dev/null || true; }
trap end_all INT TERM

for ((i = 0; i < processes; i++)); do
    if [ "$per" = gpu ]; then
        export JAX_LOCAL_DEVICE_IDS=$i
    fi
    JAX_PROCESS_ID=$((host * processes + i)) "$@" &
    started+=($!)
done

status=0
for ((i = 0; i < processes; i++)); do
    wait -n || {
        code=$?
        if [ "$status" -eq 0 ]; then status=$code; fi
        end_all
    }
done
exit "$status"

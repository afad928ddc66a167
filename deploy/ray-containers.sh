#!/usr/bin/env bash
# A Ray cluster of containers on one machine, each with its own network address, processes and CPUs.
#
#   deploy/ray-containers.sh up FOLDER 2   (a head and two workers; FOLDER has tunewright.yaml and the base)
#   deploy/ray-containers.sh run train --cluster auto   (on the head)
#   deploy/ray-containers.sh down
#
# TOOL=docker      instead of podman
# IMAGE            tunewright-trainer-cpu
# CPUS, MEMORY     of each container: 1, 4g
# NETWORK          tunewright-ray, created if it is not there
set -euo pipefail

tool=${TOOL:-podman}
image=${IMAGE:-tunewright-trainer-cpu}
cpus=${CPUS:-1}
memory=${MEMORY:-4g}
network=${NETWORK:-tunewright-ray}

# A container without rights: only its memory and the project can be written to.
start() {
    local name=$1 folder=$2
    shift 2
    "$tool" run --detach --name "$name" --hostname "$name" --network "$network" \
        --label tunewright=ray-containers --stop-timeout 30 \
        --read-only --cap-drop ALL --security-opt no-new-privileges \
        --cpus "$cpus" --memory "$memory" --shm-size 1g \
        --tmpfs /tmp:mode=1777 --tmpfs /var/cache/tunewright:mode=1777 --volume "$folder:/project" \
        --env RAY_AUTH_MODE=token --env RAY_AUTH_TOKEN --env RAY_USAGE_STATS_ENABLED=0 \
        --env OMP_NUM_THREADS="$cpus" \
        --entrypoint tini "$image" -- ray start --block --disable-usage-stats \
        --object-store-memory 500000000 "$@" > /dev/null
}

# Wait until Ray runs in a container.
await() {
    until "$tool" logs "$1" 2>&1 | grep 'Ray runtime started' > /dev/null; do
        if [ "$("$tool" inspect --format '{{.State.Running}}' "$1")" != true ]; then
            "$tool" logs "$1" >&2
            exit 1
        fi
        sleep 0.5
    done
}

case ${1:-} in
up)
    folder=$(realpath "${2:?give the folder of tunewright.yaml}")
    RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
    export RAY_AUTH_TOKEN
    "$tool" network inspect "$network" > /dev/null 2>&1 || "$tool" network create "$network" > /dev/null
    # The head runs the commands, and computes nothing for the cluster.
    start ray-head "$folder" --head --port 6379 --num-cpus 0 --include-dashboard false
    await ray-head
    head=$("$tool" inspect --format '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' ray-head)
    for ((number = 1; number <= ${3:-2}; number++)); do
        start "ray-worker-$number" "$folder" --address "$head:6379" --num-cpus "$cpus"
    done
    for ((number = 1; number <= ${3:-2}; number++)); do await "ray-worker-$number"; done
    ;;
run)
    shift
    terminal=()
    if [ -t 0 ]; then terminal=(--tty); fi
    exec "$tool" exec --interactive "${terminal[@]}" ray-head tunewright "$@"
    ;;
down)
    mapfile -t names < <("$tool" ps --all --filter label=tunewright=ray-containers --format '{{.Names}}')
    if [ ${#names[@]} -gt 0 ]; then "$tool" rm --force "${names[@]}" > /dev/null; fi
    "$tool" network rm "$network" > /dev/null
    ;;
*)
    sed -n '4,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac

#!/usr/bin/env bash
# Builds the shipped Dockerfile, CPU variant, and sees that the image keeps its promises: size, nothing setuid, no
# compiler, no pip; read-only, without capabilities, as its own number and as an unknown one; SIGTERM drains; a killed
# worker is replaced. Root, with Debian's buildah, podman, runc, conmon (and debootstrap where no registry is reached).
#
#   PYTHON_IMAGE=...   another base; "debootstrap": one made here from Debian's packages
#   BUILD_VOLUMES=...  mounted while building and never part of the image: a /etc/pip.conf, certificates, wheels
#   TORCH_CPU_INDEX=   empty where pip finds torch's CPU wheel by its own configuration
set -euo pipefail
cd "$(dirname "$0")/../.."

BUDGET_BYTES=1200000000
READY_SECONDS=5
IMAGE=localhost/slimpajama:check-cpu
base="${PYTHON_IMAGE:-docker.io/library/python:3.11-slim-bookworm}"
podman=(podman --cgroup-manager cgroupfs)
limits=(--runtime runc --ulimit nofile=4096:4096 --ulimit nproc=4096:4096 --network host)
locked=(--read-only --tmpfs "/tmp:rw,size=512m" --cap-drop ALL --security-opt no-new-privileges --memory 3g)
run=("${podman[@]}" run --rm "${limits[@]}")
containers=()
trap '[ ${#containers[@]} -eq 0 ] || "${podman[@]}" rm --force --time 1 "${containers[@]}" >/dev/null' EXIT

fail() { echo "FAILED: $*" >&2; exit 1; }

make_base() {
    local root
    root="$(mktemp -d)"
    debootstrap --variant=minbase --include=python3,python3-venv,python3-dev,ca-certificates bookworm "$root"
    tar -C "$root" -c . | "${podman[@]}" import - localhost/python-base:bookworm
    rm -rf "$root"
    base=localhost/python-base:bookworm
}

build() {
    local options=(--isolation chroot --format docker --layers --build-arg TORCH_VARIANT=cpu)
    options+=(--build-arg "PYTHON_IMAGE=$base" --build-arg "REVISION=$(git rev-parse HEAD)")
    [ -z "${TORCH_CPU_INDEX+set}" ] || options+=(--build-arg "TORCH_CPU_INDEX=$TORCH_CPU_INDEX")
    local volume
    for volume in ${BUILD_VOLUMES:-}; do options+=(--volume "$volume"); done
    buildah build "${options[@]}" --tag "$IMAGE" .
}

check_contents() {
    local size
    size="$("${podman[@]}" image inspect --format '{{.Size}}' "$IMAGE")"
    echo "size: $((size / 1000000)) MB"
    [ "$size" -le "$BUDGET_BYTES" ] || fail "the image has $size bytes, more than $BUDGET_BYTES"
    # shellcheck disable=SC2016
    "${run[@]}" --user 0 --entrypoint /bin/sh "$IMAGE" -c '
        found="$(find / -xdev -type f -perm /6000)"; [ -z "$found" ] || { echo "setuid: $found"; exit 1; }
        for tool in pip pip3 gcc g++ cc make; do
            ! command -v "$tool" || { echo "there is $tool"; exit 1; }
        done
        ! python -c "import pip" 2>/dev/null || { echo "pip can be imported"; exit 1; }' || fail "contents"
    [ "$("${podman[@]}" image inspect --format '{{.Config.User}}' "$IMAGE")" = 10001:10001 ] || fail "user"
    ! "${podman[@]}" image inspect --format '{{.Config.Env}}' "$IMAGE" | grep -iE 'token|secret|password' || fail "env"
}

get() { python3 -c "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=60).read().decode())" "$1"; }

post() {
    python3 - "$1" "$2" <<'PYTHON'
import sys
import urllib.request

request = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), {"Content-Type": "application/json"})
print(urllib.request.urlopen(request, timeout=120).read().decode()[:200])
PYTHON
}

accepted() { get "$1/metrics" | awk '/^slimpajama_requests_accepted_total/ {sum += $2} END {print sum + 0}'; }

# start USER PORT: sets $name once the container is ready.
start() {
    name="slimpajama-check-$1-$2"
    containers+=("$name")
    local begin
    begin="$(date +%s%N)"
    "${podman[@]}" run --detach --name "$name" "${limits[@]}" "${locked[@]}" --user "$1" "$IMAGE" \
        --host 127.0.0.1 --port "$2" --worker-threads 2 --drain-timeout 60 --kv-cache-memory 64MiB \
        --model /models/slimpajama-tiny-lm --model /models/slimpajama-tiny-encoder >/dev/null
    until get "http://127.0.0.1:$2/readyz" >/dev/null 2>&1; do
        [ "$("${podman[@]}" inspect --format '{{.State.Running}}' "$name")" = true ] ||
            { "${podman[@]}" logs "$name"; fail "$name ended"; }
        sleep 0.1
    done
    local taken=$((($(date +%s%N) - begin) / 1000000))
    echo "ready as $1 after $taken ms"
    [ "$taken" -le $((READY_SECONDS * 1000)) ] || echo "slower than $READY_SECONDS s (how busy is this machine?)"
}

check_running() {
    local url="http://127.0.0.1:$2"
    start "$1" "$2"
    post "$url/v1/completions" '{"model": "slimpajama-tiny-lm", "prompt": "Once upon a time", "max_tokens": 8}'
    post "$url/v1/embeddings" '{"model": "slimpajama-tiny-encoder", "input": ["a", "b"]}'
    post "$url/v1/sentiment" '{"input": ["A joy from beginning to end."]}'
    post "$url/v1/similarity" '{"source": "a cat", "targets": ["a kitten", "a bank"]}'
    SMOKE_URL="$url" python3 helm/files/smoke.py

    # The worker is the container's other process: it comes back, and what runs meanwhile is answered.
    local answers status
    answers="$(mktemp -d)"
    "${podman[@]}" exec "$name" python -c '
import os, signal
for pid in filter(str.isdigit, os.listdir("/proc")):
    if b"service.engine.worker" in open(f"/proc/{pid}/cmdline", "rb").read():
        os.kill(int(pid), signal.SIGKILL)'
    post "$url/v1/completions" '{"model": "slimpajama-tiny-lm", "prompt": "Then", "max_tokens": 8}' ||
        { sleep 2; post "$url/v1/completions" '{"model": "slimpajama-tiny-lm", "prompt": "Then", "max_tokens": 8}'; }

    # SIGTERM under load: everything accepted is answered, and the process ends with 0.
    local number callers=() before
    before="$(accepted "$url")"
    for number in 1 2 3 4 5 6 7 8; do
        post "$url/v1/completions" '{"model": "slimpajama-tiny-lm", "prompt": "Once", "max_tokens": 100, "ignore_eos": true}' \
            >"$answers/$number" 2>&1 &
        callers+=($!)
    done
    until [ "$(accepted "$url")" -ge $((before + 8)) ]; do sleep 0.05; done
    "${podman[@]}" kill --signal TERM "$name" >/dev/null
    for number in "${callers[@]}"; do wait "$number" || { cat "$answers"/*; fail "a request was lost"; }; done
    status="$("${podman[@]}" wait "$name")"
    [ "$status" = 0 ] || fail "exit code $status after SIGTERM"
    "${podman[@]}" rm --force "$name" >/dev/null
    containers=()
}

[ "$base" != debootstrap ] || make_base
build
check_contents
check_running 10001 18431
check_running 54321 18432
echo "the image keeps its promises"

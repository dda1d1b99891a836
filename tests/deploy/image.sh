#!/usr/bin/env bash
# Builds the shipped Dockerfile and sees that the image keeps its promises: size, nothing setuid, no compiler, no pip;
# locked up (read-only, no capabilities, a memory limit), as its own number and as an unknown one: a request for each
# task, a worker killed and SIGTERM with requests in hand. Root, with Debian's buildah, podman, runc and conmon; with
# debootstrap, where no image registry can be reached.
#
#   --write                      the summary into docs/kubernetes.md
#   --build-only, --check-only   one half alone, so that what is timed has the machine to itself
#
#   TORCH_VARIANT=cu13           the CUDA image, on CPUs: 3 GB to fetch, 20 GB of disk
#   PYTHON_IMAGE=...             another base; `debootstrap`: one made here of Debian's packages
#   READY_MILLISECONDS=...       more than 5000, where the machine has other things to do
#   TORCH_CPU_INDEX=...          another place of torch's CPU wheels; empty: pip's own index
#
# What pip is told on this machine is mounted into the stages that install, and is in no image (pip_here.py).
set -euo pipefail
cd "$(dirname "$0")/../.."

VARIANT="${TORCH_VARIANT:-cpu}"
IMAGE="localhost/slimpajama:check-$VARIANT"
case "$VARIANT" in
    cpu) BUDGET_BYTES=1200000000 MEMORY_GIB=2 ready_by_default=5000 summary=image ;;
    # Nobody starts this one without a GPU in earnest: its time to ready is no target.
    cu13) BUDGET_BYTES=6000000000 MEMORY_GIB=4 ready_by_default=60000 summary=image-cu13 ;;
    *) echo "TORCH_VARIANT is '$VARIANT': must be cpu or cu13" >&2; exit 2 ;;
esac
READY_MILLISECONDS="${READY_MILLISECONDS:-$ready_by_default}"
ASK=tests/deploy/ask.py
podman=(podman --cgroup-manager cgroupfs)
limits=(--runtime runc --ulimit nofile=4096:4096 --ulimit nproc=4096:4096 --network host --no-healthcheck)
locked=(--read-only --read-only-tmpfs=false --tmpfs "/tmp:rw,size=512m" --cap-drop ALL
    --security-opt no-new-privileges --memory "${MEMORY_GIB}g" --memory-swap "${MEMORY_GIB}g" --cpus 2)
scratch="$(mktemp -d)"
container=""
trap '[ -z "$container" ] || "${podman[@]}" rm --force --time 1 "$container" >/dev/null; rm -rf "$scratch"' EXIT

fail() { echo "FAILED: $*" >&2; exit 1; }

# seen WHAT FOUND: a row of the summary.
seen() { echo "$1: $2"; echo "| $1 | $2 |" >>"$scratch/summary"; }

need_tools() {
    [ "$(id -u)" = 0 ] || fail "needs root"
    local missing=() tool
    for tool in buildah podman runc conmon; do command -v "$tool" >/dev/null || missing+=("$tool"); done
    [ ${#missing[@]} -eq 0 ] || fail "there is no ${missing[*]}: apt-get install buildah podman runc conmon debootstrap"
}

choose_base() {
    base="${PYTHON_IMAGE:-docker.io/library/python:3.11-slim-bookworm}"
    if [ -z "${PYTHON_IMAGE:-}" ] && ! timeout 60 "${podman[@]}" pull --quiet "$base" >/dev/null 2>&1; then
        echo "no image registry can be reached: the base is made of Debian's packages"
        base=debootstrap
    fi
    [ "$base" != debootstrap ] || make_base
}

make_base() {
    base=localhost/python-base:bookworm
    ! "${podman[@]}" image exists "$base" || return 0
    command -v debootstrap >/dev/null || fail "there is no debootstrap: apt-get install debootstrap"
    local root="$scratch/root"
    debootstrap --variant=minbase --include=python3,python3-venv,python3-dev,ca-certificates bookworm "$root" >"$scratch/log" 2>&1 ||
        { tail "$scratch/log"; fail "debootstrap"; }
    # As in the slim images of Python: its headers, but neither packages nor documentation.
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,info,locale}/*
    tar -C "$root" -c . | "${podman[@]}" import --quiet - "$base" >/dev/null
    rm -rf "$root"
}

build() {
    local options=(--isolation chroot --format docker --layers --network host --build-arg "TORCH_VARIANT=$VARIANT")
    options+=(--build-arg "PYTHON_IMAGE=$base" --build-arg "REVISION=$(git rev-parse HEAD)")
    local index="${TORCH_CPU_INDEX-https://download.pytorch.org/whl/cpu}" ignored=()
    if [ "$VARIANT" = cu13 ]; then
        # Wheels that lie here would outrank the index's: those of torch are built for CPUs.
        ignored=(find-links)
    elif [ -z "${TORCH_CPU_INDEX+set}" ] && ! python3 -c "from urllib.request import urlopen as u; u('$index/torch/', timeout=20)" \
        2>/dev/null; then
        echo "torch's own index cannot be reached: pip's is asked for torch"
        index=""
    fi
    options+=(--build-arg "TORCH_CPU_INDEX=$index")
    mkdir "$scratch/pip"
    local mounts=(--volume "$scratch/pip/pip.conf:/etc/pip.conf:ro") mount
    while read -r mount; do mounts+=(--volume "$mount"); done < <(python3 tests/deploy/pip_here.py "$scratch/pip" "${ignored[@]}")
    # With mounts up to where pip runs, then without: what has been built is taken from the cache.
    local stage
    for stage in runtime application; do
        buildah build "${options[@]}" "${mounts[@]}" --target "$stage" --tag "$IMAGE-$stage" .
    done
    buildah build "${options[@]}" --tag "$IMAGE" .
}

check_contents() {
    local size
    size="$("${podman[@]}" image inspect --format '{{.Size}}' "$IMAGE")"
    [ "$size" -le "$BUDGET_BYTES" ] || fail "the image has $size bytes, more than $BUDGET_BYTES"
    seen "size, unpacked" "$((size / 1000000)) MB with both checkpoints; at most $((BUDGET_BYTES / 1000000)) are allowed"
    # shellcheck disable=SC2016
    "${podman[@]}" run --rm "${limits[@]}" --user 0 --entrypoint /bin/sh "$IMAGE" -c '
        found="$(find / -xdev -type f -perm /6000)"; [ -z "$found" ] || { echo "setuid: $found"; exit 1; }
        for tool in pip pip3 gcc g++ cc c++ clang ld make; do
            ! command -v "$tool" || { echo "there is $tool"; exit 1; }
        done
        for module in pip setuptools ensurepip; do
            ! python -c "import $module" 2>/dev/null || { echo "$module can be imported"; exit 1; }
        done
        for folder in /etc/pip.conf /build /root/.cache; do [ ! -e "$folder" ] || { echo "left: $folder"; exit 1; }; done
        python -c "import service.otel, torch; from model.ops.files import LIBRARY; assert LIBRARY.stat().st_size"' || fail "contents"
    [ "$("${podman[@]}" image inspect --format '{{.Config.User}}' "$IMAGE")" = 10001:10001 ] || fail "user"
    ! "${podman[@]}" image inspect --format '{{.Config.Env}}' "$IMAGE" | grep -iE 'token|secret|password' || fail "env"
    seen "contents" "no setuid file, no compiler, no installer, no secret; compiled operators; user 10001:10001"
}

# Triton, calling a compiler as it does before its first kernel, gets what was compiled with the image.
check_triton() {
    "${podman[@]}" run --rm "${limits[@]}" "${locked[@]}" --entrypoint python "$IMAGE" -c '
import pathlib, tempfile
from triton.backends.nvidia import driver
from triton.runtime.build import _build
source = pathlib.Path(tempfile.mkdtemp(), "cuda_utils.c")
source.write_bytes(pathlib.Path(driver.dirname, "driver.c").read_bytes())
places = [driver.libdevice_dir, "/driver"]
made = _build(source.stem, str(source), str(source.parent), places, driver.include_dirs, driver.libraries, [])
(prebuilt,) = pathlib.Path("/opt/slimpajama/lib/triton-host").iterdir()
assert pathlib.Path(made).read_bytes() == prebuilt.read_bytes()' || fail "the host module of Triton"
    seen "Triton" "gets its host module, compiled with the image, from what stands in for a compiler"
}

# start USER PORT: sets $container and $taken, the milliseconds from its start until it is ready.
start() {
    container="slimpajama-check-$1-$2"
    local begin
    begin="$(date +%s%N)"
    "${podman[@]}" run --detach --name "$container" "${limits[@]}" "${locked[@]}" --user "$1" \
        --env "SLIMPAJAMA_PORT=$2" "$IMAGE" --host 127.0.0.1 --worker-threads 2 --drain-timeout 60 \
        --kv-cache-memory 64MiB --model /models/slimpajama-tiny-lm --model /models/slimpajama-tiny-encoder >/dev/null
    timeout 120 python3 "$ASK" "http://127.0.0.1:$2" ready || { "${podman[@]}" logs "$container"; fail "not ready"; }
    taken=$((($(date +%s%N) - begin) / 1000000))
}

inside() { "${podman[@]}" exec "$container" python -c "$1"; }

# What was asked of the runtime is in force: for the service's first process, as the kernel tells.
check_locked() {
    inside '
import pathlib, re
status = dict(re.findall(r"(\w+):\s+(.*)", pathlib.Path("/proc/1/status").read_text()))
assert [int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")] == [0, 0, 0], status
assert status["NoNewPrivs"] == "1" and set(status["Uid"].split()) == {"'"${1%%:*}"'"}, status
limits = [pathlib.Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory/memory.limit_in_bytes")]
assert [path.read_text().strip() for path in limits if path.exists()] == ["'"$((MEMORY_GIB << 30))"'"]' || fail "not locked up"
    ! inside 'open("/opt/probe", "w")' 2>/dev/null || fail "the root can be written"
}

# Of all processes in the container, each at its own highest; pages that they share are counted twice.
peak_memory() {
    inside '
import glob, re
texts = [open(path).read() for path in glob.glob("/proc/[0-9]*/status")]
print(sum(int(found[1]) for text in texts if (found := re.search(r"VmHWM:\s+(\d+)", text))) // 1024)'
}

check_health() {
    local test
    test="$("${podman[@]}" image inspect --format '{{json .Config.Healthcheck.Test}}' "$IMAGE" |
        python3 -c 'import json, sys; print(json.load(sys.stdin)[3])')"
    inside "$test" || fail "the image's own health check"
    ! "${podman[@]}" exec --env SLIMPAJAMA_PORT=1 "$container" python -c "$test" 2>/dev/null || fail "health without a service"
}

check_running() {
    local url="http://127.0.0.1:$2" peak begin status
    start "$1" "$2"
    [ "$taken" -le "$READY_MILLISECONDS" ] || fail "ready after $taken ms as $1: $READY_MILLISECONDS are allowed"
    check_locked "$1"
    check_health
    python3 "$ASK" "$url" tasks
    SMOKE_URL="$url" python3 helm/files/smoke.py
    peak="$(peak_memory)"
    seen "as user $1" "ready after $taken ms; one request for each of $(python3 "$ASK" "$url" count) tasks answered; \
$peak MB at most, of $MEMORY_GIB GiB"
    # The worker is the container's other process.
    python3 "$ASK" "$url" held 8 "${podman[@]}" exec "$container" python -c '
import os, signal
for pid in filter(str.isdigit, os.listdir("/proc")):
    if b"service.engine.worker" in open(f"/proc/{pid}/cmdline", "rb").read().split(b"\0"):
        os.kill(int(pid), signal.SIGKILL)'
    seen "as user $1, worker killed" "8 requests in hand, all answered to their last token"
    begin="$(date +%s%N)"
    python3 "$ASK" "$url" held 8 "${podman[@]}" kill --signal TERM "$container"
    status="$("${podman[@]}" wait "$container")"
    [ "$status" = 0 ] || fail "exit code $status after SIGTERM"
    seen "as user $1, SIGTERM" "8 requests in hand, all answered to their last token; exit code 0 after \
$((($(date +%s%N) - begin) / 1000000)) ms"
    "${podman[@]}" rm --force "$container" >/dev/null
    container=""
}

building=yes checking=yes writing=""
for argument; do
    case "$argument" in
        --write) writing=yes ;;
        --build-only) checking="" ;;
        --check-only) building="" ;;
        *) fail "there is no $argument: --write, --build-only, --check-only" ;;
    esac
done
need_tools
if [ -n "$building" ]; then
    choose_base
    build
fi
[ -n "$checking" ] || exit 0
"${podman[@]}" image exists "$IMAGE" || fail "there is no $IMAGE yet: --build-only makes it"
check_contents
[ "$VARIANT" = cpu ] || check_triton
check_running 10001 18431
check_running 54321 18432
[ -z "$writing" ] || python3 tests/deploy/summary.py "$summary" <"$scratch/summary"
echo "the image keeps its promises"

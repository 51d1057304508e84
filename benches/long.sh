#!/usr/bin/env bash
# Runs the long measurements one after the other on a quiet machine: long.sh PROGRAM FOLDER [QUICK]
# Writes what they print to FOLDER/long.txt and a plot to FOLDER/retention.svg. QUICK=quick tries everything in small.
set -euo pipefail
program=$1 folder=$2 quick=${3:-}
mkdir -p "$folder"
report=$folder/long.txt

measure() {
    printf '\n$ pillarbox-benches %s\n' "$*"
    "$program" "$@"
}

everything() {
    printf '%s, %s cores, %s MiB; %s\n' "$(uname -srm)" "$(nproc)" "$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)" \
        "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)"
    if [ -n "$quick" ]; then
        measure enqueue --slices 4 --seconds 3
        measure idle --seconds 5
        measure long --minutes 0.4 --events 10000
        measure relays --events 20000 --rounds 1
        measure consume --events 2000 --rounds 1
        measure backlog --small 20000 --discard 100000 --rabbitmq 40000
        measure retention --minutes 1.5 --keep 15 --plot "$folder/retention.svg"
        return
    fi
    measure enqueue
    measure idle
    measure long
    measure relays
    measure consume
    measure backlog
    measure retention --plot "$folder/retention.svg"
}

everything 2>&1 | tee "$report"

#!/usr/bin/env bash
# Breaks the code once for each patch beside this script, and looks whether the test that the patch names fails.
#
#   tests/mutations/run.sh [part of a name ...]
#
# A patch begins with a sentence that says what it breaks, then `run: COMMAND`, and, if the command needs servers,
# `needs: NAME` of the environment variable that leads to one (target/debug/pillarbox-servers gives them). The command
# must pass on the code as it is, with a test or more that ran. Works on a copy of what is committed or changed in tracked
# files, under target/mutations.
set -u
here=$(cd "$(dirname "$0")" && pwd)
root=$(git -C "$here" rev-parse --show-toplevel)
copy=$root/target/mutations/copy
logs=$root/target/mutations/logs
export CARGO_TARGET_DIR=$root/target/mutations RUST_BACKTRACE=0
# The first failing seed is enough.
export PILLARBOX_FAILURES=1
mkdir -p "$logs"

cleanup() {
    git -C "$root" worktree remove --force "$copy" 2>/dev/null
    git -C "$root" worktree prune
}
cleanup
trap cleanup EXIT
trap 'exit 130' INT TERM

commit=$(git -C "$root" stash create)
git -C "$root" worktree add --quiet --detach "$copy" "${commit:-HEAD}" || exit 2
cp "$root/Cargo.lock" "$copy/Cargo.lock"
cd "$copy" || exit 2

# Compiles what a command would run; says whether that worked.
compiles() {
    local command=$1 log=$2
    (eval "${command/cargo test/cargo test --no-run}") >"$log" 2>&1
}

# Whether a command passes; one that hangs does not.
passes() {
    local command=$1 log=$2
    timeout 900 bash -c "$command" >>"$log" 2>&1
}

wanted() {
    [ $# -eq 1 ] && return 0
    local name=$1 part
    shift
    for part in "$@"; do
        [[ $name == *"$part"* ]] && return 0
    done
    return 1
}

caught=0 missed=0 broken=0 skipped=0
declare -A sound
for patch in "$here"/*.patch; do
    name=$(basename "$patch" .patch)
    wanted "$name" "$@" || continue
    command=$(sed -n 's/^run: //p' "$patch")
    need=$(sed -n 's/^needs: //p' "$patch")
    if [ -n "$need" ] && [ -z "${!need:-}" ]; then
        echo "skipped  $name: $need is not set"
        skipped=$((skipped + 1))
        continue
    fi
    if [ -z "${sound[$command]:-}" ]; then
        log=$logs/unbroken.log
        if compiles "$command" "$log" && passes "$command" "$log" && grep -q '^running [1-9]' "$log"; then
            sound[$command]=yes
        else
            echo "fails or runs nothing without any change: $command (see $log)"
            exit 2
        fi
    fi
    log=$logs/$name.log
    begun=$SECONDS
    if ! git apply "$patch" 2>"$log"; then
        verdict="broken   $name: it does not apply"
        broken=$((broken + 1))
    elif ! compiles "$command" "$log"; then
        verdict="broken   $name: it does not compile"
        broken=$((broken + 1))
    elif passes "$command" "$log"; then
        verdict="MISSED   $name: $(head -n 1 "$patch")"
        missed=$((missed + 1))
    else
        verdict="caught   $name"
        caught=$((caught + 1))
    fi
    echo "$verdict ($((SECONDS - begun)) s)"
    git checkout --quiet -- . && cp "$root/Cargo.lock" "$copy/Cargo.lock"
done
echo "$caught caught, $missed missed, $broken broken patches, $skipped skipped; logs in $logs"
[ $((missed + broken)) -eq 0 ] || exit 1
[ "$skipped" -eq 0 ] || [ -z "${PILLARBOX_REQUIRE_SERVERS:-}" ]

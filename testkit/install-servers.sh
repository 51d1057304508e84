#!/bin/sh
# Installs what `make test` needs and this machine lacks: PostgreSQL and RabbitMQ, from the distribution's own packages, and
# NATS by `go install`, for Debian's is older than 2.10.
#
#   testkit/install-servers.sh
#
# Says what it will install before it does. SETUP=no forbids installing. A server whose address is in TEST_POSTGRES_URL,
# TEST_AMQP_URL or TEST_NATS_URL is not needed here. No service is started: the tests start servers of their own.
# Exit 0: everything is there. 2: something is missing and may not, or cannot, be installed. 1: the installation failed.
set -eu

POLICY=/usr/sbin/policy-rc.d
# The newest 2.10; what it is built with where the machine's Go is too old, from Go's own module proxy.
NATS=github.com/nats-io/nats-server/v2@v2.10.29
TOOLCHAIN=golang.org/toolchain@v0.0.1-go1.23.12
MARK='pillarbox: no service starts while its test servers are being installed'

say() { echo "install-servers: $*" >&2; }

has_postgres() {
    [ -z "${TEST_POSTGRES_URL:-}" ] || return 0
    command -v postgres >/dev/null 2>&1 && command -v initdb >/dev/null 2>&1 && return 0
    for bin in /usr/lib/postgresql/*/bin /usr/pgsql-*/bin; do
        [ -x "$bin/postgres" ] && [ -x "$bin/initdb" ] && return 0
    done
    return 1
}

has_rabbitmq() {
    [ -z "${TEST_AMQP_URL:-}" ] || return 0
    command -v rabbitmq-server >/dev/null 2>&1 || [ -x /usr/lib/rabbitmq/bin/rabbitmq-server ] || return 1
    # The Debian script needs the runtime too, and a half-removed package leaves the script behind.
    command -v erl >/dev/null 2>&1
}

# Where `go install` puts programs, and the tests look for them.
go_bin() {
    if [ -n "${GOBIN:-}" ]; then echo "$GOBIN"; elif [ -n "${GOPATH:-}" ]; then echo "${GOPATH%%:*}/bin"; else echo "${HOME:-/root}/go/bin"; fi
}

has_nats() {
    [ -z "${TEST_NATS_URL:-}" ] || return 0
    for program in "$(go_bin)/nats-server" "$(command -v nats-server)" /usr/local/bin/nats-server; do
        [ -x "$program" ] || continue
        case $("$program" --version 2>/dev/null) in
            *v2.[0-9].* | *v[01].*) ;;
            *v[0-9]*) return 0 ;;
        esac
    done
    return 1
}

has_go() { command -v go >/dev/null 2>&1; }

missing() {
    has_postgres || printf ' postgresql'
    has_rabbitmq || printf ' rabbitmq-server'
    has_nats || has_go || printf ' golang-go'
}

# With a Go of before 1.21 too, which cannot fetch a newer one by itself but can fetch it as the module that it is.
build_nats() {
    bin=$(go_bin)
    work=$(mktemp -d)
    # shellcheck disable=SC2064 # this folder, now
    trap "rm -rf '$work'" EXIT
    (
        cd "$work"
        export GOPATH="$work" GOCACHE="$work/cache" GOFLAGS=-modcacherw GOBIN="$bin"
        go=go
        if [ "$(go env GOVERSION | sed -n 's/^go1\.\([0-9]*\).*/\1/p')" -lt 21 ]; then
            toolchain=$TOOLCHAIN.$(go env GOOS)-$(go env GOARCH)
            say "its Go is too old for that: fetching $toolchain into a temporary folder"
            go mod download "$toolchain" || exit 1
            GOROOT=$work/pkg/mod/$toolchain
            chmod -R u+x "$GOROOT/bin" "$GOROOT/pkg/tool"
            go=$GOROOT/bin/go
            export GOROOT GOTOOLCHAIN=local
        fi
        "$go" install -trimpath -ldflags '-s -w' "$NATS"
    )
    built=$?
    rm -rf "$work"
    trap - EXIT
    return $built
}

by_hand() {
    say "install by hand:$packages$(has_nats || printf ' nats-server (2.10 or later)')"
    say "(Fedora: dnf install postgresql-server rabbitmq-server golang; macOS: brew install postgresql rabbitmq nats-server)"
    say "(NATS anywhere: go install $NATS)"
    say "or give addresses: TEST_POSTGRES_URL=postgres://user:password@host/db TEST_AMQP_URL=amqp://user:password@host/vhost"
    say "TEST_NATS_URL=nats://user:password@host"
    exit 2
}

# Debian's maintainer scripts start what they install unless this file says no. One that is there already may say yes:
# it is put aside, and back afterwards.
forbid_services() {
    trap allow_services EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    if [ -e "$POLICY" ] && ! grep -qF "$MARK" "$POLICY"; then as_root mv "$POLICY" "$POLICY.before-pillarbox"; fi
    printf '#!/bin/sh\n# %s\nexit 101\n' "$MARK" | as_root tee "$POLICY" >/dev/null
    as_root chmod 755 "$POLICY"
}

allow_services() {
    if grep -qsF "$MARK" "$POLICY"; then as_root rm -f "$POLICY"; fi
    if [ -e "$POLICY.before-pillarbox" ]; then as_root mv "$POLICY.before-pillarbox" "$POLICY"; fi
}

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo $ask "$@"; fi; }

# sudo drops DEBIAN_FRONTEND, hence env. needrestart would ask, or restart services of others.
apt() {
    as_root env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 \
        apt-get -q -y -o DPkg::Lock::Timeout=300 "$@" </dev/null >&2
}

# Debian's packages first: Go may be among them.
install_packages() {
    if ! command -v apt-get >/dev/null 2>&1; then
        say "missing:$packages (no apt-get here)"
        by_hand
    fi
    # Without a terminal nobody can type a password: fail at once rather than wait.
    ask=''
    [ -t 0 ] || ask=-n
    if ! may_be_root; then
        say "missing:$packages (installing them takes root or sudo)"
        by_hand
    fi
    say "will install with apt-get:$packages (SETUP=no forbids it). No service is started."
    forbid_services
    if ! apt update; then say "apt-get update failed; trying with the lists that are there"; fi
    # shellcheck disable=SC2086 # one word for each package
    if ! apt install --no-install-recommends $packages; then
        say "apt-get could not install:$packages"
        exit 1
    fi
    allow_services
    trap - EXIT INT TERM HUP
    packages=$(missing)
    if [ -n "$packages" ]; then
        say "installed, yet still not found:$packages"
        exit 1
    fi
    say "done. Debian enables such services for the next boot; 'systemctl disable postgresql rabbitmq-server epmd.socket' undoes that."
}

may_be_root() {
    [ "$(id -u)" != 0 ] || return 0
    command -v sudo >/dev/null 2>&1 || return 1
    [ -z "$ask" ] || sudo -n true 2>/dev/null
}

packages=$(missing)
if [ -z "$packages" ] && has_nats; then exit 0; fi
if [ "${SETUP:-}" = no ]; then
    say "missing:$packages$(has_nats || printf ' nats-server') (not installed, since SETUP=no)"
    by_hand
fi
[ -z "$packages" ] || install_packages
has_nats && exit 0
say "will build with Go: $NATS, into $(go_bin) (SETUP=no forbids it). Takes a minute or two."
if ! build_nats || ! has_nats; then
    say "could not build nats-server. Without it all tests on NATS are left out, which is a failure where servers are required."
    say "Everything else is there. Put a nats-server of 2.10 or later on the PATH, or give an address: TEST_NATS_URL=nats://…"
    exit 1
fi
say "nats-server is there: $(go_bin)/nats-server"

#!/bin/sh
# Installs what `make test` needs and this machine lacks: PostgreSQL and RabbitMQ, from the distribution's own packages.
#
#   testkit/install-servers.sh
#
# Says what it will install before it does. SETUP=no forbids installing. A server whose address is in TEST_POSTGRES_URL
# or TEST_AMQP_URL is not needed here. No service is started: the tests start servers of their own.
# Exit 0: everything is there. 2: something is missing and may not, or cannot, be installed. 1: the installation failed.
set -eu

POLICY=/usr/sbin/policy-rc.d
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

missing() {
    has_postgres || printf ' postgresql'
    has_rabbitmq || printf ' rabbitmq-server'
}

by_hand() {
    say "install by hand:$packages"
    say "(Fedora: dnf install postgresql-server rabbitmq-server; macOS: brew install postgresql rabbitmq)"
    say "or give addresses: TEST_POSTGRES_URL=postgres://user:password@host/db TEST_AMQP_URL=amqp://user:password@host/vhost"
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

packages=$(missing)
[ -n "$packages" ] || exit 0

if [ "${SETUP:-}" = no ]; then
    say "missing:$packages (not installed, since SETUP=no)"
    by_hand
fi
if ! command -v apt-get >/dev/null 2>&1; then
    say "missing:$packages (no apt-get here)"
    by_hand
fi
# Without a terminal nobody can type a password: fail at once rather than wait.
ask=''
[ -t 0 ] || ask=-n
may_be_root() {
    [ "$(id -u)" != 0 ] || return 0
    command -v sudo >/dev/null 2>&1 || return 1
    [ -z "$ask" ] || sudo -n true 2>/dev/null
}
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

packages=$(missing)
if [ -n "$packages" ]; then
    say "installed, yet still not found:$packages"
    exit 1
fi
say "done. Debian enables such services for the next boot; 'systemctl disable postgresql rabbitmq-server epmd.socket' undoes that."

#!/bin/sh
# Installs what some tests need beside Python: PostgreSQL's programs and Chromium, as Debian and Ubuntu have them.
#
#   make test-services        once; asks for nothing, and needs root (sudo make test-services)
#
# Nothing is started or changed: each test starts a server of its own, on a socket in a folder that goes with it, and a
# browser of its own. Without them these tests are skipped, and `make test` says so in its last lines; with
# FEDCOMET_TEST_SERVICES=required a missing one is a failure.
set -eu

postgres() { command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; }
browser() { command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null; }

wanted=""
postgres || wanted="postgresql"
browser || wanted="$wanted chromium"
if [ -n "$wanted" ]; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "missing: $wanted. As root on Debian or Ubuntu: apt-get install $wanted; elsewhere: what provides" >&2
        echo "initdb and pg_ctl, and a chromium." >&2
        exit 1
    fi
    apt-get update -qq
    # shellcheck disable=SC2086  # words
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $wanted >/dev/null
fi
postgres && browser && echo "PostgreSQL and Chromium are there"

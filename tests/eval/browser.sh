#!/usr/bin/env bash
# Installs Chromium from Debian for the tests marked `browser`. Without root it prints what to install, and fails.
set -euo pipefail
if type chromium chromium-browser google-chrome 2>/dev/null | grep -q .; then exit; fi
if [ "$(id -u)" != 0 ] || ! type apt-get >/dev/null 2>&1; then
  echo "browser.sh: no chromium, chromium-browser or google-chrome; install one, on Debian: apt-get install chromium" >&2
  exit 1
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null

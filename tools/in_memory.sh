#!/bin/sh
# Runs a command with its temporary files in memory where there is room: a disk takes milliseconds for each of the tests' thousands of fsyncs.
set -u
shm=/dev/shm room=8000000  # KiB
free_of() { df -Pk "$1" 2>/dev/null | awk 'NR == 2 { print $4 }'; }
available() { awk '/^MemAvailable:/ { print $2 }' /proc/meminfo 2>/dev/null; }
if [ -w $shm ] && [ "$(free_of $shm)" -gt $room ] && [ "$(available)" -gt $((2 * room)) ]; then
    folder=$(mktemp -d $shm/spilt-XXXXXX)
    trap 'rm -rf "$folder"' EXIT
    trap 'exit 130' INT TERM HUP
    TMPDIR=$folder "$@"
    exit $?
fi
exec "$@"

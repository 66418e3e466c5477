#!/usr/bin/env bash
# host-command.sh RUN-FOLDER SECONDS: runs the command on this machine's own kernel,
# as the leader of a session; file descriptor 3 takes the verdict.
set -euo pipefail

run_dir=$1 timeout=$2
mapfile -d '' -t command <"$run_dir/command"

(exec -- "${command[@]}" </dev/null 3>&-) &
command_pid=$!
sleep "$timeout" 3>&- &
wait -n -p ended "$command_pid" "$!" && status=0 || status=$?
if [[ $ended == "$command_pid" ]]; then
  echo "exit $status" >&3
else
  echo timeout >&3
fi

# shellcheck shell=bash
# A node of its own: a carrickd with folders in $site. See common.sh for what must be set before.

daemon=

carrick() { "${program_folder:?}/carrick" --run-dir "${site:?}/run" "$@"; }

# start_node: starts carrickd, and waits until it answers.
start_node() {
  "$program_folder/carrickd" --run-dir "$site/run" --state-dir "$site/state" 2>"$site/carrickd.log" &
  daemon=$!
  wait_for 30 "carrickd to answer" answers
}

answers() { carrick status >/dev/null 2>&1; }

# add_stores COUNT FOLDER SIZE: in folders below.
add_stores() {
  local number
  for ((number = 1; number <= $1; number++)); do
    mkdir "$2/store-$number"
    carrick store add "$2/store-$number" --size "$3" >/dev/null
  done
}

# pid_of KIND: the first running process of a kind, replica or target.
pid_of() { carrick --json status | jq -er --arg kind "$1" 'first(.processes[] | select(.kind == $kind and .pid)).pid'; }

# is_in_sync VOLUME: whether each of its replicas has everything.
is_in_sync() {
  carrick --json volume show "$1" | jq -e 'all(.replicas[]; .state == "in-sync")' >/dev/null
}

# stop_node: ends everything by all means, for failures.
stop_node() {
  [[ $daemon ]] || return 0
  timeout 60 "$program_folder/carrick" --run-dir "$site/run" shutdown --force || true
  kill -KILL "$daemon" || true
  wait "$daemon" || true
  daemon=
} 2>/dev/null

# shellcheck shell=bash
# What all kinds of machine share: messages, the cache, a run's folder, its end.
# shellcheck disable=SC2154 # the options ($kernel, $timeout, ...) are set in run

# Exit codes of the runner's own, beside those of the command.
readonly exit_usage=2      # as most programs
readonly exit_no_kernel=3  # nothing was run
readonly exit_timeout=124  # as timeout(1)
readonly exit_broken=125   # the machine failed, not the command; as timeout(1)

say() { printf 'tests/kernel/run: %s\n' "$*" >&2; }
die_usage() { say "$1" && echo "${usage-}" >&2 && exit "$exit_usage"; }
die_no_kernel() { say "$1" && exit "$exit_no_kernel"; }
die_broken() { say "$1" && exit "$exit_broken"; }

have() { command -v "$1" >/dev/null; }

cache_dir() {
  local dir=${CARRICK_CACHE:-$HOME/.cache/carrick}
  mkdir -p "$dir" && (cd "$dir" && pwd -P)
}

# with_lock NAME COMMAND...: one at a time among all runners that use this cache.
with_lock() {
  local lock
  lock=$(cache_dir)/$1.lock
  (
    flock 9
    "${@:2}" 9>&-
  ) 9>"$lock"
}

# need KIND PROGRAM...: installs what KIND needs if a program is missing.
need() {
  local program
  for program in "${@:2}"; do
    have "$program" && continue
    [[ $EUID == 0 ]] && have apt-get && with_lock install "$here/install" "$1" >"$(cache_dir)/install.log" 2>&1
    return
  done
}

# prepare_run COMMAND...: makes this run's folder, with all that the machine is told.
prepare_run() {
  janitor='' machine='' loop_device='' helpers=()
  # Not in /tmp, which may be memory and which the machine covers with its own.
  run_dir=$(mktemp -d /var/tmp/carrick-kernel.XXXXXXXX)
  trap clean_up EXIT
  # Bash runs these between two commands, and at once while in `wait`: there we wait.
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM

  if [[ $results ]]; then
    mkdir -p "$results"
    results=$(cd "$results" && pwd -P)
  else
    mkdir "$run_dir/results"
    results=$run_dir/results
  fi
  console=$results/console.log
  : >"$console"

  scratch=
  if [[ $disk ]]; then
    scratch=$run_dir/scratch
    truncate -s "$disk" "$scratch"
  fi

  printf '%s\0' "$@" >"$run_dir/command"
  env -0 | grep -zE '^((CARRICK|CARGO|RUST)_[A-Za-z0-9_]*|PATH|HOME|TERM)=' \
    >"$run_dir/environment" || true # none is fine
  mkfifo "$run_dir"/{out,err,control}
}

# guest_settings: what guest-init.sh is told; the caller adds lines of its own.
guest_settings() {
  local name
  for name in kernel timeout results; do
    printf '%s=%q\n' "$name" "${!name}"
  done
  printf 'directory=%q udev=%q\n' "$PWD" "${CARRICK_UDEV-}"
  # Folders that the machine must not hide.
  local visible=("$PWD" "$results" "$(cd "$here/../.." && pwd -P)")
  [[ ! -d ${CARGO_TARGET_DIR-} ]] || visible+=("$(cd "$CARGO_TARGET_DIR" && pwd)")
  printf 'visible=(%s)\n' "${visible[*]@Q}"
}

# helper COMMAND...: a background process that ends with the run. It gets a session
# of its own, so that a signal to our process group leaves it to clean_up.
helper() {
  setsid "$@" &
  helpers+=($!)
}

# The machine writes to pipes of ours, not to our own outputs: it sets modes on
# what it writes to (non-blocking, raw), which other users of a terminal would see.
start_relays() {
  setsid cat <"$run_dir/out" &
  out_relay=$!
  setsid cat <"$run_dir/err" >&2 &
  err_relay=$!
  helpers+=("$out_relay" "$err_relay")
}

# For when we are killed by a signal that cannot be caught: does what clean_up does.
start_janitor() {
  # shellcheck disable=SC2016 # its own variables
  setsid bash -c '
    tail --pid="$1" -f /dev/null
    for leader in $2; do pkill -KILL -s "$leader"; done
    [[ ! $3 ]] || losetup --detach "$3"
    rm -rf "$4"
  ' janitor "$$" "$machine ${helpers[*]}" "$loop_device" "$run_dir" </dev/null >/dev/null 2>&1 &
  janitor=$!
}

# All of a machine's processes are in the session that its first process leads.
stop_machine() {
  [[ $machine ]] || return 0
  # Not to be told by bash that it was killed.
  { pkill -KILL -s "$machine" || true; wait "$machine" || true; } 2>/dev/null
}

clean_up() {
  local status=$? helper
  trap '' HUP INT TERM
  trap - EXIT
  stop_machine
  for helper in "${helpers[@]}" $janitor; do
    pkill -KILL -s "$helper" || true
    wait "$helper" || true
  done 2>/dev/null
  [[ ! $loop_device ]] || losetup --detach "$loop_device"
  rm -rf "$run_dir"
  exit "$status"
}

# Waits until the command has ended, or it is clear that it never will; exits.
wait_for_verdict() {
  setsid head -n 1 <"$run_dir/control" >"$run_dir/verdict" &
  local reader=$! ended parent_watch=
  helpers+=("$reader")

  # The machine itself stops the command after $timeout. This is for a machine that
  # hangs as a whole, or does not even boot.
  helper sleep "$((timeout + boot_allowance))"
  local alarm=$!
  # Nobody would read the outcome once our parent is gone. (Process 1 stays, and a
  # parent outside our container has the number 0.)
  if ((PPID > 1)); then
    helper tail --pid="$PPID" -f /dev/null
    parent_watch=$!
  fi
  start_janitor

  # wait -n with job numbers that have ended before returns at once: no race.
  wait -n -p ended "$machine" "$reader" "$alarm" $parent_watch 2>/dev/null || true
  case $ended in
    "$parent_watch") exit 129 ;; # as for a hang-up
    "$alarm")
      show_console
      say "timed out: the machine gave no answer for $((timeout + boot_allowance)) seconds"
      exit "$exit_timeout"
      ;;
  esac
  # Whatever the machine has left to do after its verdict does not concern us, as
  # the results and the outputs were written out before it.
  stop_machine
  finish_pipes "$reader"

  local verdict
  read -r verdict <"$run_dir/verdict" || true
  case $verdict in
    "exit "*) exit "${verdict#exit }" ;;
    timeout)
      say "timed out after $timeout seconds"
      exit "$exit_timeout"
      ;;
    "")
      show_console
      if grep -qE 'Kernel panic|Oops' "$console"; then
        die_broken "the machine's kernel panicked before the command ended"
      fi
      die_broken "the machine stopped before the command ended"
      ;;
    *)
      show_console
      die_broken "the machine could not be set up: $verdict"
      ;;
  esac
}

# finish_pipes READER: waits until all that the machine wrote was read.
finish_pipes() {
  # A pipe's reader still waits in open() if the machine died before its own open().
  : <>"$run_dir/control" <>"$run_dir/out" <>"$run_dir/err"
  # shellcheck disable=SC2086 # where there are none
  wait "$1" ${out_relay-} ${err_relay-} || true
}

show_console() {
  local lines=80 # an oops with its call trace
  say "the last $lines lines of the kernel's console:"
  tail -n "$lines" "$console" | tr -d '\r' >&2
}

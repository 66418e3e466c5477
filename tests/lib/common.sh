# shellcheck shell=bash
# What the scripts in tests/ share. They set $repository before.

# shellcheck disable=SC2034 # for those who source this: where cargo puts the programs
program_folder=${CARGO_TARGET_DIR:-${repository:?}/target}/release

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*" && exit 1; }
have() { command -v "$1" >/dev/null; }

# build_programs: the programs as a user gets them.
build_programs() {
  # rustup changes only the profiles of later shells.
  have cargo || PATH=$PATH:$HOME/.cargo/bin
  have cargo || die "cargo is not there: install Rust as https://rustup.rs says, and run this again."
  (cd "$repository" && cargo build --release --locked -p carrick-ctl -p carrick-replicator -p carrick-target) ||
    die "the build failed."
}

# wait_for SECONDS WHAT COMMAND...: until the command succeeds.
wait_for() {
  local until=$((SECONDS + $1)) what=$2
  shift 2
  until "$@"; do
    ((SECONDS < until)) || { say "waited in vain for $what" && return 1; }
    sleep 0.1
  done
}

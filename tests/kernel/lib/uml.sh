# shellcheck shell=bash
# User-mode Linux: a kernel that is a process of this machine, on this machine's files.
# shellcheck disable=SC2034,SC2154 # variables from and for run and common.sh

uml_find() {
  local candidate
  why_not="user-mode Linux needs ip, pkill and xz: as root, run 'tests/kernel/install uml'."
  need uml ip pkill xz || return 1
  why_not="there is no user-mode Linux kernel: run 'tests/kernel/build-uml' on a Debian machine, or let \$CARRICK_UML name one."
  for candidate in "${CARRICK_UML-}" "$here/../../../shared/uml/linux-uml.xz" "$(cache_dir)/linux-uml"; do
    [[ $candidate ]] || continue
    if [[ -f $candidate ]]; then
      [[ $candidate != *.xz ]] || candidate=$(uml_unpacked "$candidate") || return 1
      uml=$candidate
      return
    elif [[ $candidate == "${CARRICK_UML-}" ]]; then
      why_not="\$CARRICK_UML names no file: $candidate"
      return 1
    fi
  done
  return 1
}

# uml_unpacked FILE.xz: prints the path of the unpacked kernel, whose name says of
# which file it is made.
uml_unpacked() {
  local sum unpacked
  sum=$(sha256sum <"$1")
  unpacked=$(cache_dir)/linux-uml-${sum:0:16}
  [[ -f $unpacked ]] || with_lock linux-uml uml_unpack "$1" "$unpacked" || return 1
  echo "$unpacked"
}
uml_unpack() {
  [[ ! -f $2 ]] || return 0 # another run was faster
  xz -dc "$1" >"$2.new" &&
    chmod +x "$2.new" &&
    mv "$2.new" "$2"
}

uml_start() {
  boot_allowance=30 # boots in a second; more on a busy machine
  {
    guest_settings
    echo "out=/dev/ttyS1 err=/dev/ttyS2 control=/dev/ttyS3 modules="
    echo "scratch=${scratch:+/dev/ubda}"
  } >"$run_dir/settings"
  cp "$here/lib/guest-init.sh" "$run_dir/init"

  # The machine's memory is a file, which is slow on a disk, and holds programs.
  local memory_dir=$run_dir free
  free=$(df --output=avail -B1 /dev/shm 2>/dev/null | tail -n 1) || free=0
  if ((free > $(numfmt --from=iec "$memory"))) && ! findmnt -no OPTIONS /dev/shm | grep -qw noexec; then
    memory_dir=/dev/shm
  fi

  start_relays
  # ulimit: a panic aborts the process, whose core would be as large as its memory.
  # seccomp=on: system calls several times faster than with ptrace.
  (
    ulimit -c 0
    TMPDIR=$memory_dir exec setsid "$uml" \
      "mem=$memory" "ncpus=$cpus" seccomp=on "uml_dir=$run_dir/" umid=uml ${scratch:+"ubd0=$scratch"} \
      root=/dev/root rootfstype=hostfs rootflags=/ rw "init=$run_dir/init" "CARRICK_RUN=$run_dir" \
      con=null con0=null,fd:1 ssl=null ssl1=null,fd:3 ssl2=null,fd:4 ssl3=null,fd:5 \
      panic=-1 oops=panic noreboot raid=noautodetect
  ) </dev/null >>"$console" 2>&1 3>"$run_dir/out" 4>"$run_dir/err" 5>"$run_dir/control" &
  machine=$!
}

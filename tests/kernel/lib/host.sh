# shellcheck shell=bash
# This machine's own kernel.
# shellcheck disable=SC2034,SC2154 # variables from and for run and common.sh

host_find() {
  why_not="this machine's kernel has no ublk_drv that we may use: be root, and see that 'modprobe ublk_drv' makes /dev/ublk-control."
  [[ $EUID == 0 ]] || return 1
  [[ -c /dev/ublk-control ]] || { modprobe -q ublk_drv && [[ -c /dev/ublk-control ]]; } 2>/dev/null
}

host_start() {
  boot_allowance=10 # nothing boots: for a machine too busy to kill the command in time
  if [[ $scratch ]]; then
    loop_device=$(losetup --find --show "$scratch")
  fi
  helper dmesg --follow-new >"$console" 2>/dev/null
  local environment
  mapfile -d '' -t environment <"$run_dir/environment"
  setsid env -i "${environment[@]}" CARRICK_GUEST=host "CARRICK_RESULTS=$results" \
    ${loop_device:+"CARRICK_SCRATCH_DISK=$loop_device"} \
    bash "$here/lib/host-command.sh" "$run_dir" "$timeout" 3>"$run_dir/control" &
  machine=$!
}

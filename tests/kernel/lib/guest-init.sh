#!/bin/bash
# Process 1 of a test machine whose root is the host's own file system: makes a small
# system, runs the command, and tells the host how it ended.
# shellcheck disable=SC2154 # the settings file sets them
set -euo pipefail

# $CARRICK_RUN comes from the kernel's command line.
run_dir=$CARRICK_RUN
# shellcheck disable=SC1091 # it sets: kernel timeout results directory udev visible out err control modules scratch
. "$run_dir/settings"

report() { # the last thing that the host hears of us
  echo "$1" >"$control"
  # The end of process 1 would be a panic. The host ends the machine.
  while :; do sleep infinity; done
}
trap 'report "line $LINENO of guest-init.sh failed"' ERR

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
umask 022

# Folders of the host's which the file systems mounted below hide are reached through
# open descriptors after that.
declare -A held
for folder in "${visible[@]}"; do
  case $folder/ in
    /tmp/?* | /run/?* | /dev/shm/?*) exec {descriptor}<"$folder" && held[$folder]=$descriptor ;;
  esac
done

mountpoint -q /proc || mount -t proc proc /proc
mountpoint -q /sys || mount -t sysfs sys /sys
mountpoint -q /dev || mount -t devtmpfs dev /dev
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t tmpfs -o mode=0755 run /run
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t debugfs debug /sys/kernel/debug || true # for fault injection and traces
ln -sfn /proc/self/fd /dev/fd
ln -sfn /proc/self/fd/0 /dev/stdin
ln -sfn /proc/self/fd/1 /dev/stdout
ln -sfn /proc/self/fd/2 /dev/stderr

for folder in "${!held[@]}"; do
  descriptor=${held[$folder]}
  mkdir -p "$folder"
  # The link is not to be resolved to the folder's path, which is hidden.
  mount --no-canonicalize --bind "/proc/self/fd/$descriptor" "$folder"
  exec {descriptor}<&-
done

# The outputs, if they are terminals, pass bytes on as they are.
for channel in "$out" "$err" "$control"; do
  [[ $channel != /dev/ttyS* ]] || stty -F "$channel" raw -echo
done

if [[ $modules ]]; then
  mount --bind "$modules" /lib/modules
  # What udev or systemd would load, or make the device nodes of. Other modules come
  # by themselves when they are used.
  modprobe -a ublk_drv virtio_blk loop dm-mod fuse tun
fi

echo "carrick-${kernel}" >/proc/sys/kernel/hostname
ip link set lo up
ulimit -Hn 524288 # as systemd: the kernel's own limit for process 1 is 4096
# What is written to the host's files shall be there if this machine panics soon.
echo 100 >/proc/sys/vm/dirty_writeback_centisecs
echo 100 >/proc/sys/vm/dirty_expire_centisecs

unset CARRICK_RUN
mapfile -d '' -t environment <"$run_dir/environment"
mapfile -d '' -t command <"$run_dir/command"

if [[ $udev == 1 ]]; then
  /lib/systemd/systemd-udevd --daemon
  udevadm trigger --action=add
  udevadm settle
fi

# The command writes to pipes, as in any pipeline, not to terminals or to devices
# that only one process may open. (/run/carrick is for Carrick itself.)
mkdir -p /run/carrick-guest
mkfifo /run/carrick-guest/{out,err}
{
  cat /run/carrick-guest/out >"$out" &
  cat /run/carrick-guest/err >"$err" &
  wait
} &
relays=$!

# A control group holds whatever the command starts, daemons included.
group=/sys/fs/cgroup/command
mkdir "$group"
(
  trap - ERR
  echo "$BASHPID" >"$group/cgroup.procs"
  cd "$directory"
  for variable in "${environment[@]}"; do
    export "${variable?}"
  done
  export CARRICK_GUEST=$kernel CARRICK_RESULTS=$results
  [[ ! $scratch ]] || export CARRICK_SCRATCH_DISK=$scratch
  exec /usr/bin/setsid -- "${command[@]}" # the PATH is the command's from here on
) </dev/null >/run/carrick-guest/out 2>/run/carrick-guest/err &
command_pid=$!
sleep "$timeout" &
alarm=$!

status=0
trap - ERR
wait -n -p ended "$command_pid" "$alarm" || status=$?
if [[ $ended == "$command_pid" ]]; then
  verdict="exit $status"
else
  verdict=timeout
  dmesg --console-level debug
  echo w >/proc/sysrq-trigger # where blocked processes wait, for console.log
fi

# The outputs end when the last process that holds them does. A process that hangs
# in the kernel keeps them open, however: then all else should have passed within:
drain_limit=10 # seconds; more than a reader of our outputs makes us wait
echo 1 >"$group/cgroup.kill"
sleep "$drain_limit" &
wait -n "$relays" "$!" || true

# Not a plain sync, which waits for all devices: one of them may hang for good.
sync --file-system "$results"
report "$verdict"

# shellcheck shell=bash
# QEMU with a kernel of Debian's, on this machine's files through 9p.
# shellcheck disable=SC2034,SC2154 # variables from and for run and common.sh

# qemu_find NAME
qemu_find() {
  why_not="$1 needs QEMU: as root, run 'tests/kernel/install qemu' on a Debian machine that reaches its package mirror."
  need qemu qemu-system-x86_64 xz depmod ip pkill || return 1
  qemu_dir=$(cache_dir)/$1
  why_not="$1's kernel could not be fetched from Debian's package mirror, as $qemu_dir.log tells: see that the mirror can be reached."
  # The machine mounts its modules there. Where no kernel is installed it may be missing.
  mkdir -p /lib/modules 2>/dev/null || return 1
  [[ -d $qemu_dir ]] || with_lock "$1" "$here/lib/qemu-fetch.sh" "$1" "$qemu_dir" >"$qemu_dir.log" 2>&1
}

# The first files that the machine sees: enough to mount this machine's root.
qemu_make_initramfs() {
  local root=$run_dir/initramfs module count=10
  mkdir -p "$root"/{bin,dev,modules,root}
  cp "$qemu_dir/busybox" "$root/bin/"
  cp "$here/lib/qemu-init.sh" "$root/init"
  # In the order in which they must be loaded, which their new names keep.
  while read -r _ module _; do
    count=$((count + 1))
    xz -dcf <"$module" >"$root/modules/$count.ko" # -f: passes on what is not packed
  done < <(modprobe -d "$qemu_dir" -S "$qemu_release" --show-depends -a 9pnet_virtio 9p | grep ^insmod | awk '!seen[$0]++')
  (cd "$root" && find . | "$qemu_dir/busybox" cpio -o -H newc >"$run_dir/initramfs.cpio" 2>/dev/null)
}

qemu_start() {
  boot_allowance=180 # boots in some ten seconds when emulated; more on a busy machine
  qemu_release=$(ls "$qemu_dir/lib/modules")
  {
    guest_settings
    echo "out=/dev/vport0p1 err=/dev/vport0p2 control=/dev/vport0p3 scratch=${scratch:+/dev/vda}"
    printf 'modules=%q\n' "$qemu_dir/lib/modules"
  } >"$run_dir/settings"
  cp "$here/lib/guest-init.sh" "$run_dir/init"
  qemu_make_initramfs

  # A /dev/kvm without the processor's support may be there, and even begin to work,
  # but cannot be relied on. (If it does not begin to work, QEMU takes the other.)
  local accelerators=(-accel 'tcg,thread=multi')
  if grep -qE '^flags.* (vmx|svm)( |$)' /proc/cpuinfo; then
    accelerators=(-accel kvm "${accelerators[@]}")
  fi
  local disk_options=()
  [[ ! $scratch ]] || disk_options=(-drive "file=$scratch,format=raw,if=virtio,cache=unsafe,discard=unmap")

  local channel number=0 channels=()
  for channel in out err control; do
    channels+=(
      -chardev "file,id=$channel,path=$run_dir/$channel"
      -device "virtserialport,chardev=$channel,nr=$((++number))")
  done

  start_relays
  # security_model=none: files have the owner that they have here.
  # multidevs=remap: this machine may have more file systems than one under its root.
  # -no-reboot and panic=-1: a panic ends QEMU.
  setsid qemu-system-x86_64 -machine q35 "${accelerators[@]}" -cpu max -smp "$cpus" -m "$memory" \
    -nodefaults -no-user-config -display none -no-reboot \
    -kernel "$qemu_dir/vmlinuz" -initrd "$run_dir/initramfs.cpio" \
    -append "console=ttyS0 panic=-1 oops=panic CARRICK_RUN=$run_dir" \
    -chardev "file,id=console,path=$console,append=on" -serial chardev:console \
    -device virtio-serial "${channels[@]}" \
    -virtfs local,path=/,mount_tag=root,security_model=none,multidevs=remap \
    "${disk_options[@]}" </dev/null >>"$console" 2>&1 &
  machine=$!
}

#!/bin/busybox sh
# shellcheck shell=dash
# The first process of a QEMU machine: mounts the host's root, and hands over to
# guest-init.sh, whose folder the kernel's command line named in $CARRICK_RUN.
set -e
for module in /modules/*; do
  /bin/busybox insmod "$module"
done
# msize: the largest message that virtio takes; smaller ones are slower.
# cache=mmap: without it, programs cannot map files to write to them.
/bin/busybox mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=mmap root /root
/bin/busybox mount -t devtmpfs dev /root/dev
exec /bin/busybox switch_root /root "$CARRICK_RUN/init"

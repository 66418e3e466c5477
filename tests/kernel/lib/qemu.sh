# shellcheck shell=bash
qemu_find() { return 1; }

#!/usr/bin/env bash
# qemu-fetch.sh qemu-VERSION FOLDER: makes FOLDER with a kernel of Debian's, its
# modules, and the static busybox that its first steps need.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=apt.sh
. "$(dirname "${BASH_SOURCE[0]}")/apt.sh"

version=${1#qemu-} folder=$2
[[ ! -d $folder ]] || exit 0 # another run was faster
work=$(mktemp -d "$folder.XXXXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir "$work/new" "$work/unpacked"

apt_private "$work/apt" trixie trixie-backports
# As if nothing were installed here.
apt_options+=(-o Dir::State::status=/dev/null)

# Not the cloud kernels, which have no 9p.
image=$(apt-cache "${apt_options[@]}" pkgnames "linux-image-$version." |
  grep -E '^linux-image-[0-9.]+\+deb[0-9]+-amd64$' | sort -V | tail -n 1) || {
  echo "there is no package linux-image-$version.*-amd64 in Debian 13 and its backports" >&2
  exit 1
}
# Newer kernels are in several packages.
mapfile -t parts < <(apt-cache "${apt_options[@]}" depends "$image" |
  grep -oE 'linux-(base|binary|modules)-[0-9][^ ]+' | sort -u)
(cd "$work" && apt-get "${apt_options[@]}" download "$image" "${parts[@]}" busybox-static)
for package in "$work"/*.deb; do
  dpkg-deb -x "$package" "$work/unpacked"
done

# In /boot, or in newer packages beside the modules.
mv "$(find "$work/unpacked" -type f -name 'vmlinuz*')" "$work/new/vmlinuz"
mkdir "$work/new/lib"
mv "$work/unpacked/usr/lib/modules" "$work/new/lib/"
mv "$work/unpacked/usr/bin/busybox" "$work/new/"
depmod -b "$work/new" "$(ls "$work/new/lib/modules")"
mv "$work/new" "$folder"

# shellcheck shell=bash
# Debian's packages. See common.sh for what must be set.

# install_packages: those of .ci/packages that are missing.
install_packages() {
  local package wanted missing=()
  if ! have dpkg-query; then
    say "this is not Debian: if a program is missing, see .ci/packages for what is needed."
    return
  fi
  mapfile -t wanted < <(grep -vE '^[[:space:]]*(#|$)' "${repository:?}/.ci/packages")
  for package in "${wanted[@]}"; do
    is_installed "$package" || missing+=("$package")
  done
  have cc || missing+=(gcc libc6-dev) # cargo's linker
  ((${#missing[@]})) || return 0
  [[ $EUID == 0 ]] || die "packages are missing; as root, run: apt-get update && apt-get install -y ${missing[*]}"
  say "installing ${missing[*]}"
  # A fresh machine or container has no lists of packages.
  apt-get -q update || die "the lists of packages can't be fetched."
  DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "${missing[@]}" ||
    die "the packages can't be installed."
}

is_installed() { dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null | grep -qx installed; }

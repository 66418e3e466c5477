# shellcheck shell=bash
# Packages of Debian releases other than this machine's, without a change to its own
# configuration of apt.

# apt_mirror: prints the mirror that this machine uses.
apt_mirror() {
  local mirror
  # shellcheck disable=SC2016 # for apt to expand
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' 2>/dev/null | head -n 1) || true
  echo "${mirror:-http://deb.debian.org/debian}"
}

# apt_private FOLDER SUITE...: sets apt_options to apt options for these suites, whose
# lists it keeps in FOLDER, and fetches the lists.
apt_private() {
  local folder=$1 suite mirror
  mirror=$(apt_mirror)
  mkdir -p "$folder/lists/partial" "$folder/archives/partial"
  for suite in "${@:2}"; do
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main"
  done >"$folder/sources.list"
  apt_options=(
    -o "Dir::Etc::sourcelist=$folder/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null
    -o "Dir::State::lists=$folder/lists" -o "Dir::Cache=$folder"
    -o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false
    -o APT::Sandbox::User=root # apt's own user cannot read a home folder
    -q)
  apt-get "${apt_options[@]}" update
}

# shellcheck shell=bash
# What the scripts of launch/ share; sourced, not run. `set -euo pipefail` is theirs.

name='' dry_run=false rest=()

# What the user can mend.
fail() {
  echo "${0##*/}: $1" >&2
  exit 2
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail "this is bash $BASH_VERSION: put bash 4.4 or newer on PATH"

# The comment on top of the script.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit 0
}

# parse "VALUE FLAGS" "SWITCHES" "$@": sets a variable named like each flag that is given, `name` to the one word
# without a flag, and `rest` to the words behind `--`.
parse() {
  local values=" $1 " switches=" dry_run $2 " flag
  shift 2
  while [[ $# -gt 0 ]]; do
    flag="${1#--}"
    case "$1" in
      --help) usage ;;
      --)
        shift
        rest=("$@")
        return
        ;;
      --*)
        [[ "$flag" =~ ^[a-z_]+$ ]] || fail "unknown flag $1; --help shows the flags"
        if [[ "$switches" == *" $flag "* ]]; then
          printf -v "$flag" true
          shift
        elif [[ "$values" == *" $flag "* ]]; then
          [[ $# -ge 2 && "$2" != --* ]] || fail "$1 needs a value"
          printf -v "$flag" '%s' "$2"
          shift 2
        else
          fail "unknown flag $1; --help shows the flags"
        fi
        ;;
      *)
        [[ -z "$name" ]] || fail "$1 is one word too many: what is for \`python -m launch\` comes behind --"
        name="$1"
        shift
        ;;
    esac
  done
}

# count FLAG VALUE: refuses what is not a positive number.
count() {
  [[ "$2" =~ ^[1-9][0-9]*$ ]] || fail "$1 $2: give a number of at least 1"
}

# number FLAG VALUE: refuses what is not a number, 0 among them.
number() {
  [[ "$2" =~ ^[0-9]+$ ]] || fail "$1 $2: give a number"
}

# Runs a command, or prints it with --dry_run.
run() {
  if "$dry_run"; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
